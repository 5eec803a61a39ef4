"""Log-probabilities of chosen tokens, without a float32 copy of the logits.

ℓ_s = L[o_s, t_s] − log Σ_v exp L[o_s, v]
dL[u, v] = Σ_{s: o_s = u} dℓ_s ([v = t_s] − softmax(L_u)_v)
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtl_lora_cli.kernels.backend import in_triton
from mtl_lora_cli.kernels.wide_product import wide_product

_LOGITS_AT_ONCE = 2**28  # 1 GiB in float32
_ROWS = 8  # of 16-bit logits at once, in float32: what a core's own cache holds
_ALIGNED = 8  # values of 16 bit in the 16 bytes at which a matrix product wants rows to start


def token_logprobs(logits: Tensor, owner: Tensor, targets: Tensor) -> Tensor:
    """ℓ [S], float32 (float64 for float64 logits).

    Args:
        logits: L [U, V]. The backward pass may write their gradient over them.
        owner: o int64 [S], rows of L.
        targets: t int64 [S], columns of L.
    """
    return cast(Tensor, _TokenLogprobs.apply(logits, owner, targets))


def aligned_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """L = h Wᵀ [U, V], whose rows start at multiples of 16 bytes in 16-bit floats, whatever V is.

    At 100,278 tokens a product that writes rows without a gap, and the one that reads their gradient, take ten times
    as long.

    Args:
        hidden: h [U, d].
        weight: W [V, d], frozen.
    """
    return cast(Tensor, _AlignedLogits.apply(hidden, weight))


class _AlignedLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        count = len(weight)
        pitch = -(-count // _ALIGNED) * _ALIGNED
        logits = hidden.new_empty(len(hidden), pitch)[:, :count]
        return torch.mm(hidden, weight.T, out=logits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ weight, None


def exact_logprobs(
    hidden: Tensor, weight: Tensor, owner: Tensor, targets: Tensor, *, judged: bool = False
) -> tuple[Tensor, Tensor | None]:
    """ℓ from half-precision states with logits that are never rounded to it; no gradient.

    A logit of 20 is known to 0.06 in bfloat16: more than what lies between two answers of which a
    model is not sure. The product of two halves is exact in float32, so only the states are rounded.

    Args:
        hidden: h [U, d], what the head reads.
        weight: W [V, d], with L = h Wᵀ.
        owner, targets: as above.
        judged: whether the likeliest tokens are wanted, another pass over the logits.

    Returns:
        ℓ float32 [S], and the likeliest token of each row, int64 [U], or None.
    """
    wide = weight if weight.is_cuda else weight.float()
    normalisers, likeliest = [], []
    for rows in hidden.split(max(1, _LOGITS_AT_ONCE // len(weight))):
        if weight.is_cuda:
            logits = torch.mm(rows, wide.T, out_dtype=torch.float32)
        elif weight.dtype == torch.bfloat16:
            logits = wide_product(rows, wide.T)
        else:
            logits = rows.float() @ wide.T
        normalisers.append(_normaliser(logits))
        if judged:
            likeliest.append(logits.argmax(dim=-1))
    own = (hidden[owner].float() * weight[targets].float()).sum(-1)
    logprobs = own - torch.cat(normalisers)[owner]
    return logprobs, torch.cat(likeliest) if judged else None


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, owner: Tensor, targets: Tensor) -> Tensor:
        normaliser = _normaliser(logits)
        ctx.save_for_backward(logits, normaliser, owner, targets)
        return logits[owner, targets].to(normaliser.dtype) - normaliser[owner]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, normaliser, owner, targets = ctx.saved_tensors
        weight = torch.zeros_like(normaliser).index_add_(0, owner, gradient)
        if in_triton(logits):
            from mtl_lora_cli.kernels import triton_logprob

            dlogits = triton_logprob.minus_softmax(logits, normaliser, weight)
        else:
            dlogits = _minus_softmax(logits, normaliser, weight)
        # One question a row is the rule; several of one row and token add up.
        dlogits.index_put_((owner, targets), gradient.to(dlogits.dtype), accumulate=True)
        return dlogits, None, None


def _minus_softmax(logits: Tensor, normaliser: Tensor, weight: Tensor) -> Tensor:
    """−w_u softmax(L_u), some rows at once: of what is rounded, all in float32 is no longer in a core's cache."""
    some = len(logits) if logits.dtype == normaliser.dtype else _ROWS
    parts = [
        (own.to(normaliser.dtype) - n[:, None]).exp_().mul_(-w[:, None]).to(logits.dtype)
        for own, n, w in zip(*(x.split(some) for x in (logits, normaliser, weight)), strict=True)
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _normaliser(logits: Tensor) -> Tensor:
    if in_triton(logits):
        from mtl_lora_cli.kernels import triton_logprob

        return triton_logprob.normaliser(logits)
    if logits.dtype in (torch.float32, torch.float64):
        return torch.logsumexp(logits, dim=-1)
    return torch.cat([torch.logsumexp(some.float(), dim=-1) for some in logits.split(_ROWS)])
