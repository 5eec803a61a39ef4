"""What a chat template is told besides the messages: the recipe's own variables, and the date of the run."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

from mtl_lora_cli.errors import UsageError, did_you_mean
from mtl_lora_cli.recipe.schema import Chat

_CLOCK = "strftime_now"  # the function by which templates print a date
_DIRECTIVES = "aAbBcdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ%"


DEFAULT, WITH_TOOLS = "default", "tool_use"  # what transformers looks for where there are several


def has_template_for_tools(tokenizer: Any) -> bool:
    """Whether rows with tools are written by a chat template of their own."""
    return isinstance(tokenizer.chat_template, dict) and WITH_TOOLS in tokenizer.chat_template


def template_text(tokenizer: Any, *, tools: bool = False) -> str:
    """The chat template that transformers takes for conversations without tools, or with some.

    Raises:
        UsageError: there are several, and none has the name that it looks for.
    """
    named = tokenizer.chat_template
    if not isinstance(named, dict):
        return str(named)
    if tools and WITH_TOOLS in named:
        return str(named[WITH_TOOLS])
    if DEFAULT not in named:
        raise UsageError(
            f"prompt_format: chat: the tokenizer has the chat templates {', '.join(sorted(named))}, and "
            f"none of the name '{DEFAULT}', which transformers takes; use plain"
        )
    return str(named[DEFAULT])


def _texts(tokenizer: Any) -> list[str]:
    """All templates that may be taken."""
    return [template_text(tokenizer, tools=tools) for tools in (False, True)]


def template_arguments(tokenizer: Any, settings: Chat, *, tools: bool = False) -> dict[str, Any]:
    """Arguments of `apply_chat_template`: the template's text, and the recipe's variables.

    Args:
        tokenizer: of the base model.
        settings: the recipe's `chat`.
        tools: of conversations with tools.

    Raises:
        UsageError: no template reads one of the variables, or there is none that could be taken.
    """
    template = template_text(tokenizer, tools=tools)
    words = {word for text in _texts(tokenizer) for word in re.findall(r"\w+", text)}
    for name in settings.template_kwargs:
        if name not in words:
            raise UsageError(
                f"chat.template_kwargs.{name}: the chat template reads no such variable"
                f"{did_you_mean(name, sorted(words))}"
            )
    if settings.date is not None and _CLOCK in template:
        template = _dated(template, datetime.fromisoformat(settings.date))
    return {**settings.template_kwargs, "chat_template": template}


def prints_date(tokenizer: Any) -> bool:
    """Whether what a chat template writes depends on the time."""
    if not tokenizer.chat_template:
        return False
    return any(_CLOCK in text for text in _texts(tokenizer))


def _dated(template: str, date: datetime) -> str:
    """A template whose clock stands still.

    transformers hands no functions to a template, so a macro takes the place of its clock: each
    directive of the format, such as `%d`, becomes that part of the date.
    """
    parts = "".join(
        f"|replace({'%' + flag + letter!r}, {date.strftime('%' + flag + letter)!r})"
        for flag in ("-", "")
        for letter in _DIRECTIVES[:-1]
    )
    # `%%` is set aside meanwhile. The line end goes with the block before it.
    body = f"{{{{- format|replace('%%', '\\0'){parts}|replace('\\0', '%') -}}}}"
    return f"{{%- macro {_CLOCK}(format) -%}}{body}{{%- endmacro %}}\n{template}"
