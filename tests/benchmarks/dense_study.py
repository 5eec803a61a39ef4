"""Several dense tasks from one encoder on NYU Depth V2: what streams, sharing and adapters are worth.

    python tests/benchmarks/dense_study.py --files FILES --out OUT --steps 300

FILES is what `dense_data.py pack` makes; `--encoder` and `--maps` name folders that lie there already. Tasks: segmentation
(39 classes), depth, and normals derived from depth. Arms, all with the same decoders, batches and steps; r is the
rank, and equal values are exact on a DINOv2; on a Swin of 2, 2, 6 and 2 blocks they are within half a percent, and of
`task only` within 3:

| arm | encoder | runs |
| --- | --- | --- |
| frozen | as it is | 1 |
| single full | tuned whole, one a task: the reference of Δm | 3 |
| multi full | tuned whole, one for all | 1 |
| single LoRA | r 20, each as large as ours | 3 |
| single LoRA, split | r 7, 7 and 6: together as large as ours | 3 |
| shared LoRA | r 20 | 1 |
| task only | r' 20 in the last blocks of stages | 1 |
| both | r 16 everywhere and r' 4 in the last blocks: MTLoRA with streams that merge | 1 |
| authors' form | r 16 and r' 6 in o, fc1, fc2: y_t = W x + s' B_t A_t x_t, W seeing the common stream | 1 |

Edges come from the classes, so they stand apart: some arms learn them as a fourth task, at the rates of three.
`linear probe` is the frozen encoder with a linear layer in each decoder's place.

Each lane's rate, and the weights of an arm's losses, are chosen on 100 training images held out by a fixed seed, by runs
of half the length on the others. Rates are tried beyond an edge of the three first ones as long as the edge is best.
Then three seeds of each on all training images. Intervals are over resampled test images and seeds, the same for all
arms. No test image is seen before the last evaluation.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dense_arms import MULTI, SINGLE, TASKS, WITH_EDGES, Builder, Kind, kinds
from dense_data import Data, unpack_encoder, unpack_maps
from dense_lanes import Job, Lane, life, together
from dense_metrics import better, interval, metric, of_all

DRAWS = 1000
Answers = Sequence[dict[str, Any]]


class Resampled:
    """The metrics of arms, over the same resampled test images and seeds.

    Args:
        answers: of the last runs.
        seeds: how many each arm has.
        tasks: three, or four.
    """

    def __init__(self, answers: Answers, seeds: int, tasks: tuple[str, ...]) -> None:
        generator = np.random.default_rng(7)
        count = len(next(iter(answers[0]["stats"].values())))
        draws = generator.multinomial(count, np.ones(count) / count, size=DRAWS)
        self._weights = np.concatenate([np.ones((1, count)), draws.astype(np.float64)])
        drawn = generator.integers(0, seeds, (DRAWS, seeds))
        self._drawn = np.concatenate([np.arange(seeds)[None], drawn])
        self.tasks, self._answers, self._seeds = tasks, answers, seeds
        learned = {a["job"]["arm"] for a in answers}
        names = (*MULTI, *SINGLE, *sorted(learned - {*MULTI, *SINGLE}))
        self.values = {
            (arm, task): found
            for arm in names
            for task in tasks
            if (found := self._of(arm, task)) is not None
        }
        self.arms = [arm for arm in names if all((arm, task) in self.values for task in tasks)]

    def runs(self, arm: str, task: str) -> list[dict[str, Any]]:
        """Of a task, by seeds: those that learned it alone, or with all the others."""
        found = [
            a
            for a in self._answers
            if a["job"]["arm"] == arm and a["job"]["tasks"] in ((task,), self.tasks)
        ]
        return sorted(found, key=lambda a: a["job"]["seed"])

    def _of(self, arm: str, task: str) -> np.ndarray | None:
        runs = self.runs(arm, task)
        if len(runs) != self._seeds:
            return None
        each = np.stack([metric(task, a["stats"][task], self._weights) for a in runs], 1)
        return np.take_along_axis(each, self._drawn, 1).mean(1)

    def over(self, arm: str, other: str) -> dict[str, np.ndarray]:
        """Task → relative improvement in percent."""
        return {t: better(t, self.values[arm, t], self.values[other, t]) for t in self.tasks}

    def encoder_values(self, arm: str) -> int:
        """How many learn, of all runs that an arm needs."""
        first = {id(r): r for t in self.tasks for r in self.runs(arm, t)[:1]}
        return sum(run["values"]["encoder"] for run in first.values())


def summary(answers: Answers, seeds: int, tasks: tuple[str, ...]) -> list[dict[str, Any]]:
    """Each arm's metrics, and relative gains over others, with 95 % intervals over images and seeds."""
    found, rows = Resampled(answers, seeds, tasks), []
    for arm in found.arms:
        row: dict[str, Any] = {"arm": arm, "encoder_values": found.encoder_values(arm)}
        row |= {task: interval(found.values[arm, task]) for task in tasks}
        for name, other in (("delta_m", "single full"), ("over_frozen", "frozen"),
                            ("over_shared", "shared LoRA"), ("over_both", "both")):  # fmt: skip
            if other in found.arms:
                gains = found.over(arm, other)
                row[name] = interval(np.mean(list(gains.values()), axis=0))
                row[f"{name}_by_task"] = {t: interval(g) for t, g in gains.items()}
        if "frozen" in found.arms:
            minus = {t: found.values[arm, t] - found.values["frozen", t] for t in tasks}
            row["minus_frozen"] = {t: interval(value) for t, value in minus.items()}
        row["seeds"] = {t: [of_all(t, a["stats"][t]) for a in found.runs(arm, t)] for t in tasks}
        rows.append(row)
    return rows


