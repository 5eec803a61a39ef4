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
from mtl_lora_cli.tasks.rendering import Renderer

SAMPLES = bundled("data_templates") / "samples"


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_shapes", SAMPLES / "make_shapes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_are_drawn_balanced_and_every_answer_is_one_of_its_template_s(split: str) -> None:
    made = _script()
    rows = [json.loads(line) for line in (SAMPLES / "shapes" / f"{split}.jsonl").open()]
    assert len(rows) == made.COUNTS[split]
    for number in range(0, len(rows), 24):
        row, pixels = made.scene(split, number)
        assert rows[number] == row
        stored = Image.open(SAMPLES / "shapes" / row["image"]).convert("RGB")
        assert np.array_equal(np.asarray(stored), pixels)
    # Each answer as often as another, and with each answer to the other questions: none is known by another one.
    kinds = Counter(
        tuple(row[field] for field in ("colour", "there", "count", "side")) for row in rows
    )
    assert len(kinds) == 6 * 2 * 4 * 2
    assert len(set(kinds.values())) == 1, kinds
    for name in ("colour", "exists", "count", "side"):
        _, _, template = find_template(f"samples/shape_{name}", Path())
        renderer = Renderer(template, name, SAMPLES / "shapes")
        assert all(renderer.render(row, "row").gold >= 0 for row in rows)
    pictures = {(SAMPLES / "shapes" / row["image"]).read_bytes() for row in rows}
    assert len(pictures) == len(rows)


def test_who_sees_nothing_cannot_tell_sides_by_a_word() -> None:
    """The commonest answer to each word of a question is right as often on held-out rows as by chance."""
    splits = [
        [json.loads(line) for line in (SAMPLES / "shapes" / f"{split}.jsonl").open()]
        for split in ("train", "test")
    ]
    for words, answer in ((("one", "other"), "side"), (("thing",), "there"), (("form",), "colour")):
        seen: dict[str, Counter[str]] = {}
        for row in splits[0]:
            seen.setdefault(" ".join(row[w] for w in words[:1]), Counter())[row[answer]] += 1
        right = [
            seen.get(row[words[0]], Counter({"": 1})).most_common(1)[0][0] == row[answer]
            for row in splits[1]
        ]
        chance = 1 / len({row[answer] for row in splits[1]})
        assert np.mean(right) <= chance + 3 * (chance * (1 - chance) / len(right)) ** 0.5, answer


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
