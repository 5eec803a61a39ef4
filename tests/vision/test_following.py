"""What follows the losses, where some tasks show pictures: stopped and resumed it is the same to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.runs.folder import RunFolder
from mtl_lora_cli.training.checkpoints import newest_checkpoint
from mtl_lora_cli.training.loop import Trainer
from mtl_lora_cli.training.prepare import prepare
from mtl_lora_cli.training.prepared import ReadyRun

from ..sights import COLOUR, SIDE
from ..training.conftest import Small
from ..training.test_following import told

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
]  # tests/training and tests/dense have the same in CI

TEMPLATES = {
    "colour": COLOUR,
    "side": SIDE,
}
KINDS = {
    "excess_loss": (
        {"step", "mixing", "balance"},
        "mixing={dynamic: excess_loss, every: 4, reference: {colour: 0.5}}",
        "training.balance=uncertainty",
    ),
    "progress": (
        {"step", "mixing", "balance"},
        "mixing={dynamic: progress, every: 4, start: uniform}",
        "training.balance={method: gradnorm, every: 2}",
    ),
    "stages": (
        {"step"},
        "training.epochs=1",
        "training.stages=[{tasks: [colour], epochs: 0.4}, {tasks: [colour, side]}]",
        "training.balance=pcgrad",
        "training.rows=one_task",
    ),
}


@pytest.fixture
def built(llava: BaseModel, squares: Path, tmp_path: Path) -> Callable[..., Small]:
    for name, template in TEMPLATES.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(template))
    recipe = {
        "base_model": str(llava.folder),
        "adapter": {
            "method": "mtl-lora",
            "rank": 4,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "whole_modules": ["multi_modal_projector"],
        },
        "tasks": [{"name": n, "template": f"{n}.yaml", "source": str(squares)} for n in TEMPLATES],
        "training": {
            "epochs": 9,
            "max_steps": 8,
            "rows_per_step": 3,
            "row_length": 100,
            "learning_rate": 5e-3,
            "checkpoint_every": 1,
        },
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def build(*overrides: str, folder: Path | None = None) -> Small:
        prepared = prepare(load_recipe(tmp_path / "recipe.yaml", overrides))
        host, adapter = prepared.build()
        path = folder or tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        path.mkdir(exist_ok=True)
        ready = ReadyRun(prepared, RunFolder(path), host, adapter)
        return Small(Trainer(ready, prepared.observers(host, adapter)), ready.run)

    return build


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_goes_on_to_the_last_bit(built: Callable[..., Small], kind: str) -> None:
    events, *changes = KINDS[kind]
    whole = built(*changes).train()
    stopped = built(*changes).train(stop_after=5)
    again = built(*changes, folder=stopped.run.path)
    torch.manual_seed(999)
    again.trainer.resume(newest_checkpoint(stopped.run.checkpoints))
    again.train()
    assert told(again) == told(whole)
    assert {one["event"] for one in told(whole)} == events
    ours, theirs = again.tensors, whole.tensors
    assert any(name.startswith("whole:") for name in ours)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
