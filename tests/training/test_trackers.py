"""TensorBoard is told what metrics.jsonl holds, and a tracker that is not there is refused early."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.recipe.schema import RunSettings, Tracker
from mtl_lora_cli.recipe.training import ValidationSettings
from mtl_lora_cli.runs.folder import RunFolder
from mtl_lora_cli.training import trackers
from mtl_lora_cli.training.prepare import prepare
from mtl_lora_cli.training.prepared import Prepared
from mtl_lora_cli.training.run import start


def _with(prepared: Prepared, path: Path, *names: str) -> RunFolder:
    recipe = prepared.recipe
    own = recipe.model_copy(update={"run": RunSettings.model_validate({"trackers": list(names)})})
    return start(replace(prepared, recipe=own), path)


@pytest.mark.slow
def test_tensorboard_holds_every_number_of_the_metrics(recipe_file: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    prepared = prepare(load_recipe(recipe_file, ["training.validation.every=3"]))
    assert prepared.recipe.training.validation == ValidationSettings(every=3)
    run = _with(prepared, tmp_path / "told", "tensorboard")
    found = EventAccumulator(str(run.path / trackers.FOLDER))
    found.Reload()
    wanted: dict[str, list[tuple[int, float]]] = {}
    for event in run.events():
        kind = "train" if event["event"] == "step" else "validation"
        for key, value in event.items():
            if isinstance(value, dict):
                for task, own in value.items():
                    if not isinstance(own, int | float):
                        continue
                    wanted.setdefault(f"{kind}/{key}/{task}", []).append((event["step"], own))
            elif key not in ("event", "step"):
                wanted.setdefault(f"{kind}/{key}", []).append((event["step"], value))
    assert {"train/loss", "train/task_loss/rte", "validation/loss/sst2"} <= set(wanted)
    assert {"validation/metric/sst2", "validation/macro/metric"} <= set(wanted)
    assert set(found.Tags()["scalars"]) == set(wanted)
    for name, values in wanted.items():
        seen = [(one.step, one.value) for one in found.Scalars(name)]
        assert [step for step, _ in seen] == [step for step, _ in values]
        assert [v for _, v in seen] == pytest.approx([v for _, v in values], rel=1e-6)


def test_the_trackers_are_those_of_accelerate() -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert set(get_args(Tracker)) == set(map(str, LOGGER_TYPE_TO_CLASS))


def test_mlflow_is_told_of_recipe_and_steps(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tracker that has no lines of its own here, where it is installed."""
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    run = _with(prepare(load_recipe(recipe_file)), tmp_path / "told", "mlflow")
    (found,) = mlflow.search_runs(experiment_names=["mtl-lora"], output_format="list")
    last = [event for event in run.events() if event["event"] == "step"][-1]
    assert found.data.metrics["train/loss"] == pytest.approx(last["loss"])
    assert found.data.params["adapter.rank"] == "4"
    assert found.info.run_name == "told"


def test_a_tracker_that_is_not_installed_is_refused_before_any_work(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"wandb is not installed; get it with: pip install wandb"):
        prepare(load_recipe(recipe_file, ["run.trackers=[wandb]"]))


def test_weights_and_biases_without_a_network(prepared: Prepared, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from mtl_lora_cli.recipe.load import load_recipe\n"
        "from mtl_lora_cli.training.prepare import prepare\n"
        "from mtl_lora_cli.training.run import start\n"
        "start(prepare(load_recipe(Path(sys.argv[1]))), Path(sys.argv[2]))\n"
    )
    recipe = tmp_path / "recipe.yaml"
    from mtl_lora_cli.recipe.load import dump_recipe

    own = prepared.recipe.model_copy(
        update={"run": RunSettings.model_validate({"trackers": ["wandb"]})}
    )
    recipe.write_text(dump_recipe(own))
    subprocess.run(
        [sys.executable, "-c", code, str(recipe), str(tmp_path / "told")],
        check=True,
        env=os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"},
    )
    assert list((tmp_path / "told" / "wandb").glob("offline-run-*/*.wandb"))
