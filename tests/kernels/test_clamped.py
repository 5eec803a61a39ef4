"""gpt-oss's activation: plain torch and the kernel, against autograd through transformers' own function."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from mtl_lora_cli.kernels.clamped import Clamped, clamped, clamped_gradient

HOW = Clamped(alpha=1.702, limit=1.5)


@pytest.mark.parametrize("kernels", ["plain", "triton"])
def test_it_is_transformers(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels == "triton" and torch.cuda.is_available():
        pytest.skip("in the interpreter, on a CPU")
    monkeypatch.setenv("MTL_LORA_KERNELS", kernels)
    torch.manual_seed(0)
    both, da = 2 * torch.randn(7, 2 * 33), torch.randn(7, 33)
    leaf = both.clone().requires_grad_()
    own = SimpleNamespace(alpha=HOW.alpha, limit=HOW.limit)
    right = GptOssExperts._apply_gate(own, leaf)
    (wanted,) = torch.autograd.grad(right, leaf, da)
    assert (wanted == 0).any()  # some are beyond the limit
    torch.testing.assert_close(clamped(both, HOW), right.detach())
    gradient, again = clamped_gradient(da, both.clone(), HOW)
    torch.testing.assert_close(gradient, wanted)
    torch.testing.assert_close(again, right.detach())
