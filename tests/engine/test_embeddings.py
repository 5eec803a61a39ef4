"""The fused decoder takes embeddings: what is put in the place of a token's reaches all that follows, both ways.

So the features of a picture will come in. On the other side stands transformers with `inputs_embeds`, on
each example alone, in float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mtl_lora_cli.engine.segments import Segments
from mtl_lora_cli.models.batch import PackedBatch
from mtl_lora_cli.models.packed import PackedModel

from .double import adapt_all, in_double, tiny

LENGTHS, PUT = (14, 9), slice(3, 8)  # of two examples; where something else is put in the first one
KINDS = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
}


@pytest.mark.parametrize(("kind", "changes"), KINDS.items(), ids=list(KINDS))
def test_what_is_put_in_is_read_and_gets_its_gradient(kind: str, changes: dict[str, Any]) -> None:
    model = tiny(kind, **changes)
    count = sum(LENGTHS)
    ids = torch.randint(5, 150, (1, count))
    batch = PackedBatch(
        input_ids=ids,
        position_ids=torch.cat([torch.arange(n) for n in LENGTHS]).unsqueeze(0),
        task_ids=torch.full((1, count), -1),
        segments=Segments.build(LENGTHS),
        positions=torch.arange(count),
        owner=torch.arange(count),
        targets=ids[0],
    )
    with in_double():
        own = model.get_input_embeddings()(ids)[0].detach()
        own[PUT] = torch.randn(PUT.stop - PUT.start, own.shape[1], dtype=own.dtype)
        pull = torch.randn(count, 160, dtype=own.dtype)
        expected, wanted = [], own.clone().requires_grad_()
        for part in wanted.split(LENGTHS):
            expected.append(model(inputs_embeds=part.unsqueeze(0), use_cache=False).logits[0])
        (torch.cat(expected) * pull).sum().backward()

        packed = PackedModel(model, adapt_all(model), engine="fused")
        decoder, put = packed.decoder, own.clone().requires_grad_()
        assert decoder is not None and packed.adapter is not None
        torch.testing.assert_close(decoder.embed(ids)[: PUT.start], own[: PUT.start])
        with packed.routed(batch):
            hidden = decoder.forward(
                put,
                batch.position_ids,
                batch.segments,
                batch.positions,
                *packed._slots(batch),
                training=True,
                keep=packed.keep,
            )
            found = decoder.capped(model.get_output_embeddings()(hidden))
            (found * pull).sum().backward()
    assert put.grad is not None and wanted.grad is not None
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(put.grad, wanted.grad, rtol=1e-8, atol=1e-8)
    first, second = put.grad.split(LENGTHS)
    assert first[PUT].abs().min() > 0 and second.abs().max() > 0
