"""Two real processes: any stage of ZeRO learns what one process learns, and goes on as if nothing was.

All runs are trained in one start of two processes (`distributed_worker.py`): ten steps each on the
tiny real model and real rows. What ZeRO sums over processes it sums in another order than one process
does, so losses are equal to rounding: 2·10⁻⁷ of the loss were seen on an AMD EPYC and 1.1·10⁻⁶ on an Intel Xeon.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from mtl_lora_cli.data.collate import training_batch
from mtl_lora_cli.errors import ProblemsError
from mtl_lora_cli.evaluation.opened import open_run
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.runs.folder import RunFolder
from mtl_lora_cli.training.prepare import prepare
from mtl_lora_cli.training.prepared import Prepared
from mtl_lora_cli.training.run import resume, start
from mtl_lora_cli.training.validation import Validation

from .conftest import Poison, apart, together
from .distributed_worker import (
    BEST,
    CASES,
    CLIPPED,
    COMMON,
    FOUR_BIT,
    FURTHER,
    NO_GRADIENT,
    POISONED,
    RELEASED,
    SHORT,
    UNEVEN,
    VALIDATED,
    stopped_after,
)

pytestmark = pytest.mark.slow

TOLERANCE = 2e-6
TIMES = ("seconds", "tokens_per_second")
# The same runs by one process.
ALONE = {
    "float32": VALIDATED,
    "plain": ("engine=plain", *VALIDATED),
    "nf4": (*FOUR_BIT, *VALIDATED),
    "uneven": (*UNEVEN, *SHORT),
    "clipped": (*CLIPPED, *SHORT),
    "offload": SHORT,
}
ALONE_FURTHER = {
    "fp4": ("quantization=fp4", *SHORT),
    "int8": ("quantization=int8", *SHORT),
}
STAGES = [name for name in CASES if name.startswith(("float32", "nf4"))]


@dataclass(frozen=True)
class Trained:
    """Every run of this page.

    Attributes:
        folder: of the runs.
        recipe: of them all.
        poison: of the runs that end badly.
        said: by both processes.
    """

    folder: Path
    recipe: Path
    poison: Poison
    said: list[str]

    def events(self, name: str, kind: str = "step") -> list[dict[str, Any]]:
        """The lines of metrics.jsonl of one kind, without what the clock says."""
        found = [
            event for event in RunFolder(self.folder / name).events() if event["event"] == kind
        ]
        return [{k: v for k, v in event.items() if k not in TIMES} for event in found]

    def alone(self, name: str) -> str:
        """The run of one process that a case is compared with.

        In float32 two engines' roundings are further apart after ten steps than two processes' are.
        """
        others = {"float32-3-plain": "plain", "apart-3": "offload"}
        return f"alone-{others.get(name, name.partition('-')[0])}"


@pytest.fixture(scope="module")
def trained(
    recipe_file: Path,
    stories_folder: Path,
    poison: Callable[[Prepared, int], Poison],
    tmp_path_factory: pytest.TempPathFactory,
) -> Trained:
    folder = tmp_path_factory.mktemp("distributed")
    recipe = folder / "recipe.yaml"
    shutil.copy(recipe_file, recipe)
    zero = {
        "train_batch_size": "auto",
        "zero_optimization": {
            "stage": "auto",
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 0,
        },
    }
    (folder / "small.json").write_text(json.dumps(zero))
    spoiled = poison(prepare(load_recipe(recipe, [*COMMON, "training.max_steps=100"])), 2)
    content = yaml.safe_load(recipe.read_text()) | {"base_model": str(spoiled.folder)}
    recipe.with_name("poisoned.yaml").write_text(yaml.safe_dump(content))
    (folder / "apart").mkdir()
    apart(stories_folder, folder / "apart")
    content["base_model"] = str(folder / "apart")
    recipe.with_name("apart.yaml").write_text(yaml.safe_dump(content))
    return Trained(folder, recipe, spoiled, by_both_and_alone(recipe, folder, ALONE))


def by_both_and_alone(
    recipe: Path, folder: Path, alone: Mapping[str, tuple[str, ...]], *which: str
) -> list[str]:
    """Two processes train cases, and this one the same without others; what the two said."""
    worker = str(Path(__file__).with_name("distributed_worker.py"))
    processes = together(worker, str(recipe), str(folder), *which)
    for name, overrides in alone.items():
        start(prepare(load_recipe(recipe, [*COMMON, *overrides])), folder / f"alone-{name}")
    said = [process.communicate(timeout=570)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    return said


@pytest.fixture(scope="module")
def further(trained: Trained) -> Trained:
    by_both_and_alone(trained.recipe, trained.folder, ALONE_FURTHER, "further")
    return trained


def equal_to_rounding(some: Iterable[dict[str, Any]], others: Iterable[dict[str, Any]]) -> None:
    """The same steps: what is counted is equal, what is computed is so to rounding."""
    for one, other in zip(some, others, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=TOLERANCE)
        assert one["task_loss"] == pytest.approx(other["task_loss"], rel=TOLERANCE)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-5)
        for key in ("step", "epoch", "tokens", "supervised", "learning_rate"):
            assert one[key] == other[key]


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("dropout")])
def test_two_processes_learn_what_one_learns(trained: Trained, name: str) -> None:
    found = trained.events(name)
    assert len(found) == (10 if name in STAGES else 4)
    assert found[-1]["loss"] < found[0]["loss"]
    equal_to_rounding(found, trained.events(trained.alone(name)))


@pytest.mark.long
@pytest.mark.parametrize("name", FURTHER)
def test_so_they_do_where_nothing_of_the_base_is_cut(further: Trained, name: str) -> None:
    equal_to_rounding(further.events(name), further.events(further.alone(name)))
    looks, expected = (further.events(run, "validation") for run in (name, further.alone(name)))
    for found, right in zip(looks, expected, strict=True):
        assert found["loss"] == pytest.approx(right["loss"], rel=TOLERANCE)
        assert found["metric"] == pytest.approx(right["metric"])


def test_the_history_that_clips_is_the_same_in_any_stage(trained: Trained) -> None:
    """And says something: without it the run is another one."""
    folder = "checkpoints/step-000004/optimizer.safetensors"
    usual: dict[str, dict[str, Tensor]] = {}
    for name in ("alone-clipped", "clipped-0", "clipped-2", "clipped-3"):
        state = load_file(trained.folder / name / folder)
        usual[name] = {key: one for key, one in state.items() if key.endswith("/usual_norm")}
    expected = usual.pop("alone-clipped")
    assert min(float(one) for one in expected.values()) > 0
    for found in usual.values():
        assert {k: float(v) for k, v in found.items()} == pytest.approx(
            {k: float(v) for k, v in expected.items()}, rel=1e-3, abs=1e-6
        )
    adapters = [
        (trained.folder / name / "adapter" / "mtl_lora.safetensors").read_bytes() for name in usual
    ]
    assert adapters[0] == adapters[1] == adapters[2], "the same steps to the last bit"
    clipped, free = (trained.events(name)[-1] for name in ("clipped-0", "float32-0"))
    assert clipped["loss"] != free["loss"]


def test_a_run_that_clips_by_history_goes_on_by_another_number_of_processes(
    trained: Trained,
) -> None:
    copy = stopped_after(trained.folder / "clipped-2", 2, trained.folder / "clipped-alone")
    resume(RunFolder(copy), None, ["distributed.zero_stage=0"])
    equal_to_rounding(trained.events(copy.name), trained.events("clipped-2"))


@pytest.mark.parametrize("weights", ["float32", "nf4"])
def test_stages_2_and_3_have_the_same_losses(trained: Trained, weights: str) -> None:
    two, three = (trained.events(f"{weights}-{stage}") for stage in (2, 3))
    assert [event["loss"] for event in two] == pytest.approx(
        [event["loss"] for event in three], rel=TOLERANCE
    )


@pytest.mark.parametrize("name", STAGES)
def test_validation_sees_the_same_model(trained: Trained, name: str) -> None:
    """Under stage 3 each layer has to be gathered outside of a step, too."""
    (found,) = trained.events(name, "validation")
    (expected,) = trained.events(trained.alone(name), "validation")
    assert found["step"] == expected["step"] == 10
    assert found["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)
    assert found["metric"] == pytest.approx(expected["metric"])
    assert set(found["metric"]) == {"sst2", "rte", "cola"}


@pytest.mark.parametrize("name", BEST)
def test_all_processes_go_by_what_the_first_one_finds(trained: Trained, name: str) -> None:
    assert [event["step"] for event in trained.events(name, "validation")] == [2, 4, 6]
    assert [event["step"] for event in trained.events(name, "best")] == [2]
    run = RunFolder(trained.folder / name)
    kept = ["step-000002", "step-000005", "step-000006"]
    assert sorted(path.name for path in run.checkpoints.iterdir()) == kept
    first, found = (
        load_file(path / "mtl_lora.safetensors")
        for path in (run.checkpoints / kept[0], run.adapter)
    )
    assert all(torch.equal(first[tensor], found[tensor]) for tensor in first)


@pytest.fixture
def no_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing it is an error."""
    monkeypatch.setitem(sys.modules, "deepspeed", None)


