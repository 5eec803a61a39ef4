"""Rows that show pictures, more of them than memory holds: how much memory, and how long, encoding and first steps take.

    python -m tests.benchmarks.large_pictures [--rows 200000] [--folder FOLDER] [--features run] [--dense]

Pictures are small, no two alike, each a file of its own; the model is a tiny LLaVA. With `--dense` the bundled rooms are
learned as maps by a tiny Swin instead, their files under links of their own for each row. Training is a process of its
own, begun twice: the first time rows are encoded. Memory is that of all its processes together, as large.py sums it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mtl_lora_cli.machine.pool import in_pieces
from mtl_lora_cli.resources import bundled
from tests.benchmarks.large import MODEL, existing, memory
from tests.sights import COLOUR, COLOURS, tiny_llava

_FOLDER = 1000  # files


def write_pictures(folder: Path, first: int, last: int) -> list[str]:
    """Some rows, as lines, and their pictures: noise over one of three colours."""
    lines = []
    for number in range(first, last):
        draw = np.random.default_rng(number)
        colour = list(COLOURS)[number % 3]
        pixels = np.asarray(COLOURS[colour], np.uint8) + draw.integers(0, 30, (40, 48, 3), np.uint8)
        place = Path("pictures") / str(number // _FOLDER) / f"{number}.png"
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / place, compress_level=1)
        lines.append(json.dumps({"image": str(place), "colour": colour}) + "\n")
    return lines


def write_links(rooms: Path, folder: Path, first: int, last: int) -> list[str]:
    """Some rows, as lines, and links to the pictures and the depth of some rooms."""
    known = [json.loads(line) for line in (rooms / "train.jsonl").read_text().splitlines()]
    lines = []
    for number in range(first, last):
        room, row = known[number % len(known)], {}
        for key in ("image", "depth"):
            row[key] = f"{key}/{number // _FOLDER}/{number}{Path(room[key]).suffix}"
            (folder / row[key]).parent.mkdir(parents=True, exist_ok=True)
            (folder / row[key]).symlink_to(rooms / room[key])
        lines.append(json.dumps(row) + "\n")
    return lines


def tiny_swin(folder: Path) -> None:
    """Of random weights."""
    from transformers import AutoModel, SwinConfig

    config = SwinConfig(image_size=32, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2)
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)


def about_text(folder: Path, features: str) -> tuple[str, Any]:
    """What a recipe says of an image-text run, and how its rows are written."""
    tiny_llava(MODEL, folder / "model")
    (folder / "colour.yaml").write_text(json.dumps(COLOUR), encoding="utf-8")
    return (
        f"images: {{features: {features}}}\n"
        "tasks: [{name: colour, template: colour.yaml, source: {path: train.jsonl}}]\n"
        "training: {row_length: 512, "
    ), partial(write_pictures, folder)


def about_maps(folder: Path) -> tuple[str, Any]:
    """The same of a dense run."""
    tiny_swin(folder / "model")
    rooms = bundled("data_templates") / "samples" / "rooms"
    return (
        "images: {size: [32, 48]}\nadapter: {method: lora, rank: 2, target_modules: [q_proj]}\n"
        "tasks: [{name: depth, template: samples/room_depth, source: {path: train.jsonl}}]\n"
        "training: {"
    ), partial(write_links, rooms, folder)


def watched(command: list[str], environment: dict[str, str]) -> tuple[float, float, float]:
    """Seconds, and MiB at most in all processes, with pages of files and without."""
    began, peak = time.perf_counter(), (0.0, 0.0)
    running = subprocess.Popen(command, env=environment)
    while running.poll() is None:
        now = memory([running.pid])
        peak = max(peak[0], now[0]), max(peak[1], now[1])
        time.sleep(0.1)
    if running.returncode:
        raise SystemExit(f"ended with {running.returncode}")
    return time.perf_counter() - began, *peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--folder", type=existing)
    parser.add_argument("--features", default="run")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--dense", action="store_true")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=wanted.folder) as name:
        folder, began = Path(name), time.perf_counter()
        about, write = about_maps(folder) if wanted.dense else about_text(folder, wanted.features)
        with (folder / "train.jsonl").open("w", encoding="utf-8") as out:
            for lines in in_pieces(write, wanted.rows, _FOLDER):
                out.writelines(lines)
        (folder / "recipe.yaml").write_text(
            f"base_model: {folder / 'model'}\n{about}rows_per_step: 4, max_steps: {wanted.steps}}}\n",
            encoding="utf-8",
        )
        print(
            f"{wanted.rows:,} pictures written in {time.perf_counter() - began:.0f} s", flush=True
        )
        environment = {**os.environ, "MTL_LORA_CACHE": str(folder / "cache")}
        for turn in ("first", "second"):
            runs = folder / f"runs-{turn}"
            command = [sys.executable, "-m", "mtl_lora_cli.cli.main", "train", str(folder / "recipe.yaml"), "--runs", str(runs)]  # fmt: skip
            seconds, whole, own = watched(command, environment)
            print(
                f"{turn} start and {wanted.steps} steps: {seconds:.1f} s; peak {whole:,.0f} MiB in all processes, "
                f"{own:,.0f} without pages of files",
                flush=True,
            )


if __name__ == "__main__":
    main()
