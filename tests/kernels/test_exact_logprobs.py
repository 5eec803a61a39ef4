"""Log-probabilities from 16-bit states: logits are never rounded."""

from __future__ import annotations

import pytest
import torch

from mtl_lora_cli.kernels import logprob
from mtl_lora_cli.kernels.logprob import aligned_logits, exact_logprobs, token_logprobs


def _asked(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(40, 64, generator=generator) * 3
    weight = torch.randn(301, 64, generator=generator)
    owner = torch.randint(40, (70,), generator=generator)
    targets = torch.randint(301, (70,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), owner, targets


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("at_once", [2**28, 7 * 301])
def test_they_are_those_of_float64(
    dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprob, "_LOGITS_AT_ONCE", at_once)
    hidden, weight, owner, targets = _asked(dtype)
    logits = hidden.double() @ weight.double().T
    expected = logits.log_softmax(-1)[owner, targets]
    found, likeliest = exact_logprobs(hidden, weight, owner, targets, judged=True)
    assert found.dtype == torch.float32
    # Sums of 64 products, of values up to 50, in float32.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=5e-5)
    assert likeliest is not None and torch.equal(likeliest, logits.argmax(-1))
    alone, nothing = exact_logprobs(hidden, weight, owner, targets)
    assert torch.equal(alone, found) and nothing is None


def test_rounded_logits_are_further_off() -> None:
    hidden, weight, owner, targets = _asked(torch.bfloat16)
    logits = hidden.double() @ weight.double().T
    expected = logits.log_softmax(-1)[owner, targets]
    rounded = token_logprobs(hidden @ weight.T, owner, targets)
    exact, _ = exact_logprobs(hidden, weight, owner, targets)
    assert (rounded - expected).abs().max() > 100 * (exact - expected).abs().max()


def test_aligned_rows_hold_the_same_product() -> None:
    hidden, weight, owner, targets = (
        x.double() if x.is_floating_point() else x for x in _asked(torch.float16)
    )
    one, other = (hidden.clone().requires_grad_() for _ in range(2))
    logits = aligned_logits(one, weight)
    assert logits.shape == (40, 301)
    assert logits.stride() == (304, 1)
    wanted = (other @ weight.T).log_softmax(-1)[owner, targets]
    found = token_logprobs(logits, owner, targets)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=5e-5)
    for logprobs in (found, wanted):
        (logprobs * torch.linspace(1, 2, len(owner))).sum().backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-4)
