"""The tiny real model with an adapter far from its start, and real rows of three tasks to score."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import pytest
import torch

from mtl_lora_cli.adapters.files import save_adapter
from mtl_lora_cli.adapters.inject import inject
from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.data.examples import Examples
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.evaluation.requests import Request, build_requests
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import load_model, load_tokenizer
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.recipe.load import dump_recipe
from mtl_lora_cli.recipe.schema import Recipe
from mtl_lora_cli.recipe.source import Source
from mtl_lora_cli.runs.folder import RunFolder, save_json
from mtl_lora_cli.tasks.registry import find_template
from mtl_lora_cli.tasks.rendering import Example, Renderer
from mtl_lora_cli.tasks.task import Task

# Two choices of different length; three of which two begin alike; sentences of four and more words.
TASKS = {
    "sst2": "glue/sst2/validation",
    "home_depot": "ads/home_depot/test",
    "llm_adapters": "commonsense/openbookqa/test",
    "stsb": "glue/stsb/validation",
}


@pytest.fixture(scope="session")
def packed(stories_folder: Path) -> PackedModel:
    base = find_base_model(str(stories_folder))
    torch.manual_seed(0)
    model = load_model(base, dtype=torch.float32, device=torch.device("cpu"))
    adapter = inject(model, configure(target_modules=("*_proj",)), tuple(TASKS))
    with torch.no_grad():
        for tensor in adapter.tensors().values():
            tensor.add_(0.05 * torch.randn_like(tensor))
    return PackedModel(model, adapter).eval()


@pytest.fixture(scope="session")
def examples(data_folder: Path) -> dict[str, list[Example]]:
    """Six rendered rows of each task."""
    found = {}
    for name, file in TASKS.items():
        _, _, template = find_template(name, None)
        renderer = Renderer(template, name)
        with gzip.open(data_folder / f"{file}.jsonl.gz", "rt", encoding="utf-8") as rows:
            found[name] = [
                renderer.render(json.loads(row), name) for row in itertools.islice(rows, 6)
            ]
    return found


@pytest.fixture(scope="session")
def tasks() -> list[Task]:
    """The tasks themselves; their rows come from `held`."""
    found = []
    for number, name in enumerate(TASKS):
        _, path, template = find_template(name, None)
        found.append(
            Task(
                name=name,
                id=number,
                template_name=name,
                template_text=path.read_text(encoding="utf-8"),
                template=template,
                source=Source(path="nowhere"),
            )
        )
    return found


@pytest.fixture(scope="session")
def held(examples: dict[str, list[Example]]) -> list[Examples]:
    """The rendered rows as a split of each task."""
    return [
        Examples("test", rows, [f"{name}:{n}" for n in range(len(rows))], [], f"rows of {name}")
        for name, rows in examples.items()
    ]


@pytest.fixture
def opened(packed: PackedModel, tasks: list[Task], stories_folder: Path, tmp_path: Path) -> Run:
    """A run around the model, in a folder of its own."""
    base = find_base_model(str(stories_folder))
    names = [{"name": task.name, "template": task.name} for task in tasks]
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    assert packed.adapter is not None
    folder.adapter.mkdir()
    save_adapter(packed.adapter, folder.adapter, base.identity())
    recipe = Recipe.model_validate({"base_model": str(stories_folder), "tasks": names})
    folder.recipe.write_text(dump_recipe(recipe))
    save_json(folder.tasks, {"tasks": [task.to_json() for task in tasks]})
    return Run(folder, instead=packed)


@pytest.fixture(scope="session")
def requests(stories_folder: Path, examples: dict[str, list[Example]]) -> list[Request]:
    """All of them, task after task."""
    tokenizer = load_tokenizer(find_base_model(str(stories_folder)))
    encoder = Encoder(tokenizer, "plain")
    return [
        request
        for task, rows in enumerate(examples.values())
        for request in build_requests(rows, task, encoder, 512)
    ]
