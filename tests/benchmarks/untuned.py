"""What a person gets who tunes nothing: what `init` writes, unchanged, beside LoRA's best of three rates; by hand:

    python tests/benchmarks/untuned.py BASE_MODEL OUTPUT [--mixtures 5] [--seeds 0] [--limit 500] [--jobs 4]
        [--arms A,…] [--minutes M] [--steps N] [--hardware gpu-80]
        [--data FOLDER]

Five mixtures of three tasks each are drawn from the seventeen of real-17 by `DRAWN_BY`, which was written down
before the defaults of `init` were chosen; those were chosen by docs/study.md, on all seventeen together and on
unbalanced-3. Each mixture is learned by

    init      the recipe that `mtl-lora init` writes
    before    the recipe that it wrote for a card until then: attention only, rank 8, n = 3, 3e-4, 16,384 tokens a step
    lora@R    init's recipe with method lora and the rate R for all parts, R of `RATES`; the best is chosen by the
              mean of the test scores, which favours LoRA

A call that was stopped goes on: OUTPUT keeps a file a run. The table says of each task its score with the 95 %
interval, the score of the majority answer, and whether it lies above that and at most two points below LoRA.
`MTL_LORA_DATA`, or `--data`, names the folder of the data.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

DRAWN_BY = 20261130
RATES = ("5e-4", "1e-3", "2e-3")
WITHIN = 0.02
COMMONSENSE = "commonsense/llm_adapters"
TASKS = {
    "boolq": COMMONSENSE, "piqa": COMMONSENSE, "social_i_qa": COMMONSENSE, "hellaswag": COMMONSENSE,
    "winogrande": COMMONSENSE, "ARC-Easy": COMMONSENSE, "ARC-Challenge": COMMONSENSE,
    "openbookqa": COMMONSENSE, "cola": "glue/cola", "sst2": "glue/sst2", "mrpc": "glue/mrpc",
    "qqp": "glue/qqp", "mnli": "glue/mnli", "qnli": "glue/qnli", "rte": "glue/rte",
    "home_depot": "ads/home_depot", "amazon_google": "ads/amazon_google",
}  # fmt: skip
BEFORE = (
    "adapter={method: mtl-lora, rank: 8, alpha: 16, up_projections: 3, dropout: 0.05}",
    "training.epochs=3",
    "training.max_steps=null",
    "training.learning_rate=3e-4",
    "training.parts={}",
    "training.clipping=null",
    "training.warmup=0.01",
    "training.row_length=2048",
    "training.rows_per_step=8",
)


def mixtures(count: int) -> list[tuple[str, ...]]:
    """So many draws of three tasks, always the same."""
    draw = random.Random(DRAWN_BY)
    return [tuple(sorted(draw.sample(sorted(TASKS), 3))) for _ in range(count)]


def arms() -> dict[str, tuple[str, ...]]:
    """Arm → what it changes of init's recipe."""
    own = {"init": (), "before": BEFORE}
    plain = "adapter={method: lora, rank: 16, alpha: 32, target_modules: [q_proj, k_proj, v_proj, "
    lora = (plain + "o_proj, gate_proj, up_proj, down_proj]}", "training.parts={}")
    return own | {f"lora@{rate}": (*lora, f"training.learning_rate={rate}") for rate in RATES}


def family(task: str) -> str:
    """Its folder in the data."""
    return TASKS[task].partition("/")[0]


def write_recipe(tasks: Sequence[str], path: Path, options: argparse.Namespace) -> None:
    """What `init` writes."""
    words = ["init", "--base-model", options.base_model, "--hardware", options.hardware, "--force"]
    for task in tasks:
        words += ["--task", f"{task}={TASKS[task]}:{options.data / family(task) / task}"]
    command = [sys.executable, "-m", "mtl_lora_cli.cli.main", *words, "--output", str(path)]
    subprocess.run(command, check=True, capture_output=True, text=True)


