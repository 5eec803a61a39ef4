"""Two sets of conversations beside three classification tasks, and the same tasks without the conversations.

    python tests/benchmarks/conversation_mixture.py BASE DATA INSTRUCT OUT

BASE is a base model with a chat template, an alias, a folder or a GGUF file; DATA the folder of docs/real-data.md;
INSTRUCT holds `alpaca_en_demo.json` and `v1_sft_demo.jsonl` of LLaMA-Factory's source archive. Printed are each task's
held-out loss before the first step and at the end, the scores of the classification tasks in both runs, which see
the same examples of them, with their paired difference on the same rows, and how many of some held-out conversations
the exported PEFT folder answers as `predict` does, both in float32, in a process that has transformers and PEFT alone
(`peft_answers.py`). Where they part, how far apart the two tokens were there is printed.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mtl_lora_cli.models.base import find_base_model

NEW_TOKENS = 64
TALKS = {
    "alpaca": ("alpaca_en_demo.json", "instruct/alpaca"),
    "talks": ("v1_sft_demo.jsonl", "instruct/messages"),
}
CLASSES = {
    "rte": ("glue/rte", "glue/rte"),
    "sst2": ("glue/sst2", "glue/sst2"),
    "boolq": ("commonsense/boolq", "commonsense/llm_adapters"),
}


def started(place: Path, *arguments: str) -> subprocess.Popen[str]:
    """A command of mtl-lora, as a process of its own."""
    print("$ mtl-lora", *arguments, flush=True)
    return subprocess.Popen(
        [sys.executable, "-m", "mtl_lora_cli.cli.main", *arguments],
        cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(process: subprocess.Popen[str], began: float) -> str:
    """What it printed."""
    output, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"{process.args}: {process.returncode}\n{errors[-3000:]}")
    print(f"  {time.perf_counter() - began:.0f} s", flush=True)
    return output


def commands(place: Path, *several: tuple[str, ...]) -> list[str]:
    """Some at once where there is a card, one after the other where there is none."""
    began = time.perf_counter()
    if torch.cuda.is_available():
        running = [started(place, *one) for one in several]
        return [ended(one, began) for one in running]
    return [ended(started(place, *one), began) for one in several]


def write_rows(wanted: argparse.Namespace, place: Path) -> None:
    """Each set's rows as train and test, shuffled with a seed."""
    for name, (file, _) in TALKS.items():
        text = (wanted.instruct / file).read_text(encoding="utf-8")
        rows = json.loads(text) if file.endswith(".json") else [*map(json.loads, text.splitlines())]
        random.Random(0).shuffle(rows)
        (place / name).mkdir(exist_ok=True)
        for split, some in (
            ("test", rows[: wanted.held_out]),
            ("validation", rows[: wanted.held_out]),
            ("train", rows[wanted.held_out :]),
        ):
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some)
            (place / name / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def recipe(wanted: argparse.Namespace, place: Path, name: str, *, talks: bool) -> str:
    """The recipe's path: the classification tasks, and the conversations where they are asked for."""
    tasks: list[dict[str, Any]] = [
        {
            "name": task,
            "template": template,
            "source": {"path": str((wanted.data / path).resolve()), "splits": splits_of(task)},
            "max_examples": wanted.examples,
        }
        for task, (path, template) in CLASSES.items()
    ]
    if talks:
        tasks += [
            {"name": task, "template": template, "source": str(place / task)}
            for task, (_, template) in TALKS.items()
        ]
    content = {
        "base_model": wanted.base,
        "prompt_format": "chat",
        "dtype": wanted.dtype,
        "adapter": {
            "rank": 8,
            "target_modules": [f"{p}_proj" for p in ("q", "k", "v", "o", "gate", "up", "down")],
        },
        "tasks": tasks,
        "training": {
            "epochs": wanted.epochs,
            "learning_rate": 2e-3,
            "row_length": 1024,
            "rows_per_step": wanted.rows,
            "on_overflow": "drop",
            "validation": {
                "every": 10_000,
                "before": True,
                "examples": wanted.looked_at,
                "metric": False,
            },
        },
        "run": {"name": name},
    }
    (place / f"{name}.yaml").write_text(json.dumps(content), encoding="utf-8")
    return f"{name}.yaml"


def splits_of(task: str) -> dict[str, str]:
    """The held-out rows of each are those that are looked at, too."""
    held = "test.jsonl.gz" if task == "boolq" else "validation.jsonl.gz"
    return {"train": "train.jsonl.gz", "validation": held, "test": held}


def losses(run: Path) -> dict[str, tuple[float, float]]:
    """Each task's held-out loss before the first step and at the end."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    looks = [one for one in map(json.loads, lines) if one["event"] == "validation"]
    first, last = looks[0]["loss"], looks[-1]["loss"]
    return {task: (first[task], last[task]) for task in first}


def same_answers(wanted: argparse.Namespace, place: Path) -> dict[str, Any]:
    """How many answers of `predict` in float32 transformers and PEFT give with the exported adapter."""
    from mtl_lora_cli.evaluation.opened import open_run
    from mtl_lora_cli.evaluation.predict import Predictor
    from mtl_lora_cli.runs.folder import find_run

    opened = open_run(find_run("both", place / "runs")).but(in_float32=True)
    predictor: Any = Predictor(opened)
    rows = []
    for task in TALKS:
        lines = (place / task / "test.jsonl").read_text(encoding="utf-8").splitlines()
        rows += [{**json.loads(line), "of": task} for line in lines[: wanted.asked]]
    said = predictor.predict(rows, task_column="of")
    found: dict[str, Any] = {}
    for task in TALKS:
        own = [one for one in said if one["task"] == task]
        asked = [{"messages": one["messages"][:-1], "answer": one["answer"]} for one in own]
        (place / f"{task}-asked.json").write_text(json.dumps(asked), encoding="utf-8")
        program = Path(__file__).with_name("peft_answers.py")
        done = subprocess.run(
            [sys.executable, str(program), str(opened.base.folder), str(place / f"out-{task}"),
             str(place / f"{task}-asked.json"), str(NEW_TOKENS)],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{program.name}: {done.stderr[-3000:]}")
        found[task] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    for name in ("data", "instruct", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--examples", type=int, default=1500, help="of each classification task")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--rows", type=int, default=4, help="of 1,024 tokens a step")
    parser.add_argument("--dtype", default="auto", help="bfloat16 is quicker on most CPUs, too")
    parser.add_argument("--held-out", type=int, default=64, help="conversations of each set")
    parser.add_argument(
        "--asked", type=int, default=16, help="conversations of each set, answered twice"
    )
    parser.add_argument("--looked-at", type=int, default=200, help="held-out rows of a loss")
    parser.add_argument("--limit", type=int, default=800, help="held-out rows that are scored")
    wanted = parser.parse_args()
    place: Path = wanted.out
    place.mkdir(parents=True, exist_ok=True)
    if Path(wanted.base).exists():
        wanted.base = str(Path(wanted.base).resolve())
    write_rows(wanted, place)
    find_base_model(wanted.base)  # a GGUF file is converted once
    both = recipe(wanted, place, "both", talks=True)
    commands(place, ("train", both), ("train", recipe(wanted, place, "classes", talks=False)))
    found: dict[str, Any] = {"loss": losses(place / "runs" / "both")}
    print(json.dumps(found), flush=True)
    asked = ("--task", "all", "--limit", str(wanted.limit), "--json", "--baseline", "classes")
    exports = [
        ("export", "--run", "both", "--task", task, "--format", "peft", "--output", f"out-{task}")
        for task in TALKS
    ]
    (output,) = commands(place, ("eval", "--run", "both", *asked))
    told = json.loads(output)
    for one in told["results"]:
        if one["task"] not in CLASSES:
            continue
        metric, value = next(iter(one["metrics"].items()))
        pair = one["beside"]["paired"][metric]
        found[one["task"]] = {
            "metric": metric,
            "both": value["value"],
            "alone": one["beside"]["metrics"][metric]["value"],
            "difference": [pair["difference"], pair["low"], pair["high"]],
        }
    print(json.dumps(found), flush=True)
    commands(place, *exports)
    found["same_answers"] = same_answers(wanted, place)
    (place / "conversation_mixture.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(
        "| task | held-out loss before | after | without conversations | with | difference |\n|-|-|-|-|-|-|"
    )
    for task, (before, after) in found["loss"].items():
        cells = [f"{before:.3f}", f"{after:.3f}"]
        own = found.get(task)
        if own is not None:
            low, high = own["difference"][1:]
            cells += [
                f"{own['alone']:.3f}",
                f"{own['both']:.3f}",
                f"{own['difference'][0]:+.3f} ({low:+.3f} – {high:+.3f})",
            ]
        print(f"| {task} | {' | '.join(cells)} |")
    for task, one in found["same_answers"].items():
        print(
            f"{task}: {one['same']} of {one['of']} the same answers in transformers and PEFT; parted:"
        )
        for other in one["parted"]:
            print("  ", json.dumps(other, ensure_ascii=False))


if __name__ == "__main__":
    main()
