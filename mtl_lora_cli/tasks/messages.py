"""A conversation: its messages as chat templates take them, and what of it is learned."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]

THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A conversation, and what of it is learned.

    Attributes:
        messages: in order. Each has `role` (system, user, assistant, tool; text: written as it is, without
            a chat template) and `content`, a text; an answer perhaps `reasoning_content` and `tool_calls`,
            whose arguments are dictionaries; a tool's result perhaps `tool_call_id` and `name`.
        counts: for each message whether it is learned.
        tools: descriptions of the functions that may be called.
        learns_reasoning: whether reasoning before an answer is learned with it.
    """

    messages: tuple[Message, ...]
    counts: tuple[bool, ...]
    tools: tuple[Any, ...] = ()
    learns_reasoning: bool = True

    @classmethod
    def of(cls, messages: Sequence[Message], tools: Sequence[Any] = ()) -> Dialogue:
        """One of which every answer is learned."""
        learned = tuple(message["role"] == "assistant" for message in messages)
        return cls(tuple(messages), learned, tuple(tools))

    @property
    def is_text(self) -> bool:
        """Whether it is plain text, and no turns."""
        return self.messages[0]["role"] == "text"

    @property
    def last(self) -> int:
        """The number of the last message that is learned; how many there are, where none is."""
        learned = (number for number, counted in enumerate(self.counts) if counted)
        return max(learned, default=len(self.messages))

    @property
    def before(self) -> tuple[Message, ...]:
        """The messages before the last one that is learned."""
        return self.messages[: self.last]

    @property
    def prompt(self) -> str:
        """What is read before the last answer, as one text: to be compared, not to be encoded."""
        return plain_text(self.before, self.tools)

    @property
    def answer(self) -> str:
        """The last answer as one text."""
        message = {**self.messages[self.last], "reasoning_content": ""}
        return _plain(message, named=False)

    def without_earliest(self) -> Dialogue | None:
        """The same without its earliest turns, up to the next question; None where it has but one.

        System messages stay, and so do tools.
        """
        kept = [number for number, one in enumerate(self.messages) if one["role"] == "system"]
        rest = [number for number, one in enumerate(self.messages) if one["role"] != "system"]
        for place in range(1, len(rest)):
            before, here = (self.messages[rest[place - 1]], self.messages[rest[place]])
            if here["role"] == "user" != before["role"] and rest[place] < self.last:
                numbers = sorted([*kept, *rest[place:]])
                return self._only(numbers)
        return None

    def up_to_last(self) -> Dialogue:
        """The same without what stands behind its last answer."""
        return self._only(range(len(self.messages))[: self.last + 1])

    def asking(self, answer: str | None = None) -> Dialogue:
        """The same up to its last answer, which alone counts.

        Args:
            answer: another text in its place; of a conversation without an answer it is the one.
        """
        message = {"role": "text" if self.is_text else "assistant", "content": answer}
        messages = [*self.before, message] if answer is not None else self.up_to_last().messages
        counts = (False,) * (len(messages) - 1)
        return Dialogue(tuple(messages), (*counts, True), self.tools, self.learns_reasoning)

    def _only(self, numbers: Sequence[int]) -> Dialogue:
        return Dialogue(
            tuple(self.messages[number] for number in numbers),
            tuple(self.counts[number] for number in numbers),
            self.tools,
            self.learns_reasoning,
        )


def plain_text(messages: Sequence[Message], tools: Sequence[Any] = ()) -> str:
    """Messages as one text: to be compared, not to be encoded."""
    return _joined([*map(_plain, messages), *map(_json, tools)])


def _plain(message: Message, *, named: bool = True) -> str:
    """A message as one text: who says it, its words, and its calls."""
    calls = [_json(call["function"]) for call in message.get("tool_calls", ())]
    words = _joined([message.get("reasoning_content", ""), message["content"], *calls])
    return f"{message['role']}: {words}" if named and message["role"] != "text" else words


def texts_of(value: Any) -> Iterator[str]:
    """All texts in a message, tools, or a part of them; of dictionaries the keys, too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield str(key)
            yield from texts_of(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from texts_of(one)


def _joined(parts: Sequence[str]) -> str:
    return "\n".join(filter(None, parts))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
