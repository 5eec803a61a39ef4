"""A chat template decides where an answer stands, how it ends, and what may be cut."""

from __future__ import annotations

import copy
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from mtl_lora_cli.data.encoded import encode_split
from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.data.written import one_turn
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.recipe.schema import Chat
from mtl_lora_cli.tasks.messages import Dialogue
from mtl_lora_cli.tasks.rendering import Example

PROMPT = "Review: a fine film\nGood (no or yes):"
TURNS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\n"
    "{% else %}LEAD{{ m.content }}TAIL\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}PROMPT{% endif %}"
)


def template(lead: str, tail: str, prompt: str) -> str:
    return TURNS.replace("LEAD", lead).replace("TAIL", tail).replace("PROMPT", prompt)


def chat(tokenizer: Any, text: str | dict[str, str]) -> Any:
    made = copy.copy(tokenizer)
    made.chat_template = text
    return made


def learned(tokenizer: Any, encoder: Encoder, answer: str = "yes") -> tuple[str, str]:
    """The text before what is learned, and what is learned."""
    (found,) = encoder.conversations([one_turn(PROMPT, answer)])
    begin = found.turns[0].begin
    return tokenizer.decode(found.tokens[:begin]), tokenizer.decode(found.tokens[begin:])


def test_a_generation_prompt_that_ends_with_a_space(stories_tokenizer: Any) -> None:
    text = template("ASSISTANT: ", "{{ eos_token }}", "ASSISTANT: ")
    tokenizer = chat(stories_tokenizer, text)
    encoder = Encoder(tokenizer, "chat")
    for answer in ("yes", "no"):
        before, after = learned(tokenizer, encoder, answer)
        assert before.endswith("ASSISTANT:")
        assert after == f"{answer}</s>"
    (prompt,), (answers,) = encoder.continuations([PROMPT], [["no", "yes"]])
    assert tokenizer.decode(prompt.tokens).endswith("ASSISTANT:")
    assert all(tokenizer.convert_ids_to_tokens(own)[0].startswith("▁") for own in answers)
    (unknown,), _ = encoder.continuations([PROMPT], [[""]])
    assert unknown == prompt  # predicting a free answer begins where training did


def test_an_empty_think_block_is_learned_with_the_answer(stories_tokenizer: Any) -> None:
    text = template("A: <think></think>", "{{ eos_token }}", "A: <think>")
    tokenizer = chat(stories_tokenizer, text)
    encoder = Encoder(tokenizer, "chat")
    before, after = learned(tokenizer, encoder)
    assert before.endswith("A: <think>")
    assert after == "</think>yes</s>"
    assert "'</think>' between its generation prompt and an answer" in encoder.notes[0]
    (prompt,), ((answer,),) = encoder.continuations([PROMPT], [["yes"]])
    assert tokenizer.decode(prompt.tokens).endswith("A: <think></think>")
    assert tokenizer.decode(answer) == "yes"


def test_white_space_that_the_conversation_lacks_is_left_out_and_said(
    stories_tokenizer: Any,
) -> None:
    text = template("A: <think></think>", "{{ eos_token }}", "A: <think>\\n")
    tokenizer = chat(stories_tokenizer, text.replace("\\n", "{{ '\\n' }}"))
    encoder = Encoder(tokenizer, "chat")
    assert learned(tokenizer, encoder)[1] == "</think>yes</s>"
    assert "conversation has no '\\n'" in encoder.notes[1]


def test_a_template_that_contradicts_itself_needs_a_word(stories_tokenizer: Any) -> None:
    tokenizer = chat(stories_tokenizer, template("A: ", "{{ eos_token }}", "A: <think>"))
    with pytest.raises(UsageError) as caught:
        Encoder(tokenizer, "chat")
    (line,) = caught.value.lines
    assert "contradicts itself" in line
    assert "chat.answers decides: conversation or generation_prompt" in line
    ends = {"conversation": ("A:", "yes</s>"), "generation_prompt": ("A: <think>", "yes</s>")}
    for where, (before, after) in ends.items():
        found = learned(tokenizer, Encoder(tokenizer, "chat", Chat(answers=where)))  # type: ignore[arg-type]
        assert found[0].endswith(before)
        assert found[1] == after
    lenient = learned(tokenizer, Encoder(tokenizer, "chat", lenient=True))
    assert lenient == found  # a run that was trained already


