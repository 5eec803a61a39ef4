"""Conversations of any words, in templates of several kinds: what is read is what transformers writes, and what is
learned is each answer, what the template writes before it, and what ends it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.tasks.messages import Dialogue

Fuzz = settings.get_profile("fuzz")
ASK = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
TEMPLATES = {
    "as it is": "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}" + ASK,
    "trimmed": "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content | trim }}<|end|>{% endfor %}" + ASK,
    # An empty block before the last answer alone, as Qwen3 writes it.
    "thinking": (
        "{% for m in messages %}<|start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}"
        "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|end|>\n{% endfor %}" + ASK
    ),
    # Another token ends the last turn, as gpt-oss has it.
    "two ends": (
        "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}"
        "{{ '<|done|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}" + ASK
    ),
}  # fmt: skip
WORDS = st.lists(
    st.sampled_from(["<", "|>", "user", "assistant", "\n", " ", "Yes", "é", "1", "<think", "end"])
    | st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=3),
    min_size=1,
    max_size=5,
).map("".join).filter(str.strip)  # fmt: skip
TALKS = st.tuples(st.none() | WORDS, st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))


def tokenizer_for(template: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "Y"), ("e", "s"), ("Ċ", "Y")]
    words = [*alphabet, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE(vocab={w: n for n, w in enumerate(words)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    made.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|done|>"]})
    made.chat_template = template
    return made


@pytest.fixture(scope="module", params=TEMPLATES)
def named(request: pytest.FixtureRequest) -> tuple[str, Any, Encoder]:
    tokenizer = tokenizer_for(TEMPLATES[request.param])
    return request.param, tokenizer, Encoder(tokenizer, "chat")


@settings(Fuzz)
@given(talk=TALKS)
def test_every_answer_is_learned_and_nothing_else(
    named: tuple[str, Any, Encoder], talk: tuple[str | None, list[tuple[str, str]]]
) -> None:
    name, tokenizer, encoder = named
    system, turns = talk
    messages = [] if system is None else [{"role": "system", "content": system}]
    for asked, answered in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    try:
        (ours,) = encoder.conversations([Dialogue.of(messages)])
    except UsageError as error:
        # A think block that a row brings half of cannot be told from the template's own.
        assert "think" in "".join(map(str, messages)), error
        return
    whole = tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
    assert ours.tokens == whole[: len(ours.tokens)]
    assert not tokenizer.decode(whole[len(ours.tokens) :]).strip()
    assert len(ours.turns) == len(turns)
    for number, (turn, (_, answered)) in enumerate(zip(ours.turns, turns, strict=True)):
        last = number == len(turns) - 1
        text = answered.strip() if name == "trimmed" else answered
        lead = "<think>\n\n</think>\n\n" if name == "thinking" and last else ""
        end = "<|done|>" if name == "two ends" and last else "<|end|>"
        said = tokenizer.decode(ours.tokens[turn.begin : turn.end])
        assert said.lstrip("\n") == (lead + text).lstrip("\n") + end
    assert sum(ours.mask) == sum(turn.end - turn.begin for turn in ours.turns)
