"""Folders as data sets are passed on: by files, by folders, as `datasets` saves them, as the hub has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mtl_lora_cli.data.sources import available_splits, read_split, split_fingerprint, without
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.recipe.source import Source

SPLITS = ("train", "validation", "test")


def rows_of(split: str, count: int = 4) -> list[dict[str, Any]]:
    return [{"text": f"{split} {number}", "label": number % 2} for number in range(count)]


def read(folder: Path, split: str, **keys: Any) -> list[dict[str, Any]] | None:
    found = read_split(Source(path=str(folder), **keys), split, base=Path(), task="t")
    return None if found is None else [dict(row) for row in found.rows]


def fault(folder: Path, **keys: Any) -> str:
    with pytest.raises(UsageError) as caught:
        read(folder, "train", **keys)
    (line,) = caught.value.lines
    return line.removeprefix(f"{folder}")


def saved_dict(folder: Path) -> None:
    import datasets

    parts = {split: datasets.Dataset.from_list(rows_of(split)) for split in SPLITS}
    datasets.DatasetDict(parts).save_to_disk(
        folder, num_shards={"train": 3, "validation": 1, "test": 1}
    )


def saved_beside_each_other(folder: Path) -> None:
    import datasets

    for split in SPLITS:
        datasets.Dataset.from_list(rows_of(split)).save_to_disk(folder / split)


def in_the_hub_s_data_folder(folder: Path) -> None:
    parquet(folder / "data", "{split}-0000{part}-of-00002.parquet")


def as_the_hub_converts_it(folder: Path) -> None:
    parquet(folder / "default", "{split}/000{part}.parquet")


def as_its_cache_keeps_it(folder: Path) -> None:
    """Blobs, and links to them in a snapshot."""
    parquet(folder / "blobs" / "x", "{split}-{part}")
    snapshot = folder / "snapshots" / "0a1b2c" / "sst2"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0a1b2c")
    for blob in sorted((folder / "blobs" / "x").iterdir()):
        split, _, part = blob.name.partition("-")
        (snapshot / f"{split}-0000{part}-of-00002.parquet").symlink_to(blob)


def a_folder_for_each_split(folder: Path) -> None:
    for split in SPLITS:
        (folder / split).mkdir(parents=True)
        lines = [json.dumps(row) for row in rows_of(split)]
        (folder / split / "a.jsonl").write_text("\n".join(lines[:2]))
        (folder / split / "b.jsonl").write_text("\n".join(lines[2:]))
    (folder / "test").rename(folder / "test2")
    (folder / "test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows_of("test")))


def parquet(folder: Path, name: str) -> None:
    for split in SPLITS:
        for part in (0, 1):
            path = folder / name.format(split=split, part=part)
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows_of(split)[part * 2 : part * 2 + 2]), path)


LAYOUTS = [
    *(saved_dict, saved_beside_each_other, in_the_hub_s_data_folder),
    *(as_the_hub_converts_it, as_its_cache_keeps_it, a_folder_for_each_split),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_a_folder_has_the_rows_that_were_saved(
    tmp_path: Path, layout: Callable[[Path], None]
) -> None:
    folder = tmp_path / "a [1]"  # brackets are no pattern
    layout(folder)
    (folder / "README.md").write_text("about")
    source = Source(path=str(folder))
    assert available_splits(source, base=Path(), task="t") == SPLITS
    for split in SPLITS:
        assert read(folder, split) == rows_of(split)
    some = without(source, "test", base=Path(), task="t")
    assert read_split(some, "test", base=Path(), task="t") is None
    for split in ("train", "validation"):
        one, other = (read_split(each, split, base=Path(), task="t") for each in (some, source))
        assert one == other


def test_it_is_what_datasets_itself_loads(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {
            "text": datasets.Value("large_string"),
            "label": datasets.ClassLabel(names=["no", "yes"]),
            "parts": datasets.List({"a": datasets.Value("int8")}),
        }
    )
    rows = [{"text": "größer", "label": n % 2, "parts": [{"a": n}] * (n % 3)} for n in range(50)]
    saved = datasets.Dataset.from_list(rows, features=features).shuffle(seed=1).select(range(40))
    saved.save_to_disk(tmp_path / "one", num_shards=2)
    assert read(tmp_path / "one", "train") == datasets.load_from_disk(tmp_path / "one").to_list()
    assert read(tmp_path / "one", "test") is None
    files = {"train": "one"}
    assert read(tmp_path, "train", splits=files) == saved.to_list()


def test_splits_with_other_names_are_named(tmp_path: Path) -> None:
    import datasets

    names = ("train", "validation_matched", "validation_mismatched")
    parts = {name: datasets.Dataset.from_list(rows_of(name)) for name in names}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "mnli")
    assert read(tmp_path / "mnli", "validation") is None
    splits = {"train": "train", "test": "validation_matched"}
    assert read(tmp_path / "mnli", "test", splits=splits) == rows_of("validation_matched")
    del parts["train"]
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "other")
    assert fault(tmp_path / "other") == (
        ": source of task 't': its splits are validation_matched, validation_mismatched; say which is "
        "which: splits: {train: …}"
    )


def test_other_rows_are_another_fingerprint(tmp_path: Path) -> None:
    prints = []
    for name, rows in (("a", rows_of("x")), ("b", rows_of("x")), ("c", rows_of("y"))):
        parquet_file = tmp_path / name / "data" / "train-00000-of-00001.parquet"
        parquet_file.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), parquet_file)
        source = Source(path=str(tmp_path / name))
        prints.append(split_fingerprint(source, "train", base=Path(), task="t"))
    assert prints[0] == prints[1] != prints[2]


def test_several_data_sets_are_named(tmp_path: Path) -> None:
    for name in ("cola", "sst2"):
        in_the_hub_s_data_folder(tmp_path / name)
    assert fault(tmp_path) == (
        f": source of task 't': holds several data sets: cola/data, sst2/data; name one: path: {tmp_path}/cola/data"
    )
    assert read(tmp_path / "cola", "test") == rows_of("test")


def test_a_split_twice(tmp_path: Path) -> None:
    a_folder_for_each_split(tmp_path)
    (tmp_path / "dev.jsonl").write_text('{"text": "x"}\n')
    assert fault(tmp_path).startswith(
        ": source of task 't': expected one file for validation, or all its numbered parts; received "
    )


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (
            lambda folder: (folder / "train" / "data-00001-of-00003.arrow").unlink(),
            "/train/state.json: source of task 't': names data-00001-of-00003.arrow, which is not there",
        ),
        (
            lambda folder: (folder / "train" / "state.json").write_text("{"),
            "/train/state.json: source of task 't': is not what save_to_disk writes: no _data_files",
        ),
        (
            lambda folder: (folder / "dataset_dict.json").write_text("[]"),
            "/dataset_dict.json: source of task 't': is not what save_to_disk writes: no splits",
        ),
        (
            lambda folder: (folder / "train" / "state.json").unlink(),
            None,  # the files are still there
        ),
        (
            lambda folder: (folder / "train" / "data-00000-of-00003.arrow").write_bytes(
                b"\xff" * 99
            ),
            "/train/data-00000-of-00003.arrow: not a whole Arrow file: …",
        ),
        (
            lambda folder: (folder / "train" / "data-00000-of-00003.arrow").write_text(
                "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
            ),
            "/train/data-00000-of-00003.arrow is a Git LFS pointer, not the file: git lfs pull",
        ),
    ],
)
def test_what_is_damaged_is_named(
    tmp_path: Path, damage: Callable[[Path], Any], expected: str | None
) -> None:
    saved_dict(tmp_path)
    damage(tmp_path)
    if expected is None:
        assert fault(tmp_path).startswith("/train/state.json: ")
    elif expected.endswith("…"):
        assert fault(tmp_path).startswith(expected.removesuffix("…"))
    else:
        assert fault(tmp_path) == expected