def test_a_variable_of_the_template_decides_or_is_refused(stories_tokenizer: Any) -> None:
    opens = "A: {% if thinking is not defined or thinking %}<think>{% endif %}"
    tokenizer = chat(stories_tokenizer, template("A: ", "{{ eos_token }}", opens))
    with pytest.raises(UsageError, match="contradicts itself"):
        Encoder(tokenizer, "chat")
    encoder = Encoder(tokenizer, "chat", Chat(template_kwargs={"thinking": False}))
    assert learned(tokenizer, encoder)[0].endswith("A:")
    with pytest.raises(
        UsageError, match=r"chat.template_kwargs.thinkin: .* did you mean 'thinking'"
    ):
        Encoder(tokenizer, "chat", Chat(template_kwargs={"thinkin": False}))


@pytest.fixture(scope="module")
def with_turn_end(stories_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The real tokenizer with a control token for the end of a turn, beside its end-of-text token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn_end>", "<more>"]})
    return tokenizer


@pytest.mark.parametrize("tail", ["<turn_end>", "\n<turn_end>", "<more><turn_end>"])
def test_an_answer_ends_as_the_template_ends_a_turn(with_turn_end: Any, tail: str) -> None:
    tokenizer = chat(with_turn_end, template("A: ", tail, "A: "))
    encoder = Encoder(tokenizer, "chat")
    assert learned(tokenizer, encoder)[1] == f"yes{tail}"
    assert tokenizer.decode(list(encoder.answer_end)) == tail
    named = set(tokenizer.convert_ids_to_tokens(sorted(encoder.stops)))
    assert {"</s>", "<turn_end>"} <= named <= {"</s>", "<turn_end>", "<more>"}
    assert encoder.stop_text == ""


def test_a_turn_that_ends_with_no_control_token_ends_with_its_text_and_the_end_token(
    stories_tokenizer: Any,
) -> None:
    tokenizer = chat(stories_tokenizer, template("A: ", "\n### End", "A: "))
    encoder = Encoder(tokenizer, "chat")
    assert learned(tokenizer, encoder)[1] == "yes\n### End</s>"
    assert encoder.stop_text == "### End"
    tokenizer = chat(stories_tokenizer, template("A: ", "", "A: "))
    encoder = Encoder(tokenizer, "chat")
    assert learned(tokenizer, encoder)[1] == "yes</s>"
    assert encoder.stop_text == ""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{{ raise_exception('a system message\nis needed') }}", "refuses a message of user: a system message is needed; use plain"),
        ("{{ messages[0].parts.text }}", "refuses a message of user: 'dict object' has no attribute 'parts'"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "drops the text of a user message"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "drops the text of an answer"),
        ("{% for m in messages %}{{ m.content[:20] }}{% endfor %}", "drops or changes the text of a message of user: 'Review"),
        ("{% for m in messages %}{{ m.content|replace('film', 'book') }}{% endfor %}", "drops or changes the text of a message of user"),
    ],
)  # fmt: skip
def test_a_template_that_raises_or_drops_a_text_is_one_line(
    stories_tokenizer: Any, text: str, says: str
) -> None:
    with pytest.raises(UsageError) as caught:
        learned(stories_tokenizer, Encoder(chat(stories_tokenizer, text), "chat"))
    (line,) = caught.value.lines
    assert line.startswith(
        f"prompt_format: chat: the chat template of {Path(stories_tokenizer.name_or_path).name} "
    )
    assert says in line


