"""Pictures in prompts: which a row shows, and where each of them stands in its text.

`<image>` in a rendered prompt, of the template or of the row, stands for the next picture. Without one they stand
before the text, a line each. In an example the places are characters that no text has (`PLACE`), so that
nothing else can be taken for one; a model's own writing takes their place before the text is tokenised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtl_lora_cli.pictures.shown import Picture
from mtl_lora_cli.tasks.jinja import Expression

MARK = "<image>"
PLACE = "\U000f0a59\U000ffb33"


class Shows:
    """The pictures of a task's rows.

    Args:
        expressions: of the template's `images`; each gives a picture, a list of them, or nothing.
        root: the folder that paths are relative to.
    """

    def __init__(self, expressions: Sequence[str], root: Path) -> None:
        self._expressions = [Expression(one) for one in expressions]
        self._root = root

    def of(self, variables: Mapping[str, Any], where: str) -> tuple[Picture, ...]:
        """The pictures of a row in their order.

        Raises:
            ValueError: something else than pictures stands there.
            Exception: whatever an expression raises.
        """
        found: list[Any] = []
        for expression in self._expressions:
            value = expression(dict(variables))
            some = value if isinstance(value, list | tuple) else [value]
            found += [one for one in some if one not in (None, "")]
        return self.pictures(found, where)

    def pictures(self, values: Sequence[Any], where: str) -> tuple[Picture, ...]:
        """What a row holds as pictures.

        Raises:
            ValueError: one of them is none.
        """
        return tuple(
            one if isinstance(one, Picture) else Picture.of(one, self._root, where)
            for one in values
        )


def placed(prompt: str, count: int) -> str:
    """A rendered prompt with a place for each of its pictures.

    Raises:
        ValueError: `<image>` stands in it another number of times than there are pictures.
    """
    marks = prompt.count(MARK)
    if not marks:
        return f"{PLACE}\n" * count + prompt
    if marks != count:
        raise ValueError(
            f"{marks} times {MARK} in the prompt and {count} pictures, expected as many"
        )
    return prompt.replace(MARK, PLACE)


def in_parts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose contents are lists of parts, as chat templates of models that read pictures take them.

    A line break beside a place belongs to it, as rows of LLaVA's form have one: templates write their own.
    """
    return [
        {**one, "content": _parts(one["content"])} if isinstance(one["content"], str) else dict(one)
        for one in messages
    ]


def _parts(content: str) -> list[dict[str, str]]:
    texts = content.split(PLACE)
    found: list[dict[str, str]] = []
    for number, text in enumerate(texts):
        text = text.removeprefix("\n") if number else text
        text = text if number == len(texts) - 1 else text.removesuffix("\n")
        if text or len(texts) == 1:
            found.append({"type": "text", "text": text})
        if number < len(texts) - 1:
            found.append({"type": "image"})
    return found


def places(messages: Sequence[Mapping[str, Any]]) -> int:
    """How many places of pictures are in messages."""
    return sum(message["content"].count(PLACE) for message in messages)


def unplaced(text: str) -> str:
    """A text as people read it."""
    return text.replace(PLACE, MARK)
