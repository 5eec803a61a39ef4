"""Each family's plan on our kernels, in Triton's interpreter, against transformers on each example alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from mtl_lora_cli.engine.saved import Keep
from mtl_lora_cli.models.packed import PackedModel

from ..engine.double import adapt_all, alone, examples, packed_row, tiny
from ..engine.test_families import CASES

pytestmark = pytest.mark.slow

KINDS = {f"{kind} {variant}".strip(): (kind, changes) for kind, variant, changes in CASES}


@pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter, on a CPU")
@pytest.mark.parametrize(
    ("name", "keep"),
    [
        pytest.param("qwen3 window", Keep(), marks=pytest.mark.long),
        ("gemma2 caps", Keep(False, False, False)),
        pytest.param("olmo3 window", Keep(attended=False), marks=pytest.mark.long),
        pytest.param("phi3 part", Keep(), marks=pytest.mark.long),
        pytest.param("gpt_oss", Keep(), marks=pytest.mark.long),
    ],
)
def test_kernels_are_transformers_alone(
    name: str, keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTL_LORA_KERNELS", "triton")
    kind, changes = KINDS[name]
    model: Any = tiny(kind, **changes).float()
    bare, some = copy.deepcopy(model), examples()
    adapter = adapt_all(model)
    for tensor in adapter.tensors().values():
        tensor.data = tensor.data.float()
    packed = PackedModel(model, adapter, engine="fused", keep=keep).train()
    leaves = {key: t.detach().clone().requires_grad_() for key, t in adapter.tensors().items()}
    right = alone(bare, leaves, some)
    (right * torch.linspace(1, 2, len(right))).sum().backward()
    batch = packed_row(some)
    with packed.routed(batch):
        found = packed(batch)
        (found * torch.linspace(1, 2, len(found))).sum().backward()
    # The tile tables that a graph would hold are those that a pass reads.
    assert packed.decoder is not None
    assert sorted(key for key in batch.segments._made if len(key) == 2 and key[0] != "stacks") == (
        packed.decoder.tables()
    )
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    for key, tensor in adapter.tensors().items():
        wanted = leaves[key].grad
        assert wanted is not None and tensor.grad is not None
        assert (tensor.grad - wanted).norm() < 1e-4 * wanted.norm(), key
