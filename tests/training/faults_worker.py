"""Faults of one process, one after the other: python faults_worker.py RECIPE FOLDER

Disks that are full or read-only are small file systems in memory, which a mount namespace of its own
may have: `unshare --map-root-user --mount python faults_worker.py …`. Each case leaves `NAME.json`:
the exit code, and the lines that a user sees.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from mtl_lora_cli.cli.app import app
from mtl_lora_cli.training.prepared import Prepared

PAGE = 4096  # the smallest piece of a file system in memory
STEPS = 12
CHECKPOINTS = (f"training.max_steps={STEPS}", "training.checkpoint_every=2")
SHORT_STEPS = ("training.max_steps=60", "training.rows_per_step=1", "training.row_length=32")
ENDLESS = ("training.epochs=100", "training.max_steps=6000", "training.checkpoint_every=4")
MIB = 2**20


class Faults:
    """The cases; `recipe` is of a run that would end well."""

    def __init__(self, recipe: Path, folder: Path) -> None:
        self.recipe, self.folder = str(recipe), folder

    def command(self, name: str, *arguments: str) -> None:
        """Run the command in this process, and note how it ended."""
        said = self.folder / f"{name}.txt"
        before = os.dup(2)
        code: object = 0
        with said.open("wb") as file:
            os.dup2(file.fileno(), 2)
            try:
                app(list(arguments), prog_name="mtl-lora")
            except SystemExit as leaving:
                code = leaving.code
            finally:
                os.dup2(before, 2)
                os.close(before)
        lines = said.read_text(encoding="utf-8").splitlines()
        note = {"code": code, "lines": lines}
        (self.folder / f"{name}.json").write_text(json.dumps(note), encoding="utf-8")

    def train(self, name: str, place: Path, *settings: str) -> None:
        where = (f"run.directory={place}", f"run.name={name}")
        self.command(name, "train", self.recipe, *where, *settings)

    def resume(self, name: str, run: Path) -> None:
        self.command(name, "train", "--resume", "--run", str(run))

    def out_of_memory(self) -> None:
        """So much address space and no more, from the moment when the model stands."""
        build = Prepared.build
        before = resource.getrlimit(resource.RLIMIT_AS)

        def limited(prepared: Prepared) -> object:
            built = build(prepared)
            limit = psutil.Process().memory_info().vms + 32 * MIB
            resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
            return built

        Prepared.build = limited  # type: ignore[assignment, method-assign]
        try:
            wide = ("training.row_length=512", "training.rows_per_step=32")
            self.train("memory", self.folder, *wide, "training.rows_per_pass=32")
        finally:
            Prepared.build = build  # type: ignore[method-assign]
            resource.setrlimit(resource.RLIMIT_AS, before)

    def signalled(self, name: str, *numbers: signal.Signals) -> None:
        """Signals to this process while it trains, as a user or a scheduler sends them."""
        metrics = self.folder / name / "metrics.jsonl"

        def send() -> None:
            while not metrics.is_file() or metrics.read_bytes().count(b"\n") < 6:
                time.sleep(0.005)
            for number in numbers:
                os.kill(os.getpid(), number)
                time.sleep(0.005)  # two at once are one

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        self.train(name, self.folder, *ENDLESS)

    def full_disk(self, whole: Path) -> None:
        """Room for two checkpoints and a half; then more room."""
        checkpoint = _pages(whole / "checkpoints" / "step-000002")
        small = self.folder / "small"
        grow = _mounted(small, _first_files(whole) + (5 * checkpoint) // 2 + 4 * PAGE)
        self.train("full", small, *CHECKPOINTS)
        shutil.copytree(small / "full", self.folder / "full-then")
        grow("size=64m")
        self.resume("full-resumed", small / "full")
        shutil.copytree(small / "full", self.folder / "full-after")

    def full_metrics(self, whole: Path) -> None:
        """Room for what a run begins with, and some lines; then more room."""
        small = self.folder / "smaller"
        grow = _mounted(small, _first_files(whole) + 2 * PAGE)
        never = "training.checkpoint_every=null"
        self.train("lines", small, *SHORT_STEPS, never)
        shutil.copytree(small / "lines", self.folder / "lines-then")
        grow("size=64m")
        self.resume("lines-resumed", small / "lines")
        shutil.copytree(small / "lines", self.folder / "lines-after")

    def read_only(self, whole: Path) -> None:
        """A run that was killed, on a disk that became read-only; and a new run there."""
        place = self.folder / "read-only"
        remount = _mounted(place, 64 * MIB)
        run = place / "run"
        shutil.copytree(whole, run)
        shutil.rmtree(run / "adapter")
        shutil.rmtree(run / "checkpoints" / f"step-{STEPS:06d}")
        remount("ro")
        self.resume("read-only-resumed", run)
        self.train("read-only-new", place, *CHECKPOINTS)


def _mounted(place: Path, size: int) -> Callable[[str], None]:
    """A file system in memory of so many bytes; gives what changes it."""
    place.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place))
    return lambda options: _mount("-o", f"remount,{options}", str(place))


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def _pages(folder: Path) -> int:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in files)


def _first_files(run: Path) -> int:
    """Of what a run folder begins with, and of `latest` beside it."""
    files = [run / "recipe.yaml", run / "tasks.json", run / "environment.json"]
    return PAGE + sum(-(-path.stat().st_size // PAGE) * PAGE for path in files)


def main(recipe: Path, folder: Path, namespace: bool) -> None:
    faults = Faults(recipe, folder)
    faults.train("whole", folder, *CHECKPOINTS)
    faults.signalled("terminated", signal.SIGTERM)
    faults.signalled("twice", signal.SIGTERM, signal.SIGINT)
    if namespace:
        faults.full_disk(folder / "whole")
        faults.full_metrics(folder / "whole")
        faults.read_only(folder / "whole")
    faults.out_of_memory()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), namespace=sys.argv[3] == "namespace")
