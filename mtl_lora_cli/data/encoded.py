"""The examples of a split as tokens: what a run learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np

from mtl_lora_cli.data.conversation import Conversation, Prompt
from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.data.mixture import all_positions
from mtl_lora_cli.data.written import one_turn
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.pictures.shown import Picture
from mtl_lora_cli.tasks.messages import Dialogue
from mtl_lora_cli.tasks.pictured import places
from mtl_lora_cli.tasks.rendering import Example

Overflow = Literal["error", "drop", "truncate_prompt"]


@dataclass(frozen=True)
class EncodedSplit:
    """The examples of one task's split, as tokens.

    Attributes:
        tokens: int32, all examples behind each other.
        starts: int64 [E + 1], where each example begins.
        prompt_lengths: int32 [E], tokens before the first one that is learned.
        dropped, truncated: rows left out, and rows whose prompt was cut, for want of room.
        rows: rows of the source.
        mask: bool, of each of `tokens` whether it is learned; None: all behind the prompts are.
        turns: of conversations, turns left out for want of room.
        pictures: of each example those that it shows, in the order of their tokens; None: none does.
        picture_token: that stands for a part of one, and is never learned.
    """

    tokens: np.ndarray
    starts: np.ndarray
    prompt_lengths: np.ndarray
    dropped: int
    truncated: int
    rows: int
    mask: np.ndarray | None = None
    turns: int = 0
    pictures: tuple[tuple[Picture, ...], ...] | None = None
    picture_token: int | None = None

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, answer and end token included, int32 [E]."""
        return np.diff(self.starts).astype(np.int32)

    @cached_property
    def positions(self) -> np.ndarray:
        """Places that each example takes in a row (`positions_of`), int32 [E]."""
        return all_positions(self.lengths)

    def length(self, number: int) -> int:
        """Tokens of one example."""
        return int(self.starts[number + 1] - self.starts[number])

    @property
    def supervised(self) -> int:
        """Tokens of all examples that are learned, end tokens included."""
        if self.mask is not None:
            return int(self.mask.sum())
        return int(self.starts[-1] - self.prompt_lengths.sum())

    def example(self, number: int) -> np.ndarray:
        """Tokens of one example."""
        return self.tokens[self.starts[number] : self.starts[number + 1]]

    def learned(self, number: int, loss_on: str = "answer") -> np.ndarray:
        """Which tokens of one example are learned, int64, never its first: nothing stands before it."""
        length = self.length(number)
        if loss_on == "all":
            every = np.arange(1, length)
            if self.picture_token is None:
                return every
            return every[self.example(number)[1:] != self.picture_token]
        if self.mask is None:
            return np.arange(max(1, int(self.prompt_lengths[number])), length)
        own = self.mask[self.starts[number] : self.starts[number + 1]]
        return np.flatnonzero(own[1:]) + 1

    def learned_counts(self, loss_on: str = "answer") -> np.ndarray:
        """How many tokens of each example are learned, int64 [E]."""
        if loss_on == "all" and self.picture_token is None:
            return self.lengths - 1
        if self.mask is None and loss_on != "all":
            return self.lengths - np.maximum(1, self.prompt_lengths)
        counted = self.tokens != self.picture_token if loss_on == "all" else self.mask
        if counted is None or not len(self):
            return np.zeros(len(self), dtype=np.int64)
        firsts = self.starts[:-1]  # nothing stands before an example's first token
        return np.add.reduceat(counted, firsts, dtype=np.int64) - counted[firsts]

    def take(self, numbers: np.ndarray) -> EncodedSplit:
        """Some of the examples, in the given order."""
        chosen = [slice(self.starts[number], self.starts[number + 1]) for number in numbers]
        lengths = [one.stop - one.start for one in chosen]

        def part(values: np.ndarray) -> np.ndarray:
            return np.concatenate([values[one] for one in chosen]) if chosen else values[:0]

        return EncodedSplit(
            tokens=part(self.tokens),
            starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            prompt_lengths=self.prompt_lengths[numbers],
            dropped=self.dropped,
            truncated=self.truncated,
            rows=self.rows,
            mask=None if self.mask is None else part(self.mask),
            turns=self.turns,
            pictures=None if self.pictures is None else tuple(self.pictures[n] for n in numbers),
            picture_token=self.picture_token,
        )


