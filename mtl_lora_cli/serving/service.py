"""A run behind HTTP: rows in, labels and probabilities out.

| route | what it does |
| --- | --- |
| `POST /v1/predict` | `task` and `rows`, or rows that name their task in the field `task_column` → `predictions`, as `mtl-lora predict` gives them, and `timing` |
| `GET /v1/tasks` | the run's tasks |
| `GET /health` | 200 while requests are taken, 503 while it ends |
| `GET /metrics` | counters in Prometheus' text format |

What is wrong is one line, `{"error": "…"}`: 400 the body is no JSON of this form, or a row cannot be read; 401 no token; 404
no such route or task; 405 another method; 413 too large, also a picture; 415 no JSON; 422 more rows than a request may have; 429
too many rows wait; 500 the model finds no number for a row; 503 it ends.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException

from mtl_lora_cli.errors import NoNumbersError, UsageError, did_you_mean
from mtl_lora_cli.evaluation.predict import Predictor, Rendered
from mtl_lora_cli.serving.batches import Batches, Full
from mtl_lora_cli.serving.pictures import Gallery, TooLarge
from mtl_lora_cli.visible import visible_line

_KEYS = ("task", "task_column", "rows")


@dataclass(frozen=True)
class Limits:
    """What is taken.

    Attributes:
        body: bytes of a request.
        rows: of a request.
        waiting: rows that may wait.
        held: bytes of all requests that are not answered yet.
    """

    body: int = 2**20
    rows: int = 256
    waiting: int = 4096
    held: int = 2**28


class Wrong(Exception):
    """A request that is answered with a status and one line."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Counters:
    """What `/metrics` tells."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        given: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("mtl_lora_requests", "Requests by status.", ["status"], **given)
        self.rows = Counter("mtl_lora_rows", "Rows answered, by task.", ["task"], **given)
        self.waiting = Gauge("mtl_lora_waiting_rows", "Rows that wait.", **given)
        self.seconds = Histogram("mtl_lora_seconds", "From request to answer.", **given)
        sizes = [1, 2, 4, 8, 16, 32, 64, 128, 256]
        self.together = Histogram(
            "mtl_lora_batch_rows", "Rows answered together.", buckets=sizes, **given
        )
        self.computing = Histogram("mtl_lora_batch_seconds", "Of the model, a batch.", **given)

    def tell(self, rows: int, seconds: float) -> None:
        """Of a batch."""
        self.together.observe(rows)
        self.computing.observe(seconds)


class Service:
    """The application and what it stands on.

    Args:
        predictor: of the run.
        name: of the run.
        limits: what is taken.
        token: that a request has to bring; None: none.
        gallery: which pictures are taken.

    Attributes:
        app: for an ASGI server.
    """

    def __init__(
        self,
        predictor: Predictor,
        name: str,
        limits: Limits,
        token: str | None = None,
        gallery: Gallery | None = None,
    ) -> None:
        self._predictor, self._name, self._limits, self._token = predictor, name, limits, token
        self._gallery = gallery or Gallery()
        self._held = 0
        self._counters = Counters()
        self._batches = Batches(predictor, limits.waiting, self._counters.tell)
        self._counters.waiting.set_function(lambda: self._batches.waiting)
        self._ending = False
        self.app = FastAPI(title="mtl-lora", docs_url=None, redoc_url=None, openapi_url=None)
        self.app.middleware("http")(self._guarded)
        self.app.add_exception_handler(HTTPException, _plain)
        self.app.post("/v1/predict")(self._predict)
        self.app.get("/v1/tasks")(self._tasks)
        self.app.get("/health")(self._health)
        self.app.get("/metrics")(self._metrics)

    def end(self) -> None:
        """From now on `/health` says so; what was taken is answered all the same."""
        self._ending = True

    def close(self) -> None:
        """Answer what waits; nothing is taken any more."""
        self._batches.close()

    async def _guarded(
        self, request: Request, call: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        """Every request: its token, its status, and errors as one line."""
        try:
            if request.url.path != "/health":
                self._require_token(request)
            response = await call(request)
        except Wrong as wrong:
            response = _error(wrong.status, str(wrong))
        except Exception as error:  # a fault of ours is no traceback in an answer
            response = _error(500, f"{type(error).__name__}: {error}")
        self._counters.requests.labels(str(response.status_code)).inc()
        return response

    def _require_token(self, request: Request) -> None:
        if self._token is None:
            return
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self._token}".encode()):
            raise Wrong(
                401, "expected the header 'Authorization: Bearer TOKEN' with the right token"
            )

    async def _predict(self, request: Request) -> Response:
        came = time.monotonic()
        body = bytearray()
        try:
            if not await self._takes(request, body):
                return self._full(f"{self._limits.held:,} bytes of requests wait already")
            return await self._answered(body, came)
        finally:
            self._held -= len(body)

    async def _answered(self, body: bytearray, came: float) -> Response:
        asked = self._read(body)
        if asked.pictures:  # other requests are read meanwhile
            await asyncio.to_thread(self._look, asked)
        try:
            future = self._batches.put(asked)
        except Full:
            return self._full(f"{self._limits.waiting:,} rows wait already")
        try:
            answered = await asyncio.wrap_future(future)
        except UsageError as error:
            raise Wrong(400, str(error)) from None
        except NoNumbersError as error:
            raise Wrong(500, str(error)) from None
        for name in asked.names:
            self._counters.rows.labels(name).inc()
        self._counters.seconds.observe(time.monotonic() - came)
        timing = {
            "waited_ms": 1000 * answered.waited,
            "computed_ms": 1000 * answered.computed,
            "rows_together": answered.rows,
        }
        return JSONResponse({"predictions": answered.predictions, "timing": timing})

    def _full(self, why: str) -> Response:
        """Not now."""
        response = _error(
            503 if self._ending else 429,
            f"{'the server ends' if self._ending else why}: ask again later",
        )
        response.headers["Retry-After"] = "1"
        return response

    def _look(self, asked: Rendered) -> None:
        """Every picture of a request, before it waits with others."""
        try:
            self._gallery.require(asked.pictures)
        except TooLarge as error:
            raise Wrong(413, str(error)) from None
        except UsageError as error:
            raise Wrong(400, str(error)) from None

    async def _takes(self, request: Request, body: bytearray) -> bool:
        """Read a request's body; whether there is room for it beside those that are not answered yet."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Wrong(415, f"content-type: expected application/json, received '{kind}'")
        most = self._limits.body
        too_large = Wrong(413, f"the body has more than {most:,} bytes")
        declared = request.headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > most:
            raise too_large
        async for part in request.stream():
            body += part
            self._held += len(part)
            if len(body) > most:
                raise too_large
            if self._held > max(self._limits.held, len(body)):
                return False
        return True

    def _read(self, body: bytearray) -> Rendered:
        """The rows of a request, rendered."""
        content = _parsed(body)
        for key in content:
            if key not in _KEYS:
                raise Wrong(
                    400, f"unknown key '{key}'{did_you_mean(key, _KEYS)}; keys: {', '.join(_KEYS)}"
                )
        for key in ("task", "task_column"):
            if not isinstance(content.get(key), str | None):
                raise Wrong(400, f"{key}: expected a text, received {_short(content[key])}")
        rows = content.get("rows")
        if not isinstance(rows, list) or not rows:
            raise Wrong(400, f"rows: expected a list of at least one row, received {_short(rows)}")
        if len(rows) > self._limits.rows:
            raise Wrong(
                422, f"rows: at most {self._limits.rows:,} a request, received {len(rows):,}"
            )
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                raise Wrong(400, f"rows[{number}]: expected an object, received {_short(row)}")
        task, column = content.get("task"), content.get("task_column")
        if task is not None and task not in self._predictor.tasks:
            known = self._predictor.tasks
            raise Wrong(
                404, f"unknown task '{task}'{did_you_mean(task, known)}; tasks: {', '.join(known)}"
            )
        if task is not None and column is not None:
            raise Wrong(400, "give task or task_column, not both")
        if task is None and column is None and len(self._predictor.tasks) > 1:
            raise Wrong(400, f"give task or task_column; tasks: {', '.join(self._predictor.tasks)}")
        try:
            return self._predictor.render(rows, task=task, task_column=column)
        except UsageError as error:
            raise Wrong(400, str(error)) from None

    async def _tasks(self) -> Response:
        return JSONResponse({"run": self._name, "tasks": list(self._predictor.tasks)})

    async def _health(self) -> Response:
        status = 503 if self._ending else 200
        return JSONResponse({"status": "ends" if self._ending else "ok"}, status)

    async def _metrics(self) -> Response:
        return PlainTextResponse(
            generate_latest(self._counters.registry), media_type="text/plain; version=0.0.4"
        )


def _parsed(body: bytearray) -> dict[str, Any]:
    """A JSON object, as the standard has it: no NaN, no key twice."""

    def no_number(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key stands twice in one object")
        return found

    try:
        content = json.loads(body, parse_constant=no_number, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise Wrong(400, f"the body is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise Wrong(400, f"the body: expected an object, received {_short(content)}")
    return content


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _error(status: int, text: str) -> Response:
    return JSONResponse({"error": visible_line(" ".join(text.split()))}, status)


async def _plain(request: Request, error: Exception) -> Response:
    """Routes and methods that are not there."""
    assert isinstance(error, HTTPException)
    path = visible_line(request.url.path)[:100]
    said = {404: f"no route {path}", 405: f"{path} takes no {request.method}"}
    return _error(error.status_code, said.get(error.status_code, str(error.detail)))
