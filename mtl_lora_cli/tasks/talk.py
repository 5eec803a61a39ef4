"""From the variables of a row to a conversation, by the keys of a template's `conversation`."""

from __future__ import annotations

from typing import Any

from mtl_lora_cli.recipe.conversation import ConversationSettings
from mtl_lora_cli.tasks.jinja import Expression, Text
from mtl_lora_cli.tasks.message_forms import (
    learned,
    read_messages,
    read_tools,
    without_place,
)
from mtl_lora_cli.tasks.message_parts import FormError
from mtl_lora_cli.tasks.messages import Dialogue


class Talk:
    """Reads rows as conversations; compiles what reads them once.

    Attributes:
        names: of the variables that it reads.
    """

    def __init__(self, settings: ConversationSettings) -> None:
        self._settings = settings
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

    def __call__(self, variables: dict[str, Any], *, labelled: bool = True) -> Dialogue:
        """One row.

        Args:
            variables: its fields.
            labelled: False: it is to be answered; answers at its end are not looked at.

        Raises:
            FormError: something in the conversation is not what it should be.
        """
        _require_text(variables)
        system = "" if self._system is None else self._system(variables).strip()
        value = self._messages(variables)
        messages, marks = read_messages(
            value, self._settings, self._place, system=system, answered=labelled
        )
        tools = () if self._tools is None else read_tools(self._tools(variables), "tools")
        counts = (
            learned(messages, marks, self._settings, self._place)
            if labelled
            else (False,) * len(messages)
        )
        reasoning = self._settings.reasoning != "unlearned"
        return Dialogue(tuple(map(without_place, messages)), counts, tools, reasoning)


def _require_text(variables: dict[str, Any]) -> None:
    """Refuse rows whose conversation is about pictures: they would be left out, and `<image>` read as text.

    Raises:
        FormError: naming the field.
    """
    for field in ("image", "images"):
        if variables.get(field):
            raise FormError(
                f"the row shows pictures ('{field}'), which conversations do not read yet; "
                "without the field the text alone is learned"
            )
