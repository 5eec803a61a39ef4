"""The pictures of a request: from where they may come, how large they may be, and that they can be read.

A request brings bytes (`{"base64": "…"}`), or names a file below one folder, if the server was given one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.pictures.decode import locate
from mtl_lora_cli.pictures.shown import Picture


class TooLarge(Exception):
    """A picture of more pixels than are taken."""


@dataclass(frozen=True)
class Gallery:
    """What pictures are taken.

    Attributes:
        root: the folder below which paths lead; None: no path is taken.
        pixels: of a picture.
    """

    root: Path | None = None
    pixels: int = 2**24

    def require(self, pictures: Iterable[Picture]) -> None:
        """Look at every picture once, at its size before its pixels.

        Raises:
            UsageError: it is missing, broken or no picture, or its path leads elsewhere; errors name no folder.
            TooLarge: it has too many pixels.
        """
        for picture in pictures:
            if picture.content is None:
                self._require_below(picture)
            height, width = picture.size()
            if height * width > self.pixels:
                raise TooLarge(
                    f"{picture.where}: images: {width} x {height} pixels, expected {self.pixels:,} at most"
                )
            picture.read()

    def _require_below(self, picture: Picture) -> None:
        """A file of the folder, not behind a link that leads out of it either."""
        if self.root is None:
            raise picture.site.fault(
                'a path is not taken: send {"base64": "…"}, or serve with --pictures FOLDER'
            )
        path = Path(picture.address.partition("#")[0])
        outside = picture.site.fault(f"'{picture.address:.80}' leads out of the folder of pictures")
        if path.is_absolute() or ".." in path.parts:
            raise outside
        try:
            found = locate(self.root, picture.address, picture.site)
        except UsageError as error:  # where the folder lies is nobody's matter
            raise UsageError(str(error).replace(f" below {self.root}", "")) from None
        if not found.resolve().is_relative_to(self.root.resolve()):
            raise outside
