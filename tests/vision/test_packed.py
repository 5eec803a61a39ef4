"""Packed rows with pictures, against transformers' own model on each example alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mtl_lora_cli.engine.segments import Segments
from mtl_lora_cli.models.base import BaseModel, find_base_model
from mtl_lora_cli.models.batch import PackedBatch
from mtl_lora_cli.models.load import load_tokenizer
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.models.plain import Way
from mtl_lora_cli.models.sight import with_pictures
from mtl_lora_cli.models.trust import settle
from mtl_lora_cli.models.unread import unread_layers

from ..processors import WITHOUT_TORCHVISION, compared, processor_of
from ..sights import TOKENS, tiny_granite
from .conftest import packed_of, some_at_once

ANSWER = 2  # tokens behind a prompt
SIDES = ((40, 60), (33, 29), (64, 64))
# Of each example the words before and behind each of its pictures, and which pictures: two, none, one.
EXAMPLES = ((0, [3, 4, 5, 6], (0, 1)), (1, [7, 8, 9, 10], ()), (1, [11, 12, 13], (2,)))


def picture(number: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed + number).integers(0, 256, (*SIDES[number], 3))
    return Image.fromarray(noise.astype(np.uint8))


def tokens(packed: PackedModel, words: Sequence[int], shown: Sequence[int]) -> list[int]:
    vision: Any = packed.vision
    ids = [words[0]]
    for number in shown:
        own = vision.tokenizer(vision.text(*SIDES[number]), add_special_tokens=False)["input_ids"]
        ids += [*own, words[1]]
    return [*ids, *words[2:]]


def batch_of(packed: PackedModel, pictures: Sequence[Image.Image]) -> PackedBatch:
    vision: Any = packed.vision
    rows = [tokens(packed, words, shown) for _, words, shown in EXAMPLES]
    lengths = [len(row) for row in rows]
    ends = np.cumsum([0, *lengths])
    asked = [n for start, end in pairwise(ends) for n in range(start, end - 1)]
    flat = torch.tensor([token for row in rows for token in row])
    positions = torch.tensor([n for n in asked if flat[n + 1] != vision.token_id])
    ids = flat[None]
    seen = [vision.look(one) for one in pictures]
    counts = [vision.count(*sides) for sides in SIDES]
    batch = PackedBatch(
        input_ids=ids,
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        task_ids=torch.repeat_interleave(
            torch.tensor([task for task, _, _ in EXAMPLES]), torch.tensor(lengths)
        )[None],
        segments=Segments.build(lengths),
        positions=positions,
        owner=torch.arange(len(positions)),
        targets=flat[positions + 1],
    )
    return with_pictures(batch, vision, seen, counts, [length - ANSWER for length in lengths])


def alone(packed: PackedModel, pictures: Sequence[Image.Image]) -> Tensor:
    """By transformers' own forward pass: its tower, its merging, its attention."""
    found = []
    vision: Any = packed.vision
    for task, words, shown in EXAMPLES:
        ids = torch.tensor([tokens(packed, words, shown)])
        looked = [vision.look(pictures[number]) for number in shown]
        prompt = ids.shape[1] - ANSWER
        seen = vision.alone(looked, ids == vision.token_id, prompt) if shown else {}
        if vision.whole_prompt:
            seen["token_type_ids"] = (torch.arange(ids.shape[1]) >= prompt).long()[None]
        with packed.over_rows(task) as model:
            logits = model(input_ids=ids, use_cache=False, **seen).logits
        logprobs = logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        found.append(logprobs[ids[0, 1:] != vision.token_id])
    return torch.cat(found)


def gradients_held_to_each_alone(packed: PackedModel) -> dict[str, torch.Tensor]:
    """The packed row's gradients, after it and they were held to transformers' own, each example alone."""
    pictures = [picture(number) for number in range(3)]
    batch = batch_of(packed, pictures)
    learning: Any = packed.adapter.trained()  # type: ignore[union-attr]
    for tensor in learning.values():
        tensor.grad = None
    with packed.routed(batch):
        ours = packed(batch)
        ours.sum().backward()
    adapter: Any = packed.adapter
    unread = unread_layers(packed.model, adapter.layers)
    silent = {name.rpartition(".")[0] for name, tensor in learning.items() if tensor.grad is None}
    assert silent == set(unread)
    learning = {name: tensor for name, tensor in learning.items() if tensor.grad is not None}
    first = {name: tensor.grad.clone() for name, tensor in learning.items()}
    for tensor in learning.values():
        tensor.grad = None
    theirs = alone(packed, pictures)
    theirs.sum().backward()
    assert (ours - theirs).abs().max() < 5e-5
    for name, tensor in learning.items():
        scale = max(1.0, float(tensor.grad.abs().max()))
        assert (first[name] - tensor.grad).abs().max() <= 5e-5 * scale, name
    return first


@pytest.mark.parametrize("engine", ["fused", "plain"])
def test_packed_equals_alone_and_so_do_gradients(llava: BaseModel, engine: str) -> None:
    packed = packed_of(llava, engine)
    settle(packed)
    first = gradients_held_to_each_alone(packed)
    assert any(name.startswith("whole:") and grad.abs().max() > 0 for name, grad in first.items())
    frozen = [p for n, p in packed.model.named_parameters() if "vision_tower" in n]
    assert frozen and all(p.grad is None for p in frozen)


