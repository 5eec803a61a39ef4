"""MTL-LoRA: a task's own transform between A and n up-projections, which a gate of the task weighs.

    ΔW_t x = s Σ_i g_{t,i} B_i Λ_t A x        g_t = softmax(w_t / τ)        M_t = [g_{t,1} Λ_t; …; g_{t,n} Λ_t]

With `tied` all tasks have one g and one Λ. The start is B_i = 0 and Λ_t = I. w_t is learned as it stands, or is G e_t with one e_t for the whole
model. Λ_t is a matrix, or a diagonal, which may start beside I; or I + Σ_k c_{t,k} S_k, which starts with
S = 0 and c ~ N(0, 1).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from mtl_lora_cli.adapters.methods import method
from mtl_lora_cli.adapters.methods.base import (
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Role,
    Settings,
    Sizes,
    Spread,
    Tensors,
    beside_one,
    normal,
    zeros,
)

if TYPE_CHECKING:
    from torch import Tensor


@method
class MtlLora(Settings):
    """r (in + n out) values a layer; T r² of Λ, diagonal T r, with bases K r² + T K; and T n or n d."""

    source: ClassVar[str] = "arXiv 2410.09437"
    spread: ClassVar[Spread] = "task"
    start_keys: ClassVar[tuple[str, ...]] = ("down_start", "transform_start", "gate_start")

    method: Literal["mtl-lora"] = "mtl-lora"
    up_projections: Positive = Field(3, description="n, number of shared up-projections B_i.")
    temperature: PositiveFloat = Field(0.5, description="τ of the gate softmax(w / τ).")
    transform: Literal["full", "diagonal", "bases"] = Field(
        "full", description="Λ_t: a matrix, its diagonal, or I + Σ_k c_{t,k} S_k of shared S_k."
    )
    transform_start: NonNegativeFloat = Field(
        0.0, description="Standard deviation around 1 of Λ_t's diagonal at the start."
    )
    transform_bases: Positive = Field(4, description="K, number of S_k in a layer.")
    gate: Literal["weights", "embedding"] = Field(
        "weights", description="w_t is learned as it stands, or is G e_t with one e_t a task."
    )
    # It must not be 0: equal gates give every B_i the same gradient, and they stay copies of each other.
    gate_start: NonNegativeFloat = Field(
        2.0, description="Standard deviation of the gate's logits w_t / τ at the start."
    )
    embedding_size: Positive = Field(16, description="d of the task embedding.")
    tied: bool = Field(
        False, description="A control: all tasks have one gate and one Λ. Then it knows no tasks."
    )

    @model_validator(mode="after")
    def _reads_what_is_said(self) -> Self:
        if self.transform == "bases" and self.transform_start:
            raise ValueError("'transform_start' is not read with transform: bases")
        if self.transform != "bases" and self.transform_bases != self.start_of("transform_bases"):
            raise ValueError(f"'transform_bases' is not read with transform: {self.transform}")
        return self

    def roles(self, sizes: Sizes) -> tuple[Role, ...]:
        """A, B, then Λ and the gate."""
        own = self._own(sizes.tasks)
        return (*super().roles(sizes), *self._of_transform(sizes.rank, own), self._of_gate(own))

    def roles_of_model(self, tasks: int) -> tuple[Role, ...]:
        """e [T, d], with `gate: embedding`."""
        if self.gate == "weights":
            return ()
        shape = (self._own(tasks), self.embedding_size)
        return (Role("task_embedding", shape, normal(), "embedding", per_task=not self.tied),)

    def _own(self, tasks: int) -> int:
        """Rows of what each task has of its own."""
        return 1 if self.tied else tasks

    def _of_transform(self, r: int, tasks: int) -> tuple[Role, ...]:
        bases, own = self.transform_bases, not self.tied
        if self.transform == "bases":
            return (
                Role("task_transform", (tasks, bases), normal(), "transform", per_task=own),
                Role("transform_basis", (bases, r, r), zeros, "transform"),
            )
        shape = (tasks, r, r) if self.transform == "full" else (tasks, r)
        start = beside_one(self.transform_start)
        return (Role("task_transform", shape, start, "transform", per_task=own),)

    def _of_gate(self, tasks: int) -> Role:
        n, deviation = self.up_projections, self.gate_start * self.temperature
        if self.gate == "weights":
            own = not self.tied
            return Role("task_gate", (tasks, n), normal(deviation), "gate", per_task=own)
        size = self.embedding_size
        return Role("gate_projection", (n, size), normal(deviation / math.sqrt(size)), "gate")

    def mixing(self, p: Tensors) -> Tensor:
        """M_t = [g_{t,1} Λ_t; …; g_{t,n} Λ_t], [L, P, n·r, r]."""
        return (self.gates(p)[..., None, None] * self.transforms(p)[:, :, None]).flatten(2, 3)

    def gates(self, p: Tensors) -> Tensor:
        """g [L, P, n]."""
        if self.gate == "weights":
            logits = p["task_gate"]
        else:
            logits = p["task_embedding"] @ p["gate_projection"].mT
        gates: Tensor = (logits / self.temperature).softmax(-1)
        return gates.expand(-1, p.tasks, -1)

    def transforms(self, p: Tensors) -> Tensor:
        """Λ [L, P, r, r]."""
        return self._transforms(p).expand(-1, p.tasks, -1, -1)

    def _transforms(self, p: Tensors) -> Tensor:
        """As many as there are."""
        own = p["task_transform"]
        match self.transform:
            case "full":
                return own
            case "diagonal":
                return own.diag_embed()
            case "bases":
                basis = p["transform_basis"]  # S [L, K, r, r]
                identity = _identity_like(basis)
                return identity + (own @ basis.flatten(2)).unflatten(2, basis.shape[2:])

    def own(self, p: Tensors) -> dict[str, Tensor]:
        """Λ_t, and Λ_t − I: how far it went."""
        transforms = self.transforms(p)
        return {
            "transform": transforms,
            "transform_change": transforms - _identity_like(transforms),
        }


def _identity_like(matrices: Tensor) -> Tensor:
    import torch

    return torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
