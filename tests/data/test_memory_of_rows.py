"""Memory does not grow with the rows: many of them are read, encoded and planned in some megabytes."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mtl_lora_cli.data import large_files
from mtl_lora_cli.data.bind import bind_tasks
from mtl_lora_cli.data.prepare import prepare_training
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import load_tokenizer
from mtl_lora_cli.recipe.load import load_recipe


def own() -> int:
    """Bytes of this process and of those below it that are no pages of files."""
    below = Path("/proc/self/task").glob("*/children")
    total = 0
    for process in ["self", *(one for file in below for one in file.read_text().split())]:
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss_Anon"))
    return total


@contextmanager
def watched() -> Iterator[list[int]]:
    """What was the most that there was, ten times a second; the last of the list."""
    most, ended = [own()], threading.Event()

    def look() -> None:
        while not ended.wait(0.1):
            most.append(max(most[-1], own()))

    looking = threading.Thread(target=look)
    looking.start()
    yield most
    ended.set()
    looking.join()
    most.append(max(most[-1], own()))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("count", "most"), [(100_000, 100), pytest.param(1_000_000, 300, marks=pytest.mark.long)]
)
def test_rows_take_no_more_than_a_few_pieces_of_them(
    count: int, most: int, tmp_path: Path, stories_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row took 12.7 kB before: 1.3 and 12.7 GB in all; MiB that are allowed are for pieces in some processes, and for
    less than 200 bytes a row."""
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(large_files, "LARGE", 2**19)
    monkeypatch.setattr("mtl_lora_cli.machine.pool.cores", lambda: 2)
    (tmp_path / "own.yaml").write_text(
        "description: d\nprompt: '{{ text }}'\nlabel: label\nchoices: {0: 'no', 1: 'yes'}\n"
    )
    with (tmp_path / "train.jsonl").open("w", encoding="utf-8") as out:
        for number in range(count):
            out.write(json.dumps({"text": f"is {number // 2} so", "label": number % 2}) + "\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"base_model: {stories_folder}\n"
        "tasks: [{name: own, template: own.yaml, source: {path: train.jsonl}}]\n"
    )
    loaded = load_recipe(recipe)
    tokenizer = load_tokenizer(find_base_model(str(stories_folder)))
    with watched() as seen:
        data = prepare_training(bind_tasks(loaded), loaded.recipe, tokenizer, 512)
        data.mixture.step(0)
    assert len(data.splits[0]) == count
    assert data.audits[0].contradictory == count
    assert seen[-1] - seen[0] < most * 2**20
