"""From conversations to tokens; an example is a conversation of one prompt and one answer.

Prompt and answer are tokenised together and cut where the answer begins: the token at the boundary is
the one that evaluation will see. Where lm-evaluation-harness's way loses nothing, it is the same.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from itertools import accumulate, islice
from string import ascii_letters, digits
from typing import Any

from mtl_lora_cli.data.chat import ChatTemplate, templates_of
from mtl_lora_cli.data.chat_variables import DEFAULT, WITH_TOOLS
from mtl_lora_cli.data.control_tokens import Brought, ControlTokens, Marked
from mtl_lora_cli.data.conversation import Conversation, Prompt, shared_tokens, tokens_of
from mtl_lora_cli.data.endings import Endings
from mtl_lora_cli.data.pictured import Eyes
from mtl_lora_cli.data.written import Turn, Written, one_turn
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.pictures.shown import Picture
from mtl_lora_cli.recipe.pictures import Images
from mtl_lora_cli.recipe.schema import Chat, Recipe
from mtl_lora_cli.tasks.messages import Dialogue, Message
from mtl_lora_cli.tasks.task import Task

_CHUNK = 4096  # texts tokenised together while the chunk before is read
_CHARACTERS = 2**22  # of them
_LOOKED_AT = 200  # conversations, for what is good to know of them
Read = Callable[[Sequence[str]], list[Any]]
_UNKNOWN = "x"  # stands for an answer that is not known: most begin with a letter


class Encoder:
    """Tokenises conversations in the recipe's prompt format.

    Args:
        tokenizer: a fast transformers tokenizer.
        prompt_format: `plain` (prompt, a space, answer) or `chat` (the tokenizer's chat template).
        chat: how the chat template is used.
        control_tokens: what becomes of control tokens in rows' text, see `ControlTokens`.
        lenient: see `ChatTemplate`.
        images: how pictures are seen; None: as the base model's image processor says.

    Raises:
        UsageError: `chat` with a tokenizer whose chat template is missing or cannot be used, or a
            tokenizer without an end token.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_format: str,
        chat: Chat | None = None,
        *,
        control_tokens: str = "text",
        lenient: bool = False,
        images: Images | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise UsageError("the tokenizer has no end-of-text token")
        self._tokenizer = tokenizer
        self.beyond = getattr(tokenizer, "beyond", None)  # from `load_tokenizer`
        self._format, self._images = prompt_format, images
        self._chat: ChatTemplate | None = None
        self._with_tools: ChatTemplate | None = None
        if prompt_format == "chat":
            self._chat, self._with_tools = templates_of(tokenizer, chat or Chat(), lenient=lenient)
        self.control_tokens = ControlTokens(tokenizer, control_tokens)
        self.end = int(tokenizer.eos_token_id)
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._endings = Endings(self._backend)
        # The start token, if the tokenizer sets one before a text; chat templates bring their own.
        first = tokenizer("x")["input_ids"][:1]
        self._text_start: list[int] = first if first == [tokenizer.bos_token_id] else []
        self._start = self._text_start if self._chat is None else []

    @classmethod
    def of(cls, tokenizer: Any, recipe: Recipe, *, lenient: bool = False) -> Encoder:
        """The encoder that a recipe asks for."""
        return cls(
            tokenizer,
            recipe.prompt_format,
            recipe.chat,
            control_tokens=recipe.control_tokens,
            lenient=lenient,
            images=recipe.images,
        )

    @cached_property
    def eyes(self) -> Eyes:
        """What the base model sees of rows' pictures.

        Raises:
            UsageError: it reads none.
        """
        own = self._images or Images()
        size = None if own.size is None else own.shape
        return Eyes(self._tokenizer.vision(size), blind=own.blind)

    @property
    def notes(self) -> list[str]:
        """What the chat template does that is good to know, a line each."""
        notes = [] if self._chat is None else list(self._chat.notes)
        if self._with_tools is not None:
            notes.append(
                f"rows with tools are written by the chat template '{WITH_TOOLS}', all others by '{DEFAULT}'"
            )
        return notes

    def brought(self, marked: Marked) -> Brought:
        """What is good to know of rows' control tokens and reasoning."""
        drops = self._chat is not None and any(
            one.dialogue is not None and self._writer(one.dialogue).drops_reasoning(one.dialogue)
            for one in islice(marked.examples, _LOOKED_AT)
        )
        first = (marked.first, marked.places[0]) if marked.places else ("", "")
        return Brought(len(marked.examples), len(marked.places), *first, drops)

    def notes_on(self, task: Task, brought: Brought) -> list[str]:
        """What is good to know of a task's control tokens, a line each."""
        own = self.control_tokens.written_by(task)
        if self._chat is None:
            sets = self._tokenizer.convert_ids_to_tokens([*self._start, self.end])
            own = {token: where for token, where in own.items() if token in sets}
        listed = ", ".join(f"{token} ({where})" for token, where in own.items())
        beside = "it is not set twice" if self._chat is None else "the chat template writes its own"
        notes = [f"the template itself writes {listed}; {beside}"] if own else []
        if brought.tokens:
            notes.append(
                f"{brought.tokens:,} of {brought.rows:,} training rows hold a control token "
                f"of the tokenizer, which is read as text: {brought.first}, {brought.where}"
            )
        if brought.drops_reasoning:
            notes.append(
                "the chat template leaves out the reasoning of earlier answers: they are learned without it; "
                "conversation.learn: last learns the last one"
            )
        return notes

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides how a text becomes tokens."""
        parts = (
            self._tokenizer.backend_tokenizer.to_str(),
            self._chat and self._chat.identity,
            *(() if self._with_tools is None else (self._with_tools.identity,)),
            sorted(self._tokenizer.special_tokens_map.items()),  # templates write them
            self._format,
            self.control_tokens.how,
            self._start,
            self.end,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    @cached_property
    def answer_end(self) -> tuple[int, ...]:
        """The tokens behind an answer, as training teaches them."""
        (found,) = self.conversations([one_turn("x", "x")])
        turn = found.turns[-1]
        return tuple(found.tokens[turn.close : turn.end])

    @property
    def stops(self) -> frozenset[int]:
        """Tokens at which an answer that is generated ends."""
        control = self._tokenizer.added_tokens_decoder
        return frozenset({self.end, *(token for token in self.answer_end if token in control)})

    @property
    def lead(self) -> str:
        """What a chat template writes between its generation prompt and an answer."""
        return "" if self._chat is None else self._chat.lead

    @property
    def stop_text(self) -> str:
        """A text at which it ends, too; "" but for templates that end a turn with no control token."""
        return "" if self._chat is None or self._chat.closes else self._chat.ending.strip()

    def prompts(self, texts: Sequence[str]) -> list[str]:
        """The prompts as the model reads them."""
        return list(texts) if self._chat is None else [self._chat.prompt(text) for text in texts]

    def conversations(
        self,
        many: Sequence[Sequence[Message] | Dialogue],
        counts: Sequence[Sequence[bool]] | None = None,
        *,
        wheres: Sequence[str] | None = None,
        task: str = "",
        marked: bool = True,
        shown: Sequence[Sequence[Picture]] | None = None,
        alike: bool = False,
    ) -> Iterator[Conversation]:
        """Tokens of conversations, and which of them are learned.

        Each is written and tokenised once, as a whole, and cut where its answers begin and end. A token
        that lies across such a place is the answer's: tokens are never made of parts of the text.

        Args:
            many: conversations; with `plain` of one prompt and one answer each, or of plain text. A
                `Dialogue` says itself what is learned, also by the template's own marks.
            counts: for each message of a list whether it is learned; None: every answer is.
            wheres, task: where each came from, and the task's name, for errors.
            marked: False: where the generation prompt ends is looked at, whatever the template marks.
            shown: the pictures of each, in the order of their places; None: they show none.
            alike: most begin as those before them do, and this is to be tokenised once.

        Raises:
            UsageError: the chat template cannot write one of them, or a picture cannot be read.
        """
        written = []
        for number, one in enumerate(many):
            try:
                own = None if counts is None else counts[number]
                text = self._written(one, own, marked=marked)
                if shown is not None and shown[number]:
                    text = self.eyes.written(text, shown[number])
                written.append(text)
            except UsageError as error:
                if wheres is None:
                    raise
                place = f"{wheres[number]}: "
                of = f"task '{task}': " if task else ""
                raise UsageError(place + of + str(error).removeprefix(place)) from None
        texts = [self.control_tokens.spelled(one) for one in written]
        encodings = self._encoded(texts, self._endings.encode if alike else self._read)
        for text, encoding in zip(texts, encodings, strict=True):
            start = self._text_start if text.is_text else self._start
            joined = self._joins and not text.is_text
            yield tokens_of(text, encoding, start=start, end=self.end, joined=joined)

    def _written(
        self, one: Sequence[Message] | Dialogue, counts: Sequence[bool] | None, *, marked: bool
    ) -> Written:
        marked = marked and isinstance(one, Dialogue)
        dialogue = one if isinstance(one, Dialogue) else Dialogue.of(one)
        if counts is not None:
            dialogue = replace(dialogue, counts=tuple(counts))
        if dialogue.is_text:
            return _as_text(dialogue)
        if self._chat is None:
            return _plainly(dialogue.messages)
        return self._writer(dialogue).write(dialogue, marked=marked)

    def _writer(self, dialogue: Dialogue) -> ChatTemplate:
        """The chat template that writes a conversation: transformers takes another one for tools."""
        assert self._chat is not None
        return self._with_tools if dialogue.tools and self._with_tools is not None else self._chat

    def continuations(
        self,
        prompts: Sequence[str],
        answers: Sequence[Sequence[str]],
        *,
        wheres: Sequence[str] | None = None,
        shown: Sequence[Sequence[Picture]] | None = None,
    ) -> tuple[list[Prompt], list[list[list[int]]]]:
        """Tokens of each prompt, and of each of its answers as they follow it, without their ends.

        Prompt and answer, one behind the other, are always the tokens of the whole text. The prompt is
        what all its answers leave it: tokens that some of them make another one of are the answers'.
        What a chat template writes before an answer's own text belongs to the prompt here.

        Args:
            prompts: rendered prompts.
            answers: for each prompt one or more answers, without a leading space; "" for one that is not
                known.
            wheres: where each prompt came from, for errors.
            shown: the pictures of each prompt; None: they show none.

        Returns:
            The prompts, and for each prompt its answers' tokens.
        """
        pairs = [
            one_turn(prompt, answer or _UNKNOWN)
            for prompt, several in zip(prompts, answers, strict=True)
            for answer in several
        ]
        owners = [number for number, several in enumerate(answers) for _ in several]
        found = self.conversations(
            pairs,
            wheres=None if wheres is None else [wheres[number] for number in owners],
            shown=None if shown is None else [shown[number] for number in owners],
            alike=len(pairs) > len(prompts),
        )
        first, following = [], []
        for several in answers:
            whole = [next(found) for _ in several]
            cut = shared_tokens(whole)
            begin, end = whole[0].own
            first.append(Prompt(whole[0].tokens[:cut], (min(begin, cut), min(end, cut))))
            following.append(
                [
                    one.tokens[cut : one.turns[-1].close] if answer else []
                    for one, answer in zip(whole, several, strict=True)
                ]
            )
        return first, following

    def asked(
        self,
        dialogues: Sequence[Dialogue],
        *,
        known: bool,
        shown: Sequence[Sequence[Picture]] | None = None,
    ) -> tuple[list[Prompt], list[list[int]]]:
        """Tokens of conversations up to where their last answer begins, and of that answer, without its end.

        Unlike `continuations`, what the chat template writes before an answer's own text is the answer's: a
        model that reasons says it itself.

        Args:
            dialogues: conversations.
            known: False: the answers are not looked at, and are nothing.
            shown: the pictures of each, up to its last answer; None: they show none.
        """
        # A text's tokens before an answer are its own alone; what a chat template writes is the same.
        unknown = ["" if one.is_text else _UNKNOWN for one in dialogues]
        whole = [
            one.asking(None if known else other)
            for one, other in zip(dialogues, unknown, strict=True)
        ]
        prompts, answers = [], []
        for one in self.conversations(whole, marked=False, shown=shown):
            turn = one.turns[-1]
            begin, end = one.own
            cut = turn.begin
            prompts.append(Prompt(one.tokens[:cut], (min(begin, cut), min(end, cut))))
            answers.append(one.tokens[cut : turn.close] if known else [])
        return prompts, answers

    @cached_property
    def _joins(self) -> bool:
        """Whether some answers share a token with white space that the chat template writes before them.

        Then it belongs to all answers: where a prompt ends must not depend on the answer.
        """
        if (
            self._chat is None
            or not self._chat.write(Dialogue.of(one_turn("x", "x"))).before_answer.isspace()
        ):
            return False
        for letter in ascii_letters + digits:
            written = self._chat.write(Dialogue.of(one_turn("x", letter)))
            encoding = self._backend.encode(written.text, add_special_tokens=False)
            place = written.turns[-1].text
            token = encoding.char_to_token(place)
            if token is not None and encoding.token_to_chars(token)[0] < place:
                return True
        return False

    def _encoded(self, texts: Sequence[Written], read: Read) -> Iterator[Any]:
        """What the tokenizer says, in order, a chunk ahead of what is being read.

        The tokenizer runs outside Python's lock, so the next chunk costs the reader no time.
        """
        chunks = _chunks(texts)
        with ThreadPoolExecutor(max_workers=1) as pool:
            ahead = deque(pool.submit(self._encode, chunk, read) for chunk in islice(chunks, 2))
            while ahead:
                yield from ahead.popleft().result()
                ahead.extend(pool.submit(self._encode, chunk, read) for chunk in islice(chunks, 1))

    def _encode(self, texts: Sequence[Written], read: Read) -> list[Any]:
        found = read([one.text for one in texts])
        for number, one in enumerate(texts):
            if one.spelled:
                by_name = self.control_tokens.by_name
                found[number] = by_name.encode(one.text, add_special_tokens=False)
        if self.beyond is not None and self.beyond.tokens:
            self.beyond.require_known(number for one in found for number in one.ids)
        return found

    def _read(self, texts: Sequence[str]) -> list[Any]:
        return list(self._backend.encode_batch(texts, add_special_tokens=False))


def _chunks(texts: Sequence[Written]) -> Iterator[list[Written]]:
    """A few thousand texts at a time, and fewer long ones: what the tokenizer says of them is large."""
    chunk: list[Written] = []
    characters = 0
    for text in texts:
        chunk.append(text)
        characters += len(text.text)
        if len(chunk) == _CHUNK or characters >= _CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _as_text(dialogue: Dialogue) -> Written:
    """Texts behind each other, nothing between them."""
    ends = list(accumulate(len(one["content"]) for one in dialogue.messages))
    spans = zip([0, *ends], ends, dialogue.counts, strict=False)
    turns = tuple(Turn(begin, begin, end, end) for begin, end, counted in spans if counted)
    text = "".join(one["content"] for one in dialogue.messages)
    return Written(text, turns, (0, turns[-1].begin), closed=False, is_text=True)


def _plainly(messages: Sequence[Message]) -> Written:
    """Prompt, a space, answer.

    Raises:
        UsageError: a conversation has other messages.
    """
    if [message["role"] for message in messages] != ["user", "assistant"]:
        raise UsageError(
            "a conversation needs prompt_format: chat; plain is for one prompt and one answer"
        )
    prompt, answer = (message["content"] for message in messages)
    text = f"{prompt} {answer}"
    cut, end = len(prompt), len(text)
    return Written(text, (Turn(cut, cut, end, end),), (0, cut), closed=False)
