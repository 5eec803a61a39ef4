"""MTL-LoRA of fine parts: up-projections that share the rank, weighed by a gate whose mean is one.

    ΔW_t x = s Σ_i g_{t,i} B_i D_{t,i} A_i x        i = 1 … n,  n = ⌈r / m⌉
    g_t = 1 + G e_t

The B_i are groups of m columns of one B [out, r], the A_i the same rows of one A; the last group may be
smaller. With m = 1, ΔW_t = s Σ_k g_{t,k} d_{t,k} b_k a_kᵀ. So no further up-projection costs rank. One e_t
serves the whole model, each layer has its own G, and D_t is a diagonal. The start is B = 0, D = 1, and gates
beside one.

M_t is the diagonal of g and d together: for one task it is exactly a LoRA of rank r.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from mtl_lora_cli.adapters.methods import method
from mtl_lora_cli.adapters.methods.base import (
    NonNegativeFloat,
    Positive,
    Role,
    Settings,
    Sizes,
    Spread,
    Tensors,
    beside_one,
    normal,
)

if TYPE_CHECKING:
    from torch import Tensor


@method
class MtlLoraFine(Settings):
    """r (in + out) + n d + T r values a layer; T d for the model."""

    source: ClassVar[str] = "arXiv 2410.09437"
    spread: ClassVar[Spread] = "task"
    start_keys: ClassVar[tuple[str, ...]] = ("down_start", "transform_start", "gate_spread")

    method: Literal["mtl-lora-fine"] = "mtl-lora-fine"
    up_rank: Positive = Field(1, description="m, rank of each up-projection; n = ⌈rank / m⌉.")
    gate_spread: NonNegativeFloat = Field(
        0.5, description="Standard deviation of the gates around 1 at the start."
    )
    embedding_size: Positive = Field(16, description="d of the task embedding.")
    transform_start: NonNegativeFloat = Field(
        0.0, description="Standard deviation around 1 of D_t at the start."
    )
    tied: bool = Field(
        False, description="A control: all tasks have one gate and one D. Then it knows no tasks."
    )

    @model_validator(mode="after")
    def _groups_can_be(self) -> Self:
        least = min(self.rank, *self.rank_pattern.values(), self.rank)
        if self.up_rank > least:
            raise ValueError(
                f"'up_rank' is at most the rank of a layer, {least}, received {self.up_rank}"
            )
        return self

    def roles(self, sizes: Sizes) -> tuple[Role, ...]:
        """A, B, D and G."""
        own = 1 if self.tied else sizes.tasks
        start, deviation = beside_one(self.transform_start), self.gate_spread
        transform = (own, sizes.rank)
        gate = (-(-sizes.rank // self.up_rank), self.embedding_size)
        return (
            *super().roles(sizes),
            Role("task_transform", transform, start, "transform", per_task=not self.tied),
            Role("gate_projection", gate, normal(deviation / math.sqrt(gate[1])), "gate"),
        )

    def roles_of_model(self, tasks: int) -> tuple[Role, ...]:
        """e [T, d]."""
        shape = (1 if self.tied else tasks, self.embedding_size)
        return (Role("task_embedding", shape, normal(), "embedding", per_task=not self.tied),)

    def mixing(self, p: Tensors) -> Tensor:
        """The diagonal of g and D together, [L, P, r, r]."""
        gates = self.gates(p).repeat_interleave(self.up_rank, dim=-1)[..., : p.rank]
        return (gates * p["task_transform"]).diag_embed()

    def gates(self, p: Tensors) -> Tensor:
        """g [L, P, n]."""
        gates: Tensor = 1 + p["task_embedding"] @ p["gate_projection"].mT
        return gates.expand(-1, p.tasks, -1)

    def own(self, p: Tensors) -> dict[str, Tensor]:
        """D_t, and D_t − 1: how far it went."""
        transform = p["task_transform"].expand(-1, p.tasks, -1)
        return {"transform": transform, "transform_change": transform - 1}