@dataclass
class Piece:
    """Some rows of a split as tokens: what is kept of them, and what is left out.

    Attributes:
        rows: how many there were.
        tokens, mask: of each example that is kept.
        pictures: that it shows.
        dropped, truncated, turns: see `EncodedSplit`.
        too_long: those that are an error: where, and tokens.
    """

    rows: int
    tokens: list[np.ndarray] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)
    pictures: list[tuple[Picture, ...]] = field(default_factory=list)
    dropped: int = 0
    truncated: int = 0
    turns: int = 0
    too_long: list[tuple[str, int]] = field(default_factory=list)

    def add(self, tokens: list[int], mask: list[bool], pictures: tuple[Picture, ...] = ()) -> None:
        self.tokens.append(np.asarray(tokens, dtype=np.int32))
        self.masks.append(np.asarray(mask, dtype=bool))
        self.pictures.append(pictures)

    def arrays(self) -> dict[str, np.ndarray]:
        """Tokens and mask, one example behind the other; the lengths of examples and prompts."""
        return {
            "tokens": np.concatenate([np.empty(0, np.int32), *self.tokens]),
            "mask": np.concatenate([np.empty(0, bool), *self.masks]),
            "lengths": np.asarray([len(one) for one in self.tokens], dtype=np.int32),
            "prompt_lengths": np.asarray([one.argmax() for one in self.masks], dtype=np.int32),
        }


