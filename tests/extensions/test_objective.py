"""An objective from one file of the user's own: no text, and units that are no tokens.

Each row is a point and some values of a curve over it; a value is what counts once. Two tasks learn a small
trunk together: one by squares, one by angles. On the other side stands the formula in float64, written
here, step by step with AdamW, from the files of the run alone.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtl_lora_cli.data.mixture import Mixture, subset

from ..forks import Ended, Forks

pytestmark = pytest.mark.slow

FILE = """
import dataclasses

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from mtl_lora_cli.adapters.inject import inject
from mtl_lora_cli.data.prepare import read_rows
from mtl_lora_cli.models.host import ModuleHost, objective


@dataclasses.dataclass(frozen=True)
class Curve:
    x: torch.Tensor  # [B, 6]
    task_ids: torch.Tensor  # [B]
    example: torch.Tensor  # [S], whose value it is
    place: torch.Tensor  # [S], which of its values
    target: torch.Tensor  # [S]
    angles: torch.Tensor  # bool [S]
    owners: torch.Tensor  # [S]

    def to(self, device):
        moved = {name: getattr(self, name).to(device) for name in ("x", "example", "place", "target", "angles")}
        return dataclasses.replace(self, **moved)


class Curves:
    def __init__(self, tasks, examples):
        self._angles = [task.objective == "angles" for task in tasks]
        self._examples = examples
        self.lengths = [np.array([4 * len(row["y"]) for row in rows], dtype=int) for rows in examples]

    def collate(self, rows):
        places = [place for row in rows for place in row]
        found = [self._examples[task][number] for task, number in places]
        counts = torch.tensor([len(one["y"]) for one in found])
        task_ids = torch.tensor([task for task, _ in places])
        return Curve(
            x=torch.tensor([one["x"] for one in found]),
            task_ids=task_ids,
            example=torch.arange(len(found)).repeat_interleave(counts),
            place=torch.cat([torch.arange(count) for count in counts.tolist()]),
            target=torch.tensor([value for one in found for value in one["y"]]),
            angles=torch.tensor(self._angles)[task_ids].repeat_interleave(counts),
            owners=task_ids.repeat_interleave(counts),
        )

    def units(self, rows):
        counts = torch.zeros(len(self.lengths), dtype=torch.long)
        for row in rows:
            for task, number in row:
                counts[task] += len(self._examples[task][number]["y"])
        return counts

    def size(self, rows):
        return sum(len(row) for row in rows)


class CurveHost(ModuleHost):
    def losses(self, batch):
        guess = self.model(batch.x)[batch.example, batch.place]
        apart = guess - batch.target
        return torch.where(batch.angles, 1 - torch.cos(apart), apart.square())


@objective("squares", "angles")
class Learning:
    def __init__(self, base, recipe, tasks):
        self._base, self._recipe, self._tasks = base, recipe, tasks

    def dataset(self, split):
        read = [read_rows(task, split) for task in self._tasks]
        if not any(read):
            return None
        return Curves(self._tasks, [found[0] if found else [] for found in read])

    def host(self, device, dtype):
        trunk = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
        trunk.load_state_dict(load_file(self._base.folder / "model.safetensors"))
        trunk.requires_grad_(False).to(device, dtype)
        names = [task.name for task in self._tasks]
        return CurveHost(trunk, inject(trunk, self._recipe.adapter, names))