HEADS = {"segmentation": "mIoU", "depth": "RMSE, m", "normals": "angle, °", "edges": "edge F"}


def table(rows: Sequence[dict[str, Any]], tasks: tuple[str, ...]) -> str:
    """For a person."""
    columns = [(HEADS[t], t, 4 if t == "depth" else 2) for t in tasks]
    columns += [("Δm, %", "delta_m", 2), ("over frozen, %", "over_frozen", 2)]
    lines = [
        f"| arm | encoder values, M | {' | '.join(head for head, _, _ in columns)} |",
        "|" + " --- |" * (len(columns) + 2),
    ]
    for row in rows:
        cells = [row["arm"], f"{row['encoder_values'] / 1e6:.2f}"]
        for _, key, digits in columns:
            value, low, high = row.get(key, [float("nan")] * 3)
            cells.append(f"{value:.{digits}f} ({low:.{digits}f} – {high:.{digits}f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default="dense_study", help="of the files in OUT")
    parser.add_argument("--seconds", type=float, default=240, help="fewer steps where these end")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=300, help="of the last runs")
    parser.add_argument("--without", nargs="*", default=[], help="arms, or `edges`, left out")
    parser.add_argument("--encoder", type=Path, help="a folder, instead of the packed one")
    parser.add_argument("--maps", type=Path, help="a folder of arrays, instead of the packed ones")
    parser.add_argument(
        "--probe", nargs="*", default=[], metavar="NAME=FOLDER", help="other encoders to probe"
    )
    parser.add_argument("--eager", action="store_true", help="no graphs")
    study(parser.parse_args())


