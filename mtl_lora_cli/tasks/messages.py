"""A row as a conversation: the forms in which such data come, made into one.

Messages are dictionaries with `role` and `content`, as chat templates take them. What a row calls them,
and how it spells tool calls, tool results and reasoning, differs from one source to the next.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mtl_lora_cli.errors import did_you_mean
from mtl_lora_cli.recipe.conversation import Conversation, Marked

Message = Mapping[str, Any]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
    "function_call": "call",  # a tool call as the text of a message of its own
    "tool_call": "call",
    "text": "text",
}
_REASONING = ("reasoning_content", "reasoning", "thinking")
THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_TEXT_PARTS = ("text", "input_text", "output_text")
_THOUGHT_PARTS = ("reasoning", "thinking")
FROM_FIELD = "from_field"  # of a message that a template makes: the row's field, for errors
_PLACE = "place"  # of a message while it is read
_MARKS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


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


class FormError(ValueError):
    """A part of a conversation is not what it should be; it begins with the part's place."""


def read_tools(value: Any, place: str) -> tuple[Any, ...]:
    """Descriptions of functions, from a list, one of them, or either as JSON text.

    Raises:
        FormError: it is none of them.
    """
    value = _parsed(value, place)
    if value is None or value == "":
        return ()
    listed = [value] if isinstance(value, Mapping) else value
    if not isinstance(listed, list | tuple):
        raise FormError(f"{place}: expected a list of functions, received {_short(value)}")
    found = []
    for number, one in enumerate(listed):
        own = one if isinstance(one, Mapping) else {}
        function = own.get("function", own)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise FormError(f"{place}[{number}]: has no name, received {_short(one)}")
        found.append(own if "function" in own else {"type": "function", "function": dict(own)})
    return tuple(map(_without_nulls, found))


def read_messages(
    value: Any, settings: Conversation, place: str, *, system: str = "", answered: bool = True
) -> tuple[list[dict[str, Any]], list[bool | None]]:
    """A list of messages in the form that chat templates take, and what each is marked as.

    Args:
        value: what the row has: a list of messages, the same as JSON text, or a list for each field.
        settings: how it is read.
        place: the list's name, for errors.
        system: the system prompt of a row that brings none.
        answered: False: answers at its end are not even looked at.

    Returns:
        The messages, and for each whether it is marked to be learned; None: it is not marked.

    Raises:
        FormError: naming the message and its field.
    """
    value = _transposed(_parsed(value, place))
    if not isinstance(value, list | tuple):
        raise FormError(f"{place}: expected a list of messages, received {_short(value)}")
    reader = _Reader(settings)
    messages: list[dict[str, Any]] = []
    marks: list[bool | None] = []
    listed = list(_each(value, settings, place))
    while not answered and listed and reader.is_answer(*listed[-1], alone=len(listed) == 1):
        listed.pop()
    for one, at in listed:
        message, mark = reader.read(one, at)
        if message["role"] == "system" and settings.system is False:
            continue
        messages.append(message)
        marks.append(mark)
    if system and not any(message["role"] == "system" for message in messages):
        messages.insert(0, {"role": "system", "content": system, _PLACE: "system"})
        marks.insert(0, None)
    if not messages:
        raise FormError(f"{place}: has no message" + ("" if answered else " to be answered"))
    kinds = {message["role"] == "text" for message in messages}
    if len(kinds) > 1:
        raise FormError(f"{place}: has messages of the role text beside others")
    return messages, marks


def learned(
    messages: Sequence[Message], marks: Sequence[bool | None], settings: Conversation, place: str
) -> tuple[bool, ...]:
    """For each message whether it is learned.

    Raises:
        FormError: none is, or one is marked that is no answer.
    """
    for number, (message, mark) in enumerate(zip(messages, marks, strict=True)):
        if mark and message["role"] not in ("assistant", "text"):
            raise FormError(
                f"{place}[{number}]: a message of {message['role']} is marked to be learned; only "
                "answers are"
            )
    answers = [
        message["role"] in ("assistant", "text") and mark is not False
        for message, mark in zip(messages, marks, strict=True)
    ]
    if not any(answers):
        raise FormError(f"{place}: has no answer of an assistant to learn")
    if settings.learn == "last":
        last = max(number for number, one in enumerate(answers) if one)
        answers = [number == last for number in range(len(answers))]
    for one, counted in zip(messages, answers, strict=True):
        if counted and not (one["content"].strip() or one.get("tool_calls")):
            raise FormError(f"{one[_PLACE]}: is empty, expected a text to learn")
    return tuple(answers)