def learn(recipe: Path, arm: str, seed: int, limit: int, output: Path, steps: int | None) -> None:
    """One run, and its result file."""
    from mtl_lora_cli.evaluation.evaluate import Setting, evaluate, find_rows
    from mtl_lora_cli.evaluation.opened import open_run
    from mtl_lora_cli.recipe.load import load_recipe
    from mtl_lora_cli.training.prepare import prepare
    from mtl_lora_cli.training.run import start
    from mtl_lora_cli.training.signs import signs
    from mtl_lora_cli.training.spikes import spikes

    began = time.monotonic()
    changes = [*arms()[arm], f"training.seed={seed}", "training.checkpoint_every=null"]
    changes += [] if steps is None else [f"training.max_steps={steps}"]
    prepared = prepare(load_recipe(recipe, changes))
    run = start(prepared, output.with_suffix(".run") / f"{time.time_ns()}")
    opened, setting = open_run(run), Setting(limit=limit)
    results = evaluate(
        opened, opened.tasks, setting, lambda *_: None, rows=find_rows(opened.tasks, setting, None)
    )
    events = list(run.events())
    steps = [event for event in events if event["event"] == "step"]
    found = {
        "steps": len(steps),
        "seconds": round(time.monotonic() - began, 1),
        "last_loss": fmean(event["loss"] for event in steps[-max(1, len(steps) // 10) :]),
        "spikes": len(spikes(events)),
        "signs": signs(events),
        "tasks": {
            task.name: scored(result, task.template.metrics[0])
            for task, result in zip(opened.tasks, results, strict=True)
        },
    }
    partial = output.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    partial.rename(output)


def scored(result: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """A task's score with its interval, and the best that one answer to all rows gets."""
    import numpy as np

    from mtl_lora_cli.metrics.declare import find
    from mtl_lora_cli.metrics.outcome import Outcome

    gold = np.asarray(result["gold"])
    constant = [
        find(metric).value(Outcome(gold, np.full_like(gold, one), positive=result["positive"]))
        for one in np.unique(gold)
    ]
    measured = result["metrics"][metric]
    keys = ("value", "low", "high")
    return {
        "metric": metric,
        **{key: measured[key] for key in keys},
        "majority": max(value for value in constant if value == value),
        "one_answer": bool(result["one_answer"]),
        "rows": len(gold),
    }


def result_file(folder: Path, mixture: int, arm: str, seed: int) -> Path:
    """Of one run."""
    return folder / f"{mixture}-{arm.replace('@', '_')}-seed{seed}.json"


def report(folder: Path, count: int, seeds: Sequence[int]) -> Iterator[str]:
    """The table, of what is there."""
    yield "mixture seed arm steps spikes loss | task metric score (interval) majority above? | LoRA's best, within 2?"
    for number, tasks in enumerate(mixtures(count)):
        for seed in seeds:
            there = {}
            for arm in arms():
                file = result_file(folder, number, arm, seed)
                if file.is_file():
                    there[arm] = json.loads(file.read_text(encoding="utf-8"))
            loras = {arm: one for arm, one in there.items() if arm.startswith("lora")}
            best = max(loras, key=lambda arm: mean(loras[arm]), default=None)
            for arm, one in there.items():
                head = f"{number} {seed} {arm:9} {one['steps']:5} {one['spikes']:3} {one['last_loss']:.3f}"
                yield f"{head} | mean {mean(one):.3f}" + (" best LoRA" if arm == best else "")
            for arm in ("before", "init"):
                for task in tasks if arm in there else ():
                    own = there[arm]["tasks"][task]
                    lora = None if best is None else loras[best]["tasks"][task]["value"]
                    yield f"  {arm:6} {line_of(task, own, lora)}"


def mean(result: Mapping[str, Any]) -> float:
    """Of its tasks' scores."""
    return fmean(task["value"] for task in result["tasks"].values())


def line_of(task: str, own: Mapping[str, Any], lora: float | None) -> str:
    """One task of one run."""
    low = own["low"] if own["low"] is not None else own["value"]
    above = "above" if low > own["majority"] else "NOT ABOVE"
    beside = (
        ""
        if lora is None
        else f" | {lora:.3f} {'ok' if own['value'] >= lora - WITHIN else 'BELOW'}"
    )
    interval = f"({low:.3f} to {own['high'] or own['value']:.3f})"
    return f"{task:14} {own['metric']:9} {own['value']:.3f} {interval} {own['majority']:.3f} {above}{beside}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base_model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--mixtures", type=int, default=5)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--arms", default=",".join(arms()))
    parser.add_argument("--steps", type=int, help="only so many, to try this script")
    parser.add_argument("--hardware", default="gpu-80")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("MTL_LORA_DATA", ".")))
    parser.add_argument("--one", nargs=3, metavar=("MIXTURE", "ARM", "SEED"))
    options = parser.parse_args()
    options.data = options.data.resolve()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    until = time.monotonic() + 60 * options.minutes
    if options.one:
        number, arm, seed = int(options.one[0]), options.one[1], int(options.one[2])
        recipe = options.output / f"{number}.yaml"
        file = result_file(options.output, number, arm, seed)
        learn(recipe, arm, seed, options.limit, file, options.steps)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    for number, tasks in enumerate(mixtures(options.mixtures)):
        write_recipe(tasks, options.output / f"{number}.yaml", options)

    def one(job: tuple[int, str, int]) -> None:
        left = until - time.monotonic()
        if result_file(options.output, *job).is_file() or left < 5:
            return
        command = [sys.executable, __file__, *sys.argv[1:], "--one", *map(str, job)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=min(left, 1e6), check=False
            )
        except subprocess.TimeoutExpired:
            print(*job, "no time was left", file=sys.stderr)
            return
        if done.returncode:
            print(*job, "\n".join(done.stderr.splitlines()[-6:]), file=sys.stderr)

    jobs = [
        (n, arm, seed)
        for n in range(options.mixtures)
        for seed in seeds
        for arm in options.arms.split(",")
    ]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, jobs))
    print("\n".join(report(options.output, options.mixtures, seeds)))


if __name__ == "__main__":
    main()
