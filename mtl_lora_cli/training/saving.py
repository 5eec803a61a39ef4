"""Checkpoints copied at once and written while the next steps run.

A step is held up for as long as its state is copied. A thread brings the copies to main memory, beside the
card's own work, and writes them as `checkpoints.write_checkpoint` does: whole or not at all. One is written at
a time; what keeps one from being written ends the run before its next step.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mtl_lora_cli.adapters.files import AdapterState
from mtl_lora_cli.training.checkpoints import Position, Snapshot, write_checkpoint

_SHARE = 0.25  # of a card's free memory, which copies may take for the time that they are written


class Saver:
    """Writes the checkpoints of one run.

    Args:
        folder: the run's `checkpoints`.
        keep: so many of them stay.
        device: where the adapter is.
    """

    def __init__(self, folder: Path, keep: int, device: torch.device) -> None:
        self._folder, self._keep, self._device = folder, keep, device
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(
        self,
        position: Position,
        adapter: AdapterState,
        moments: Mapping[str, Tensor],
        states: Sequence[Mapping[str, Tensor]],
    ) -> None:
        """Copy a state, and begin to write it; one that is being written yet is waited for.

        Args:
            position, adapter, moments, states: as of `Snapshot`; tensors may be those that the next step changes.

        Raises:
            OSError: the one before could not be written, or whatever else kept it from that.
        """
        self.wait()
        room = _has_room(self._device, [*adapter.tensors.values(), *moments.values()])
        snapshot = Snapshot(
            copy.deepcopy(position),
            replace(adapter, tensors=_copies(adapter.tensors, room)),
            _copies(moments, room),
            states,
        )
        copied = torch.cuda.current_stream(self._device).record_event() if room else None
        self._thread = threading.Thread(
            target=self._write, args=(snapshot, copied), name="checkpoint", daemon=True
        )
        self._thread.start()

    def check(self) -> None:
        """Say that one could not be written, as soon as that is known.

        Raises:
            OSError: as `wait`.
        """
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Until the last one is whole.

        Raises:
            OSError: it could not be written, or whatever else kept it from that.
        """
        self.join()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def join(self) -> None:
        """Until the last one is whole, or is not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @contextmanager
    def open(self) -> Iterator[None]:
        """Whatever ends the block, what was begun inside is written when it is left.

        Raises:
            OSError: as `wait`, where the block ended well.
        """
        try:
            yield
        except BaseException:
            self.join()
            raise
        self.wait()

    def _write(self, snapshot: Snapshot, copied: torch.cuda.Event | None) -> None:
        try:
            if copied is not None:
                snapshot = _brought(snapshot, copied, self._device)
            self._folder.mkdir(exist_ok=True)
            write_checkpoint(self._folder, snapshot, self._keep)
        except BaseException as error:
            self._failure = error


def _has_room(device: torch.device, tensors: Sequence[Tensor]) -> bool:
    """Whether a card takes copies beside all that it holds."""
    if device.type != "cuda":
        return False
    size = sum(one.numel() * one.element_size() for one in tensors if one.is_cuda)
    return size <= _SHARE * torch.cuda.mem_get_info(device)[0]


def _copies(tensors: Mapping[str, Tensor], room: bool) -> dict[str, Tensor]:
    """Copies on the card, where it has room for them, else in main memory."""
    return {
        name: one.detach().cpu() if one.is_cuda and not room else one.detach().clone()
        for name, one in tensors.items()
    }


def _brought(snapshot: Snapshot, copied: torch.cuda.Event, device: torch.device) -> Snapshot:
    """The same in main memory: a stream of its own waits for the copies, and for no step behind them."""
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        stream.wait_event(copied)
        tensors = {name: one.cpu() for name, one in snapshot.adapter.tensors.items()}
        moments = {name: one.cpu() for name, one in snapshot.moments.items()}
    return replace(snapshot, adapter=replace(snapshot.adapter, tensors=tensors), moments=moments)