def logprobs_of(run: RunFolder, prepared: Prepared) -> tuple[Tensor, dict[str, float]]:
    """Of every token of some rows, by a finished run; and its loss on held-out examples."""
    opened = open_run(run)
    rows = [row for step in range(2) for row in prepared.data.mixture.step(step)[1]]
    batch = training_batch(rows, prepared.data.splits, loss_on="all")
    with torch.no_grad(), opened.packed.routed(batch):
        logprobs = opened.packed(batch)
    assert prepared.validation is not None
    settings = prepared.recipe.training
    validation = Validation(
        opened.packed,
        opened.packed.adapter,
        prepared.validation,
        prepared.held_out(),
        settings,
        total_steps=10,
    )
    return logprobs, validation.losses()


@pytest.mark.usefixtures("no_deepspeed")
@pytest.mark.parametrize("weights", ["float32", "nf4"])
def test_the_adapter_of_any_stage_loads_without_deepspeed_and_says_the_same(
    trained: Trained, weights: str
) -> None:
    prepared = prepare(load_recipe(trained.recipe, [*COMMON, *VALIDATED]))
    expected, _ = logprobs_of(RunFolder(trained.folder / f"alone-{weights}"), prepared)
    assert expected.std() > 0.5
    for name in STAGES:
        if not name.startswith(weights):
            continue
        logprobs, losses = logprobs_of(RunFolder(trained.folder / name), prepared)
        torch.testing.assert_close(logprobs, expected, rtol=5e-4, atol=1e-4)
        (live,) = trained.events(name, "validation")
        assert losses == pytest.approx(live["loss"], rel=TOLERANCE)  # the model that was trained


