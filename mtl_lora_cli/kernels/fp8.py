"""Products of activations with a frozen weight in 8-bit floats, a scale for each row of both.

    x ≈ a ⊙ X,  W ≈ b ⊙ V        x Wᵀ ≈ (X Vᵀ) ⊙ (a bᵀ)

X and V hold e4m3 numbers (3 bits of mantissa, largest 448); a and b are float32, the largest
magnitude of a row over 448. On Hopper and later such products run at twice the rate of bfloat16.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mtl_lora_cli.kernels.backend import in_triton

LARGEST = 448.0  # of e4m3
Form = Literal["exact", "both", "eight"]  # what is made of a matrix: itself, 8-bit rows, or both


class ScaledRows(NamedTuple):
    """A matrix in 8-bit floats: values [rows, columns] e4m3, and scale float32 [rows, 1]."""

    values: Tensor
    scale: Tensor


class Rounded(NamedTuple):
    """A matrix x [rows, columns] in 8-bit floats, for a product with a frozen weight.

    Attributes:
        rows: x, rounded.
        exact: x itself, where somebody reads it; None: it was never written.
        dtype: of x, and of the product.
    """

    rows: ScaledRows
    exact: Tensor | None
    dtype: torch.dtype


def rounded(x: Tensor | Rounded, form: Form = "both") -> Rounded:
    """x in 8-bit floats; what is rounded already stays as it is."""
    if isinstance(x, Rounded):
        return x
    return Rounded(to_rows(x), None if form == "eight" else x, x.dtype)


def exactly(x: Tensor | Rounded) -> Tensor:
    """x itself, which must have been asked for."""
    found = x.exact if isinstance(x, Rounded) else x
    assert found is not None, "nobody asked for more than the 8-bit rows"
    return found


def to_rows(x: Tensor) -> ScaledRows:
    """Each row scaled so that its largest magnitude is 448, and rounded to e4m3.

    Args:
        x: [rows, columns].
    """
    if in_triton(x):
        from mtl_lora_cli.kernels import triton_fp8

        return ScaledRows(*triton_fp8.to_rows(x))
    wide = x.float()
    scale = wide.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / LARGEST
    return ScaledRows((wide / scale).to(torch.float8_e4m3fn), scale)


def product(
    x: ScaledRows, weight: ScaledRows, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """x Wᵀ + bias in `dtype`: x [N, in], weight [out, in] → [N, out]."""
    if x.values.is_cuda:
        return torch._scaled_mm(
            x.values,
            weight.values.t(),
            scale_a=x.scale,
            scale_b=weight.scale.t(),
            bias=bias,
            out_dtype=dtype,
            use_fast_accum=True,
        )
    y = (x.values.float() @ weight.values.float().T) * x.scale * weight.scale.T
    return (y if bias is None else y + bias).to(dtype)


def supported(device: torch.device) -> bool:
    """Whether the card has matrix units for e4m3 with row scales (compute capability 9.0); on a CPU
    the numbers are the same and nothing is gained."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)