"""
TASKS = ("height", "phase")
WEIGHTS = (1.0, 3.0)
RANK, ALPHA, TEMPERATURE = 4, 8.0, 0.5
TRAINING = {
    "epochs": 10,
    "max_steps": 6,
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "warmup": 0,
    "schedule": "constant",
    "max_gradient_norm": 0.5,
    "row_length": 32,
    "rows_per_step": 3,
    "rows_per_pass": 1,
    "checkpoint_every": 1,
    "keep_checkpoints": 9,
    "validation": {"every": 3},
    "diagnose": {"every": 4},
}


@pytest.fixture(scope="module")
def place(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trunk, rows, the file, a recipe, and the run of it, `whole`."""
    folder = tmp_path_factory.mktemp("curves")
    generator = np.random.default_rng(3)
    (folder / "trunk").mkdir()
    (folder / "trunk" / "config.json").write_text('{"model_type": "curves"}')
    sizes = {"0.weight": (16, 6), "0.bias": (16,), "2.weight": (4, 16), "2.bias": (4,)}
    weights = {name: generator.normal(0, 0.4, size) for name, size in sizes.items()}
    save_file(
        {name: torch.tensor(value, dtype=torch.float32) for name, value in weights.items()},
        folder / "trunk" / "model.safetensors",
    )
    for task, most in zip(TASKS, (2, 4), strict=True):
        (folder / task).mkdir()
        for split, count in (("train", 30), ("validation", 9)):
            lines = []
            for _ in range(count):
                x, values = generator.normal(0, 1, 6), int(generator.integers(1, most + 1))
                y = np.sin(x[:values] * 2) + 0.5
                lines.append(json.dumps({"x": x.tolist(), "y": y.tolist()}))
            (folder / task / f"{split}.jsonl").write_text("\n".join(lines))
    (folder / "curves.py").write_text(FILE)
    for task, name in zip(TASKS, ("squares", "angles"), strict=True):
        (folder / f"{task}.yaml").write_text(f"description: A curve.\nobjective: {name}\n")
    recipe = {
        "extensions": ["curves.py"],
        "base_model": "trunk",
        "adapter": {
            "method": "mtl-lora",
            "rank": RANK,
            "alpha": ALPHA,
            "temperature": TEMPERATURE,
            "target_modules": ["0", "2"],
        },
        "tasks": [
            {"name": task, "template": f"{task}.yaml", "source": {"path": task}, "loss_weight": w}
            for task, w in zip(TASKS, WEIGHTS, strict=True)
        ],
        "training": TRAINING,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done(forks.run("train", "recipe.yaml", "run.name=whole", cwd=folder))
    return folder


def done(ended: Ended) -> Ended:
    assert ended.returncode == 0, ended.stderr
    return ended


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def rows_of(place: Path, split: str) -> list[list[dict[str, Any]]]:
    return [
        [json.loads(line) for line in (place / task / f"{split}.jsonl").read_text().splitlines()]
        for task in TASKS
    ]


def losses(p: dict[str, Tensor], base: dict[str, Tensor], task: int, row: dict[str, Any]) -> Tensor:
    """ℓ of each value of a row, by ΔW_t = (α / r) Σ_i softmax(w_t / τ)_i B_i Λ_t A, in float64."""
    x = torch.tensor(row["x"], dtype=torch.float64)
    for layer in ("0", "2"):
        gate = torch.softmax(p[f"{layer}.task_gate"][task] / TEMPERATURE, 0)
        up = torch.einsum("n,nor->or", gate, p[f"{layer}.lora_B"])
        inner = p[f"{layer}.task_transform"][task] @ p[f"{layer}.lora_A"][0]
        change = ALPHA / RANK * up @ inner
        x = (base[f"{layer}.weight"] + change) @ x + base[f"{layer}.bias"]
        x = torch.tanh(x) if layer == "0" else x
    apart = x[: len(row["y"])] - torch.tensor(row["y"], dtype=torch.float64)
    return 1 - torch.cos(apart) if TASKS[task] == "phase" else apart**2


def doubles(path: Path) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in load_file(path).items()}


def drawn(place: Path) -> Mixture:
    """The rows of each step; what the mixture draws is tested where it belongs."""
    return Mixture(
        names=TASKS,
        lengths=tuple(
            np.array([4 * len(row["y"]) for row in rows]) for rows in rows_of(place, "train")
        ),
        row_length=32,
        rows_per_step=3,
        seed=yaml.safe_load((place / "runs/whole/recipe.yaml").read_text())["training"]["seed"],
    )


def test_every_step_is_the_formula_s(place: Path) -> None:
    """Σ_t w_t Σ_s ℓ_s / S, clipped, by AdamW: losses, the gradients' norm, cosines, and what was learned."""
    run, rows, mixture = place / "runs/whole", rows_of(place, "train"), drawn(place)
    base = doubles(place / "trunk" / "model.safetensors")
    first = run / "checkpoints" / "step-000001"
    p = {n: t.requires_grad_() for n, t in doubles(first / "mtl_lora.safetensors").items()}
    moments = doubles(first / "optimizer.safetensors")
    optimizer = torch.optim.AdamW(p.values(), lr=1e-2, weight_decay=0.1)
    for name, tensor in p.items():
        keys = ("exp_avg", "exp_avg_sq", "step")
        optimizer.state[tensor] = {key: moments[f"{name}/{key}"].clone() for key in keys}
    (cosines,) = events(run, "gradients")
    for step in range(1, 6):
        places = [place for row in mixture.step(step)[1] for place in row]
        own = [
            torch.cat([losses(p, base, t, rows[t][n]) for t, n in places if t == task])
            for task in (0, 1)
        ]
        told = events(run, "step")[step]
        units = sum(len(values) for values in own)
        assert told["supervised"] == units > len(places) == told["tokens"]
        for task, values in zip(TASKS, own, strict=True):
            assert told["task_loss"][task] == pytest.approx(float(values.detach().mean()), rel=1e-5)
        loss = sum(w * values.sum() for w, values in zip(WEIGHTS, own, strict=True)) / units
        assert told["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        if step + 1 == cosines["step"]:
            shared = [tensor for name, tensor in p.items() if "lora_" in name]
            pulls = [
                torch.cat(
                    [
                        g.reshape(-1)
                        for g in torch.autograd.grad(v.mean(), shared, retain_graph=True)
                    ]
                )
                for v in own
            ]
            cosine = float(torch.cosine_similarity(pulls[0], pulls[1], dim=0))
            assert cosines["cosine"][0][1] == pytest.approx(cosine, rel=1e-4, abs=1e-5)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(p.values()), 0.5)
        assert told["gradient_norm"] == pytest.approx(float(norm), rel=1e-4)
        optimizer.step()
    for name, tensor in load_file(run / "adapter" / "mtl_lora.safetensors").items():
        torch.testing.assert_close(tensor.double(), p[name].detach(), rtol=1e-4, atol=1e-6)
    found = events(run, "validation")[-1]
    for task, held in enumerate(rows_of(place, "validation")):
        values = torch.cat([losses(p, base, task, row) for row in held])
        assert found["loss"][TASKS[task]] == pytest.approx(float(values.mean().detach()), rel=1e-4)
        assert found["examples"][TASKS[task]] == len(held)


