"""From conversations to tokens; an example is a conversation of one prompt and one answer.

Prompt and answer are tokenised together and cut where the answer begins: the token at the boundary is
the one that evaluation will see. Where lm-evaluation-harness's way loses nothing, it is the same.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from string import ascii_letters, digits
from typing import Any, Literal

import numpy as np

from mtl_lora_cli.data.chat import ChatTemplate, Message, Turn, Written, one_turn
from mtl_lora_cli.data.control_tokens import ControlTokens, Marked
from mtl_lora_cli.data.conversation import Conversation, Prompt, shared_tokens, tokens_of
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.recipe.schema import Chat, Recipe
from mtl_lora_cli.tasks.rendering import Example
from mtl_lora_cli.tasks.task import Task

_CHUNK = 4096  # texts tokenised together while the chunk before is read
_UNKNOWN = "x"  # stands for an answer that is not known: most begin with a letter

Overflow = Literal["error", "drop", "truncate_prompt"]


class Encoder:
    """Tokenises conversations in the recipe's prompt format.

    Args:
        tokenizer: a fast transformers tokenizer.
        prompt_format: `plain` (prompt, a space, answer) or `chat` (the tokenizer's chat template).
        chat: how the chat template is used.
        control_tokens: what becomes of control tokens in rows' text, see `ControlTokens`.
        lenient: see `ChatTemplate`.

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
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise UsageError("the tokenizer has no end-of-text token")
        self._tokenizer = tokenizer
        self.beyond = getattr(tokenizer, "beyond", None)  # from `load_tokenizer`
        self._format = prompt_format
        self._chat = (
            ChatTemplate(tokenizer, chat or Chat(), lenient=lenient)
            if prompt_format == "chat"
            else None
        )
        self.control_tokens = ControlTokens(tokenizer, control_tokens)
        self.end = int(tokenizer.eos_token_id)
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        # The start token, if the tokenizer sets one before a text; chat templates bring their own.
        first = tokenizer("x")["input_ids"][:1]
        starts = self._chat is None and first == [tokenizer.bos_token_id]
        self._start: list[int] = first if starts else []

    @classmethod
    def of(cls, tokenizer: Any, recipe: Recipe, *, lenient: bool = False) -> Encoder:
        """The encoder that a recipe asks for."""
        return cls(
            tokenizer,
            recipe.prompt_format,
            recipe.chat,
            control_tokens=recipe.control_tokens,
            lenient=lenient,
        )

    @property
    def notes(self) -> list[str]:
        """What the chat template does that is good to know, a line each."""
        return [] if self._chat is None else self._chat.notes

    def notes_on(self, task: Task, marked: Marked) -> list[str]:
        """What is good to know of a task's control tokens, a line each."""
        own = self.control_tokens.written_by(task)
        if self._chat is None:
            sets = self._tokenizer.convert_ids_to_tokens([*self._start, self.end])
            own = {token: where for token, where in own.items() if token in sets}
        listed = ", ".join(f"{token} ({where})" for token, where in own.items())
        beside = "it is not set twice" if self._chat is None else "the chat template writes its own"
        notes = [f"the template itself writes {listed}; {beside}"] if own else []
        if marked.places:
            notes.append(
                f"{len(marked.places):,} of {len(marked.examples):,} training rows hold a control token "
                f"of the tokenizer, which is read as text: {marked.first}, {marked.places[0]}"
            )
        return notes

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides how a text becomes tokens."""
        parts = (
            self._tokenizer.backend_tokenizer.to_str(),
            self._chat and self._chat.identity,
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
    def stop_text(self) -> str:
        """A text at which it ends, too; "" but for templates that end a turn with no control token."""
        return "" if self._chat is None or self._chat.closes else self._chat.ending.strip()

    def prompts(self, texts: Sequence[str]) -> list[str]:
        """The prompts as the model reads them."""
        return list(texts) if self._chat is None else [self._chat.prompt(text) for text in texts]

    def conversations(
        self, many: Sequence[Sequence[Message]], counts: Sequence[Sequence[bool]] | None = None
    ) -> Iterator[Conversation]:
        """Tokens of conversations, and which of them are learned.

        Each is written and tokenised once, as a whole, and cut where its answers begin and end. A token
        that lies across such a place is the answer's: tokens are never made of parts of the text.

        Args:
            many: conversations; with `plain` of one prompt and one answer each.
            counts: for each message whether it is learned; None: every answer is.

        Raises:
            UsageError: the chat template cannot write one of them.
        """
        if self._chat is None:
            written = [_plainly(messages) for messages in many]
        else:
            written = [
                self._chat.write(messages, None if counts is None else counts[number])
                for number, messages in enumerate(many)
            ]
        written = [self.control_tokens.spelled(one) for one in written]
        encodings = self._encoded(written)
        for one, encoding in zip(written, encodings, strict=True):
            yield tokens_of(one, encoding, start=self._start, end=self.end, joined=self._joins)

    def continuations(
        self, prompts: Sequence[str], answers: Sequence[Sequence[str]]
    ) -> tuple[list[Prompt], list[list[list[int]]]]:
        """Tokens of each prompt, and of each of its answers as they follow it, without their ends.

        Prompt and answer, one behind the other, are always the tokens of the whole text. The prompt is
        what all its answers leave it: tokens that some of them make another one of are the answers'.
        What a chat template writes before an answer's own text belongs to the prompt here.

        Args:
            prompts: rendered prompts.
            answers: for each prompt one or more answers, without a leading space; "" for one that is not
                known.

        Returns:
            The prompts, and for each prompt its answers' tokens.
        """
        pairs = [
            one_turn(prompt, answer or _UNKNOWN)
            for prompt, several in zip(prompts, answers, strict=True)
            for answer in several
        ]
        found = self.conversations(pairs)
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

    @cached_property
    def _joins(self) -> bool:
        """Whether some answers share a token with white space that the chat template writes before them.

        Then it belongs to all answers: where a prompt ends must not depend on the answer.
        """
        if self._chat is None or not self._chat.write(one_turn("x", "x")).before_answer.isspace():
            return False
        for letter in ascii_letters + digits:
            written = self._chat.write(one_turn("x", letter))
            encoding = self._backend.encode(written.text, add_special_tokens=False)
            place = written.turns[-1].text
            token = encoding.char_to_token(place)
            if token is not None and encoding.token_to_chars(token)[0] < place:
                return True
        return False

    def _encoded(self, texts: Sequence[Written]) -> Iterator[Any]:
        """The tokenizer's encodings in order, a chunk ahead of what is being read.

        The tokenizer runs outside Python's lock, so the next chunk costs the reader no time.
        """
        chunks = [texts[start : start + _CHUNK] for start in range(0, len(texts), _CHUNK)]
        with ThreadPoolExecutor(max_workers=1) as pool:
            ahead = deque(pool.submit(self._encode, chunk) for chunk in chunks[:2])
            for following in [*chunks[2:], None, None][: len(chunks)]:
                yield from ahead.popleft().result()
                if following is not None:
                    ahead.append(pool.submit(self._encode, following))

    def _encode(self, texts: Sequence[Written]) -> list[Any]:
        found = self._backend.encode_batch([one.text for one in texts], add_special_tokens=False)
        for number, one in enumerate(texts):
            if one.spelled:
                by_name = self.control_tokens.by_name
                found[number] = by_name.encode(one.text, add_special_tokens=False)
        if self.beyond is not None and self.beyond.tokens:
            self.beyond.require_known(number for one in found for number in one.ids)
        return list(found)


def _plainly(messages: Sequence[Message]) -> Written:
    """Prompt, a space, answer."""
    prompt, answer = (message["content"] for message in messages)
    text = f"{prompt} {answer}"
    cut, end = len(prompt), len(text)
    return Written(text, (Turn(cut, cut, end, end),), (0, cut), closed=False)


@dataclass(frozen=True)
class EncodedSplit:
    """The examples of one task's split, as tokens.

    Attributes:
        tokens: int32, all examples behind each other.
        starts: int64 [E + 1], where each example begins.
        prompt_lengths: int32 [E], tokens before the answer.
        dropped, truncated: rows left out, and rows whose prompt was cut, for want of room.
        rows: rows of the source.
    """

    tokens: np.ndarray
    starts: np.ndarray
    prompt_lengths: np.ndarray
    dropped: int
    truncated: int
    rows: int

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, answer and end token included, int64 [E]."""
        return np.diff(self.starts)

    @property
    def supervised(self) -> int:
        """Answer tokens of all examples, end tokens included."""
        return int(self.starts[-1] - self.prompt_lengths.sum())

    def example(self, number: int) -> np.ndarray:
        """Tokens of one example."""
        return self.tokens[self.starts[number] : self.starts[number + 1]]

    def take(self, numbers: np.ndarray) -> EncodedSplit:
        """Some of the examples, in the given order."""
        parts = [self.example(int(number)) for number in numbers]
        return EncodedSplit(
            tokens=np.concatenate(parts) if parts else self.tokens[:0],
            starts=np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64),
            prompt_lengths=self.prompt_lengths[numbers],
            dropped=self.dropped,
            truncated=self.truncated,
            rows=self.rows,
        )


