"""Rows as conversations: the forms as their publishers describe them, and what is odd in real ones."""

from __future__ import annotations

from typing import Any

import pytest

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.recipe.conversation import ConversationSettings
from mtl_lora_cli.tasks.messages import Dialogue
from mtl_lora_cli.tasks.registry import find_template
from mtl_lora_cli.tasks.rendering import Renderer

Q, A = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
CALLED = {"name": "f", "arguments": {"a": 1}}


def read(name: str, row: dict[str, Any], *, labelled: bool = True, **keys: Any) -> Dialogue:
    template = find_template(f"instruct/{name}", None)[2]
    assert template.conversation is not None
    whole = template.conversation.overlaid(ConversationSettings.model_validate(keys))
    renderer = Renderer(template.model_copy(update={"conversation": whole}), "t")
    example = renderer.render(row, "rows:1", labelled=labelled)
    assert example.dialogue is not None
    return example.dialogue


def said(dialogue: Dialogue) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in dialogue.messages]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("messages", {"messages": [Q, A]}),
        ("messages", {"messages": [{"from": "human", "value": "Q"}, A]}),  # mixed
        ("messages", {"messages": '[{"role": "user", "content": "Q"}, {"role": "model", "content": "A"}]'}),
        ("messages", {"messages": {"role": ["user", "assistant"], "content": ["Q", "A"]}}),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, A]}),
        ("messages", {"messages": [{**Q, "weight": None}, {**A, "weight": 1}], "tools": None}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "Q"}, A], "system": None, "tools": ""}),
        ("alpaca", {"instruction": "Q", "input": "", "output": "A"}),
        ("alpaca", {"instruction": "Q", "output": "A", "input": None, "history": []}),
    ],
)  # fmt: skip
def test_one_question_and_its_answer(name: str, row: dict[str, Any]) -> None:
    found = read(name, row)
    assert said(found) == [("user", "Q"), ("assistant", "A")]
    assert found.counts == (False, True)
    assert set(found.messages[1]) == {"role", "content"}
    unlabelled = read(name, row, labelled=False)
    assert said(unlabelled) == [("user", "Q")] and not any(unlabelled.counts)


@pytest.mark.parametrize(
    ("keys", "system"),
    [({}, "own"), ({"system": "ours"}, "own"), ({"system": False}, None)],
)
def test_the_system_prompt_of_a_row(keys: dict[str, Any], system: str | None) -> None:
    found = read("messages", {"messages": [{"role": "developer", "content": "own"}, Q, A]}, **keys)
    assert [text for role, text in said(found) if role == "system"] == ([system] if system else [])
    assert said(read("messages", {"messages": [Q, A]}, **keys))[0] == (
        ("system", "ours") if keys.get("system") else ("user", "Q")
    )
    row = {"conversations": [Q, A], "system": "Of the row."}
    assert said(read("sharegpt", row))[0] == ("system", "Of the row.")


@pytest.mark.parametrize(
    ("learn", "counts"),
    [("all", (0, 1, 0, 1)), ("last", (0, 0, 0, 1)), ({"field": "train"}, (0, 0, 0, 1))],
)
def test_what_is_learned(learn: Any, counts: tuple[int, ...]) -> None:
    messages = [Q, {**A, "train": False}, {**Q, "train": False}, A]
    assert read("messages", {"messages": messages}, learn=learn).counts == tuple(map(bool, counts))


@pytest.mark.parametrize(
    "call",
    [
        {"content": None, "tool_calls": [{"id": "x", "type": "function", "function": CALLED}]},
        {"tool_calls": [{"id": "x", "function": {"name": "f", "arguments": '{"a": 1}'}}]},
        {"content": "", "tool_calls": [{"id": "x", **CALLED}]},
        {"content": None, "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": {"a": 1, "b": None}}}]},
    ],
)  # fmt: skip
def test_tool_calls_as_text_and_as_objects(call: dict[str, Any]) -> None:
    messages = [Q, {"role": "assistant", **call}, {"role": "tool", "content": {"t": 1}}, A]
    found = read("messages", {"messages": messages, "tools": [{"name": "f", "parameters": {}}]})
    assert found.messages[1]["tool_calls"] == [{"id": "x", "type": "function", "function": CALLED}]
    assert said(found)[1:3] == [("assistant", ""), ("tool", '{"t": 1}')]
    assert found.counts == (False, True, False, True)
    assert found.tools == ({"type": "function", "function": {"name": "f", "parameters": {}}},)


