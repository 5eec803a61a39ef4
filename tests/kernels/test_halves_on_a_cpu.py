"""What a CPU does otherwise in bfloat16, beside the same in float64."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from mtl_lora_cli.kernels.gated import gated, gated_gradient
from mtl_lora_cli.kernels.logprob import token_logprobs
from mtl_lora_cli.kernels.rotary import Turn, rotate_
from mtl_lora_cli.kernels.wide_product import wide_product


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTL_LORA_KERNELS", "plain")


def away(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found.detach().double() - right.detach()).norm() / right.detach().norm())


def test_a_wide_product_rounds_nothing() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 40, 300).bfloat16(), torch.randn(3, 300, 50).bfloat16()
    right = a.double() @ b.double()
    found = wide_product(a, b)
    assert found.dtype == torch.float32
    assert away(found, right) < 1e-6 < away(a @ b, right)
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"  # as it was


def test_losses_are_those_of_float64_and_so_are_their_gradients() -> None:
    """More rows than are looked at together, the last ones fewer."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(21, 700)).bfloat16()
    owner, targets = torch.arange(21), torch.randint(0, 700, (21,))
    found = []
    for leaf in (logits.clone().requires_grad_(), logits.double().requires_grad_()):
        if leaf.dtype == torch.float64:
            losses = leaf.log_softmax(-1)[owner, targets]
        else:
            losses = token_logprobs(leaf, owner, targets)
        found += [losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]]
    assert away(found[0], found[2]) < 1e-6
    assert away(found[1], found[3]) < 3e-3


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_a_gated_gradient_is_rounded_as_little_as_can_be(activation: str) -> None:
    torch.manual_seed(0)
    both, da = torch.randn(40, 128).bfloat16(), torch.randn(40, 64).bfloat16()
    leaf = both.double().requires_grad_()
    gate, up = leaf.chunk(2, dim=1)
    kinds = {"silu": {}, "gelu_tanh": {"approximate": "tanh"}}
    function = torch.nn.functional.silu if activation == "silu" else torch.nn.functional.gelu
    right = function(gate, **kinds[activation]) * up
    (expected,) = torch.autograd.grad(right, leaf, da.double())
    found, again = gated_gradient(da, both, activation, again=True)  # type: ignore[arg-type]
    assert again is not None
    assert torch.equal(again, gated(both, activation))  # type: ignore[arg-type]
    assert away(again, right.detach()) < 3e-3
    assert away(found, expected) < 4e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_turn_as_transformers_turns_them(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows, heads, keys, width = 600, 3, 1, 16
    qkv = torch.randn(rows, (heads + 2 * keys) * width).to(dtype)
    angles = torch.randn(rows, width // 2)
    each = qkv.double().view(rows, -1, width).transpose(0, 1)[None]
    whole = torch.cat([angles, angles], dim=1).double()[None]
    turned = apply_rotary_pos_emb(each[:, :heads], each[:, heads:-1], whole.cos(), whole.sin())
    expected = torch.cat([*turned, each[:, -1:]], dim=1)[0].transpose(0, 1).flatten(1)
    found = rotate_(qkv, Turn(angles.cos(), angles.sin()), heads=heads, key_heads=keys)
    assert away(found, expected) < (1e-6 if dtype == torch.float32 else 3e-3)
