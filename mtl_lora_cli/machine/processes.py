"""The processes of one run: who they are, how they agree, and what they say.

They are started by `launch.py` or by somebody else: torchrun, accelerate, deepspeed, Slurm. A run of
one process needs no group, and none is made unless ZeRO asks for one.
"""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed.rendezvous import rendezvous

from mtl_lora_cli.errors import ExitCode, MtlLoraError, UsageError
from mtl_lora_cli.machine.heartbeat import AT_ONCE, Heartbeat

T = TypeVar("T")
_COLLECTIVE = timedelta(minutes=30)  # a dead process is noticed by its heartbeat, not by this
_RENDEZVOUS = timedelta(minutes=5)


class Elsewhere(MtlLoraError):
    """This process ends as the others do; one of them says why."""

    def __init__(self, exit_code: ExitCode) -> None:
        super().__init__("")
        self.exit_code = exit_code

    @property
    def lines(self) -> list[str]:
        return []


class Interrupted(KeyboardInterrupt):
    """The user asked to stop; the run was saved."""


@dataclass(frozen=True)
class Place:
    """Which of how many processes this one is.

    Attributes:
        rank, count: over all hosts.
        local_rank: on this host; the number of its card.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0


def place_in(environment: Mapping[str, str]) -> Place:
    """Read from what a launcher sets: RANK, WORLD_SIZE and LOCAL_RANK, or Slurm's variables.

    Raises:
        UsageError: a variable is no number, or some of them are missing.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    in_a_step = "SLURM_STEP_ID" in environment and environment.get("SLURM_NTASKS", "1") != "1"
    if "RANK" not in environment and in_a_step:
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    if names[0] not in environment:
        return Place()
    try:
        return Place(*(int(environment[name]) for name in names))
    except KeyError as error:
        raise UsageError(f"{names[0]} is set, but {error.args[0]} is not") from None
    except ValueError:
        found = ", ".join(f"{name}={environment[name]}" for name in names)
        raise UsageError(f"expected whole numbers, received {found}") from None


def slurm_address(environment: Mapping[str, str]) -> tuple[str, str]:
    """Host and port at which the processes of a Slurm step meet.

    The first host of the node list, `gpu[03-05,9]` → `gpu03`; a port that follows from the job's
    number, so that two jobs on one host do not meet.
    """
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    found = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
    host = "".join(part or "" for part in found.groups()) if found else "127.0.0.1"
    return host, str(20000 + int(environment.get("SLURM_JOB_ID", "0")) % 20000)


class Processes:
    """This process among those of its run."""

    def __init__(self, place: Place | None = None, heartbeat: Heartbeat | None = None) -> None:
        place = place or Place()
        self.rank, self.count, self.local_rank = place.rank, place.count, place.local_rank
        self._heartbeat = heartbeat

    @classmethod
    def of_group(cls) -> Processes:
        """This process's place in torch.distributed's default group, alone where there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        return cls(Place(dist.get_rank(), dist.get_world_size(), local_rank))

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def sum_(self, values: Tensor) -> Tensor:
        """Σ over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def same(self, value: T) -> T:
        """The first process's value, on all."""
        if self.count == 1:
            return value
        found = [value]
        dist.broadcast_object_list(found, src=0, device=torch.device("cpu"))
        return found[0]

    def gather(self, value: T) -> list[T]:
        """Everybody's values in the order of ranks, on all."""
        if self.count == 1:
            return [value]
        found: list[T | None] = [None] * self.count
        with torch.device("cpu"):
            dist.all_gather_object(found, value, group=_objects())
        return cast(list[T], found)

    def share(self, costs: Sequence[int]) -> list[int]:
        """The numbers of what this process does: dealt out one by one, the costliest first."""
        return sorted(range(len(costs)), key=lambda i: (-costs[i], i))[self.rank :: self.count]

    def collect(self, own: Mapping[int, T]) -> list[T]:
        """What all processes found, in the order of its numbers, on all.

        Args:
            own: number → what this process found; numpy arrays and lists, which can be sent.
        """
        every = {number: one for part in self.gather(dict(own)) for number, one in part.items()}
        return [every[number] for number in range(len(every))]

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            dist.barrier(group=_objects())

    @contextmanager
    def one_after_another(self) -> Iterator[None]:
        """The first process of each host before its others: it fills a cache, they read it."""
        if self.count > 1 and self.local_rank:
            self.wait()
        try:
            yield
        finally:
            if self.count > 1 and not self.local_rank:
                self.wait()

    def mine(self, values: list[T]) -> list[T]:
        """Every `count`-th of them, from this process's rank on."""
        return values[self.rank :: self.count]

    def told(self, ending: str) -> bool:
        """Whether another process says the same."""
        if self._heartbeat is None:
            return False
        self._heartbeat.say(ending)
        return self._heartbeat.said_by_a_lower(ending)

    def explain(self, error: BaseException) -> MtlLoraError | None:
        """The error behind a collective that failed: a process that is gone, by its name."""
        words = ("gloo", "NCCL", "Connection", "Broken pipe")
        collective = isinstance(error, dist.DistError) or (
            isinstance(error, RuntimeError) and any(word in str(error) for word in words)
        )
        if self._heartbeat is None or not collective:
            return None
        # A launcher that has seen the same asks this process to end, too: not before it has said why.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        gone = self._heartbeat.who_is_gone()
        if gone is None:
            return None
        return MtlLoraError(f"{gone}; the run stops here: its last checkpoint is intact")

    def close(self, ending: str) -> None:
        """Tell the others how this process ends, and leave the group."""
        if self._heartbeat is not None:
            self._heartbeat.stop(ending)
        if dist.is_initialized():
            dist.destroy_process_group()


