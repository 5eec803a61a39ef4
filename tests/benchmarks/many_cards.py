"""Four and eight cards: what each ZeRO stage gives on one host, and a run that goes on with fewer cards.

    python tests/benchmarks/many_cards.py results.jsonl --seconds 560

runs `zero.py` for one case after another, in an order in which what matters most comes first, and adds a line to
the file after each. A case whose line is there is left out, so a second call goes on where the first one stopped; one
that fails or takes too long is named, and the next one begins. Cases that need more cards than there are are left out.

The cases: the LLaMA-3-8B shape in NF4 and in bfloat16 at ZeRO stages 0, 2 and 3 on 8, 4, 2 and 1 cards, 16 rows of
8,192 a step, two a pass; a run of 8 cards that goes on with 4, 2 and 1; a 70B shape in NF4 at stage 3 on all
cards. Weights are random and made on the cards. `--shape` and `--rows` try it small.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ZERO = Path(__file__).with_name("zero.py")
LARGEST = "llama3-70b"


@dataclass(frozen=True)
class Case:
    """One call of `zero.py`: its options, and by how many cards."""

    cards: int
    stage: int
    shape: str
    quantization: str
    rows: tuple[int, int, int]  # row length, rows a step, rows a pass
    keeps: bool = False  # its checkpoint of the middle is gone on from
    begins: bool = False  # at that checkpoint

    def is_in(self, line: dict[str, object]) -> bool:
        said = (
            line["processes"],
            line["stage"],
            line["shape"],
            line["quantization"],
            tuple(line["rows"]),  # type: ignore[arg-type]
            bool(line.get("begins")),
        )
        own = (self.cards, self.stage, self.shape, self.quantization, self.rows, self.begins)
        return said == own

    def __str__(self) -> str:
        going = ", gone on with" if self.begins else ""
        return f"{self.shape} {self.quantization}, stage {self.stage}, {self.cards} cards{going}"


def cases(there: int, shape: str, rows: tuple[int, int, int]) -> Iterator[Case]:
    """What fits on so many cards, the most important first."""
    counts = [count for count in (8, 4, 2, 1) if count <= there]
    most = counts[0]
    for stage in (2, 3):
        for cards in (most, 1):
            yield Case(cards, stage, shape, "nf4", rows, keeps=stage == 2 and cards == most)
    for cards in counts[1:]:  # as many and fewer
        yield Case(cards, 2, shape, "nf4", rows, begins=True)
    if there >= 8:
        yield Case(most, 3, LARGEST, "nf4", (rows[0], most, 1))
    for quantization in ("nf4", "none"):
        for stage in (0, 2, 3):
            for cards in counts:
                yield Case(cards, stage, shape, quantization, rows)


def command(case: Case, checkpoints: Path, results: Path, steps: int) -> Sequence[str]:
    """The call of one case; torchrun even for one card, so that all take the same way."""
    row_length, rows_per_step, rows_per_pass = case.rows
    options: list[object] = ["--stage", case.stage, "--shape", case.shape]
    options += ["--quantization", case.quantization, "--row-length", row_length]
    options += ["--rows-per-step", rows_per_step, "--rows-per-pass", rows_per_pass]
    options += ["--steps", steps, "--out", results]
    if case.keeps:
        options += ["--keep", checkpoints]
    if case.begins:
        options += ["--from", min((checkpoints / "checkpoints").glob("step-*"))]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--nproc-per-node={case.cards}", str(ZERO), *map(str, options)]


def run(call: Sequence[str], seconds: float) -> str:
    """Call it; why it failed, with the end of what it said, or nothing."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(call, stdout=said, stderr=said, start_new_session=True)
        try:
            code = process.wait(timeout=seconds)
            why = f"ended with {code}" if code else ""
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # torchrun's processes, too
            process.wait()
            why = "out of time"
        said.seek(0)
        errors = [line.strip() for line in said if "Error" in line and "ChildFailed" not in line]
        return f"{why}: {' | '.join(errors[-2:])[:500]}" if why else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--seconds", type=float, default=560.0)
    parser.add_argument("--shape", default="llama3-8b")
    parser.add_argument("--rows", type=int, nargs=3, default=(8192, 16, 2))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--cards", type=int, default=torch.cuda.device_count())
    wanted = parser.parse_args()
    checkpoints = wanted.results.with_suffix(".run")
    end = time.monotonic() + wanted.seconds
    for case in cases(wanted.cards, wanted.shape, tuple(wanted.rows)):
        lines = wanted.results.read_text().splitlines() if wanted.results.exists() else []
        if any(case.is_in(json.loads(line)) for line in lines):
            continue
        if case.begins and not (checkpoints / "checkpoints").is_dir():
            print(f"{case}: left out, there is no run to go on with", flush=True)
            continue
        left = end - time.monotonic()
        if left < 20:
            print(f"{case} and what follows: no time is left; call again", flush=True)
            break
        began = time.monotonic()
        failed = run(command(case, checkpoints, wanted.results, wanted.steps), left)
        print(f"{case}: {failed or 'done'}, {time.monotonic() - began:.0f} s", flush=True)
    subprocess.run([sys.executable, str(ZERO), "--table", str(wanted.results)], check=False)


if __name__ == "__main__":
    main()
