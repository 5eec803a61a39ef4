"""Each family's bytes: what its blocks say that a pass takes, and what torch allocates."""

from __future__ import annotations

from typing import Any

import pytest

from mtl_lora_cli.engine.memory import sizes_of, weight_bytes
from mtl_lora_cli.recipe.training import Recompute

from .double import adapt_all, tiny
from .peaks import WIDE, peaks
from .test_families import CASES

KINDS = {f"{kind} {variant}".strip(): (kind, changes) for kind, variant, changes in CASES}
LONGER = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 100}


def longer(changes: dict[str, Any]) -> dict[str, Any]:
    """The same for four layers."""
    found = {**changes, **WIDE}
    if "layer_types" in changes:
        first = changes["layer_types"][0]
        found |= (
            LONGER
            if first == "sliding_attention"
            else {"layer_types": [first, "full_attention"] * 2}
        )
    if "moe_intermediate_size" in changes:
        found["moe_intermediate_size"] = 96
    if "no_rope_layers" in changes:
        found["no_rope_layers"] = [1, 0, 1, 1]
    return found


AGAIN = Recompute(attended=True, qkv=2, gate_up=3)
# A longrope's factors are as many as half of a head has columns, which are more here.
EACH = [(name, False) for name in KINDS if not name.endswith(("longrope", "no attention"))]
SOME = (
    "llama",
    "mixtral window",
    "qwen3 window",
    "gemma2 caps",
    "qwen3_5_text delta nets",
    "gemma3_text",
    "olmo3 window",
    "granite",
)


@pytest.mark.parametrize(
    ("name", "recompute"),
    [*EACH, *((name, again) for name in SOME for again in (AGAIN, True))],
    ids=str,
)
def test_predicted_is_measured(name: str, recompute: bool | Recompute) -> None:
    kind, changes = KINDS[name]
    model = tiny(kind, **longer(changes)).float()
    adapter = adapt_all(model)
    for tensor in adapter.tensors().values():
        tensor.data = tensor.data.float()
    estimate, measured = peaks(model, adapter, recompute)
    assert estimate == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize(
    "name", ["qwen3_moe some dense", "mixtral window", "gemma3_text", "phi3 part"]
)
def test_weights_are_counted_once(name: str) -> None:
    """Experts among them, and a tied embedding."""
    kind, changes = KINDS[name]
    model = tiny(kind, **changes)
    frozen = 4 * sum(parameter.numel() for parameter in model.parameters())
    sizes = sizes_of(model, adapt_all(model), value=4, on_card=False)
    assert weight_bytes(sizes) == frozen
    layers = sum(one.experts + sum(g.weights for g in one.groups) for one in sizes.layers)
    body = model.get_submodule("model.layers").named_parameters()
    expected = [p.numel() for key, p in body if "norm" not in key and "lora" not in key]
    routers = [p.numel() for key, p in model.named_parameters() if key.endswith("mlp.gate.weight")]
    adapted = [p.numel() for key, p in model.named_parameters() if "task_" in key]
    assert layers == sum(expected) - sum(routers) - sum(adapted)