def test_the_deepspeed_configuration_is_in_the_run_folder(trained: Trained) -> None:
    assert not RunFolder(trained.folder / "float32-0").deepspeed.exists()
    one, two, three, offloaded = (
        json.loads(RunFolder(trained.folder / name).deepspeed.read_text())["zero_optimization"]
        for name in ("float32-1", "float32-2", "float32-3", "offload-all")
    )
    assert [one["stage"], two["stage"], three["stage"]] == [1, 2, 3]
    assert three["stage3_param_persistence_threshold"] == 0  # the user's own
    assert offloaded["offload_param"]["device"] == "cpu"
    assert offloaded["offload_optimizer"]["device"] == "cpu"


@pytest.mark.parametrize("name", ["dropout-2", "dropout-3"])
def test_a_resumed_run_is_bit_identical(trained: Trained, name: str) -> None:
    """The recipe has dropout: each process's random state has to come back, too."""
    whole, again = (trained.folder / one for one in (name, f"{name}-again"))
    assert trained.events(again.name) == trained.events(name)
    assert [event["step"] for event in trained.events(name)] == list(range(1, 11))
    for part in ("adapter", "checkpoints/step-000010"):
        file = f"{part}/mtl_lora.safetensors"
        assert (whole / file).read_bytes() == (again / file).read_bytes()
    moments = "checkpoints/step-000010/optimizer.safetensors"
    assert (whole / moments).read_bytes() == (again / moments).read_bytes()


