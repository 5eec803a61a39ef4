"""Work beside the rest: adapters' own gradients, which no other layer waits for, on a stream of their own.

Of a small model they are many short launches, each of which leaves most of a card idle. In a captured pass they run beside
the layers before, whose gradients do not need them. What they compute is the same, in the same order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

_MOST = 8  # works whose inputs are held: of about two layers


class Aside:
    """A second stream.

    Args:
        device: a card.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        # Their memory must not be given to others before the work is done.
        self._held: deque[tuple[torch.cuda.Event, Any]] = deque()

    @contextmanager
    def work(self, read: Any) -> Iterator[None]:
        """Inside the block launches go beside what follows.

        Args:
            read: holds all that they read; nobody may write there.
        """
        main = torch.cuda.current_stream()
        self._stream.wait_stream(main)
        done = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            yield
            done.record()
        self._held.append((done, read))
        if len(self._held) > _MOST:
            main.wait_event(self._held.popleft()[0])

    def join(self) -> None:
        """What follows comes after all of it."""
        torch.cuda.current_stream().wait_stream(self._stream)
        self._held.clear()


_open: Aside | None = None


@contextmanager
def opened(aside: Aside | None) -> Iterator[None]:
    """Inside the block `work` goes there; None: it goes where everything goes."""
    global _open
    before, _open = _open, aside
    try:
        yield
    finally:
        _open = before


def work(read: Any) -> AbstractContextManager[None]:
    """See `Aside.work`."""
    return nullcontext() if _open is None else _open.work(read)


def join() -> None:
    """See `Aside.join`."""
    if _open is not None:
        _open.join()


class _Joined(torch.autograd.Function):
    """The same tensors, whose gradients may be made aside."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(one.view_as(one) for one in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        join()
        return gradients


def joined(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """The same, whose gradients are waited for before anybody else reads them."""
    own = [one for one in tensors if one is not None and one.requires_grad]
    if _open is None or not own:
        return tensors
    found = iter(_Joined.apply(*own))
    return [next(found) if one is not None and one.requires_grad else one for one in tensors]
