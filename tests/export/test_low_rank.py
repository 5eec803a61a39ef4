"""Updates at a lower rank: the nearest one that there is, and what it costs, said and not hidden."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.evaluation.protocols import Setting
from mtl_lora_cli.export.check import WrittenCheck
from mtl_lora_cli.export.formats import Reference
from mtl_lora_cli.export.low_rank import ask_at, truncate, updates_at
from mtl_lora_cli.export.peft_files import write_peft
from mtl_lora_cli.export.peft_names import PeftNames
from mtl_lora_cli.export.questions import Questions

from .conftest import itself


def factors(rank: int, out: int = 9, width: int = 7) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(rank, width).double(), torch.randn(out, rank).double()


def nearest(matrix: Tensor, rank: int) -> Tensor:
    """The truncated singular value decomposition of the matrix itself."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize(("k", "out", "width"), [(5, 9, 7), (6, 4, 20), (5, 20, 3)])
def test_it_is_the_truncated_decomposition_of_the_whole_matrix(
    k: int, out: int, width: int, rank: int
) -> None:
    down, up = factors(k, out, width)
    lower_down, lower_up, error = truncate(down, up, rank)
    whole = up @ down
    torch.testing.assert_close(lower_up @ lower_down, nearest(whole, rank))
    expected = float((whole - nearest(whole, rank)).norm() / whole.norm())
    assert error == pytest.approx(expected, abs=1e-12)


def test_the_matrix_itself_is_never_formed() -> None:
    """It would have 4·10¹⁰ numbers, 320 GB."""
    down, up = factors(4, out=200_000, width=200_000)
    lower_down, lower_up, error = truncate(down, up, 2)
    assert (lower_down.shape, lower_up.shape) == ((2, 200_000), (200_000, 2))
    assert 0 < error < 1


def test_a_rank_that_is_not_lower_changes_nothing() -> None:
    down, up = factors(3)
    for rank in (3, 8):
        lower_down, lower_up, error = truncate(down, up, rank)
        assert torch.equal(lower_down, down) and torch.equal(lower_up, up) and error == 0


def test_an_update_of_lower_rank_than_its_factors_loses_nothing() -> None:
    down, up = factors(2)
    _, _, error = truncate(torch.cat([down, down]), torch.cat([up, up], dim=1), 2)
    assert error < 1e-7


def test_an_update_that_is_zero_stays_so() -> None:
    down, up = factors(3)
    lower_down, lower_up, error = truncate(down, torch.zeros_like(up), 1)
    assert error == 0
    assert torch.equal(lower_up @ lower_down, torch.zeros(9, 7).double())


def test_a_rank_above_the_adapters_is_refused(run: Run) -> None:
    with pytest.raises(UsageError, match=r"--rank 5: the update of task 'sst2' has rank 4"):
        updates_at(run, run.tasks[0], 5)


def test_layers_of_a_lower_rank_keep_it(train: Callable[..., Run], stories_folder: Path) -> None:
    adapter: dict[str, Any] = {"method": "lora", "rank": 4, "rank_pattern": {"down_proj": 1}}
    adapter["target_modules"] = ["q_proj", "down_proj"]
    run = train(stories_folder, adapter=adapter)
    updates, truncation = updates_at(run, run.tasks[0], 2)
    ranks = {name.split(".")[-2]: len(down) for name, (down, _, _) in updates.items()}
    assert ranks == {"q_proj": 2, "down_proj": 1}
    assert truncation is not None and truncation.largest > 0
    assert all(truncation.errors[n] == 0 for n in truncation.errors if "down_proj" in n)
    same = ask_at(Questions(run, run.tasks[0], Setting(limit=8)), 4, "none")
    own = itself(Questions(run, run.tasks[0], Setting(limit=8)))
    for ours, theirs in zip(same.scores, own.scores, strict=True):
        assert abs(ours - theirs).max() < 2e-5


@pytest.mark.parametrize("rank", [1, 3])
def test_the_written_adapter_is_held_against_the_truncated_update(
    run: Run, tmp_path: Path, rank: int
) -> None:
    """And how far that is from the run is told, not judged: at rank 1 it is far."""
    pytest.importorskip("peft")
    updates, _ = updates_at(run, run.tasks[0], rank)
    write_peft(updates, PeftNames(["q_proj", "down_proj"]), run.base.name, tmp_path)
    models = [Reference("truncated", None, rank), Reference("run")]
    questions = Questions(run, run.tasks[0], Setting(limit=12))
    comparison = WrittenCheck("peft", models, 12, 1e-4).compare(questions, tmp_path)
    assert comparison.holds
    assert comparison.largest < 2e-5
    assert comparison.models["run"].largest > 1e-3 > comparison.largest


def test_on_a_quantised_base_it_has_the_runs_own_weights(four_bit_run: Run) -> None:
    questions = Questions(four_bit_run, four_bit_run.tasks[0], Setting(limit=8))
    own = itself(questions)
    for quantization, allowed in (("nf4", (0, 2e-5)), ("none", (1e-3, 10))):
        found = ask_at(questions, 4, quantization)
        pairs = zip(found.scores, own.scores, strict=True)
        largest = max(float(abs(a - b).max()) for a, b in pairs)
        assert allowed[0] <= largest < allowed[1]


def test_the_written_file_holds_the_nearest_update(run: Run, tmp_path: Path) -> None:
    updates, _ = updates_at(run, run.tasks[1], 2)
    write_peft(updates, PeftNames(["q_proj", "down_proj"]), run.base.name, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    path = "model.layers.2.mlp.down_proj"
    down, up = run.adapter.layers[path].task_update(1)
    whole = run.adapter.config.scale(4) * up @ down
    a, b = (tensors[f"base_model.model.{path}.lora_{part}.weight"].double() for part in "AB")
    assert (len(a), b.shape[1]) == (2, 2)
    torch.testing.assert_close(b @ a, nearest(whole, 2), rtol=1e-5, atol=1e-6)
