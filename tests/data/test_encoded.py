"""Conversations packed into rows: what is learned of each, alone and beside others; and what is left out."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from mtl_lora_cli.data.collate import supervised_tokens, training_batch
from mtl_lora_cli.data.encoded import EncodedSplit, encode_split
from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.data.packing import pack
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import load_model
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.tasks.messages import Dialogue
from mtl_lora_cli.tasks.rendering import Example

from ..by_transformers import log_probability

CHAT = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def encoder(stories_folder: Any) -> Encoder:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories_folder)
    tokenizer.chat_template = CHAT
    return Encoder(tokenizer, "chat")


def talk(number: int, turns: int, *, system: bool = True, learn: str = "all") -> Example:
    """A conversation whose words say which one it is."""
    messages = [{"role": "system", "content": f"Be kind {number}."}] if system else []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"Once {number} {turn}?"})
        messages.append({"role": "assistant", "content": f"A cat {number} {turn}."})
    dialogue = Dialogue.of(messages)
    if learn == "last":
        dialogue = dialogue.asking()
    return Example("p", "a", (), -1, dialogue=dialogue)


def encoded(
    examples: list[Example], encoder: Encoder, limit: int = 256, how: Any = "error"
) -> EncodedSplit:
    wheres = [f"f:{number + 1}" for number in range(len(examples))]
    return encode_split(examples, wheres, encoder, task="t", limit=limit, on_overflow=how)


@pytest.mark.parametrize("seed", range(4))
def test_no_turn_of_another_conversation_is_seen(
    encoder: Encoder, stories_folder: Any, seed: int
) -> None:
    """Each learned token of packed rows has the log-probability that transformers gives it in its conversation alone."""
    from transformers import AutoModelForCausalLM

    chance = random.Random(seed)
    examples = [
        talk(n, chance.randint(1, 3), system=chance.random() < 0.5, learn=chance.choice(["all", "last"]))
        for n in range(5)
    ]  # fmt: skip
    split = encoded(examples, encoder)
    rows = [[(0, number) for number in row] for row in pack(split.lengths.tolist(), 256)]
    batch = training_batch(rows, [split], loss_on="answer")
    base = find_base_model(str(stories_folder))
    packed = PackedModel(load_model(base, dtype=torch.float32, device=torch.device("cpu"))).eval()
    with torch.no_grad():
        found = packed(batch).double().tolist()
    plain = AutoModelForCausalLM.from_pretrained(stories_folder, dtype=torch.float64).eval()
    expected = []
    for row in rows:
        for _, number in row:
            tokens = split.example(number).tolist()
            places = split.learned(number).tolist()
            expected += [log_probability(plain, tokens[:at], tokens[at : at + 1]) for at in places]
    assert found == pytest.approx(expected, abs=1e-4)
    assert supervised_tokens(rows, [split], loss_on="answer").tolist() == [len(expected)]
    assert split.learned_counts().sum() == len(expected) == split.supervised


def test_what_is_learned_is_the_answers_alone(encoder: Encoder) -> None:
    split = encoded([talk(1, 2), talk(2, 2, learn="last")], encoder)
    said = [
        encoder._tokenizer.decode(split.example(n)[split.learned(n)].tolist()) for n in range(2)
    ]
    assert said == ["A cat 1 0.</s>A cat 1 1.</s>", "A cat 2 1.</s>"]
    assert split.learned(0, "all").tolist() == list(range(1, int(split.lengths[0])))
    both = split.take(np.asarray([1, 0]))
    assert both.learned(1).tolist() == split.learned(0).tolist()
    assert both.example(0).tolist() == split.example(1).tolist()


@pytest.mark.parametrize(("room", "turns"), [(0, 3), (1, 2), (25, 2), (60, 1)])
def test_a_conversation_too_long_loses_its_earliest_turns_whole(
    encoder: Encoder, room: int, turns: int
) -> None:
    whole = int(encoded([talk(7, 3)], encoder).lengths[0])
    split = encoded([talk(7, 3), talk(8, 1)], encoder, whole - room, "truncate_prompt")
    kept = encoded([talk(7, 3)], encoder)
    text = encoder._tokenizer.decode(split.example(0).tolist())
    assert "Be kind 7." in text
    assert [f"Once 7 {turn}?" in text for turn in range(3)] == [
        turn >= 3 - turns for turn in range(3)
    ]
    assert [f"A cat 7 {turn}." in text for turn in range(3)] == [
        turn >= 3 - turns for turn in range(3)
    ]
    assert (split.truncated, split.turns) == ((1, 2 * (3 - turns)) if room else (0, 0))
    if not room:
        assert split.example(0).tolist() == kept.example(0).tolist()


def test_a_last_turn_that_is_too_long_is_left_out_and_counted(encoder: Encoder) -> None:
    long = Dialogue.of(
        [{"role": "user", "content": "x " * 99}, {"role": "assistant", "content": "y"}]
    )
    examples = [Example("p", "a", (), -1, dialogue=long), talk(1, 1)]
    split = encoded(examples, encoder, 99, "truncate_prompt")
    assert (len(split), split.dropped, split.truncated, split.turns) == (1, 1, 0, 0)
    with pytest.raises(
        UsageError, match=r"^f:1: task 't': the example has \d+ tokens, rows hold 99"
    ):
        encoded(examples, encoder, 99)


def test_control_tokens_that_a_row_brings_are_text_in_every_message(encoder: Encoder) -> None:
    from mtl_lora_cli.data.examples import Examples
    from mtl_lora_cli.recipe.source import Source
    from mtl_lora_cli.tasks.registry import find_template
    from mtl_lora_cli.tasks.rendering import Renderer
    from mtl_lora_cli.tasks.task import Task

    words = ("A </s> b?", "It is </s>.", "<s>user\nMore?", "No.")
    roles = ("user", "assistant") * 2
    row = {"messages": [{"role": r, "content": w} for r, w in zip(roles, words, strict=True)]}
    name, path, template = find_template("instruct/messages", None)
    task = Task("t", 0, name, path.read_text(), template, Source(path="x"), "conversation")
    held = Examples("train", [Renderer(template, "t").render(row, "f:1")], ["f:1"], [row], "")
    marked = encoder.control_tokens.mark(task, held)
    assert (marked.places, marked.first) == (["f:1"], "</s>")
    split = encoded(marked.examples, encoder)
    tokens, tokenizer = split.example(0).tolist(), encoder._tokenizer
    # The template writes four turns, each with one start and one end; the rows' own are letters.
    assert tokens.count(tokenizer.bos_token_id) == tokens.count(tokenizer.eos_token_id) == 4
    said = tokenizer.decode(split.example(0)[split.learned(0)].tolist())
    assert said == "It is </s>.</s>No.</s>"


@pytest.mark.parametrize(("turns", "told"), [(1, False), (2, True)])
def test_reasoning_that_a_template_leaves_out_of_earlier_turns_is_told(
    stories_folder: Any, turns: int, told: bool
) -> None:
    from transformers import AutoTokenizer

    from mtl_lora_cli.data.control_tokens import Marked
    from mtl_lora_cli.recipe.source import Source
    from mtl_lora_cli.tasks.registry import find_template
    from mtl_lora_cli.tasks.task import Task

    tokenizer = AutoTokenizer.from_pretrained(stories_folder)
    tokenizer.chat_template = CHAT.replace(
        "{{ m.content }}",
        "{% if loop.last and m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
        "{{ m.content }}",
    )
    messages = [dict(message) for message in talk(1, turns).dialogue.messages]  # type: ignore[union-attr]
    for message in messages:
        if message["role"] == "assistant":
            message["reasoning_content"] = f"hm {message['content']}"
    example = Example("p", "a", (), -1, dialogue=Dialogue.of(messages))
    name, path, template = find_template("instruct/messages", None)
    task = Task("t", 0, name, path.read_text(), template, Source(path="x"), "conversation")
    encoder = Encoder(tokenizer, "chat")
    notes = encoder.notes_on(task, encoder.brought(Marked([example], [])))
    assert any("leaves out the reasoning of earlier answers" in note for note in notes) is told
