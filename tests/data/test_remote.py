"""Rows at an address: copied once, again when they changed, and one line where they cannot be had."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from mtl_lora_cli.data import remote
from mtl_lora_cli.data.sources import read_split, resolve, split_fingerprint
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.recipe.source import Source


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """fsspec's own store in memory: everything but the network."""
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path / "cache"))
    found = fsspec.filesystem("memory")
    remote.copied.cache_clear()
    yield found
    remote.copied.cache_clear()
    found.rm("/bucket", recursive=True)


def put(store: Any, name: str, count: int) -> None:
    lines = "".join(json.dumps({"q": f"{name} {n}"}) + "\n" for n in range(count))
    store.pipe_file(f"/bucket/{name}", lines.encode())


def read(source: Source, split: str = "train") -> list[Any]:
    found = read_split(source, split, base=Path("/nowhere"), task="t")
    assert found is not None
    return [row["q"] for row in found.rows]


def test_a_folder_in_a_store_is_read_as_one_on_the_disk(store: Any) -> None:
    put(store, "a/train-00000-of-00002.jsonl", 2)
    put(store, "a/train-00001-of-00002.jsonl", 1)
    put(store, "a/test.jsonl", 3)
    store.pipe_file("/bucket/a/weights.bin", b"0" * 100)
    source = resolve(Source(path="memory://bucket/a"), base=Path("/recipes"))
    assert source.path == "memory://bucket/a"
    assert len(read(source)) == 3
    assert len(read(source, "test")) == 3
    whole = Source(path="memory://bucket/a/test.jsonl")
    assert read(whole) == read(source, "test")
    before = split_fingerprint(source, "train", base=Path(), task="t")
    store.rm("/bucket/a/test.jsonl")  # what is copied is not asked for again in the same run
    assert len(read(source, "test")) == 3
    put(store, "a/train-00001-of-00002.jsonl", 5)
    remote.copied.cache_clear()  # as in the next run
    assert len(read(source)) == 7
    assert read_split(source, "test", base=Path(), task="t") is None  # gone there, gone here
    assert split_fingerprint(source, "train", base=Path(), task="t") != before
    copies = [one.name for one in remote.copied("memory://bucket/a", "").rglob("*.bin")]
    assert copies == []


def test_what_did_not_change_is_not_copied_again(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, "train.jsonl", 2)
    source = Source(path="memory://bucket/train.jsonl")
    assert len(read(source)) == 2
    remote.copied.cache_clear()
    monkeypatch.setattr(type(store), "open", lambda *a, **k: pytest.fail("copied again"))
    assert len(read(source)) == 2


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("memory://bucket/none", "no such file, or a folder that holds no rows"),
        ("nonsense://bucket/a", "cannot be reached: Protocol not known: nonsense"),
        ("dropbox://bucket/a", "cannot be read: "),  # its package is not installed
    ],
)
def test_what_cannot_be_had_is_one_line(store: Any, path: str, why: str) -> None:
    put(store, "train.jsonl", 1)
    with pytest.raises(UsageError) as raised:
        read(Source(path=path))
    (line,) = raised.value.lines
    assert line.startswith(f"{path}: source of task 't': {why}")
