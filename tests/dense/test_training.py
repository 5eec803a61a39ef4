"""Training maps by the ordinary commands: what is learned is a formula's, and nothing else moves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, SwinConfig

from ..forks import Ended, Forks
from ..kills import killed_and_left_alone
from .conftest import TARGETS, WHOLE, Backbones

pytestmark = pytest.mark.slow

SIZE = (32, 48)
TASKS = ("classes", "depth", "normals", "edges")
TEMPLATES = {
    "classes": {"objective": "segmentation", "classes": ["a", "b", "c"], "ignore": 255},
    "depth": {"objective": "depth", "range": [0.5, 10.0], "scale": "log"},
    "normals": {"objective": "normals"},
    "edges": {"objective": "edges"},
}


def pictures(folder: Path, count: int, generator: np.random.Generator) -> None:
    """Pictures and their maps; every third has no depth."""
    lines = []
    (folder / "files").mkdir(exist_ok=True)
    for number in range(count):
        h, w = SIZE
        name = f"files/{generator.integers(10**9)}"
        pixels = generator.integers(0, 256, (h, w, 3), dtype=np.uint8)
        maps = {
            "classes": (pixels[..., 0] // 90).astype(np.uint8),
            "depth": pixels[..., 1],
            "normals": generator.integers(0, 256, (h, w, 3), dtype=np.uint8),
            "edges": ((pixels[..., 2] > 200) * 255).astype(np.uint8),
        }
        row = {"image": f"{name}.png"}
        Image.fromarray(pixels).save(folder / f"{name}.png")
        for task, values in maps.items():
            if task != "depth" or number % 3:
                row[task] = f"{name}-{task}.png"
                Image.fromarray(values).save(folder / row[task])
        lines.append(json.dumps(row))
    return lines


def recipe_of(base: Path, kind: str, **training: Any) -> dict[str, Any]:
    return {
        "base_model": str(base),
        "images": {"size": list(SIZE), "augment": {"flip": True}},
        "adapter": {
            "method": "mtlora",
            "rank": 4,
            "alpha": 8.0,
            "task_rank": 2,
            "target_modules": TARGETS[kind],
            "streams": "stages",
            "whole_modules": WHOLE[kind],
        },
        "tasks": [
            {"name": task, "template": f"{task}.yaml", "source": {"path": "pictures"}}
            for task in TASKS
        ],
        "training": {
            "max_steps": 4,
            "epochs": 9,
            "rows_per_step": 3,
            "rows_per_pass": 2,
            "learning_rate": 1e-3,
            "parts": {"decoder": {"learning_rate": 2e-3}, "whole": {"learning_rate": 1e-4}},
            "checkpoint_every": 1,
            "keep_checkpoints": 9,
            **training,
        },
    }


@pytest.fixture(scope="module")
def place(forks: Forks, backbones: Backbones, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, templates, a recipe, and the run of it, `whole`."""
    folder = tmp_path_factory.mktemp("dense")
    generator = np.random.default_rng(3)
    (folder / "pictures").mkdir()
    for split, count in (("train", 7), ("validation", 3)):
        lines = pictures(folder / "pictures", count, generator)
        (folder / "pictures" / f"{split}.jsonl").write_text("\n".join(lines))
    for task, keys in TEMPLATES.items():
        written = {"description": "A map.", "image": "image", "target": task, **keys}
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(written))
    recipe = recipe_of(backbones("swin").folder, "swin")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done(forks.run("train", "recipe.yaml", "run.name=whole", cwd=folder))
    return folder


def done(ended: Ended) -> Ended:
    assert ended.returncode == 0, ended.stderr
    return ended


def adapter_of(place: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(place / "runs" / name / "adapter" / "mtl_lora.safetensors")


def test_everything_named_learns(place: Path) -> None:
    first = load_file(
        place / "runs" / "whole" / "checkpoints" / "step-000001" / "mtl_lora.safetensors"
    )
    last = adapter_of(place, "whole")
    still = [name for name, tensor in last.items() if torch.equal(tensor, first[name])]
    assert not still
    kinds = {name.partition(":")[0] for name in last if ":" in name}
    assert kinds == {"whole", "decoder"}


def test_it_goes_on_as_if_never_stopped(forks: Forks, place: Path) -> None:
    """Decoders, what learns whole, and their moments are in a checkpoint."""
    again = place / "runs" / "again"
    shutil.copytree(place / "runs" / "whole", again)
    shutil.rmtree(again / "adapter")
    for step in (3, 4):
        shutil.rmtree(again / "checkpoints" / f"step-{step:06d}")
    text = (again / "recipe.yaml").read_text()
    (again / "recipe.yaml").write_text(text.replace("name: whole\n", "name: again\n"))
    said = done(forks.run("train", "--resume", "--run", "again", cwd=place)).stderr
    assert "resuming again after step 2" in said
    whole, found = adapter_of(place, "whole"), adapter_of(place, "again")
    assert whole.keys() == found.keys() and all(torch.equal(whole[n], found[n]) for n in whole)


@pytest.mark.long
def test_kills_change_no_bit(forks: Forks, place: Path) -> None:
    """Twenty times, at any instruction: the run goes on, decoders and what learns whole among it."""
    longer = ("training.max_steps=60", "training.keep_checkpoints=2")
    assert killed_and_left_alone(forks, place, *longer, kills=20) >= 10, "the run ended too soon"
    still, found = adapter_of(place, "still"), adapter_of(place, "killed")
    assert still.keys() == found.keys()
    assert all(torch.equal(still[name], found[name]) for name in still)
    for name in ("still", "killed"):
        shutil.rmtree(place / "runs" / name)


def test_a_task_is_added_later(forks: Forks, place: Path) -> None:
    """What the trained tasks learned stays as it was, to the last bit: rows of theirs, and their decoders."""
    more = {
        "base_model": yaml.safe_load((place / "recipe.yaml").read_text())["base_model"],
        "images": {"size": list(SIZE)},
        "tasks": [{"name": "late", "template": "edges.yaml", "source": {"path": "pictures"}}],
        "training": {"max_steps": 2, "rows_per_step": 2},
    }
    (place / "more.yaml").write_text(yaml.safe_dump(more))
    done(forks.run("add-task", "more.yaml", "--run", "whole", "run.name=more", cwd=place))
    before, after = adapter_of(place, "whole"), adapter_of(place, "more")
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name][: len(tensor)])
    assert any(name.startswith("decoder:late:") for name in after)
    rows = [name for name in before if len(before[name]) != len(after[name])]
    assert rows and all(name.rpartition(".")[2].startswith("task_lora") for name in rows)


