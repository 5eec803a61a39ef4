"""The processes that do the jobs of a comparison: this one, or several of its own, side by side.

Each of several has a card, or some of the CPU's threads, and takes the next job when it is free. One
that dies takes only its job with it: another one is started in its place.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from types import FrameType
from typing import Protocol

import torch

from mtl_lora_cli.compare.study import Study
from mtl_lora_cli.compare.work import Job, JobOutcome, Work
from mtl_lora_cli.machine.cards import SHARING
from mtl_lora_cli.machine.launch import end_with_parent

LOGS = "jobs"  # folder of what each process printed


class WorkerProcesses(Protocol):
    """Who does the jobs.

    Attributes:
        count: how many jobs at a time.
    """

    count: int

    def each(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, JobOutcome]]:
        """The jobs as they end."""
        ...

    def busy(self) -> list[str]:
        """Names of the jobs that are being done."""
        ...


@contextmanager
def processes_for(study: Study, work: Work, count: int) -> Iterator[WorkerProcesses]:
    """Who does so many jobs at a time.

    Args:
        study: the plan.
        work: does a job in this process, where one at a time is enough.
        count: how many at a time.
    """
    if count < 2:
        yield Here(work)
        return
    workers = Workers(study, count)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield workers
    finally:
        workers.close()
        signal.signal(signal.SIGTERM, before)


class Here:
    """This process, one job after the other."""

    count = 1

    def __init__(self, work: Work) -> None:
        self._work = work
        self._busy: list[str] = []

    def each(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, JobOutcome]]:
        """The jobs as they end."""
        for job in jobs:
            self._busy = [job.name]
            outcome = self._work.attempt(job)
            self._busy = []
            yield job, outcome

    def busy(self) -> list[str]:
        """Names of the jobs that are being done."""
        return self._busy


@dataclass
class _Worker:
    """A process of our own.

    Attributes:
        process, connection: itself, and how it is spoken to.
        log: what it printed.
        job: what it is doing.
    """

    process: subprocess.Popen[bytes]
    connection: Connection
    log: Path
    job: Job | None = None

    @property
    def alive(self) -> bool:
        return self.process.poll() is None


class Workers:
    """Several processes, each on its own card where there are enough.

    Args:
        study: the plan; its folder is there.
        count: how many processes.
    """

    def __init__(self, study: Study, count: int) -> None:
        self.count = count
        self._study = study
        self._environments = environments(count)
        self._workers: dict[int, _Worker] = {}

    def each(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, JobOutcome]]:
        """The jobs as they end."""
        left = deque(jobs)
        for _ in range(min(self.count, len(left))):
            self._give(left.popleft())
        while working := {w.connection: w for w in self._workers.values() if w.job is not None}:
            for connection in wait(list(working)):
                worker = working[connection]  # type: ignore[index]
                job, outcome = worker.job, self._heard(worker)
                assert job is not None
                worker.job = None
                if left:
                    self._give(left.popleft())
                yield job, outcome

    def busy(self) -> list[str]:
        """Names of the jobs that are being done."""
        return [worker.job.name for worker in self._workers.values() if worker.job is not None]

    def close(self) -> None:
        """End all: those that are training save their last step first; a second Ctrl-C waits for none."""
        workers = self._workers.values()
        try:
            for worker in workers:
                if worker.job is not None:
                    worker.process.send_signal(signal.SIGINT)
                worker.connection.close()
            for worker in workers:
                worker.process.wait()
        finally:
            for worker in workers:
                if worker.alive:
                    worker.process.kill()

    def _give(self, job: Job) -> None:
        """To one that waits, or to a new one."""
        waiting = [one for one in self._workers.values() if one.job is None and one.alive]
        worker = waiting[0] if waiting else self._start()
        worker.job = job
        with contextlib.suppress(OSError):  # it has died just now, which is heard
            worker.connection.send(job)

    def _start(self) -> _Worker:
        """A new process, in the place of one that is gone where there was one."""
        places = range(self.count)
        number = next(n for n in places if n not in self._workers or self._workers[n].job is None)
        log = self._study.folder / LOGS / f"{number + 1}.log"
        log.parent.mkdir(exist_ok=True)
        ours, theirs = Pipe()
        with theirs, log.open("a") as printed:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "mtl_lora_cli.compare.worker_process",
                    str(theirs.fileno()),
                ],
                env=os.environ | self._environments[number],
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
                pass_fds=(theirs.fileno(),),
                # A terminal sends Ctrl-C to a whole session: here it comes through this process.
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        with contextlib.suppress(OSError):
            ours.send((self._study, sys.argv))
        worker = self._workers[number] = _Worker(process, ours, log)
        return worker

    def _heard(self, worker: _Worker) -> JobOutcome:
        """What it says of its job, or what can be said of a process that is gone."""
        try:
            outcome: JobOutcome = worker.connection.recv()
            return outcome
        except (EOFError, OSError):
            code = worker.process.wait()
        if code == -signal.SIGKILL:
            how = "was ended by SIGKILL, as the system does when memory runs out"
        else:
            how = (
                f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended: code {code}"
            )
        return JobOutcome(f"its process {how}; {worker.log} has what it printed", failed=True)


def environments(count: int) -> list[dict[str, str]]:
    """What differs for each of so many processes: its card, its threads, and who shares them.

    Card i mod C of the C cards that this process may use; they are not touched here. Without a card
    all share the CPU.
    """
    cards = _cards()
    threads = str(max(1, torch.get_num_threads() // count))
    found = []
    for number in range(count):
        own = {"OMP_NUM_THREADS": threads, "TQDM_DISABLE": "1", SHARING: str(count)}
        if cards:
            place = number % len(cards)
            own["CUDA_VISIBLE_DEVICES"] = cards[place]
            own[SHARING] = str(len(range(place, count, len(cards))))
        found.append(own)
    return found


def _cards() -> list[str]:
    """Names of the cards that this process may use, as CUDA_VISIBLE_DEVICES has them."""
    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(n) for n in range(count)] if given is None else given.split(",")[:count]


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
