"""What a recipe's steps take by part, whether that fits, and which setting makes it fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.bench.shapes import SHAPES
from mtl_lora_cli.engine.memory import (
    GIB,
    Load,
    fixed_bytes,
    head_bytes,
    peak_bytes,
    peak_parts,
    weight_bytes,
)
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.machine.checks import Check
from mtl_lora_cli.memory import choice, estimate
from mtl_lora_cli.memory.estimate import Estimate, examine_recipe
from mtl_lora_cli.memory.situation import Situation
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import on_meta
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.recipe.training import Recompute
from mtl_lora_cli.training.prepare import prepare

RECIPE = """\
base_model: {base_model}
tasks:
  - {{name: animals, template: samples/animals}}
  - {{name: uses, template: samples/uses, max_examples: 100}}
training: {{row_length: 512}}
"""
Examined = Callable[..., tuple[list[Check], Estimate]]


@pytest.fixture(scope="module")
def eight_b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configuration of LLaMA-3-8B's shape, and nothing else."""
    folder = tmp_path_factory.mktemp("8b")
    content = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SHAPES["llama3-8b"]}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture
def examined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Examined:
    """`examined(base_model, overrides, free=…, processes=…)`, on a device with so many GiB free."""

    def run(
        base_model: Path | str, *overrides: str, free: float = 24, processes: int = 1
    ) -> tuple[list[Check], Estimate]:
        for module in (estimate, choice):
            monkeypatch.setattr(module, "free_memory", lambda _: (int(free * GIB), "a device"))
        path = tmp_path / "recipe.yaml"
        path.write_text(RECIPE.format(base_model=base_model), encoding="utf-8")
        checks, found = examine_recipe(load_recipe(path, overrides), processes)
        return checks, found  # type: ignore[return-value]

    return run


def verdicts(checks: list[Check]) -> dict[str, str]:
    return {check.name: str(check.verdict) for check in checks}


@pytest.mark.slow
def test_a_configuration_alone_is_enough(eight_b: Path, examined: Examined) -> None:
    checks, found = examined(eight_b, "dtype=bfloat16")
    assert verdicts(checks) == {"recipe": "warn", "engine": "ok", "fit": "ok"}
    assert "every position counts as supervised" in checks[0].finding
    assert found.parts["weights"] == pytest.approx(16.06e9, rel=0.001)
    trained = 32 * 8 * (4 * 4096 + 3 * (2 * 4096 + 2 * 1024)) + 2 * 4 * 32 * (8 * 8 + 3)
    assert found.parts["adapter"] == found.parts["gradients"] == 4 * trained
    assert found.parts["moments"] == 8 * trained
    assert sum(found.parts.values()) == found.needed < found.free
    with pytest.raises(UsageError, match="holds no safetensors weights"):
        find_base_model(str(eight_b))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "free", "settings", "enough"),
    [
        ((), 24, ["quantization: nf4"], True),
        pytest.param(("quantization=nf4",), 24, [], True, marks=pytest.mark.long),
        pytest.param(
            (), 10, ["quantization: nf4", "dtype: bfloat16"], True, marks=pytest.mark.long
        ),
        (
            ("training.rows_per_pass=8", "training.loss_on=all"),
            20,
            ["dtype: bfloat16", "training.gradient_checkpointing: true", "quantization: nf4"],
            True,
        ),
        pytest.param(
            ("training.memory=auto",), 24, ["quantization: nf4"], True, marks=pytest.mark.long
        ),
        (("training.memory=auto",), 2, ["quantization: nf4", "dtype: bfloat16"], False),
    ],
    ids=str,
)
def test_what_makes_it_fit(
    eight_b: Path,
    examined: Examined,
    overrides: tuple[str, ...],
    free: float,
    settings: list[str],
    enough: bool,
) -> None:
    checks, found = examined(eight_b, *overrides, free=free)
    assert [key for key, _ in found.settings] == settings
    assert found.enough == enough
    fit = checks[-1]
    if not settings:
        assert (fit.verdict, fit.remedy) == ("ok", None)
        return
    assert fit.verdict == "fail"
    assert str(fit.remedy).startswith(f"set {settings[0]} (−")
    assert ("a smaller base_model" in str(fit.remedy)) == (not enough)
    if enough:
        changes = [key.replace(": ", "=") for key, _ in found.settings]
        again, _ = examined(eight_b, *overrides, *changes, free=free)
        assert again[-1].verdict == "ok"
        fewer, _ = examined(eight_b, *overrides, *changes[:-1], free=free)
        assert fewer[-1].verdict == "fail"