def test_some_examples_are_drawn_as_those_of_a_text(forks: Forks, place: Path) -> None:
    fewer = ("tasks.0.max_examples=7", "training.validation.examples=4", "training.max_steps=3")
    done(forks.run("train", "recipe.yaml", "run.name=fewer", *fewer, cwd=place))
    run = place / "runs" / "fewer"
    assert json.loads((run / "tasks.json").read_text())["mixture"]["examples"] == {
        "height": 7,
        "phase": 30,
    }
    (found,) = events(run, "validation")
    assert found["examples"] == {"height": 4, "phase": 4}
    p = doubles(run / "adapter" / "mtl_lora.safetensors")
    base = doubles(place / "trunk" / "model.safetensors")
    for task, held in enumerate(rows_of(place, "validation")):
        kept = [held[number] for number in subset(len(held), 4, 0, TASKS[task])]
        values = torch.cat([losses(p, base, task, row) for row in kept])
        assert found["loss"][TASKS[task]] == pytest.approx(float(values.mean()), rel=1e-5)


def test_it_goes_on_as_if_never_stopped(forks: Forks, place: Path) -> None:
    again = place / "runs" / "again"
    shutil.copytree(place / "runs" / "whole", again)
    shutil.rmtree(again / "adapter")
    for step in (4, 5, 6):
        shutil.rmtree(again / "checkpoints" / f"step-{step:06d}")
    text = (again / "recipe.yaml").read_text()
    (again / "recipe.yaml").write_text(text.replace("name: whole\n", "name: again\n"))
    said = done(forks.run("train", "--resume", "--run", "again", cwd=place)).stderr
    assert "resuming again after step 3" in said
    whole, found = (
        load_file(place / "runs" / name / "adapter" / "mtl_lora.safetensors")
        for name in ("whole", "again")
    )
    assert whole.keys() == found.keys() and all(torch.equal(whole[n], found[n]) for n in whole)


def test_a_task_is_added_later(forks: Forks, place: Path) -> None:
    """What the trained tasks learned stays as it was, to the last bit."""
    task = {"name": "third", "template": "height.yaml", "source": {"path": "height"}}
    training = {"epochs": 5, "max_steps": 2, "row_length": 32, "rows_per_step": 2}
    more = {
        "extensions": ["curves.py"],
        "base_model": "trunk",
        "tasks": [task],
        "training": training,
    }
    (place / "more.yaml").write_text(yaml.safe_dump(more))
    ended = done(forks.run("add-task", "more.yaml", "--run", "whole", cwd=place))
    assert "next: mtl-lora inspect --run runs/whole-third" in ended.stderr
    before, after = (
        load_file(place / "runs" / name / "adapter" / "mtl_lora.safetensors")
        for name in ("whole", "whole-third")
    )
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name][: len(tensor)])
    gate = after["2.task_gate"]
    assert len(gate) == 3 and not torch.equal(gate[2], gate[:2].mean(0))


