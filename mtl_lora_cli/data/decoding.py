"""A process of its own that decodes pictures for steps on a card.

Threads that decode ask for Python's lock again and again; so does whoever launches the kernels of a step, thousands
of them. In a process of their own the threads have a lock of their own. What they decode they write into memory that
both processes see and the card reads by itself; nobody copies it. `decoding_process.py` is the other side.
"""

from __future__ import annotations

import mmap
import os
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import send_handle
from typing import Any

import torch

from mtl_lora_cli.errors import MtlLoraError

Place = tuple[int, int]
# Decodes the picture at a place into memory: of a room for so many, as the so manieth, at a moment.
Fill = Callable[[torch.Tensor, int, int, Place, Place], None]

_GONE = (
    "the process that decodes pictures ended; often memory did not suffice: free some, and go on with "
    "mtl-lora train --resume"
)


class Block:
    """Memory of both processes, without a name: it goes when they go.

    Args:
        size: in bytes.

    Attributes:
        memory: uint8 [size].
        read: when the card has read what was last asked of it; None: nothing was.
        known: the other process sees it.

    Raises:
        OSError, RuntimeError: there is no such memory, or the card cannot read it by itself.
    """

    def __init__(self, size: int) -> None:
        self.fd = os.memfd_create("pictures")
        os.ftruncate(self.fd, size)
        self.memory = torch.frombuffer(mmap.mmap(self.fd, size), dtype=torch.uint8)
        self.read: Any = None
        self.known = False
        if torch.cuda.is_initialized():
            runtime = torch.cuda.cudart()
            code = runtime.cudaHostRegister(self.memory.data_ptr(), size, 0)
            torch.cuda.check_error(int(code))

    @property
    def free(self) -> bool:
        """Nobody will read what is in it."""
        return self.read is None or bool(self.read.query())


class Decoding:
    """See the module.

    Args:
        fill: a function that decodes a picture into memory, pickled.
    """

    def __init__(self, fill: bytes) -> None:
        ours, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mtl_lora_cli.data.decoding_process", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C is for this process, which ends that one
            )
        self._connection = ours
        self._asked: dict[int, Future[None]] = {0: Future()}
        self._ready, self._count, self._refused = self._asked[0], 0, False
        self._returned: list[Block] = []
        ours.send_bytes(fill)
        threading.Thread(target=_listen, args=(ours, self._asked), daemon=True).start()
        weakref.finalize(self, _end, self._process)

    @classmethod
    def of(cls, fill: Fill) -> Decoding | None:
        """None where what is to be called cannot go to another process."""
        try:
            return cls(pickle.dumps(fill))
        except (pickle.PicklingError, TypeError, AttributeError, OSError):
            return None

    @property
    def ready(self) -> bool:
        """The process has begun."""
        return self._ready.done() and self._ready.exception() is None

    def block(self, size: int) -> Block | None:
        """Memory of this size, or more; `lend` says whose it is from now on. None: threads decode."""
        if not self.ready or self._refused:
            return None
        for block in self._returned:
            if len(block.memory) >= size and block.free:
                self._returned.remove(block)
                return block
        try:
            return Block(size)
        except (OSError, RuntimeError):
            self._refused = True
            return None

    def lend(self, block: Block, whoever: object) -> None:
        """The block belongs to an object until nobody holds that any more."""
        weakref.finalize(whoever, self._returned.append, block)

    def ask(self, block: Block, moment: Place, places: Sequence[Place]) -> Future[None]:
        """Let pictures be decoded into a block."""
        self._count += 1
        answer = self._asked[self._count] = Future()
        try:
            self._connection.send((self._count, block.fd, len(block.memory), moment, places))
            if not block.known:
                send_handle(self._connection, block.fd, self._process.pid)
                block.known = True
        except OSError:
            _lost(self._asked)
        return answer


def possible() -> bool:
    """Whether steps are on a card, and there is memory without a name (on Linux)."""
    return torch.cuda.is_initialized() and hasattr(os, "memfd_create")


def _listen(connection: Connection, asked: dict[int, Future[None]]) -> None:
    """Take answers until the process is gone: which was asked for, and the error if there was one."""
    try:
        while True:
            number, error = connection.recv()
            answer = asked.pop(number)
            if error is None:
                answer.set_result(None)
            else:
                answer.set_exception(error)
    except (EOFError, OSError):
        _lost(asked)
        connection.close()


def _lost(asked: dict[int, Future[None]]) -> None:
    while asked:
        _, answer = asked.popitem()
        answer.set_exception(MtlLoraError(_GONE))


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
