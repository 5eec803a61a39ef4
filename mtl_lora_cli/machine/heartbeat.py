"""How the processes of a run learn that one of them is gone.

A collective waits for a process that will never come, for many minutes and without a name. So each
process tells a store that all can reach that it is alive, and reads it of the others. Where one falls
silent, or has said that it failed, the others end within a minute, and say which it was.
"""

from __future__ import annotations

import os
import threading
import time
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from mtl_lora_cli.errors import ExitCode
from mtl_lora_cli.visible import tell

_EVERY = 1.0  # seconds between two signs of life
_SILENT = 30.0  # seconds after which a process counts as gone
_SUSPECT = 6.0  # the same once a collective has failed: less than a launcher waits before it kills
_GRACE = 5.0  # seconds that the program has to notice by itself, before it is ended
_PREFIX = "mtl-lora"
AT_ONCE = "failed: interrupted"  # the ending of a process whose user did not want to wait


class Heartbeat:
    """See the module. The process group must stand.

    Args:
        rank, count: of this process and of all.
        host: this process's.
    """

    def __init__(self, rank: int, count: int, host: str) -> None:
        self._rank, self._count = rank, count
        self._store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=20),
        )
        self._beats = 0
        self._store.set(self._key("host"), f"{host}, process id {os.getpid()}")
        self._store.set(self._key("beat"), "0")
        self._store.set(self._key("end"), "")
        dist.barrier()  # from here on everybody's keys are there
        self._hosts = [self._store.get(self._key("host", r)).decode() for r in range(count)]
        self._gone: str | None = None
        self._found = threading.Event()
        self._handled = False
        self._said = ""
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _key(self, what: str, rank: int | None = None) -> str:
        return f"{_PREFIX}/{what}/{self._rank if rank is None else rank}"

    def _read(self, what: str) -> list[str]:
        with self._lock:
            keys = [self._key(what, rank) for rank in range(self._count)]
            return [value.decode() for value in self._store.multi_get(keys)]

    def say(self, ending: str) -> None:
        """Tell the others how this process ends."""
        self._said = ending
        try:
            with self._lock:
                self._store.set(self._key("end"), ending)
        except dist.DistError:
            pass  # whoever kept the store is gone: nobody is left to tell

    def _watch(self) -> None:
        seen = [(0, time.monotonic())] * self._count
        while not self._over.wait(_EVERY):
            try:
                self._beats += 1
                with self._lock:
                    self._store.set(self._key("beat"), str(self._beats))
                beats, ends = self._read("beat"), self._read("end")
            except (dist.DistError, RuntimeError):
                if not self._over.is_set():
                    self._end(f"{self._name(0)} is gone")
                return
            now = time.monotonic()
            for rank, (beat, end) in enumerate(zip(beats, ends, strict=True)):
                if rank == self._rank or end in ("done", "interrupted"):
                    continue
                if int(beat) != seen[rank][0]:
                    seen[rank] = (int(beat), now)
                if end == AT_ONCE and not self._said:
                    self._leave()
                if end:
                    self._end(f"{self._name(rank)} {end}")
                    return
                if now - seen[rank][1] > (_SUSPECT if self._handled else _SILENT):
                    self._end(f"{self._name(rank)} is gone")
                    return

    def _leave(self) -> None:
        """At once, as another process does; the first one speaks for all."""
        self.say(AT_ONCE)
        if self._rank == 0:
            tell("error: interrupted")
        os._exit(ExitCode.INTERRUPTED)

    def _name(self, rank: int) -> str:
        return f"process {rank + 1} of {self._count} (on {self._hosts[rank]})"

    def _end(self, reason: str) -> None:
        """End this process, unless the program does so itself."""
        self._gone = reason
        self._found.set()
        if self._over.wait(_GRACE) or self._handled:
            return
        self.say(f"failed: {reason}")
        if not self.said_by_a_lower(f"failed: {reason}", wait=2.0):
            text = f"error: {reason}; the run stops here: its last checkpoint is intact"
            tell(text)
        os._exit(1)

    def who_is_gone(self) -> str | None:
        """Which process is gone, by its name and host, once that is certain; None if none is."""
        self._handled = True
        self._found.wait(_SILENT + 2 * _EVERY)
        return self._gone

    def said_by_a_lower(self, ending: str, wait: float = 15.0) -> bool:
        """Whether a process of lower rank ends with the same words, and so has said them."""
        until = time.monotonic() + wait
        while self._rank and time.monotonic() < until:
            try:
                if ending in self._read("end")[: self._rank]:
                    return True
            except (dist.DistError, RuntimeError):
                return False
            time.sleep(0.1)
        return False

    def stop(self, ending: str) -> None:
        """The end of this process; all leave together, so that each has heard the others."""
        self.say(ending)
        until = time.monotonic() + _GRACE
        while time.monotonic() < until:
            try:
                if all(self._read("end")):
                    break
            except (dist.DistError, RuntimeError):
                break
            time.sleep(0.1)
        self._over.set()
