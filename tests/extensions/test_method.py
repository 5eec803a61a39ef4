"""A method from one file of the user's own: it trains, resumes, merges and exports like a built-in one.

Its tensors are of a kind that no built-in method has: a rotation of each task, exp(X_t − X_tᵀ) between A and
B, and one strength a task for the whole model. On the other side stand transformers and PEFT, which know
nothing of it, and the formula in float64 with SciPy's matrix exponential.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from scipy.linalg import expm
from transformers import AutoModelForCausalLM

from ..forks import Ended, Forks

REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow

ROTATED = '''
from typing import Literal

from pydantic import Field

from mtl_lora_cli.adapters.methods import method
from mtl_lora_cli.adapters.methods.base import NonNegativeFloat, Role, Settings, normal


def ones(*shape, **where):
    import torch

    return torch.ones(*shape, **where)


@method
class Rotated(Settings):
    """A rotation of each task between A and B."""

    spread = "task"
    start_keys = (*Settings.start_keys, "angle_start")

    method: Literal["rotated"] = "rotated"
    angle_start: NonNegativeFloat = Field(0.1, description="How X_t starts.")

    def roles(self, sizes):
        shape = (sizes.tasks, sizes.rank, sizes.rank)
        start = normal(self.angle_start)
        return (
            *super().roles(sizes),
            Role("task_rotation", shape, start, "transform", per_task=True),
        )

    def roles_of_model(self, tasks):
        return (Role("task_strength", (tasks,), ones, "gate", per_task=True),)

    def mixing(self, p):
        import torch

        x = p["task_rotation"]
        return p["task_strength"][:, None, None] * torch.linalg.matrix_exp(x - x.mT)
'''

TASKS = ("animals", "uses")
TARGETS = ("q_proj", "v_proj", "down_proj")


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    """Each command is a process of its own, which knows of the method by the run's recipe alone."""
    process = Forks("torch", "transformers", "mtl_lora_cli.training.run")
    yield process
    process.close()


@pytest.fixture(scope="module")
def place(forks: Forks, small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the method's file, a recipe, and the run of it, `whole`."""
    folder = tmp_path_factory.mktemp("rotated")
    (folder / "rotated.py").write_text(ROTATED)
    recipe = {
        "extensions": ["rotated.py"],
        "base_model": str(small_model),
        "adapter": {
            "method": "rotated",
            "rank": 4,
            "angle_start": 0.3,
            "target_modules": list(TARGETS),
        },
        "tasks": [{"name": name, "template": f"samples/{name}"} for name in TASKS],
        "training": {
            "max_steps": 6,
            "learning_rate": 1e-2,
            "row_length": 128,
            "rows_per_step": 2,
            "checkpoint_every": 3,
            "parts": {"gate": {"learning_rate": 2e-2}},
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done(forks.run("train", "recipe.yaml", "run.name=whole", cwd=folder))
    return folder


def done(ended: Ended) -> str:
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def tensors(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "adapter" / "mtl_lora.safetensors")


def weights_by_formula(place: Path, base: Path, task: int) -> dict[str, np.ndarray]:
    """W + s B σ_t exp(X_t − X_tᵀ) A in float64, from the files alone."""
    learned = {
        name: value.astype(np.float64) for name, value in tensors(place / "runs/whole").items()
    }
    weights = {
        name: value.astype(np.float64)
        for name, value in load_file(base / "model.safetensors").items()
    }
    strength = learned["task_strength"][task]
    for name in learned:
        if name.endswith(".lora_A"):
            path = name.removesuffix(".lora_A")
            x = learned[f"{path}.task_rotation"][task]
            rotation = expm(x - x.T)
            np.testing.assert_allclose(rotation @ rotation.T, np.eye(len(x)), atol=1e-12)
            up, down = learned[f"{path}.lora_B"][0], learned[name][0]
            weights[f"{path}.weight"] += 16 / 4 * strength * up @ rotation @ down
    return weights


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[1, 5, 17, 101, 64, 33, 250, 7]])
    return model(ids.to(model.device)).logits.double()


def expected_logits(place: Path, base: Path, task: int) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    state = {k: torch.from_numpy(v) for k, v in weights_by_formula(place, base, task).items()}
    model.load_state_dict(state, strict=False)
    return logits(model)


def test_every_tensor_learned(place: Path, small_model: Path) -> None:
    learned = tensors(place / "runs/whole")
    assert {name.rpartition(".")[2] for name in learned} == {
        "lora_A", "lora_B", "task_rotation", "task_strength",
    }  # fmt: skip
    assert all(value.any() for value in learned.values())
    assert (learned["task_strength"] != 1).all()
    untrained = logits(AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float64))
    for task in range(2):
        changed = expected_logits(place, small_model, task)
        assert float((changed - untrained).abs().max()) > 1e-2