def study(a: argparse.Namespace) -> None:
    clock = Clock()
    card = torch.cuda.is_available()
    device = torch.device("cuda" if card else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    data, encoder = unpacked(a, device)
    clock("unpacked")
    folders = {"": encoder} | {n: Path(f) for n, f in (one.split("=", 1) for one in a.probe)}
    dtype = torch.bfloat16 if card else torch.float32
    builders = {name: Builder(folder, device, dtype) for name, folder in folders.items()}
    lanes = made(a, builders, data, graphs=card and not a.eager)
    clock(f"{len(lanes)} lanes made")
    if card:
        print(f"{torch.cuda.memory_reserved() / 2**30:.0f} GiB of the card")
    steps = a.steps
    if card:
        round_s = timed_round(lanes)
        clock(f"a step of every lane takes {1000 * round_s:.1f} ms")
        # Four and a half trials of half the length and as many runs as seeds; a part for evaluation.
        fit = int(0.8 * (a.seconds - clock.seconds) / (round_s * (4.5 / 2 + a.seeds)))
        steps = max(20, min(steps, fit))
    trials: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    try:
        together([life(lane, lanes, steps, a.seeds, trials, answers) for lane in lanes.values()])
    except KeyboardInterrupt:  # what is there is told all the same
        clock("stopped")
    clock(f"{len(trials)} trials and {len(answers)} runs of {steps} steps")
    told(a, lanes, trials, answers, steps, clock)


class Clock:
    """Says what has been done, and when."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def __call__(self, what: str) -> None:
        print(f"{self.seconds:6.1f} s: {what}", flush=True)


def unpacked(a: argparse.Namespace, device: torch.device) -> tuple[Data, Path]:
    """Pictures and maps, and the encoder's folder; what was unpacked before is used again."""
    scratch = Path(os.environ.get("TMPDIR", "/tmp")) / "dense-study"
    encoder, maps = a.encoder or scratch / "encoder", a.maps or scratch / "maps"
    if not (encoder / "config.json").exists():
        unpack_encoder(a.files / "encoder.bin", encoder)
    if not (maps / "train.npy").exists():
        unpack_maps(a.files, maps, device)
    return Data(maps, device), encoder


def made(
    a: argparse.Namespace, builders: dict[str, Builder], data: Data, *, graphs: bool
) -> dict[Kind, Lane]:
    """A lane of each kind; one that fails is told and left out."""
    lanes: dict[Kind, Lane] = {}
    for kind in kinds(a.without, [name for name in builders if name]):
        try:
            lane = Lane(kind, builders[kind.backbone], data, a.batch, a.steps, a.seeds)
            apart = lane.capture() if graphs else 0.0
            if not apart < 0.03:
                print(f"FAILED {kind.name}: the graph's loss is {apart:.2g} away", flush=True)
                continue
            lanes[kind] = lane
        except Exception:
            print(f"FAILED {kind.name}: {traceback.format_exc()[-1500:]}", flush=True)
            if not lanes:
                raise SystemExit("the first lane failed") from None
    return {kind: lane for kind, lane in lanes.items() if kind.like is None or kind.like in lanes}


def timed_round(lanes: dict[Kind, Lane]) -> float:
    """Seconds of a step of every lane, side by side."""

    def few(lane: Lane) -> Any:
        for _ in range(4):
            yield from lane._again(lane._train)

    for lane in lanes.values():
        lane.begin(Job(1e-4, 8))
    torch.cuda.synchronize()
    start = time.monotonic()
    together([few(lane) for lane in lanes.values()])
    torch.cuda.synchronize()
    return (time.monotonic() - start) / 4


def told(
    a: argparse.Namespace,
    lanes: dict[Kind, Lane],
    trials: Answers,
    answers: Answers,
    steps: int,
    clock: Clock,
) -> None:
    """Tables for a person, and everything else in JSON."""
    settings = {"steps": steps, "batch": a.batch, "seeds": a.seeds, "seconds": clock.seconds}
    chosen = {kind.name: lane.chosen for kind, lane in lanes.items()}
    tried = [
        run["job"] | {task: of_all(task, stats) for task, stats in run["stats"].items()}
        for run in trials
    ]
    found: dict[str, Any] = {"settings": settings, "chosen": chosen}
    texts = []
    for name, tasks in (("three", TASKS), ("with_edges", WITH_EDGES)):
        found[name] = summary(answers, a.seeds, tasks) if answers else []
        texts.append(table(found[name], tasks))
    found["trials"] = tried
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / f"{a.name}.json").write_text(json.dumps(found, indent=1))
    (a.out / f"{a.name}.md").write_text("\n\n".join(texts) + "\n")
    for name, one in chosen.items():
        print(f"{name}: {one}")
    print("\n\n".join(texts))
    clock("done")


if __name__ == "__main__":
    main()