def test_each_process_has_a_random_state_of_its_own(trained: Trained) -> None:
    folder = trained.folder / "dropout-3" / "checkpoints"
    before, after = (load_file(folder / f"step-{n:06d}" / "random.safetensors") for n in (5, 10))
    assert set(before) == {"cpu.0", "cpu.1"}
    assert not torch.equal(before["cpu.0"], before["cpu.1"])
    for name in before:
        assert not torch.equal(before[name], after[name])


def test_a_checkpoint_holds_the_whole_state_and_no_pickle(trained: Trained) -> None:
    """Whatever the stage, it is the checkpoint of a run of one process."""
    moments = {}
    for name in ("alone-float32", "float32-1", "float32-2", "float32-3"):
        folder = trained.folder / name / "checkpoints" / "step-000010"
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert {path.suffix for path in files} <= {".json", ".safetensors", ""}
        moments[name] = load_file(folder / "optimizer.safetensors")
    expected = moments.pop("alone-float32")
    for found in moments.values():
        assert set(found) == set(expected)
        for key, value in expected.items():
            difference = (found[key] - value).abs().max()
            assert difference <= 1e-4 * value.abs().max(), key


@pytest.mark.parametrize("engine", RELEASED)
def test_4_bit_bytes_are_released_between_the_passes(trained: Trained, engine: str) -> None:
    for found in json.loads((trained.folder / f"released-{engine}.json").read_text()):
        assert len(found) == 3 * 2  # steps of two passes
        for one in found:
            assert one == {"gathered": 5, "in_memory": 0, "status": 0}


def test_an_embedding_is_gathered_behind_the_pass_before(trained: Trained) -> None:
    """Its gather would hide behind nothing at a pass's beginning; between the passes no weight is looked up."""
    for found in json.loads((trained.folder / "embedded.json").read_text()):
        # The last pass backward has gathered for the first without one.
        assert found["when"] == ["forward 0", "backward 0", "backward 1", "without"]
        assert found["same"] == [True, True]
        assert found["sizes"] == [0, 0]


@pytest.mark.parametrize("name", POISONED)
def test_a_poisoned_row_of_one_process_is_named_by_all(trained: Trained, name: str) -> None:
    lines, others = json.loads((trained.folder / f"{name}.json").read_text())
    assert lines == others
    (line,) = lines
    step, last = trained.poison.step, trained.poison.step - 1
    assert f"the loss is no longer a finite number at step {step} (tasks " in line
    assert ", of 1 of " in line
    assert f"examples: {trained.poison.example}; step-{last:06d} is intact" in line
    checkpoints = RunFolder(trained.folder / name).checkpoints
    assert max(path.name for path in checkpoints.iterdir()) == f"step-{last:06d}"
    adapter = load_file(checkpoints / f"step-{last:06d}" / "mtl_lora.safetensors")
    assert all(tensor.isfinite().all() for tensor in adapter.values())


