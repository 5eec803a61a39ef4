"""A conversation as the tokenizer's chat template writes it, and where its answers stand in it.

The template is asked for the whole conversation, and an answer stands where it puts it: whatever it
writes around an answer, such as an empty think block or the token that ends a turn, is learned with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mtl_lora_cli.data.chat_variables import template_arguments
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.recipe.schema import Chat

Message = Mapping[str, str]  # `role` and `content`

# Two texts whose places are looked for: no template writes them itself or changes their letters.
_USER, _ANSWER = "7391846250", "2850614937"


@dataclass(frozen=True)
class Turn:
    """An answer's place in a text, in characters.

    Attributes:
        begin: where the generation prompt ends; what stands behind it is learned.
        text: where the answer's own text begins.
        close: where it ends.
        end: behind what ends the turn.
    """

    begin: int
    text: int
    close: int
    end: int


@dataclass(frozen=True)
class Written:
    """A conversation as one text.

    Attributes:
        text: what the model reads and learns.
        turns: the places of the answers that count, in order.
        own: characters of the last user message: all that may be cut for want of room.
        closed: whether a control token ends the last answer that counts.
        spelled: whether control tokens stand in it by other names (`ControlTokens`).
    """

    text: str
    turns: tuple[Turn, ...]
    own: tuple[int, int]
    closed: bool
    spelled: bool = False

    @property
    def before_answer(self) -> str:
        """The character before the last answer that counts."""
        place = self.turns[-1].text
        return self.text[place - 1 : place]


@dataclass(frozen=True)
class _Shape:
    """What a template writes around one user message and its answer.

    Attributes:
        head, foot: before and behind the user's text, up to where the model begins.
        lead, tail: from there to the answer's text, and all behind it.
    """

    head: str
    foot: str
    lead: str
    tail: str


def one_turn(prompt: str, answer: str) -> list[Message]:
    """A task of prompt and answer as a conversation."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: of the base model.
        settings: the recipe's `chat`.
        lenient: where the template contradicts itself, answers stand behind the generation prompt,
            although nobody said so: for runs that are trained.

    Raises:
        UsageError: there is no template; it raises, drops a text or contradicts itself; or it does not
            read a variable that it is given.
    """

    def __init__(self, tokenizer: Any, settings: Chat, *, lenient: bool = False) -> None:
        if not tokenizer.chat_template:
            raise UsageError(
                "prompt_format: chat needs a tokenizer with a chat template; use plain"
            )
        self._tokenizer = tokenizer
        self._answers = settings.answers or ("generation_prompt" if lenient else None)
        self.arguments = template_arguments(tokenizer, settings)
        added = (token.content for token in tokenizer.added_tokens_decoder.values())
        self._control = re.compile("|".join(re.escape(t) for t in added if t.strip()) or "(?!)")
        self._before = lru_cache(maxsize=64)(self._generation_prompt)
        self._shape = self._look()

    @property
    def notes(self) -> list[str]:
        """What is good to know of where answers stand, a line each."""
        lead, foot = self._shape.lead, self._shape.foot
        notes = []
        if lead:
            notes.append(
                f"the chat template writes {lead!r} between its generation prompt and an answer: it is "
                "learned with the answer"
            )
        if self._left_out:
            notes.append(
                f"the chat template's generation prompt ends with {foot[-20:]!r}, of which its "
                f"conversation has no {self._left_out!r}: answers stand where the conversation has them"
            )
        if notes and "enable_thinking" in self.arguments["chat_template"]:
            notes[-1] += "; chat.template_kwargs.enable_thinking decides"
        return notes

    @property
    def identity(self) -> tuple[Any, ...]:
        """All that decides what it writes, and where answers stand."""
        return *sorted(self.arguments.items()), self._answers

    @property
    def ending(self) -> str:
        """What ends an answer, "" where the template writes nothing."""
        return self._ending(self._shape.tail)

    @property
    def closes(self) -> bool:
        """Whether a control token ends an answer."""
        return self._control.search(self.ending) is not None

    def prompt(self, text: str) -> str:
        """What the model reads before it answers one user message."""
        return self._before((("user", text),))

    def write(self, messages: Sequence[Message], counts: Sequence[bool] | None = None) -> Written:
        """A conversation, and the places of its answers.

        Args:
            messages: in order.
            counts: for each of them whether it is learned; None: every answer is.

        Raises:
            UsageError: the template raises, drops a text or contradicts itself.
        """
        if counts is None:
            counts = [message["role"] == "assistant" for message in messages]
        if not any(counts):
            raise ValueError("no message of the conversation counts")
        whole = self._render(messages)
        self._require_all(whole, messages)
        turns = []
        for number in (number for number, counted in enumerate(counts) if counted):
            whole, turn = self._turn(whole, messages, number)
            turns.append(turn)
        last = turns[-1]
        closed = self._control.search(whole, last.close, last.end) is not None
        return Written(whole, tuple(turns), self._own(messages, last.begin), closed)

    def _render(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **self.arguments,
            )
        except Exception as error:  # a template may raise whatever Python can
            said = " ".join(str(error).split()) or type(error).__name__
            raise self._refused(
                f"refuses a message of {messages[-1]['role']}: {said}; use plain"
            ) from None
        return text

    def _generation_prompt(self, messages: tuple[tuple[str, str], ...]) -> str:
        found = [{"role": role, "content": content} for role, content in messages]
        return self._render(found, generation_prompt=True)

    def _look(self) -> _Shape:
        """See what the template writes around two texts that stand nowhere else."""
        head, there, foot = self.prompt(_USER).rpartition(_USER)
        if not there:
            raise self._refused("drops the text of a user message; use plain")
        before = head + _USER + foot
        start, there, tail = self._render(one_turn(_USER, _ANSWER)).rpartition(_ANSWER)
        if not there:
            raise self._refused("drops the text of an answer; use plain")
        begin = _beginning(start, before)
        if begin is None:
            begin = self._settle(start, before)
        self._left_out = "" if self._answers == "generation_prompt" else before[begin:]
        return _Shape(head, foot, start[begin:], tail)

    def _settle(self, start: str, before: str) -> int:
        """Where the model begins, though the generation prompt does not begin the conversation.

        Raises:
            UsageError: nobody has said where.
        """
        same = _same(start, before)
        if self._answers is not None:
            return same
        shown = max(0, same - 20)
        thinking = "enable_thinking" in self.arguments["chat_template"]
        raise self._refused(
            f"contradicts itself: before an answer it writes {start[shown:]!r}, and its generation "
            f"prompt is {before[shown:]!r}; chat.answers decides: conversation or generation_prompt"
            + ("; or chat.template_kwargs.enable_thinking" if thinking else "")
        )

    def _turn(self, whole: str, messages: Sequence[Message], number: int) -> tuple[str, Turn]:
        """The place of one answer, and the text, which `chat.answers` may change."""
        before = self._before(tuple((m["role"], m["content"]) for m in messages[:number]))
        last = number == len(messages) - 1
        begin = _beginning(whole, before)
        agreed = begin is not None
        if begin is None:
            begin = self._settle(whole, before)
        text, close = self._place(whole, messages, number, begin)
        if not agreed and last and self._answers == "generation_prompt":
            whole = before + whole[text:]
            begin, text, close = len(before), len(before), len(before) + close - text
        end = close + len(self._ending(whole[close:], last=last))
        return whole, Turn(min(begin, text), text, close, end)

    def _place(
        self, whole: str, messages: Sequence[Message], number: int, begin: int
    ) -> tuple[int, int]:
        """Where a message's own text stands.

        Raises:
            UsageError: it does not stand there.
        """
        content, shape = messages[number]["content"], self._shape
        text, close = begin + len(shape.lead), len(whole) - len(shape.tail)
        if (
            number == len(messages) - 1
            and (whole[begin:text], whole[close:]) == (shape.lead, shape.tail)
            and _bare(whole[text:close]) == _bare(content)
        ):
            return text, close
        marked = [*messages[:number], {**messages[number], "content": _ANSWER}]
        start, _, tail = self._render([*marked, *messages[number + 1 :]]).rpartition(_ANSWER)
        text, close = len(start), len(whole) - len(tail)
        if whole.endswith(tail):
            if whole.startswith(start) and _bare(whole[text:close]) == _bare(content):
                return text, close
            if _bare(content) in _bare(whole[begin:close]):  # with a think block of its own
                return begin, close
        raise self._refused(f"drops or changes the text of an answer: {content[:60]!r}; use plain")

    def _ending(self, tail: str, *, last: bool = True) -> str:
        """The part of what stands behind an answer that ends it: up to a control token, if there is one."""
        if not last:
            whole = self.ending
            token = self._control.search(tail)
            return whole if tail.startswith(whole) or token is None else tail[: token.end()]
        tokens = list(self._control.finditer(tail))
        return tail[: tokens[-1].end()] if tokens else tail.rstrip()

    def _own(self, messages: Sequence[Message], begin: int) -> tuple[int, int]:
        """Characters of the last user message before an answer; none where they cannot be told."""
        asked = [number for number, message in enumerate(messages) if message["role"] == "user"]
        if not asked:
            return begin, begin
        before = self._before(tuple((m["role"], m["content"]) for m in messages[: asked[-1] + 1]))
        content, shape = messages[asked[-1]]["content"], self._shape
        start, close = len(shape.head), len(before) - len(shape.foot)
        if not before.startswith(shape.head) or _bare(before[start:close]) != _bare(content):
            start = before.rfind(content.strip())
            close = start + len(content.strip())
        return (start, close) if start >= 0 and close <= begin else (begin, begin)

    def _require_all(self, whole: str, messages: Sequence[Message]) -> None:
        text = _bare(whole)
        for message in messages:
            if _bare(message["content"]) not in text:
                raise self._refused(
                    f"drops or changes the text of a message of {message['role']}: "
                    f"{message['content'][:60]!r}; use plain"
                )

    def _refused(self, what: str) -> UsageError:
        name = Path(str(self._tokenizer.name_or_path)).name
        return UsageError(f"prompt_format: chat: the chat template of {name} {what}")


def _beginning(whole: str, before: str) -> int | None:
    """How much of a conversation its generation prompt is: without white space at its end, if need be."""
    for prompt in (before, before.rstrip()):
        if whole.startswith(prompt):
            return len(prompt)
    return None


def _same(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = zip(one, other, strict=False)
    least = min(len(one), len(other))
    return next((place for place, (a, b) in enumerate(pairs) if a != b), least)


def _bare(text: str) -> str:
    """A text without white space and case: templates trim, and some write capitals."""
    return "".join(text.split()).casefold()
