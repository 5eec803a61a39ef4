"""An embedding cut into a part for every process, and whole again before a pass asks for it.

Nothing is computed before a pass's embedding, so its gather would hide behind nothing: a gigabyte, for LLaMA-3's
vocabulary in 16 bits. It begins while the pass before goes backward through its first layer, where there is work
to hide it and the activations are gone.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


class CutEmbedding:
    """The frozen weight [V, d] of an embedding, of which each of P processes keeps ceil(V d / P) values.

    Args:
        module: the embedding. It is called as often by all processes.
        group: of them, in whose order all gathers run; None: the group of all. Gathers of two groups may meet in
            another order on each card.
    """

    def __init__(self, module: nn.Module, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self._weight = next(module.parameters())
        self._shape = self._weight.shape
        self._part = _part_of(self._weight.data.reshape(-1), group)
        self._whole: Tensor | None = None
        self._arriving: dist.Work | None = None
        module.register_forward_pre_hook(self._bring)
        module.register_forward_hook(self._take_away)
        self._take_away()

    def _fetch(self, _gradient: Tensor | None = None) -> None:
        """Begin to gather, unless that was done; all processes together."""
        if self._whole is None:
            self._whole = self._part.new_empty(
                dist.get_world_size(self._group) * self._part.numel()
            )
            self._arriving = dist.all_gather_into_tensor(
                self._whole, self._part, group=self._group, async_op=True
            )

    def fetch_behind(self, layer: nn.Module) -> None:
        """Begin to gather when the first layer's gradient comes."""

        def follow(_layer: nn.Module, _arguments: Any, found: Any) -> None:
            for tensor in found if isinstance(found, tuple) else (found,):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(self._fetch)

        layer.register_forward_hook(follow)

    def _bring(self, *_: Any) -> None:
        self._fetch()
        assert self._whole is not None
        if self._arriving is not None:
            self._arriving.wait()
        self._weight.data = self._whole[: self._shape.numel()].view(self._shape)

    def _take_away(self, *_: Any) -> None:
        self._whole = self._arriving = None
        self._weight.data = self._part.new_empty((0, *self._shape[1:]))


def is_ours_to_cut(embedding: nn.Module, head: nn.Module | None) -> bool:
    """Whether it has one frozen weight, which the head does not share."""
    own = list(embedding.parameters())
    shared = set() if head is None else {id(parameter) for parameter in head.parameters()}
    return (
        dist.get_world_size() > 1
        and len(own) == 1
        and not own[0].requires_grad
        and id(own[0]) not in shared
    )


def _part_of(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """This process's part of [n], filled up with zeros where n does not divide."""
    count, rank = dist.get_world_size(group), dist.get_rank(group)
    size = -(-values.numel() // count)
    own = values[rank * size :][:size]
    return nn.functional.pad(own, (0, size - own.numel())).clone()
