"""How rows are read as conversations: the keys below `conversation`, in a template and in a recipe's task."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from mtl_lora_cli.recipe.yaml_file import StrictModel

Role = Literal["system", "user", "assistant", "tool", "call", "text"]
FieldNames = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]


class MarkedField(StrictModel):
    """What is learned is said by a field of each message; where it is missing, an answer is learned."""

    field: Annotated[str, Field(min_length=1)]


def _learn_form(value: Any) -> str:
    return "by field" if isinstance(value, dict | MarkedField) else "by name"


Learn = Annotated[
    Annotated[Literal["all", "last"], Tag("by name")] | Annotated[MarkedField, Tag("by field")],
    Discriminator(_learn_form),
]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class ConversationSettings(StrictModel):
    """A row as a conversation; see docs/own-tasks.md."""

    messages: str = "messages"  # an expression that gives the list of messages
    role: FieldNames = ["role", "from"]  # a message's field; of several the first that it has
    content: FieldNames = ["content", "value"]
    roles: dict[str, Role] = {}  # names of roles in the rows, beside the usual ones
    # For rows that bring none: a text, which may read the row. False: not even their own.
    system: str | Literal[False] | None = None
    tools: str | None = None  # an expression that gives the functions' descriptions
    learn: Learn = "all"  # every answer, the last one, or those that a field marks
    reasoning: Literal["keep", "drop", "unlearned"] = "keep"

    _one_name = field_validator("role", "content", mode="before")(_as_list)

    @field_validator("system")
    @classmethod
    def _not_true(cls, system: Any) -> Any:
        if system is True:
            raise ValueError("expected a text, false or null, received true")
        return system

    def overlaid(self, other: ConversationSettings | None) -> ConversationSettings:
        """The same with the keys that another one sets."""
        if other is None:
            return self
        given = {name: getattr(other, name) for name in other.model_fields_set}
        return self.model_copy(update=given)
