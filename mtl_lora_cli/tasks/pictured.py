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
        found: list[Picture] = []
        for expression in self._expressions:
            value = expression(dict(variables))
            some = value if isinstance(value, list | tuple) else [value]
            found += [Picture.of(one, self._root, where) for one in some if one not in (None, "")]
        return tuple(found)


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


def unplaced(text: str) -> str:
    """A text as people read it."""
    return text.replace(PLACE, MARK)
