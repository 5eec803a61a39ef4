"""Each dense family on 4-bit weights and in 8-bit products, against transformers with the same roundings.

Weights of 4 bit are dequantised by bitsandbytes; rounding to 8-bit floats is written out here. CI takes the
families whose modules differ most; `make long` has them all.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import load_model
from mtl_lora_cli.models.packed import PackedModel

from .double import (
    adapt_all,
    alone,
    examples,
    linear_layers,
    packed_row,
    tiny,
)
from .test_families import CASES

KINDS = {f"{kind} {variant}".strip(): (kind, changes) for kind, variant, changes in CASES}
DENSE = (
    "llama", "llama biases, tied", "mistral window", "ministral window", "ministral3 scaled queries",
    "phi3 longrope", "phi3 part", "qwen2", "qwen3", "gemma", "gemma2 caps", "gemma3_text", "smollm3",
    "gemma4_text", "gemma4_unified_text k = v", "qwen3_5_text delta nets", "lfm2 convolutions",
    "glm part, pairs", "glm4 pairs", "exaone4 window", "cwm window", "olmo2", "olmo3 window", "granite",
)  # fmt: skip
# Rows of 64 and more: of shorter ones bitsandbytes' own dequantisation on a CPU is wrong.
WHOLE_BLOCKS = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
IN_CI = ("gemma3_text", "phi3 part")
NAMES = [
    pytest.param(name, marks=[] if name in IN_CI else [pytest.mark.long], id=name) for name in DENSE
]


def learned(bare: Any, packed: PackedModel, adapter: Adapter) -> tuple[float, float]:
    """Relative distances of the log-probabilities and of all gradients together from those of transformers."""
    some = examples()
    leaves = {key: t.detach().clone().requires_grad_() for key, t in adapter.tensors().items()}
    right = alone(bare, leaves, some)
    (right * torch.linspace(1, 2, len(right))).sum().backward()
    batch = packed_row(some)
    with packed.routed(batch):
        found = packed(batch)
        (found * torch.linspace(1, 2, len(found))).sum().backward()
    pairs = [(t.grad, leaves[key].grad) for key, t in adapter.tensors().items()]
    ours, theirs = (
        torch.cat([g.flatten() for g in some if g is not None]) for some in zip(*pairs, strict=True)
    )
    assert len(ours) == len(theirs)
    return (
        float(((found - right).norm() / right.norm()).detach()),
        float((ours - theirs).norm() / theirs.norm()),
    )


@pytest.mark.parametrize(
    "name", [one for one in NAMES if one.id != "phi3 longrope"]
)  # factors for heads of 8
def test_on_four_bit_weights(name: str, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    kind, changes = KINDS[name]
    bare: Any = tiny(kind, **{**changes, **WHOLE_BLOCKS}).float()
    bare.save_pretrained(tmp_path)
    base = find_base_model(str(tmp_path))
    model: Any = load_model(
        base, dtype=torch.float32, device=torch.device("cpu"), quantization="nf4"
    )
    rounded = 0
    for path, layer in linear_layers(bare).items():
        weight = model.get_submodule(path).weight
        exact = layer.weight.clone()
        layer.weight.data = functional.dequantize_4bit(weight.data, weight.quant_state).float()
        rounded += int(not torch.equal(layer.weight, exact))
    assert rounded == len(linear_layers(bare))
    adapter = adapt_all(model, bare=bare, dtype=torch.float32)
    packed = PackedModel(model, adapter, engine="fused").train()
    assert max(learned(bare, packed, adapter)) < 1e-4


class EightBit(torch.autograd.Function):
    """x Wᵀ with both sides rounded by rows to e4m3, and dy W likewise: y = ⌊x⌉ ⌊W⌉ᵀ, dx = ⌊dy⌉ ⌊Wᵀ⌉ᵀ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return to_eight_bits(x) @ to_eight_bits(weight).T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return to_eight_bits(dy) @ to_eight_bits(weight.T).T, None


def to_eight_bits(x: Tensor) -> Tensor:
    """Each row to multiples of its largest magnitude over 448, with three bits of mantissa."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    mantissa, exponent = torch.frexp(x / scale)
    # Below 2^-6 numbers are 2^-9 apart.
    step = torch.exp2((exponent - 4).clamp(min=-9).float())
    return torch.round(torch.ldexp(mantissa, exponent) / step) * step * scale


def multiply_in_eight_bits(model: Any) -> None:
    """Of each layer W + ΔW: W rounded, ΔW as it is."""
    for layer in linear_layers(model).values():
        frozen, bias = layer.weight.detach().clone(), layer.bias

        def product(
            x: Tensor,
            layer: nn.Linear = layer,
            frozen: Tensor = frozen,
            bias: Tensor | None = bias,
        ) -> Tensor:
            y = EightBit.apply(x.flatten(0, -2), frozen).view(*x.shape[:-1], -1)
            y = y if bias is None else y + bias
            return y + nn.functional.linear(x, layer.weight - frozen)

        layer.forward = product  # type: ignore[method-assign]


@pytest.mark.parametrize("name", NAMES)
def test_in_eight_bit_products(name: str) -> None:
    """Forward to the last bits, but where a value beside a border falls to its other side.

    Backward what reads one input is rounded as one row; here, unless its family has it fused, layer by layer: so
    gradients are only near. Without rounding they are three times as far, and the forward pass is far.
    """
    kind, changes = KINDS[name]
    model: Any = tiny(kind, **changes).float()
    bare, exact = copy.deepcopy(model), copy.deepcopy(model)
    multiply_in_eight_bits(bare)
    adapter = adapt_all(model, bare=bare, dtype=torch.float32)
    packed = PackedModel(model, adapter, engine="fused", base_compute="fp8").train()
    near = learned(bare, packed, adapter)
    for tensor in adapter.tensors().values():
        tensor.grad = None
    far = learned(exact, packed, adapter)
    assert near[0] < 2e-3 and far[0] > 5e-3
    assert near[1] < (1e-2 if name.startswith("phi3") else 0.1)
    assert far[1] > 2 * near[1]
