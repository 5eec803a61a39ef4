"""Pictures in requests: as bytes, as files below one folder, and what is refused in a line."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.evaluation.predict import Predictor
from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.training.prepare import prepare
from mtl_lora_cli.training.run import start

from ..sights import CAPTION, COLOUR, SIDE

uvicorn = pytest.importorskip("uvicorn", reason="serve is an extra: pip install 'mtl-lora[serve]'")

pytestmark = pytest.mark.slow

TEMPLATES = {
    "colour": COLOUR,
    "caption": {**CAPTION, "generate": {"max_new_tokens": 4}},
    "side": SIDE,
}
ROWS = 6


@pytest.fixture(scope="module")
def gallery(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that is served from: pictures, and what is none."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "pictures").symlink_to(squares / "pictures")  # the folder itself may be a link
    root = folder / "root"
    (root / "pictures").mkdir(parents=True)
    for row in rows_of(squares):
        (root / row["image"]).write_bytes((squares / row["image"]).read_bytes())
    (root / "notes.txt").write_text("no picture")
    (root / "empty.png").write_bytes(b"")
    (folder / "secret.png").write_bytes((root / rows_of(squares)[0]["image"]).read_bytes())
    (root / "link.png").symlink_to(folder / "secret.png")
    return root


@pytest.fixture(scope="module")
def run(llava: BaseModel, squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two tasks with pictures, one of them with free answers, and one of text alone."""
    folder = tmp_path_factory.mktemp("two")
    for name, template in TEMPLATES.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(template))
    tasks = [{"name": n, "template": f"{n}.yaml", "source": str(squares)} for n in TEMPLATES]
    recipe = {
        "base_model": str(llava.folder),
        "adapter": {"method": "mtl-lora", "rank": 4, "target_modules": ["q_proj", "v_proj"]},
        "tasks": tasks,
        "training": {"max_steps": 2, "rows_per_step": 2, "row_length": 128, "learning_rate": 1e-2},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return Run(start(prepare(load_recipe(folder / "recipe.yaml")), folder / "run"))


@pytest.fixture(scope="module")
def service(run: Run, gallery: Path) -> Iterator[Any]:
    from mtl_lora_cli.serving.pictures import Gallery
    from mtl_lora_cli.serving.service import Limits, Service

    found = Service(
        Predictor(run, gallery), "two", Limits(body=60_000, held=130_000), None, Gallery(gallery, 5_000)
    )  # fmt: skip
    yield found
    found.close()


@pytest.fixture(scope="module")
def place(service: Any) -> Iterator[str]:
    """Where it answers over HTTP, in this process."""
    server = uvicorn.Server(uvicorn.Config(service.app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    host, port = server.servers[0].sockets[0].getsockname()
    yield f"{host}:{port}"
    server.should_exit = True
    thread.join()


def ask(place: str, task: str, *rows: Any) -> tuple[int, Any]:
    connection = HTTPConnection(place, timeout=60)
    body = json.dumps({"task": task, "rows": rows})
    connection.request("POST", "/v1/predict", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    found = json.loads(answer.read())
    connection.close()
    return answer.status, found


def rows_of(squares: Path) -> list[dict[str, Any]]:
    lines = (squares / "test.jsonl").read_text().splitlines()[:ROWS]
    return [json.loads(line) for line in lines]


def sent(content: bytes) -> dict[str, Any]:
    return {"image": {"base64": base64.b64encode(content).decode()}}


def test_bytes_and_paths_from_many_at_once_give_what_predict_gives(
    run: Run, place: str, squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing of them is written down."""
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path))
    rows = rows_of(squares)
    right = Predictor(run, squares).predict(rows, task="all")
    assert len({json.dumps(one["colour"]) for one in right}) == ROWS  # no two are alike
    given = [{**row, **sent((squares / row["image"]).read_bytes())} for row in rows]
    assert Predictor(run).predict(given, task="all") == right

    def client(number: int) -> list[tuple[Any, Any]]:
        found = []
        for step in range(4):
            at = (number + step) % ROWS
            row, task = rows[at], ("colour", "side", "colour", "caption")[step]
            given = row if number % 2 else {**row, **sent((squares / row["image"]).read_bytes())}
            status, answer = ask(place, task, given)
            assert status == 200, answer
            found.append((answer["predictions"][0], right[at][task]))
        return found

    with ThreadPoolExecutor(8) as pool:
        pairs = [pair for found in pool.map(client, range(16)) for pair in found]
    assert len(pairs) == 64
    for one, other in pairs:
        found, right_one = dict(one), dict(other)
        assert found.pop("probabilities", {}) == pytest.approx(
            right_one.pop("probabilities", {}), abs=1e-4
        )
        assert found == right_one
    assert not list(tmp_path.rglob("*"))


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def bad(squares: Path) -> list[tuple[int, str, Any]]:
    whole = (squares / rows_of(squares)[0]["image"]).read_bytes()
    noise = np.random.default_rng(0).integers(0, 256, (120, 150, 3), dtype=np.uint8)
    return [
        (400, "task 'colour': images: base64: expected a picture's bytes, received 'not base64!'", {"image": {"base64": "not base64!"}}),
        (400, "task 'colour': images: base64: expected a picture's bytes, received 'ä'", {"image": {"base64": "ä"}}),
        (400, "task 'colour': images: base64: expected a picture's bytes, received nothing", {"image": {"base64": ""}}),
        (400, "task 'colour': images: expected the path of a picture, received {'base64': 5}", {"image": {"base64": 5}}),
        (400, "task 'colour': images: expected the path of a picture, received 7", {"image": 7}),
        (400, "task 'colour': images: the row shows no picture", {"image": None}),
        (400, "task 'colour': images: …", {"picture": "x"}),
        (400, "images: base64: is no picture that is known; expected JPEG, PNG and the like", sent(b"GIF89?")),
        (400, "images: base64: broken or cut off: …", sent(whole[: len(whole) // 2])),
        (413, "images: 400 x 300 pixels, expected 5,000 at most", sent(encoded(np.zeros((300, 400, 3), np.uint8)))),
        (413, "the body has more than 60,000 bytes", sent(encoded(noise))),
        (400, "images: no such file: 'pictures/none.png', expected a file", {"image": "pictures/none.png"}),
        (400, "images: a folder: 'pictures', expected a file", {"image": "pictures"}),
        (400, "images: notes.txt: is no picture that is known; expected JPEG, PNG and the like", {"image": "notes.txt"}),
        (400, "images: empty.png: is empty", {"image": "empty.png"}),
        (400, "images: '../secret.png' leads out of the folder of pictures", {"image": "../secret.png"}),
        (400, "images: 'pictures/../../secret.png' leads out of the folder of pictures", {"image": "pictures/../../secret.png"}),
        (400, "images: '/etc/passwd' leads out of the folder of pictures", {"image": "/etc/passwd"}),
        (400, "images: 'link.png' leads out of the folder of pictures", {"image": "link.png"}),
    ]  # fmt: skip


def test_what_is_no_picture_is_one_line_and_names_no_folder(
    place: str, squares: Path, gallery: Path
) -> None:
    good = rows_of(squares)[0]
    for status, expected, row in bad(squares):
        found, said = ask(place, "colour", good, row)
        assert found == status, (expected, said)
        assert set(said) == {"error"} and "\n" not in said["error"]
        assert str(gallery) not in said["error"] and str(gallery.parent) not in said["error"]
        line = expected if "body" in expected else f"rows[1]: {expected}"
        assert said["error"].startswith(line.removesuffix("…")), said
        if not line.endswith("…"):
            assert said["error"] == line
    assert ask(place, "colour", good)[0] == 200


def test_without_a_folder_no_path_is_taken(run: Run, squares: Path, service: Any) -> None:
    from mtl_lora_cli.errors import UsageError
    from mtl_lora_cli.serving.pictures import Gallery

    (row,) = rows_of(squares)[:1]
    asked = Predictor(run, squares).render([row], task="colour")
    with pytest.raises(UsageError, match=r"rows\[0\]: images: a path is not taken: send {\"base64"):
        Gallery().require(asked.pictures)


def test_more_bytes_than_are_held_have_to_come_again(
    place: str, service: Any, squares: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three requests of a good 50,000 bytes where 130,000 are held."""
    begun, go = threading.Semaphore(0), threading.Event()
    look = service._gallery.require

    def slow(self: Any, pictures: Any) -> None:
        begun.release()
        assert go.wait(30)
        look(pictures)

    monkeypatch.setattr(type(service._gallery), "require", slow)
    row = {**rows_of(squares)[0], "more": "x" * 50_000}
    with ThreadPoolExecutor(2) as pool:
        held = [pool.submit(ask, place, "colour", row) for _ in range(2)]
        assert all(begun.acquire(timeout=30) for _ in held)
        status, said = ask(place, "colour", row)
        assert (status, said) == (429, {"error": "130,000 bytes of requests wait already: ask again later"})  # fmt: skip
        go.set()
        assert [one.result()[0] for one in held] == [200, 200]
    assert service._held == 0
