"""Two processes of which one has no pictures in some steps; four bits and eight; a run that is killed and goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.training.prepare import prepare

from ..forks import Call
from .test_commands import TEMPLATES

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def place(llava: BaseModel, squares: Path, tmp_path_factory: Any) -> Path:
    folder = Path(tmp_path_factory.mktemp("two"))
    shutil.copytree(squares, folder / "squares")
    for name in ("colour", "side"):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(TEMPLATES[name]))
    recipe = {
        "base_model": str(llava.folder),
        "adapter": {
            "method": "mtl-lora",
            "rank": 8,
            "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"],
            "whole_modules": ["multi_modal_projector"],
        },
        "tasks": [
            {"name": name, "template": f"{name}.yaml", "source": "squares"}
            for name in ("colour", "side")
        ],
        "images": {"features": "run"},
        "training": {
            "max_steps": 8,
            "rows_per_step": 2,
            "row_length": 128,
            "rows": "one_task",
            "learning_rate": 2e-3,
            "checkpoint_every": 3,
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def losses(place: Path, name: str) -> list[float]:
    lines = (place / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [one["loss"] for one in map(json.loads, lines) if "loss" in one]


def test_in_some_steps_one_process_has_no_pictures(place: Path) -> None:
    data = prepare(load_recipe(place / "recipe.yaml")).data
    steps = [[{task for task, _ in row} for row in data.mixture.step(n)[1]] for n in range(8)]
    assert any(len(rows) == 2 and {0} in rows and {1} in rows for rows in steps)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_stages_end_with_equal_losses(call: Call, place: Path, quantization: str) -> None:
    found = []
    for stage in (0, 2, 3):
        name = f"{quantization}-{stage}"
        call("train", "recipe.yaml", f"run.name={name}", f"quantization={quantization}",
             f"distributed.zero_stage={stage}", "--num-processes", "2")  # fmt: skip
        found.append(losses(place, name))
    assert len(found[0]) == 8 and found[0][-1] < found[0][0]
    for other in found[1:]:
        assert max(abs(a - b) for a, b in zip(found[0], other, strict=True)) <= 3e-4


def test_kept_features_lead_two_processes_to_the_same_losses(call: Call, place: Path) -> None:
    for name, how in (("seen", "run"), ("kept", "keep")):
        call("train", "recipe.yaml", f"run.name={name}", f"images.features={how}",
             "distributed.zero_stage=2", "--num-processes", "2")  # fmt: skip
    pairs = zip(losses(place, "seen"), losses(place, "kept"), strict=True)
    assert max(abs(a - b) for a, b in pairs) <= 3e-4


def test_four_bits_are_merged_into_a_stock_folder_that_says_the_same(call: Call) -> None:
    call("train", "recipe.yaml", "run.name=four", "quantization=nf4", "training.max_steps=12")
    (found,) = json.loads(
        call("merge", "--run", "four", "--task", "colour", "--limit", "6", "--json").stdout
    )
    assert found["largest_difference"] < 1e-4
    assert found["equal_answers"] == 1.0


def test_eight_bits_learn_and_are_not_cut(call: Call, place: Path) -> None:
    call("train", "recipe.yaml", "run.name=eight", "quantization=int8")
    first, *_, last = losses(place, "eight")
    assert last < first
    said = call("train", "recipe.yaml", "run.name=cut", "quantization=int8",
                "distributed.zero_stage=3", code=2).stderr  # fmt: skip
    assert "int8 does not go with zero_stage: 3" in said and said.count("\n") == 1


def test_a_tower_s_adapters_learn_are_asked_and_merged(call: Call, place: Path) -> None:
    """One task alone in a row, and two in one: each picture goes its task's way."""
    call("train", "recipe.yaml", "run.name=tower", "training.rows=mixed", "training.max_steps=12",
         "adapter.target_modules=[q_proj, down_proj, '*.vision_tower.*.q_proj']")  # fmt: skip
    learned = load_file(place / "runs/tower/adapter/mtl_lora.safetensors")
    moved = [n for n, t in learned.items() if "vision_tower" in n and "lora_B" in n and t.any()]
    assert moved
    for how in (("merge",), ("export", "--format", "peft")):
        asked = ("--run", "tower", "--task", "colour", "--limit", "6", "--json")
        (found,) = json.loads(call(*how, *asked).stdout)
        assert found["largest_difference"] < 1e-4
        assert found["equal_answers"] == 1.0


@pytest.mark.parametrize("how", ["run", "keep"])
def test_a_run_goes_on_bit_for_bit(call: Call, place: Path, how: str) -> None:
    """Its projector, too; from each of its checkpoints."""
    common = ("training.rows=mixed", f"images.features={how}", "training.max_steps=8")
    call("train", "recipe.yaml", f"run.name=through-{how}", *common, "training.checkpoint_every=1",
         "training.keep_checkpoints=9")  # fmt: skip
    through = place / f"runs/through-{how}"
    whole = load_file(through / "adapter/mtl_lora.safetensors")
    for step in (1, 3, 4, 6, 7):
        on = place / f"runs/on-{how}-{step}"
        shutil.copytree(through, on)
        shutil.rmtree(on / "adapter")
        for folder in (on / "checkpoints").iterdir():
            if int(folder.name.rpartition("-")[2]) > step:
                shutil.rmtree(folder)
        call("train", "--resume", "--run", on.name)
        found = load_file(on / "adapter/mtl_lora.safetensors")
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[name], whole[name]) for name in whole)
