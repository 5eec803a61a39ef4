"""Plans of the fused engine that are wrong on purpose: what a self-test has to see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from mtl_lora_cli.engine import decoder
from mtl_lora_cli.engine.plan import AttentionPlan, LayerPlan, Plan

Change = Callable[[Plan], Plan]


def planned_wrongly(patch: pytest.MonkeyPatch, change: Change) -> None:
    """From now on the fused engine follows the changed plan, of whatever model."""
    right = decoder.plan_of
    patch.setattr(decoder, "plan_of", lambda config: change(right(config)))


def attention(**fields: Any) -> Change:
    """Other fields in the first half of each layer."""

    def changed(layer: LayerPlan) -> LayerPlan:
        if not isinstance(layer.attention, AttentionPlan):
            return layer
        return replace(layer, attention=replace(layer.attention, **fields))

    return lambda plan: replace(plan, layers=tuple(map(changed, plan.layers)))


def neighbours(plan: Plan) -> Plan:
    """Rotary embeddings turn neighbours where halves are right, and halves where neighbours are."""

    def changed(layer: LayerPlan) -> LayerPlan:
        first = layer.attention
        if not isinstance(first, AttentionPlan) or first.rotary is None:
            return layer
        turned = replace(first.rotary, pairs=not first.rotary.pairs)
        return replace(layer, attention=replace(first, rotary=turned))

    return replace(plan, layers=tuple(map(changed, plan.layers)))


def no_scale(plan: Plan) -> Plan:
    """Layers whose output is not multiplied by their own factor."""
    return replace(plan, layers=tuple(replace(layer, scale=None) for layer in plan.layers))


NO_HEAD_NORMS = attention(q_norm=None, k_norm=None)
NO_MULTIPLIER = attention(multiplier=1.0)
NO_WINDOW = attention(window=None)
NO_CAP = attention(softcap=None)
UNSCALED = attention(scaling=1.0)
