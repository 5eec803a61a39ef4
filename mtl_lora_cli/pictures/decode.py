"""Files to arrays: the one place where pictures and maps are decoded.

An *address* is a path below the folder of its data; `#` and more says what in the file is meant:
`maps.mat#LabelMap`, `nyu_depth_v2_labeled.mat#depths/12` (the 13th of an array in HDF5). Whatever cannot be
read is one line that names the row, the key, what was received and what was expected.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.pictures.matfiles import read_mat
from mtl_lora_cli.pointers import require_content

MOST_PIXELS = 2**26  # of one picture: 8192 x 8192; a small file can claim any number
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, zlib.error, KeyError, IndexError, TypeError)
_ONE_CHANNEL = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "F")
_DEEP = ("I;16", "I;16B", "I;16L")


@dataclass(frozen=True)
class Site:
    """Where an address stands, for errors: `rows.jsonl:3: depth`."""

    where: str
    key: str

    def fault(self, message: str) -> UsageError:
        """What is wrong there, ready to raise."""
        return UsageError(f"{self.where}: {self.key}: {message}")


def locate(root: Path, address: Any, site: Site) -> Path:
    """The file of an address; what follows `#` is left off.

    Args:
        root: the folder that it must lie in.
        address: as it stands in the row.
        site: for errors.

    Raises:
        UsageError: it is no text, leads out of the folder, or names no file.
    """
    if not isinstance(address, str) or not address or "\0" in address:
        raise site.fault(f"expected a path, received {address!r:.60}")
    path = Path(os.path.normpath(root / address.partition("#")[0]))
    home = Path(os.path.abspath(root))  # noqa: PTH100 - a link stays a link
    if not Path(os.path.abspath(path)).is_relative_to(home):  # noqa: PTH100
        raise site.fault(f"'{address:.80}' leads out of the data's folder {root}")
    try:
        if not path.is_file():
            what = "a folder" if path.is_dir() else "no such file"
            raise site.fault(f"{what}: '{address:.120}', expected a file below {root}")
    except OSError as error:  # a name that is too long
        raise site.fault(f"'{address:.60}' cannot be read: {error.strerror}") from None
    return path


@contextmanager
def _told(site: Site, name: str) -> Iterator[None]:
    """What libraries raise of a damaged file is one line.

    Raises:
        UsageError: in the place of anything else.
    """
    try:
        yield
    except UsageError:
        raise
    except UnidentifiedImageError:
        raise site.fault(
            f"{name}: is no picture that is known; expected JPEG, PNG and the like"
        ) from None
    except (Image.DecompressionBombError, MemoryError):
        raise site.fault(f"{name}: too large; expected {MOST_PIXELS:,} pixels at most") from None
    except _BROKEN as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise site.fault(f"{name}: broken or cut off: {said:.120}") from None


@contextmanager
def _opened(path: Path, site: Site) -> Iterator[Image.Image]:
    with _told(site, path.name):
        with path.open("rb") as file:
            head = file.read(512)
        if not head:
            raise site.fault(f"{path.name}: is empty")
        require_content(path, head)
        with Image.open(path) as image:
            _require_one(image, path.name, site)
            yield image


def _require_one(image: Image.Image, name: str, site: Site) -> None:
    """Refuse by its head what is too large, or several pictures.

    Raises:
        UsageError: it is.
    """
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise site.fault(f"{name}: {width} x {height} pixels, expected {MOST_PIXELS:,} at most")
    if getattr(image, "n_frames", 1) > 1 and image.format not in ("MPO",):
        frames = image.n_frames  # type: ignore[attr-defined]
        raise site.fault(f"{name}: has {frames} frames, expected one picture")


def read_picture(root: Path, address: str, site: Site) -> Image.Image:
    """A picture in RGB, 8 bits, turned as its EXIF says.

    Grey, palette and CMYK pictures become RGB; what is transparent is laid over black; 16 bits become 8.

    Raises:
        UsageError: see `locate`; or the file is broken, too large, or no picture.
    """
    path = locate(root, address, site)
    if "#" in address or path.suffix == ".npy":
        return Image.fromarray(_as_picture(_array(path, address, site), path.name, site))
    with _opened(path, site) as image:
        return _upright(image, path.name, site)


def decoded(file: IO[bytes], name: str, site: Site) -> Image.Image:
    """The same of bytes.

    Args:
        file: of the bytes.
        name: that errors call it by.
        site: for errors.

    Raises:
        UsageError: they are broken, too large, or no picture.
    """
    with _told(site, name), Image.open(file) as image:
        _require_one(image, name, site)
        return _upright(image, name, site)


def _upright(image: Image.Image, name: str, site: Site) -> Image.Image:
    """As its EXIF turns it, in RGB, over black."""
    image.load()
    upright = ImageOps.exif_transpose(image) or image
    if upright.mode in _DEEP or upright.mode in ("I", "F"):
        upright = Image.fromarray(_as_picture(np.asarray(upright), name, site))
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        clear = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", clear.size, (0, 0, 0, 255)), clear)
    return upright.convert("RGB")


def picture_size(root: Path, address: str, site: Site) -> tuple[int, int]:
    """Height and width of a picture as `read_picture` gives it; of a file only its head is read.

    Raises:
        UsageError: as there, as far as the head says it.
    """
    path = locate(root, address, site)
    if "#" in address or path.suffix == ".npy":
        height, width = _as_picture(_array(path, address, site), path.name, site).shape[:2]
        return height, width
    with _opened(path, site) as image:
        return _turned(image)


def decoded_size(file: IO[bytes], name: str, site: Site) -> tuple[int, int]:
    """The same of bytes, see `decoded`."""
    with _told(site, name), Image.open(file) as image:
        _require_one(image, name, site)
        return _turned(image)


def _turned(image: Image.Image) -> tuple[int, int]:
    """Height and width as its EXIF turns it."""
    width, height = image.size
    quarter = image.getexif().get(0x0112, 1) >= 5
    return (width, height) if quarter else (height, width)


def _as_picture(array: np.ndarray, name: str, site: Site) -> np.ndarray:
    """An array as 8-bit RGB [H, W, 3].

    Raises:
        UsageError: it is no array of 8 or 16 bits in one or three channels.
    """
    if array.ndim == 2:
        array = np.repeat(array[:, :, None], 3, axis=2)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype.kind not in "ui":
        raise site.fault(
            f"{name}: an array of {array.dtype} {list(array.shape)}, expected 8 or 16 bits [H, W, 3]"
        )
    if array.dtype.itemsize > 1:
        if array.size and not 0 <= array.min() <= array.max() < 2**16:
            raise site.fault(f"{name}: values up to {array.max()}, expected 16 bits at most")
        array = array // 257
    return array.astype(np.uint8)


def read_map(root: Path, address: str, site: Site, *, exact: bool, colours: bool) -> np.ndarray:
    """A map as it is stored: [H, W], or [H, W, 3] of normals.

    Args:
        root, address, site: as of `locate`.
        exact: its values are names (of classes): a JPEG, which changes values, is refused.
        colours: it has three channels.

    Returns:
        uint8, uint16 or int32 of pictures (of a palette its indices), any number of arrays.

    Raises:
        UsageError: see `locate`; or the file is broken, or has other channels.
    """
    path = locate(root, address, site)
    if "#" in address or path.suffix in (".npy", ".mat"):
        return _shaped(_array(path, address, site), path, site, colours)
    with _opened(path, site) as image:
        if exact and image.format in ("JPEG", "MPO", "WEBP"):
            raise site.fault(
                f"{path.name}: a {image.format} changes values, which are classes here; expected PNG"
            )
        good = image.mode == "RGB" if colours else image.mode in _ONE_CHANNEL
        if image.mode == "P" and not exact:
            raise site.fault(
                f"{path.name}: has a palette: its values are numbers of colours, expected values themselves"
            )
        if not good:
            wanted = "three channels (RGB)" if colours else "one channel"
            raise site.fault(f"{path.name}: received {image.mode}, expected {wanted}")
        image.load()
        array = np.asarray(image)
        if image.mode == "1":
            return array.astype(np.uint8) * (1 if exact else 255)
        return array


def _array(path: Path, address: str, site: Site) -> np.ndarray:
    """What a .npy or .mat file holds at an address."""
    inside = address.partition("#")[2]
    with _told(site, path.name):
        if path.suffix == ".mat":
            return read_mat(path, inside, site.fault)
        if path.suffix != ".npy":
            raise site.fault(f"'{address:.120}': '#' goes with .mat and .npy files")
        array: np.ndarray = np.load(path, allow_pickle=False, mmap_mode="r")
        if array.size > 4 * MOST_PIXELS:
            raise site.fault(
                f"{path.name}: {array.size:,} values, expected {4 * MOST_PIXELS:,} at most"
            )
        return np.asarray(array[int(inside)] if inside else array)


def _shaped(array: np.ndarray, path: Path, site: Site, colours: bool) -> np.ndarray:
    """An array as [H, W], or [H, W, 3].

    Raises:
        UsageError: it has another shape, or is not of numbers.
    """
    if array.dtype.kind not in "buif":
        raise site.fault(f"{path.name}: an array of {array.dtype}, expected numbers")
    if colours and array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
        array = array.transpose(1, 2, 0)
    if not colours and array.ndim == 3 and 1 in (array.shape[0], array.shape[2]):
        array = array.squeeze(0 if array.shape[0] == 1 else 2)
    if array.ndim != 2 + colours or (colours and array.shape[2] != 3) or not array.size:
        wanted = "[H, W, 3]" if colours else "[H, W]"
        raise site.fault(f"{path.name}: an array {list(array.shape)}, expected {wanted}")
    return array.astype(np.uint8) if array.dtype.kind == "b" else array
