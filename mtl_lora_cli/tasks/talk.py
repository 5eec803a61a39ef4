"""From the variables of a row to a conversation, by the keys of a template's `conversation`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from mtl_lora_cli.recipe.conversation import ConversationSettings
from mtl_lora_cli.tasks.jinja import Expression, Text
from mtl_lora_cli.tasks.message_forms import (
    learned,
    read_messages,
    read_tools,
    shown_in,
    without_place,
)
from mtl_lora_cli.tasks.message_parts import FormError
from mtl_lora_cli.tasks.messages import Dialogue
from mtl_lora_cli.tasks.pictured import MARK, PLACE


class Told(NamedTuple):
    """A conversation, and what each place of a picture in it shows: as its part says; None: the row's next one."""

    dialogue: Dialogue
    shown: list[Any]


class Talk:
    """Reads rows as conversations; compiles what reads them once.

    Args:
        settings: how they are read.
        shows: users may show pictures.

    Attributes:
        names: of the variables that it reads.
    """

    def __init__(self, settings: ConversationSettings, *, shows: bool = False) -> None:
        self._settings, self._shows = settings, shows
        self._messages = Expression(settings.messages)
        self._tools = None if settings.tools is None else Expression(settings.tools)
        self._system = Text(settings.system) if isinstance(settings.system, str) else None
        self._place = settings.messages if settings.messages.isidentifier() else "messages"
        parts = (self._messages, self._tools, self._system)
        self.names = frozenset().union(*(part.names for part in parts if part is not None))

    def given(self, messages: list[Any], tools: list[Any]) -> Dialogue:
        """Messages that stand in no row, to be answered; a system prompt that reads a row is not theirs.

        Raises:
            FormError: something in the conversation is not what it should be.
        """
        constant = self._system is not None and not self._system.names
        system = self._system({}).strip() if constant and self._system is not None else ""
        found, _ = read_messages(
            messages, self._settings, "messages", system=system, answered=False
        )
        counts = (False,) * len(found)
        return Dialogue(tuple(map(without_place, found)), counts, read_tools(tools, "tools"))

    def __call__(self, variables: dict[str, Any], *, labelled: bool = True) -> Told:
        """One row.

        Args:
            variables: its fields.
            labelled: False: it is to be answered; answers at its end are not looked at.

        Raises:
            FormError: something in the conversation is not what it should be.
        """
        if not self._shows:
            _require_text(variables)
        system = "" if self._system is None else self._system(variables).strip()
        value = self._messages(variables)
        messages, marks = read_messages(
            value,
            self._settings,
            self._place,
            system=system,
            answered=labelled,
            shows=self._shows,
        )
        tools = () if self._tools is None else read_tools(self._tools(variables), "tools")
        counts = (
            learned(messages, marks, self._settings, self._place)
            if labelled
            else (False,) * len(messages)
        )
        reasoning = self._settings.reasoning != "unlearned"
        told = Dialogue(tuple(map(without_place, messages)), counts, tools, reasoning)
        return Told(told, shown_in(messages))


def with_pictures(told: Told, pictures: Sequence[Any]) -> tuple[Dialogue, list[Any]]:
    """A conversation with a place for each picture, and what stands there, in order.

    Those of a row stand where `<image>` does, or a part that names none; where nothing says where, before the
    first question, a line each.

    Args:
        told: the conversation.
        pictures: the row's own.

    Raises:
        FormError: there are fewer of them than places, or more.
    """
    open_ = told.shown.count(None)
    if not told.shown and pictures:
        return _in_front(told.dialogue, len(pictures)), list(pictures)
    if open_ != len(pictures):
        raise FormError(
            f"{open_} times {MARK} in the messages and {len(pictures)} pictures, expected as many"
        )
    rest = iter(pictures)
    return told.dialogue, [next(rest) if one is None else one for one in told.shown]


def _in_front(dialogue: Dialogue, count: int) -> Dialogue:
    """With so many places before the first question.

    Raises:
        FormError: nobody asks one.
    """
    roles = [message["role"] for message in dialogue.messages]
    if "user" not in roles:
        raise FormError(f"the row has {count} pictures, and no message of a user that shows them")
    first = roles.index("user")
    content = f"{PLACE}\n" * count + dialogue.messages[first]["content"]
    message: Mapping[str, Any] = {**dialogue.messages[first], "content": content}
    messages = (*dialogue.messages[:first], message, *dialogue.messages[first + 1 :])
    return replace(dialogue, messages=messages)


def _require_text(variables: dict[str, Any]) -> None:
    """Refuse rows whose conversation is about pictures: they would be left out, and `<image>` read as text.

    Raises:
        FormError: naming the field.
    """
    for field in ("image", "images"):
        if variables.get(field):
            raise FormError(
                f"the row shows pictures ('{field}'), which the template does not read; "
                f"images: [{field} | default(none)] in it, or instruct/llava or instruct/messages_images, does"
            )