def test_auto_says_the_same_as_a_prepared_run(
    stories_folder: Path, examined: Examined, tmp_path: Path
) -> None:
    _, found = examined(stories_folder, "training.memory=auto", free=1.01)
    prepared = prepare(load_recipe(tmp_path / "recipe.yaml", ["training.memory=auto"]))
    assert found.choice is not None
    assert prepared.memory == found.choice


@pytest.mark.slow
def test_several_processes_share_a_cpu_and_stage_3_the_weights(
    eight_b: Path, examined: Examined
) -> None:
    _, alone = examined(eight_b, "dtype=bfloat16", free=64)
    _, two = examined(eight_b, "dtype=bfloat16", free=64, processes=2)
    checks, cut = examined(
        eight_b, "dtype=bfloat16", "distributed.zero_stage=3", free=64, processes=2
    )
    assert (alone.free, two.free) == (64 * GIB, 32 * GIB)
    assert two.parts == alone.parts
    assert cut.parts["weights"] < 0.75 * two.parts["weights"]
    assert "for each of 2 processes" in checks[-1].finding


def test_what_is_offloaded_is_said(eight_b: Path, examined: Examined) -> None:
    checks, _ = examined(
        eight_b, "distributed.zero_stage=3", "distributed.offload=all", free=64, processes=2
    )
    assert "offload: all takes less than that" in checks[-1].finding


def test_layers_that_are_not_known_are_not_estimated(
    stories_folder: Path, examined: Examined
) -> None:
    checks, found = examined(stories_folder, "engine=plain")
    assert found is None
    assert verdicts(checks) == {"recipe": "ok", "engine": "ok", "fit": "warn"}
    assert "found engine: plain" in checks[-1].finding


@pytest.mark.parametrize(
    ("overrides", "fault", "estimated"),
    [
        (("tasks.uses.source=nowhere",), "nowhere", True),
        (("tasks.uses.template=use",), "did you mean", False),
        (("base_model=./nowhere",), "does not exist", False),
        (("adapter.target_modules=[x_proj]",), "x_proj", False),
        (("training.memory=auto", "engine=plain"), "set memory: manual", False),
    ],
    ids=str,
)
def test_what_the_recipe_names_and_is_not_there_is_told(
    stories_folder: Path,
    examined: Examined,
    overrides: tuple[str, ...],
    fault: str,
    estimated: bool,
) -> None:
    checks, found = examined(stories_folder, *overrides)
    assert "fail" in verdicts(checks).values()
    failed = next(check for check in checks if check.verdict == "fail")
    assert fault in failed.finding
    assert str(failed.remedy).startswith("mtl-lora validate ")
    assert (found is not None) == estimated


@pytest.fixture(scope="module")
def situation(eight_b: Path) -> Situation:
    import torch

    from mtl_lora_cli.recipe.schema import Recipe, TaskSettings

    base = find_base_model(str(eight_b), weights=False)
    model, adapter = on_meta(base, configure(), ["a"])
    return Situation(
        recipe=Recipe(tasks=[TaskSettings(name="a", template="b")]),
        model=model,
        adapter=adapter,
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        processes=1,
        densest=lambda length, loss_on: length,
        longest=8,
    )


@pytest.mark.parametrize("asked", [8, 512])
def test_the_parts_are_those_of_one_moment(situation: Situation, asked: int) -> None:
    """With few questions a block's own work is the most, with many the logits are."""
    sizes = situation.sizes()
    for recompute in (Recompute(), Recompute(attended=True, qkv=32, gate_up=32)):
        load = Load(512, asked)
        parts = peak_parts(sizes, recompute, load)
        assert sum(parts.values()) == peak_bytes(sizes, recompute, load)
        assert (parts["logits"] == 0) != (parts["workspace"] == 0)
        assert parts["logits"] in (0, head_bytes(sizes, load))
        fixed = ("weights", "adapter", "gradients", "moments", "buffers")
        assert sum(parts[name] for name in fixed) == fixed_bytes(sizes)
        assert parts["weights"] == weight_bytes(sizes)
