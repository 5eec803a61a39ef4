"""The whole fused engine on kernels, against transformers' own layers in plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mtl_lora_cli.adapters.inject import inject
from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.engine.rows import KeptRows
from mtl_lora_cli.engine.saved import Keep
from mtl_lora_cli.engine.segments import Segments
from mtl_lora_cli.evaluation.choices import score
from mtl_lora_cli.evaluation.requests import Request
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import load_model
from mtl_lora_cli.models.packed import PackedBatch, PackedModel

pytestmark = pytest.mark.slow

LENGTHS, TASKS = [9, 1, 18], [2, -1, 0]


def batch() -> PackedBatch:
    tokens = torch.randint(3, 512, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    asked = torch.arange(0, len(tokens) - 1, 3)
    return PackedBatch(
        input_ids=tokens.unsqueeze(0),
        position_ids=torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0),
        task_ids=torch.tensor(TASKS).repeat_interleave(torch.tensor(LENGTHS)).unsqueeze(0),
        segments=Segments.build(LENGTHS),
        positions=asked,
        owner=torch.arange(len(asked)),
        targets=tokens[asked + 1],
    )


def learned(packed: PackedModel, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    one = batch()
    for tensor in tensors.values():
        tensor.grad = None
    with packed.routed(one):
        logprobs = packed(one)
        (logprobs * torch.linspace(1, 2, len(logprobs))).sum().backward()
    return logprobs.detach(), {name: t.grad.clone() for name, t in tensors.items()}


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="tests/models/test_on_card.py does this there"
)
@pytest.mark.parametrize(
    ("config", "quantization", "keep"),
    [
        ({"rank": 5, "rank_pattern": {"v_proj": 9}}, "none", Keep()),
        pytest.param({}, "nf4", Keep(False, False, False), marks=pytest.mark.long),
        pytest.param(
            {"method": "lora", "rank": 6}, "none", Keep(attended=False), marks=pytest.mark.long
        ),
    ],
    ids=["mtl-lora", "nf4", "lora"],
)
def test_equals_the_plain_layers(
    stories_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: dict[str, Any],
    quantization: str,
    keep: Keep,
) -> None:
    base = find_base_model(str(stories_folder))
    device = torch.device("cpu")
    model = load_model(base, dtype=torch.float32, device=device, quantization=quantization)
    torch.manual_seed(0)
    adapter = inject(model, configure(target_modules=("*_proj",), **config), "abc")
    tensors = adapter.tensors()
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.add_(0.05 * torch.randn_like(tensor))
    monkeypatch.setenv("MTL_LORA_KERNELS", "plain")
    plain = learned(PackedModel(model, adapter, engine="plain"), tensors)
    monkeypatch.setenv("MTL_LORA_KERNELS", "triton")
    fused = learned(PackedModel(model, adapter, engine="fused", keep=keep), tensors)
    torch.testing.assert_close(fused[0], plain[0], rtol=1e-4, atol=1e-4)
    for name, gradient in plain[1].items():
        error = (fused[1][name] - gradient).norm() / gradient.norm().clamp(min=1e-9)
        assert error < 1e-4, f"{name}: {error}"


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="tests/models/test_on_card.py does this there"
)
def test_trees_equal_the_plain_layers(
    stories_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts with candidates that share what they begin with, of two tasks and of none."""
    device = torch.device("cpu")
    model = load_model(find_base_model(str(stories_folder)), dtype=torch.float32, device=device)
    torch.manual_seed(0)
    adapter = inject(model, configure(target_modules=("*_proj",)), "abc")
    with torch.no_grad():
        for tensor in adapter.tensors().values():
            tensor.add_(0.05 * torch.randn_like(tensor))
    choices = [[5, 6, 7, 8], [5, 6, 9, 10], [5, 11, 12], [13]]
    requests = [
        Request(task, list(range(20, 20 + length)), choices)
        for task, length in ((2, 9), (-1, 1), (0, 18))
    ]
    monkeypatch.setenv("MTL_LORA_KERNELS", "plain")
    plain = PackedModel(model, adapter, engine="plain")
    expected = score(plain, requests, device=device, tokens_per_pass=100)
    monkeypatch.setenv("MTL_LORA_KERNELS", "triton")
    fused = PackedModel(model, adapter, engine="fused")
    found = score(fused, requests, device=device, tokens_per_pass=100)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.long  # half a minute in the interpreter; test_one_token.py has its kernels
def test_rows_grow_as_on_the_plain_engine(
    stories_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of rows of three tasks; A stands below W here, so that one product gives both."""
    base = find_base_model(str(stories_folder))
    torch.manual_seed(0)
    model = load_model(base, dtype=torch.float32, device=torch.device("cpu"))
    config = configure(target_modules=("*_proj",), rank=5, rank_pattern={"v_proj": 9})
    adapter = inject(model, config, ("a", "b", "c"))
    with torch.no_grad():
        for tensor in adapter.tensors().values():
            tensor.add_(0.05 * torch.randn_like(tensor))
    prompts = torch.randint(3, 512, (3, 6), generator=torch.Generator().manual_seed(0)).tolist()
    found = []
    for kernels in ("plain", "triton"):
        monkeypatch.setenv("MTL_LORA_KERNELS", kernels)
        packed = PackedModel(model, adapter).eval()
        assert packed.decoder is not None
        stacked = packed.decoder.layers[0].attention.qkv.frozen.above_down()
        assert (stacked is not None) == (kernels == "triton")
        with torch.inference_mode():
            kept = KeptRows(packed.decoder, packed.head, [0, 2], rows=4, length=16)
            steps = [kept.begin(prompts, [2, -1, 0], range(3))]
            for count in (3, 1):
                kept.feed(range(count), steps[-1][:count].argmax(-1))
                steps.append(kept.step(count).clone())
        found.append(steps)
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
