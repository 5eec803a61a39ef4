"""From rendered examples to tokens.

Prompt and answer are tokenised together, and the prompt's own tokens are counted off: the token at
the boundary is the one that evaluation will see, and the way is that of lm-evaluation-harness.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.tasks.rendering import Example

_CHUNK = 4096  # texts tokenised together while the chunk before is read

Overflow = Literal["error", "drop", "truncate_prompt"]


class Encoder:
    """Tokenises prompts and answers in the recipe's prompt format.

    Args:
        tokenizer: a fast transformers tokenizer.
        prompt_format: `plain` (prompt, a space, answer) or `chat` (the tokenizer's chat template).

    Raises:
        UsageError: `chat` with a tokenizer that has no chat template, or one without an end token.
    """

    def __init__(self, tokenizer: Any, prompt_format: str) -> None:
        if prompt_format == "chat" and not tokenizer.chat_template:
            raise UsageError(
                "prompt_format: chat needs a tokenizer with a chat template; use plain"
            )
        if tokenizer.eos_token_id is None:
            raise UsageError("the tokenizer has no end-of-text token")
        self._tokenizer = tokenizer
        self._format = prompt_format
        self._chat = prompt_format == "chat"
        self._delimiter = "" if self._chat else " "
        self.end = int(tokenizer.eos_token_id)
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        # The start token, if the tokenizer sets one before a text; chat templates bring their own.
        first = tokenizer("x")["input_ids"][:1]
        starts = not self._chat and first == [tokenizer.bos_token_id]
        self._start: list[int] = first if starts else []

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides how a text becomes tokens."""
        parts = (
            self._tokenizer.backend_tokenizer.to_str(),
            self._tokenizer.chat_template if self._chat else None,
            sorted(self._tokenizer.special_tokens_map.items()),  # templates write them
            self._format,
            self._start,
            self.end,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    @property
    def answer_end(self) -> tuple[int, ...]:
        """The tokens behind an answer, as training teaches them."""
        return (self.end,)

    def prompts(self, texts: Sequence[str]) -> list[str]:
        """The prompts as the model reads them."""
        if not self._chat:
            return list(texts)
        return [
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            for text in texts
        ]

    def continuations(
        self, prompts: Sequence[str], answers: Sequence[Sequence[str]]
    ) -> tuple[list[list[int]], list[list[list[int]]]]:
        """Tokens of each prompt, and of each of its answers as they follow it.

        Prompt and answer are tokenised once, together, and cut where the answer's first character
        begins. Where a token lies across that place, or answers leave the prompt different tokens,
        the prompt is tokenised alone and its tokens are counted off.

        Args:
            prompts: rendered prompts.
            answers: for each prompt one or more answers, without a leading space.

        Returns:
            The prompts' tokens, and for each prompt its answers' tokens.
        """
        texts = self.prompts(prompts)
        joined = [
            text + self._delimiter + answer
            for text, several in zip(texts, answers, strict=True)
            for answer in several
        ]
        encodings = self._encoded(joined)
        prompt_tokens, following = [], []
        for text, several in zip(texts, answers, strict=True):
            whole = [next(encodings) for _ in several]
            cuts = [self._cut(encoding, len(text)) for encoding in whole]
            ids = [encoding.ids for encoding in whole]
            first = None if cuts[0] is None else ids[0][: cuts[0]]
            if first is None or any(
                cut is None or tokens[:cut] != first
                for tokens, cut in zip(ids[1:], cuts[1:], strict=True)
            ):
                first = self._backend.encode(text, add_special_tokens=False).ids
                cuts = [len(first)] * len(several)
            prompt_tokens.append(self._start + first)
            following.append([tokens[cut:] for tokens, cut in zip(ids, cuts, strict=True)])
        return prompt_tokens, following

    def _encoded(self, texts: Sequence[str]) -> Iterator[Any]:
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

    def _encode(self, texts: Sequence[str]) -> list[Any]:
        return list(self._backend.encode_batch(list(texts), add_special_tokens=False))

    def _cut(self, encoding: Any, place: int) -> int | None:
        """How many tokens stand before character `place`; None where one lies across it."""
        token = encoding.char_to_token(place + len(self._delimiter))
        if token is None:
            return None
        while token and encoding.token_to_chars(token - 1)[0] >= place:
            token -= 1
        if token and encoding.token_to_chars(token - 1)[1] > place:
            return None
        return None if encoding.token_to_chars(token)[0] < place else int(token)

    def shorten(self, prompt: list[int], room: int) -> list[int]:
        """The last `room` tokens of a prompt, its start token kept: the question stands at the end."""
        if len(prompt) <= room:
            return prompt
        return self._start + prompt[len(prompt) - room + len(self._start) :]


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
    prompts, answers = encoder.continuations(
        [example.prompt for example in examples], [[example.answer] for example in examples]
    )
    parts: list[list[int]] = []
    prompt_lengths: list[int] = []
    dropped = truncated = 0
    too_long: list[tuple[int, int]] = []
    for number, (prompt, (answer,)) in enumerate(zip(prompts, answers, strict=True)):
        if not answer:
            raise UsageError(f"{wheres[number]}: task '{task}': the answer has no token of its own")
        room = limit - len(answer) - 1
        if len(prompt) > room:
            if on_overflow == "drop":
                dropped += 1
                continue
            if on_overflow == "error":
                too_long.append((number, len(prompt) + len(answer) + 1))
                continue
            if room < 1:
                raise UsageError(
                    f"{wheres[number]}: task '{task}': the answer alone has {len(answer)} tokens; "
                    f"rows hold {limit}"
                )
            prompt = encoder.shorten(prompt, room)
            truncated += 1
        parts.append([*prompt, *answer, encoder.end])
        prompt_lengths.append(len(prompt))
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
