"""Conversations as tokens: places in a text become places among its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mtl_lora_cli.data.written import Turn, Written


@dataclass(frozen=True)
class Prompt:
    """What a model reads before it answers.

    Attributes:
        tokens: all of them.
        own: from which to which of them are the row's own, that may be cut for want of room; the others
            are a start token, or what the chat template writes.
    """

    tokens: list[int]
    own: tuple[int, int]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def fixed(self) -> int:
        """Tokens that stay, however small the room is."""
        return len(self) - (self.own[1] - self.own[0])

    def shortened(self, room: int) -> list[int]:
        """At most `room` tokens: the row's own lose their beginning, as the question stands at the end.

        Raises:
            ValueError: there is no room for those that must stay.
        """
        gone = max(0, len(self) - room)
        begin, end = self.own
        if gone > end - begin:
            raise ValueError(f"room for {room} of {self.fixed} tokens that are not the row's own")
        return self.tokens[:begin] + self.tokens[begin + gone :]


@dataclass(frozen=True)
class Conversation:
    """A conversation as tokens.

    Attributes:
        tokens: up to the end of the last answer that counts.
        turns: for each answer that counts the places among the tokens; `close` is `text` where the
            tokenizer makes no token of the answer.
        own: from which to which token the last user message's text goes, which may be cut.
    """

    tokens: list[int]
    turns: tuple[Turn, ...]
    own: tuple[int, int]

    @property
    def mask(self) -> list[bool]:
        """For each token whether it is learned."""
        learned = [False] * len(self.tokens)
        for turn in self.turns:
            learned[turn.begin : turn.end] = [True] * (turn.end - turn.begin)
        return learned


def tokens_of(
    written: Written, encoding: Any, *, start: list[int], end: int, joined: bool
) -> Conversation:
    """A conversation's tokens, and its places among them.

    Args:
        written: the conversation as one text.
        encoding: the tokenizer's, of that text.
        start: the start token, if one is to be set; a text that begins with it has it already.
        end: the token that is set behind an answer that ends with no control token.
        joined: white space before an answer's text is the answer's.
    """
    ids: list[int] = encoding.ids
    set_before = [] if ids[: len(start)] == start else start
    length = len(written.text)

    known: dict[tuple[int, bool], int] = {}  # `functools.cache` would take longer than all it saves

    def at(place: int, behind: bool = False) -> int:
        if (place, behind) not in known:
            found = _token_at(encoding, place, length, behind=behind)
            known[place, behind] = len(set_before) + found
        return known[place, behind]

    def has_token(turn: Turn) -> bool:
        for place in range(turn.text, turn.close):  # `any` would take longer to begin than to end
            if not written.text[place].isspace() and encoding.char_to_token(place) is not None:
                return True
        return False

    def placed(turn: Turn) -> Turn:
        text = len(written.text[: turn.text].rstrip()) if joined else turn.text
        close = at(turn.close, True) if has_token(turn) else at(text)
        return Turn(at(min(turn.begin, text)), at(text), close, at(turn.end, True))

    turns = tuple(map(placed, written.turns))
    tokens = [*set_before, *ids][: turns[-1].end]
    if not written.closed and tokens[-1] != end:
        tokens.append(end)
        last = turns[-1]
        turns = (*turns[:-1], Turn(last.begin, last.text, last.close, len(tokens)))
    # A start token that the text itself begins with stays, too.
    begin = max(len(start), at(written.own[0], True))
    return Conversation(tokens, turns, (begin, max(begin, at(written.own[1]))))


def _token_at(encoding: Any, place: int, length: int, *, behind: bool) -> int:
    """How many tokens stand before a character; one that lies across counts with `behind` only."""
    for character in range(place, length):
        token = encoding.char_to_token(character)
        if token is not None:
            across = encoding.token_to_chars(token)[0] < place
            return int(token) + (behind and across)
    return len(encoding)


def shared_tokens(whole: Sequence[Conversation]) -> int:
    """How many tokens all of them begin with, up to where the first answer begins."""
    cut = min(one.turns[-1].text for one in whole)
    first = whole[0].tokens
    for one in whole[1:]:
        if one.tokens[:cut] != first[:cut]:
            pairs = zip(one.tokens, first, strict=False)
            cut = next(place for place, (ours, theirs) in enumerate(pairs) if ours != theirs)
    return cut
