"""A small LLaVA, adapted, and rows with pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.models.base import BaseModel, find_base_model
from mtl_lora_cli.models.load import adapt, load_model, load_tokenizer
from mtl_lora_cli.models.packed import PackedModel

from ..sights import tiny_llava, tiny_model, write_squares


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> BaseModel:
    return find_base_model(str(tiny_llava(small_model, tmp_path_factory.mktemp("llava"))))


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("squares")
    return write_squares(folder, {"train": 48, "validation": 8, "test": 12})


@pytest.fixture(scope="session")
def models(
    tmp_path_factory: pytest.TempPathFactory, small_model: Path
) -> Callable[[str], BaseModel]:
    """Model type → a small one of random weights."""
    folder = tmp_path_factory.mktemp("models")

    def made(kind: str) -> BaseModel:
        if not (folder / kind).is_dir():
            tiny_model(kind, small_model, folder / kind)
        return find_base_model(str(folder / kind))

    return made


def some_at_once(kinds: Iterable[str], *often: str) -> list[Any]:
    """Model types, those that are not named run by `make long` alone: one of a sort shows the same faults."""
    return [kind if kind in often else pytest.param(kind, marks=pytest.mark.long) for kind in kinds]


CONNECTORS = {
    "idefics3": "connector",
    "smolvlm": "connector",
    "qwen2_5_vl": "merger",
    "qwen3_vl": "merger",
    "gemma4": "embed_vision",
    "gemma4_small": "embed_vision",
}


def packed_of(
    base: BaseModel,
    engine: Any = "auto",
    kind: str | None = "",
    dtype: torch.dtype = torch.float32,
) -> PackedModel:
    """With an adapter of two tasks that is far from its start, and a projector that learns.

    None for a kind: nothing but the adapter learns.
    """
    model = load_model(base, dtype=dtype, device=torch.device("cpu"))
    config = configure(
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank=4,
        whole_modules=[] if kind is None else [CONNECTORS.get(kind, "multi_modal_projector")],
    )
    torch.manual_seed(1)
    adapter = adapt(model, config, ("one", "two"))
    with torch.no_grad():
        for tensor in adapter.tensors().values():
            tensor.add_(0.05 * torch.randn_like(tensor))
    vision = load_tokenizer(base).vision()
    return PackedModel(model, adapter, engine=engine, vision=vision).eval()
