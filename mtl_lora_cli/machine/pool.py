"""Work on many pieces in all cores of the machine, the results in order."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from mtl_lora_cli.errors import MtlLoraError
from mtl_lora_cli.machine.launch import end_with_parent

T = TypeVar("T")
_MOST = 16  # processes: one more reads and writes for them all
_AHEAD = 2  # pieces a process that are begun before they are asked for
_work: Callable[[int, int], Any]


def cores() -> int:
    """Of this machine, as far as this process may use them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_pieces(
    work: Callable[[int, int], T], count: int, size: int, processes: int | None = None
) -> Iterator[T]:
    """`work(first, last)` for one piece of 0 … count after another.

    With several processes they are forks of this one: what `work` holds costs them no memory and is not sent;
    its results are. They end with this process, however it ends.

    Args:
        work: gives what can be pickled, and raises errors that can.
        count: of all that is to be done.
        size: of a piece.
        processes: 1: this one does it all; None: one a core.

    Yields:
        The results, in order.

    Raises:
        MtlLoraError: a process was killed.
    """
    bounds = [(first, min(first + size, count)) for first in range(0, count, size)]
    wanted = min(processes or cores(), _MOST, len(bounds))
    if wanted <= 1 or "fork" not in multiprocessing.get_all_start_methods():
        for first, last in bounds:
            yield work(first, last)
        return
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(wanted, context, initializer=_begin, initargs=(work,))
    begun: deque[Future[T]] = deque()
    try:
        for bound in bounds:
            begun.append(pool.submit(_do, *bound))
            if len(begun) > wanted * _AHEAD:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    except BrokenProcessPool:
        raise MtlLoraError(
            "a process that worked for this one was killed; was there too little memory?"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(work: Callable[[int, int], Any]) -> None:
    global _work
    end_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told, and ends this one
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each has a core of its own
    gc.disable()
    _work = work


def _do(first: int, last: int) -> Any:
    return _work(first, last)
