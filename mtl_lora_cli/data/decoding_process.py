"""A process that decodes pictures: see `decoding.py`, which starts it.

    python -m mtl_lora_cli.data.decoding_process DESCRIPTOR

DESCRIPTOR is that of a connection: first what decodes comes through it, then a request at a time, with a descriptor
of memory that is new; of each its number goes back when all its pictures are there, and an error. When it closes, whoever
asked is done, or gone.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle

import torch

from mtl_lora_cli.data.decoding import Fill, Place
from mtl_lora_cli.errors import MtlLoraError
from mtl_lora_cli.machine.cores import DECODING_THREADS


class Decoder:
    """Decodes for the process at the other end.

    Args:
        connection: to it.
        fill: decodes one picture.
    """

    def __init__(self, connection: Connection, fill: Fill) -> None:
        self._connection, self._fill = connection, fill
        self._threads = ThreadPoolExecutor(DECODING_THREADS, thread_name_prefix="pictures")
        self._memory: dict[int, torch.Tensor] = {}
        self._speaking = threading.Lock()

    def serve(self) -> None:
        """Until nobody is at the other end."""
        self._say(0, None)
        while True:
            number, name, size, moment, places = self._connection.recv()
            memory = self._memory_of(name, size)
            self._begin(number, memory, moment, places)

    def _memory_of(self, name: int, size: int) -> torch.Tensor:
        """What the other process calls by its descriptor there; the first time it sends it."""
        if name not in self._memory:
            descriptor = recv_handle(self._connection)
            self._memory[name] = torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
            os.close(descriptor)
        return self._memory[name]

    def _begin(
        self, number: int, memory: torch.Tensor, moment: Place, places: Sequence[Place]
    ) -> None:
        left, errors = len(places), []

        def ended(one: Future[None]) -> None:
            nonlocal left
            with self._speaking:
                left -= 1
                errors.append(one.exception())
                last = left == 0
            if last:
                self._say(number, next((e for e in errors if e is not None), None))

        for at, place in enumerate(places):
            one = self._threads.submit(self._fill, memory, len(places), at, moment, place)
            one.add_done_callback(ended)

    def _say(self, number: int, error: BaseException | None) -> None:
        try:
            answer = pickle.dumps((number, error))
        except Exception:  # an error of others that cannot travel
            answer = pickle.dumps((number, MtlLoraError(str(error))))
        with self._speaking, contextlib.suppress(OSError):
            self._connection.send_bytes(answer)


def main() -> None:
    """Decode until there is nobody to decode for."""
    connection = Connection(int(sys.argv[1]))
    fill = pickle.loads(connection.recv_bytes())
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, OSError):
        Decoder(connection, fill).serve()
    os._exit(0)  # threads may be at work: for nobody


if __name__ == "__main__":
    main()
