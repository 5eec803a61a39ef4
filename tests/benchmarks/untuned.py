"""What a person gets who tunes nothing: what `init` writes, beside LoRA's best of three rates; by hand:

    python tests/benchmarks/untuned.py BASE_MODEL OUTPUT [--mixtures 5] [--seeds 0] [--limit 500] [--jobs 4]
        [--arms A,…] [--drawn-by N] [--minutes M] [--steps N] [--hardware gpu-80] [--data FOLDER] [--report-only]

Five mixtures of three tasks each are drawn from the seventeen of real-17 by `DRAWN_BY`, which was written down
before the defaults of `init` were chosen; those were chosen by docs/study.md, on all seventeen together and on
unbalanced-3. Each mixture is learned by the arms of `arms`; the best LoRA is chosen by the mean of the test scores,
which favours it. Looks and checkpoints are left out: they change nothing that is learned. The rates, clipping and
epochs of 2026-12 were chosen on four other draws, `--drawn-by 20261201 --mixtures 3,4,5,6`, by the arms of `tried`.

It is a queue: OUTPUT keeps a file a run, what is there is not done again, and each of `--jobs` processes takes the
next run until `--minutes` are over. A run is begun only where the longest one so far would still end; whatever
goes on then is given up. On a card MPS lets small models compute side by side (docs/comparing.md). The tables
are those of docs/study.md. `MTL_LORA_DATA`, or `--data`, names the folder of the data.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtl_lora_cli.recipe.training import Training

DRAWN_BY = 20261130
OTHERS_DRAWN_BY = 20261201  # of mixtures that defaults are chosen on
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
SEVEN = "[q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]"
LORA = f"adapter={{method: lora, rank: 16, alpha: 32, target_modules: {SEVEN}}}"
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
READY = "ready"  # beside the results: the base model and the recipes are there
CLAIMED = ".claimed"
SEEDS = 10  # as many of them as are there


def mixtures(numbers: str, drawn_by: int = DRAWN_BY) -> dict[int, tuple[str, ...]]:
    """Number → three tasks, always the same: the first N draws, or those of some numbers, `3,4,6`."""
    wanted = [int(one) for one in numbers.split(",")] if "," in numbers else range(int(numbers))
    draw = random.Random(drawn_by)
    drawn = [tuple(sorted(draw.sample(sorted(TASKS), 3))) for _ in range(max(wanted) + 1)]
    return {number: drawn[number] for number in wanted}


def arms(written: Training | None = None) -> dict[str, tuple[str, ...]]:
    """Arm → what it changes of the recipe that `init` writes for a small mixture.

    written       nothing: MTL-LoRA with one up-projection and a vector of factors for each task; the factors at ten
                  times the rate, B at four times; clipping by each tensor's own history
    lora          plain LoRA of as many values under the same settings
    lora@R        LoRA with one rate R for all parts, R of `RATES`, without that clipping
    first         what `init` wrote on 2026-11-30: half the epochs, half the rates, without that clipping
    before        what `init` wrote until then: attention only, rank 8, n = 3, 3e-4, 16,384 tokens a step
    """
    off = "training.clipping=null"
    single = {
        f"lora@{one}": (LORA, "training.parts={}", f"training.learning_rate={one}", off)
        for one in RATES
    }
    rate = 4 * (written.learning_rate if written else 1.0)
    return {
        "written": (),
        "lora": (LORA, f"training.parts={{up: {{learning_rate: {rate:.2g}}}}}"),
        **single,
        "first": (*_at(written, 0.5), *_fewer(written), off),
        "before": BEFORE,
    }


def tried(written: Training | None = None) -> dict[str, tuple[str, ...]]:
    """Arm → likewise, of what else was tried.

    cool   half the rates, without clipping by each tensor's own history
    short  half the epochs
    wide   twice the tokens a step and half the steps
    half   half the tokens a step and as many steps
    """
    rows = written.rows_per_step if written else 2
    return {
        "cool": (*_at(written, 0.5), "training.clipping=null"),
        "short": _fewer(written),
        "wide": (f"training.rows_per_step={2 * rows}", *_steps(written, 0.5)),
        "half": (f"training.rows_per_step={max(1, rows // 2)}", *_fewer(written)),
    }


def _at(written: Training | None, times: float) -> tuple[str, ...]:
    rate = times * (written.learning_rate if written else 1.0)
    parts = f"up: {{learning_rate: {4 * rate:.2g}}}, transform: {{learning_rate: {10 * rate:.2g}}}"
    return (f"training.learning_rate={rate:.2g}", f"training.parts={{{parts}}}")


def _fewer(written: Training | None) -> tuple[str, ...]:
    """Half the epochs."""
    epochs = written.epochs if written else 2
    return (f"training.epochs={max(1, epochs // 2)}", *_steps(written, 0.5))


def _steps(written: Training | None, times: float) -> tuple[str, ...]:
    """So many times the steps, where they end the run."""
    steps = written.max_steps if written else None
    return () if steps is None else (f"training.max_steps={int(times * steps)}",)


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
    from mtl_lora_cli.machine.cards import pick_device, release
    from mtl_lora_cli.recipe.load import load_recipe
    from mtl_lora_cli.training.prepare import prepare
    from mtl_lora_cli.training.run import start
    from mtl_lora_cli.training.spikes import spikes

    times = [time.monotonic()]
    written = load_recipe(recipe).recipe.training
    every = arms(written) | tried(written)
    changes = [*every[arm], f"training.seed={seed}"]
    changes += ["training.checkpoint_every=null", "training.validation=null"]
    changes += [] if steps is None else [f"training.max_steps={steps}"]
    prepared = prepare(load_recipe(recipe, changes))
    times.append(time.monotonic())
    run = start(prepared, output.with_suffix(".run") / f"{time.time_ns()}")
    times.append(time.monotonic())
    release(pick_device())
    opened, setting = open_run(run), Setting(limit=limit)
    rows = find_rows(opened.tasks, setting, None)
    results = evaluate(opened, opened.tasks, setting, lambda *_: None, rows=rows)
    times.append(time.monotonic())
    release(pick_device())
    events = list(run.events())
    taken = [event for event in events if event["event"] == "step"]
    norms = sorted(event["gradient_norm"] for event in taken)
    around = json.loads(run.environment.read_text(encoding="utf-8"))
    found = {
        "steps": len(taken),
        "tokens": sum(event["tokens"] for event in taken),
        "seconds": dict(
            zip(
                ("prepare", "learn", "score"),
                (round(after - before, 1) for before, after in pairwise(times)),
                strict=True,
            )
        ),
        "stepping": round(sum(event["seconds"] for event in taken), 1),
        "last_loss": fmean(event["loss"] for event in taken[-max(1, len(taken) // 10) :]),
        "spikes": len(spikes(events)),
        "norms": [norms[len(norms) // 2], norms[-1]],
        "parameters": opened.adapter.parameter_count(),
        "device": around["device"],
        "git_revision": around["git_revision"],
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


WRITTEN, EARLIER = "written", ("before", "first")


def report(folder: Path, drawn: Mapping[int, Sequence[str]]) -> Iterator[str]:
    """The table, of what is there: a row for each task of a mixture, and their mean.

    Of what `init` writes the mean over seeds with its standard deviation, the lowest, and in how many of the seeds the
    interval lies above the majority answer's score; beside it LoRA's best of three rates, by the mean of the
    tasks, of one seed. *Near* is at most two points below that LoRA, *apart* where none of the three rates left the
    majority answer either.
    """
    yield "| mixture | task | majority | before | first | written: mean (SD) | lowest | above | LoRA's best | so |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for number, tasks in drawn.items():
        runs = _results(folder, number, WRITTEN)
        loras = {rate: _results(folder, number, f"lora@{rate}")[:1] for rate in RATES}
        single = {rate: found[0] for rate, found in loras.items() if found}
        if runs and single:
            early = [(*_results(folder, number, arm), None)[0] for arm in EARLIER]
            yield from _rows(number, tasks, runs, single, early)


Result = Mapping[str, Any]


def _results(folder: Path, mixture: int, arm: str) -> list[Result]:
    files = (result_file(folder, mixture, arm, seed) for seed in range(SEEDS))
    return [json.loads(one.read_text(encoding="utf-8")) for one in files if one.is_file()]


def _rows(
    number: int,
    tasks: Sequence[str],
    runs: Sequence[Result],
    single: Mapping[str, Result],
    early: Sequence[Result | None],
) -> Iterator[str]:
    rate = max(single, key=lambda one: mean(single[one]))
    for task in tasks:
        own = [run["tasks"][task] for run in runs]
        values = [one["value"] for one in own]
        best = single[rate]["tasks"][task]
        cells = ["" if one is None else f"{one['tasks'][task]['value']:.3f}" for one in early]
        searched = [one["tasks"][task] for one in single.values()]
        yield (
            f"| {number} | {task}, {own[0]['metric']} | {own[0]['majority']:.3f} | {' | '.join(cells)} | "
            f"{over(values)} | {min(values):.3f} | {sum(map(is_above, own))} of {len(own)} | "
            f"{score_of(best)} | {verdict(fmean(values), searched, best)} |"
        )
    means = [mean(run) for run in runs]
    cells = ["" if one is None else f"{mean(one):.3f}" for one in early]
    yield (
        f"| {number} | mean | | {' | '.join(cells)} | {over(means)} | {min(means):.3f} | | "
        f"{mean(single[rate]):.3f} ({rate}) | |"
    )


def others(folder: Path, drawn: Mapping[int, Sequence[str]]) -> Iterator[str]:
    """The table of what was tried on other mixtures: the mean of the tasks, in brackets those that left the majority."""
    every = (WRITTEN, *tried())
    yield f"| mixture | {' | '.join(every)} |"
    yield "| --- |" + " --- |" * len(every)
    for number, tasks in drawn.items():
        cells = [(*_results(folder, number, arm), None)[0] for arm in every]
        yield f"| {', '.join(tasks)} | {' | '.join(map(_left, cells))} |"


def _left(result: Result | None) -> str:
    if result is None:
        return ""
    return f"{mean(result):.3f} ({sum(map(is_above, result['tasks'].values()))})"


def over(values: Sequence[float]) -> str:
    """Mean over seeds with the standard deviation, where there are two."""
    return f"{fmean(values):.3f}" + (f" ({stdev(values):.3f})" if len(values) > 1 else "")


def mean(result: Mapping[str, Any]) -> float:
    """Of its tasks' scores."""
    return fmean(task["value"] for task in result["tasks"].values())


