"""Memory does not grow with the rows: a hundred thousand of them, read, encoded and planned in some megabytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROWS = 100_000
PROGRAM = """
import sys, threading
from pathlib import Path
from mtl_lora_cli.data import large_files
from mtl_lora_cli.data.prepare import bind_tasks, prepare_training
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import load_tokenizer
from mtl_lora_cli.recipe.load import load_recipe

def own():
    "Bytes of this process and those below it that are no pages of files."
    below = Path("/proc/self/task").glob("*/children")
    found = ["self", *(one for file in below for one in file.read_text().split())]
    total = 0
    for process in found:
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss_Anon"))
    return total

large_files.LARGE = 2**20
loaded = load_recipe(Path(sys.argv[1]))
base = find_base_model(loaded.recipe.base_model)
tokenizer = load_tokenizer(base)
tasks = bind_tasks(loaded)
before, most, ended = own(), 0, threading.Event()

def look():
    global most
    while not ended.wait(0.1):
        most = max(most, own())

looking = threading.Thread(target=look)
looking.start()
data = prepare_training(tasks, loaded.recipe, tokenizer, 512)
data.mixture.step(0)
ended.set()
looking.join()
print(before, max(most, own()), len(data.splits[0]), data.audits[0].repeated)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_hundred_thousand_rows_take_no_more_than_a_few_pieces_of_them(
    tmp_path: Path, stories_folder: Path
) -> None:
    """A row took 12.7 kB before: 1.27 GB in all. 100 MiB are for pieces in five processes at most."""
    (tmp_path / "own.yaml").write_text(
        "description: d\nprompt: '{{ text }}'\nlabel: label\nchoices: {0: 'no', 1: 'yes'}\n"
    )
    with (tmp_path / "train.jsonl").open("w", encoding="utf-8") as out:
        for number in range(ROWS):
            out.write(json.dumps({"text": f"is {number // 2} so", "label": number % 2}) + "\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"base_model: {stories_folder}\n"
        "tasks: [{name: own, template: own.yaml, source: {path: train.jsonl}}]\n"
    )
    environment = {**os.environ, "MTL_LORA_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(recipe)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    before, most, rows, repeated = map(int, done.stdout.split())
    assert (rows, repeated) == (ROWS, 0)
    assert most - before < 100 * 2**20
