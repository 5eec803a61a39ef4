"""All mixtures, and LoRA and DoRA, beside proportional on the seventeen tasks of real-17, a result file a run; by hand:

    python tests/benchmarks/mixtures.py BASE_MODEL OUTPUT [--seeds 3] [--steps 150] [--limit 100] [--jobs 2]
        [--examples 3000] [--seconds S] [--arms A,…] [--maps FOLDER [--size HW] [--rows 8]]

With `--maps` the three tasks of NYU Depth V2 in FOLDER are learned, classes, depth and normals, each beside runs of that task
alone, and the table is Δm: the mean over tasks of how much better the metric is than its own run's, in percent.

Libraries are loaded, the base model is converted and rows are encoded once; `--jobs` forks of that process then take run after run,
and begin none that would not end in `--seconds`. On a card MPS lets small models compute side by side (docs/comparing.md).
Where `proportional` of a seed is done, `excess_loss` of it takes its losses as the reference; otherwise it has none, and
the table says so. `pcgrad` has rows of one task each, so `one_task` is what it stands beside. A call that was
stopped goes on. `MTL_LORA_DATA` names the data.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

REASONING = "boolq, piqa, social_i_qa, hellaswag, winogrande, ARC-Easy, ARC-Challenge, openbookqa"
OTHERS = "cola, sst2, mrpc, qqp, mnli, qnli, rte, home_depot, amazon_google"
SEVEN = "[q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]"
# LoRA and DoRA in the place of MTL-LoRA, all else alike; what learns at a rate of its own in both is B.
METHODS = {
    method: [
        f"adapter={{method: {method}, rank: 16, alpha: 32, target_modules: {SEVEN}}}",
        "training.parts={up: {learning_rate: 4.0e-3}}",
    ]
    for method in ("dora", "lora")
}
ARMS: dict[str, list[str]] = {
    **METHODS,
    "pcgrad": ["training.balance=pcgrad", "training.rows=one_task"],
    "gradnorm": ["training.balance={method: gradnorm, every: 10}"],
    "proportional": [],
    "uncertainty": ["training.balance=uncertainty"],
    "progress": ["mixing={dynamic: progress, every: 10}"],
    "excess_loss": ["mixing={dynamic: excess_loss, every: 10}"],
    "one_task": ["training.rows=one_task"],
    "uniform": ["mixing=uniform"],
    "temperature": ["mixing={temperature: 2}"],
    "stages": [],  # a third of the steps for the first eight tasks, see `changes`
}


MAPS = ("segmentation", "depth", "normals")
SMALLER = ("depth", "normals")  # is better: metres and degrees
ONE = [
    "training.rows=one_task",
    "mixing=uniform",
]  # three times as many rows, so as many maps a step
MAP_ARMS: dict[str, list[str]] = {
    **{f"single_{task}": [] for task in MAPS},
    "proportional": [],
    "uncertainty": ["training.balance=uncertainty"],
    "gradnorm": ["training.balance={method: gradnorm, every: 10}"],
    "pcgrad": ["training.balance=pcgrad"],
    "one_task": ONE,
    "progress": [*ONE, "mixing={dynamic: progress, every: 10, start: uniform}"],
    "excess_loss": [*ONE, "mixing={dynamic: excess_loss, every: 10, start: uniform}"],
    "stages": [
        *ONE,
        "training.epochs=1",
    ],  # a third of the steps for depth and normals, see `map_changes`
}


def layers() -> str:
    """The layers of attention and MLP in DINOv2, by the names that this transformers has for them."""
    from transformers.models.dinov2 import modeling_dinov2

    if "q_proj" in Path(modeling_dinov2.__file__).read_text():
        return "q_proj, k_proj, v_proj, o_proj, fc1, fc2"
    return "query, key, value, dense, fc1, fc2"


def map_changes(arm: str, seed: int, options: argparse.Namespace) -> list[str]:
    """Of the recipe nyuv2, without its edges, which its classes hold already."""
    weights = {"segmentation": 1, "depth": 1, "normals": 10}
    names = [arm.removeprefix("single_")] if arm.startswith("single") else MAPS
    tasks = ", ".join(
        f"{{name: {name}, template: nyuv2/{name}, source: {options.maps.resolve()}, loss_weight: {weights[name]}}}"
        for name in names
    )
    found = [
        f"base_model={options.base}", f"tasks=[{tasks}]", "training.epochs=99", f"training.max_steps={options.steps}",
        f"training.rows_per_step={options.rows * (3 if MAP_ARMS[arm][:2] == ONE else 1)}",
        f"training.rows_per_pass={options.rows}", "training.checkpoint_every=null",
        f"training.seed={seed}", f"images.size={options.size}", f"adapter.target_modules=[{layers()}]", *MAP_ARMS[arm],
    ]  # fmt: skip
    if arm == "stages":
        pictures = len((options.maps / "train.jsonl").read_text().splitlines())
        first = options.steps * options.rows / (2 * pictures)
        found.append(
            f"training.stages=[{{tasks: [depth, normals], epochs: {first:.4f}}}, {{tasks: [{', '.join(MAPS)}], epochs: 9}}]"
        )
    reference = options.output / f"proportional-{seed}.run"
    if arm == "excess_loss" and (options.output / f"proportional-{seed}.json").is_file():
        found[-1] = found[-1].replace("every: 10", f"every: 10, reference_run: {reference}")
    return found


def map_report(folder: Path) -> str:
    """Each arm's metrics, means over seeds, and Δm by seed against the runs of one task of the same seed."""
    found = {
        (one["arm"], one["seed"]): one
        for one in (json.loads(f.read_text()) for f in sorted(folder.glob("*.json")))
    }
    lines = [
        f"| mixture | {' | '.join(MAPS)} | Δm by seed, % | mean | s a step |",
        "|" + " --- |" * 7,
    ]
    for arm in (name for name in MAP_ARMS if not name.startswith("single")):
        own = {seed: one for (name, seed), one in found.items() if name == arm}
        deltas = [
            fmean(
                (-1 if task in SMALLER else 1) * 100
                * (one["tasks"][task] / found[f"single_{task}", seed]["tasks"][task] - 1)
                for task in MAPS
            )
            for seed, one in sorted(own.items())
            if all((f"single_{task}", seed) in found for task in MAPS)
        ]  # fmt: skip
        if own:
            means = [f"{fmean(one['tasks'][task] for one in own.values()):.4f}" for task in MAPS]
            shown = f"{fmean(deltas):+.2f}" if deltas else "–"
            by_seed = ", ".join(f"{delta:+.2f}" for delta in deltas)
            step = fmean(one["step"] for one in own.values())
            lines.append(f"| {arm} | {' | '.join(means)} | {by_seed} | {shown} | {step:.3f} |")
    return "\n".join(lines)


