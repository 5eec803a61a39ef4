"""Expanding bitsandbytes' 8-bit weights into a buffer of our own."""

from __future__ import annotations

import torch
from torch import Tensor


def expand(values: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """w_ij = q_ij · c_i / 127, written to `out` in its dtype.

    The weights of LLM.int8() (arXiv 2208.07339), without its split of the inputs: products are in
    the dtype of the activations.

    Args:
        values: q int8 [out, in].
        scale: c float32 [out], the largest magnitude of each row.
        out: [out, in].

    Returns:
        out.
    """
    with torch.no_grad():
        return torch.mul(values.detach(), (scale / 127).unsqueeze(1), out=out)
