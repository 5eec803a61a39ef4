"""The alias and the sample of pictures: joined models compute what their parts do, drawn rows are what the script draws."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from mtl_lora_cli.models import joined
from mtl_lora_cli.resources import bundled
from mtl_lora_cli.tasks.registry import find_template
from mtl_lora_cli.tasks.rendering import Example, Renderer

SAMPLES = bundled("data_templates") / "samples"


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_shapes", SAMPLES / "make_shapes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_are_those_that_the_script_draws(split: str) -> None:
    made = _script()
    rows = [json.loads(line) for line in (SAMPLES / "shapes" / f"{split}.jsonl").open()]
    assert len(rows) == made.COUNTS[split]
    for number in range(0, len(rows), 25):
        row, pixels = made.scene(split, number)
        assert rows[number] == row
        stored = Image.open(SAMPLES / "shapes" / row["image"]).convert("RGB")
        assert np.array_equal(np.asarray(stored), pixels)
    pictures = {(SAMPLES / "shapes" / row["image"]).read_bytes() for row in rows}
    assert len(pictures) == len(rows)


def _asked() -> dict[str, dict[str, Renderer]]:
    """Of every bundled sample whose rows show pictures, the tasks with choices; maps have none."""
    found: dict[str, dict[str, Renderer]] = {}
    for path in sorted(SAMPLES.glob("*.yaml")):
        _, _, template = find_template(f"samples/{path.stem}", Path())
        if template.images and template.choices and template.source is not None:
            sample = str(template.source.sample)
            renderer = Renderer(template, path.stem, SAMPLES / sample)
            found.setdefault(sample, {})[path.stem] = renderer
    return found


def _examples(sample: str, split: str, task: Renderer) -> list[Example]:
    rows = (SAMPLES / sample / f"{split}.jsonl").read_text().splitlines()
    return [task.render(json.loads(row), "row") for row in rows]


@pytest.mark.parametrize("sample", _asked())
@pytest.mark.parametrize("split", ["train", "test"])
def test_no_answer_about_a_picture_tells_another_one(sample: str, split: str) -> None:
    """Each answer as often as another, and with each combination of answers to the other questions."""
    tasks = _asked()[sample]
    answers = [[one.gold for one in _examples(sample, split, task)] for task in tasks.values()]
    kinds = Counter(zip(*answers, strict=True))
    assert min(min(some) for some in answers) >= 0
    assert len(kinds) == np.prod([len(set(some)) for some in answers])
    assert len(set(kinds.values())) == 1, kinds


@pytest.mark.parametrize(("sample", "name"), [(s, n) for s, some in _asked().items() for n in some])
def test_who_sees_nothing_cannot_tell_an_answer_by_the_question(sample: str, name: str) -> None:
    """The commonest answer to a question, or to the word at one of its places, is right as often as by chance."""
    train, test = (_examples(sample, split, _asked()[sample][name]) for split in ("train", "test"))
    words = [one.prompt.split() for one in train + test]
    chance = 1 / len({one.gold for one in test})
    bound = chance + 3 * (chance * (1 - chance) / len(test)) ** 0.5
    for place in range(max(map(len, words)) + 1):  # the last: all of it
        keys = [" ".join(some if place >= len(some) else some[place : place + 1]) for some in words]
        seen: dict[str, Counter[int]] = {}
        for key, one in zip(keys, train, strict=False):
            seen.setdefault(key, Counter())[one.gold] += 1
        guesses = [seen.get(key, Counter([0])).most_common(1)[0][0] for key in keys[len(train) :]]
        assert np.mean([g == one.gold for g, one in zip(guesses, test, strict=True)]) <= bound


def test_a_joined_model_is_its_encoder_a_projector_and_its_language_model(
    small_model: Path,
) -> None:
    from transformers import AutoModelForCausalLM, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    tower = Dinov2Model(
        Dinov2Config(
            hidden_size=24, num_hidden_layers=3, num_attention_heads=2, patch_size=14, image_size=56
        )
    ).eval()
    text = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32).eval()
    model = joined._joined(text, tower, 7).eval()
    pixels = torch.randn(1, 3, 28, 42)  # another size than the encoder's own
    ids = torch.tensor([[5, *[7] * 6, 9, 11]])
    with torch.no_grad():
        found = model(input_ids=ids, pixel_values=pixels).logits
        levels = tower(pixels, output_hidden_states=True).hidden_states
        seen = torch.cat([levels[number][:, 1:] for number in (0, 1, 2)], dim=-1)
        embedded = text.get_input_embeddings()(ids)
        embedded[:, 1:7] = model.model.multi_modal_projector(seen)
        expected = text(inputs_embeds=embedded).logits
    assert (found - expected).abs().max() < 1e-5
    assert joined.levels_of(12) == [3, 7, 11]
    again = joined._joined(text, tower, 7).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