ALONE = Processes()
_object_group: dist.ProcessGroup | None = None


def _objects() -> dist.ProcessGroup | None:
    """A group that speaks over the network, not between cards: for objects and for waiting."""
    return _object_group


def join() -> Processes:
    """Find the other processes of this run, if there are any.

    Raises:
        UsageError: the environment is incomplete, or this host has too few cards.
        MtlLoraError: the others do not turn up.
    """
    global _object_group
    place = place_in(os.environ)
    if torch.cuda.is_available():
        cards = torch.cuda.device_count()
        if place.local_rank >= cards:
            raise UsageError(
                f"process {place.local_rank + 1} of this host finds no card of its own: "
                f"{socket.gethostname()} has {cards}; start one process for each card"
            )
        torch.cuda.set_device(place.local_rank)
    if place.count == 1:
        return Processes(place)
    if "RANK" not in os.environ:
        host, port = slurm_address(os.environ)
        os.environ.setdefault("MASTER_ADDR", host)
        os.environ.setdefault("MASTER_PORT", port)
    # What every library below reads, whoever started this process.
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(place.rank), str(place.count)
    os.environ["LOCAL_RANK"] = str(place.local_rank)
    _start_group(place)
    _object_group = dist.new_group(backend="gloo", timeout=_COLLECTIVE)
    heartbeat = Heartbeat(place.rank, place.count, socket.gethostname())
    return Processes(place, heartbeat)


def _start_group(place: Place) -> None:
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store, rank, count = next(rendezvous("env://", timeout=_RENDEZVOUS))
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=count, timeout=_COLLECTIVE
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MtlLoraError(
            f"process {place.rank + 1} of {place.count}: the others were not found at {where}: "
            f"{reason}"
        ) from None


def require_group(processes: Processes) -> None:
    """A group of one for libraries that insist on it."""
    os.environ.setdefault("LOCAL_RANK", str(processes.local_rank))
    if not dist.is_initialized():
        os.environ.setdefault("RANK", "0")
        os.environ.setdefault("WORLD_SIZE", "1")
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes of this run; a failure is told once, not by each of them.

    Raises:
        Elsewhere: another process tells why this one ends.
    """
    processes = join()
    ending = "failed: it left without a word"
    try:
        yield processes
        ending = "done"
    except Interrupted:
        ending = "interrupted"
        if not processes.main:
            raise Elsewhere(ExitCode.INTERRUPTED) from None
        raise
    except KeyboardInterrupt:
        ending = AT_ONCE
        if processes.told(ending):
            raise Elsewhere(ExitCode.INTERRUPTED) from None
        raise
    except MtlLoraError as error:
        ending = _ending(error)
        if processes.told(ending):
            raise Elsewhere(error.exit_code) from None
        raise
    except Exception as error:
        found = processes.explain(error)
        if found is None:
            ending = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if processes.told(ending):
                raise Elsewhere(ExitCode.FAILED) from None
            raise
        ending = _ending(found)
        if processes.told(ending):
            raise Elsewhere(found.exit_code) from None
        raise found from error
    finally:
        processes.close(ending)


def _ending(error: MtlLoraError) -> str:
    return "failed: " + " | ".join(error.lines)
