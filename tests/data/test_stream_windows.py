"""Streams: windows of files that are never all on this disk, the same whenever they are asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from mtl_lora_cli.data import remote
from mtl_lora_cli.data.bind import bind_tasks
from mtl_lora_cli.data.delimited import BY_ENDING
from mtl_lora_cli.data.part_stream import PartStream, StreamPart, local_part
from mtl_lora_cli.data.prepare import TrainingData, prepare_training
from mtl_lora_cli.data.sources import available_splits, read_split
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import load_tokenizer
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.recipe.source import Source
from mtl_lora_cli.training.prepare import prepare

from .test_prepare import TEMPLATE

SIZES = (7, 1, 30, 12)  # rows of each file
EVERY = [f"{part} {n}" for part, size in enumerate(SIZES) for n in range(size)]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """fsspec's own store in memory, with a split in four parts and a test split."""
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path / "cache"))
    found = fsspec.filesystem("memory")
    remote.copied.cache_clear()
    for part, size in enumerate(SIZES):
        name = f"train-0000{part}-of-00004.jsonl"
        found.pipe_file(f"/stream/{name}", lines([f"{part} {n}" for n in range(size)]))
    found.pipe_file("/stream/test.jsonl", lines(["test"] * 3))
    yield found
    remote.copied.cache_clear()
    found.rm("/stream", recursive=True)


def lines(texts: list[str]) -> bytes:
    rows = [{"text": text, "label": n % 2} for n, text in enumerate(texts)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def endless(first: int, count: int) -> list[str]:
    return [EVERY[(first + n) % len(EVERY)] for n in range(count)]


def test_rows_follow_from_their_place_whoever_asks(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path))
    fetched: list[str] = []

    def part(number: int) -> StreamPart:
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(lines([f"{number} {n}" for n in range(SIZES[number])]))

        @contextmanager
        def fetch() -> Iterator[Path]:
            fetched.append(path.name)
            yield path

        return StreamPart(path.name, "", fetch)

    def stream() -> PartStream:
        return PartStream([part(number) for number in range(4)], BY_ENDING)

    for first, count in ((0, 5), (5, 20), (38, 40), (150, 1), (49, 120), (7, 1)):
        rows = stream().rows(first, count)
        assert [row["text"] for row in rows.rows] == endless(first, count)
        assert [rows.where(n).rpartition(":")[2] for n in range(count)] == [
            str(int(text.split()[1]) + 1) for text in endless(first, count)
        ]
    (note,) = stream().rows(0, 125).notes
    assert "the stream has 50 rows, fewer than its buffer (125)" in note and "2.5 times" in note
    assert stream().rows(0, 50).notes == ()
    fetched.clear()
    stream().rows(40, 3)
    assert fetched == ["3.jsonl"]  # how many rows the others have is known, also to another process
    empty = PartStream([], BY_ENDING)
    assert empty.fingerprint != stream().fingerprint
    (tmp_path / "0.jsonl").write_bytes(b"\n")
    with pytest.raises(UsageError, match="has no rows"):
        PartStream([part_of(tmp_path / "0.jsonl")], BY_ENDING).rows(0, 1)


