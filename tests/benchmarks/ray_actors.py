"""Two actors of Ray on this host beside one: rows a second, and the same files.

    python tests/benchmarks/ray_actors.py MODEL DATA FOLDER --rows 4000

MODEL, DATA and the rows are those of predicting.py. Rows a second are those between the first part that is done and the last
one: starting Ray and loading the model is not among them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from predicting import make_run, real_rows, write_rows

from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.prediction.desks import How
from mtl_lora_cli.prediction.order import Order, opened_work
from mtl_lora_cli.prediction.ray_actors import answers_of
from mtl_lora_cli.runs.folder import RunFolder


def rate(folder: RunFolder, rows: Path, output: Path, actors: int, part_rows: int) -> float:
    """Rows a second of so many actors."""
    order = Order(rows, output, How(task_column="task"), {}, part_rows=part_rows)
    times: list[float] = []
    done: list[int] = []
    with opened_work(Run(folder), order) as work:
        for one in answers_of(work.job, work.missing, address="local", actors=actors):
            work.follow([one])
            times.append(time.perf_counter())
            done.append(one.rows)
        work.finish()
    return sum(done[actors:]) / (times[-1] - times[actors - 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--part-rows", type=int, default=100)
    parser.add_argument("--times", type=int, default=2)
    wanted = parser.parse_args()
    folder = RunFolder(wanted.folder / "run")
    make_run(wanted.model, folder)
    write_rows(real_rows(wanted.data, wanted.rows), wanted.folder / "rows", 1)
    for turn in range(wanted.times):
        rates, outputs = [], []
        for actors in (1, 2):
            output = wanted.folder / f"answers-{turn}-{actors}"
            rows = wanted.folder / "rows" / "jsonl"
            rates.append(rate(folder, rows, output, actors, wanted.part_rows))
            outputs.append({p.name: p.read_bytes() for p in sorted(output.glob("*.jsonl"))})
        same = {k: v for k, v in outputs[0].items() if k[0] != "_"} == {
            k: v for k, v in outputs[1].items() if k[0] != "_"
        }
        one, two = rates
        print(
            f"one actor {one:,.0f} rows/s, two {two:,.0f}: {two / one:.2f} times; the same files: {same}",
            flush=True,
        )


if __name__ == "__main__":
    main()
