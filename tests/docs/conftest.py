"""A folder that holds what the pages speak of: runs, recipes, rows, all of them tiny."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import pytest

from mtl_lora_cli.cli.app import app

Row = dict[str, Any]

RECIPE = """\
tasks:
  - {{name: piqa, template: commonsense/piqa, source: my/piqa}}
  - {{name: sst2, template: glue/sst2, source: my/sst2}}
  - {{name: rte, template: glue/rte, source: my/rte}}
  - {{name: uses, template: samples/uses, max_examples: 8}}
base_model: {base_model}
training: {{max_steps: 4, row_length: 256, rows_per_step: 1, checkpoint_every: 2}}
"""
ADDED = """\
tasks: [{name: animals, template: samples/animals, max_examples: 8}]
training: {max_steps: 2}
"""
# What a model's folder must have for `doctor` to estimate a step.
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
THINGS = ("a cup", "a lamp", "a river", "a drum", "a pebble", "a mitten", "a kettle", "a ladder")


def rows() -> dict[str, list[Row]]:
    """Folder of a data set → its rows, in the fields that its template reads."""
    count = range(len(THINGS))
    commonsense = [
        {
            "instruction": f"Please answer with true or false, question: is {thing} heavy?\n\n"
            "Answer format: true/false",
            "input": "",
            "output": f"the correct answer is {'true' if index % 2 else 'false'}",
            "answer": "true" if index % 2 else "false",
        }
        for index, thing in enumerate(THINGS)
    ]
    sst2 = [{"sentence": f"it has {thing} in it", "label": i % 2} for i, thing in enumerate(THINGS)]
    rte = [
        {"idx": i, "sentence1": f"There is {THINGS[i]}.", "sentence2": "It is.", "label": i % 2}
        for i in count
    ]
    piqa = [
        {"goal": f"Find {THINGS[i]}.", "sol1": "Look for it.", "sol2": "Sleep.", "label": i % 2}
        for i in count
    ]
    grades = ("irrelevant", "partial", "relevant")
    ads = [{"query": "lamp", "product_title": THINGS[i], "label": grades[i % 3]} for i in count]
    return {
        "my/piqa": piqa,
        "my/sst2": sst2,
        "my/rte": rte,
        "data/glue/sst2": sst2,
        "data/glue/rte": rte,
        "data/commonsense/boolq": commonsense,
        "data/ads/home_depot": ads,
        "data/commonsense_170k": [{**row, "task_id": i % 2} for i, row in enumerate(commonsense)],
    }


def unlabelled() -> dict[str, list[Row]]:
    """File of rows to predict → its rows."""
    sentences = [{"sentence": f"it has {thing} in it"} for thing in THINGS]
    pairs = [{"idx": i, "sentence1": "There is one.", "sentence2": "It is."} for i in range(3)]
    both = {"question": "Is a cup an animal?", "goal": "Drink.", "sol1": "A cup.", "sol2": "A hat."}
    mixed = [{"task": "sst2", **sentences[0]}, {"task": "rte", **pairs[0]}]
    return {
        "questions.jsonl": [both] * 3,
        "test.jsonl": pairs,
        "mixed.jsonl": mixed,
        "rows/mixed.jsonl": mixed,
    }


@contextmanager
def inside(folder: Path, cache: Path, stories: Path) -> Iterator[None]:
    """The commands' environment: this working directory, no hub, a cache of its own."""
    before = dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        os.environ.pop("MTL_LORA_RUNS", None)
        os.environ |= {
            "HF_HUB_OFFLINE": "1",
            "MTL_LORA_CACHE": str(cache),
            "MTL_LORA_DATA": str(folder / "data"),
            "MTL_LORA_STORIES": str(stories),
        }
        yield
    os.environ.clear()  # the commands' frame sets variables for its own process
    os.environ.update(before)


def code_of(arguments: list[str], stdin: TextIO | None = None) -> int:
    """Run `mtl-lora` inside this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as leaving:
        patch.setattr("sys.stdin", stdin)
        patch.setattr("sys.argv", ["mtl-lora", *arguments])  # what --num-processes hands on
        app(arguments, prog_name="mtl-lora")
    return int(leaving.value.code or 0)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def workshop(stories_folder: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder. Its runs are one of four steps in four bits, `mine`, and what is made of it:
    `other-run` and `nf4` are copies, `both` is stopped at its second step."""
    folder = tmp_path_factory.mktemp("workshop")
    for name, data in rows().items():
        (folder / name).mkdir(parents=True)
        for split in ("train", "test"):
            _write_rows(folder / name / f"{split}.jsonl", data)
    (folder / "rows").mkdir()
    for name, data in unlabelled().items():
        _write_rows(folder / name, data)
    (folder / "reviews.csv").write_text("sentence\na joy\ntwo lost hours\n", encoding="utf-8")
    (folder / "models" / "llama-3-8b").mkdir(parents=True)
    config = folder / "models" / "llama-3-8b" / "config.json"
    config.write_text(json.dumps(LLAMA), encoding="utf-8")
    (folder / "recipe.yaml").write_text(
        RECIPE.format(base_model=stories_folder.resolve()), encoding="utf-8"
    )
    (folder / "new.yaml").write_text(ADDED, encoding="utf-8")
    with inside(folder, cache, stories_folder.resolve()):
        assert code_of(["train", "recipe.yaml", "run.name=mine", "quantization=nf4"]) == 0
    mine = folder / "runs" / "mine"
    for name in ("other-run", "nf4", "both"):
        shutil.copytree(mine, mine.with_name(name))
    shutil.rmtree(mine.with_name("both") / "adapter")
    shutil.rmtree(mine.with_name("both") / "checkpoints" / "step-000004")
    return folder


def _write_rows(path: Path, data: list[Row]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in data), encoding="utf-8")
