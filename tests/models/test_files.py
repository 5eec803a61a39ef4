"""One rule for which files are the model: what is loaded is what is fingerprinted, merged and converted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.export.shards import read_shard
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.files import (
    INDEX,
    WHOLE,
    template_fingerprint,
    tokenizer_fingerprint,
    weight_files,
    weights_fingerprint,
)
from mtl_lora_cli.models.load import load_model

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def copied(stories_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stories_folder, tmp_path / "copied"))


def _shard(folder: Path) -> None:
    """The model in two files and an index, and no longer in one."""
    tensors = load_file(folder / WHOLE)
    names = sorted(tensors)
    places = {name: SHARDS[number % 2] for number, name in enumerate(names)}
    for shard in SHARDS:
        own = {name: tensors[name] for name in names if places[name] == shard}
        save_file(own, folder / shard, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / WHOLE).unlink()


def _other(folder: Path, name: str) -> None:
    """A file with other values of the same tensors, which is no part of the model."""
    source = folder / WHOLE if (folder / WHOLE).exists() else folder / SHARDS[0]
    tensors = {key: value + 1 for key, value in load_file(source).items()}
    save_file(tensors, folder / name, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("sharded", "beside"),
    [
        (False, ()),
        (True, ()),
        (False, ("consolidated.safetensors", "model.fp16.safetensors", SHARDS[0])),
        (True, ("consolidated.safetensors", "model-00003-of-00003.safetensors")),
    ],
    ids=["one file", "shards", "one file among others", "shards among others"],
)
def test_what_is_loaded_is_what_the_rule_names(
    copied: Path, sharded: bool, beside: tuple[str, ...]
) -> None:
    if sharded:
        _shard(copied)
    before = weights_fingerprint(copied, weight_files(copied))
    for name in beside:
        _other(copied, name)
    base = find_base_model(str(copied))
    assert base.fingerprint == before
    model = load_model(base, dtype=torch.float32, device=torch.device("cpu"))
    loaded = model.state_dict()
    read = {
        stored.name: stored.whole()
        for path in weight_files(copied)
        for stored in read_shard(path)[0]
    }
    assert len(read) > 40
    assert [name for name in read if not torch.equal(read[name], loaded[name].cpu())] == []


def test_an_index_that_names_the_one_file_is_no_second_model(copied: Path) -> None:
    names = [stored.name for stored in read_shard(copied / WHOLE)[0]]
    (copied / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, WHOLE)}))
    assert weight_files(copied) == [copied / WHOLE]


def _stale_index(folder: Path) -> None:
    whole = (folder / WHOLE).read_bytes()
    _shard(folder)
    (folder / WHOLE).write_bytes(whole)


def _lost_shard(folder: Path) -> None:
    _shard(folder)
    (folder / SHARDS[1]).unlink()


def _no_index(folder: Path) -> None:
    _shard(folder)
    (folder / INDEX).unlink()


def _weights_by_another_name(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "x"}))


UNCLEAR: dict[str, tuple[Callable[[Path], object], str]] = {
    "an index beside the whole": (
        _stale_index,
        f"holds {WHOLE} and {INDEX}, which names {SHARDS[0]}: which of them is the model cannot be "
        "known; remove the one that is left over",
    ),
    "a lost shard": (_lost_shard, f"names 2 files, and '{SHARDS[1]}' is not there"),
    "shards without an index": (_no_index, f"it holds {SHARDS[0]}, {SHARDS[1]}"),
    "another layout alone": (
        lambda folder: (folder / WHOLE).rename(folder / "consolidated.safetensors"),
        "holds no safetensors weights under the names that transformers reads",
    ),
    "an index that is cut": (
        lambda folder: (folder / INDEX).write_text('{"weight_map": {"a'),
        "not valid JSON",
    ),
    "an index of nothing": (
        lambda folder: (folder / INDEX).write_text("{}"),
        "its weight_map names no files",
    ),
    "weights by a key of the configuration": (
        _weights_by_another_name,
        "'transformers_weights' names other weights than model.safetensors, which is not read",
    ),
    "a PEFT adapter in the folder": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        "holds adapter_config.json: where peft is installed, transformers would put that adapter into "
        "the model in silence",
    ),
}


@pytest.mark.parametrize("what", UNCLEAR)
def test_a_folder_that_may_mean_two_models_is_refused(copied: Path, what: str) -> None:
    make, message = UNCLEAR[what]
    make(copied)
    with pytest.raises(UsageError) as caught:
        find_base_model(str(copied))
    (line,) = caught.value.lines
    assert line.startswith(f"base_model: '{copied}': ")
    assert message in line


def test_a_chat_template_is_the_same_wherever_it_is_kept(copied: Path) -> None:
    """Its place changes no fingerprint, its text does; the tokenizer's is of all the rest."""
    tokenizer = tokenizer_fingerprint(copied)
    assert template_fingerprint(copied) is None
    config = json.loads((copied / "tokenizer_config.json").read_text())
    found = []
    for text in ("{{ a }}", "{{ b }}"):
        (copied / "tokenizer_config.json").write_text(
            json.dumps(config | {"chat_template": text}, indent=7)
        )
        found.append(template_fingerprint(copied))
        (copied / "tokenizer_config.json").write_text(json.dumps(config))
        (copied / "chat_template.jinja").write_text(text)
        found.append(template_fingerprint(copied))
        (copied / "chat_template.jinja").unlink()
        assert tokenizer_fingerprint(copied) == tokenizer
    assert found[0] == found[1] != found[2] == found[3]
    assert None not in found


def test_an_early_fingerprint_is_compared_as_it_was_made(copied: Path) -> None:
    """Early versions recorded no tokenizer, and a fingerprint over every safetensors file."""
    _other(copied, "consolidated.safetensors")
    early = weights_fingerprint(copied, sorted(copied.glob("*.safetensors")))
    recorded = {"name": "x", "revision": None, "fingerprint": early}
    base = find_base_model(str(copied))
    assert base.fingerprint != early
    assert base.changes_since(recorded) == ""
    assert base.changes_since(base.identity()) == ""
    changed = base.changes_since(base.identity() | {"tokenizer": "another"})
    assert changed == f"tokenizer {base.tokenizer}, expected another"
    (copied / "consolidated.safetensors").unlink()
    assert "fingerprint" in base.changes_since(recorded)
