"""Which task each activation belongs to, shared by all adapted layers of a model.

Nothing here knows what an activation means: task ids are given for the leading axes of a tensor
and hold for every position of the axes that follow them, up to the features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from mtl_lora_cli.kernels.backend import moved
from mtl_lora_cli.kernels.runs import Runs, runs_of

BASE_ONLY = -1  # the id of activations that get the base model alone
_KEPT = 16  # assignments of windows, whose slots are kept

# Beside the tasks' ids 0 … T − 1 there may be one more, T: of activations that get what all tasks share,
# and of no task's own part.


@dataclass(frozen=True)
class Slots:
    """The routing of one flattened activation.

    Attributes:
        present: [P] int64, the distinct task ids that occur, ascending, without `BASE_ONLY`.
        index: [N] int32, for each position the place of its task in `present`, −1 for `BASE_ONLY`.
        active: [N, 1] bool, False where the base model alone counts; None if no position is such.
        all_tasks: `present` holds every task there is, so that nothing has to be picked out.
        shared: the last of `present` is the id of what all tasks share.
        streams: the positions are as many equal pieces, each of another of `present`, in their order;
            0 where they are not.
        make_runs: gives `runs`; None: nobody knows them.
    """

    present: Tensor
    index: Tensor
    active: Tensor | None
    all_tasks: bool = False
    shared: bool = False
    streams: int = 0
    make_runs: Callable[[], Runs] | None = None

    @cached_property
    def runs(self) -> Runs | None:
        """Where the positions of each slot stand, on the device; None: not known."""
        return None if self.make_runs is None else self.make_runs()

    @property
    def tasks(self) -> Tensor:
        """`present` without the id of what all tasks share."""
        return self.present[:-1] if self.shared else self.present

    @property
    def count(self) -> int:
        """P, the number of ids present."""
        return int(self.present.shape[0])

    @property
    def wanted(self) -> Tensor | None:
        """`present`, or None for all tasks."""
        return None if self.all_tasks else self.present


@dataclass
class _Assignment:
    ids: Tensor  # int64 on the CPU, so that finding the tasks present never waits for a device
    shared: int | None = None  # the id of what all tasks share
    windows: bool = False
    cache: dict[tuple[torch.Size, torch.device], Slots] = field(default_factory=dict)


class Routing:
    """Task ids for the activations that are passing through the model.

    Example:
        with routing.assign(ids):        # ids: [rows, tokens] or [rows]
            loss = model(x)
            loss.backward()              # recomputation reads the same ids

    Args:
        tasks: T, the number of tasks; ids lie in [-1, T).
        shared: T itself is an id, too: of what all tasks share.
    """

    def __init__(self, tasks: int, *, shared: bool = False) -> None:
        if tasks < 1:
            raise ValueError(f"expected at least one task, received {tasks}")
        self.tasks = tasks
        self.shared = tasks if shared else None
        self._current: _Assignment | None = None
        self._kept: dict[bytes, _Assignment] = {}

    @contextmanager
    def assign(self, ids: Tensor | Sequence[int], *, windows: bool = False) -> Iterator[None]:
        """Route by `ids` inside the block; blocks may be nested. Keep `backward()` inside, too.

        Args:
            ids: integers, shape = the leading axes of the activations ([rows, tokens], [rows], …).
                They are brought to the CPU, so ids already there cost no wait.
            windows: the model may cut each of [rows] into as many windows, which then lead an activation
                row by row: [rows · windows, …]; or take as many neighbours of one id together.

        Raises:
            ValueError: an id below -1 or not below T, or ids that are not integers.
        """
        tensor = torch.as_tensor(ids).detach().cpu()
        if tensor.is_floating_point() or tensor.dtype == torch.bool:
            raise ValueError(f"task ids must be integers, received {tensor.dtype}")
        tensor = tensor.to(torch.long, copy=True)  # later changes of `ids` must not reach us
        if tensor.numel():
            low, high = int(tensor.min()), int(tensor.max())
            if low < BASE_ONLY or high >= self.tasks + (self.shared is not None):
                raise ValueError(
                    f"task ids must lie in [-1, {self.tasks}), received {low} to {high}"
                )
        assignment = self._of_windows(tensor) if windows else _Assignment(tensor, self.shared)
        previous, self._current = self._current, assignment
        try:
            yield
        finally:
            self._current = previous

    def _of_windows(self, ids: Tensor) -> _Assignment:
        """The assignment that the same ids had before, where there was one: step for step pictures have the same
        streams, and to bring slots to a card once more would wait for all that it is busy with."""
        key = ids.numpy().tobytes()
        found = self._kept.pop(key, None) or _Assignment(ids, self.shared, windows=True)
        self._kept[key] = found  # the latest is last
        if len(self._kept) > _KEPT:
            self._kept.pop(next(iter(self._kept)))
        return found

    @contextmanager
    def select(self, index: Tensor) -> Iterator[None]:
        """Inside the block only the positions `index` of the flattened activations are left.

        Args:
            index: [S] int64, places in the flattened ids of the block around.

        Raises:
            ValueError: there is no block around, or an index lies outside its ids.
        """
        ids = self._require().ids.reshape(-1)
        index = index.detach().cpu()
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < ids.numel():
            raise ValueError(
                f"index {int(index.min())} to {int(index.max())} does not fit {ids.numel()} task ids"
            )
        with self.assign(ids[index]):
            yield

    def recomputed(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """`context_fn` of torch's checkpointing: what is computed again has the ids of the first time."""
        return nullcontext(), self._again(self._current)

    @contextmanager
    def _again(self, assignment: _Assignment | None) -> Iterator[None]:
        previous, self._current = self._current, assignment
        try:
            yield
        finally:
            self._current = previous

    def slots(self, shape: torch.Size, device: torch.device) -> Slots:
        """The routing of an activation of shape [*shape, features], flattened to N positions.

        Raises:
            ValueError: no ids are assigned, or their shape does not lead `shape`.
        """
        current = self._require()
        key = (shape, device)
        if key not in current.cache:
            ids = _windowed(current.ids, shape) if current.windows else current.ids
            with torch.inference_mode(False):  # they may be kept for a pass that learns
                current.cache[key] = _slots(ids, shape, device, current.shared)
        return current.cache[key]

    def _require(self) -> _Assignment:
        if self._current is None:
            raise ValueError(
                "no task ids are assigned; call the model inside `routing.assign(ids)`"
            )
        return self._current


