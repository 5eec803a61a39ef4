"""A row as a conversation: the forms in which such data come, made into one.

What a row calls messages and roles, and how it spells tool calls, tool results and reasoning, differs from one
source to the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mtl_lora_cli.errors import did_you_mean
from mtl_lora_cli.recipe.conversation import ConversationSettings, MarkedField
from mtl_lora_cli.tasks.message_parts import (
    Content,
    FormError,
    called,
    calls_of,
    content_of,
    parsed,
    short,
    without_nulls,
)
from mtl_lora_cli.tasks.messages import THOUGHT, Message

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
FROM_FIELD = "from_field"  # of a message that a template makes: the row's field, for errors
_PLACE, _SHOWN = "place", "shown"  # of a message while it is read
_MARKS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def read_tools(value: Any, place: str) -> tuple[Any, ...]:
    """Descriptions of functions, from a list, one of them, or either as JSON text.

    Raises:
        FormError: it is none of them.
    """
    value = parsed(value, place)
    if value is None or value == "":
        return ()
    listed = [value] if isinstance(value, Mapping) else value
    if not isinstance(listed, list | tuple):
        raise FormError(f"{place}: expected a list of functions, received {short(value)}")
    found = []
    for number, one in enumerate(listed):
        own = one if isinstance(one, Mapping) else {}
        function = own.get("function", own)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise FormError(f"{place}[{number}]: has no name, received {short(one)}")
        found.append(own if "function" in own else {"type": "function", "function": dict(own)})
    return tuple(map(without_nulls, found))


def read_messages(
    value: Any,
    settings: ConversationSettings,
    place: str,
    *,
    system: str = "",
    answered: bool = True,
    shows: bool = False,
) -> tuple[list[dict[str, Any]], list[bool | None]]:
    """A list of messages in the form that chat templates take, and what each is marked as.

    Args:
        value: what the row has: a list of messages, the same as JSON text, or a list for each field.
        settings: how it is read.
        place: the list's name, for errors.
        system: the system prompt of a row that brings none.
        answered: False: answers at its end are not even looked at.
        shows: users may show pictures; see `content_of`.

    Returns:
        The messages, and for each whether it is marked to be learned; None: it is not marked.

    Raises:
        FormError: naming the message and its field.
    """
    value = _transposed(parsed(value, place))
    if not isinstance(value, list | tuple):
        raise FormError(f"{place}: expected a list of messages, received {short(value)}")
    reader = _Reader(settings, shows)
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
    messages: Sequence[Message],
    marks: Sequence[bool | None],
    settings: ConversationSettings,
    place: str,
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
    return {key: value for key, value in message.items() if key not in (_PLACE, _SHOWN)}


def shown_in(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """What each place of a picture in messages shows, in order; None: the row's next picture."""
    return [one for message in messages for one in message.get(_SHOWN, ())]


def _each(
    value: Sequence[Any], settings: ConversationSettings, place: str
) -> Iterator[tuple[Any, str]]:
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
        shows: users may show pictures.
    """

    def __init__(self, settings: ConversationSettings, shows: bool = False) -> None:
        self._settings, self._shows = settings, shows
        own = {name.casefold(): role for name, role in settings.roles.items()}
        self._roles = {**ROLES, **own}
        mark = settings.learn.field if isinstance(settings.learn, MarkedField) else None
        self._mark = mark

    def read(self, one: Any, place: str) -> tuple[dict[str, Any], bool | None]:
        """One message, and how it is marked.

        Raises:
            FormError: naming its field.
        """
        if not isinstance(one, Mapping):
            raise FormError(
                f"{place}: expected a message with role and content, received {short(one)}"
            )
        role = self._role(one, place)
        name = self._name_of(self._settings.content, one)
        at = str(one.get(FROM_FIELD) or f"{place}.{name}")
        content = content_of(one.get(name), at, role, shows=self._shows)
        message: dict[str, Any] = {"role": role, "content": content.text}
        if content.pictures and role != "user":
            raise FormError(f"{at}: a message of {role} shows a picture; only users show some")
        if content.pictures:
            message[_SHOWN] = content.pictures
        if role == "call":
            message = {"role": "assistant", "content": "", "tool_calls": called(content.text, at)}
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

    def _answer(self, one: Mapping[str, Any], content: Content, place: str) -> dict[str, Any]:
        """What an answer has beside its text."""
        found: dict[str, Any] = {}
        reasoning = content.reasoning
        key = next((key for key in _REASONING if one.get(key)), None)
        if key is not None:
            if not isinstance(one[key], str):
                raise FormError(f"{place}.{key}: expected a text, received {short(one[key])}")
            reasoning = one[key]
        if self._settings.reasoning == "drop":
            found["content"] = THOUGHT.sub("", content.text or "", count=1)
        elif reasoning:
            found["reasoning_content"] = reasoning
        if one.get("tool_calls"):
            found["tool_calls"] = calls_of(one["tool_calls"], f"{place}.tool_calls")
        elif one.get("function_call"):
            found["tool_calls"] = calls_of([one["function_call"]], f"{place}.function_call")
        elif content.calls:
            found["tool_calls"] = list(content.calls)
        return found

    def _name_of(self, names: Sequence[str], one: Mapping[str, Any]) -> str:
        return next((name for name in names if name in one), names[0])

    def _role(self, one: Mapping[str, Any], place: str) -> str:
        name = self._name_of(self._settings.role, one)
        given = one.get(name)
        if not isinstance(given, str):
            what = f"received {short(given)}" if name in one else f"the message has {_fields(one)}"
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
                f"{place}.{self._mark}: expected true or false, 1 or 0, received {short(one[self._mark])}"
            )
        return mark


def _transposed(value: Any) -> Any:
    """A list of messages, where the row has a list for each field of theirs."""
    if not isinstance(value, Mapping) or not value:
        return value
    columns = list(value.values())
    if not all(isinstance(one, list | tuple) and len(one) == len(columns[0]) for one in columns):
        return value
    return [dict(zip(value, one, strict=True)) for one in zip(*columns, strict=True)]


def _fields(one: Mapping[str, Any]) -> str:
    return "the fields " + ", ".join(map(str, one)) if one else "no fields"
