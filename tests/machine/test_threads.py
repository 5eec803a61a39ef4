"""Threads are given back where threads wait for a core, and taken again where one is idle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from mtl_lora_cli.machine.threads import PAUSE, Seen, Yielding

# Two threads, both of a pool that works, on one core: half of their time they wait.
ON_ONE_CORE = """
import json, os, time
import torch
from mtl_lora_cli.machine import threads

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # of this thread, and of those that it makes
x, cpu, found = torch.randn(400, 400), torch.device("cpu"), []
for wanted in ("fixed", ""):
    os.environ["MTL_LORA_THREADS"] = wanted
    torch.set_num_threads(2)
    for _ in range(3):
        until = time.monotonic() + 0.26
        while time.monotonic() < until:
            x @ x
        threads.look(cpu)
    found.append([torch.get_num_threads(), threads.note()])
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="this system does not tell")
def test_two_threads_on_one_core_become_one_unless_they_are_fixed() -> None:
    around = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    call = [sys.executable, "-c", ON_ONE_CORE]
    done = subprocess.run(call, env=around, capture_output=True, text=True, check=True)
    fixed, (count, note) = json.loads(done.stdout)
    assert fixed == [2, None]
    assert count == 1
    assert "1 of 2 threads" in note


def told(rows: Sequence[tuple[float, float, float | None]], most: int) -> list[int]:
    """Counts after intervals of `seconds`, in each of which all threads together waited and cores were idle so long."""
    at = waited = idle = 0.0
    course, found = Yielding(most, Seen(at, {1: waited}, idle)), []
    for seconds, wait, cores in rows:
        at, waited, idle = at + seconds, waited + wait, idle + (cores or 0.0)
        found.append(course.after(Seen(at, {1: waited}, None if cores is None else idle)))
    return found


def test_nobody_waits() -> None:
    assert told([(1, 0.2, 0.0), (60, 5.0, 60.0)], most=2) == [2, 2]


def test_as_many_go_as_wait_and_never_the_last() -> None:
    rows = [(1, 8.0, 0.0), (1, 2.0, 0.0), (1, 1.0, 0.0), (1, 0.5, 0.0)]
    assert told(rows, most=16) == [8, 6, 5, 5]
    assert told([(1, 1.0, 0.0), (1, 1.0, 0.0)], most=2) == [1, 1]


def test_a_thread_is_taken_again_where_a_core_is_idle() -> None:
    gone, free, full = (1, 1.0, 0.0), (PAUSE, 0.0, PAUSE), (PAUSE, 0.0, 0.1 * PAUSE)
    assert told([gone, full, free], most=2) == [1, 1, 2]
    assert told([gone, (1, 0.0, 1.0)], most=2) == [1, 1]  # not at once
    assert told([gone, (PAUSE, 0.5 * PAUSE, PAUSE)], most=2) == [1, 1]  # the one that is left waits
    assert told([gone, (PAUSE, 0.0, None)], most=2) == [1, 2]  # nobody says whether there is room


def test_in_vain_is_tried_less_often() -> None:
    gone, free = (1, 1.0, 0.0), (PAUSE, 0.0, PAUSE)
    vain = [gone, free, gone, free, free, gone, *[free] * 4]
    assert told(vain, most=2) == [1, 2, 1, 1, 2, 1, 1, 1, 1, 2]
    kept_for_longer = [gone, free, free, free, gone, free]
    assert told(kept_for_longer, most=2) == [1, 2, 2, 2, 1, 2]


def test_threads_that_come_and_go_are_counted_once() -> None:
    course = Yielding(4, Seen(0.0, {1: 5.0, 2: 9.0}, None))
    assert course.after(Seen(1.0, {1: 5.1, 3: 0.1}, None)) == 4
    assert course.after(Seen(2.0, {1: 5.1, 3: 1.1}, None)) == 3
