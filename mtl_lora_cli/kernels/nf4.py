"""Expanding bitsandbytes' 4-bit weights into a buffer of our own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtl_lora_cli.kernels.backend import in_triton


def expand(packed: Tensor, state: Any, out: Tensor) -> Tensor:
    """w_k = code[q_k] · c_⌊k/64⌋, written to `out` in its dtype.

    The block constants c are 8-bit themselves where the quantisation is double:
    c_b = code₈[q_b] · c'_⌊b/256⌋ + offset (QLoRA, arXiv 2305.14314).

    Args:
        packed: the 4-bit values, two a byte, in any storage dtype.
        state: bitsandbytes' `QuantState` of them.
        out: [out, in], rows contiguous; the row stride may be larger than `in`.

    Returns:
        out.
    """
    if in_triton(packed) and state.nested and out.shape[1] % 2 == 0:
        from mtl_lora_cli.kernels import triton_nf4

        return triton_nf4.expand(packed, state, out)
    import bitsandbytes.functional as bnb

    with torch.no_grad():
        if packed.is_cuda or out.shape[1] % state.blocksize == 0:
            return out.copy_(bnb.dequantize_4bit(packed.data, state).view(out.shape))
        # bitsandbytes 0.50 on a CPU starts each row with a new block; its quantisation does not.
        scale = state.absmax
        if state.nested:
            scale = bnb.dequantize_blockwise(scale, state.state2) + state.offset
        both = packed.data.reshape(-1).view(torch.uint8).long()
        values = state.code[torch.stack([both >> 4, both & 15], dim=1).view(-1)]
        each = scale.repeat_interleave(state.blocksize)[: values.numel()]
        return out.copy_((values * each).view(out.shape))
