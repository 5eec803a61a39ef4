"""What may be wrong with pictures and maps: one line each, with file, line, key, what came and what was expected."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mtl_lora_cli.data.bind import bind_tasks
from mtl_lora_cli.data.map_audit import count_maps
from mtl_lora_cli.data.picture_rows import read_map_rows
from mtl_lora_cli.errors import ExitCode, UsageError
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.tasks.maps import spec_of

TEMPLATES = {
    "seg": "objective: segmentation\nclasses: [a, b, c]\nignore: 255\n",
    "depth": "objective: depth\nrange: [0.5, 10.0]\n",
    "normals": "objective: normals\n",
    "edges": "objective: edges\n",
}
H, W = 12, 16


def grey(value: int = 0, kind: Any = np.uint8, size: tuple[int, int] = (H, W)) -> np.ndarray:
    return np.full(size, value, dtype=kind)


def whole(folder: Path) -> None:
    """Two rows, all right."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(2):
        row = {"image": f"{number}.jpg"}
        pixels = generator.integers(0, 255, (H, W, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / row["image"])
        for name, values in (
            ("seg", grey(number)),
            ("depth", grey(100)),
            ("normals", pixels),
            ("edges", grey(255)),
        ):
            row[name] = f"{number}-{name}.png"
            Image.fromarray(values).save(folder / row[name])
        rows.append(row)
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    for name, text in TEMPLATES.items():
        template = f"description: x\nimage: image\ntarget: {name}\n{text}"
        (folder.parent / f"{name}.yaml").write_text(template)
    tasks = [f"  - {{name: {name}, template: {name}.yaml, source: rows}}" for name in TEMPLATES]
    (folder.parent / "recipe.yaml").write_text(
        "images: {size: [16, 16]}\ntasks:\n" + "\n".join(tasks) + "\n"
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "rows"
    place.mkdir()
    whole(place)
    return place


def looked_at(folder: Path) -> list[Any]:
    """As `validate` does: the rows of all tasks together, then every map."""
    tasks = bind_tasks(load_recipe(folder.parent / "recipe.yaml"))
    read_map_rows(tasks, [spec_of(task.template) for task in tasks], "train")
    return count_maps(tasks)


def saved(name: str, values: np.ndarray, **options: Any) -> Callable[[Path], None]:
    return lambda folder: Image.fromarray(values).save(folder / name, **options)


def written(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content)


def stored(name: str, values: np.ndarray, field: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        np.save(folder / name, values)
        row(**{field: name})(folder)

    return change


def row(**fields: Any) -> Callable[[Path], None]:
    """Fields of the second row."""

    def change(folder: Path) -> None:
        first, second = (folder / "train.jsonl").read_text().splitlines()
        kept = {k: v for k, v in {**json.loads(second), **fields}.items() if v is not ...}
        (folder / "train.jsonl").write_text(f"{first}\n{json.dumps(kept)}\n")

    return change


def template(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder.parent / f"{name}.yaml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return change


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-60])


def bomb(folder: Path) -> None:
    """A PNG of a few bytes that claims 30,000 by 30,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b""))
    (folder / "1.jpg").write_bytes(content + chunk(b"IEND", b""))


def many(folder: Path) -> None:
    frames = [Image.fromarray(grey(n)) for n in (0, 9)]
    frames[0].save(folder / "1.gif", save_all=True, append_images=frames[1:])
    row(image="1.gif")(folder)


def tunnel(folder: Path) -> None:
    """A path of a row leads out."""
    (folder.parent / "secret.png").write_bytes((folder / "1-seg.png").read_bytes())
    row(seg="../secret.png")(folder)


def nan(folder: Path) -> None:
    values = grey(3, np.float32)
    values[2, 3] = np.nan
    stored("1-depth.npy", values, "depth")(folder)


ROW = "train.jsonl:2: "
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "no picture": (row(image="9.jpg"), ROW + "image: no such file: '9.jpg', expected a file below"),
    "a picture's field is empty": (row(image=""), ROW + "image: is empty, expected the path of a picture"),
    "no field of the picture": (row(image=...), ROW + "image: the row has no field 'image'; it has: seg"),
    "a path that is no text": (row(seg=7), ROW + "target: expected a path, received 7"),
    "a path that leads out": (tunnel, ROW + "segmentation: '../secret.png' leads out of the data's folder"),
    "an absolute path": (row(depth="/etc/hostname"), ROW + "depth: '/etc/hostname' leads out of"),
    "a folder": (lambda f: ((f / "sub").mkdir(), row(seg="sub")(f)), ROW + "segmentation: a folder: 'sub'"),
    "no map at all": (row(seg=..., depth=None, normals="", edges=...), ROW + "target: the picture has no map of any task"),
    "a broken JPEG": (cut("1.jpg"), ROW + "image: 1.jpg: broken or cut off: "),
    "a broken PNG": (cut("1-normals.png"), ROW + "normals: 1-normals.png: broken or cut off: "),
    "an empty file": (written("1.jpg", b""), ROW + "image: 1.jpg: is empty"),
    "no picture inside": (written("1.jpg", b"hello" * 9), ROW + "image: 1.jpg: is no picture that is known"),
    "a web page": (written("1-seg.png", b"<!DOCTYPE html><html>"), "is a web page, not the file"),
    "a pointer": (written("1.jpg", b"version https://git-lfs.github.com/spec/v1\n"), "is a Git LFS pointer"),
    "a bomb": (bomb, ROW + "image: 1.jpg: too large; expected 67,108,864 pixels at most"),
    "several frames": (many, ROW + "image: 1.gif: has 2 frames, expected one picture"),
    "another size": (saved("1-seg.png", grey(1, size=(H, H))), ROW + "segmentation: '1-seg.png' is 12 x 12, expected the picture's 12 x 16"),
    "a label out of range": (saved("1-seg.png", grey(7)), ROW + "segmentation: label 7 and the like in 192 pixels, expected 0 to 2, or 255 (ignored)"),
    "classes in colours": (saved("1-seg.png", np.zeros((H, W, 3), np.uint8)), ROW + "segmentation: 1-seg.png: received RGB, expected one channel"),
    "classes in a JPEG": (lambda f: (saved("1.jpeg", grey(1))(f), row(seg="1.jpeg")(f)), ROW + "segmentation: 1.jpeg: a JPEG changes values, which are classes here; expected PNG"),
    "depth of 16 bits": (saved("1-depth.png", grey(4000, np.uint16)), ROW + "depth: received 16 bits with values up to 4000, expected 8 bits (0 to 255)"),
    "depth with a palette": (lambda f: Image.fromarray(grey(3)).convert("P").save(f / "1-depth.png"), ROW + "depth: 1-depth.png: has a palette"),
    "depth that is NaN": (nan, ROW + "depth: a depth of nan and the like in 1 pixels, expected numbers above 0; say ignore: .nan"),
    "depth below 0": (stored("1-depth.npy", grey(-1, np.float32), "depth"), ROW + "depth: a depth of -1 and the like in 192 pixels, expected numbers above 0"),
    "an array of another shape": (stored("1-depth.npy", np.ones((2, H, W)), "depth"), ROW + "depth: 1-depth.npy: an array [2, 12, 16], expected [H, W]"),
    "an array of objects": (stored("1-depth.npy", np.array([{}], dtype=object), "depth"), ROW + "depth: 1-depth.npy: broken or cut off: "),
    "normals in one channel": (saved("1-normals.png", grey(9)), ROW + "normals: 1-normals.png: received L, expected three channels (RGB)"),
    "normals that are none": (stored("1-n.npy", np.full((H, W, 3), 9.0), "normals"), ROW + "normals: received 9, expected -1 to 1"),
    "edges out of range": (stored("1-e.npy", grey(7, np.float32), "edges"), ROW + "edges: received 7 and the like in 192 pixels, expected 0 to 1"),
    "CMYK as a map": (lambda f: Image.new("CMYK", (W, H)).save(f / "1-edges.tif") or row(edges="1-edges.tif")(f), ROW + "edges: 1-edges.tif: received CMYK, expected one channel"),
    "a MATLAB file that is none": (lambda f: (written("1.mat", b"MATLAB 5.0 MAT-file" + b"x" * 200)(f), row(depth="1.mat#depth")(f)), ROW + "depth: 1.mat: broken or cut off: "),
    "classes without names": (template("seg", "classes: [a, b, c]\n", ""), "seg.yaml:1: classes: at least two names are needed, received 0"),
    "depth without a range": (template("depth", "range: [0.5, 10.0]\n", ""), "depth.yaml:1: range: is required with depth"),
    "a range that falls": (template("depth", "[0.5, 10.0]", "[10, 0.5]"), "depth.yaml:5: range: expected two rising numbers, received 10 and 0.5"),
    "a key of texts": (template("seg", "ignore: 255", "prompt: x"), "seg.yaml:6: prompt: is for texts; with objective segmentation there are none"),
    "a metric of another map": (template("seg", "ignore: 255", "metrics: [depth_rmse]"), "seg.yaml:6: metrics: 'depth_rmse' does not fit; possible here: miou, pixel_accuracy"),
    "a mirror of no class": (template("seg", "ignore: 255", "left_right: [[a, x]]"), "seg.yaml:6: left_right: 'x' is none of the classes"),
    "normals from classes": (template("normals", "objective: normals\n", "objective: normals\nderive: classes\n"), "normals.yaml:5: derive: received classes with objective normals, expected depth"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_it_is_one_line(folder: Path, name: str) -> None:
    change, said = BAD[name]
    change(folder)
    with pytest.raises(UsageError) as caught:
        looked_at(folder)
    (line,) = caught.value.lines
    assert said in line, line
    assert caught.value.exit_code == ExitCode.USAGE
    assert len(line) < 320


def test_all_of_it_is_right(folder: Path) -> None:
    counted = {(one.task, one.split): one for one in looked_at(folder)}
    assert counted["seg", "train"].classes == {"a": H * W, "b": H * W, "c": 0}
    depth = counted["depth", "train"]
    assert depth.low == depth.high == pytest.approx(0.5 + 9.5 * 100 / 255)


def test_every_fault_is_told_at_once(folder: Path) -> None:
    row(seg="9.png", depth="8.png")(folder)
    with pytest.raises(UsageError) as caught:
        looked_at(folder)
    assert [line.split(": ")[1] for line in caught.value.lines] == ["segmentation", "depth"]
