"""Two sets of conversations beside three classification tasks, and the same tasks without the conversations.

    python tests/benchmarks/conversation_mixture.py BASE DATA INSTRUCT OUT

BASE is a base model with a chat template, an alias, a folder or a GGUF file; DATA the folder of docs/real-data.md;
INSTRUCT holds `alpaca_en_demo.json` and `v1_sft_demo.jsonl` of LLaMA-Factory's source archive. Printed are each task's
held-out loss before the first step and at the end, the scores of the classification tasks in both runs with their
paired difference on the same rows, and how many of some held-out conversations the exported PEFT folder answers in
transformers, token by token in float32, as `predict` does.
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

HELD_OUT = 64
ASKED = 8
TALKS = {
    "alpaca": ("alpaca_en_demo.json", "instruct/alpaca"),
    "talks": ("v1_sft_demo.jsonl", "instruct/messages"),
}
CLASSES = {
    "rte": ("glue/rte", "glue/rte"),
    "sst2": ("glue/sst2", "glue/sst2"),
    "boolq": ("commonsense/boolq", "commonsense/llm_adapters"),
}


def command(place: Path, *arguments: str) -> str:
    """A command of mtl-lora, as a process of its own."""
    print("$ mtl-lora", *arguments, flush=True)
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "mtl_lora_cli.cli.main", *arguments],
        cwd=place, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {done.returncode}\n{done.stderr[-3000:]}")
    print(f"  {time.perf_counter() - started:.0f} s", flush=True)
    return done.stdout


def write_rows(wanted: argparse.Namespace, place: Path) -> None:
    """Each set's rows as train and test, shuffled with a seed."""
    for name, (file, _) in TALKS.items():
        text = (wanted.instruct / file).read_text(encoding="utf-8")
        rows = json.loads(text) if file.endswith(".json") else [*map(json.loads, text.splitlines())]
        random.Random(0).shuffle(rows)
        (place / name).mkdir(exist_ok=True)
        for split, some in (
            ("test", rows[:HELD_OUT]),
            ("validation", rows[:HELD_OUT]),
            ("train", rows[HELD_OUT:]),
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
        "adapter": {
            "rank": 8,
            "target_modules": [f"{p}_proj" for p in ("q", "k", "v", "o", "gate", "up", "down")],
        },
        "tasks": tasks,
        "training": {
            "epochs": wanted.epochs,
            "learning_rate": 2e-3,
            "row_length": 1024,
            "rows_per_step": 4,
            "on_overflow": "drop",
            "validation": {"every": 10_000, "before": True, "examples": 200, "metric": False},
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


def same_answers(wanted: argparse.Namespace, place: Path) -> tuple[int, int]:
    """Answers of `predict` in float32 that transformers' generate gives with the exported adapter, of how many."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mtl_lora_cli.evaluation.opened import open_run
    from mtl_lora_cli.evaluation.predict import Predictor
    from mtl_lora_cli.runs.folder import find_run

    command(
        place, "export", "--run", "both", "--task", "talks", "--format", "peft", "--output", "out"
    )
    opened = open_run(find_run("both", place / "runs")).but(in_float32=True)
    predictor: Any = Predictor(opened)
    base = opened.base.folder
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(device)
    model = peft.PeftModel.from_pretrained(model, place / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    lines = (place / "talks" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:ASKED]
    right = 0
    for row in map(json.loads, lines):
        said = predictor.predict([row], task="talks")[0]
        ids = tokenizer.apply_chat_template(
            said["messages"][:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"].to(device)
        with torch.no_grad():
            whole = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=64,
                do_sample=False, pad_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        theirs = tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True).strip()
        right += said["answer"] == theirs
        if said["answer"] != theirs:
            print("differs:", repr(said["answer"])[:200], repr(theirs)[:200], flush=True)
    return right, len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    for name in ("data", "instruct", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--examples", type=int, default=1500, help="of each classification task")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--limit", type=int, default=800, help="held-out rows that are scored")
    wanted = parser.parse_args()
    place: Path = wanted.out
    place.mkdir(parents=True, exist_ok=True)
    if Path(wanted.base).exists():
        wanted.base = str(Path(wanted.base).resolve())
    write_rows(wanted, place)
    command(place, "train", recipe(wanted, place, "both", talks=True))
    found: dict[str, Any] = {"loss": losses(place / "runs" / "both")}
    print(json.dumps(found), flush=True)
    command(place, "train", recipe(wanted, place, "classes", talks=False))
    asked = ("--task", "all", "--limit", str(wanted.limit), "--json")
    told = json.loads(command(place, "eval", "--run", "both", *asked, "--baseline", "classes"))
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
    print("the same answers in transformers:", "{} of {}".format(*found["same_answers"]))


if __name__ == "__main__":
    main()
