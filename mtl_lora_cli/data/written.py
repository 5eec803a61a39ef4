"""A conversation as one text, and where its answers stand in it."""

from __future__ import annotations

from dataclasses import dataclass

from mtl_lora_cli.tasks.messages import Message


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
        is_text: it is no chat template's.
    """

    text: str
    turns: tuple[Turn, ...]
    own: tuple[int, int]
    closed: bool
    spelled: bool = False
    is_text: bool = False

    @property
    def before_answer(self) -> str:
        """The character before the last answer that counts."""
        place = self.turns[-1].text
        return self.text[place - 1 : place]


def one_turn(prompt: str, answer: str) -> list[Message]:
    """A task of prompt and answer as a conversation."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
