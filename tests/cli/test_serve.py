"""`mtl-lora serve` as a process of its own, asked over loopback by many at once."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import mtl_lora_cli

pytest.importorskip("fastapi", reason="serve is an extra: pip install 'mtl-lora[serve]'")

pytestmark = pytest.mark.slow

TOKEN = "a-token"
OWN = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
WORDS = ("red", "dog", "blue", "cup", "a very long and quite unlikely color", "teal", "king")


class Client:
    """Asks one server.

    Args:
        process: that serves; its first line is where.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        assert line.startswith("http://127.0.0.1:"), line or process.communicate()
        self.place = urlsplit(line).netloc

    def send(
        self, body: Any, path: str = "/v1/predict", method: str = "POST", **headers: str
    ) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(self.place, timeout=60)
        given = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, given, {**OWN, **headers})
        return connection

    def ask(self, *given: Any, **more: Any) -> tuple[int, Any]:
        connection = self.send(*given, **more)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, json.loads(text) if text.startswith("{") else text


@pytest.fixture(scope="module")
def run(small_run: tuple[Path, Any]) -> Any:
    return mtl_lora_cli.load(small_run[0])


@pytest.fixture(scope="module")
def served(
    small_run: tuple[Path, Any],
    started: Callable[..., subprocess.Popen[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Client]:
    """One server for all tests: the one that ends it stands behind those that ask."""
    tmp_path = tmp_path_factory.mktemp("served")
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    process = started(
        "serve", str(small_run[0]), "--port", "0", "--token-file", "token", "--max-rows", "300",
        "--max-bytes", "40000", "--max-waiting", "900", cwd=tmp_path,
    )  # fmt: skip
    try:
        yield Client(process)
    finally:
        process.kill()
        process.communicate()


BAD: tuple[tuple[int, str, Any, dict[str, Any]], ...] = (
    (400, "the body is not valid JSON: Expecting value: line 1 column 1 (char 0)", b"", {}),
    (400, "the body is not valid JSON: …", b'{"task": ', {}),
    (400, "the body is not valid JSON: …", b"\xff\xfe{}", {}),
    (400, "the body is not valid JSON: NaN is no JSON", b'{"task": "warm", "rows": [NaN]}', {}),
    (400, "the body is not valid JSON: a key stands twice in one object", b'{"task": "warm", "task": "cold"}', {}),
    (400, "the body is not valid JSON: …", b"[" * 30000, {}),
    (400, "the body: expected an object, received []", [], {}),
    (400, "unknown key 'row'; did you mean 'rows'?; keys: task, task_column, rows", {"task": "warm", "row": []}, {}),
    (400, "rows: expected a list of at least one row, received []", {"task": "warm", "rows": []}, {}),
    (400, "rows: expected a list of at least one row, received null", {"task": "warm"}, {}),
    (400, "rows[1]: expected an object, received 'x'".replace("'", '"'), {"task": "warm", "rows": [{"word": "a"}, "x"]}, {}),
    (400, "task: expected a text, received 5", {"task": 5, "rows": [{"word": "a"}]}, {}),
    (404, "unknown task 'wram'; did you mean 'warm'?; tasks: warm, cold", {"task": "wram", "rows": [{"word": "a"}]}, {}),
    (400, "give task or task_column; tasks: warm, cold", {"rows": [{"word": "a"}]}, {}),
    (400, "give task or task_column, not both", {"task": "warm", "task_column": "t", "rows": [{"word": "a"}]}, {}),
    (400, "rows[0]: task 'warm': …", {"task": "warm", "rows": [{"wort": "a"}]}, {}),
    (400, "rows[0]: has no field 't'; fields: word", {"task_column": "t", "rows": [{"word": "a"}]}, {}),
    (422, "rows: at most 300 a request, received 301", {"task": "warm", "rows": [{"word": "a"}] * 301}, {}),
    (413, "the body has more than 40,000 bytes", {"task": "warm", "rows": [{"word": "a" * 40000}]}, {}),
    (415, "content-type: expected application/json, received 'text/plain'", {}, {"Content-Type": "text/plain"}),
    (401, "expected the header 'Authorization: Bearer TOKEN' with the right token", {}, {"Authorization": "Bearer b"}),
    (404, "no route /v1/predic", {}, {"path": "/v1/predic"}),
    (405, "/v1/predict takes no GET", {}, {"method": "GET"}),
)  # fmt: skip


def test_many_at_once_get_what_predict_gives_and_the_wrong_ones_a_line(
    served: Client, run: Any
) -> None:
    tasks = ("warm", "cold")
    right = {
        (task, word): run.predict([{"word": word}], task=task)[0]
        for task in tasks
        for word in WORDS
    }
    assert len({round(one["probabilities"]["yes"], 4) for one in right.values()}) > len(WORDS)
    wrong: list[Any] = []

    def client(number: int) -> int:
        """Rows of both tasks, in an order of its own, and now and then a request that is wrong."""
        asked = [(tasks[(number + n) % 2], WORDS[(number * 3 + n) % len(WORDS)]) for n in range(9)]
        rows = [{"word": word, "t": task} for task, word in asked]
        status, found = served.ask({"task_column": "t", "rows": rows})
        if number % 4 == 0:
            wrong.append(served.ask({"task": "warm", "rows": [{"wort": word} for word in WORDS]}))
        assert status == 200, found
        for key, one in zip(asked, found["predictions"], strict=True):
            assert (one["task"], one["label"]) == (key[0], right[key]["label"])
            assert one["probabilities"] == pytest.approx(right[key]["probabilities"], abs=1e-4)
        assert found["timing"]["computed_ms"] > 0 and found["timing"]["waited_ms"] >= 0
        return int(found["timing"]["rows_together"])

    with ThreadPoolExecutor(24) as pool:
        together = list(pool.map(client, range(96)))
    assert max(together) > 9, "no two requests went together"
    assert {status for status, _ in wrong} == {400} and len(wrong) == 24

    for status, expected, body, more in BAD:
        found, text = served.ask(body, **more)
        assert found == status, (expected, text)
        assert set(text) == {"error"} and "\n" not in text["error"]
        if expected.endswith("…"):
            assert text["error"].startswith(expected[:-1])
        else:
            assert text["error"] == expected
    assert served.ask(b"", "/health", "GET", Authorization="") == (200, {"status": "ok"})
    assert served.ask(b"", "/v1/tasks", "GET") == (200, {"run": "small", "tasks": list(tasks)})
    _, metrics = served.ask(b"", "/metrics", "GET")
    assert 'mtl_lora_requests_total{status="200"} 98.0' in metrics
    counted = [line for line in metrics.splitlines() if line.startswith("mtl_lora_rows_total")]
    assert sum(float(line.rpartition(" ")[2]) for line in counted) == 96 * 9


def test_a_signal_ends_it_when_all_that_was_asked_is_answered(served: Client) -> None:
    """And what waits for no room is told to come again."""
    rows = [{"word": WORDS[n % len(WORDS)]} for n in range(300)]
    sent = [served.send({"task": "warm", "rows": rows}) for _ in range(8)]
    time.sleep(1.0)
    served.process.send_signal(signal.SIGTERM)
    answers = [connection.getresponse() for connection in sent]
    found = [(answer.status, json.loads(answer.read())) for answer in answers]
    assert {status for status, _ in found} <= {200, 429}
    done = [one["predictions"] for status, one in found if status == 200]
    assert len(done) >= 3 and all(len(one) == len(rows) for one in done)
    assert all(one == done[0] for one in done)
    assert served.process.wait(30) == 0
    assert served.process.stderr is not None
    assert "all that was asked has been answered" in served.process.stderr.read()
    with pytest.raises(OSError):
        served.ask(b"", "/health", "GET")


def test_where_it_serves_is_said_and_kept_private(
    small_run: tuple[Path, Any], invoke: Callable[..., Any], tmp_path: Path
) -> None:
    run = str(small_run[0])
    for options, error in (
        (["--host", "0.0.0.0"], "--host 0.0.0.0 can be reached from elsewhere: give a token with --token-file or MTL_LORA_TOKEN"),
        (["--token-file", "none"], "--token-file none: No such file or directory"),
        (["--host", "192.0.2.1", "--token-file", "t"], "--host 192.0.2.1 --port 8100: …"),
        (["--token-file", "two"], "--token-file two: expected one word of ASCII characters"),
    ):  # fmt: skip
        (tmp_path / "t").write_text("x")
        (tmp_path / "two").write_text("a b")
        ended = invoke("serve", run, *options)
        assert ended.returncode == 2
        line = ended.stderr.strip().splitlines()[-1]
        assert line.startswith(f"error: {error.removesuffix('…')}"), line


def test_no_thread_is_left_behind(run: Any) -> None:
    from mtl_lora_cli.serving.batches import Batches, Full

    before = threading.active_count()
    batches = Batches(run, most=3)
    asked = run.render([{"word": "red"}, {"word": "dog"}], task="warm")
    future = batches.put(asked)
    with pytest.raises(Full):
        [batches.put(run.render([{"word": "red"}] * 4, task="warm")) for _ in range(2)]
    batches.close()
    assert [one["task"] for one in future.result().predictions] == ["warm", "warm"]
    assert threading.active_count() == before
    with pytest.raises(Full):
        batches.put(asked)
