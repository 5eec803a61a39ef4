"""The port: all that training knows of a model and its data.

    loss = Σ_s w_{t(s)} ℓ_s / S

A unit s is what counts once: a supervised token, or one image's map of one task. t(s), its owner, is the
task whose it is. Mixture, loop, update, checkpoints, looks, ZeRO and diagnosis ask a host for no more than
the losses ℓ [S] of a batch and their owners [S]; text is one host (`packed.py`). A task's `objective` names
its host: a file of the user's own (`extensions` in a recipe) may declare another one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from traceback import extract_tb
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.errors import MtlLoraError, UsageError, did_you_mean
from mtl_lora_cli.extensions import origin, require_new
from mtl_lora_cli.machine.rate import Floor
from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.recipe.schema import Recipe
from mtl_lora_cli.tasks.template import TEXTS

if TYPE_CHECKING:
    from mtl_lora_cli.tasks.task import Task

Rows = Sequence[Sequence[tuple[int, int]]]  # of each row its places: task id, number of the example


class Batch(Protocol):
    """What one pass takes. On the CPU until it is moved; its owners stay there."""

    @property
    def owners(self) -> Tensor:
        """int64 [S], the task of each unit, example by example in the order of the rows."""

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""


class Dataset(Protocol):
    """Examples of each task, ready to be laid into rows."""

    @property
    def lengths(self) -> Sequence[np.ndarray]:
        """Of each task int [examples], how much of a row each example takes, at least 1."""

    def collate(self, rows: Rows) -> Batch:
        """One pass over these rows, on the CPU."""

    def units(self, rows: Rows) -> Tensor:
        """Units of each task in these rows, int64 [T]."""

    def size(self, rows: Rows) -> int:
        """Tokens, or whatever is read, in these rows: speed is told in it."""
        return sum(int(self.lengths[task][number]) for row in rows for task, number in row)


def row_length_of(dataset: Dataset, said: int) -> int:
    """What a row holds: `dataset.row_length` where rows are the dataset's own, else the recipe's."""
    return int(getattr(dataset, "row_length", said))


def at_step(dataset: Dataset, epoch: int, step: int) -> Dataset:
    """The examples as a step sees them: `dataset.at(epoch, step)`, where they are changed at random."""
    at = getattr(dataset, "at", None)
    found: Dataset = dataset if at is None else at(epoch, step)
    return found


def examples_of(dataset: Dataset) -> list[int]:
    """How many examples each task has: `dataset.examples`, where tasks have some in common."""
    return list(getattr(dataset, "examples", None) or map(len, dataset.lengths))


def examples_in(dataset: Dataset, rows: Rows) -> dict[int, int]:
    """How many of these rows' examples are of each task, by rising id; without tasks that have none."""
    if hasattr(dataset, "examples"):
        counts = enumerate(dataset.units(rows).tolist())
        return {task: count for task, count in counts if count}
    return dict(sorted(Counter(task for row in rows for task, _ in row).items()))


class Host(Protocol):
    """A frozen model with an adapter in it; a torch module."""

    @property
    def adapter(self) -> Adapter | None:
        """What is trained in it."""

    def routed(self, batch: Any) -> AbstractContextManager[None]:
        """Each activation goes its task's way inside; a pass is forward and backward together."""

    def losses(self, batch: Any) -> Tensor:
        """ℓ of each unit, float32 [S], in the order of the batch's owners."""

    def modules(self) -> Iterator[nn.Module]:
        """As of any torch module."""

    def train(self, mode: bool = True) -> Self:
        """As of any torch module: dropout is on."""

    def engine_report(self) -> dict[str, Any]:
        """What computes it, as environment.json keeps it; `line` says it in words."""

    def floor(self, cards: int) -> Floor | None:
        """What so many cards would take for its arithmetic alone; None where that is not known."""

    def notes(self) -> Sequence[str]:
        """What is good to know of it before it learns."""


@runtime_checkable
class Cuttable(Protocol):
    """A host whose frozen layers can be cut into parts (ZeRO stage 3): each is called once a pass, whatever
    the batch."""

    @property
    def adapter(self) -> Adapter | None:
        """As `Host`'s."""

    def losses(self, batch: Any) -> Tensor:
        """As `Host`'s."""

    def wrap_layers(self, wrapped: Callable[[nn.Module], nn.Module]) -> None:
        """Put into the place of each layer what wraps it, and is called instead."""


