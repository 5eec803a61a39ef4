"""Torch's threads on a CPU that others use, too.

A thread of torch's pool that waits for another one spins. Where a neighbour holds a core, ours spin through their
own time slices and then wait themselves: two threads take many times as long as one. So between passes it is looked
at how long threads were ready and did not run; where that is much, some are given back, and one is taken again
once a core has been idle.

Sums over another number of threads may be formed in another order. `MTL_LORA_THREADS=fixed` keeps their number, and
so does a system that does not say how long threads wait (`/proc/self/task/*/schedstat`, of Linux).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

MUCH = 0.15  # of the threads' time: so long they waited for a core
PAUSE = 30.0  # seconds until a thread is taken again; twice as long after each time in vain
_LONGEST_PAUSE = 480.0
_IDLE = 0.8  # cores that were idle while nobody waited: there is room for one thread more
_OFTEN = 0.25  # seconds between two looks: reading costs some 0.2 ms
_TASKS = Path("/proc/self/task")
_CORES = Path("/proc/stat")


@dataclass(frozen=True)
class Seen:
    """What the system says, counted from some beginning.

    Attributes:
        at: seconds.
        waited: seconds that each thread was ready and did not run.
        idle: seconds that the cores which this process may use were idle, all together; None where that is not told.
    """

    at: float
    waited: Mapping[int, float]
    idle: float | None


class Yielding:
    """How many threads to go on with: what is seen decides.

    Args:
        most: threads that there are.
        began: what was seen at the beginning.

    Attributes:
        count: threads to go on with.
        fewest: there ever were.
    """

    def __init__(self, most: int, began: Seen) -> None:
        self.most = self.count = self.fewest = most
        self._last, self._changed, self._taken = began, began.at, False
        self._pause = PAUSE

    def after(self, seen: Seen) -> int:
        """The number of threads after what has happened since the last time."""
        last, self._last = self._last, seen
        wall = max(seen.at - last.at, 1e-9)
        waited = sum(max(0.0, v - last.waited.get(k, 0.0)) for k, v in seen.waited.items())
        share = waited / (self.count * wall)
        if share > MUCH and self.count > 1:
            self._give(max(1, int(share * self.count)), seen.at)
        elif self.count < self.most and share <= MUCH and self._may_take(last, seen):
            self._set(self.count + 1, seen.at, taken=True)
        return self.count

    def _give(self, some: int, now: float) -> None:
        in_vain = self._taken and now - self._changed < self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE) if in_vain else PAUSE
        self._set(max(1, self.count - some), now, taken=False)

    def _may_take(self, last: Seen, seen: Seen) -> bool:
        if seen.at - self._changed < self._pause:
            return False
        if seen.idle is None or last.idle is None:
            return True
        return seen.idle - last.idle >= _IDLE * (seen.at - last.at)

    def _set(self, count: int, now: float, *, taken: bool) -> None:
        self.count, self._changed, self._taken = count, now, taken
        self.fewest = min(self.fewest, count)


_state: Yielding | None = None  # of this process
_next = 0.0


def look(device: torch.device) -> None:
    """Between two passes, in the thread that runs them: give threads back, or take one again. Cheap enough for each.

    Args:
        device: where the model is; beside a card nothing is changed.
    """
    global _state, _next
    now = time.monotonic()
    if device.type != "cpu" or now < _next:
        return
    _next = now + _OFTEN
    count = torch.get_num_threads()
    if _state is None or _state.count != count:  # the first time, or somebody else has set it
        if count == 1 or os.environ.get("MTL_LORA_THREADS") == "fixed" or not _told():
            return
        _state = Yielding(count, _seen() if _state is not None else Seen(_began(), {}, None))
    wanted = _state.after(_seen())
    if wanted != count:
        torch.set_num_threads(wanted)


def note() -> str | None:
    """A line for the end of a run that has given threads back; else nothing."""
    if _state is None or _state.fewest == _state.most:
        return None
    return (
        f"others used the cores, too: torch went on with {_state.fewest} of {_state.most} threads for a while, which "
        "is faster then (MTL_LORA_THREADS=fixed keeps all)"
    )


def _told() -> bool:
    return (_TASKS / str(os.getpid()) / "schedstat").is_file()


def _seen() -> Seen:
    return Seen(time.clock_gettime(time.CLOCK_BOOTTIME), _waited(), _idle())


def _waited() -> dict[int, float]:
    """Of threads that compute: Python's others, which decode pictures, are not torch's."""
    here = threading.get_native_id()
    others = {one.native_id for one in threading.enumerate()} - {here}
    found: dict[int, float] = {}
    for task in _TASKS.iterdir():
        if int(task.name) in others:
            continue
        try:
            found[int(task.name)] = int((task / "schedstat").read_text().split()[1]) / 1e9
        except OSError:
            continue  # ended meanwhile
    return found


def _idle() -> float | None:
    try:
        lines = _CORES.read_text().splitlines()
        own = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        rows = [line.split() for line in lines]
        ticks = sum(int(row[4]) for row in rows if row and row[0] in own)
    except (OSError, ValueError, IndexError):
        return None
    return ticks / os.sysconf("SC_CLK_TCK")


def _began() -> float:
    """When this process was started, on the same clock."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")
