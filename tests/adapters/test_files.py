"""Adapter folders: nothing is lost on the way, and each fault has its own line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mtl_lora_cli.adapters.files import (
    CONFIG_FILE,
    TENSOR_FILE,
    config_checksum,
    load_adapter,
    read_adapter_file,
    read_alone,
    read_tensors,
    save_adapter,
    tensor_checksum,
)
from mtl_lora_cli.adapters.inject import Adapter, inject
from mtl_lora_cli.adapters.methods import DEFAULT, configure, reads
from mtl_lora_cli.errors import MtlLoraError

TASKS = ("boolq", "rte", "sst2")


def fresh(seed: int, tasks: tuple[str, ...] = TASKS, **config: Any) -> Adapter:
    torch.manual_seed(seed)
    model = nn.ModuleDict({"first": nn.Linear(6, 5), "second": nn.Linear(5, 4)})
    kinds = {"target_modules": ("first", "second"), "rank": 2, **config}
    if reads(kinds.get("method", DEFAULT), "embedding_size"):
        kinds = {"embedding_size": 3, **kinds}
    adapter = inject(model, configure(**kinds), tasks)
    with torch.no_grad():
        for tensor in adapter.tensors().values():
            tensor.copy_(torch.randn_like(tensor))
    return adapter


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_adapter(fresh(0), tmp_path, {"name": "base", "fingerprint": "f"})
    return tmp_path


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Another configuration, with a checksum that fits it."""
    content = json.loads((folder / CONFIG_FILE).read_text())
    change(content)
    content["checksum"] = config_checksum(content)
    (folder / CONFIG_FILE).write_text(json.dumps(content))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Other tensors, with checksums that fit them."""
    tensors = load_file(folder / TENSOR_FILE)
    change(tensors)
    save_file(tensors, folder / TENSOR_FILE)
    sums = {name: tensor_checksum(tensor) for name, tensor in tensors.items()}
    edit_config(folder, lambda content: content.update(checksums=sums))


def fault(folder: Path, adapter: Adapter | None = None) -> str:
    """The one line that reading the folder ends with; nothing was copied then."""
    adapter = adapter or fresh(1)
    before = {name: tensor.clone() for name, tensor in adapter.tensors().items()}
    with pytest.raises(MtlLoraError) as caught:
        load_adapter(adapter, folder)
    assert all(torch.equal(before[name], t) for name, t in adapter.tensors().items())
    (line,) = caught.value.lines
    assert str(folder) in line
    return line


@pytest.mark.parametrize("transform", ["full", "diagonal", "bases"])
@pytest.mark.parametrize("gate", ["weights", "embedding"])
def test_a_saved_adapter_comes_back_to_the_last_bit(
    tmp_path: Path, transform: str, gate: str
) -> None:
    written = fresh(0, transform=transform, gate=gate)
    save_adapter(written, tmp_path, {"name": "base"})
    read = fresh(1, transform=transform, gate=gate)
    load_adapter(read, tmp_path)
    ours, theirs = written.tensors(), read.tensors()
    assert list(ours) == list(theirs)
    assert ("task_embedding" in ours) == (gate == "embedding")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_the_configuration_says_comes_back(tmp_path: Path) -> None:
    adapter = fresh(0, alpha=3.5, temperature=0.25, dropout=0.1, up_projections=2)
    save_adapter(adapter, tmp_path, {"name": "base", "revision": None, "fingerprint": "f"})
    file = read_adapter_file(tmp_path)
    assert file.config == adapter.config
    assert file.tasks == TASKS
    assert file.base_model == {"name": "base", "revision": None, "fingerprint": "f"}
    expected = {
        "kind": "linear",
        "in_features": 6,
        "out_features": 5,
        "rank": adapter.config.rank,
        "tied_to": None,
    }
    assert file.modules["first"] == expected
    assert set(file.modules) == {"first", "second"}


def test_a_loaded_tensor_is_still_the_one_that_learns(saved: Path) -> None:
    adapter = fresh(1)
    before = {name: id(tensor) for name, tensor in adapter.tensors().items()}
    load_adapter(adapter, saved)
    assert {name: id(tensor) for name, tensor in adapter.tensors().items()} == before
    assert all(tensor.requires_grad for tensor in adapter.tensors().values())


def test_a_missing_tensor(saved: Path) -> None:
    edit_tensors(saved, lambda tensors: tensors.pop("first.lora_B"))
    assert fault(saved).endswith(f"{TENSOR_FILE}: tensor 'first.lora_B' is missing")


def test_a_tensor_missing_against_the_checksums(saved: Path) -> None:
    tensors = load_file(saved / TENSOR_FILE)
    del tensors["second.task_gate"]
    save_file(tensors, saved / TENSOR_FILE)
    assert fault(saved).endswith(f"{TENSOR_FILE}: tensor 'second.task_gate' is missing")


def test_an_unexpected_tensor(saved: Path) -> None:
    edit_tensors(saved, lambda tensors: tensors.update({"first.lora_C": torch.zeros(2)}))
    assert "unexpected tensor 'first.lora_C'; did you mean 'first.lora_" in fault(saved)


def test_a_misshapen_tensor(saved: Path) -> None:
    edit_tensors(saved, lambda tensors: tensors.update({"first.lora_B": torch.zeros(3, 5, 4)}))
    assert "tensor 'first.lora_B' has shape [3, 5, 4], expected [3, 5, 2]" in fault(saved)


def test_a_tensor_of_the_other_transform_is_misshapen(saved: Path) -> None:
    line = fault(saved, fresh(1, transform="diagonal"))
    assert "tensor 'first.task_transform' has shape [3, 2, 2], expected [3, 2]" in line


def test_an_adapter_of_the_other_gate_has_other_tensors(saved: Path) -> None:
    assert "tensor 'task_embedding' is missing" in fault(saved, fresh(1, gate="embedding"))


def test_a_tensor_with_a_flipped_bit(saved: Path) -> None:
    path = saved / TENSOR_FILE
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    line = fault(saved)
    assert "is damaged: its checksum differs" in line
    assert "tensor '" in line


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_tensor_file_that_is_cut_short(saved: Path, keep: int) -> None:
    path = saved / TENSOR_FILE
    path.write_bytes(path.read_bytes()[:keep])
    assert f"{TENSOR_FILE}: damaged" in fault(saved)
    with pytest.raises(MtlLoraError, match="damaged"):
        read_tensors(saved)


@pytest.mark.parametrize(
    "tasks", [("boolq", "rte"), ("rte", "boolq", "sst2"), ("boolq", "rte", "sst-2")]
)
def test_other_task_names_or_another_order(saved: Path, tasks: tuple[str, ...]) -> None:
    line = fault(saved, fresh(1, tasks))
    assert line.endswith(f"tasks are boolq, rte, sst2; expected {', '.join(tasks)}")


@pytest.mark.parametrize("version", [8, 2, 1, 0, "4", None, True])
def test_another_format_version(saved: Path, version: Any) -> None:
    edit_config(saved, lambda content: content.update(format_version=version))
    assert f"format_version {version!r} is not known; this release reads 3 to 7" in fault(saved)


# What formats 3 and 4 said beside the keys that every method reads, as releases before wrote it.
BEFORE: dict[str, dict[str, Any]] = {
    "lora": {"up_projections": 1, "temperature": 1.0, "embedding_size": 16},
    "mtl-lora": {"up_projections": 3, "temperature": 0.5, "embedding_size": 3},
    "mtlora": {"up_projections": 1, "temperature": 1.0, "embedding_size": 16},
    "moelora": {"up_projections": 2, "temperature": 1.0, "embedding_size": 3},
    "multilora": {"up_projections": 3, "temperature": 1.0, "embedding_size": 16},
    "hydralora": {"up_projections": 3, "temperature": 1.0, "embedding_size": 16},
}
ALL_METHODS = {
    "transform": "full", "transform_start": 0.0, "transform_bases": 4, "gate": "weights",
    "gate_start": 2.0, "task_rank": 1, "task_modules": None,
}  # fmt: skip
SINCE_4 = ("transform_start", "transform_bases", "task_modules")
SINCE_6 = ("whole_modules", "streams", "experts", "gate_form")
SINCE_7 = ("tied",)


@pytest.mark.parametrize("version", [3, 4, 5, 6])
@pytest.mark.parametrize("method", BEFORE)
def test_the_formats_before_this_one_are_read(tmp_path: Path, method: str, version: int) -> None:
    """3 and 4 had the keys of all methods; each says nothing of what came later, and means the defaults."""
    own = {"up_projections": 2} if method == "moelora" else {}
    save_adapter(fresh(0, method=method, **own), tmp_path, {"name": "base"})

    def as_before(content: dict[str, Any]) -> None:
        content.update(format_version=version)
        if version < 5:
            content.update(**BEFORE[method], **ALL_METHODS)
        since_6 = SINCE_6 if version < 6 else ()
        for key in (*SINCE_7, *since_6, *(SINCE_4 if version == 3 else ())):
            content.pop(key, None)  # not every method has all of them

    edit_config(tmp_path, as_before)
    adapter = fresh(1, method=method, **own)
    load_adapter(adapter, tmp_path)
    assert read_adapter_file(tmp_path).config == adapter.config
    expected = fresh(0, method=method, **own).tensors()
    assert all(torch.equal(t, expected[name]) for name, t in adapter.tensors().items())
    if version == 3:
        edit_config(tmp_path, lambda content: content.update(transform_start=0.5))
        line = fault(tmp_path, adapter)
        assert line.endswith(f"{CONFIG_FILE}: unknown key 'transform_start'")


def test_a_fine_methods_file_always_said_whether_it_is_tied(tmp_path: Path) -> None:
    save_adapter(fresh(0, method="mtl-lora-fine", tied=True), tmp_path, {"name": "base"})
    edit_config(tmp_path, lambda content: content.update(format_version=6))
    adapter = fresh(1, method="mtl-lora-fine", tied=True)
    load_adapter(adapter, tmp_path)
    assert read_adapter_file(tmp_path).config == adapter.config


def test_parts_of_tasks_own_in_some_layers_come_back(tmp_path: Path) -> None:
    form: dict[str, Any] = {"method": "mtlora", "task_modules": ("second",)}
    written = fresh(0, **form)
    save_adapter(written, tmp_path, {"name": "base"})
    read = read_alone(tmp_path)
    assert read.config == written.config
    ours, theirs = written.tensors(), read.tensors()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    everywhere = fresh(1, method="mtlora")
    assert "tensor 'first.task_lora_A' is missing" in fault(tmp_path, everywhere)


def test_an_unknown_key(saved: Path) -> None:
    edit_config(saved, lambda content: content.update(rnak=3))
    assert fault(saved).endswith(f"{CONFIG_FILE}: unknown key 'rnak'")


@pytest.mark.parametrize("key", ["rank", "tasks", "base_model", "checksums", "method"])
def test_a_missing_key(saved: Path, key: str) -> None:
    edit_config(saved, lambda content: content.pop(key))
    assert fault(saved).endswith(f"{CONFIG_FILE}: missing key '{key}'")


@pytest.mark.parametrize(
    ("key", "value"), [("method", "hydra-lora"), ("transform", "low-rank"), ("gate", "token")]
)
def test_a_kind_that_this_release_does_not_know(saved: Path, key: str, value: str) -> None:
    edit_config(saved, lambda content: content.update({key: value}))
    line = fault(saved)
    assert key in line
    assert value in line


def test_a_configuration_that_was_changed(saved: Path) -> None:
    path = saved / CONFIG_FILE
    path.write_text(path.read_text().replace('"alpha": 16', '"alpha": 18'))
    assert fault(saved).endswith(
        f"{CONFIG_FILE}: damaged, or changed by hand: its own checksum differs"
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tasks", 5),
        ("tasks", [1]),
        ("target_modules", "q_proj"),
        ("task_modules", "q_proj"),
        ("transform_bases", 0),
        ("base_model", []),
        ("checksums", {"a": 1}),
        ("modules", {"layer": {"in_features": 0, "out_features": 3, "rank": 2}}),
        ("modules", {"layer": 3}),
        ("rank", "eight"),
        ("rank", 0),
    ],
)
def test_a_configuration_that_cannot_be(saved: Path, key: str, value: Any) -> None:
    edit_config(saved, lambda content: content.update({key: value}))
    assert CONFIG_FILE in fault(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", "[" * 100000])
def test_a_configuration_that_is_no_json_object(saved: Path, text: str) -> None:
    (saved / CONFIG_FILE).write_text(text)
    assert CONFIG_FILE in fault(saved)


@pytest.mark.parametrize("name", [CONFIG_FILE, TENSOR_FILE])
def test_a_missing_file(saved: Path, name: str) -> None:
    (saved / name).unlink()
    assert f"{name}: no such file" in fault(saved)


def test_the_folder_is_not_mistaken_for_pefts(saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == {CONFIG_FILE, TENSOR_FILE}
    assert not CONFIG_FILE.startswith("adapter_")
