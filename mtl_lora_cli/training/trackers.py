"""Who else is told of every step: TensorBoard and Weights & Biases, through accelerate's trackers."""

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


def require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not installed, before any work is done.

    Raises:
        UsageError: with the command that installs the first of them.
    """
    for name in names:
        if find_spec(name) is None:
            raise UsageError(
                f"run.trackers: {name} is not installed; get it with: pip install {name}"
            )


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
        from accelerate.tracking import TensorBoardTracker, WandBTracker

        PartialState(cpu=not torch.cuda.is_available())  # their loggers insist on it
        for name in settings.trackers:
            if name == "tensorboard":
                tracker: Any = TensorBoardTracker(FOLDER, logging_dir=run.path)
                tracker.start()
            else:
                tracker = WandBTracker(
                    settings.project, name=run.name, id=run.name, resume="allow", dir=run.path
                )
                tracker.start()
                tracker.store_init_configuration(dict(recipe))
            self._trackers.append(tracker)

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
