"""A projector's start from the words of rows: by formulas of others, by transformers alone, and when a run goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from mtl_lora_cli.errors import MtlLoraError
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.recipe.load import LoadedRecipe, load_recipe
from mtl_lora_cli.runs.folder import RunFolder
from mtl_lora_cli.training.add_task import require_agreement
from mtl_lora_cli.training.prepare import prepare
from mtl_lora_cli.training.prepared import require_fit
from mtl_lora_cli.training.run import resume, start
from mtl_lora_cli.training.word_start import WORD_START, _some_of_each, ridge, start_by_words

from ..sights import write_squares
from .test_run import ADAPTER, TEMPLATE

Load = Callable[..., LoadedRecipe]
START = "images.projector_start=words"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squares(tmp_path_factory.mktemp("rows"), {"train": 120, "test": 30})


@pytest.fixture
def load(tmp_path: Path, llava: BaseModel, rows: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "colour.yaml").write_text(yaml.safe_dump(TEMPLATE))
    recipe = {
        "base_model": str(llava.folder),
        "adapter": ADAPTER,
        "tasks": [{"name": "colour", "template": "colour.yaml", "source": str(rows)}],
        "training": {"max_steps": 4, "row_length": 128, "checkpoint_every": 2},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return lambda *changes: load_recipe(tmp_path / "recipe.yaml", changes)


def test_the_regression_is_the_least_squares_of_rows_with_the_penalty_below_them() -> None:
    draw = np.random.default_rng(0)
    hidden = draw.normal(size=(200, 12)) @ draw.normal(size=(12, 12)) + 3
    words = hidden[:, :2] @ draw.normal(size=(2, 5)) + draw.normal(size=(200, 5)) - 1
    found = ridge(torch.from_numpy(hidden), torch.from_numpy(words), seed=3)
    away, wanted = hidden - hidden.mean(0), words - words.mean(0)
    damp = np.sqrt(found.penalty * (away**2).sum() / 12) * np.eye(12)
    below = np.concatenate([wanted, np.zeros((12, 5))])
    expected = np.linalg.lstsq(np.concatenate([away, damp]), below, rcond=None)[0]
    assert np.abs(found.weight.numpy() - expected).max() < 1e-9
    assert found.tells and 0.2 < found.explained < 1


@pytest.mark.parametrize("seed", range(8))
def test_what_is_not_there_is_not_found(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    hidden, words = (torch.randn(100, n, generator=draw, dtype=torch.float64) for n in (40, 6))
    assert not ridge(hidden, words, seed).tells


def test_parts_of_pictures_that_nobody_saw_say_their_colour_by_transformers_alone(
    load: Load, rows: Path, llava: BaseModel
) -> None:
    """By the projector that the start wrote, put into transformers' own model: the nearest of the words."""
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    ready = prepare(load(START))
    host, adapter = ready.build()
    random = torch.get_rng_state()
    found = start_by_words(host.model, adapter, ready.data.eyes, ready.data.splits, 0)  # type: ignore
    assert torch.equal(random, torch.get_rng_state())
    assert found.used and found.pictures == 120 and "120 pictures' rows" in str(found)

    own = AutoModelForImageTextToText.from_pretrained(llava.folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(llava.folder)
    processor = AutoImageProcessor.from_pretrained(llava.folder, backend="pil")
    test = [json.loads(line) for line in (rows / "test.jsonl").open()]
    pixels = processor([Image.open(rows / r["image"]) for r in test], return_tensors="pt")
    embedding = own.get_input_embeddings().weight.detach()
    colours = ("red", "green", "blue")
    words = [tokenizer(f" {one}", add_special_tokens=False)["input_ids"] for one in colours]
    answers = torch.stack([embedding[one].sum(0) for one in words])

    def right() -> float:
        with torch.no_grad():
            seen = own.model.get_image_features(**pixels)
        parts = torch.stack(list(getattr(seen, "pooler_output", seen))).mean(1)
        said = ((parts - parts.mean(0)) @ (answers - answers.mean(0)).T).argmax(1)
        return float(np.mean([colours[n] == r["colour"] for n, r in zip(said, test, strict=True)]))

    before = right()
    state = own.state_dict()
    for name, value in adapter.whole.items():
        state[name].copy_(value.detach())
    assert right() > 0.9 > 0.7 > before
    with torch.no_grad():
        seen = own.model.get_image_features(**pixels)
    parts = torch.cat(list(getattr(seen, "pooler_output", seen)))
    centre = embedding.mean(0)
    lengths, usual = (parts - centre).norm(dim=1).mean(), (embedding - centre).norm(dim=1).mean()
    assert 0.8 < lengths / usual < 1.25


def _tensors(run: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(run.require_adapter() / "mtl_lora.safetensors")


@pytest.mark.slow
def test_a_run_goes_on_with_the_same_bits_and_its_start_is_written(
    load: Load, tmp_path: Path
) -> None:
    run = start(prepare(load(START)), tmp_path / "whole")
    whole, found = _tensors(run), json.loads((run.path / WORD_START).read_text())
    assert found["used"] and found["pictures"] == 120
    as_it_was = _tensors(start(prepare(load()), tmp_path / "other"))
    assert any(not torch.equal(whole[name], as_it_was[name]) for name in whole)
    for gone in (["step-000004"], ["step-000002", "step-000004"]):  # then there is no checkpoint
        shutil.rmtree(run.adapter)
        for name in gone:
            shutil.rmtree(run.checkpoints / name, ignore_errors=True)
        torch.manual_seed(99)
        resume(run, None, [])
        assert all(torch.equal(value, whole[name]) for name, value in _tensors(run).items())


def test_grey_pictures_tell_nothing_and_the_projector_stays(load: Load) -> None:
    ready = prepare(load(START, "images.blind=true"))
    host, adapter = ready.build()
    before = {name: value.detach().clone() for name, value in adapter.whole.items()}
    found = start_by_words(host.model, adapter, ready.data.eyes, ready.data.splits, 0)  # type: ignore
    assert not found.used and str(found).startswith(
        "note: images.projector_start: words: pictures tell 0.0 %"
    )
    assert all(torch.equal(value, before[name]) for name, value in adapter.whole.items())


REFUSED = {
    "adapter.whole_modules=[]": "multi_modal_projector is to learn whole, and adapter.whole_modules does not name all",
    "adapter.whole_modules=[linear_2]": "multi_modal_projector is to learn whole, and adapter.whole_modules does not name all",
    "tasks.0.max_examples=19": "the training rows show 19 different pictures, and 20 are the least",
    'adapter.target_modules=[q_proj,"*.vision_tower.*.q_proj"]': "an adapter learns in the tower",
    "distributed.zero_stage=3": "images.projector_start: words does not go with zero_stage: 3",
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_has_no_such_start_is_one_line(load: Load, change: str) -> None:
    with pytest.raises(MtlLoraError) as caught:
        require_fit(prepare(load(START, change)))
    (line,) = caught.value.lines
    assert REFUSED[change] in line and "images.projector_start: words" in line


def test_another_kind_of_projector_is_refused(
    load: Load, models: Callable[[str], BaseModel]
) -> None:
    changes = (f"base_model={models('gemma3').folder}", "training.row_length=512")
    with pytest.raises(MtlLoraError, match="for projectors of two linear layers with biases"):
        require_fit(prepare(load(START, *changes)))


def test_rows_of_text_alone_have_no_such_start(load: Load, tmp_path: Path) -> None:
    template = {key: value for key, value in TEMPLATE.items() if key != "images"}
    text = yaml.safe_dump(template | {"prompt": "The colour is"})
    (tmp_path / "colour.yaml").write_text(text)
    with pytest.raises(MtlLoraError, match="projector_start: is for prompts that show pictures"):
        prepare(load(START, "adapter.whole_modules=[]"))


def test_pictures_that_many_rows_show_are_all_looked_at() -> None:
    """Rows stand question by question: every so-manieth of them would show the same pictures again."""
    pictures = [((number,),) for number in range(4)] * 1_000
    assert _some_of_each(pictures, set(pictures), 2) == list(range(8))  # type: ignore[arg-type]
    assert _some_of_each(pictures, set(pictures[:1]), 3) == [0, 4, 8]  # type: ignore[arg-type]


@pytest.mark.parametrize("start_of", ["words", "base"])
def test_a_run_that_begins_at_such_a_run_has_its_projector(
    load: Load, tmp_path: Path, start_of: str
) -> None:
    first = start(prepare(load(START)), tmp_path / "first")
    template = {key: value for key, value in TEMPLATE.items() if key != "images"}
    text = yaml.safe_dump(template | {"prompt": "The colour is"})
    (tmp_path / "colour.yaml").write_text(text)
    loaded = load(f"images.projector_start={start_of}")
    require_agreement(loaded, Run(first), "at which it begins")
    assert not prepare(loaded, begins=first).starts_by_words
