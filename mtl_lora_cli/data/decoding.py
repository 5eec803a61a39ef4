"""Processes of their own that decode pictures for steps on a card.

Threads that decode ask for Python's lock again and again, and so does whoever launches the kernels of a step, thousands
of them; threads also wait for each other wherever large memory is asked for. What processes decode they write into
memory that all see and the card reads by itself; nobody copies it. `decoding_process.py` is the other side.
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
from multiprocessing.connection import Connection, Pipe, wait
from multiprocessing.reduction import send_handle
from typing import Any, cast

import torch

from mtl_lora_cli.errors import MtlLoraError
from mtl_lora_cli.machine.cores import cores

Place = tuple[int, int]
# Decodes the picture at a place into memory: of a room for so many, as the so manieth, at a moment.
Fill = Callable[[torch.Tensor, int, int, Place, Place], None]

_MOST = 12  # processes
# Large memory is kept for the next picture: asking the system for it anew takes as long as decoding.
_KEEPING = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}
_GONE = (
    "a process that decodes pictures ended; often memory did not suffice: free some, and go on with "
    "mtl-lora train --resume"
)
Asked = dict[int, Future[None]]


class Block:
    """Memory of all processes, without a name: it goes when they go.

    Args:
        size: in bytes.

    Attributes:
        memory: uint8 [size].
        read: when the card has read what was last asked of it; None: nothing was.

    Raises:
        OSError, RuntimeError: there is no such memory, or the card cannot read it by itself.
    """

    def __init__(self, size: int) -> None:
        self.fd = os.memfd_create("pictures")
        os.ftruncate(self.fd, size)
        self.memory = torch.frombuffer(mmap.mmap(self.fd, size), dtype=torch.uint8)
        self.read: Any = None
        if torch.cuda.is_initialized():
            runtime = torch.cuda.cudart()
            code = runtime.cudaHostRegister(self.memory.data_ptr(), size, 0)
            torch.cuda.check_error(int(code))

    @property
    def free(self) -> bool:
        """Nobody will read what is in it."""
        return self.read is None or bool(self.read.query())


class _Worker:
    """A process, and how it is spoken to.

    Args:
        fill: a function that decodes a picture into memory, pickled.

    Attributes:
        process, connection: of it.
        known: descriptors here of memory that it sees.
    """

    def __init__(self, fill: bytes) -> None:
        self.connection, theirs = Pipe()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mtl_lora_cli.data.decoding_process", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                env=os.environ | _KEEPING | {"OMP_NUM_THREADS": "1"},
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C is for this process, which ends that one
            )
        self.known: set[int] = set()
        self.connection.send_bytes(fill)

    def ask(
        self, number: int, block: Block, moment: Place, count: int, places: list[tuple[int, Place]]
    ) -> None:
        """Let it decode some pictures of a block, each with its place there."""
        self.connection.send((number, block.fd, len(block.memory), moment, count, places))
        if block.fd not in self.known:
            send_handle(self.connection, block.fd, self.process.pid)
            self.known.add(block.fd)


class Decoding:
    """See the module.

    Args:
        fill: a function that decodes a picture into memory, pickled.
        count: of processes.
    """

    def __init__(self, fill: bytes, count: int) -> None:
        self._workers = [_Worker(fill) for _ in range(count)]
        self._asked: Asked = {-1 - place: Future() for place in range(count)}
        self._begun = list(self._asked.values())
        self._count, self._refused = 0, False
        self._returned: list[Block] = []
        connections = {one.connection: -1 - place for place, one in enumerate(self._workers)}
        threading.Thread(target=_listen, args=(connections, self._asked), daemon=True).start()
        weakref.finalize(self, _end, [one.process for one in self._workers])

    @classmethod
    def of(cls, fill: Fill) -> Decoding | None:
        """None where what is to be called cannot go to another process."""
        try:
            return cls(pickle.dumps(fill), decoders())
        except (pickle.PicklingError, TypeError, AttributeError, OSError):
            return None

    @property
    def ready(self) -> bool:
        """All processes have begun."""
        return all(one.done() and one.exception() is None for one in self._begun)

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

    def ask(self, block: Block, moment: Place, places: Sequence[Place]) -> list[Future[None]]:
        """Let pictures be decoded into a block, as many by each process; of each when it is there."""
        turns = len(self._workers)
        answers: list[Future[None]] = [Future() for _ in range(min(turns, len(places)))]
        for turn, answer in enumerate(answers):
            self._count += 1
            self._asked[self._count] = answer
            mine = list(enumerate(places))[turn::turns]
            try:
                # Whose turn it is goes round: few pictures a step are not always for the first.
                worker = self._workers[self._count % turns]
                worker.ask(self._count, block, moment, len(places), mine)
            except OSError:
                _lost(self._asked)
        return [answers[at % turns] for at in range(len(places))]


def possible() -> bool:
    """Whether steps are on a card, and there is memory without a name (on Linux)."""
    return torch.cuda.is_initialized() and hasattr(os, "memfd_create")


def decoders() -> int:
    """How many processes: a core each, of those that are this run's process's."""
    return max(1, min(_MOST, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))


def _listen(connections: dict[Connection, int], asked: Asked) -> None:
    """Take answers until a process is gone: which was asked for, and the error if there was one."""
    try:
        while True:
            for found in wait(list(connections)):
                connection = cast(Connection, found)
                number, error = connection.recv()
                # The first word of each is that it has begun.
                answer = asked.pop(connections[connection] if number is None else number)
                if error is None:
                    answer.set_result(None)
                else:
                    answer.set_exception(error)
    except (EOFError, OSError):
        for one in connections:  # first: who asks from now on hears it at once
            one.close()
        _lost(asked)


def _lost(asked: Asked) -> None:
    while asked:
        _, answer = asked.popitem()
        answer.set_exception(MtlLoraError(_GONE))


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
