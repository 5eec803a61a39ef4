"""A process of its own that decodes pictures for steps on a card.

Threads that decode ask for Python's lock again and again; so does whoever launches the kernels of a step, thousands
of them. In a process of their own the threads have a lock of their own. What they decode they write into memory that
both processes see and the card reads by itself; nobody copies it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import signal
import sys
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

THREADS = max(2, min(16, os.cpu_count() or 2))  # most of decoding happens outside of Python's lock
_PARENT_DIED = 1  # PR_SET_PDEATHSIG
_PAGE = 4096

Fill = Callable[
    [torch.Tensor, tuple[int, int], Sequence[tuple[int, int]], ThreadPoolExecutor], None
]


class Block:
    """Memory of both processes, without a name: it goes when they go.

    Args:
        size: in bytes.

    Attributes:
        memory: uint8 [size].
        read: when the card has read what was last asked of it; None: nothing was.
    """

    def __init__(self, size: int) -> None:
        self.fd = os.memfd_create("pictures")
        os.ftruncate(self.fd, size)
        self.memory = torch.frombuffer(mmap.mmap(self.fd, size), dtype=torch.uint8)
        self.read: Any = None
        if torch.cuda.is_initialized():
            runtime = torch.cuda.cudart()
            runtime.cudaHostRegister(self.memory.data_ptr(), size, 0)

    @property
    def free(self) -> bool:
        """Nobody will read what is in it."""
        return self.read is None or bool(self.read.query())


class Decoding:
    """See the module.

    Args:
        fill: decodes pictures into memory, pickled.
    """

    def __init__(self, fill: bytes) -> None:
        self._pool = ProcessPoolExecutor(
            1, mp_context=get_context("spawn"), initializer=_begin, initargs=(fill, os.getpid())
        )
        self._first = Block(_PAGE)
        self._tried = self._pool.submit(_seen_at, self._first.fd, _PAGE)
        self._returned: list[Block] = []

    @property
    def ready(self) -> bool:
        """The process is there, and sees memory of this one; until then, or where it never does, threads decode."""
        return self._tried.done() and self._tried.exception() is None

    @classmethod
    def of(cls, fill: Fill) -> Decoding | None:
        """None where what is to be called cannot go to another process."""
        try:
            return cls(pickle.dumps(fill))
        except (pickle.PicklingError, TypeError, AttributeError):
            return None

    def block(self, size: int) -> Block:
        """Memory of this size, or more; `give_back` takes it."""
        for block in self._returned:
            if len(block.memory) >= size and block.free:
                self._returned.remove(block)
                return block
        return Block(size)

    def lend(self, block: Block, whoever: object) -> None:
        """The block belongs to an object until nobody holds that any more."""
        weakref.finalize(whoever, self._returned.append, block)

    def ask(
        self, block: Block, moment: tuple[int, int], places: Sequence[tuple[int, int]]
    ) -> Future[None]:
        """Let pictures be decoded into a block, one after the other."""
        return self._pool.submit(_filled, block.fd, len(block.memory), moment, tuple(places))


def possible() -> bool:
    """Whether steps are on a card, and there is memory without a name (on Linux)."""
    return torch.cuda.is_initialized() and hasattr(os, "memfd_create")


# In the other process.

_fill: Fill
_parent: int
_threads: ThreadPoolExecutor
_seen: dict[int, torch.Tensor] = {}


def _begin(fill: bytes, parent: int) -> None:
    global _fill, _parent, _threads
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever is interrupted ends this process, too
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DIED, signal.SIGKILL)
    _fill, _parent = pickle.loads(fill), parent
    _threads = ThreadPoolExecutor(THREADS, thread_name_prefix="pictures")


def _filled(fd: int, size: int, moment: tuple[int, int], places: Sequence[tuple[int, int]]) -> None:
    _fill(_memory_at(fd, size), moment, places, _threads)


def _memory_at(fd: int, size: int) -> torch.Tensor:
    """The other process's memory."""
    if fd not in _seen or len(_seen[fd]) != size:
        with open(f"/proc/{_parent}/fd/{fd}", "r+b") as file:  # noqa: PTH123 - it is no path of a file
            _seen[fd] = torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8)
    return _seen[fd]


def _seen_at(fd: int, size: int) -> None:
    """Nothing but a trial."""
    _memory_at(fd, size)
