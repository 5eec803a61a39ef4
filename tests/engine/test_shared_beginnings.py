"""Examples that share what they begin with learn what they learn alone: in float64, forward and backward."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mtl_lora_cli.adapters.inject import Adapter, inject
from mtl_lora_cli.adapters.methods import METHODS, configure
from mtl_lora_cli.data.collate import training_batch
from mtl_lora_cli.data.encoded import EncodedSplit
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.models.batch import PackedBatch
from mtl_lora_cli.models.packed import Engine, PackedModel
from mtl_lora_cli.models.trust import settle
from mtl_lora_cli.training.prepared import _require_shared

from .double import TASKS, VOCABULARY, adapt_all, alone, in_double, linear_layers, tiny
from .peaks import peaks
from .test_bytes import longer
from .test_families import CASES

CLOSE = 1e-9
ROWS = [[(0, 2), (1, 0), (0, 0), (2, 0), (0, 1), (1, 1), (0, 3)], [(0, 4), (2, 1), (0, 0)]]


def splits() -> list[EncodedSplit]:
    """Of the first task a trunk with branches that fork again, one example within another, one twice.

    The second task begins as the first one does, and the third has nothing in common.
    """
    draw = np.random.default_rng(3)

    def new(count: int) -> list[int]:
        return draw.integers(3, VOCABULARY, count).tolist()

    trunk, bough = new(13), new(6)
    one = [[*trunk, *bough, *new(9)], [*trunk, *new(12)], [*trunk, *bough, *new(3)]]
    one += [one[0][:17], one[2]]
    return [of(one), of([[*trunk, *bough, *new(7)], [*trunk, *new(5)]]), of([new(15), new(8)])]


def of(examples: list[list[int]]) -> EncodedSplit:
    lengths = [len(example) for example in examples]
    return EncodedSplit(
        tokens=np.concatenate([np.asarray(one, dtype=np.int32) for one in examples]),
        starts=np.cumsum([0, *lengths]).astype(np.int64),
        prompt_lengths=np.full(len(examples), 1, dtype=np.int32),
        dropped=0,
        truncated=0,
        rows=len(examples),
    )


def batches() -> tuple[PackedBatch, PackedBatch]:
    """The same questions of the same examples, with and without shared beginnings."""
    made = splits()
    shared, apart = (training_batch(ROWS, made, loss_on="all", share=yes) for yes in (True, False))
    assert shared.input_ids.numel() < 0.8 * apart.input_ids.numel()
    return shared, apart


def learned(
    packed: PackedModel, batch: PackedBatch, tensors: dict[str, Tensor]
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    with packed.routed(batch):
        logprobs = packed(batch)
        found = gradients(logprobs, tensors)
    return logprobs.detach(), found


def gradients(logprobs: Tensor, tensors: dict[str, Tensor]) -> tuple[Tensor | None, ...]:
    weights = torch.rand(len(logprobs), generator=torch.Generator().manual_seed(5))
    total = (logprobs * weights.to(logprobs)).sum()
    return torch.autograd.grad(total, list(tensors.values()), allow_unused=True)


def close(ours: Any, theirs: Any) -> None:
    for one, other in zip(ours, theirs, strict=True):
        if one is None or other is None:
            assert all(x is None or not x.any() for x in (one, other))
        else:
            torch.testing.assert_close(one, other, rtol=0, atol=CLOSE)


def examples() -> list[tuple[Tensor, int]]:
    made = splits()
    return [
        (torch.from_numpy(made[task].example(number).astype(np.int64)), task)
        for row in ROWS
        for task, number in row
    ]


OFTEN = {
    ("llama", ""), ("mistral", "window"), ("gemma2", "caps"), ("qwen3", "window"),
    ("ministral3", "scaled queries"), ("phi3", "near longrope"), ("gpt_oss", ""),
}  # fmt: skip
FAMILIES = [
    pytest.param(*case, marks=[] if case[:2] in OFTEN else pytest.mark.long) for case in CASES
]


@pytest.mark.parametrize("engine", ["fused", "plain"])
@pytest.mark.parametrize("kind, what, changes", FAMILIES, ids=lambda x: str(x)[:20])
def test_a_family_gives_what_transformers_gives_each_example(
    kind: str, what: str, changes: dict[str, Any], engine: Engine
) -> None:
    model = tiny(kind, **changes)
    bare = copy.deepcopy(model)
    adapter = adapt_all(model, bare=bare)
    tensors = {name: one.requires_grad_() for name, one in adapter.tensors().items()}
    packed = PackedModel(model, adapter, engine=engine).train()
    with in_double():
        settle(packed)  # which layout is right, as a run would find it
        some = examples()
        longest = max(len(tokens) for tokens, _ in some)
        if not packed.shares(longest):  # a run says why
            assert (kind, what) not in OFTEN
            with pytest.raises(UsageError, match=r"training\.share_beginnings: "):
                _require_shared(packed, longest)
            return
        found = learned(packed, batches()[0], tensors)
        right = alone(bare, tensors, some, every=1)
        close([found[0]], [right.detach()])
        close(found[1], gradients(right, tensors))


def far(model: Any, method: str) -> Adapter:
    """An adapter of a method on all linear layers, far from its start."""
    targets = {path.rpartition(".")[2] for path in linear_layers(model)}
    config = configure(method=method, rank=8, alpha=16, target_modules=tuple(sorted(targets)))
    adapter = inject(model, config, TASKS)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in adapter.tensors().values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator).to(tensor))
            tensor.data = tensor.data.double()
    return adapter


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_gradients_that_it_has_without(method: str) -> None:
    model = tiny("llama", num_hidden_layers=2)
    adapter = far(model, method)
    tensors = dict(adapter.trained())
    packed = PackedModel(model, adapter).train()
    with in_double():
        shared, apart = (learned(packed, batch, tensors) for batch in batches())
    assert any(one is not None and one.any() for one in shared[1])
    close([shared[0]], [apart[0]])
    close(shared[1], apart[1])


@pytest.mark.parametrize("kind, what", [("llama", ""), ("gemma2", "caps")])
def test_the_memory_of_trees_is_what_is_said(kind: str, what: str) -> None:
    """A tree of 1,024 positions, of whose trunk every example asks something."""
    draw = np.random.default_rng(4)
    trunk = draw.integers(3, VOCABULARY, 124).tolist()
    made = [of([trunk + draw.integers(3, VOCABULARY, 101).tolist() for _ in range(9)])]
    made = [replace(made[0], prompt_lengths=np.full(9, 100, dtype=np.int32))]
    rows = [[(0, number) for number in range(9)]]
    changes = next(one for *names, one in CASES if names == [kind, what])
    model = tiny(kind, **longer(changes)).float()
    estimate, measured = peaks(
        model, adapt_all(model), False,
        lambda: training_batch(rows, made, loss_on="answer", share=True),
    )  # fmt: skip
    assert 0.9 < estimate / measured < 1.2
