"""Arrays that one process writes and another one reads where they lie."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtl_lora_cli.prediction.lent import Borrowed, Lent, New

FIRST = [np.arange(7), np.zeros((0, 3), np.int32), np.linspace(0, 1, 5, dtype=np.float32)]
LARGER = [np.arange(400_000).reshape(2, -1), np.asarray([[1, -1]], np.int8)]


def write(end: Any) -> None:
    memory = Lent(end, 0)
    for arrays in (FIRST, LARGER, FIRST):
        end.send((memory.fill(arrays), memory.size))
        end.recv()
    os.kill(os.getpid(), signal.SIGKILL)


def test_another_process_reads_what_was_written_last() -> None:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=write, args=(theirs,))
    process.start()
    theirs.close()
    assert isinstance(ours.recv(), New)
    memory = Borrowed(ours)
    kept = []
    for expected in (FIRST, LARGER, FIRST):
        found = memory.arrays(*ours.recv())
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
        kept.append(found)
        ours.send("read")
    process.join()
    memory.close()
    # Who has written it is gone, and so is the handle: what is read stays.
    np.testing.assert_array_equal(kept[-1][0], FIRST[0])


def test_a_lane_that_ends_lends_nothing() -> None:
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    with pytest.raises((EOFError, OSError)):
        Borrowed(ours)


def test_what_was_borrowed_is_given_back() -> None:
    ours, theirs = multiprocessing.Pipe()
    memory = Lent(theirs, 0)
    places = memory.fill(LARGER)
    assert isinstance(ours.recv(), New)
    before = len(list(Path("/proc/self/fd").iterdir()))
    borrowed = Borrowed(ours)
    borrowed.arrays(places, memory.size)
    borrowed.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