def test_two_processes_under_zero_2_learn_the_same(forks: Forks, place: Path) -> None:
    zero = ("run.name=two", "distributed.zero_stage=2", "--num-processes", "2")
    done(forks.run("train", "recipe.yaml", *zero, cwd=place))
    one, two = (events(place / "runs" / name, "step") for name in ("whole", "two"))
    assert len(one) == len(two) == 6
    for alone, shared in zip(one, two, strict=True):
        assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-6)
        assert shared["task_loss"] == pytest.approx(alone["task_loss"], rel=1e-6)
        assert shared["gradient_norm"] == pytest.approx(alone["gradient_norm"], rel=1e-5)
        assert (shared["supervised"], shared["tokens"]) == (alone["supervised"], alone["tokens"])
    looks = [events(place / "runs" / name, "validation")[-1]["loss"] for name in ("whole", "two")]
    assert looks[1] == pytest.approx(looks[0], rel=1e-6)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (("train", "recipe.yaml", "extensions=[]"), "task 'height': unknown objective 'squares'"),
        (("train", "recipe.yaml", "engine=fused"), "engine: is for text"),
        (("train", "recipe.yaml", "training.memory=auto"), "training.memory: is for text"),
        (("train", "recipe.yaml", "distributed.zero_stage=3", "training.diagnose=null"), "objective squares go up to 2"),
        (("train", "recipe.yaml", "tasks.0.objective=angles"), "is for squares, received angles"),
        (("train", "recipe.yaml", "training.row_length=8"), "task 'phase': its examples take 4 to 16"),
        (("train", "mixed.yaml"), "'height' (squares) and 'text' (causal_lm) are learned by different"),
        (("data", "show", "recipe.yaml"), "data show is for text"),
        (("compare", "recipe.yaml", "--methods", "lora"), "is learned by objective squares; only text"),
        (("eval", "--run", "whole", "--task", "all"), "is learned by objective squares; only text"),
        (("merge", "--run", "whole", "--task", "phase"), "is learned by objective squares; only text"),
    ],
)  # fmt: skip
def test_what_is_for_text_alone_is_one_line(
    forks: Forks, place: Path, call: tuple[str, ...], said: str
) -> None:
    recipe = yaml.safe_load((place / "recipe.yaml").read_text())
    recipe["tasks"].append({"name": "text", "template": "samples/animals"})
    (place / "mixed.yaml").write_text(yaml.safe_dump(recipe))
    ended = forks.run(*call, cwd=place)
    (line,) = [one for one in ended.stderr.splitlines() if one.startswith("error")]
    assert said in line and ended.returncode == 2, ended.stderr


@pytest.mark.parametrize(
    ("line", "broken", "said"),
    [
        ("return torch.where(batch.angles,", "return torch.where(", "CurveHost fails: TypeError: where()"),
        ('len(row["y"]) for row in rows]', 'len(row["z"]) for row in rows]', "curves.py:33: Learning fails: KeyError: 'z'"),
        ("apart.square())", "apart.square())[:, None]", "CurveHost.losses gives shape [8, 1], expected [8]"),
        ('+= len(self._examples[task][number]["y"])', "+= 1", "and its dataset's units() counts"),
        ("nn.Linear(6, 16)", "nn.Linear(7, 16)", "Learning fails: RuntimeError: Error(s) in loading"),
        ('("squares", "angles")', '("squares", "causal_lm")', "an objective 'causal_lm' is built in"),
    ],
)  # fmt: skip
def test_a_fault_of_the_file_is_one_line(
    forks: Forks, place: Path, line: str, broken: str, said: str
) -> None:
    assert FILE.count(line) == 1
    (place / "broken").mkdir(exist_ok=True)
    (place / "broken" / "curves.py").write_text(FILE.replace(line, broken))
    call = ("train", "recipe.yaml", "extensions=[broken/curves.py]", "run.name=broken")
    ended = forks.run(*call, cwd=place)
    shutil.rmtree(place / "runs" / "broken", ignore_errors=True)
    (found,) = [one for one in ended.stderr.splitlines() if one.startswith("error")]
    assert said in found and ended.returncode == 2, ended.stderr


def test_what_would_be_done_is_shown(forks: Forks, place: Path) -> None:
    shown = done(forks.run("validate", "recipe.yaml", cwd=place)).stdout
    assert "height" in shown and "host: Learning" in shown and "rows of 32 places" in shown
    dry = done(forks.run("train", "recipe.yaml", "--dry-run", cwd=place)).stdout
    assert "host: CurveHost" in dry and "trainable parameters" in dry
    asked = done(forks.run("doctor", "recipe.yaml", "--json", cwd=place)).stdout
    checks = {check["name"]: check for check in json.loads(asked)["checks"]}
    assert "their memory is not estimated" in checks["recipe"]["finding"]
    done(forks.run("report", "whole", cwd=place))
    page = (place / "runs" / "whole" / "report.html").read_text()
    assert all(task in page for task in TASKS)
    held = done(forks.run("inspect", "--run", "whole", "--json", cwd=place)).stdout
    assert json.loads(held)["tasks"] == list(TASKS)