def changes(arm: str, seed: int, options: argparse.Namespace) -> list[str]:
    """Of the recipe real-17."""
    found = [
        f"base_model={options.base}", "training.epochs=9", f"training.max_steps={options.steps}",
        "training.row_length=512", "training.rows_per_step=4", "training.rows_per_pass=4",
        "training.memory=manual", "training.checkpoint_every=null", f"training.seed={seed}",
        *(f"tasks.{name}.max_examples={options.examples}" for name in f"{REASONING}, {OTHERS}".split(", ")),
        *ARMS[arm],
    ]  # fmt: skip
    reference = options.output / f"proportional-{seed}.run"
    if arm == "excess_loss" and (options.output / f"proportional-{seed}.json").is_file():
        found[-1] = f"mixing={{dynamic: excess_loss, every: 10, reference_run: {reference}}}"
    if arm == "stages":
        found.append("training.epochs=1")
        found.append(
            f"training.stages=[{{tasks: [{REASONING}], epochs: {options.first:.4f}}}, "
            f"{{tasks: [{REASONING}, {OTHERS}], epochs: 9}}]"
        )
    return found


def learn(arm: str, seed: int, options: argparse.Namespace) -> None:
    """One run, and its result file."""
    from mtl_lora_cli.evaluation.evaluate import Setting, evaluate, find_rows
    from mtl_lora_cli.evaluation.opened import open_run
    from mtl_lora_cli.machine.cards import pick_device, release
    from mtl_lora_cli.recipe.load import find_recipe, load_recipe
    from mtl_lora_cli.training.prepare import prepare
    from mtl_lora_cli.training.run import start

    began = time.monotonic()
    words = (changes if options.maps is None else map_changes)(arm, seed, options)
    prepared = prepare(load_recipe(find_recipe(options.recipe), words))
    ready = time.monotonic()
    run = start(prepared, options.output / f"{arm}-{seed}.run")
    del prepared
    release(pick_device())
    learned = time.monotonic()
    opened, setting = open_run(run), Setting(limit=options.limit)
    rows = find_rows(opened.tasks, setting, None)
    results = evaluate(opened, opened.tasks, setting, lambda *_: None, rows=rows)
    events = [event for event in run.events() if event["event"] == "step"]
    found = {
        "arm": arm, "seed": seed, "steps": len(events),
        "seconds": [round(after - before, 1) for before, after in pairwise((began, ready, learned, time.monotonic()))],
        "loss": fmean(event["loss"] for event in events[-10:]),
        "step": sorted(event["seconds"] for event in events)[len(events) // 2],
        "reference": "reference_run" in str(words),
        "tasks": {
            task.name: result["metrics"][task.template.metrics[0]]["value"] or 0.0
            for task, result in zip(opened.tasks, results, strict=True)
        },
    }  # fmt: skip
    partial = options.output / f"{arm}-{seed}.partial"
    partial.write_text(json.dumps(found, indent=1))
    partial.rename(options.output / f"{arm}-{seed}.json")


def forked(work: Any, log: Path) -> int:
    """The id of a process that does this alone; parents of processes with a card must not have touched it."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def warm(options: argparse.Namespace) -> None:
    """What all runs have in common: the converted base model, encoded rows, and how long the first stage is."""
    from mtl_lora_cli.data.mixture import positions_of
    from mtl_lora_cli.recipe.load import find_recipe, load_recipe
    from mtl_lora_cli.training.prepare import prepare

    prepared = prepare(load_recipe(find_recipe("real-17"), changes("proportional", 0, options)))
    names = REASONING.split(", ")
    pairs = zip(prepared.data.tasks, prepared.data.splits, strict=True)
    own = [split for task, split in pairs if task.name in names]
    positions = sum(positions_of(int(length)) for split in own for length in split.lengths)
    (options.output / "first.txt").write_text(str(options.steps / 3 * 4 * 512 / positions))


Run = tuple[str, int]  # arm, seed


def work(runs: Sequence[Run], options: argparse.Namespace) -> None:
    """Take runs that nobody has taken, until there is none, or the longest one so far would not end in time."""
    longest = 0.0
    while open_runs := [run for run in runs if not claim_of(run, options).exists()]:
        arm_and_seed = following(open_runs, options)
        if arm_and_seed is None:  # it waits for another's losses
            time.sleep(0.2)
            continue
        if time.monotonic() + longest > options.until:
            return
        try:
            claim_of(arm_and_seed, options).touch(exist_ok=False)
        except FileExistsError:
            continue
        began = time.monotonic()
        try:
            learn(*arm_and_seed, options)
        except Exception:
            claim_of(arm_and_seed, options).with_suffix(".failed").touch()
            print(*arm_and_seed, traceback.format_exc(), file=sys.stderr, flush=True)
        longest = max(longest, time.monotonic() - began)


def claim_of(run: Run, options: argparse.Namespace) -> Path:
    """The file that says that a process has taken this run."""
    return Path(options.output / f"{run[0]}-{run[1]}.claimed")


def following(runs: Sequence[Run], options: argparse.Namespace) -> Run | None:
    """The next one; one that takes another's losses waits for it, while that is to come."""
    for arm, seed in runs:
        other = options.output / f"proportional-{seed}.json"
        asked = "proportional" in options.arms.split(",")
        over = other.is_file() or other.with_suffix(".failed").is_file()
        if arm != "excess_loss" or not asked or over:
            return arm, seed
    return None


def report(folder: Path) -> str:
    """Each arm's mean over tasks, by seed, and how far it is from proportional of the same seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for file in sorted(folder.glob("*.json")):
        one = json.loads(file.read_text())
        found.setdefault(one["arm"], {})[one["seed"]] = one
    score = {
        a: {s: 100 * fmean(o["tasks"].values()) for s, o in own.items()} for a, own in found.items()
    }
    lines = ["| mixture | score, by seed | mean | over proportional (SD over seeds) | tasks better, worse | s a step |",
             "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for arm in (name for name in ARMS if name in found):
        beside = score.get("proportional", {})
        apart = [value - beside[seed] for seed, value in score[arm].items() if seed in beside]
        tasks = [
            fmean(o["tasks"][t] - found["proportional"][s]["tasks"][t] for s, o in found[arm].items() if s in beside)
            for t in next(iter(found[arm].values()))["tasks"]
        ] if apart else []  # fmt: skip
        spread = f" ({stdev(apart):.2f})" if len(apart) > 1 else ""
        name = arm + (
            " (no reference)"
            if arm == "excess_loss" and not all(o["reference"] for o in found[arm].values())
            else ""
        )
        lines.append(
            f"| {name} | {', '.join(f'{v:.2f}' for _, v in sorted(score[arm].items()))} | {fmean(score[arm].values()):.2f} "
            f"| {fmean(apart) if apart else float('nan'):+.2f}{spread} | {sum(t > 0 for t in tasks)}, {sum(t < 0 for t in tasks)} "
            f"| {fmean(o['step'] for o in found[arm].values()):.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--examples", type=int, default=3000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--maps", type=Path, help="a folder of NYU Depth V2")
    parser.add_argument("--size", default="[168, 224]", help="of pictures")
    parser.add_argument("--rows", type=int, default=8, help="pictures a step")
    parser.add_argument("--arms")
    options = parser.parse_args()
    options.arms = options.arms or ",".join(ARMS if options.maps is None else MAP_ARMS)
    options.recipe = "real-17" if options.maps is None else "nyuv2"
    began = time.monotonic()
    options.until = began + options.seconds
    options.output = options.output.resolve()
    options.output.mkdir(parents=True, exist_ok=True)
    for module in ("evaluation.evaluate", "training.run", "models.packed", "engine.decoder"):
        import_module(f"mtl_lora_cli.{module}")
    if options.maps is None:
        os.waitpid(forked(lambda: warm(options), options.output / "warm.log"), 0)
        options.first = float((options.output / "first.txt").read_text())
    print(f"ready after {time.monotonic() - began:.0f} s", flush=True)
    runs = [(arm, seed) for seed in range(options.seeds) for arm in options.arms.split(",")]
    runs = [run for run in runs if not (options.output / f"{run[0]}-{run[1]}.json").is_file()]
    for old in (*options.output.glob("*.claimed"), *options.output.glob("*.failed")):
        old.unlink()  # of a call that was stopped
    for arm, seed in runs:
        shutil.rmtree(options.output / f"{arm}-{seed}.run", ignore_errors=True)
    workers = [
        forked(lambda: work(runs, options), options.output / f"worker-{number}.log")
        for number in range(options.jobs)
    ]
    watch(workers, runs, options)
    print((report if options.maps is None else map_report)(options.output))


def watch(workers: Sequence[int], runs: Sequence[Run], options: argparse.Namespace) -> None:
    """Tell of every run that ends, until all have or time is up."""
    began, left, alive = options.until - options.seconds, list(runs), set(workers)
    while alive and time.monotonic() < options.until:
        for run in [one for one in left if (options.output / f"{one[0]}-{one[1]}.json").is_file()]:
            left.remove(run)
            found = json.loads((options.output / f"{run[0]}-{run[1]}.json").read_text())
            print(f"{time.monotonic() - began:5.0f} s: {run[0]} {run[1]}, {found['seconds']} s to begin, "
                  f"learn and score, loss {found['loss']:.4f}, mean {fmean(found['tasks'].values()):.4f}", flush=True)  # fmt: skip
        pid, _ = os.waitpid(-1, os.WNOHANG)
        alive.discard(pid)
        time.sleep(0.1)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    print("not finished:", *(f"{arm} {seed}," for arm, seed in left)) if left else None


if __name__ == "__main__":
    sys.exit(main())
