"""What is left of a row to know it again: of its prompt and of its texts, without white space and case."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence

import numpy as np

from mtl_lora_cli.tasks.rendering import Example

_FEWEST_WORDS = 3  # of texts by which rows of two tasks are called the same


def traces(examples: Sequence[Example]) -> np.ndarray:
    """For each example a number of 64 bits for its prompt, and one for the texts in it; pictures count with both.

    Two rows with the same texts in other words around them have the same second number; it is 0
    where the texts have too few words to tell one row from another.

    Returns:
        uint64, [examples, 2].
    """
    found = [(_number(_asked(one)), _of_texts(one)) for one in examples]
    return np.array(found, dtype=np.uint64).reshape(-1, 2)


def _asked(example: Example) -> str:
    """Its prompt, and which pictures it shows."""
    return "\0".join([_plain(example.prompt), *_shown(example)])


def _shown(example: Example) -> list[str]:
    return [picture.digest().hex() for picture in example.images]


def _of_texts(example: Example) -> int:
    plain = sorted(filter(None, map(_plain, example.texts)))
    words = sum(text.count(" ") + 1 for text in plain)
    return _number("\0".join(plain + _shown(example))) if words >= _FEWEST_WORDS else 0


def _plain(text: str) -> str:
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.casefold().split())


def _number(text: str) -> int:
    content = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
