"""Stored maps to what they mean: class numbers, metres, unit normals, shares of one.

What is not known is −100 in maps of classes and NaN in all others.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

UNKNOWN = -100  # torch's own `ignore_index`
Fault = Callable[[str], Exception]


def as_classes(
    raw: np.ndarray, first: int, count: int, ignore: float | None, fault: Fault
) -> np.ndarray:
    """Class of each pixel, int16 [H, W]; `UNKNOWN` where it is `ignore`.

    Args:
        raw: as it is stored.
        first: the stored value of class 0.
        count: how many classes there are.
        ignore: the stored value that means not known.
        fault: makes an error of a message.

    Raises:
        what `fault` makes: a value is neither a class nor `ignore`.
    """
    ignored = np.zeros(raw.shape, bool) if ignore is None else raw == ignore
    wrong = ~ignored & ((raw < first) | (raw >= first + count))
    if raw.dtype.kind == "f":
        wrong |= ~ignored & (raw != np.floor(raw))
    if wrong.any():
        worst, many = raw[wrong].max(), int(wrong.sum())
        known = "" if ignore is None else f", or {ignore:g} (ignored)"
        raise fault(
            f"label {worst:g} and the like in {many:,} pixels, expected {first} to "
            f"{first + count - 1}{known}"
        )
    return np.where(ignored, UNKNOWN, raw.astype(np.int32) - first).astype(np.int16)


def as_depth(
    raw: np.ndarray,
    low: float,
    high: float,
    scale: str,
    bits: int,
    ignore: float | None,
    fault: Fault,
) -> np.ndarray:
    """Depth, float32 [H, W], in the unit of `low` and `high`.

    Whole numbers v are codes: low + (high − low) v / (2^bits − 1), or, with `log`,
    low (high / low)^(v / (2^bits − 1)). Floating-point numbers are depth itself.

    Raises:
        what `fault` makes: more bits than said, a depth of 0 or below, or NaN that `ignore` does not name.
    """
    if raw.dtype.kind in "ui":
        most = 2**bits - 1
        if raw.size and (
            raw.min() < 0 or raw.max() > most or raw.dtype.itemsize * 8 > max(8, bits)
        ):
            received = f"{raw.dtype.itemsize * 8} bits with values up to {raw.max()}"
            raise fault(
                f"received {received}, expected {bits} bits (0 to {most}); see the template's bits"
            )
        share = np.arange(most + 1, dtype=np.float64) / most
        table = low * (high / low) ** share if scale == "log" else low + (high - low) * share
        values = table.astype(np.float32)[raw]
    else:
        values = np.array(raw, dtype=np.float32)
    ignored = _ignored(raw, ignore)
    wrong = ~ignored & ~(np.isfinite(values) & (values > 0))
    if wrong.any():
        worst = values[wrong][0]
        raise fault(
            f"a depth of {worst:g} and the like in {int(wrong.sum()):,} pixels, expected numbers above 0"
            + (
                "; say ignore: .nan where they are not known"
                if np.isnan(worst)
                else "; name what is not known in ignore"
            )
        )
    values[ignored] = np.nan
    return values


def _ignored(raw: np.ndarray, ignore: float | None) -> np.ndarray:
    if ignore is None:
        return np.zeros(raw.shape, bool)
    return np.isnan(raw) if np.isnan(ignore) else raw == ignore


def as_share(
    raw: np.ndarray, low: float, high: float, ignore: float | None, fault: Fault
) -> np.ndarray:
    """(v − low) / (high − low), float32 [H, W] in 0 to 1.

    Raises:
        what `fault` makes: a value is outside of low to high, and not `ignore`.
    """
    values = (raw.astype(np.float32) - low) / (high - low)
    ignored = _ignored(raw, ignore)
    wrong = ~ignored & ~((values >= 0) & (values <= 1))
    if wrong.any():
        received = f"{raw[wrong].max():g} and the like in {int(wrong.sum()):,} pixels"
        raise fault(f"received {received}, expected {low:g} to {high:g}; see the template's range")
    values[ignored] = np.nan
    return values


def as_normals(raw: np.ndarray, ignore: float | None, fault: Fault) -> np.ndarray:
    """Unit normals, float32 [H, W, 3]: x to the right, y down, z into the scene, unless the data say else.

    Bytes v are 2 v / 255 − 1. Vectors shorter than 1/2 are not known, nor those all of whose channels are
    `ignore`.

    Raises:
        what `fault` makes: whole numbers of more than 8 bits, or numbers outside of −1 to 1.
    """
    if raw.dtype.kind in "ui":
        if raw.dtype.itemsize > 1:
            raise fault(f"received {raw.dtype.itemsize * 8} bits, expected 8 bits a channel")
        values = raw.astype(np.float32)
        values *= np.float32(2 / 255)
        values -= 1
    else:
        values = np.array(raw, dtype=np.float32)
        finite = values[np.isfinite(values)]
        if finite.size and np.abs(finite).max() > 1.01:
            raise fault(f"received {np.abs(finite).max():g}, expected -1 to 1")
    length = np.sqrt(
        sum(values[..., axis] ** 2 for axis in range(3))
    )  # of three, faster than a norm
    unknown = ~(length >= 0.5)
    if ignore is not None:
        unknown |= _ignored(raw, ignore).all(axis=2)
    with np.errstate(invalid="ignore", divide="ignore"):
        values /= length[..., None]
    values[unknown] = np.nan
    return values