def test_what_is_cut_is_the_rows_own(stories_tokenizer: Any) -> None:
    tokenizer = chat(stories_tokenizer, template("A: ", "{{ eos_token }}", "A: "))
    encoder = Encoder(tokenizer, "chat")
    text = "and then many more of them " * 12 + "Good (no or yes):"
    example = Example(text, "yes", (), -1)
    split = encode_split(
        [example], ["rows:1"], encoder, task="a", limit=64, on_overflow="truncate_prompt"
    )
    assert split.lengths.tolist() == [64]
    shown = tokenizer.decode(split.example(0))
    assert shown.startswith("<s> Q: ")
    assert shown.endswith("Good (no or yes):\nA: yes</s>")

    (prompt,), _ = encoder.continuations([text], [["yes"]])
    for room in (prompt.fixed, prompt.fixed + 1, 40):
        short = tokenizer.decode(prompt.shortened(room))
        assert short.startswith("<s> Q:")
        assert short.endswith("\nA:")
        assert len(prompt.shortened(room)) == room
    with pytest.raises(ValueError, match="not the row's own"):
        prompt.shortened(prompt.fixed - 1)
    with pytest.raises(
        UsageError, match=r"rows:1: task 'a': the answer alone has \d tokens, \d+ with"
    ):
        encode_split([example], ["rows:1"], encoder, task="a", limit=8, on_overflow="truncate_prompt")  # fmt: skip


def test_a_template_prints_the_date_that_it_is_given(stories_tokenizer: Any) -> None:
    dated = "Today: {{ strftime_now('%d %b %Y, %H:%M:%S %% %-d') }}\n"
    text = dated + template("A: ", "{{ eos_token }}", "A: ")
    tokenizer = chat(stories_tokenizer, text)
    prints = [
        Encoder(tokenizer, "chat", Chat(date=date)).prompts(["x"])[0].splitlines()[0]
        for date in ("2024-02-29", "2026-11-30T23:59:58")
    ]
    assert prints == ["Today: 29 Feb 2024, 00:00:00 % 29", "Today: 30 Nov 2026, 23:59:58 % 30"]
    now = datetime.now()
    day = chat(stories_tokenizer, text.replace(", %H:%M:%S", ""))
    ours = Encoder(day, "chat", Chat(date=now.isoformat())).prompts(["x"])[0]
    theirs = day.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
    )
    assert ours == theirs  # transformers' own clock
    one, other = (Encoder(tokenizer, "chat", Chat(date=f"2026-11-{day}")) for day in (29, 30))
    assert one.fingerprint != other.fingerprint


TALK = [
    {"role": "system", "content": "Be short."},
    *one_turn("Is it red?", "Yes."),
    *one_turn("And round?", "No, x."),
]


@pytest.mark.parametrize("counts", [None, [False, False, True, False, False]])
def test_several_turns_are_one_conversation(with_turn_end: Any, counts: list[bool] | None) -> None:
    text = (
        "{% for m in messages %}<more>{{ m.role }}\n{{ m.content }}<turn_end>\n{% endfor %}"
        "{% if add_generation_prompt %}<more>assistant\n{% endif %}"
    )
    tokenizer = chat(with_turn_end, text)
    encoder = Encoder(tokenizer, "chat")
    (found,) = encoder.conversations([TALK], None if counts is None else [counts])
    whole = tokenizer.apply_chat_template(TALK, tokenize=True)["input_ids"]
    assert found.tokens == whole[: len(found.tokens)]
    parts = [tokenizer.decode(found.tokens[turn.begin : turn.end]) for turn in found.turns]
    assert parts == ["Yes.<turn_end>", "No, x.<turn_end>"][: 2 if counts is None else 1]
    assert sum(found.mask) == sum(turn.end - turn.begin for turn in found.turns)


