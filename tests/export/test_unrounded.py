"""What 16 bits round, taken back in memory: the unrounded sum, and nothing where a value is no rounding of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl_lora_cli.adapters.experts import MultiTaskStack
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.export.alone import load_alone
from mtl_lora_cli.export.merge import plan_merge, task_updates, write_merged
from mtl_lora_cli.export.unrounded import take_rounding_back
from mtl_lora_cli.export.weight_check import Meant
from mtl_lora_cli.models.base import BaseModel

from .conftest import exported
from .test_experts import TASK, adapted, expected, tiny


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], BaseModel]:
    """Tiny models in bfloat16."""

    return lambda kind: tiny(kind, tmp_path_factory.mktemp("base"), torch.bfloat16)


@pytest.mark.parametrize(
    "kind", ["qwen3_moe", pytest.param("gpt_oss-no-window", marks=pytest.mark.long)]
)
def test_experts_in_pieces_and_in_stacks_get_their_sums(
    base_of: Callable[[str], BaseModel], tmp_path: Path, kind: str
) -> None:
    base = base_of(kind)
    adapter = adapted(base, "each")
    updates = task_updates(adapter, TASK)
    write_merged(plan_merge(base, updates), tmp_path)
    model = load_alone(tmp_path, torch.bfloat16, in_float32=True)
    now: Any = {name: own.detach() for name, own in model.named_parameters()}
    first = next(path for path, one in adapter.layers.items() if isinstance(one, MultiTaskStack))
    now[first][0, 0, 0] += 1  # which is no rounding
    wanted = {
        path: expected(layer, layer.frozen.weight).detach()
        for path, layer in adapter.layers.items()
        if isinstance(layer, MultiTaskStack)
    }
    before = {path: float((now[path] - one).abs().max()) for path, one in wanted.items()}
    take_rounding_back(model, Meant(base, updates, None, {}, {}, {}), torch.bfloat16)
    assert float(now[first][0, 0, 0] - wanted[first][0, 0, 0]) == pytest.approx(1, abs=0.02)
    now[first][0, 0, 0] -= 1
    for path, one in wanted.items():
        after = (now[path] - one).abs()
        after[0, 0, 0] = 0 if path == first else after[0, 0, 0]
        assert float(after.max()) < 1e-6
        assert before[path] > 1e-4


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_rows_of_a_length_of_their_own_get_it_unrounded(
    train: Callable[..., Run], half: Path, tmp_path: Path
) -> None:
    adapter = {"method": "dora", "rank": 4, "target_modules": ["q_proj", "down_proj"]}
    run = train(half, adapter=adapter, dtype="bfloat16")
    found = exported("merged", run, run.tasks[0], tmp_path / "out", limit=8).comparison
    assert found is not None
    assert found.unrounded is not None
    assert 30 * found.unrounded.largest < found.largest