def test_a_resumed_run_has_the_same_bits(place: Path, forks: Forks) -> None:
    cut = place / "runs" / "cut"
    shutil.copytree(place / "runs/whole", cut)
    shutil.rmtree(cut / "adapter")
    shutil.rmtree(cut / "checkpoints/step-000006")
    text = (cut / "recipe.yaml").read_text()
    (cut / "recipe.yaml").write_text(text.replace("name: whole", "name: cut"))
    done(forks.run("train", "--resume", "--run", "cut", cwd=place))
    whole, again = tensors(place / "runs/whole"), tensors(cut)
    assert whole.keys() == again.keys()
    assert all(np.array_equal(whole[name], again[name]) for name in whole)


def test_both_engines_learn_the_same(place: Path, forks: Forks) -> None:
    for engine in ("fused", "plain"):
        call = ("train", "recipe.yaml", f"run.name={engine}", f"engine={engine}")
        done(forks.run(*call, "training.max_steps=3", cwd=place))
    fused, plain = (tensors(place / "runs" / engine) for engine in ("fused", "plain"))
    for name, value in fused.items():
        np.testing.assert_allclose(value, plain[name], atol=2e-4, err_msg=name)


@pytest.mark.long  # tests/training/test_distributed.py has two processes
def test_two_processes_learn_the_same(place: Path, forks: Forks) -> None:
    """They share rows and, with ZeRO, the optimiser's state; each finds the method by the recipe."""
    call = ("train", "recipe.yaml", "run.name=two", "--num-processes", "2")
    done(forks.run(*call, "distributed.zero_stage=2", cwd=place))
    alone, together = (tensors(place / "runs" / name) for name in ("whole", "two"))
    for name, value in alone.items():
        np.testing.assert_allclose(together[name], value, atol=2e-4, err_msg=name)


def test_merged_weights_are_the_formulas(place: Path, forks: Forks, small_model: Path) -> None:
    out = ("--output", "merged")
    done(forks.run("merge", "--run", "whole", "--task", TASKS[0], *out, cwd=place))
    theirs = AutoModelForCausalLM.from_pretrained(place / "merged", dtype=torch.float64)
    expected = expected_logits(place, small_model, 0)
    torch.testing.assert_close(logits(theirs), expected, rtol=0, atol=2e-5)


def test_peft_reads_one_task(place: Path, forks: Forks, small_model: Path) -> None:
    from peft import PeftModel

    call = ("export", "--format", "peft", "--run", "whole", "--task", TASKS[1])
    done(forks.run(*call, "--output", "peft", cwd=place))
    model = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float64)
    theirs = PeftModel.from_pretrained(model, place / "peft").double()
    expected = expected_logits(place, small_model, 1)
    torch.testing.assert_close(logits(theirs), expected, rtol=0, atol=2e-5)


def test_a_task_is_added_beside_it(place: Path, forks: Forks) -> None:
    """Rows of a role of its own begin at the mean of the trained ones, and nothing else moves."""
    more = {"tasks": [{"name": "ads", "template": "samples/search_ads", "max_examples": 20}]}
    more["training"] = {"max_steps": 2, "row_length": 128, "on_overflow": "truncate_prompt"}
    (place / "more.yaml").write_text(yaml.safe_dump(more))
    done(forks.run("add-task", "more.yaml", "run.name=more", "--run", "whole", cwd=place))
    before, after = tensors(place / "runs/whole"), tensors(place / "runs/more")
    for name, value in before.items():
        if ".lora_" in name:
            assert np.array_equal(value, after[name])
        else:
            assert np.array_equal(value, after[name][:2])
            assert len(after[name]) == 3 and not np.array_equal(after[name][2], value.mean(0))


