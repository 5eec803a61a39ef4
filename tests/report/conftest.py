"""A real run: two real tasks and one whose rows are full of markup, on the tiny model, evaluated twice."""

from __future__ import annotations

import gzip
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mtl_lora_cli.evaluation.evaluate import Setting, evaluate
from mtl_lora_cli.evaluation.opened import open_run
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.report.facts import gather
from mtl_lora_cli.runs.folder import RunFolder
from mtl_lora_cli.training import run as training
from mtl_lora_cli.training.prepare import prepare

STEPS, ROWS = 14, 30
TASKS = ("sst2", "rte", "markup")
HOSTILE = "<script>document.title = 'taken'</script></details></td>&amp; \"'{{ 1 }} $x$ ☃"
RECIPE = """\
base_model: {base_model}
adapter: {{rank: 4, target_modules: [q_proj, v_proj]}}
tasks:
  - {{name: sst2, template: glue/sst2, source: sst2}}
  - {{name: rte, template: glue/rte, source: rte, max_examples: 40}}
  - {{name: markup, template: markup.yaml, source: markup}}
mixing: {{temperature: 2}}
training:
  epochs: 100
  max_steps: {steps}
  learning_rate: 1.0e-2
  row_length: 256
  rows_per_step: 2
  on_overflow: truncate_prompt
  checkpoint_every: 5
  validation: {{every: 5, examples: 10}}
  diagnose: {{every: 4}}
run: {{name: real}}
"""
TEMPLATE = """\
description: Is a word there twice?
prompt: "{{ text }} {{ word }}?"
label: label
choices: {yes: "yes <b>", no: "no"}
"""


def _write_data(root: Path, data_folder: Path) -> None:
    for task in ("sst2", "rte"):
        (root / task).mkdir()
        for split, count in (("train", 60), ("validation", ROWS)):
            with gzip.open(data_folder / "glue" / task / f"{split}.jsonl.gz", "rt") as rows:
                text = "".join(itertools.islice(rows, count))
            (root / task / f"{split}.jsonl").write_text(text, encoding="utf-8")
    (root / "markup").mkdir()
    for split, words in (("train", "abcdef"), ("test", "ghij")):
        rows = [
            {"text": HOSTILE, "word": word, "label": label}
            for word in words
            for label in ("yes", "no")
        ]
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        (root / "markup" / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    (root / "markup.yaml").write_text(TEMPLATE, encoding="utf-8")


@pytest.fixture(scope="session")
def recipe_file(
    data_folder: Path, stories_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """The recipe with its data beside it, and a cache of its own."""
    root = tmp_path_factory.mktemp("report")
    _write_data(root, data_folder)
    path = root / "recipe.yaml"
    content = RECIPE.format(base_model=stories_folder.resolve(), steps=STEPS)
    path.write_text(content, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTL_LORA_CACHE", str(root / "cache"))
        yield path


@pytest.fixture(scope="session")
def run(recipe_file: Path) -> RunFolder:
    """The finished run with results of the base model and of the adapter. Not to be changed."""
    folder = training.start(prepare(load_recipe(recipe_file)), recipe_file.parent / "runs" / "real")
    opened = open_run(folder)
    for base_only in (True, False):
        evaluate(opened, opened.tasks, Setting(base_only=base_only))
    return folder


@pytest.fixture(scope="session")
def facts(run: RunFolder) -> dict[str, Any]:
    """Of that run."""
    return gather([run])


@pytest.fixture
def copied(run: RunFolder, tmp_path: Path) -> Callable[..., RunFolder]:
    """`copied(name)` is a copy of the run that a test may change."""

    def copy(name: str = "copy") -> RunFolder:
        return RunFolder(shutil.copytree(run.path, tmp_path / "runs" / name))

    return copy
