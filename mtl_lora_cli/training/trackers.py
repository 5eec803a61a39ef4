"""Who else is told of every step: TensorBoard, Weights & Biases, MLflow, …, by accelerate's trackers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.recipe.schema import RunSettings
from mtl_lora_cli.runs.folder import RunFolder

FOLDER = "tensorboard"  # in the run folder
_PACKAGES = {"comet_ml": "comet-ml"}  # where it is not called as what is imported


def require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not installed, before any work is done.

    Raises:
        UsageError: with the command that installs the first of them.
    """
    for name in names:
        if find_spec(name) is None:
            raise UsageError(
                f"run.trackers: {name} is not installed; get it with: "
                f"pip install {_PACKAGES.get(name, name)}"
            )


def _started(name: str, project: str, run: RunFolder, recipe: Mapping[str, Any]) -> Any:
    """accelerate's tracker of that name, told of the recipe."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":
        tracker: Any = kind(FOLDER, logging_dir=run.path)
        tracker.start()
        return tracker
    own: dict[str, dict[str, Any]] = {  # how each calls a run
        "wandb": {"name": run.name, "id": run.name, "resume": "allow", "dir": run.path},
        "mlflow": {"run_name": run.name},
        "clearml": {"task_name": run.name},
        "swanlab": {"experiment_name": run.name},
        "trackio": {"name": run.name},
        "dvclive": {"dir": str(run.path / "dvclive")},
        "aim": {"logging_dir": run.path},
    }
    tracker = kind(project, **own.get(name, {}))
    tracker.start()
    tracker.store_init_configuration(dict(recipe) if name == "wandb" else dict(_flat(recipe)))
    return tracker


def _flat(recipe: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str | int | float]]:
    """`training.seed` → its value; lists as texts."""
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        elif isinstance(value, str | int | float):
            yield f"{above}{key}", value
        elif value is not None:
            yield f"{above}{key}", str(value)[:400]


class Trackers:
    """The trackers of one run.

    Args:
        settings: the recipe's `run`.
        run: its folder; TensorBoard's files lie in it.
        recipe: the resolved recipe, filed with the run.
    """

    def __init__(self, settings: RunSettings, run: RunFolder, recipe: Mapping[str, Any]) -> None:
        self._trackers: list[Any] = []
        if not settings.trackers:
            return
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())  # their loggers insist on it
        for name in settings.trackers:
            self._trackers.append(_started(name, settings.project, run, recipe))

    def tell(self, event: Mapping[str, Any]) -> None:
        """The numbers of one event of metrics.jsonl; those of a task under `{name}/{task}`."""
        values = dict(_numbers(event))
        for tracker in self._trackers:
            tracker.log(values, step=event["step"])

    def close(self) -> None:
        """Write down what is not written yet."""
        for tracker in self._trackers:
            tracker.finish()


@contextmanager
def tracked(settings: RunSettings, run: RunFolder, recipe: Mapping[str, Any]) -> Iterator[Trackers]:
    """The trackers of one run, closed at its end, however it ends."""
    trackers = Trackers(settings, run, recipe)
    try:
        yield trackers
    finally:
        trackers.close()


def _numbers(event: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """A step's loss is `train/loss`, that of held-out examples `validation/loss/TASK`."""
    kind = "train" if event["event"] == "step" else event["event"]
    for key, value in event.items():
        if key in ("event", "step"):
            continue
        if isinstance(value, Mapping):
            for name, own in value.items():
                if isinstance(own, int | float):
                    yield f"{kind}/{key}/{name}", own
        elif isinstance(value, int | float):
            yield f"{kind}/{key}", value