def encode_split(
    examples: Sequence[Example],
    wheres: Sequence[str],
    encoder: Encoder,
    *,
    task: str,
    limit: int,
    on_overflow: Overflow,
) -> EncodedSplit:
    """Encode examples for training: prompt, answer, end token.

    Args:
        examples: rendered, with their answers.
        wheres: where each came from, for errors.
        encoder: tokenises.
        task: the task's name, for errors.
        limit: tokens that an example may have.
        on_overflow: what happens to a longer one.

    Raises:
        UsageError: an example is too long and `on_overflow` is `error`, or an answer alone is too
            long, or is cut to nothing; or no example is left.
    """
    found = encoder.conversations([one_turn(one.prompt, one.answer) for one in examples])
    parts: list[list[int]] = []
    prompt_lengths: list[int] = []
    dropped = truncated = 0
    too_long: list[tuple[int, int]] = []
    for number, one in enumerate(found):
        turn = one.turns[-1]
        if turn.close == turn.text:
            raise UsageError(f"{wheres[number]}: task '{task}': the answer has no token of its own")
        prompt, answer = Prompt(one.tokens[: turn.begin], one.own), one.tokens[turn.begin :]
        kept = prompt.tokens
        room = limit - len(answer)
        if len(prompt) > room:
            if on_overflow == "drop":
                dropped += 1
                continue
            if on_overflow == "error":
                too_long.append((number, len(one.tokens)))
                continue
            if room < max(1, prompt.fixed):
                raise UsageError(
                    f"{wheres[number]}: task '{task}': the answer alone has "
                    f"{turn.close - turn.text} tokens, {len(answer) + prompt.fixed} with what stands "
                    f"around it; rows hold {limit}"
                )
            kept = prompt.shortened(room)
            truncated += 1
        parts.append([*kept, *answer])
        prompt_lengths.append(len(kept))
    if too_long:
        number, length = too_long[0]
        raise UsageError(
            f"{wheres[number]}: task '{task}': the example has {length} tokens, rows hold {limit} "
            f"({len(too_long)} of {len(examples)} examples are too long); raise training.row_length, "
            "or set training.on_overflow to drop or truncate_prompt"
        )
    if not parts:
        raise UsageError(f"task '{task}': no example is left of {len(examples)}")
    return EncodedSplit(
        tokens=np.concatenate([np.asarray(part, dtype=np.int32) for part in parts]),
        starts=np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64),
        prompt_lengths=np.asarray(prompt_lengths, dtype=np.int32),
        dropped=dropped,
        truncated=truncated,
        rows=len(examples),
    )