def test_an_earlier_turn_may_end_otherwise_than_the_last(with_turn_end: Any) -> None:
    """As gpt-oss has it: `<|end|>` within a conversation, `<|return|>` at its end."""
    text = (
        "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}"
        "{{ '<turn_end>' if loop.last and m.role == 'assistant' else '<more>' }}{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )
    tokenizer = chat(with_turn_end, text)
    (found,) = Encoder(tokenizer, "chat").conversations([TALK])
    parts = [tokenizer.decode(found.tokens[turn.begin : turn.end]) for turn in found.turns]
    assert [part.strip() for part in parts] == ["Yes.<more>", "No, x.<turn_end>"]


def test_a_think_block_of_the_answers_own_is_its_text(small_tokenizer: Any) -> None:
    """As Qwen3 has it: the block is written again, with other white space, and is learned."""
    text = (
        "{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}<end>{% else %}<model>"
        "{% set parts = m.content.split('</think>') %}{{ parts[0].strip() if parts|length > 1 else '<think>' }}"
        "\n</think>\n\n{{ parts[-1].strip() }}<end>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<model>{% endif %}"
    )
    tokenizer = chat(small_tokenizer, text)
    encoder = Encoder(tokenizer, "chat")
    found = learned(tokenizer, encoder, "<think>so it is</think>yes")
    assert found[1] == "<think>so it is\n</think>\n\nyes<end>"
    assert learned(tokenizer, encoder)[1] == "<think>\n</think>\n\nyes<end>"


def test_the_keys_are_checked(stories_folder: Path) -> None:
    from pydantic import ValidationError

    for wrong in ({"date": "yesterday"}, {"template_kwargs": {"messages": []}}, {"answers": "x"}):
        with pytest.raises(ValidationError):
            Chat.model_validate(wrong)
    assert json.loads(Chat(date="2026-11-30").model_dump_json())["date"] == "2026-11-30"


NAMED = {
    "default": "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    "tool_use": "Tools:{% for tool in tools %} {{ tool.function.name }}{% endfor %}\n"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
}
USED = [
    {"role": "user", "content": "Is it warm?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "feel", "arguments": {"at": "noon"}}}
        ],
    },
    {"role": "tool", "content": "yes"},
    {"role": "assistant", "content": "It is."},
]
TOOLS = ({"type": "function", "function": {"name": "feel", "parameters": {}}},)


def test_rows_with_tools_are_written_by_the_template_for_tools(stories_tokenizer: Any) -> None:
    """As transformers picks it; where a tokenizer has none, or a row no tools, by the other one."""
    tokenizer = chat(stories_tokenizer, NAMED)
    encoder = Encoder(tokenizer, "chat")
    assert any("'tool_use'" in note and "'default'" in note for note in encoder.notes)
    plainly = [USED[0], USED[3]]
    for messages, tools in ((USED, TOOLS), (plainly, ()), (plainly, TOOLS)):
        (found,) = encoder.conversations([Dialogue.of(messages, tools)])
        whole = tokenizer.apply_chat_template(messages, tools=list(tools) or None, tokenize=False)
        assert tokenizer.decode(found.tokens) == tokenizer.decode(
            tokenizer(whole, add_special_tokens=False)["input_ids"]
        )
        assert ("Tools: feel" in whole) == bool(tools)
        said = tokenizer.decode([t for t, own in zip(found.tokens, found.mask, strict=True) if own])
        assert said.endswith("It is.</s>") and ("noon" in said) == (messages is USED)
    with pytest.raises(UsageError, match="drops or changes a tool call"):
        list(encoder.conversations([Dialogue.of(USED)]))
    both = encoder.fingerprint
    other = chat(
        stories_tokenizer, {**NAMED, "tool_use": NAMED["tool_use"].replace("Tools", "May")}
    )
    assert Encoder(other, "chat").fingerprint != both
    alone = Encoder(chat(stories_tokenizer, {"default": NAMED["default"]}), "chat")
    assert (
        alone.fingerprint == Encoder(chat(stories_tokenizer, NAMED["default"]), "chat").fingerprint
    )
    assert alone.notes == []


@pytest.mark.parametrize(
    ("templates", "error"),
    [
        (
            {"rag": NAMED["default"], "tool_use": NAMED["tool_use"]},
            "the tokenizer has the chat templates rag, tool_use, and none of the name 'default', which "
            "transformers takes; use plain",
        ),
        (
            {**NAMED, "tool_use": NAMED["tool_use"].replace("</s>", "<end>")},
            "the chat templates 'default' and 'tool_use' end an answer with '</s>' and '<end>'; use plain",
        ),
    ],
)
def test_templates_that_cannot_be_told_apart_are_refused(
    stories_tokenizer: Any, templates: dict[str, str], error: str
) -> None:
    with pytest.raises(UsageError) as caught:
        Encoder(chat(stories_tokenizer, templates), "chat")
    assert str(caught.value) == f"prompt_format: chat: {error}"