def test_it_is_counted_inspected_and_evaluated(place: Path, forks: Forks) -> None:
    shown = json.loads(done(forks.run("inspect", "--run", "whole", "--json", cwd=place)))
    sizes = {name: value.size for name, value in tensors(place / "runs/whole").items()}
    assert shown["parameters"]["total"] == sum(sizes.values())
    assert shown["method"] == "rotated"
    norms = next(iter(shown["layers"].values()))["norms"]
    assert set(norms["rotation"]) == set(TASKS)
    call = ("eval", "--run", "whole", "--task", "all", "--limit", "4", "--json")
    scored = json.loads(done(forks.run(*call, cwd=place)))
    assert [one["task"] for one in scored["results"]] == list(TASKS)
    bench = ("bench", "--method", "rotated", "--shape", "tiny", "--row-length", "512")
    short = ("--tasks", "2", "--steps", "1", "--warmup", "0", "--json")
    said = done(forks.run("--extension", "rotated.py", *bench, *short, cwd=place))
    # 2 layers of q, k, v, o: A and B of rank 8, a rotation a task; and a strength a task.
    count = 2 * (4 * 8 * 64 + 8 * (64 + 32 + 32 + 64) + 4 * 2 * 8 * 8) + 2
    assert json.loads(said)["cases"][0]["trained_parameters"] == count
    plan = ("compare", "recipe.yaml", "--methods", "lora,rotated", "--match", "none", "--dry-run")
    assert "rotated-seed0" in done(forks.run(*plan, cwd=place))
    schema = json.loads(done(forks.run("--extension", "rotated.py", "schema", cwd=place)))
    keys = schema["$defs"]["Adapter"]["properties"]
    assert "rotated" in keys["method"]["enum"] and "angle_start" in keys


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            ('p["task_rotation"]', 'p["task_rotaton"]'),
            "rotated.py:37: method rotated: mixing: no role 'task_rotaton'; did you mean "
            "'task_rotation'?; roles: task_strength, lora_A, lora_B, task_rotation",
        ),
        (
            ("[:, None, None] * torch", "[:, None, None, None] * torch"),
            "rotated.py:37: method rotated: mixing: with spread: task and 2 tasks, A of 4 rows and B of "
            "4 columns expected a mixing of shape [1, 2, 4, 4], received [2, 2, 4, 4]",
        ),
        (
            ("torch.linalg.matrix_exp(x - x.mT)", "torch.linalg.matrix_exp(x - x[0])[3]"),
            "rotated.py:37: method rotated: mixing: IndexError: index 3 is out of bounds for dimension 0 "
            "with size 1",
        ),
        (
            ('"task_rotation", shape', '"weight", shape'),
            "rotated.py:26: method rotated: roles: a role cannot be called 'weight'",
        ),
        (
            ("(sizes.tasks, sizes.rank, sizes.rank)", "(sizes.rank, sizes.rank, sizes.tasks)"),
            "rotated.py:26: method rotated: roles: 'task_rotation' belongs to each task, and its shape "
            "[4, 4, 2] does not begin with the 2 tasks",
        ),
        (
            ('Literal["rotated"] = "rotated"', 'Literal["lora"] = "lora"'),
            "rotated.py:16: a method 'lora' is there already",
        ),
        (
            ("angle_start: NonNegativeFloat", "angle_strat: NonNegativeFloat"),
            "recipe.yaml:2: adapter.angle_start: unknown key; did you mean 'angle_strat'?",
        ),
    ],
)
def test_what_is_wrong_with_the_file_is_one_line(
    place: Path, forks: Forks, tmp_path: Path, change: tuple[str, str], line: str
) -> None:
    assert change[0] in ROTATED
    (tmp_path / "rotated.py").write_text(ROTATED.replace(*change))
    shutil.copy(place / "recipe.yaml", tmp_path)
    ended = forks.run("train", "recipe.yaml", "run.name=no", cwd=tmp_path)
    assert ended.returncode == 2, ended.stderr
    said = [one for one in ended.stderr.splitlines() if one.startswith("error: ")]
    assert len(said) == 1 and line in said[0], ended.stderr
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_the_pages_method_trains(place: Path, forks: Forks, tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "method.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(# rotated\.py\n.*?)```", page, re.DOTALL)
    (tmp_path / "rotated.py").write_text(block)
    shutil.copy(place / "recipe.yaml", tmp_path)
    call = ("train", "recipe.yaml", "run.name=page", "training.max_steps=2", "training.parts={}")
    done(forks.run(*call, cwd=tmp_path))
    assert "task_strength" not in tensors(tmp_path / "runs/page")


def test_without_its_file_the_method_is_unknown(place: Path, forks: Forks) -> None:
    ended = forks.run("train", "recipe.yaml", "run.name=no", "extensions=[]", cwd=place)
    assert ended.returncode == 2
    assert "adapter.method: unknown method 'rotated'" in ended.stderr