def score_of(own: Mapping[str, Any]) -> str:
    """With its interval."""
    return f"{own['value']:.3f} ({own['low']:.3f} to {own['high']:.3f})"


def is_above(own: Mapping[str, Any]) -> bool:
    """The interval lies above the majority answer's score."""
    return bool(own["low"] > own["majority"])


def verdict(value: float, searched: Sequence[Result], best: Result) -> str:
    """What is so of a task's mean score beside those of LoRA's three rates."""
    if not any(is_above(one) for one in searched):
        return "apart"
    return "near" if value >= best["value"] - WITHIN else f"{100 * (value - best['value']):+.1f}"


Run = tuple[int, str, int]  # mixture, arm, seed


def queue(options: argparse.Namespace) -> list[Run]:
    """All runs in their order: whole mixtures of a seed one after another."""
    return [
        (number, arm, int(seed))
        for seed in options.seeds.split(",")
        for number in mixtures(options.mixtures, options.drawn_by)
        for arm in options.arms.split(",")
    ]


def work(options: argparse.Namespace) -> None:
    """Take runs that nobody has taken, until there is none or no time."""
    # What is slow to load is loaded while the parent prepares.
    for name in ("evaluation.evaluate", "evaluation.opened", "training.prepare", "training.run"):
        import_module(f"mtl_lora_cli.{name}")
    import torch

    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
    while not (options.output / READY).is_file():
        time.sleep(0.1)
    longest = 0.0
    for number, arm, seed in queue(options):
        file = result_file(options.output, number, arm, seed)
        if file.is_file() or time.time() + longest > options.until:
            continue
        try:
            file.with_suffix(CLAIMED).touch(exist_ok=False)
        except FileExistsError:
            continue
        try:
            recipe = options.output / f"{number}.yaml"
            learn(recipe, arm, seed, options.limit, file, options.steps)
            took = json.loads(file.read_text(encoding="utf-8"))
            # The first run waits for kernels, too: its steps say what the next one takes.
            longest = max(longest, took["stepping"] + took["seconds"]["score"])
        except Exception:
            print(number, arm, seed, traceback.format_exc(), file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base_model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--mixtures", default="5", help="so many, or those of some numbers: 3,4,6")
    parser.add_argument("--drawn-by", type=int, default=DRAWN_BY)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--arms", default=",".join(arms()))
    parser.add_argument("--steps", type=int, help="only so many, to try this script")
    parser.add_argument("--hardware", default="gpu-80")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("MTL_LORA_DATA", ".")))
    parser.add_argument("--report-only", action="store_true")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # for a process of the queue
    options = parser.parse_args()
    options.data = options.data.resolve()
    if options.until:
        work(options)
        return
    if not options.report_only:
        run_queue(options, time.time() + 60 * options.minutes)
    drawn = mixtures(options.mixtures, options.drawn_by)
    table = report if options.drawn_by == DRAWN_BY else others
    print("\n".join(table(options.output, drawn)))


def run_queue(options: argparse.Namespace, until: float) -> None:
    """Have the runs done by so many processes; they load their libraries while the base model is found."""
    output = options.output
    output.mkdir(parents=True, exist_ok=True)
    for old in (*output.glob(f"*{CLAIMED}"), *output.glob(READY)):
        old.unlink()
    around = {"MTL_LORA_SHARING": str(options.jobs), "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *sys.argv[1:], "--until", str(until)]
    # What a run shows while it learns is nothing here.
    processes = [
        subprocess.Popen(command, env={**around, **os.environ}, stdout=subprocess.DEVNULL)
        for _ in range(options.jobs)
    ]
    try:
        for number, tasks in mixtures(options.mixtures, options.drawn_by).items():
            if not (output / f"{number}.yaml").is_file():
                write_recipe(tasks, output / f"{number}.yaml", options)
        from mtl_lora_cli.models.base import find_base_model

        find_base_model(options.base_model)
        (output / READY).touch()
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.time()))
    finally:
        for process in processes:
            process.kill()


if __name__ == "__main__":
    main()