def test_tool_calls_in_sharegpts_form() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "Q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "sunny"},
            {"from": "gpt", "value": "A"},
        ],
        "tools": '[{"name": "f", "description": "d", "parameters": {}}]',
    }
    found = read("sharegpt", row)
    assert found.messages[1]["tool_calls"] == [{"type": "function", "function": CALLED}]
    assert found.messages[2] == {"role": "tool", "content": "sunny"}
    assert found.tools[0]["function"]["name"] == "f"


def test_reasoning_is_kept_or_dropped() -> None:
    messages = [Q, {**A, "reasoning": "hm"}, Q, {**A, "content": "<think>so</think>\n\nA"}]
    kept, dropped = (
        read("messages", {"messages": messages}, reasoning=how) for how in ("keep", "drop")
    )
    assert kept.messages[1]["reasoning_content"] == "hm"
    assert kept.messages[3]["content"] == "<think>so</think>\n\nA"
    assert [message["content"] for message in dropped.messages] == ["Q", "A", "Q", "A"]
    assert all(set(message) == {"role", "content"} for message in dropped.messages)
    assert not read("messages", {"messages": messages}, reasoning="unlearned").learns_reasoning


def test_names_of_fields_and_roles_are_keys() -> None:
    row = {"dialog": [{"who": "Kunde", "what": "Q"}, {"who": "Agent", "what": "A"}]}
    keys = {"messages": "dialog", "role": "who", "content": ["what"], "roles": {"Kunde": "user", "agent": "assistant"}}  # fmt: skip
    assert said(read("messages", row, **keys)) == [("user", "Q"), ("assistant", "A")]


def test_earlier_turns_of_alpacas_form_and_plain_text() -> None:
    row = {"instruction": "Add.", "input": "1, 2", "output": "3", "history": [["Hi", "Hello."]], "system": "S"}  # fmt: skip
    assert said(read("alpaca", row)) == [
        ("system", "S"),
        ("user", "Hi"),
        ("assistant", "Hello."),
        ("user", "Add.\n1, 2"),
        ("assistant", "3"),
    ]
    text = read("completion", {"text": "Once."})
    assert said(text) == [("text", "Once.")] and text.counts == (True,) and text.is_text
    assert read("completion", {"prompt": "p", "completion": "c"}).counts == (False, True)
    assert said(read("completion", {"prompt": "p"}, labelled=False)) == [("text", "p")]


M = "messages"


