"""Sums of some rows: out_m = Σ_j x_{p(m, j)}, always in the same order."""

from __future__ import annotations

from torch import Tensor

from mtl_lora_cli.kernels.backend import in_triton


def row_sums(x: Tensor, places: Tensor) -> Tensor:
    """[M, d] from x [S, d].

    Args:
        x: rows.
        places: p, int64 [M, k], in [0, S).
    """
    if in_triton(x):
        from mtl_lora_cli.kernels import triton_row_sums

        return triton_row_sums.row_sums(x, places)
    return x[places.flatten()].view(*places.shape, -1).sum(1)
