"""Kill a training run again and again, and compare what it learns with a run that nobody touched.

    make soak        or        python tests/end_to_end/soak.py --kills 20 --seed 0

Each kill is a SIGKILL: no handler, no goodbye. Some come while a checkpoint is written, some while
the run is starting, the others between any two instructions of a step. Then the run goes on with
`--resume`, or begins again where it was killed before it had a folder. In the end the adapter must be
that of the uninterrupted run, bit for bit, and so must every line of the metrics but the clock's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Process = subprocess.Popen[bytes]

KINDS = ("checkpoint", "step", "step", "checkpoint", "start")  # in turns
CHECKPOINT_EVERY = 5
STEPS_A_KILL = 25  # a run is so long that it does not end before its last kill
START_SECONDS = 5.0
WRITE_SECONDS = 0.02  # about as long as a checkpoint is written
PATIENCE = 300.0


@dataclass(frozen=True)
class Kill:
    """One SIGKILL.

    Attributes:
        kind: what was waited for.
        seconds: since the process was started.
        step: the last one whose line was written; None before there was a folder.
        writing: whether a checkpoint was left unfinished.
    """

    kind: str
    seconds: float
    step: int | None
    writing: bool

    def __str__(self) -> str:
        where = "before there was a run folder" if self.step is None else f"after step {self.step}"
        writing = ", in a checkpoint write" if self.writing else ""
        return f"{self.seconds:6.2f} s, {where}{writing} ({self.kind})"


@dataclass(frozen=True)
class Verdict:
    """What became of the run.

    Attributes:
        kills: in their order.
        same_adapter: bit for bit that of the uninterrupted run.
        same_metrics: every step once, with the same values.
    """

    kills: list[Kill]
    same_adapter: bool
    same_metrics: bool

    @property
    def held(self) -> bool:
        return self.same_adapter and self.same_metrics

    def __str__(self) -> str:
        adapter = "bit-identical" if self.same_adapter else "ANOTHER ONE"
        metrics = "the same" if self.same_metrics else "OTHERS"
        writing = sum(kill.writing for kill in self.kills)
        return (
            f"{len(self.kills)} kills, {writing} of them in a checkpoint write: "
            f"the adapter is {adapter}, the metrics are {metrics}"
        )


class Soak:
    """Runs of one recipe in one folder.

    Args:
        folder: where all is written.
        data: the real data; see docs/real-data.md.
        stories: the tiny model.
        steps: of the run.
        seed: of the moments.
    """

    def __init__(self, folder: Path, data: Path, stories: Path, steps: int, seed: int) -> None:
        self.folder, self._random = folder, random.Random(seed)
        self._environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "MTL_LORA_CACHE": str(folder / "cache"),
        }
        self._recipe = folder / "soak.yaml"
        content = {
            "base_model": str(stories.resolve()),
            "adapter": {"rank": 4, "dropout": 0.1},  # random states have to come back, too
            "tasks": [
                {"name": name, "source": str((data / "glue" / name).resolve()), "template": name}
                | {"max_examples": 200}
                for name in ("rte", "cola", "sst2")
            ],
            "training": {
                "epochs": 100,
                "max_steps": steps,
                "learning_rate": 3e-3,
                "row_length": 128,
                "rows_per_step": 2,
                "on_overflow": "truncate_prompt",
                "checkpoint_every": CHECKPOINT_EVERY,
            },
            "run": {"directory": str(folder)},
        }
        self._recipe.write_text(yaml.safe_dump(content), encoding="utf-8")

    def uninterrupted(self) -> Path:
        """Train it to its end."""
        run = self.folder / "whole"
        self.finish(run)
        return run

    def finish(self, run: Path) -> None:
        """Begin a run or go on with it, and let it come to its end."""
        process = self._started(run)
        if process.wait(PATIENCE):
            raise RuntimeError((self.folder / "said.txt").read_text(encoding="utf-8"))

    def kill(self, run: Path, kind: str) -> Kill:
        """Begin a run or go on with it, and kill it."""
        before, left = _metrics_time(run), _unfinished(run)
        process = self._started(run)
        began = time.monotonic()
        wait = {"start": self._start, "step": self._step, "checkpoint": self._checkpoint}[kind]
        for _ in wait(run, before, process):
            if process.poll() is not None:
                said = (self.folder / "said.txt").read_text(encoding="utf-8")
                raise RuntimeError(f"it ended before it was killed: {said}")
            if time.monotonic() - began > PATIENCE:
                raise RuntimeError(f"no moment to kill it came in {PATIENCE:.0f} s")
        seconds = time.monotonic() - began
        process.kill()
        process.wait()
        return Kill(kind, seconds, _last_step(run), bool(_unfinished(run) - left))

    def _started(self, run: Path) -> Process:
        arguments = ["train", str(self._recipe), f"run.name={run.name}"]
        if (run / "recipe.yaml").is_file():
            arguments = ["train", "--resume", "--run", str(run)]
        with (self.folder / "said.txt").open("wb") as said:
            return subprocess.Popen(
                [sys.executable, "-m", "mtl_lora_cli.cli.main", *arguments],
                env=self._environment,
                stdout=said,
                stderr=said,
            )

    # Each of these yields for as long as the moment has not come.

    def _start(self, run: Path, before: int, process: Process) -> Iterator[None]:
        until = time.monotonic() + self._random.uniform(0, START_SECONDS)
        while time.monotonic() < until:
            yield
            time.sleep(0.001)

    def _step(self, run: Path, before: int, process: Process) -> Iterator[None]:
        more = self._random.randint(1, STEPS_A_KILL - CHECKPOINT_EVERY)
        part = self._random.uniform(0, 0.05)
        while _metrics_time(run) == before:  # lines of a lost future are still there
            yield
            time.sleep(0.001)
        wanted = (_last_step(run) or 0) + more
        while (_last_step(run) or 0) < wanted:
            yield
            time.sleep(0.001)
        time.sleep(part)

    def _checkpoint(self, run: Path, before: int, process: Process) -> Iterator[None]:
        """Some moment of a write: the process is halted, and set going again where it was too late."""
        part, old = self._random.uniform(0, WRITE_SECONDS), _unfinished(run)
        passed = self._random.randint(0, 2)
        while True:
            while not (new := _unfinished(run) - old):
                yield
                time.sleep(0.0005)
            old |= new
            if passed:
                passed -= 1
                continue
            time.sleep(part)
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            if _unfinished(run) & new:
                return
            process.send_signal(signal.SIGCONT)
            part /= 2


def _unfinished(run: Path) -> set[str]:
    """Checkpoints that are not under their name yet."""
    return {path.name for path in (run / "checkpoints").glob(".*.partial")}


def _metrics_time(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _last_step(run: Path) -> int | None:
    """Of the last whole line of the metrics; 0 where there is none, None where there is no run."""
    if not run.is_dir():
        return None
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def _steps(run: Path) -> list[dict[str, Any]]:
    """The lines of the metrics, without what the clock says."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    clock = ("seconds", "tokens_per_second")
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def soak(
    folder: Path,
    data: Path,
    stories: Path,
    *,
    kills: int,
    seed: int = 0,
    tell: Callable[[str], None] = print,
) -> Verdict:
    """Kill a run so many times, and compare its end with that of an uninterrupted one.

    Args:
        folder: an empty one.
        data, stories: where the real data and the tiny model lie.
        kills: how many.
        seed: of the moments.
        tell: is given a line for each kill.
    """
    steps = kills * STEPS_A_KILL + 2 * CHECKPOINT_EVERY
    runs = Soak(folder, data, stories, steps, seed)
    whole, run = runs.uninterrupted(), folder / "killed"
    found = []
    for number in range(kills):
        found.append(runs.kill(run, KINDS[number % len(KINDS)]))
        tell(f"kill {number + 1:2} of {kills}: {found[-1]}")
    runs.finish(run)
    parts = ("mtl_lora.safetensors", "mtl_lora_config.json")
    one, other = (
        [(path / "adapter" / name).read_bytes() for name in parts] for path in (whole, run)
    )
    return Verdict(found, same_adapter=one == other, same_metrics=_steps(whole) == _steps(run))


def main() -> int:
    """The script."""
    fixtures = Path(__file__).resolve().parents[1] / "fixtures"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    began = time.monotonic()
    verdict = soak(
        folder,
        fixtures / "data",
        fixtures / "model",
        kills=given.kills,
        seed=given.seed,
        tell=_tell,
    )
    print(f"{verdict}; {time.monotonic() - began:.0f} s")
    if not verdict.held:
        print(f"all files are in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


def _tell(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
