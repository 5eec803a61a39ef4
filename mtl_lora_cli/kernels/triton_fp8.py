"""Triton kernel of `fp8.py`: a program a row, twice over it; the second time it is in the cache. And its end, for
kernels that have a row of their result in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtl_lora_cli.kernels.backend import roomy
from mtl_lora_cli.kernels.fp8 import Form, Rounded, ScaledRows

_LARGEST = tl.constexpr(448.0)
_BLOCK = 4096


@triton.jit
def _fp8_rows(x, values, scale, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < width, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
    factor = scale_of(tl.max(largest, axis=0))
    tl.store(scale + row, factor)
    inverse = 1.0 / factor
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < width, other=0.0).to(tl.float32)
        put_eight(value, inverse, values + row * width + at, at < width)


@triton.jit
def scale_of(largest):
    """What a row is divided by, from its largest magnitude."""
    return tl.maximum(largest, 1e-12) / _LARGEST


@triton.jit
def put_eight(value, inverse, place, mask):
    """Write float32 numbers times the inverse of their scale as e4m3; none is further from 448 than it rounds to."""
    tl.store(place, (value * inverse).to(tl.float8e4nv), mask=mask)


@triton.jit
def put_row(
    value, exact, values, scale, row, at, inside, width, stride,
    EXACT: tl.constexpr, EIGHT: tl.constexpr,
):  # fmt: skip
    """Write one row, float32 and 0 outside, in the dtype of `exact`, and as `to_rows` would round that."""
    value = value.to(exact.dtype.element_ty)
    if EXACT:
        tl.store(exact + row * stride + at, value, mask=inside)
    if EIGHT:
        wide = value.to(tl.float32)
        factor = scale_of(tl.max(tl.abs(wide), axis=0))
        tl.store(scale + row, factor)
        put_eight(wide, 1.0 / factor, values + row * width + at, inside)


class Targets:
    """Where a kernel writes a matrix [rows, width] in the forms that are asked for.

    Args:
        like: of its dtype, on its device.
        rows, width: its sides.
        room: columns to leave free behind it.
        form: which forms.
        given: memory for the exact one, where there is some.
    """

    def __init__(
        self,
        like: Tensor,
        rows: int,
        width: int,
        room: int,
        form: Form,
        given: Tensor | None = None,
    ) -> None:
        self.exact = given
        if given is None and form != "eight":
            self.exact = roomy(like, rows, width, room)
        self.rows = None if form == "exact" else ScaledRows(*_empty(rows, width, like.device))
        self._like = like

    @property
    def pointers(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """For `put_row`; of a matrix that is not written the dtype counts alone."""
        first = self._like if self.exact is None else self.exact
        return (first, None, None) if self.rows is None else (first, *self.rows)

    @property
    def stride(self) -> int:
        """Of the exact matrix's rows."""
        return 0 if self.exact is None else self.exact.stride(0)

    @property
    def flags(self) -> dict[str, bool]:
        """For the kernels."""
        return {"EXACT": self.exact is not None, "EIGHT": self.rows is not None}

    def whole(self) -> Tensor:
        """The exact matrix, which must have been asked for."""
        assert self.exact is not None
        return self.exact

    def rounded(self) -> Rounded:
        """Both, or the 8-bit rows alone."""
        assert self.rows is not None
        return Rounded(self.rows, self.exact, self._like.dtype)


def to_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `fp8.to_rows`; rows may lie apart."""
    rows, width = x.shape
    values, scale = _empty(rows, width, x.device)
    if rows:
        _fp8_rows[(rows,)](x, values, scale, x.stride(0), width, BLOCK=_BLOCK, num_warps=8)
    return values, scale


def _empty(rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory for values [rows, width] and scale [rows, 1]."""
    values = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=device)
    return values, torch.empty(rows, 1, dtype=torch.float32, device=device)