@pytest.mark.long
@pytest.mark.parametrize("task", ["depth", "all"])
def test_a_merged_folder_is_run_by_transformers_alone(forks: Forks, place: Path, task: str) -> None:
    """The command's own check runs the README's program in a process without this package."""
    said = done(forks.run("merge", "--task", task, "--run", "whole", "--json", cwd=place)).stdout
    found = json.loads(said)
    assert found["checked"] and set(found["compared"]) == ({task} if task == "depth" else {*TASKS})
    for one in found["compared"].values():
        assert one["largest"] <= 1e-5 and one["equal"] == 1
    config = json.loads((place / "merged" / "whole" / task / "config.json").read_text())
    assert config["architectures"] == ["SwinModel"]


@pytest.mark.long
def test_onnxruntime_answers_as_the_run(forks: Forks, place: Path) -> None:
    """All tasks in one file, of which the trunk runs once."""
    call = ("export", "--format", "onnx", "--task", "all", "--run", "whole", "--json")
    found = json.loads(done(forks.run(*call, cwd=place)).stdout)
    assert found["checked"] and set(found["compared"]) == {*TASKS}


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            ("export", "--format", "peft", "--task", "depth"),
            "--format peft is for language models; maps leave a run by --format onnx, or by merge",
        ),
        (
            ("merge", "--task", "depth", "--base", "dequantized"),
            "--base dequantized is for text; maps are merged into the original weights",
        ),
        (
            ("train", "recipe.yaml", "images.size=[36, 48]", "base_model=dinov2"),
            "images.size: received [36, 48]; sides of a dinov2 are multiples of 8, such as [32, 48]",
        ),
        (
            ("train", "recipe.yaml", "training.gradient_checkpointing=true"),
            "is for text; tasks with objective segmentation go without it",
        ),
    ],
)
def test_what_cannot_be_is_one_line(
    forks: Forks, place: Path, backbones: Backbones, call: tuple[str, ...], said: str
) -> None:
    if not (place / "dinov2").exists():
        (place / "dinov2").symlink_to(backbones("dinov2").folder)
    run = () if call[0] == "train" else ("--run", "whole")
    ended = forks.run(*call, *run, cwd=place)
    assert ended.returncode == 2 and said in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
    assert {path.name for path in (place / "runs").iterdir()} <= {
        "whole",
        "again",
        "more",
        "latest",
    }


@pytest.mark.long
def test_memory_is_planned_before_the_first_step(forks: Forks, place: Path) -> None:
    call = (
        "train",
        "recipe.yaml",
        "training.memory=auto",
        "training.max_steps=1",
        "run.name=planned",
    )
    more = ("training.rows_per_pass=1", "dtype=bfloat16", "training.validation.every=1")
    said = done(forks.run(*call, *more, cwd=place)).stderr
    assert "memory: " in said and "3 pictures a pass; estimated peak" in said
    recipe = yaml.safe_load((place / "runs" / "planned" / "recipe.yaml").read_text())
    assert recipe["training"]["memory"] == "manual" and recipe["training"]["rows_per_pass"] == 3
    assert all(tensor.dtype == torch.float32 for tensor in adapter_of(place, "planned").values())


@pytest.mark.long
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_two_processes_learn_what_one_does(forks: Forks, place: Path, quantization: str) -> None:
    """At every stage; each has one picture of a step, so now and then one of them has no depth."""
    wide = place / "wide"
    if not wide.is_dir():  # 4-bit blocks are of 64 values
        config = SwinConfig(
            image_size=64, embed_dim=64, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4], window_size=4
        )
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(wide)
    step = ("training.rows_per_step=2", "training.rows_per_pass=1", "training.max_steps=5")
    base = ("base_model=wide", f"quantization={quantization}", *step)
    losses = {}
    for processes, stage in ((1, 0), (2, 0), (2, 1), (2, 2), (2, 3)):
        name = f"{quantization}-{processes}-{stage}"
        call = ("train", "recipe.yaml", f"run.name={name}", f"distributed.zero_stage={stage}")
        more = () if processes == 1 else ("--num-processes", "2")
        done(forks.run(*call, *base, *more, cwd=place))
        lines = (place / "runs" / name / "metrics.jsonl").read_text().splitlines()
        events = [json.loads(line) for line in lines]
        losses[processes, stage] = [e["loss"] for e in events if e["event"] == "step"]
        shutil.rmtree(place / "runs" / name)
    for found in losses.values():
        assert found == pytest.approx(losses[1, 0], rel=1e-6)