class ModuleHost(nn.Module):
    """A host of any torch module; who derives from it says `losses`, and `routed` where batches have no
    `task_ids`.

    The base is frozen, and so it drops nothing while the adapter learns: it stays in evaluation mode.

    Args:
        model: the base model with the adapter injected (`adapters.inject.inject`).
        adapter: what is trained in it.
    """

    def __init__(self, model: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.model = model
        self._adapter = adapter

    @property
    def adapter(self) -> Adapter:
        """See `Host`."""
        return self._adapter

    def train(self, mode: bool = True) -> Self:
        """The adapter's dropout is on."""
        super().train(False)
        self.training = mode
        for layer in self._adapter.layers.values():
            layer.training = mode
        return self

    def routed(self, batch: Any) -> AbstractContextManager[None]:
        """By `batch.task_ids`: int64 with the leading dimensions of the adapted layers' inputs, on the CPU."""
        return self._adapter.routing.assign(batch.task_ids)

    def losses(self, batch: Any) -> Tensor:
        """See `Host`."""
        raise NotImplementedError

    def engine_report(self) -> dict[str, Any]:
        """See `Host`."""
        return {"engine": "host", "line": f"host: {type(self).__name__}", "remarks": []}

    def floor(self, cards: int) -> Floor | None:
        """See `Host`."""
        return None

    def notes(self) -> Sequence[str]:
        """See `Host`."""
        return ()


class Objective(Protocol):
    """What is trained, from its data to its losses, where that is not text.

    It is made of a base model, a folder with config.json and safetensors, a recipe, and the tasks that are
    learned; templates of such tasks need no prompt.

    Attributes:
        beyond: keys of a recipe that are otherwise for text alone, and that it reads, too; it may be left out.
    """

    beyond: ClassVar[Sequence[str]]

    def __init__(self, base: BaseModel, recipe: Recipe, tasks: Sequence[Task]) -> None:
        """Read what is needed.

        Raises:
            UsageError: something is missing or wrong.
        """

    def dataset(self, split: str) -> Dataset | None:
        """The examples of `train` or `validation`; None where no task has such a split."""

    def host(self, device: torch.device, dtype: torch.dtype) -> Host:
        """The base model with a fresh adapter, frozen but for that; it may be a `ModuleHost`."""


OBJECTIVES: dict[str, type[Objective]] = {}
Declared = TypeVar("Declared", bound=type)


def objective(*names: str) -> Callable[[Declared], Declared]:
    """Declare what learns the tasks with these objectives: a class like `Objective`.

    Raises:
        UsageError: one of the names is taken.
    """

    def declare(kind: Declared) -> Declared:
        for name in names:
            if name in TEXTS:
                raise UsageError(f"an objective '{name}' is built in; choose another name")
            require_new("objective", name, OBJECTIVES.get(name))
            if not hasattr(kind, "beyond"):
                kind.beyond = ()  # type: ignore[attr-defined]
            OBJECTIVES[name] = kind
        return kind

    return declare


@contextmanager
def at_fault(kind: Any) -> Iterator[None]:
    """What a class of the user's own raises is told as its fault.

    Raises:
        UsageError: in the place of any other exception; file and line are named.
    """
    try:
        yield
    except (MtlLoraError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        where = origin(kind)
        lines = [one.lineno for one in extract_tb(error.__traceback__) if one.filename == where]
        place = f"{where}:{lines[-1]}" if lines else where
        raise UsageError(
            f"{place}: {kind.__name__} fails: {type(error).__name__}: {error}"
        ) from error


def require_losses(host: Any, losses: Tensor, count: int) -> None:
    """Refuse losses that are not one number a unit.

    Raises:
        UsageError: what was given, and what was expected.
    """
    if losses.shape != (count,):
        kind = type(host)
        raise UsageError(
            f"{origin(kind)}: {kind.__name__}.losses gives shape {list(losses.shape)}, expected [{count}]: "
            "one number for each owner of the batch"
        )


def objective_of(names: Mapping[str, str]) -> type[Objective] | None:
    """What learns all of these tasks; None: the text host.

    Args:
        names: task → its objective.

    Raises:
        UsageError: an objective is not known, or they are of two hosts, which no run mixes.
    """
    known = [*TEXTS, *OBJECTIVES]
    kinds: dict[type[Objective] | None, str] = {}
    for task, name in names.items():
        if name not in known:
            raise UsageError(
                f"task '{task}': unknown objective '{name}'{did_you_mean(name, known)}; known: "
                f"{', '.join(known)}; others come with a Python file that the recipe's extensions name"
            )
        kinds.setdefault(OBJECTIVES.get(name), task)
    if len(kinds) > 1:
        first, second, *_ = kinds.values()
        raise UsageError(
            f"tasks '{first}' ({names[first]}) and '{second}' ({names[second]}) are learned by different "
            "models; no run mixes them"
        )
    return next(iter(kinds), None)
