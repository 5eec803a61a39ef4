"""A task's update at a lower rank: truncated singular value decomposition of ΔW_t = s B'_t A'_t.

Of all matrices of rank R the truncated one is the nearest to ΔW_t in the Frobenius norm (Eckart and
Young, 1936). It is found from the factors, with B' = Q_B R_B and A'ᵀ = Q_A R_A:

    R_B R_Aᵀ = U Σ Vᵀ [k, k]        B_R = Q_B U_R √Σ_R        A_R = √Σ_R V_Rᵀ Q_Aᵀ

so nothing of ΔW_t's own size [out, in] is ever there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.export.merge import Update, task_updates
from mtl_lora_cli.export.questions import Questions, Scored
from mtl_lora_cli.models.load import adapt
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.models.trusted import settled
from mtl_lora_cli.tasks.task import Task


@dataclass(frozen=True)
class Truncation:
    """What a lower rank leaves out.

    Attributes:
        rank: R.
        errors: weight → ‖ΔW − ΔW_R‖ / ‖ΔW‖ in the Frobenius norm.
    """

    rank: int
    errors: Mapping[str, float]

    @property
    def largest(self) -> float:
        """The worst layer's."""
        return max(self.errors.values())

    @property
    def mean(self) -> float:
        """Over the layers."""
        return sum(self.errors.values()) / len(self.errors)

    def __str__(self) -> str:
        return (
            f"at rank {self.rank} the relative Frobenius error of the update is {self.mean:.2e} on "
            f"average over {len(self.errors)} layers, {self.largest:.2e} at most"
        )


def truncate(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The nearest update of a lower rank.

    Args:
        down: A' [k, in].
        up: B' [out, k].
        rank: R; where k is not larger the update stays as it is.

    Returns:
        A_R [R, in] and B_R [out, R] in the dtype of A', and ‖B'A' − B_R A_R‖ / ‖B'A'‖, 0 where B'A'
        is 0. Computed in float64.
    """
    if rank >= len(down):
        return down, up, 0.0
    up_basis, up_rest = torch.linalg.qr(up.double())
    down_basis, down_rest = torch.linalg.qr(down.double().T)
    left, values, right = torch.linalg.svd(up_rest @ down_rest.T, full_matrices=False)
    root = values[:rank].sqrt()
    kept_up = up_basis @ (left[:, :rank] * root)
    kept_down = (root.unsqueeze(1) * right[:rank]) @ down_basis.T
    whole = float(values.norm())
    error = float(values[rank:].norm()) / whole if whole else 0.0
    return kept_down.to(down.dtype), kept_up.to(up.dtype), error


def updates_at(
    run: Run, task: Task, rank: int | None
) -> tuple[dict[str, Update], Truncation | None]:
    """The task's ordinary LoRA, at a lower rank where one is given.

    Args:
        run: the run.
        task: which task.
        rank: R, or None for the update as it is.

    Raises:
        UsageError: R is larger than the update's rank, or the method is no LoRA for any task.
    """
    updates = task_updates(run.adapter, task.id)
    if rank is None:
        return updates, None
    if any(down.ndim == 3 for down, _, _ in updates.values()):
        raise UsageError(
            f"--rank {rank}: the run has adapters on experts (adapter.experts), whose rank is not lowered "
            "here; leave --rank out"
        )
    largest = max(len(down) for down, _, _ in updates.values())
    if rank > largest:
        raise UsageError(
            f"--rank {rank}: the update of task '{task.name}' has rank {largest}; "
            f"expected at most that"
        )
    errors = {}
    for name, (down, up, scale) in updates.items():
        down, up, errors[name] = truncate(down, up, rank)
        updates[name] = (down, up, scale)
    return updates, Truncation(rank, errors)


def ask_at(questions: Questions, rank: int, quantization: str | None = None) -> Scored:
    """What the run answers with the task's update at a lower rank: a plain LoRA on the base model.

    Args:
        questions: to the run's task.
        rank: R.
        quantization: of the base model; None: as the run's.
    """
    run = questions.run
    quantization = quantization or run.recipe.quantization
    updates, _ = updates_at(run, questions.task, rank)
    own = {name.removesuffix(".weight"): len(down) for name, (down, _, _) in updates.items()}
    config = configure(
        "lora",
        rank=rank,
        alpha=rank,
        rank_pattern=own,
        target_modules=run.adapter.config.target_modules,
        whole_modules=run.adapter.config.whole_modules,
    )
    model = run.load(quantization)
    adapter = adapt(model, config, run.adapter.tasks)
    with torch.no_grad():
        for path, layer in adapter.layers.items():
            down, up, scale = updates[f"{path}.weight"]
            layer.lora_A[0].copy_(down)
            layer.lora_B[0].copy_(up * (scale / config.scale(layer.rank)))
        for name, tensor in run.adapter.whole.items():
            adapter.whole[name].copy_(tensor)
    packed = PackedModel(model, adapter, vision=run.vision)
    settled(packed, run.base, quantization=quantization)
    return questions.ask(packed)
