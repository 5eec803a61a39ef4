"""Streams of an image through a backbone: one that all tasks share, and one of each task.

The shared stream runs through the whole trunk with W + s B A. From the last block of each stage on there is one
more stream a task t,

    y_t = (W + s B A + s' B_t A_t) x_t

which its decoder reads; only the shared one enters the next stage. So task t is, exactly, the trunk with
W + s B A and a second copy of the last block of each stage with its own weights.
(Murtaza et al., MTLoRA, arXiv 2403.20320, adds s' B_t A_t x_t to W x of the shared stream, which no weight equals.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtl_lora_cli.adapters.routing import Routing


class Tap(nn.Module):
    """Keeps what the last block of a stage gives, of every stream that runs through the whole trunk.

    Args:
        block: of the model.

    Attributes:
        streams: [N, …] of the last pass.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.streams: Tensor | None = None

    def forward(self, x: Tensor, *arguments: Any, **named: Any) -> Any:
        found = self.block(x, *arguments, **named)
        self.streams = found[0] if isinstance(found, tuple) else found
        return found

    def taken(self) -> Tensor:
        """`streams`, which are let go."""
        streams, self.streams = self.streams, None
        assert streams is not None, "the trunk has run"
        return streams


class Fork(Tap):
    """A stage's last block, run once for all tasks and once for each, in one batch.

    Args:
        block: of the model.
        routing: of the adapter; it has an id of what all tasks share.
        last: nothing follows that reads the shared stream, so it is left out where there are tasks.

    Attributes:
        tasks: ids of the streams to run, rising.
        streams: [P · N, …], task by task, of the last pass.
    """

    def __init__(self, block: nn.Module, routing: Routing, *, last: bool) -> None:
        super().__init__(block)
        self._routing, self._last = routing, last
        self.tasks: Sequence[int] = ()

    def forward(self, x: Tensor, *arguments: Any, **named: Any) -> Any:
        assert self._routing.shared is not None, "an id of what all tasks share"
        ids = [*self.tasks]
        if not (self._last and ids):
            ids.append(self._routing.shared)
        pieces = torch.tensor(ids).repeat_interleave(len(x))
        with self._routing.assign(pieces, windows=True):
            found = self.block(x.repeat(len(ids), *[1] * (x.ndim - 1)), *arguments, **named)
        y, *rest = found if isinstance(found, tuple) else (found,)
        self.streams = y[: len(self.tasks) * len(x)]
        handed = y[len(y) - len(x) :]
        return (handed, *rest) if isinstance(found, tuple) else handed
