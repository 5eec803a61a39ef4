"""What a chat template makes of the parts of a conversation: tool calls, null contents, reasoning.

Templates disagree: some want a call's arguments as a dictionary, some as JSON text, some tell a call from
an answer by a content that is null. So a template is asked with texts that stand nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.tasks.messages import THOUGHT, Dialogue, Message, texts_of
from mtl_lora_cli.tasks.pictured import PLACE

_NAME, _KEY, _VALUE = "f7391846250", "k2850614937", "v6120398475"
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class ToolForm:
    """How a chat template takes an answer with tool calls or reasoning.

    Attributes:
        as_text: a call's arguments are JSON text; otherwise a dictionary.
        null: an empty content beside calls is null; otherwise "".
        reasoning: the name under which it reads reasoning; "": it reads none.
        calls: it writes calls at all.
    """

    as_text: bool = False
    null: bool = False
    reasoning: str = "reasoning_content"
    calls: bool = True

    def taken(self, message: Message) -> dict[str, Any]:
        """A message as the template takes it."""
        found = dict(message)
        calls = found.get("tool_calls")
        if calls:
            found["tool_calls"] = [self._call(call) for call in calls]
            if self.null and not found["content"]:
                found["content"] = None
        thought = found.pop("reasoning_content", None)
        if thought is not None and self.reasoning:
            found[self.reasoning] = thought
        return found

    def _call(self, call: Message) -> dict[str, Any]:
        if not self.as_text:
            return dict(call)
        own = call["function"]
        arguments = json.dumps(own["arguments"], ensure_ascii=False)
        return {**call, "function": {**own, "arguments": arguments}}


def find_form(render: Callable[[ToolForm, list[Message]], str], template: Any) -> ToolForm:
    """The form in which a template writes all of a call.

    Args:
        render: messages in a form; raises UsageError where the template does.
        template: its text, to look for the name of reasoning.
    """
    text = template if isinstance(template, str) else json.dumps(template)
    reasoning = next((name for name in _REASONING if name in text), "")
    call = {"name": _NAME, "arguments": {_KEY: _VALUE}}
    asked: list[Message] = [
        {"role": "user", "content": "x"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "a12345678", "type": "function", "function": call}],
        },
    ]
    for as_text in (False, True):
        for null in (False, True):
            form = ToolForm(as_text, null, reasoning)
            try:
                written = render(form, asked)
            except UsageError:
                continue
            if all(part in written for part in (_NAME, _KEY, _VALUE)) and "None" not in written:
                return form
    return ToolForm(reasoning=reasoning, calls=False)


def missing_part(whole: str, dialogue: Dialogue) -> str | None:
    """A part of a conversation that a rendering of it does not hold; None: it holds all.

    White space and capitals do not count; JSON may be written in any way, and reasoning of earlier answers
    may be left out.
    """
    text = bare(whole)
    for number, message in enumerate(dialogue.messages):
        content = message["content"]
        said = content.split(PLACE)
        if not all(_holds(text, one) or _without_thought(text, one) for one in said):
            return f"the text of a message of {message['role']}: {content[:60]!r}"
        thought = message.get("reasoning_content", "")
        learned = dialogue.counts[number] and number == dialogue.last
        if learned and not _holds(text, thought):
            return f"the reasoning of an answer: {thought[:60]!r}; conversation.reasoning: drop leaves it out"
        for call in message.get("tool_calls", ()):
            own = call["function"]
            if not all(_holds(text, one) for one in (own["name"], *_leaves(own["arguments"]))):
                return f"a tool call: {json.dumps(call['function'], ensure_ascii=False)[:60]}"
    for tool in dialogue.tools:
        if not _holds(text, tool["function"]["name"]):
            return f"the description of a tool: {tool['function']['name'][:60]!r}"
    return None


def _holds(text: str, part: str) -> bool:
    """Whether a text without white space holds a part, as it is, as JSON writes it, or field by field."""
    if bare(part) in text:
        return True
    for ascii_only in (False, True):
        if bare(json.dumps(part, ensure_ascii=ascii_only)[1:-1]) in text:
            return True
    try:
        value = json.loads(part)
    except ValueError:
        return False
    return isinstance(value, dict | list) and all(bare(leaf) in text for leaf in _leaves(value))


def _without_thought(text: str, content: str) -> bool:
    shorter = THOUGHT.sub("", content, count=1)
    return shorter != content and _holds(text, shorter)


def _leaves(value: Any) -> Iterator[str]:
    """Texts and numbers in a value."""
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int):
        yield str(value)
    elif isinstance(value, dict):
        for key, one in value.items():
            yield str(key)
            yield from _leaves(one)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for one in value:
            yield from _leaves(one)
    else:
        yield from texts_of(value)


def bare(text: str) -> str:
    """A text without white space and case: templates trim, and some write capitals."""
    return "".join(text.split()).casefold()
