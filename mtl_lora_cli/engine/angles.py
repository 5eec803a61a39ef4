"""Which angles turn the queries and keys of packed positions: what the model's own rotary embedding says."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtl_lora_cli.engine.plan import RotaryPlan
from mtl_lora_cli.engine.segments import Segments

Halves = tuple[Tensor, Tensor]  # cos and sin, [N, R/2]


class Angles:
    """One rotary embedding of a model.

    Where it takes other frequencies for sequences beyond a limit, each example has those that it would have
    alone. Answers share what they begin with only where all have the same ones (`PackedModel.shares`).

    Args:
        body: the text part of the model.
        plan: which module, and how it is asked.
    """

    def __init__(self, body: nn.Module, plan: RotaryPlan) -> None:
        self._module = body.get_submodule(plan.path)
        self._plan = plan
        self._near: Halves | None = None

    def __call__(self, wide: Tensor, position_ids: Tensor, segments: Segments) -> Halves:
        """cos and sin of all positions, [N, R/2].

        Args:
            wide: of the dtype and on the device that they are to have.
            position_ids: int64 [1, N].
            segments: of the N positions.
        """
        limit = self._plan.limit
        if limit is None:
            return self._asked(wide, position_ids)
        near = self._within(wide, limit)
        if segments.longest <= limit:
            # The module itself would look for the largest position, which a CUDA graph cannot wait for.
            cos, sin = (table[position_ids[0]] for table in near)
            return cos, sin
        beyond = segments.longer_than(limit)
        (cos, sin), (far_cos, far_sin) = (
            self._asked(wide, position_ids.masked_fill(hidden, 0)) for hidden in (beyond, ~beyond)
        )
        chosen = beyond[:, None]
        return torch.where(chosen, far_cos, cos), torch.where(chosen, far_sin, sin)

    def _within(self, wide: Tensor, limit: int) -> Halves:
        """Those of every position up to the limit."""
        if (
            self._near is None
            or self._near[0].device != wide.device
            or self._near[0].dtype != wide.dtype
        ):
            self._near = self._asked(wide, torch.arange(limit, device=wide.device)[None])
        return self._near

    def _asked(self, wide: Tensor, positions: Tensor) -> Halves:
        kind = () if self._plan.layer_type is None else (self._plan.layer_type,)
        if self._plan.grids > 1:
            positions = positions.expand(self._plan.grids, 1, -1)
        cos, sin = (one[0].to(wide.dtype) for one in self._module(wide, positions, *kind))
        half = cos.shape[-1] // (1 if self._plan.halved else 2)
        return cos[:, :half].contiguous(), sin[:, :half].contiguous()