@pytest.mark.parametrize("name", NO_GRADIENT)
def test_a_gradient_that_is_no_number_ends_the_run_before_it_is_saved(
    trained: Trained, name: str
) -> None:
    lines, others = json.loads((trained.folder / f"{name}.json").read_text())
    assert lines == others
    (line,) = lines
    assert "no longer a finite number at step 4" in line
    assert "all losses are numbers, but their gradient is not; step-000003 is intact" in line
    assert not (trained.folder / name / "checkpoints" / "step-000004").exists()
    assert all(math.isfinite(event["gradient_norm"]) for event in trained.events(name))


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mtl_lora_cli.cli.main", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.long
def test_two_processes_then_one_then_two(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another number, and with another stage, a run goes on to the same losses."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    first = stopped_after(trained.folder / "float32-2", 5, trained.folder / "one-of-two")
    resume = ("train", "--resume", "--run")
    alone = command(
        *resume, str(first), "training.checkpoint_every=1", "training.keep_checkpoints=9"
    )
    assert alone.returncode == 0, alone.stderr
    assert f"resuming {first.name} after step 5" in alone.stderr
    second = stopped_after(first, 7, trained.folder / "two-of-one")
    zero = f"distributed.deepspeed={trained.folder / 'small.json'}"
    both = command(
        *resume, str(second), "--num-processes", "2", "distributed.zero_stage=3", zero, "--json"
    )
    assert both.returncode == 0, both.stderr
    assert f"resuming {second.name} after step 7" in both.stderr
    assert both.stderr.count("resuming") == 1
    assert (
        "the same: torchrun --standalone --nproc-per-node 2 --no-python -- mtl-lora" in both.stderr
    )
    assert json.loads(both.stdout) == {"run": second.name, "path": str(second)}
    equal_to_rounding(trained.events(second.name), trained.events("alone-float32"))
    settings = json.loads(RunFolder(second).deepspeed.read_text())
    assert settings["zero_optimization"]["stage"] == 3
    random = load_file(second / "checkpoints" / "step-000010" / "random.safetensors")
    assert set(random) == {"cpu.0", "cpu.1"}


# The user's own DeepSpeed file: no process is needed to say what is wrong with it.


def zero_of(trained: Trained, tmp_path: Path, given: Any, *overrides: str) -> dict[str, Any]:
    file = tmp_path / "own.json"
    file.write_text(given if isinstance(given, str) else json.dumps(given))
    recipe = load_recipe(trained.recipe, [*COMMON, *overrides, f"distributed.deepspeed={file}"])
    found = prepare(recipe).zero()
    assert found is not None
    return found


def test_a_users_own_file_is_merged(trained: Trained, tmp_path: Path) -> None:
    given = {
        "comms_logger": {"enabled": True},
        "gradient_clipping": 1,
        "optimizer": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "zero_optimization": {"stage": "auto", "reduce_bucket_size": 1000, "overlap_comm": True},
    }
    found = zero_of(trained, tmp_path, given, "distributed.zero_stage=2")
    assert found["comms_logger"] == {"enabled": True}
    assert found["gradient_clipping"] == 1
    assert found["train_micro_batch_size_per_gpu"] == 1
    assert "optimizer" not in found
    assert found["zero_optimization"]["stage"] == 2
    assert found["zero_optimization"]["reduce_bucket_size"] == 1000


def test_contradictions_are_all_told_with_both_values(trained: Trained, tmp_path: Path) -> None:
    given = {
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "Lamb"},
        "bf16": {"enabled": True},
    }
    with pytest.raises(ProblemsError) as caught:
        zero_of(trained, tmp_path, given, "distributed.zero_stage=2")
    file = tmp_path / "own.json"
    assert sorted(caught.value.lines) == [
        f"{file}: bf16: not here: the recipe says it in dtype",
        f"{file}: gradient_clipping: received 0.5, from the recipe follows 1.0",
        f"{file}: optimizer: not here: the recipe says it in training.learning_rate, "
        "training.weight_decay and training.parts",
        f"{file}: zero_optimization.stage: received 1, from the recipe follows 2",
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ('{"zero_optimization":\n{"stage" 2}}', r"own\.json:2: not valid JSON"),
        ("[1]", r"own\.json: expected an object, received list"),
    ],
)
def test_a_file_that_is_no_configuration(
    trained: Trained, tmp_path: Path, given: str, message: str
) -> None:
    with pytest.raises(ProblemsError, match=message):
        zero_of(trained, tmp_path, given, "distributed.zero_stage=2")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distributed.deepspeed=missing.json"], "no such file: 'missing.json'"),
        (["distributed.zero_stage=0", "distributed.offload=optimizer"], "needs zero_stage 1 or"),
        (["distributed.offload=all"], "'offload: all' needs zero_stage 3 or higher, received 2"),
        (["distributed.zero_stage=3", "quantization=int8"], "int8 does not go with zero_stage: 3"),
        (["distributed.zero_stage=3", "base_compute=fp8"], "fp8 does not go with zero_stage: 3"),
        (["distributed.zero_stage=3", "training.diagnose=true"], "diagnose does not go with"),
    ],
)
def test_what_does_not_go_together(trained: Trained, overrides: list[str], message: str) -> None:
    with pytest.raises(ProblemsError, match=message):
        prepare(load_recipe(trained.recipe, ["distributed.zero_stage=2", *overrides]))
