"""What a tokenizer's chat template writes, asked in the ways that finding answers in it takes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from mtl_lora_cli.data.chat_parts import ToolForm, find_form, missing_part
from mtl_lora_cli.data.chat_variables import template_arguments
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.recipe.schema import Chat
from mtl_lora_cli.tasks.messages import Dialogue, Message
from mtl_lora_cli.tasks.pictured import PLACE, in_parts, places

# Two texts whose places are looked for: no template writes them itself or changes their letters.
USER, ANSWER = "7391846250", "2850614937"
_SOME_TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks.",
        "parameters": {
            "type": "object",
            "properties": {"at": {"type": "string", "description": "What."}},
            "required": ["at"],
        },
    },
}
_PICTURE, _TEXT = {"type": "image"}, {"type": "text", "text": USER}
_MARKS = re.compile(r"\{%-?\s*generation\b")


class Rendering:
    """A chat template that is asked for texts.

    Args:
        tokenizer: of the base model.
        settings: the recipe's `chat`.
        tools: it is the template for conversations with tools.

    Raises:
        UsageError: there is no template, or it does not read a variable that it is given.
    """

    def __init__(self, tokenizer: Any, settings: Chat, *, tools: bool = False) -> None:
        if not tokenizer.chat_template:
            raise UsageError(
                "prompt_format: chat needs a tokenizer with a chat template; use plain"
            )
        self._tokenizer = tokenizer
        self.arguments = template_arguments(tokenizer, settings, tools=tools)
        # A template for tools may not write a conversation without any, as those that it is asked first.
        self._tools: tuple[Any, ...] = (_SOME_TOOL,) if tools else ()
        added = (token.content for token in tokenizer.added_tokens_decoder.values())
        self._control = re.compile("|".join(re.escape(t) for t in added if t.strip()) or "(?!)")
        self._before = lru_cache(maxsize=64)(self._generation_prompt)

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] = (),
        *,
        generation_prompt: bool = False,
        form: ToolForm | None = None,
    ) -> str:
        form = form or self._form(messages)
        shown = places(messages)
        taken = self._taken(messages, form, as_parts=bool(shown))
        try:
            text = self._asked_for(taken, tools, generation_prompt=generation_prompt)
        except Exception as error:  # a template may raise whatever Python can
            said = " ".join(str(error).split()) or type(error).__name__
            raise self._refused(f"refuses {last_of(messages)}: {said}; use plain") from None
        return self._with_places(text, shown) if shown and self._writes_pictures else text

    def _asked_for(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] = (),
        *,
        generation_prompt: bool = False,
    ) -> str:
        """What the template itself writes; it may raise whatever Python can."""
        text: str = self._tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools or self._tools) or None,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            **self.arguments,
        )
        return text

    def _taken(
        self, messages: Sequence[Message], form: ToolForm, *, as_parts: bool
    ) -> list[dict[str, Any]]:
        """Messages as the template takes them: with pictures, or where it reads nothing else, in parts."""
        taken = [form.taken(message) for message in messages]
        return (
            in_parts(taken) if self._needs_parts or (as_parts and self._writes_pictures) else taken
        )

    @cached_property
    def _needs_parts(self) -> bool:
        """Whether it drops a message whose content is a text and no list of parts, as some with pictures do."""
        return not self._holds_user(USER) and self._holds_user([_TEXT])

    @cached_property
    def _writes_pictures(self) -> bool:
        """Whether it writes a picture among a message's parts. Otherwise a place stands in the text itself."""
        if not self._holds_user([_TEXT]) or not self._holds_user([_PICTURE, _TEXT]):
            return False
        return self._of_user([_PICTURE, _TEXT]) != self._of_user([_TEXT])

    def _holds_user(self, content: Any) -> bool:
        try:
            text = self._of_user(content)
        except Exception:  # a template may raise whatever Python can
            return False
        return USER in text and "'type'" not in text  # and not the list as Python writes it

    def _of_user(self, content: Any) -> str:
        return self._asked_for([{"role": "user", "content": content}])

    def _with_places(self, text: str, shown: int) -> str:
        """A text with places where the template wrote its own mark of a picture.

        Raises:
            UsageError: it wrote another number of them.
        """
        mark = self._mark
        if text.count(mark) != shown:
            raise self._refused(
                f"writes {mark} {text.count(mark)} times for {shown} pictures, expected as many"
            )
        return text.replace(mark, PLACE)

    @cached_property
    def _mark(self) -> str:
        """What the template writes for a picture."""
        return str(self._tokenizer.vision(None).mark)

    def _form(self, messages: Sequence[Message]) -> ToolForm:
        """How the template takes tool calls; found out where there are some."""
        special = any("tool_calls" in one or "reasoning_content" in one for one in messages)
        return self._tool_form if special else ToolForm()

    @cached_property
    def _tool_form(self) -> ToolForm:
        return find_form(
            lambda form, messages: self._render(messages, form=form),
            self.arguments["chat_template"],
        )

    def _generation_prompt(self, key: str) -> str:
        messages, tools = json.loads(key)
        return self._render(messages, tools, generation_prompt=True)

    def _spans(self, dialogue: Dialogue) -> dict[int, tuple[int, int]] | None:
        """For each answer the characters that the template marks; None: it marks none, or not each."""
        if not _MARKS.search(self.arguments["chat_template"]):
            return None
        from transformers.utils.chat_template_utils import render_jinja_template

        form, shown = self._form(dialogue.messages), places(dialogue.messages)
        given = {name: value for name, value in self.arguments.items() if name != "chat_template"}
        (text,), found = render_jinja_template(
            conversations=[self._taken(dialogue.messages, form, as_parts=bool(shown))],
            tools=list(dialogue.tools) or None,
            chat_template=self.arguments["chat_template"],
            return_assistant_tokens_mask=True,
            **{**self._tokenizer.special_tokens_map, **given},
        )
        roles = [message["role"] for message in dialogue.messages]
        answers = [number for number, role in enumerate(roles) if role == "assistant"]
        spans = [(int(begin), int(end)) for begin, end in found[0]]
        if shown and self._writes_pictures:
            mark = self._mark
            less = len(mark) - len(PLACE)
            spans = [
                (begin - less * text[:begin].count(mark), end - less * text[:end].count(mark))
                for begin, end in spans
            ]
        return dict(zip(answers, spans, strict=True)) if len(spans) == len(answers) else None

    def _asked(self, messages: Sequence[Message], tools: Sequence[Any]) -> str | None:
        """Messages with the generation prompt behind them; None: the template does not take so few."""
        try:
            return self._before(key(messages, tools))
        except UsageError:
            return None

    def _around(self, dialogue: Dialogue, number: int) -> tuple[str, str]:
        """What stands before and behind a message's text, or the first function that it calls."""
        message = dict(dialogue.messages[number])
        called = not message["content"].strip() and message.get("tool_calls")
        if called:
            first, *others = called
            named = {**first, "function": {**first["function"], "name": ANSWER}}
            message["tool_calls"] = [named, *others]
        else:
            message["content"] = ANSWER
        messages = [*dialogue.messages[:number], message, *dialogue.messages[number + 1 :]]
        text = self._render(messages, dialogue.tools)
        # What a function gives back may stand under its name, too.
        start, there, tail = text.partition(ANSWER) if called else text.rpartition(ANSWER)
        if not there:
            raise self._refused(f"drops the text of message {number}")
        return start, tail.replace(ANSWER, called[0]["function"]["name"]) if called else tail

    def _span(self, whole: str, dialogue: Dialogue, number: int) -> tuple[int, int]:
        """Where a message's text, or the name of its first call, stands; all, where that is not seen."""
        start, tail = self._around(dialogue, number)
        if (
            whole.startswith(start)
            and whole.endswith(tail)
            and len(start) + len(tail) <= len(whole)
        ):
            return len(start), len(whole) - len(tail)
        return 0, len(whole)

    def _require_all(self, whole: str, dialogue: Dialogue) -> None:
        thoughts = any(message.get("reasoning_content") for message in dialogue.messages)
        if thoughts and not self._form(dialogue.messages).reasoning:
            raise self._refused("reads no reasoning; conversation.reasoning: drop leaves it out")
        missing = missing_part(whole, dialogue)
        if missing is not None:
            raise self._refused(f"drops or changes {missing}; use plain")

    def _refused(self, what: str) -> UsageError:
        name = Path(str(self._tokenizer.name_or_path)).name
        return UsageError(f"prompt_format: chat: the chat template of {name} {what}")

    def before(self, dialogue: Dialogue) -> str:
        """What the model reads before it answers a conversation that nobody has answered yet.

        Raises:
            UsageError: the template raises, or drops a part.
        """
        text = self._before(key(dialogue.messages, dialogue.tools))
        self._require_all(text, dialogue)
        return text


def last_of(messages: Sequence[Message]) -> str:
    return f"a message of {messages[-1]['role']}" if messages else "a conversation without messages"


def key(messages: Sequence[Message], tools: Sequence[Any]) -> str:
    """Messages as what a cache knows them by."""
    return json.dumps([list(messages), list(tools)], ensure_ascii=False, default=str)
