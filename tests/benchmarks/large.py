"""Rows beyond memory: how much memory, and how long, so many ad rows take; run by hand:

    python tests/benchmarks/large.py [--rows 1000000] [--base-model FOLDER] [--folder FOLDER]

Rows of the bundled `search_ads` sample are repeated, each with a number of its own. Every start is a process
of its own; the memory is the sum over it and its own processes of what each has for itself plus its share
of what several have (Pss), looked at ten times a second, with and without pages of files. With `--together` two
processes hold the same examples at once, and the sum shows that they share them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

SAMPLE = Path(__file__).parents[2] / "data_templates/samples/search_ads/train.jsonl"
MODEL = Path(__file__).parents[1] / "fixtures/model"
PROGRAM = """
import sys, time
from pathlib import Path
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.training import prepare as room
import mtl_lora_cli.data.collate
begun = time.perf_counter()
prepared = room.prepare(load_recipe(Path(sys.argv[1])))
ready = time.perf_counter()
data = prepared.data
dataset = data.dataset("answer")
batch = dataset.collate(data.mixture.step(0)[1])
first = time.perf_counter()
for number in range(1, 51):
    dataset.collate(data.mixture.step(number % prepared.total_steps)[1])
later = time.perf_counter()
print(f"{ready - begun:.2f} {first - begun:.2f} {(later - first) / 50:.4f} {len(data.splits[0])}", flush=True)
time.sleep(float(sys.argv[2]))
"""


def existing(text: str) -> Path:
    """A folder that is named as an option.

    Raises:
        argparse.ArgumentTypeError: there is none.
    """
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text}: no such folder")
    return Path(text)


def write_rows(path: Path, count: int) -> None:
    """So many rows, no two alike."""
    rows = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    with path.open("w", encoding="utf-8") as out:
        for number, row in enumerate(islice(cycle(rows), count)):
            out.write(json.dumps({**row, "query": f"{row['query']} {number}"}) + "\n")


def _tree(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            below = (task / "children").read_text(encoding="ascii").split()
            found += [one for child in below for one in _tree(int(child))]
    except OSError:
        pass
    return found


def memory(pids: list[int]) -> tuple[float, float]:
    """MiB of some processes and those below them: all of it, and without pages of files."""
    whole, own = 0, 0
    for pid in [one for each in pids for one in _tree(each)]:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
        except OSError:
            continue
        values = {line.split(":")[0]: line.split()[1] for line in text.splitlines()[1:]}
        whole, own = whole + int(values["Pss"]), own + int(values["Pss_Anon"])
    return whole / 1024, own / 1024


def start(recipe: Path, environment: dict[str, str], count: int = 1, hold: float = 0.0) -> None:
    """Processes that prepare the recipe, and what they took."""
    command = [sys.executable, "-c", PROGRAM, str(recipe), str(hold)]
    begun = time.perf_counter()
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    peak = (0.0, 0.0)
    while any(one.poll() is None for one in running):
        now = memory([one.pid for one in running])
        peak = max(peak[0], now[0]), max(peak[1], now[1])
        time.sleep(0.1)
    whole = time.perf_counter() - begun
    for one in running:
        said = one.communicate()[0].split()
        prepared, first, step, rows = (float(value) for value in said)
        print(
            f"  {rows:,.0f} examples, prepared in {prepared:.2f} s ({rows / prepared:,.0f} rows/s), first "
            f"step's batch after {first:.2f} s, later ones {step * 1000:.1f} ms; whole process {whole:.1f} s"
        )
    print(
        f"  peak {peak[0]:,.0f} MiB in all processes, {peak[1]:,.0f} without pages of files",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--base-model", default=str(MODEL))
    parser.add_argument("--row-length", type=int, default=4096)
    parser.add_argument("--folder", type=existing)
    parser.add_argument("--together", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        write_rows(folder / "train.jsonl", arguments.rows)
        recipe = folder / "recipe.yaml"
        recipe.write_text(
            f"base_model: {arguments.base_model}\n"
            "tasks: [{name: ads, template: samples/search_ads, source: {path: train.jsonl}}]\n"
            f"training: {{row_length: {arguments.row_length}, epochs: 1}}\n",
            encoding="utf-8",
        )
        environment = {**os.environ, "MTL_LORA_CACHE": str(folder / "cache")}
        print("first start", flush=True)
        start(recipe, environment)
        print("second start", flush=True)
        start(recipe, environment)
        if arguments.together:
            print("two processes at once", flush=True)
            start(recipe, environment, count=2, hold=2.0)
        kept = sum(file.stat().st_size for file in (folder / "cache" / "encoded").iterdir())
        print(f"kept on disk: {kept / arguments.rows:,.0f} bytes a row")


if __name__ == "__main__":
    main()
