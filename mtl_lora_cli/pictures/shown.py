"""A picture that a row shows to a model: where it lies, its bytes known again, its pixels when they are wanted."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.pictures.decode import (
    Site,
    decoded,
    decoded_size,
    locate,
    picture_size,
    read_picture,
)

GREY = (127, 127, 127)


@dataclass(frozen=True)
class Picture:
    """One picture of a row.

    Attributes:
        root: the folder that its address is relative to.
        address: as `pictures.decode` reads it; of bytes that stand in the row itself, their name.
        content: those bytes; None: they lie in a file.
        where: file and line of the row, for errors.
    """

    root: Path
    address: str
    content: bytes | None = field(default=None, repr=False)
    where: str = field(default="", compare=False)

    @classmethod
    def of(cls, value: Any, root: Path, where: str) -> Picture:
        """From what a row holds: a path, bytes with a name as a hub's `Image` column has them, or `{"base64": "…"}`.

        Raises:
            ValueError: it is none of these.
        """
        if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
            return cls(root, str(value.get("path") or "bytes"), value["bytes"], where)
        if isinstance(value, dict) and isinstance(value.get("base64"), str):
            return cls(root, "base64", _from_base64(value["base64"]), where)
        if isinstance(value, dict) and isinstance(value.get("path"), str):
            value = value["path"]
        if not isinstance(value, str) or not value:
            raise ValueError(f"expected the path of a picture, received {value!r:.60}")
        if value.startswith("data:"):
            return cls(root, "data", _inline(value), where)
        if value.startswith(("http://", "https://")):
            raise ValueError(
                f"expected the path of a picture, received the address {value:.60}: nothing is fetched"
            )
        value = value.removeprefix("file://")
        return cls(root, value, None, where)

    @property
    def site(self) -> Site:
        """Where it stands, for errors."""
        return Site(self.where, "images")

    def read(self) -> Image.Image:
        """In RGB, as `pictures.decode.read_picture` says.

        Raises:
            UsageError: it is missing, broken, too large or no picture.
        """
        if self.content is not None:
            return decoded(io.BytesIO(self.content), self.address, self.site)
        return read_picture(self.root, self.address, self.site)

    def size(self) -> tuple[int, int]:
        """Height and width; only the head is read.

        Raises:
            UsageError: as `read`, as far as the head says it.
        """
        if self.content is not None:
            return decoded_size(io.BytesIO(self.content), self.address, self.site)
        return picture_size(self.root, self.address, self.site)

    def digest(self) -> bytes:
        """16 bytes that tell its bytes from others: the same picture under two names has one.

        Raises:
            UsageError: the file is missing.
        """
        if self.content is not None:
            return hashlib.blake2b(self.content).digest()[:16]
        path = locate(self.root, self.address, self.site)
        state = path.stat()
        inside = self.address.partition("#")[2].encode()
        return file_digest(str(path), state.st_size, state.st_mtime_ns) + inside

    def to_json(self) -> list[str]:
        """For a cache; of a picture that lies in a file.

        Raises:
            UsageError: its bytes stand in the row.
        """
        if self.content is not None:
            raise UsageError(f"{self.where}: images: bytes in rows are not kept")
        return [str(self.root), self.address, self.where]

    @classmethod
    def from_json(cls, content: list[str]) -> Picture:
        """The inverse of `to_json`."""
        root, address, where = content
        return cls(Path(root), address, None, where)


def _from_base64(text: str) -> bytes:
    """
    Raises:
        ValueError: it is no base64, or nothing.
    """
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):  # ValueError: characters beyond ASCII
        raise ValueError(f"base64: expected a picture's bytes, received {text!r:.40}") from None
    if not content:
        raise ValueError("base64: expected a picture's bytes, received nothing")
    return content


def _inline(value: str) -> bytes:
    """The bytes of a `data:` address (RFC 2397).

    Raises:
        ValueError: they are not written in base64.
    """
    head, comma, body = value.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError(f"expected data:image/…;base64,…, received {value[:40]!r}")
    return _from_base64(body)


def grey_like(picture: Image.Image) -> Image.Image:
    """A picture of the same size that shows nothing: what a blind control sees."""
    return Image.new("RGB", picture.size, GREY)


@lru_cache(maxsize=2**17)
def file_digest(path: str, size: int, changed: int) -> bytes:
    """Of a file's bytes; tasks share pictures, and splits are looked at several times.

    Args:
        path: of the file.
        size, changed: of it, by which a file that was written anew is read again.
    """
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()[:16]