@pytest.mark.parametrize("kind", TOKENS)
def test_each_type_equals_transformers_own_forward_pass_and_so_do_gradients(
    models: Callable[[str], BaseModel], kind: str
) -> None:
    packed = packed_of(models(kind), kind=kind)
    fused = kind not in ("gemma4_small", "paligemma")
    assert (settle(packed).way is None) == fused, packed.engine_line()
    gradients_held_to_each_alone(packed)
    if not fused:
        assert packed.plain is not None and packed.plain.way.layout == "packed"
        return
    packed.go(Way("packed", bare_head=not kind.startswith("gemma4")))
    gradients_held_to_each_alone(packed)


def test_embeddings_that_a_language_part_scales_are_scaled_with_pictures_among_them(
    small_model: Path, tmp_path: Path
) -> None:
    packed = packed_of(find_base_model(str(tiny_granite(small_model, tmp_path))))
    found = settle(packed)
    assert (found.way, found.tried) == (None, ())
    pictures = [picture(number) for number in range(3)]
    batch = batch_of(packed, pictures)
    with torch.no_grad(), packed.routed(batch):
        assert (packed(batch) - alone(packed, pictures)).abs().max() < 5e-5


def test_in_16_bits_a_projector_learns_in_32(llava: BaseModel) -> None:
    packed = packed_of(llava, dtype=torch.bfloat16)
    learning: Any = packed.adapter.whole  # type: ignore[union-attr]
    assert {tensor.dtype for tensor in learning.values()} == {torch.float32}
    batch = batch_of(packed, [picture(number) for number in range(3)])
    with packed.routed(batch):
        packed(batch).sum().backward()
    assert all(tensor.grad.abs().max() > 0 for tensor in learning.values())
    wide = packed_of(llava)
    with torch.no_grad(), packed.routed(batch), wide.routed(batch):
        assert (packed(batch) - wide(batch)).abs().mean() < 0.1


@pytest.mark.parametrize("kind", TOKENS)
def test_tokens_and_pixels_are_those_of_the_type_s_own_processor(
    models: Callable[[str], BaseModel], kind: str
) -> None:
    """Where it can be built: some want torchvision, for videos."""
    if kind not in WITHOUT_TORCHVISION:
        pytest.importorskip("torchvision")
    tokenizer = load_tokenizer(models(kind))
    own = processor_of(kind, tokenizer)
    for sides in ((90, 120), (33, 29), (64, 200)):
        noise = np.random.default_rng(1).integers(0, 256, (*sides, 3)).astype(np.uint8)
        found = compared(kind, tokenizer, own, Image.fromarray(noise))
        assert found.tokens_equal and found.grids_equal and found.pixels_apart == 0, found


@pytest.mark.parametrize("engine", ["auto", "plain"])
@pytest.mark.parametrize(
    "kind", some_at_once(["llava", *TOKENS], "llava", "gemma3", "qwen3_vl", "paligemma")
)
def test_another_picture_changes_no_bit_of_other_examples(
    llava: BaseModel, models: Callable[[str], BaseModel], kind: str, engine: str
) -> None:
    packed = packed_of(llava if kind == "llava" else models(kind), engine, kind)
    if packed.plain is not None:
        settle(packed)
    pictures = [picture(number) for number in range(3)]
    before, other = (
        batch_of(packed, [*pictures[:2], last]) for last in (pictures[2], picture(2, seed=9))
    )
    with torch.no_grad(), packed.routed(before):
        first, second = packed(before), packed(other)
    _, words, shown = EXAMPLES[2]
    own = sum(one != packed.vision.token_id for one in tokens(packed, words, shown)[1:])  # type: ignore[union-attr]
    others = len(first) - own
    assert torch.equal(first[:others], second[:others])
    assert not torch.equal(first[others:], second[others:])


def test_a_path_that_mixes_pictures_up_is_found_out(
    llava: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The self-test: pictures in each other's places."""
    from mtl_lora_cli.errors import UsageError
    from mtl_lora_cli.models import noise

    real = noise.with_pictures

    def mixed(batch: Any, vision: Any, many: Any, *given: Any) -> Any:
        return real(batch, vision, list(many)[::-1], *given)

    monkeypatch.setattr(noise, "with_pictures", mixed)
    with pytest.raises(UsageError, match="with pictures, log-probabilities differ"):
        settle(packed_of(llava))


def test_tokens_and_pixels_are_those_of_the_model_s_own_processor(llava: BaseModel) -> None:
    from transformers import LlavaProcessor

    tokenizer = load_tokenizer(llava)
    vision = tokenizer.vision()
    own = LlavaProcessor(
        image_processor=vision.processor,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    image = picture(0)
    theirs = own(images=[image], text="one <image> two", return_tensors="pt")
    text = f"one {vision.text(*SIDES[0])} two"
    assert tokenizer(text)["input_ids"] == theirs["input_ids"][0].tolist()
    assert torch.equal(vision.look(image)["pixel_values"], theirs["pixel_values"])
