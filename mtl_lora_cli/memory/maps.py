"""The memory of a step over maps of pictures: the step itself, run without numbers.

On torch's meta device tensors have shapes and no values. A pass runs there, forward and backward, over as many
pictures as the recipe says, while every piece of memory that comes and goes is counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtl_lora_cli.data.map_batch import MapBatch
from mtl_lora_cli.dense.host import DenseHost
from mtl_lora_cli.dense.objective import DenseObjective
from mtl_lora_cli.engine.memory import CONTEXT, FRAGMENTATION, GIB
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.machine.cards import free_memory
from mtl_lora_cli.machine.processes import Processes
from mtl_lora_cli.recipe.schema import Recipe
from mtl_lora_cli.tasks.maps import MapSpec

_OPTIMISER = 3  # of what learns, in its own size: gradients, and AdamW's two moments
_MASK_ROW = 8  # values of a mask's row
_BITS = 0.53  # bytes a value that is kept in 4 bits, scales included


@dataclass(frozen=True)
class MapsMemory:
    """Bytes.

    Attributes:
        fixed: weights, gradients and AdamW's moments.
        passing: the most that lives during one pass besides.
    """

    fixed: int
    passing: int

    @property
    def peak(self) -> int:
        """Of the tensors."""
        return self.fixed + self.passing

    @property
    def needed(self) -> int:
        """On a device, with libraries and what the allocator cannot use."""
        return int(self.peak * (1 + FRAGMENTATION)) + CONTEXT


class _Live(TorchDispatchMode):
    """Counts memory that operations make, until nobody holds it any more."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, call: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        found = call(*arguments, **(named or {}))
        for value in tree_leaves(found):
            if isinstance(value, Tensor) and value.is_meta:
                self._count(value.untyped_storage())
        return found

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._let_go, key, size)

    def _let_go(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def memory_of(objective: DenseObjective, dtype: torch.dtype, pictures: int) -> MapsMemory:
    """Of one pass over so many pictures, all of which have all maps.

    Args:
        objective: of the run.
        dtype: in which the backbone computes.
        pictures: of a pass.
    """
    host = objective.host(torch.device("meta"), dtype)
    passing = _passing(host, objective.specs, objective.size, pictures)
    return MapsMemory(_fixed(host, objective.quantization), passing)


def _fixed(host: DenseHost, quantization: str) -> int:
    trained = {id(t): t for t in host.adapter.trained().values()}
    tensors = {id(p): p for p in (*host.model.parameters(), *host.adapter.tensors().values())}
    quantised = {
        id(layer.weight) for layer in host.adapter.layers.values() if quantization in ("nf4", "fp4")
    }
    held = sum(
        int(t.numel() * _BITS) if key in quantised else t.nbytes for key, t in tensors.items()
    )
    return held + _OPTIMISER * sum(t.nbytes for t in trained.values())


def _passing(
    host: DenseHost, specs: Sequence[MapSpec], size: tuple[int, int], pictures: int
) -> int:
    host.train(True)
    with _attention_of_cards(), _Live() as live:
        batch = _empty_batch(specs, size, pictures)
        losses = host.losses(batch)
        (losses * torch.ones(len(losses), device="meta")).sum().backward()
        gradients = sum(
            t.grad.nbytes for t in host.adapter.trained().values() if t.grad is not None
        )
    return max(0, live.most - gradients)  # those are counted as fixed


@contextmanager
def _attention_of_cards() -> Iterator[None]:
    """Attention as cards' kernels have it: they keep no probabilities, where the meta device would.

    Of a mask they want rows that begin at 16 bytes, so it is filled up to them. They take [N, heads, length,
    features]; of anything else (Hiera's windows) torch makes products on a card as well.
    """
    usual = F.scaled_dot_product_attention

    def kernels(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, **more: Any,
    ) -> Tensor:  # fmt: skip
        if query.ndim != 4:
            return usual(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **more)
        if attn_mask is not None:
            length = attn_mask.shape[-1]
            mask = F.pad(attn_mask.to(query.dtype), (0, -length % _MASK_ROW))[..., :length]
            attn_mask = mask.expand(*query.shape[:3], length)
        found = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
        )
        return cast(Tensor, found[0])

    F.scaled_dot_product_attention = kernels  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = usual


def _empty_batch(specs: Sequence[MapSpec], size: tuple[int, int], pictures: int) -> MapBatch:
    shape = (pictures, *size)
    targets = {
        number: torch.empty(shape, dtype=torch.long, device="meta")
        if spec.of_classes
        else torch.empty(
            (pictures, 3, *size) if spec.objective == "normals" else shape, device="meta"
        )
        for number, spec in enumerate(specs)
    }
    return MapBatch(
        torch.empty(pictures, 3, *size, device="meta"),
        targets,
        torch.ones(pictures, len(specs), dtype=torch.bool),
        torch.arange(len(specs)).repeat(pictures),
        torch.arange(len(specs)),
    )


def plan_maps(
    objective: DenseObjective,
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype,
    processes: Processes,
) -> tuple[Recipe, str]:
    """With `memory: auto` as many pictures a pass as fit, and what was picked, in one line.

    Raises:
        UsageError: not even one picture fits.
    """
    free, name = min(processes.gather(free_memory(device)))
    limit = recipe.training.memory_limit
    free = free if limit is None else min(free, int(limit * GIB))
    mine = -(-recipe.training.rows_per_step // processes.count)
    count, tried = mine, memory_of(objective, dtype, mine)
    while tried.needed > free and count > 1:
        count = -(-count // 2)
        tried = memory_of(objective, dtype, count)
    if tried.needed > free:
        raise UsageError(
            f"training.memory: one picture a pass needs {tried.needed / GIB:.1f} GiB, {free / GIB:.1f} GiB are "
            f"free on {name}; what would help: a smaller images.size, quantization: nf4, dtype: bfloat16"
        )
    picked = {"memory": "manual", "memory_limit": None, "rows_per_pass": count}
    training = recipe.training.model_copy(update=picked)
    some = "1 picture" if count == 1 else f"{count} pictures"
    fewer = " (more do not fit)" if count < mine else ""
    line = (
        f"memory: {free / GIB:.1f} GiB free on {name}: {some} a pass{fewer}; estimated peak "
        f"{tried.peak / GIB:.1f} GiB"
    )
    return recipe.model_copy(update={"training": training}), line
