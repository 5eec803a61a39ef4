"""Every tensor of a merged folder is looked at: whatever is done to one, the check says which."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtl_lora_cli.errors import CheckError
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.export import merge as merging
from mtl_lora_cli.export import weight_check
from mtl_lora_cli.export.formats.merged import Merged
from mtl_lora_cli.export.order import Options, Order

from .conftest import exported

pytestmark = pytest.mark.slow

DOWN = "model.layers.2.mlp.down_proj.weight"  # adapted
NORM = "model.layers.2.input_layernorm.weight"  # not
EMBEDDING = "model.embed_tokens.weight"


def fault(run: Run, folder: Path, task: int = 0, **options: Any) -> str | None:
    return Merged().fault(Order(run, run.tasks[task], folder, Options(**options)), folder)


def written(run: Run, folder: Path, task: int = 0, **options: Any) -> Path:
    return exported("merged", run, run.tasks[task], folder, checked=False, **options).folder


@pytest.fixture(scope="module")
def merged(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(run, tmp_path_factory.mktemp("merged") / "out")


@pytest.fixture(scope="module")
def half_run(train: Callable[..., Run], half: Path) -> Run:
    """In bfloat16, whose rounding is coarser than most of what an update adds."""
    return train(half, dtype="bfloat16", steps=2)


def spoiled(folder: Path, target: Path, spoil: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy with other tensors."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    spoil(tensors)
    (target / "model.safetensors").unlink()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def one_value(name: str) -> Callable[[dict[str, Tensor]], None]:
    def spoil(tensors: dict[str, Tensor]) -> None:
        flat = tensors[name].view(-1)
        flat[len(flat) // 2] = flat[len(flat) // 2] * 1.05 + 1e-3

    return spoil


def a_block_of_zeros(tensors: dict[str, Tensor]) -> None:
    tensors[DOWN][3:5, 8:16] = 0


def swapped(tensors: dict[str, Tensor]) -> None:
    one, other = (f"model.layers.{number}.mlp.down_proj.weight" for number in (1, 2))
    tensors[one], tensors[other] = tensors[other], tensors[one]


def swapped_norms(tensors: dict[str, Tensor]) -> None:
    other = "model.layers.1.input_layernorm.weight"
    tensors[NORM], tensors[other] = tensors[other], tensors[NORM]


def another_dtype(tensors: dict[str, Tensor]) -> None:
    tensors[NORM] = tensors[NORM].bfloat16()


def transposed(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].T.contiguous()


def no_number(tensors: dict[str, Tensor]) -> None:
    tensors[DOWN][0, 0] = float("nan")


def missing(tensors: dict[str, Tensor]) -> None:
    del tensors[NORM]


def too_many(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.9.input_layernorm.weight"] = tensors[NORM].clone()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (one_value(DOWN), f"tensor '{DOWN}' is not the base model's plus the update"),
        (one_value(NORM), f"tensor '{NORM}' is not what it has to be"),
        (one_value(EMBEDDING), f"tensor '{EMBEDDING}' is not what it has to be"),
        (a_block_of_zeros, f"tensor '{DOWN}' is not the base model's plus the update"),
        (swapped, "mlp.down_proj.weight' is not the base model's plus the update"),
        (swapped_norms, "input_layernorm.weight' is not what it has to be"),
        (another_dtype, f"tensor '{NORM}' is BF16 [64], expected F32 [64]"),
        (transposed, "is not the base model's plus the update"),
        (no_number, f"tensor '{DOWN}' is not the base model's plus the update"),
        (missing, f"tensor '{NORM}' is missing"),
        (too_many, "tensor 'model.layers.9.input_layernorm.weight' does not belong there"),
    ],
)
def test_a_spoiled_tensor_is_named(
    run: Run, merged: Path, tmp_path: Path, spoil: Callable[..., None], said: str
) -> None:
    found = fault(run, spoiled(merged, tmp_path / "out", spoil))
    assert found is not None and said in found


def test_what_was_written_has_no_fault(run: Run, merged: Path) -> None:
    assert fault(run, merged) is None


@pytest.mark.parametrize("missing", ["the update", "one row of it", "another task's"])
def test_in_16_bits_a_missing_update_is_seen(half_run: Run, tmp_path: Path, missing: str) -> None:
    """No value need be further off than rounding may put it: that some are not rounded from the sum is seen."""
    folder = written(half_run, tmp_path / "right", 1)
    assert fault(half_run, folder, 1) is None
    base = load_file(half_run.base.folder / "model.safetensors")
    other = load_file(written(half_run, tmp_path / "other", 0) / "model.safetensors")

    def spoil(tensors: dict[str, Tensor]) -> None:
        right = tensors[DOWN].clone()
        if missing == "the update":
            tensors[DOWN] = base[DOWN].clone()
        elif missing == "one row of it":
            row = int((right != base[DOWN]).sum(dim=1).argmax())
            tensors[DOWN][row] = base[DOWN][row]
        else:
            tensors[DOWN] = other[DOWN].clone()
        assert not torch.equal(right, tensors[DOWN])

    found = fault(half_run, spoiled(folder, tmp_path / "out", spoil), 1)
    assert found is not None and DOWN in found


def test_an_update_near_the_rounding_of_16_bits_is_seen() -> None:
    """No value is off by more than a neighbour: what is not rounded from the sum is not the sum."""
    torch.manual_seed(0)
    base = (1 + torch.rand(64, 48)).bfloat16()  # neighbours are 2⁻⁷ apart
    update = (torch.rand(4, 48), torch.rand(64, 4), 2.0**-9)
    exact = base.double() + update[2] * (update[1].double() @ update[0].double())
    right = exact.bfloat16()
    assert 0 < (right != base).float().mean() < 0.3
    assert (base.double() - exact).abs().max() < 2.0**-7, "nearer than neighbours are"
    assert weight_check._is_sum(right, base, update, 0, None)
    assert not weight_check._is_sum(base, base, update, 0, None)
    one = right.clone()
    row, column = (right != base).nonzero()[0].tolist()
    one[row, column] = base[row, column]
    assert not weight_check._is_sum(one, base, update, 0, None)


def changed(name: str, **keys: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | keys))

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (changed("config.json", rope_theta=1.0), "config.json differs from the base model's"),
        (changed("config.json", dtype="float16"), "config.json differs from the base model's"),
        (
            changed("tokenizer.json", added_tokens=[]),
            "tokenizer.json differs from the base model's",
        ),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (
            lambda folder: (folder / "adapter_config.json").write_text("{}"),
            "adapter_config.json does not belong there",
        ),
        (
            lambda folder: shutil.copy(folder / "model.safetensors", folder / "more.safetensors"),
            "more.safetensors does not belong there",
        ),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "no safetensors file"),
    ],
)
def test_a_spoiled_file_is_named(
    run: Run, merged: Path, tmp_path: Path, change: Callable[[Path], None], said: str
) -> None:
    folder = Path(shutil.copytree(merged, tmp_path / "out"))
    change(folder)
    found = fault(run, folder)
    assert found is not None and said in found


def test_a_shard_that_is_missing_or_another_ones_is_named(
    train: Callable[..., Run], sharded: Path, tmp_path: Path
) -> None:
    run = train(sharded)
    folder = written(run, tmp_path / "out")
    assert fault(run, folder) is None
    one, other, _ = sorted(folder.glob("*.safetensors"))
    kept = one.read_bytes()
    one.unlink()
    assert f"{one.name} is missing" in (fault(run, folder) or "")
    shutil.copy(other, one)
    assert "tensor" in (fault(run, folder) or "")
    one.unlink()
    one.write_bytes(kept)
    assert fault(run, folder) is None


@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_weights_of_a_quantised_run_are_looked_at_as_it_saw_them(
    four_bit_run: Run, tmp_path: Path, base: str
) -> None:
    folder = written(four_bit_run, tmp_path / "right", base=base)
    assert fault(four_bit_run, folder, base=base) is None
    other = "original" if base == "dequantized" else "dequantized"
    assert fault(four_bit_run, folder, base=other) is not None
    out = spoiled(folder, tmp_path / "out", one_value(NORM))
    assert NORM in (fault(four_bit_run, out, base=base) or "")


@pytest.mark.usefixtures("in_process")
def test_what_rows_would_not_see_lies_aside(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedding of a token that no compared row has."""
    right = merging.write_merged

    def wrong(plan: Any, folder: Path, say: Any) -> None:
        right(plan, folder, say)
        file = folder / "model.safetensors"
        tensors = load_file(file)
        tensors[EMBEDDING][510] *= 1.001
        file.unlink()
        save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(merging, "write_merged", wrong)
    with pytest.raises(CheckError, match=f"tensor '{EMBEDDING}' is not what it has to be"):
        exported("merged", run, run.tasks[0], tmp_path / "out", limit=4)
    assert (tmp_path / "out.failed" / "FAILED.md").is_file()
