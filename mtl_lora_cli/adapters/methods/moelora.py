"""MoELoRA: experts that share the rank, weighed by one gate of the task for all layers.

    ΔW_t x = s Σ_i g_{t,i} B_i A_i x        g_t = softmax(G e_t / τ)        starts with B_i = 0

With `gate_form: mean_one` g_t = n softmax(G e_t / τ): otherwise n experts divide the update by n. A_i has r / n rows. M_t is a diagonal: each gate as often as its expert has rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from mtl_lora_cli.adapters.methods import method
from mtl_lora_cli.adapters.methods.base import (
    Positive,
    PositiveFloat,
    Role,
    Settings,
    Sizes,
    Spread,
    Tensors,
    kaiming,
    normal,
    zeros,
)

if TYPE_CHECKING:
    from torch import Tensor


@method
class MoeLora(Settings):
    """r (in + out) values a layer; T d and n d for the model."""

    source: ClassVar[str] = "arXiv 2310.18339"
    spread: ClassVar[Spread] = "task"

    method: Literal["moelora"] = "moelora"
    up_projections: Positive = Field(8, description="n, number of experts.")
    temperature: PositiveFloat = Field(1.0, description="τ of the gate softmax(G e / τ).")
    gate_form: Literal["softmax", "mean_one"] = Field(
        "softmax", description="The gates' sum is 1, or their mean: n softmax(G e / τ)."
    )
    embedding_size: Positive = Field(64, description="d of the task embedding.")
    tied: bool = Field(
        False, description="A control: all tasks have one gate. Then it knows no tasks."
    )

    @classmethod
    def rank_step(cls, keys: Mapping[str, Any]) -> int:
        """n: the experts share the rank evenly."""
        return int(keys.get("up_projections") or cls.start_of("up_projections"))

    @model_validator(mode="after")
    def _ranks_can_be(self) -> Self:
        for rank in (self.rank, *self.rank_pattern.values()):
            if rank % self.up_projections:
                raise ValueError(
                    f"moelora shares its rank among {self.up_projections} experts (up_projections) "
                    f"evenly, received {rank}"
                )
        return self

    def roles(self, sizes: Sizes) -> tuple[Role, ...]:
        """A_i and B_i."""
        n, each = self.up_projections, sizes.rank // self.up_projections
        return (
            Role("lora_A", (n, each, sizes.width), self.start_of_down, "down"),
            Role("lora_B", (n, sizes.out, each), zeros, "up"),
        )

    def roles_of_model(self, tasks: int) -> tuple[Role, ...]:
        """e [T, d], with `tied` [1, d], and G [n, d]."""
        size = self.embedding_size
        shape, own = (1 if self.tied else tasks, size), not self.tied
        return (
            Role("task_embedding", shape, normal(), "embedding", per_task=own),
            Role("gate_projection", (self.up_projections, size), kaiming, "gate"),
        )

    def mixing(self, p: Tensors) -> Tensor:
        """The diagonal of the gates, [L, P, r, r]."""
        rows = p.rank // self.up_projections
        return self.gates(p).repeat_interleave(rows, dim=-1).diag_embed()

    def gates(self, p: Tensors) -> Tensor:
        """g [L, P, n], the same in each layer."""
        logits = (p["task_embedding"] @ p["gate_projection"].T).expand(p.layers, p.tasks, -1)
        gates = (logits / self.temperature).softmax(-1)
        return gates if self.gate_form == "softmax" else self.up_projections * gates
