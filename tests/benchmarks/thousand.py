"""A thousand tasks beside eight: what a step costs, and how long inspect, export of all and loading take; by hand:

    python tests/benchmarks/thousand.py BASE_MODEL FOLDER [--tasks 1000] [--profile inspect|export]

FOLDER keeps the two runs; what is there is not trained again. Commands are processes of their own, as a person calls
them. Each step of either run has rows of eight tasks, as many tokens, and the same adapter but for its tasks.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import random
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

WORDS = ["red", "blue", "green", "small", "large", "old", "new", "round"]
STEPS, ROWS_A_STEP = 40, 8
AIMS = {"inspect": 5.0, "export": 120.0, "load": 1.0}


def write_data(folder: Path, tasks: int, rows: int) -> None:
    """One file; the column `set` names a row's task."""
    draw = random.Random(7)
    for split, count in (("train", rows), ("test", 2)):
        lines = [
            {
                "set": f"task{task:04}",
                "text": " ".join(draw.choices(WORDS, k=12)),
                "label": draw.randrange(2),
            }
            for task in range(tasks)
            for _ in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def write_recipe(base: str, folder: Path, tasks: int) -> Path:
    """`folder/recipe.yaml`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder, tasks, max(2, STEPS * ROWS_A_STEP // tasks))
    template = {
        "description": "A word is there or not.", "prompt": "{{ text }}\nAnswer:", "label": "label",
        "choices": {"0": "no", "1": "yes"}, "metrics": ["accuracy"],
    }  # fmt: skip
    (folder / "word.yaml").write_text(json.dumps(template))
    recipe = {
        "base_model": base,
        "adapter": {"method": "mtl-lora", "rank": 8, "alpha": 16, "up_projections": 3},
        "tasks": [{"name": "all", "template": "word.yaml", "source": {"path": str(folder), "task_column": "set"}}],
        "training": {
            "max_steps": STEPS, "epochs": 99, "row_length": 64, "rows_per_step": ROWS_A_STEP, "rows_per_pass": ROWS_A_STEP,
            "rows": "one_task", "learning_rate": 1e-3, "checkpoint_every": None,
        },
        "run": {"name": f"t{tasks}", "directory": str(folder / "runs")},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


def command(*words: str, cwd: Path) -> float:
    """Seconds that a command takes, as a process of its own."""
    began = time.monotonic()
    call = [sys.executable, "-m", "mtl_lora_cli.cli.main", *words]
    ended = subprocess.run(call, cwd=cwd, capture_output=True, text=True, check=False)
    if ended.returncode:
        sys.exit(ended.stderr[-2000:])
    return time.monotonic() - began


def seconds_a_step(run: Path) -> float:
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return median(one["seconds"] for one in events if one["event"] == "step" and one["step"] > 5)


def loaded(run: Path) -> float:
    """Seconds in which the adapter is read and stands ready, libraries and base model apart."""
    from mtl_lora_cli.evaluation.opened import Run
    from mtl_lora_cli.runs.folder import RunFolder

    opened = Run(RunFolder(run))
    began = time.monotonic()
    assert len(opened.adapter.tasks) > 1
    return time.monotonic() - began


def profiled(run: Path, what: str, folder: Path) -> None:
    """Where the time goes."""
    from mtl_lora_cli.cli.main import command

    words = {
        "inspect": ["inspect", "--run", str(run), "--json"],
        "export": ["export", "--run", str(run), "--task", "all", "--no-check"],
    }[what]
    sys.argv = ["mtl-lora", *words]
    profile = cProfile.Profile()
    with suppress(SystemExit):
        profile.runcall(command)
    pstats.Stats(profile, stream=sys.stderr).sort_stats("cumulative").print_stats(70)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--profile", choices=("inspect", "export"))
    wanted = parser.parse_args()
    folder = wanted.folder.resolve()
    runs: dict[int, Path] = {}
    for tasks in (8, wanted.tasks):
        place = folder / f"tasks{tasks}"
        runs[tasks] = place / "runs" / f"t{tasks}"
        if not (runs[tasks] / "adapter").is_dir():
            shutil.rmtree(runs[tasks], ignore_errors=True)
            recipe = write_recipe(wanted.base, place, tasks)
            print(
                f"training with {tasks} tasks: {command('train', str(recipe), cwd=place):.1f} s in all",
                flush=True,
            )
    many = runs[wanted.tasks]
    if wanted.profile:
        shutil.rmtree(Path("exported") / many.name, ignore_errors=True)
        profiled(many, wanted.profile, folder)
        return
    steps = {tasks: seconds_a_step(run) for tasks, run in runs.items()}
    few, more = steps[8], steps[wanted.tasks]
    print(
        f"a step: {1000 * few:.1f} ms with 8 tasks, {1000 * more:.1f} ms with {wanted.tasks:,}: {more / few:.2f} times"
    )
    found = {"inspect": command("inspect", "--run", str(many), "--json", cwd=folder)}
    shutil.rmtree(folder / "exported", ignore_errors=True)
    found["export"] = command(
        "export", "--run", str(many), "--task", "all", "--no-check", cwd=folder
    )
    count: Any = len(list((folder / "exported" / many.name).iterdir()))
    assert count == wanted.tasks, count
    found["load"] = loaded(many)
    for name, seconds in found.items():
        print(
            f"{name}: {seconds:.2f} s, aim {AIMS[name]:g}: {'held' if seconds <= AIMS[name] else 'NOT HELD'}"
        )


if __name__ == "__main__":
    main()