def starts_of(lengths: np.ndarray) -> np.ndarray:
    """Where each example begins, int64 [E + 1]."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def require_kept(
    task: str, limit: int, *, rows: int, kept: int, too_long: int, first: tuple[str, int] | None
) -> None:
    """Refuse examples that no row holds, and a task of which none is left.

    Args:
        task: the task's name.
        limit: tokens that an example may have.
        rows: examples that there were.
        kept: and are left.
        too_long: those that are an error.
        first: where the first of them stands, and its tokens.

    Raises:
        UsageError: naming the first one, or the task.
    """
    if first is not None:
        where, length = first
        raise UsageError(
            f"{where}: task '{task}': the example has {length} tokens, rows hold {limit} "
            f"({too_long} of {rows} examples are too long); raise training.row_length, "
            "or set training.on_overflow to drop or truncate_prompt"
        )
    if not kept:
        raise UsageError(f"task '{task}': no example is left of {rows}")


def encode_split(
    examples: Sequence[Example],
    wheres: Sequence[str],
    encoder: Encoder,
    *,
    task: str,
    limit: int,
    on_overflow: Overflow,
) -> EncodedSplit:
    """All of a split's examples at once: see `encode_piece`.

    Raises:
        UsageError: likewise; an example is too long and `on_overflow` is `error`; or no example is left.
    """
    piece = encode_piece(examples, wheres, encoder, task=task, limit=limit, on_overflow=on_overflow)
    first = piece.too_long[0] if piece.too_long else None
    many = len(piece.too_long)
    require_kept(task, limit, rows=piece.rows, kept=len(piece.tokens), too_long=many, first=first)
    found = piece.arrays()
    masked = any(one.dialogue for one in examples)
    shows = any(one.images for one in examples)
    return EncodedSplit(
        tokens=found["tokens"],
        starts=starts_of(found["lengths"]),
        prompt_lengths=found["prompt_lengths"],
        dropped=piece.dropped,
        truncated=piece.truncated,
        rows=piece.rows,
        mask=found["mask"] if masked else None,
        turns=piece.turns,
        pictures=tuple(piece.pictures) if shows else None,
        picture_token=encoder.eyes.vision.token_id if shows else None,
    )


def encode_piece(
    examples: Sequence[Example],
    wheres: Sequence[str],
    encoder: Encoder,
    *,
    task: str,
    limit: int,
    on_overflow: Overflow,
) -> Piece:
    """Encode examples for training: prompt, answer, end token; or conversations of several turns.

    Args:
        examples: rendered, with their answers.
        wheres: where each came from, for errors.
        encoder: tokenises.
        task: the task's name, for errors.
        limit: tokens that an example may have.
        on_overflow: what happens to a longer one. With `truncate_prompt` a prompt loses the beginning of
            its text, and a conversation its earliest turns, whole.

    Raises:
        UsageError: an answer alone is too long, or is cut to nothing.
    """
    eyes = encoder.eyes if any(one.images for one in examples) else None
    talks = [
        one.dialogue.up_to_last() if one.dialogue else one_turn(one.prompt, one.answer)
        for one in examples
    ]
    every = [shown_by(one) for one in examples]
    kept = Piece(len(examples))
    found = encoder.conversations(
        talks, wheres=wheres, task=task, shown=None if eyes is None else every
    )
    for number, one in enumerate(found):
        place, shown = f"{wheres[number]}: task '{task}'", every[number]
        if eyes is not None:
            eyes.require_all(one.tokens, shown, place)
            one = replace(one, own=eyes.behind(one.tokens, one.own))
        for turn in one.turns:
            if turn.close == turn.text and examples[number].dialogue is None:
                raise UsageError(f"{place}: the answer has no token of its own")
        mask = one.mask
        if not any(mask[1:]):
            raise UsageError(f"{place}: nothing is left to be learned")
        if len(one.tokens) <= limit:
            kept.add(one.tokens, mask, shown)
        elif on_overflow == "drop":
            kept.dropped += 1
        elif on_overflow == "error":
            kept.too_long.append((wheres[number], len(one.tokens)))
        else:
            talk = talks[number]
            if isinstance(talk, Dialogue):
                _add_shortened(kept, talk, encoder, limit, shown)
            else:
                _add_cut(kept, one, limit, place, shown)
    return kept


def shown_by(example: Example) -> tuple[Picture, ...]:
    """The pictures that an example shows before its last answer: what follows that is not read."""
    if example.dialogue is None or not example.images:
        return example.images
    return example.images[: places(example.dialogue.up_to_last().messages)]


def latest(shorter: Dialogue, shown: tuple[Picture, ...]) -> tuple[Picture, ...]:
    """The pictures of a conversation that lost its earliest turns; a system message shows none."""
    return shown[len(shown) - places(shorter.messages) :]


def _add_cut(
    kept: Piece, one: Conversation, limit: int, place: str, shown: tuple[Picture, ...]
) -> None:
    """Keep an example whose prompt loses its beginning.

    Raises:
        UsageError: what must stay is too long.
    """
    turn = one.turns[-1]
    prompt, answer = Prompt(one.tokens[: turn.begin], one.own), one.tokens[turn.begin :]
    room = limit - len(answer)
    if room < max(1, prompt.fixed):
        if shown:
            raise UsageError(
                f"{place}: its {len(shown)} pictures and what stands around them have "
                f"{len(answer) + prompt.fixed} tokens, which are not cut; rows hold {limit}"
            )
        raise UsageError(
            f"{place}: the answer alone has {turn.close - turn.text} tokens, "
            f"{len(answer) + prompt.fixed} with what stands around it; rows hold {limit}"
        )
    short = prompt.shortened(room)
    kept.truncated += 1
    kept.add([*short, *answer], [False] * len(short) + [True] * len(answer), shown)


def _add_shortened(
    kept: Piece, talk: Dialogue, encoder: Encoder, limit: int, shown: tuple[Picture, ...]
) -> None:
    """Keep a conversation without its earliest turns, and their pictures; one whose last turn alone is too long is
    left out."""
    shorter = talk.without_earliest()
    while shorter is not None:
        shown = latest(shorter, shown)
        (one,) = encoder.conversations([shorter], shown=[shown])
        if len(one.tokens) <= limit:
            kept.add(one.tokens, one.mask, shown)
            kept.truncated += 1
            kept.turns += len(talk.messages) - len(shorter.messages)
            return
        shorter = shorter.without_earliest()
    kept.dropped += 1
