"""The tiny real model, with and without a trained adapter, and batches over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_lora_cli.adapters.inject import inject
from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.engine.segments import Segments
from mtl_lora_cli.models.base import BaseModel, find_base_model
from mtl_lora_cli.models.load import load_model
from mtl_lora_cli.models.packed import PackedBatch, PackedModel


@pytest.fixture(scope="session")
def base(stories_folder: Path) -> BaseModel:
    return find_base_model(str(stories_folder))


def _load(base: BaseModel) -> Any:
    return load_model(base, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture(scope="session")
def adapted(base: BaseModel) -> Iterator[PackedModel]:
    """With an adapter of three tasks that is far from its start."""
    torch.manual_seed(0)
    model = _load(base)
    adapter = inject(model, configure(target_modules=("*_proj",)), ("one", "two", "three"))
    with torch.no_grad():
        for tensor in adapter.tensors().values():
            tensor.add_(0.05 * torch.randn_like(tensor))
    yield PackedModel(model, adapter).eval()


@pytest.fixture(scope="session")
def bare(base: BaseModel) -> PackedModel:
    """The base model alone."""
    return PackedModel(_load(base)).eval()


def _batch(examples: Sequence[Tensor], tasks: Sequence[int], every: int = 1) -> PackedBatch:
    lengths = [len(example) for example in examples]
    tokens = torch.cat(list(examples))
    ends = torch.tensor([0, *lengths]).cumsum(0)
    asked = torch.cat([torch.arange(ends[i], ends[i + 1] - 1, every) for i in range(len(lengths))])
    return PackedBatch(
        input_ids=tokens.unsqueeze(0),
        position_ids=torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
        task_ids=torch.repeat_interleave(torch.tensor(tasks), torch.tensor(lengths)).unsqueeze(0),
        segments=Segments.build(lengths),
        positions=asked,
        owner=torch.arange(len(asked)),
        targets=tokens[asked + 1],
    )


@pytest.fixture(scope="session")
def logprobs() -> Callable[..., list[Tensor]]:
    """Of every token but the first of each example, all examples in one packed row."""

    def run(packed: PackedModel, examples: Sequence[Tensor], tasks: Sequence[int]) -> list[Tensor]:
        batch = _batch(examples, tasks)
        with torch.no_grad(), packed.routed(batch):
            together = packed(batch)
        return list(together.split([len(example) - 1 for example in examples]))

    return run


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., PackedBatch]:
    """Random examples of the given lengths and tasks; `every`-th positions are asked for."""

    def build(lengths: Sequence[int], tasks: Sequence[int], every: int = 1) -> PackedBatch:
        generator = torch.Generator().manual_seed(len(lengths))
        examples = [torch.randint(3, 512, (length,), generator=generator) for length in lengths]
        return _batch(examples, tasks, every)

    return build
