"""Rows of data sets on the hub: its own reader's in the cache, and one line where it cannot be reached."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtl_lora_cli.data import hub
from mtl_lora_cli.data.sources import available_splits, read_split
from mtl_lora_cli.recipe.source import Source

from .test_sources import ROWS, as_parquet, failure


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test leaves this machine: nothing listens at the discard port."""
    import huggingface_hub

    class Nowhere(huggingface_hub.HfApi):
        def __init__(self) -> None:
            super().__init__(endpoint="http://127.0.0.1:9")

    monkeypatch.setattr(huggingface_hub, "HfApi", Nowhere)
    hub._fetched.cache_clear()
    yield
    hub._fetched.cache_clear()


@pytest.mark.usefixtures("unreachable")
def test_an_unreachable_hub_is_one_line_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    before = datasets.config.HF_HUB_OFFLINE
    start = time.monotonic()
    source = Source(hub="nyu-mll/glue", config="sst2")
    for action in (
        lambda: read_split(source, "train", base=tmp_path, task="t"),
        lambda: available_splits(source, base=tmp_path, task="t"),
    ):
        message = failure(action)
        assert message.startswith("cannot reach hub data set 'nyu-mll/glue' (config 'sst2'): ")
        assert message.endswith("; download it elsewhere and use source: {path: FOLDER}")
        assert "Connection refused" in message
    assert time.monotonic() - start < 15
    assert before == datasets.config.HF_HUB_OFFLINE


@pytest.mark.usefixtures("unreachable")
def test_named_splits_need_no_hub(tmp_path: Path) -> None:
    source = Source(hub="owner/name", splits={"validation": "validation_matched"})
    assert available_splits(source, base=tmp_path, task="t") == ("validation",)
    assert read_split(source, "train", base=tmp_path, task="t") is None


@pytest.mark.usefixtures("unreachable")
def test_a_hub_data_set_in_the_cache_is_read_without_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    from datasets.packaged_modules.parquet.parquet import Parquet

    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    files = {}
    for split, rows in (("train", ROWS), ("validation_matched", ROWS[1:])):
        files[split] = str(tmp_path / f"{split}.parquet")
        Path(files[split]).write_bytes(as_parquet(rows))
    builder = Parquet(  # the builder that `load_dataset` picks for Parquet files on the hub
        config_name="sst2", hash="abc", dataset_name="name", data_files=files
    )
    builder.download_and_prepare()
    target = cache / "owner___name" / "sst2" / "0.0.0" / "abc"
    target.parent.mkdir(parents=True)
    Path(builder.cache_dir).rename(target)  # the folder that a hub data set would have

    source = Source(hub="owner/name", config="sst2")
    assert available_splits(source, base=tmp_path, task="t") == ("train",)
    train = read_split(source, "train", base=tmp_path, task="t")
    assert train is not None
    assert list(train.rows) == ROWS
    assert train.file == "hub:owner/name[sst2]/train"
    assert train.where(1) == "hub:owner/name[sst2]/train, row 2"

    named = source.model_copy(update={"splits": {"test": "validation_matched", "train": "x"}})
    test = read_split(named, "test", base=tmp_path, task="t")
    assert test is not None
    assert list(test.rows) == ROWS[1:]
    assert test.fingerprint != train.fingerprint
    assert failure(lambda: read_split(named, "train", base=tmp_path, task="t")).startswith(
        "hub data set 'owner/name' (config 'sst2'): Unknown split \"x\""
    )

    pinned = source.model_copy(update={"revision": "abc"})
    assert read_split(pinned, "train", base=tmp_path, task="t") == train
    other = source.model_copy(update={"revision": "def"})
    assert "the copy in the cache is of revision abc;" in failure(
        lambda: read_split(other, "train", base=tmp_path, task="t")
    )


def test_rows_of_a_datasets_dataset(tmp_path: Path) -> None:
    import datasets

    rows = [
        {"sentence": "größer", "label": 1, "score": 0.5},
        {"sentence": "", "label": 0, "score": 5.0},
    ]
    file = tmp_path / "a.parquet"
    file.write_bytes(as_parquet(rows))
    dataset = datasets.load_dataset(
        "parquet", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert list(hub._dataset_rows(dataset, "hub:o/n/train", "f").rows) == rows
    assert failure(lambda: hub._dataset_rows(dataset.select([]), "hub:o/n/train", "f")) == (
        "hub:o/n/train: has no rows, expected at least one"
    )


@pytest.mark.parametrize("name", ["glue", "parquet", "a//b", "a/b/c", "../a", ""])
def test_a_hub_name_is_owner_and_name(tmp_path: Path, name: str) -> None:
    source = Source(hub=name)
    assert failure(lambda: available_splits(source, base=tmp_path, task="t")) == (
        f"hub data set '{name}': expected owner/name"
    )


def test_a_local_folder_is_not_taken_for_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data" / "glue").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    source = Source(hub="data/glue")
    assert failure(lambda: available_splits(source, base=tmp_path, task="t")) == (
        "hub data set 'data/glue' is also a local path; use source: {path: data/glue}"
    )
