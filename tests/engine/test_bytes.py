"""Each family's bytes: what its blocks say that a pass takes, and what torch allocates."""

from __future__ import annotations

from typing import Any

import pytest

from mtl_lora_cli.recipe.schema import Recompute

from .double import adapt_all, tiny
from .peaks import WIDE, peaks
from .test_families import CASES

KINDS = {f"{kind} {variant}".strip(): (kind, changes) for kind, variant, changes in CASES}
LONGER = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 100}


def longer(changes: dict[str, Any]) -> dict[str, Any]:
    """The same for four layers."""
    found = {**changes, **WIDE}
    if "layer_types" in changes:
        found |= LONGER
    if "no_rope_layers" in changes:
        found["no_rope_layers"] = [1, 0, 1, 1]
    return found


AGAIN = Recompute(attended=True, qkv=2, gate_up=3)
# A longrope's factors are as many as half of a head has columns, which are more here.
EACH = [(name, False) for name in KINDS if not name.endswith("longrope")]
SOME = ("llama", "qwen3 window", "gemma2 caps", "gemma3_text", "olmo3 window", "granite")


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
