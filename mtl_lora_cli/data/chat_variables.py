"""What a chat template is told besides the messages: the recipe's own variables, and the date of the run."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

from mtl_lora_cli.errors import UsageError, did_you_mean
from mtl_lora_cli.recipe.schema import Chat

_CLOCK = "strftime_now"  # the function by which templates print a date
_DIRECTIVES = "aAbBcdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ%"


def template_arguments(tokenizer: Any, settings: Chat) -> dict[str, Any]:
    """Arguments of `apply_chat_template`: the template's text, and the recipe's variables.

    Raises:
        UsageError: the template does not read one of the variables.
    """
    template: str = tokenizer.get_chat_template()
    words = re.findall(r"\w+", template)
    for name in settings.template_kwargs:
        if name not in words:
            raise UsageError(
                f"chat.template_kwargs.{name}: the chat template reads no such variable"
                f"{did_you_mean(name, sorted(set(words)))}"
            )
    if settings.date is not None and _CLOCK in words:
        template = _dated(template, datetime.fromisoformat(settings.date))
    return {**settings.template_kwargs, "chat_template": template}


def prints_date(tokenizer: Any) -> bool:
    """Whether what the chat template writes depends on the time."""
    return bool(tokenizer.chat_template) and _CLOCK in tokenizer.get_chat_template()


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