def slots_of(ids: Tensor, device: torch.device) -> Slots:
    """The routing of positions whose ids are given one by one."""
    return _slots(ids, ids.shape, device)


def _slots(
    ids: Tensor, shape: torch.Size, device: torch.device, shared: int | None = None
) -> Slots:
    present, place = torch.unique(ids, return_inverse=True)
    active, streams = None, _pieces(place, len(present))
    if present.numel() and present[0] == BASE_ONLY:
        active = _led(moved(ids != BASE_ONLY, device), shape).unsqueeze(1)
        present, place, streams = present[1:], place - 1, 0
    return Slots(
        moved(present, device),
        # One id of all positions is one number, expanded; kernels read N of them.
        _led(moved(place.to(torch.int32), device), shape).contiguous(),
        active,
        shared=shared is not None and present.numel() > 0 and int(present[-1]) == shared,
        streams=streams,
        make_runs=partial(_runs, place, shape, len(present), device),
    )


def _runs(place: Tensor, shape: torch.Size, count: int, device: torch.device) -> Runs:
    found = runs_of(_led(place.to(torch.int32), shape).contiguous(), count)
    return Runs(*(moved(one, device) for one in found))


def _pieces(place: Tensor, count: int) -> int:
    """P where ids are P equal runs in rising order, else 0."""
    if place.ndim != 1 or not count or len(place) % count:
        return 0
    runs = torch.arange(count).repeat_interleave(len(place) // count)
    return count if torch.equal(place, runs) else 0


def _windowed(ids: Tensor, shape: torch.Size) -> Tensor:
    """Ids [rows] for activations of [rows · windows, …]: the windows of a row stand one after another.

    Or of [rows / k, …]: so many neighbours, all of one id, became one.
    """
    led = [side for side in shape if side != 1] or [1]
    if ids.ndim == 1 and len(ids) and len(ids) > led[0] and not len(ids) % led[0]:
        together = ids.view(led[0], -1)
        return together[:, 0] if bool((together == together[:, :1]).all()) else ids
    if ids.ndim != 1 or not shape or not len(ids) or shape[0] % len(ids):
        return ids
    return ids.repeat_interleave(shape[0] // len(ids))


def _led(ids: Tensor, shape: torch.Size) -> Tensor:
    """What ids say of each position of an activation, flattened: [N].

    Model code reshapes what it hands to a layer. The same positions in the same order are accepted
    flattened, and behind leading axes of length 1.
    """
    if ids.shape == shape[: ids.ndim]:
        return ids.reshape(ids.shape + (1,) * (len(shape) - ids.ndim)).expand(shape).reshape(-1)
    bare_ids, bare_shape = _without_leading_ones(ids.shape), _without_leading_ones(shape)
    if bare_ids == bare_shape[: len(bare_ids)] and (bare_ids or not bare_shape):
        return _led(ids.reshape(bare_ids), torch.Size(bare_shape))
    if ids.ndim > 1 and shape and shape[0] == ids.numel() > 1:
        return _led(ids.reshape(-1), shape)
    raise ValueError(
        f"task ids of shape {tuple(ids.shape)} do not lead activations of shape {tuple(shape)}"
    )


def _without_leading_ones(shape: Sequence[int]) -> tuple[int, ...]:
    own = list(shape)
    while own and own[0] == 1:
        own.pop(0)
    return tuple(own)
