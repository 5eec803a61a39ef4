"""The base model and one fine-tuned run over all tasks of a recipe, with intervals; run by hand:

    python tests/benchmarks/tables.py real-17 OUTPUT [key.path=value …] [--limit N]

Trains the recipe, scores all of its tasks without and with the adapter by `mtl-lora` itself, and writes
OUTPUT.json (everything that `eval --json` prints, without the rows) and OUTPUT.md (the table). On one H100
SmolLM2-135M takes minutes; runs lie in OUTPUT.runs, and a call that was stopped goes on there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RUN = "tuned"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("output", type=Path)
    parser.add_argument("changes", nargs="*", metavar="key.path=value")
    parser.add_argument("--limit", type=int, help="of each task's test rows; default: all")
    arguments = parser.parse_args()
    runs = arguments.output.with_suffix(".runs").absolute()
    seconds = {"train": _train(runs, arguments.recipe, arguments.changes)}
    options = [] if arguments.limit is None else ["--limit", str(arguments.limit)]
    found = {}
    for name, more in (("base", ["--base-only"]), ("tuned", [])):
        began = time.monotonic()
        call = ["eval", "--run", str(runs / RUN), "--task", "all", "--json", *more, *options]
        found[name] = json.loads(_run(call))
        seconds[name] = time.monotonic() - began
    environment = json.loads((runs / RUN / "environment.json").read_text(encoding="utf-8"))
    content = {
        "recipe": arguments.recipe,
        "changes": arguments.changes,
        "seconds": seconds,
        "environment": environment,
        **found,
    }
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    arguments.output.with_suffix(".json").write_text(text, encoding="utf-8")
    arguments.output.with_suffix(".md").write_text(_table(content), encoding="utf-8")
    print(_table(content))
    print({name: round(value, 1) for name, value in seconds.items()}, file=sys.stderr)


def _train(runs: Path, recipe: str, changes: list[str]) -> float:
    began = time.monotonic()
    if (runs / RUN / "adapter").is_dir():
        return 0.0
    where = ["--runs", str(runs)]
    if (runs / RUN).is_dir():
        _run(["train", "--resume", "--run", str(runs / RUN)])
    else:
        _run(["train", recipe, *changes, f"run.name={RUN}", *where])
    return time.monotonic() - began


def _run(arguments: list[str]) -> str:
    command = [sys.executable, "-m", "mtl_lora_cli.cli.main", *arguments]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if finished.returncode:
        sys.exit(finished.returncode)
    return finished.stdout


def _table(content: dict[str, Any]) -> str:
    """A row for each task and its first metric, and the averages."""
    lines = [
        "| task | rows | metric | base | fine-tuned | 95 % interval | difference | p | majority |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in content["tuned"]["results"]:
        name, own = next(iter(result["metrics"].items()))
        base = result["base"]
        apart = base["paired"][name]
        lines.append(
            f"| {result['task']} | {result['examples']:,} {result['split']} | {name} "
            f"| {_shown(base['metrics'][name]['value'])} | {_shown(own['value'])} "
            f"| {_shown(own['low'])} – {_shown(own['high'])} "
            + (
                "| | "
                if apart is None
                else f"| {apart['difference']:+.3f} ({apart['low']:+.3f} – {apart['high']:+.3f}) "
                f"| {apart['p']:.2g} "
            )
            + f"| {_shown(result['majority'])} |"
        )
    for mean in content["tuned"]["averages"]:
        lines.append(
            f"| **{mean['name']}** | {mean['tasks']} of {mean['of']} | | {_shown(mean['other'])} "
            f"| {_shown(mean['value'])} | {_shown(mean['low'])} – {_shown(mean['high'])} "
            f"| {_signed(mean['difference'])} ({_signed(mean['difference_low'])} – "
            f"{_signed(mean['difference_high'])}) | {mean['p']:.2g} | |"
        )
    return "\n".join(lines) + "\n"


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.3f}"


if __name__ == "__main__":
    main()
