"""How fast a large mixture is read, rendered, encoded and packed; run by hand:

    python tests/benchmarks/data.py FOLDER [--rows 170000] [--base-model smollm2-135m]

FOLDER holds the eight commonsense tasks in the LLM-Adapters format. Their rows are repeated, each
with a number of its own, until there are enough. Prints seconds, rows a second and the padding.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=170_000)
    parser.add_argument("--base-model", default="smollm2-135m")
    parser.add_argument("--row-length", type=int, default=4096)
    arguments = parser.parse_args()

    from mtl_lora_cli.data.mixture import positions_of
    from mtl_lora_cli.recipe.load import load_recipe
    from mtl_lora_cli.runs.paths import cache_folder
    from mtl_lora_cli.training.prepare import prepare

    files = sorted(arguments.folder.glob("*/train.jsonl.gz"))
    lines = [line for file in files for line in gzip.decompress(file.read_bytes()).splitlines()]
    real = [json.loads(line) for line in lines]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "train.jsonl").open("w", encoding="utf-8") as out:
            for number, row in enumerate(islice(cycle(real), arguments.rows)):
                out.write(
                    json.dumps({**row, "instruction": f"{number}. {row['instruction']}"}) + "\n"
                )
        recipe = folder / "recipe.yaml"
        recipe.write_text(
            f"base_model: {arguments.base_model}\n"
            "tasks: [{name: commonsense, template: llm_adapters, source: train.jsonl}]\n"
            f"training: {{row_length: {arguments.row_length}}}\n",
            encoding="utf-8",
        )
        models = cache_folder() / "models"
        os.environ["MTL_LORA_CACHE"] = str(folder / "cache")
        (folder / "cache").mkdir()
        (folder / "cache" / "models").symlink_to(models)  # converted before, and not timed
        prepare(load_recipe(recipe, ["tasks.0.max_examples=2"]))  # imports are not timed
        for what in ("first start", "second start"):
            started = time.perf_counter()
            prepared = prepare(load_recipe(recipe))
            seconds = time.perf_counter() - started
            print(f"{what}: {seconds:.2f} s, {arguments.rows / seconds:,.0f} rows/s")
        mixture = prepared.data.mixture
        started = time.perf_counter()
        rows = mixture.epoch(1)
        seconds = time.perf_counter() - started
        taken = [positions_of(n) for n in prepared.data.splits[0].lengths.tolist()]
        share = 1 - sum(taken) / (len(rows) * arguments.row_length)
        print(f"packing an epoch: {seconds:.2f} s, {len(rows):,} rows, {share:.3%} padding")


if __name__ == "__main__":
    main()