def test_a_file_that_changed_is_known_as_another_one(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(lines(["a", "b"]))
    before = PartStream([local_part(path)], BY_ENDING).fingerprint
    assert PartStream([local_part(path)], BY_ENDING).fingerprint == before
    path.write_bytes(lines(["a", "c"]))  # as long as it was
    os.utime(path, ns=(1, 1))
    assert PartStream([local_part(path)], BY_ENDING).fingerprint != before


def part_of(path: Path) -> StreamPart:
    @contextmanager
    def fetch() -> Iterator[Path]:
        yield path

    return StreamPart(str(path), "", fetch)


def test_nothing_of_a_stream_in_a_store_stays_on_the_disk(store: Any, tmp_path: Path) -> None:
    source = Source(path="memory://stream", stream=True, buffer=10)
    assert available_splits(source, base=Path(), task="t") == ("train", "test")
    train, test = (read_split(source, split, base=Path(), task="t") for split in ("train", "test"))
    assert train is not None and test is not None
    assert [row["text"] for row in train.rows] == endless(0, 10)
    assert len(test.rows) == 3
    left = [one.name for one in (tmp_path / "cache").rglob("*.jsonl")]
    assert left == ["test.jsonl"]


@pytest.mark.parametrize(
    ("gone", "more", "why"),
    [
        ("train-00002-of-00004.jsonl", None, "or all its numbered parts; received train-00000-of"),
        (
            None,
            "other/train-00000-of-00001.jsonl",
            "holds several data sets: /stream, /stream/other",
        ),
    ],
)
def test_parts_of_a_store_are_those_of_one_set(
    gone: str | None, more: str | None, why: str, store: Any, tmp_path: Path
) -> None:
    source = Source(path="memory://stream", stream=True, buffer=10)
    assert read_split(source, "train", base=tmp_path, task="t") is not None
    if gone:
        store.rm(f"/stream/{gone}")
    if more:
        store.pipe_file(f"/stream/{more}", lines(["x"]))
    with pytest.raises(UsageError, match=why):
        read_split(source, "train", base=tmp_path, task="t")


TASKS = """tasks:
- {name: streamed, template: own.yaml, source: {path: 'memory://stream', stream: true, buffer: 20}}
- {name: whole, template: own.yaml, source: {path: whole.jsonl}}
"""


def recipe_of(folder: Path, model: Path, keys: str) -> Path:
    (folder / "own.yaml").write_text(TEMPLATE, encoding="utf-8")
    (folder / "whole.jsonl").write_bytes(lines([f"w {n}" for n in range(9)]))
    path = folder / "recipe.yaml"
    path.write_text(f"base_model: {model}\n{TASKS}{keys}\n", encoding="utf-8")
    return path


def prepared(folder: Path, model: Path) -> TrainingData:
    keys = "training: {row_length: 24, rows_per_step: 2, max_steps: 40, on_overflow: drop}"
    loaded = load_recipe(recipe_of(folder, model, keys))
    tokenizer = load_tokenizer(find_base_model(str(model)))
    return prepare_training(bind_tasks(loaded), loaded.recipe, tokenizer, 512)


def test_an_epoch_is_a_window_and_a_step_is_found_again_alone(
    store: Any, tmp_path: Path, stories_folder: Path
) -> None:
    tokenizer = load_tokenizer(find_base_model(str(stories_folder)))
    data = prepared(tmp_path, stories_folder)
    assert data.windows is not None
    seen: dict[int, list[str]] = {}
    rows = {}
    for number in range(40):
        epoch, rows[number] = data.mixture.step(number)
        splits = data.windows.splits(epoch)
        for row in rows[number]:
            for task, example in row:
                prompt = splits[task].example(example)[: splits[task].prompt_lengths[example]]
                text = tokenizer.decode(prompt, skip_special_tokens=True).strip()
                seen.setdefault(epoch, []).append(text)
    for epoch in range(max(seen)):
        assert sorted(seen[epoch]) == sorted(
            [*endless(20 * epoch, 20), *(f"w {n}" for n in range(9))]
        )
        assert seen[epoch] != sorted(seen[epoch])
    assert max(seen) >= 3


def test_a_resume_fetches_nothing_that_lies_behind_it(
    store: Any, tmp_path: Path, stories_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = prepared(tmp_path, stories_folder)
    expected = data.mixture.step(12)
    assert expected[0] >= 1
    batch = data.dataset("answer").at(*(expected[0], 12)).collate(expected[1])  # type: ignore[attr-defined]
    again = prepared(tmp_path, stories_folder)
    asked: list[int] = []
    assert again.windows is not None
    splits = again.windows.splits
    monkeypatch.setattr(again.windows, "splits", lambda n: asked.append(n) or splits(n))
    assert again.mixture.step(12) == expected
    other = again.dataset("answer").at(*(expected[0], 12)).collate(expected[1])  # type: ignore[attr-defined]
    assert set(asked) == {expected[0]}
    np.testing.assert_array_equal(batch.input_ids.numpy(), other.input_ids.numpy())


BAD = {
    "no JSON": (b'{"text": "2 13"', "train-00002-of-00004.jsonl:14: "),
    "no label": (b'{"text": "2 13"}', "train-00002-of-00004.jsonl:14: task 'streamed': label: "),
    "no text": (b'{"label": 1}', "train-00002-of-00004.jsonl:14: task 'streamed': prompt: "),
}


@pytest.mark.parametrize("what", BAD)
def test_a_row_that_cannot_be_learned_is_named_or_left_out(
    what: str, store: Any, tmp_path: Path, stories_folder: Path, capsys: Any
) -> None:
    bad, where = BAD[what]
    name = "/stream/train-00002-of-00004.jsonl"
    rows = store.cat_file(name).splitlines()
    store.pipe_file(name, b"\n".join([*rows[:13], bad, *rows[14:], b""]))  # of window 1: row 21
    keys = "training: {row_length: 24, rows_per_step: 2, max_steps: 40, on_overflow: drop}"
    tokenizer = load_tokenizer(find_base_model(str(stories_folder)))

    def read(keys: str) -> TrainingData:
        loaded = load_recipe(recipe_of(tmp_path, stories_folder, keys), DROP if "#" in keys else ())
        return prepare_training(bind_tasks(loaded), loaded.recipe, tokenizer, 512)

    with pytest.raises(UsageError) as raised:
        data = read(keys)  # a small file is read whole: there it is told before the first step
        assert what != "no JSON" and data.windows is not None
        data.windows.splits(1)
    (line,) = raised.value.lines
    assert where in line and "broken_rows: drop in the source leaves such rows out" in line
    data = read(keys + " # drop")
    assert data.windows is not None
    (streamed, _), (first, _) = data.windows.splits(1), data.splits
    assert (len(first), len(streamed)) == (20, 19)
    texts = [tokenizer.decode(streamed.example(n)[: streamed.prompt_lengths[n]]) for n in range(19)]
    assert not any("2 13" in text for text in texts) and "2 14" in texts[1]
    said = capsys.readouterr().err
    assert "rows 20 and on: 1 of 20 rows are left out (broken_rows: drop), the first is" in said
    assert where in said


def test_the_very_first_row_may_be_left_out(
    store: Any, tmp_path: Path, stories_folder: Path
) -> None:
    name = "/stream/train-00000-of-00004.jsonl"
    rows = store.cat_file(name).splitlines()
    store.pipe_file(name, b"\n".join([b"{", *rows[1:], b""]))
    keys = "training: {row_length: 24, rows_per_step: 2, max_steps: 40, on_overflow: drop}"
    loaded = load_recipe(recipe_of(tmp_path, stories_folder, keys), DROP)
    tokenizer = load_tokenizer(find_base_model(str(stories_folder)))
    data = prepare_training(bind_tasks(loaded), loaded.recipe, tokenizer, 512)
    assert len(data.splits[0]) == 19


DROP = ["tasks.0.source.broken_rows=drop"]


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ("training: {row_length: 24}", "training.max_steps: a stream has no end (task 'streamed')"),
        ("training: {max_steps: 3, memory: auto}", "training.memory: does not go with a stream"),
        ("training: {max_steps: 3, shuffled_tasks: true}", "training.shuffled_tasks: does not go"),
        (
            "mixing: {dynamic: progress}\ntraining: {max_steps: 3}",
            "mixing: does not go with a stream",
        ),
    ],
)
def test_what_needs_all_rows_is_refused(
    keys: str, why: str, store: Any, tmp_path: Path, stories_folder: Path
) -> None:
    with pytest.raises(UsageError) as raised:
        prepare(load_recipe(recipe_of(tmp_path, stories_folder, keys)))
    (line,) = raised.value.lines
    assert why in line


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ({"hub": "a/b", "stream": True}, "goes with a path only; of the hub: path: hf://"),
        ({"path": "a", "buffer": 5}, "'buffer' goes with stream: true"),
        ({"path": "a", "stream": True, "task_column": "t"}, "does not go with a task_column"),
    ],
)
def test_a_source_that_cannot_be_a_stream_is_refused(source: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Source.model_validate(source)
