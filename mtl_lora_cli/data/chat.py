"""A conversation as the tokenizer's chat template writes it, and where its answers stand in it.

The template is asked for the whole conversation, and an answer stands where it puts it: whatever it
writes around an answer, such as an empty think block or the token that ends a turn, is learned with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mtl_lora_cli.data.chat_parts import bare
from mtl_lora_cli.data.chat_rendering import ANSWER, USER, Rendering, key
from mtl_lora_cli.data.chat_variables import DEFAULT, WITH_TOOLS, has_template_for_tools
from mtl_lora_cli.data.written import Turn, Written, one_turn
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.recipe.schema import Chat
from mtl_lora_cli.tasks.messages import THOUGHT, Dialogue, Message
from mtl_lora_cli.tasks.pictured import PLACE


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


class ChatTemplate(Rendering):
    """A tokenizer's chat template.

    Args:
        tokenizer: of the base model.
        settings: the recipe's `chat`.
        tools: it is the one for conversations with tools, where a tokenizer has one.
        lenient: where the template contradicts itself, answers stand behind the generation prompt,
            although nobody said so: for runs that are trained.

    Raises:
        UsageError: there is no template; it raises, drops a text or contradicts itself; or it does not
            read a variable that it is given.
    """

    def __init__(
        self, tokenizer: Any, settings: Chat, *, tools: bool = False, lenient: bool = False
    ) -> None:
        super().__init__(tokenizer, settings, tools=tools)
        self._answers = settings.answers or ("generation_prompt" if lenient else None)
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
    def lead(self) -> str:
        """What it writes between its generation prompt and the text of an answer."""
        return self._shape.lead

    @property
    def closes(self) -> bool:
        """Whether a control token ends an answer."""
        return self._control.search(self.ending) is not None

    def prompt(self, text: str) -> str:
        """What the model reads before it answers one user message."""
        return self._before(key([{"role": "user", "content": text}], ()))

    def drops_reasoning(self, dialogue: Dialogue) -> bool:
        """Whether it leaves out the reasoning of an answer that is learned, as some do of all but the last one.

        Raises:
            UsageError: see `write`.
        """
        learned = [
            m for m, counted in zip(dialogue.messages, dialogue.counts, strict=True) if counted
        ]
        thoughts = [bare(message.get("reasoning_content", "")) for message in learned]
        thoughts += [bare(found[1]) for m in learned if (found := THOUGHT.match(m["content"]))]
        if not any(thoughts):
            return False
        text = bare(self._render(dialogue.messages, dialogue.tools))
        return not all(thought in text for thought in thoughts)

    def write(self, dialogue: Dialogue, *, marked: bool = False) -> Written:
        """A conversation, and the places of its answers.

        Args:
            dialogue: messages, and which of them are learned.
            marked: where the template itself marks what an assistant says (`{% generation %}`), that is
                what is learned, with the token that ends a turn.

        Raises:
            UsageError: the template raises, drops a part or contradicts itself.
        """
        if not any(dialogue.counts):
            raise ValueError("no message of the conversation counts")
        whole = self._render(dialogue.messages, dialogue.tools)
        self._require_all(whole, dialogue)
        spans = self._spans(dialogue) if marked else None
        turns: list[Turn] = []
        for number in (number for number, counted in enumerate(dialogue.counts) if counted):
            whole, turn = self._turn(whole, dialogue, number)
            if spans is not None:
                turn = self._as_marked(turn, spans[number])
            if not dialogue.learns_reasoning:
                turn = self._behind_reasoning(whole, turn, dialogue.messages[number])
            if turns and turn.begin < turns[-1].end:
                raise self._refused(f"writes message {number} so that its place cannot be told")
            turns.append(turn)
        last = turns[-1]
        closed = self._control.search(whole, last.close, last.end) is not None
        return Written(whole, tuple(turns), self._own(dialogue, last.begin), closed)

    def _as_marked(self, turn: Turn, span: tuple[int, int]) -> Turn:
        """A turn as the template marks it; what ends it counts even where that is not marked."""
        begin, end = span
        return Turn(
            begin, min(turn.text, end), max(begin, min(turn.close, end)), max(end, turn.end)
        )

    def _behind_reasoning(self, whole: str, turn: Turn, message: Message) -> Turn:
        """A turn without the reasoning before its answer."""
        begin, content = turn.begin, message["content"]
        thought = message.get("reasoning_content") or ""
        inner = THOUGHT.match(content)
        if thought.strip():
            place = whole.find(thought.strip(), begin, turn.end)
            begin = begin if place < 0 else place + len(thought.strip())
        if inner is not None:
            content = content[inner.end() :]
        if thought.strip() or inner is not None:
            said = content.strip() or "<"  # a call begins with a token of its own, as a rule
            place = whole.find(said, begin, turn.end)
            begin = begin if place < 0 else place
        close = max(begin, turn.close)
        return Turn(begin, min(max(begin, turn.text), close), close, turn.end)

    def _look(self) -> _Shape:
        """See what the template writes around two texts that stand nowhere else."""
        head, there, foot = self.prompt(USER).rpartition(USER)
        if not there:
            raise self._refused("drops the text of a user message; use plain")
        before = head + USER + foot
        start, there, tail = self._render(one_turn(USER, ANSWER)).rpartition(ANSWER)
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

    def _turn(self, whole: str, dialogue: Dialogue, number: int) -> tuple[str, Turn]:
        """The place of one answer, and the text, which `chat.answers` may change."""
        messages, tools = dialogue.messages, dialogue.tools
        last = number == len(messages) - 1
        before = self._asked(messages[:number], tools)
        begin = None if before is None else _beginning(whole, before)
        agreed = begin is not None
        if begin is None:
            begin = self._marked_begin(whole, dialogue, number, before)
        if messages[number].get("tool_calls") or messages[number].get("reasoning_content"):
            return whole, self._long_turn(whole, dialogue, number, begin)
        text, close = self._place(whole, dialogue, number, begin)
        if not agreed and last and self._answers == "generation_prompt" and before is not None:
            whole = before + whole[text:]
            begin, text, close = len(before), len(before), len(before) + close - text
        end = close + len(self._ending(whole[close:], last=last))
        return whole, Turn(min(begin, text), text, close, end)

    def _marked_begin(self, whole: str, dialogue: Dialogue, number: int, before: str | None) -> int:
        """Where an answer begins that another text stands before when nobody has answered yet.

        A template may write earlier turns otherwise than the last ones, without their reasoning, say. What
        it writes before an answer is looked for before the answer's text.

        Raises:
            UsageError: it contradicts itself, and nobody has said what holds.
        """
        last = number == len(dialogue.messages) - 1
        if before is not None and last and (number < 2 or self._answers is not None):
            return self._settle(whole, before)
        start, _ = self._around(dialogue, number)
        header = self._shape.foot[self._header :].lstrip()
        # Its first part is enough: `<|im_start|>assistant`, perhaps without the `<think>` that follows it.
        first = header[:1] + header[1:].partition("<")[0].rstrip()
        place = whole[: len(start)].rfind(first)
        if whole.startswith(start) and first and place >= 0:
            if number and place < self._span(whole, dialogue, number - 1)[1]:
                return len(start)  # the turn goes on, without another header
            same = header[: _same(whole[place:], header)]
            cut = same.rfind("<")
            return place + (cut if cut > same.rfind(">") else len(same))
        if before is not None:
            return self._settle(whole, before)
        raise self._refused(f"takes no beginning of a conversation, up to message {number}")

    @cached_property
    def _header(self) -> int:
        """Where the role header of an answer begins in what stands between a question and its answer."""
        foot = self._shape.foot
        asked = self._render([{"role": "user", "content": USER}]).rpartition(USER)[2]
        return len(asked) if foot.startswith(asked) else _same(asked, foot)

    def _long_turn(self, whole: str, dialogue: Dialogue, number: int, begin: int) -> Turn:
        """The place of an answer with tool calls or reasoning: up to where a conversation that ends there ends."""
        messages = dialogue.messages
        if number == len(messages) - 1:
            end = self._trimmed(whole, begin)
        else:
            end = self._end_within(whole, dialogue, number, begin)
        last_token = list(self._control.finditer(whole, begin, end))[-1:]
        close = last_token[0].start() if last_token and last_token[0].end() == end else end
        return Turn(begin, begin, max(begin, close), end)

    def _end_within(self, whole: str, dialogue: Dialogue, number: int, begin: int) -> int:
        """Where a turn ends behind which there are others.

        Raises:
            UsageError: it cannot be told.
        """
        try:
            upto = self._render(dialogue.messages[: number + 1], dialogue.tools)
        except UsageError:
            upto = whole[:begin]
        end = self._trimmed(upto, begin)
        if end > begin and whole.startswith(upto[:end]):
            return end
        _, tail = self._around(dialogue, number)
        close = len(whole) - len(tail)
        if whole.endswith(tail) and close >= begin:
            found = self._ended(whole, close, dialogue.messages[number], upto[:end])
            if found is not None and found <= self._span(whole, dialogue, number + 1)[0]:
                return found
        same = _same(upto, whole)
        token = next((t for t in self._control.finditer(whole, begin) if t.end() > same), None)
        if (
            token is not None and token.start() <= same
        ):  # they end with other tokens, which begin alike
            ended = whole[begin : token.start()].rstrip()
            tokens = list(self._control.finditer(ended))
            if tokens and tokens[-1].end() == len(ended):
                return begin + len(ended)
            if same > begin:
                return token.end()
        if same > begin:
            return self._trimmed(whole[:same], begin)
        raise self._refused(f"writes message {number} otherwise where more messages follow it")

    def _ended(self, whole: str, close: int, message: Message, alone: str) -> int | None:
        """Where a turn ends whose text, or first call, ends at a place; None: it is not seen.

        Args:
            whole: the conversation.
            close: the place.
            message: the answer.
            alone: the conversation up to its end, where nothing follows.
        """
        if not message.get("tool_calls"):
            return close + len(self._ending(whole[close:], last=False))
        if not self.closes:  # the next message's header ends it
            token = self._control.search(whole, close)
            return None if token is None else len(whole[: token.start()].rstrip())
        tokens = self._control.findall(alone)
        ending = tokens[-1] if tokens and alone.endswith(tokens[-1]) else self.ending
        place = whole.find(ending, close)
        return None if place < 0 else place + len(ending)

    def _trimmed(self, text: str, begin: int) -> int:
        """Where what ends a turn ends: the last control token, or the last character."""
        tokens = list(self._control.finditer(text, begin)) if self.closes else []
        return tokens[-1].end() if tokens else len(text.rstrip())

    def _place(self, whole: str, dialogue: Dialogue, number: int, begin: int) -> tuple[int, int]:
        """Where a message's own text stands.

        Raises:
            UsageError: it does not stand there.
        """
        messages, shape = dialogue.messages, self._shape
        content = messages[number]["content"]
        text, close = begin + len(shape.lead), len(whole) - len(shape.tail)
        if (
            number == len(messages) - 1
            and (whole[begin:text], whole[close:]) == (shape.lead, shape.tail)
            and bare(whole[text:close]) == bare(content)
        ):
            return text, close
        start, tail = self._around(dialogue, number)
        text, close = len(start), len(whole) - len(tail)
        if whole.endswith(tail):
            if whole.startswith(start) and bare(whole[text:close]) == bare(content):
                return text, close
            if bare(content) in bare(whole[begin:close]):  # with a think block of its own
                return begin, close
            if bare(THOUGHT.sub("", content, count=1)) == bare(whole[text:close]):
                return text, close  # the template leaves out the reasoning of earlier answers
        raise self._refused(f"drops or changes the text of an answer: {content[:60]!r}; use plain")

    def _ending(self, tail: str, *, last: bool = True) -> str:
        """The part of what stands behind an answer that ends it: up to a control token, if there is one."""
        if not last:
            whole = self.ending
            token = self._control.search(tail)
            return whole if tail.startswith(whole) or token is None else tail[: token.end()]
        tokens = list(self._control.finditer(tail))
        return tail[: tokens[-1].end()] if tokens else tail.rstrip()

    def _own(self, dialogue: Dialogue, begin: int) -> tuple[int, int]:
        """Characters of the last user message before an answer; none where they cannot be told."""
        messages = dialogue.messages[: dialogue.last]
        asked = [number for number, message in enumerate(messages) if message["role"] == "user"]
        if not asked:
            return begin, begin
        before = self._asked(messages[: asked[-1] + 1], dialogue.tools) or ""
        content, shape = messages[asked[-1]]["content"], self._shape
        start, close = len(shape.head), len(before) - len(shape.foot)
        if not before.startswith(shape.head) or bare(before[start:close]) != bare(content):
            own = content.rpartition(PLACE)[2].strip()  # a template may write pictures elsewhere
            start = before.rfind(own)
            close = start + len(own)
        return (start, close) if start >= 0 and close <= begin else (begin, begin)


def templates_of(
    tokenizer: Any, settings: Chat, *, lenient: bool = False
) -> tuple[ChatTemplate, ChatTemplate | None]:
    """The chat template of a tokenizer, and that for conversations with tools, where it is another one.

    Raises:
        UsageError: one of them cannot be used, or they begin or end answers otherwise: an answer that is
            generated would not be read.
    """
    first = ChatTemplate(tokenizer, settings, lenient=lenient)
    if not has_template_for_tools(tokenizer):
        return first, None
    second = ChatTemplate(tokenizer, settings, tools=True, lenient=lenient)
    for what, one, other in (
        ("begin", first.lead, second.lead),
        ("end", first.ending, second.ending),
    ):
        if one != other:
            raise UsageError(
                f"prompt_format: chat: the chat templates '{DEFAULT}' and '{WITH_TOOLS}' {what} an answer "
                f"with {one!r} and {other!r}; use plain"
            )
    return first, second


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