def without_place(message: Mapping[str, Any]) -> Message:
    """A message as chat templates take it."""
    return {key: value for key, value in message.items() if key != _PLACE}


def _each(value: Sequence[Any], settings: Conversation, place: str) -> Iterator[tuple[Any, str]]:
    """Messages and their places; a pair of texts is a question and its answer."""
    for number, one in enumerate(value):
        at = f"{place}[{number}]"
        if isinstance(one, list | tuple) and len(one) == 2:
            for role, text in zip(("user", "assistant"), one, strict=True):
                yield {settings.role[0]: role, settings.content[0]: text}, at
        else:
            yield one, at


class _Reader:
    """Reads one message after the other.

    Args:
        settings: of the task.
    """

    def __init__(self, settings: Conversation) -> None:
        self._settings = settings
        own = {name.casefold(): role for name, role in settings.roles.items()}
        self._roles = {**ROLES, **own}
        mark = settings.learn.field if isinstance(settings.learn, Marked) else None
        self._mark = mark

    def read(self, one: Any, place: str) -> tuple[dict[str, Any], bool | None]:
        """One message, and how it is marked.

        Raises:
            FormError: naming its field.
        """
        if not isinstance(one, Mapping):
            raise FormError(
                f"{place}: expected a message with role and content, received {_short(one)}"
            )
        role = self._role(one, place)
        name = self._name_of(self._settings.content, one)
        at = str(one.get(FROM_FIELD) or f"{place}.{name}")
        content = _content(one.get(name), at, role)
        message: dict[str, Any] = {"role": role, "content": content.text}
        if role == "call":
            message = {"role": "assistant", "content": "", "tool_calls": _called(content.text, at)}
        elif role == "assistant":
            message |= self._answer(one, content, place)
            if content.text is None and not message.get("tool_calls"):
                raise FormError(f"{at}: is null, expected a text")
            message["content"] = message["content"] or ""
        elif content.text is None:
            raise FormError(f"{at}: is null, expected a text")
        for key in ("tool_call_id", "name"):
            if isinstance(one.get(key), str):
                message[key] = one[key]
        return {**message, _PLACE: at}, self._marked(one, place)

    def is_answer(self, one: Any, place: str, *, alone: bool) -> bool:
        """Whether a message is one that is to be learned: of plain text alone its beginning is none."""
        if not isinstance(one, Mapping):
            return False
        role = self._role(one, place)
        return role in ("assistant", "call") or (
            role == "text" and not alone and self._marked(one, place) is not False
        )

    def _answer(self, one: Mapping[str, Any], content: _Content, place: str) -> dict[str, Any]:
        """What an answer has beside its text."""
        found: dict[str, Any] = {}
        reasoning = content.reasoning
        key = next((key for key in _REASONING if one.get(key)), None)
        if key is not None:
            if not isinstance(one[key], str):
                raise FormError(f"{place}.{key}: expected a text, received {_short(one[key])}")
            reasoning = one[key]
        if self._settings.reasoning == "drop":
            found["content"] = THOUGHT.sub("", content.text or "", count=1)
        elif reasoning:
            found["reasoning_content"] = reasoning
        if one.get("tool_calls"):
            found["tool_calls"] = _calls(one["tool_calls"], f"{place}.tool_calls")
        elif one.get("function_call"):
            found["tool_calls"] = _calls([one["function_call"]], f"{place}.function_call")
        elif content.calls:
            found["tool_calls"] = list(content.calls)
        return found

    def _name_of(self, names: Sequence[str], one: Mapping[str, Any]) -> str:
        return next((name for name in names if name in one), names[0])

    def _role(self, one: Mapping[str, Any], place: str) -> str:
        name = self._name_of(self._settings.role, one)
        given = one.get(name)
        if not isinstance(given, str):
            what = f"received {_short(given)}" if name in one else f"the message has {_fields(one)}"
            raise FormError(f"{place}.{name}: expected a role, {what}")
        role = self._roles.get(given.strip().casefold())
        if role is None:
            near = did_you_mean(given, sorted(self._roles))
            raise FormError(
                f"{place}.{name}: unknown role '{given:.60}'{near}; conversation.roles says what it is"
            )
        return role

    def _marked(self, one: Mapping[str, Any], place: str) -> bool | None:
        if self._mark is None or one.get(self._mark) is None:
            return None
        mark = _MARKS.get(str(one[self._mark]).strip().casefold())
        if mark is None:
            raise FormError(
                f"{place}.{self._mark}: expected true or false, 1 or 0, received {_short(one[self._mark])}"
            )
        return mark


