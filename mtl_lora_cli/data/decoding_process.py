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
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import Any

import torch

from mtl_lora_cli.errors import MtlLoraError


def main() -> None:
    """Decode until there is nobody to decode for."""
    connection = Connection(int(sys.argv[1]))
    with contextlib.suppress(EOFError, OSError):
        fill = pickle.loads(connection.recv_bytes())
        torch.set_num_threads(1)
        connection.send((None, None))
        memory: dict[int, torch.Tensor] = {}
        while True:
            number, name, size, moment, count, places = connection.recv()
            if name not in memory:
                memory[name] = _received(connection, size)
            connection.send_bytes(_said(number, fill, memory[name], moment, count, places))


def _received(connection: Connection, size: int) -> torch.Tensor:
    """Memory of the other process, which sends its descriptor."""
    descriptor = recv_handle(connection)
    try:
        return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
    finally:
        os.close(descriptor)


def _said(
    number: int, fill: Any, memory: torch.Tensor, moment: Any, count: int, places: Any
) -> bytes:
    """Decode some pictures; what is to be said of it."""
    try:
        for at, place in places:
            fill(memory, count, at, moment, place)
    except Exception as error:
        try:
            return pickle.dumps((number, error))
        except Exception:  # one of others, that cannot travel
            return pickle.dumps((number, MtlLoraError(str(error))))
    return pickle.dumps((number, None))


if __name__ == "__main__":
    main()
