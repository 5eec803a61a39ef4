"""Conversations in one packed row: each answer costs what it costs in transformers, its conversation alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_lora_cli.data.collate import TextDataset
from mtl_lora_cli.data.encoded import encode_split
from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import load_model, load_tokenizer
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.tasks.messages import Dialogue
from mtl_lora_cli.tasks.rendering import Example

Fuzz = settings.get_profile("fuzz")
CHAT = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
WORDS = st.lists(
    st.sampled_from(["cat", "a", "Tom", "is", "\n", "red", "é"]), min_size=1, max_size=4
)
TEXT = WORDS.map(" ".join).filter(str.strip)
TALK = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def made(stories_folder: Path) -> tuple[PackedModel, Any, Encoder]:
    from transformers import AutoModelForCausalLM

    base = find_base_model(str(stories_folder))
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = CHAT
    packed = PackedModel(load_model(base, dtype=torch.float32, device=torch.device("cpu"))).eval()
    alone = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32).eval()
    return packed, alone, Encoder(tokenizer, "chat")


@settings(Fuzz, max_examples=15)
@given(talks=st.lists(TALK, min_size=2, max_size=4))
def test_no_turn_of_another_conversation_is_seen(
    made: tuple[PackedModel, Any, Encoder], talks: list[list[tuple[str, str]]]
) -> None:
    packed, alone, encoder = made
    examples = []
    for turns in talks:
        messages = [
            {"role": role, "content": text}
            for pair in turns
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        examples.append(Example("", turns[-1][1], (), -1, dialogue=Dialogue.of(messages)))
    places = [f"row {number}" for number in range(len(examples))]
    split = encode_split(examples, places, encoder, task="t", limit=10**6, on_overflow="error")
    row = [(0, number) for number in range(len(examples))]
    with torch.no_grad():
        ours = packed.losses(TextDataset([split], "answer").collate([row]))
        theirs = []
        for number in range(len(examples)):
            tokens = torch.from_numpy(split.example(number).astype("int64"))
            logprobs = alone(tokens[None]).logits[0].log_softmax(-1)
            learned = torch.from_numpy(split.learned(number).astype("int64"))
            each = -logprobs[:-1].gather(1, tokens[1:, None])[:, 0]
            theirs.append(each[learned - 1])
    torch.testing.assert_close(ours, torch.cat(theirs), rtol=1e-4, atol=1e-4)