@dataclass(frozen=True)
class _Content:
    """A message's text, None where it has none; the reasoning and the tool calls that stand in it."""

    text: str | None
    reasoning: str = ""
    calls: tuple[dict[str, Any], ...] = ()


def _content(value: Any, place: str, role: str) -> _Content:
    """What a message says.

    Raises:
        FormError: it is no text, and holds more than texts, reasoning and calls.
    """
    if value is None or isinstance(value, str):
        return _Content(value)
    if isinstance(value, list | tuple) and all(_is_part(part) for part in value):
        return _parts(value, place)
    kinds = {"tool": Mapping | list | tuple | int | float, "call": Mapping | list | tuple}
    if role in kinds and isinstance(value, kinds[role]):
        return _Content(json.dumps(value, ensure_ascii=False))
    raise FormError(f"{place}: expected a text, received {_short(value)}")


def _is_part(part: Any) -> bool:
    return isinstance(part, str) or (
        isinstance(part, Mapping) and isinstance(part.get("type"), str)
    )


def _parts(value: Sequence[Any], place: str) -> _Content:
    """Parts of a message in order, each with a type and what it holds."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for number, part in enumerate(value):
        own = {"type": "text", "text": part} if isinstance(part, str) else part
        held = next((own[key] for key in ("text", "value", "thinking") if key in own), None)
        if own["type"] in _TEXT_PARTS and isinstance(held, str):
            texts.append(held)
        elif own["type"] in _THOUGHT_PARTS and isinstance(held, str):
            thoughts.append(held)
        elif own["type"] == "tool_call" and held is not None:
            calls += _called(held, f"{place}[{number}]")
        else:
            raise FormError(f"{place}[{number}]: a part of type '{own['type']:.40}' is no text")
    return _Content("".join(texts), "\n".join(thoughts), tuple(calls))


def _called(text: Any, place: str) -> list[dict[str, Any]]:
    """Tool calls that stand as the text of a message."""
    value = _parsed(text, place)
    listed = value if isinstance(value, list) else [value]
    return _calls(listed, place)


def _calls(value: Any, place: str) -> list[dict[str, Any]]:
    """Tool calls, each with its arguments as a dictionary.

    Raises:
        FormError: one has no name, or arguments that are none.
    """
    value = _parsed(value, place)
    if not isinstance(value, list | tuple):
        raise FormError(f"{place}: expected a list of tool calls, received {_short(value)}")
    return [_call(one, f"{place}[{number}]") for number, one in enumerate(value)]


def _call(one: Any, place: str) -> dict[str, Any]:
    own = one if isinstance(one, Mapping) else {}
    function = own.get("function", own)
    below = f"{place}.function" if "function" in own else place
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise FormError(f"{below}.name: expected the name of a function, received {_short(one)}")
    key = next((key for key in ("arguments", "parameters", "args") if key in function), "arguments")
    given = function.get(key)
    arguments = {} if given in (None, "") else _parsed(given, f"{below}.{key}")
    if not isinstance(arguments, Mapping):
        raise FormError(f"{below}.{key}: expected a JSON object, received {_short(given)}")
    if not isinstance(given, str):  # JSON that is written as such means its nulls
        arguments = _without_nulls(arguments)
    call: dict[str, Any] = {
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }
    return {"id": own["id"], **call} if isinstance(own.get("id"), str) else call


def _without_nulls(value: Any) -> Any:
    """Without keys whose value is null: a table of structs has the keys of all rows in each of them."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(one) for one in value]
    return value


def _parsed(value: Any, place: str) -> Any:
    """What a text holds as JSON; anything else as it is."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise FormError(f"{place}: not valid JSON: {error}; received {_short(value)}") from None


def _transposed(value: Any) -> Any:
    """A list of messages, where the row has a list for each field of theirs."""
    if not isinstance(value, Mapping) or not value:
        return value
    columns = list(value.values())
    if not all(isinstance(one, list | tuple) and len(one) == len(columns[0]) for one in columns):
        return value
    return [dict(zip(value, one, strict=True)) for one in zip(*columns, strict=True)]


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


def _fields(one: Mapping[str, Any]) -> str:
    return "the fields " + ", ".join(map(str, one)) if one else "no fields"


def _short(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
