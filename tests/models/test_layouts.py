"""The plain engine's layouts, in float64 against transformers on each example alone."""

from __future__ import annotations

import copy

import pytest
import torch

from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.models.plain import Layout, Way

from ..engine.double import VOCABULARY, adapt_all, alone, in_double, packed_row, tiny


@pytest.mark.parametrize("lengths", [(25, 19, 29), (4, 30, 12, 29), (9,)], ids=str)
@pytest.mark.parametrize("layout", ["packed", "rows", "single"])
def test_answers_stand_where_they_were_asked_for(layout: Layout, lengths: tuple[int, ...]) -> None:
    """Rows are laid out by length, all in one call where their lengths are alike."""
    model = tiny("llama")
    bare, adapter = copy.deepcopy(model), adapt_all(model)
    packed = PackedModel(model, adapter, engine="plain").eval()
    packed.go(Way(layout))
    generator = torch.Generator().manual_seed(3)
    some = [
        (torch.randint(3, VOCABULARY, (length,), generator=generator), number % 3)
        for number, length in enumerate(lengths)
    ]
    batch = packed_row(some)
    with in_double(), torch.no_grad(), packed.routed(batch):
        found, right = packed(batch), alone(bare, adapter.tensors(), some)
    torch.testing.assert_close(found, right, rtol=0, atol=1e-10)
