"""Adapters on experts in the files: merged they are transformers' own weights, and PEFT reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_lora_cli.adapters.experts import MultiTaskStack
from mtl_lora_cli.adapters.files import read_adapter_file, save_adapter
from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.export.alone import load_alone
from mtl_lora_cli.export.merge import plan_merge, task_updates, write_merged
from mtl_lora_cli.export.peft_files import targets_of, write_peft
from mtl_lora_cli.export.peft_names import peft_names, require_named
from mtl_lora_cli.models.base import BaseModel, find_base_model
from mtl_lora_cli.models.load import adapt, load_model

from ..families.build import build
from ..families.models import MODELS

TASK = 1


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], BaseModel]:
    """Tiny models in float64: of files in pieces, one for each expert, and of files with transposed stacks."""

    return lambda kind: tiny(kind, tmp_path_factory.mktemp("base"), torch.float64)


def tiny(kind: str, folder: Path, dtype: torch.dtype) -> BaseModel:
    """A tiny model of a family, its files in a dtype."""
    (model,) = (one for one in MODELS if str(one) == kind)
    built = build(model, folder / kind)
    load_alone(built, torch.float32).to(dtype).save_pretrained(built)
    return find_base_model(str(built))


def adapted(base: BaseModel, experts: str) -> Adapter:
    """An adapter of two tasks on attention and experts, far from its start."""
    model = load_model(base, dtype=torch.float64, device=torch.device("cpu"))
    adapter = adapt(model, configure(rank=3, up_projections=2, experts=experts), ["a", "b"])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in adapter.tensors().values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator).double())
    return adapter


def expected(layer: MultiTaskStack, weight: Tensor) -> Tensor:
    """W_e + s Σ_i g_i B_i Λ A of each expert, written out."""
    config = layer.config
    changes = []
    for expert in range(len(weight)):
        own = expert if config.experts == "each" else slice(None)
        down, ups = layer.lora_A[own], layer.lora_B[own]
        transform, gate = layer.task_transform[TASK][own], layer.task_gate[TASK][own]
        shares = (gate / config.tau).softmax(0)
        change = sum(g * up @ transform @ down[0] for g, up in zip(shares, ups, strict=True))
        changes.append(change.T if layer.frozen.transposed else change)
    return weight + config.alpha / config.rank * torch.stack(changes)


@pytest.mark.parametrize(
    ("kind", "experts"),
    [
        pytest.param("mixtral", "shared", marks=pytest.mark.long),
        ("qwen3_moe", "each"),
        ("gpt_oss-no-window", "each"),
        pytest.param("gpt_oss-no-window", "shared", marks=pytest.mark.long),
    ],
)
def test_merged_stacks_are_what_transformers_loads(
    base_of: Callable[[str], BaseModel], tmp_path: Path, kind: str, experts: str
) -> None:
    base = base_of(kind)
    adapter = adapted(base, experts)
    write_merged(plan_merge(base, task_updates(adapter, TASK)), tmp_path)
    now: Any = dict(load_alone(tmp_path, torch.float64).named_parameters())
    stacks = {path: one for path, one in adapter.layers.items() if isinstance(one, MultiTaskStack)}
    assert len(stacks) == 4
    for path, layer in stacks.items():
        wanted = expected(layer, layer.frozen.weight)
        assert float((now[path] - wanted).detach().abs().max()) < 1e-6
        assert not torch.equal(now[path], layer.frozen.weight)


@pytest.mark.parametrize(
    ("kind", "experts"),
    [
        ("gpt_oss-no-window", "each"),
        pytest.param("qwen3_moe", "each", marks=pytest.mark.long),
        pytest.param("qwen2_moe", "shared", marks=pytest.mark.long),
    ],
)
def test_peft_adds_the_same(
    base_of: Callable[[str], BaseModel], tmp_path: Path, kind: str, experts: str
) -> None:
    from peft import PeftModel

    base = base_of(kind)
    adapter = adapted(base, experts)
    updates = task_updates(adapter, TASK)
    names = peft_names(base, updates, targets_of(adapter))
    write_peft(updates, names, str(base.folder), tmp_path)
    require_named(base, tmp_path)
    model: Any = PeftModel.from_pretrained(load_alone(base.folder, torch.float64), str(tmp_path))
    now = dict(model.merge_and_unload().named_parameters())
    for path, layer in adapter.layers.items():
        if isinstance(layer, MultiTaskStack):
            wanted = expected(layer, layer.frozen.weight)
            assert float((now[path] - wanted).detach().abs().max()) < 1e-6, path


def test_the_file_is_read_without_its_base_model(
    base_of: Callable[[str], BaseModel], tmp_path: Path
) -> None:
    adapter = adapted(base_of("gpt_oss-no-window"), "each")
    save_adapter(adapter, tmp_path, {"name": "base"})
    alone = read_adapter_file(tmp_path).alone()
    assert alone.tensors().keys() == adapter.tensors().keys()
    for name, (down, up, _) in task_updates(adapter, TASK).items():
        again_down, again_up, _ = task_updates(alone, TASK)[name]
        torch.testing.assert_close((again_down, again_up), (down, up))