@pytest.mark.parametrize(
    ("name", "row", "error"),
    [
        (M, {M: [Q, {"role": "assistant", "content": None}]}, "messages[1].content: is null, expected a text"),
        (M, {M: [Q, {"role": "assistant"}]}, "messages[1].content: is null, expected a text"),
        (M, {M: [Q, {"role": "assistant", "content": " "}]}, "messages[1].content: is empty, expected a text to learn"),
        (M, {M: [{"role": "user", "content": 5}, A]}, "messages[0].content: expected a text, received 5"),
        (M, {M: [Q, {"role": "asistant", "content": "A"}]}, "messages[1].role: unknown role 'asistant'; did you mean 'assistant'?; conversation.roles says what it is"),
        (M, {M: [Q, {"content": "A"}]}, "messages[1].role: expected a role, the message has the fields content"),
        (M, {M: [Q, "A"]}, "messages[1]: expected a message with role and content, received 'A'"),
        (M, {M: "hello"}, "messages: not valid JSON: Expecting value: line 1 column 1 (char 0); received 'hello'"),
        (M, {M: None}, "messages: expected a list of messages, received null"),
        (M, {M: []}, "messages: has no message"),
        (M, {M: [Q]}, "messages: has no answer of an assistant to learn"),
        (M, {M: [Q, {**A, "weight": 0}]}, "messages: has no answer of an assistant to learn"),
        (M, {M: [Q, {**A, "weight": "half"}]}, "messages[1].weight: expected true or false, 1 or 0, received 'half'"),
        (M, {M: [{**Q, "weight": 1}, A]}, "messages[0]: a message of user is marked to be learned; only answers are"),
        (M, {M: [{"role": "user", "content": [{"type": "image_url"}]}, A]}, "messages[0].content[0]: a part of type 'image_url' is no text"),
        (M, {M: [Q, {**A, "tool_calls": [{"function": {"arguments": {}}}]}]}, "messages[1].tool_calls[0].function.name: expected the name of a function, received {'function': {'arguments': {}}}"),
        (M, {M: [Q, {**A, "tool_calls": [{"name": "f", "arguments": "[1]"}]}]}, "messages[1].tool_calls[0].arguments: expected a JSON object, received '[1]'"),
        (M, {M: [Q, A], "tools": [{"x": 1}]}, "tools[0]: has no name, received {'x': 1}"),
        (M, {M: [Q, {"role": "text", "content": "A"}]}, "messages: has messages of the role text beside others"),
        ("alpaca", {"instruction": "Q", "output": None}, "output: is null, expected a text"),
        ("alpaca", {"instruction": "Q", "output": ""}, "output: is empty, expected a text to learn"),
        ("sharegpt", {"conversations": [{"from": "human", "value": None}]}, "conversations[0].value: is null, expected a text"),
        ("sharegpt", {"messages": []}, "the row has no field 'conversations'; it has: messages"),
        ("completion", {"text": ""}, "text: is empty, expected a text to learn"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_field(name: str, row: dict[str, Any], error: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(name, row)
    assert str(caught.value) == f"rows:1: task 't': conversation: {error}"


def test_earliest_turns_go_whole_and_the_system_prompt_stays() -> None:
    tool = {"role": "tool", "content": "r"}
    messages = [{"role": "system", "content": "S"}, Q, A, Q, Q, {**A, "tool_calls": [{"name": "f", "arguments": {}}]}, tool, A, Q, A]  # fmt: skip
    lengths, talk = [], read("messages", {"messages": messages})
    shorter: Dialogue | None = talk
    while shorter is not None:
        assert shorter.messages[0]["role"] == "system" and shorter.messages[1]["role"] == "user"
        assert shorter.messages[-1] == talk.messages[-1] and shorter.counts[-1]
        lengths.append(len(shorter.messages))
        shorter = shorter.without_earliest()
    assert lengths == [10, 8, 3]


@pytest.mark.parametrize(("field", "value"), [("image", "1.jpg"), ("images", ["1.jpg", "2.jpg"])])
def test_a_conversation_about_pictures_is_refused(field: str, value: Any) -> None:
    """LLaVA's rows: without it the picture would be left out, and its mark learned as text."""
    asked = {"from": "human", "value": "<image>\nWhat is it?"}
    row = {"conversations": [asked, {"from": "gpt", "value": "A cat."}]}
    with pytest.raises(UsageError, match=rf"^rows:1: task 't': .*shows pictures \('{field}'\)"):
        read("sharegpt", {**row, field: value})
    assert said(read("sharegpt", {**row, field: type(value)()}))[1] == ("assistant", "A cat.")


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("place", [0, 1, None])
def test_characters_that_were_lost_are_noticed_in_any_message(
    place: int | None, labelled: bool
) -> None:
    texts = ["Where?", "There."]
    if place is not None:
        texts[place] += " caf\ufffd"
    turns = [
        {"from": who, "value": text} for who, text in zip(("human", "gpt"), texts, strict=True)
    ]
    renderer = Renderer(find_template("instruct/sharegpt", None)[2], "t")
    example = renderer.render({"conversations": turns}, "f:1", labelled=labelled)
    assert bool(example.odd) == (place == 0 or (place == 1 and labelled))  # an answer is not read
