"""What a run learned, in numbers: sizes, norms, gates, and how alike its tasks are.

Everything comes from the adapter's files; the base model is not loaded. Norms are Frobenius norms.
Updates are compared without forming any: ⟨B₁A₁, B₂A₂⟩ = tr((B₁ᵀB₂)(A₂A₁ᵀ)), products of small matrices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.adapters.layer import TaskLayer, mixing_of
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.runs.folder import RunFolder

NO_GATES = "no gate of a task: gates are not shown"
NO_UPDATES = "its gate reads the token: no task has an update of its own, so none is shown"
NO_LORA = "it gives the weights' rows lengths of their own: no update of low rank is shown"
ALL_THE_SAME = "its update is the same for all tasks"


def inspect_run(run: RunFolder) -> dict[str, Any]:
    """Everything about a run's adapter, as JSON has it; docs/inspecting.md names the keys.

    Raises:
        UsageError: the run has no finished adapter, or its files are damaged.
    """
    return {"run": run.name, **inspect_adapter(Run(run).adapter)}


@torch.no_grad()
def inspect_adapter(adapter: Adapter) -> dict[str, Any]:
    """The same of an adapter that lies in memory."""
    config = adapter.config
    grams = _grams(adapter)
    gates = _gates(adapter)
    layers = {
        path: {
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "rank": layer.rank,
            "norms": _norms(layer, adapter.tasks, grams.get(path)),
            "gates": _by_task(adapter.tasks, gates[path].tolist()) if gates else None,
        }
        for path, layer in adapter.layers.items()
    }
    whole = torch.stack(list(grams.values())).sum(0) if grams else None
    content = {
        "method": config.method,
        "rank": config.rank,
        "up_projections": max((len(one[0]) for one in gates.values()), default=config.ups),
        "tasks": list(adapter.tasks),
        "parameters": {"total": adapter.parameter_count(), "by_role": _sizes(adapter)},
        "update_norm": None if whole is None else _by_task(adapter.tasks, _roots(whole)),
        "similarity": {},
        "layers": layers,
        "notes": _notes(adapter, bool(gates)),
    }
    similarity = {
        "gates": _cosines(_gate_gram(gates)) if gates else None,
        "updates": None if whole is None else _cosines(whole),
    }
    return {key: _finite(value) for key, value in content.items()} | {"similarity": similarity}


def update_gram(updates: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Inner products ⟨B_t A_t, B_u A_u⟩ of T updates, float64 [T, T]; of stacks summed over the experts.

    With all A_t [k, in] below each other and all B_t [out, k] beside each other, the block (t, u) of
    (A Aᵀ) ∘ (Bᵀ B) [T k, T k] holds the terms of one product.
    """
    if updates[0][0].ndim == 3:
        experts = range(len(updates[0][0]))
        each = [update_gram([(down[e], up[e]) for down, up in updates]) for e in experts]
        return torch.stack(each).sum(0)
    count = len(updates)
    downs = torch.cat([down for down, _ in updates]).double()
    ups = torch.cat([up for _, up in updates], dim=1).double()
    terms = (downs @ downs.T) * (ups.T @ ups)
    return terms.view(count, len(downs) // count, count, -1).sum((1, 3))


def _grams(adapter: Adapter) -> dict[str, Tensor]:
    """⟨ΔW_t, ΔW_u⟩ of each layer [T, T]; nothing where the method has no ΔW_t."""
    if not adapter.config.mergeable():
        return {}
    tasks = range(len(adapter.tasks))
    return {
        path: adapter.config.scale(layer.rank) ** 2
        * (
            update_gram([layer.task_update(task) for task in tasks])
            if layer.stacked
            else _gram(layer, len(tasks))
        )
        for path, layer in adapter.layers.items()
    }


def _gram(layer: TaskLayer, count: int) -> Tensor:
    """The same of one layer, without an update of any task: ΔW_t = B M_t A of one A and one B.

    With B = Q_B R_B and Aᵀ = Q_A R_A, ⟨ΔW_t, ΔW_u⟩ is that of R_B M_t R_Aᵀ [m, k]: a thousand tasks are a
    thousand small matrices. Where M_t keeps some rows, it is m_tᵀ ((A Aᵀ) ∘ (Bᵀ B)) m_u.
    """
    down, up = layer.factors(None)
    below = down.flatten(0, 1).double()
    beside = up.movedim(-3, -2).flatten(-2).double()
    mixing = mixing_of([layer], None)
    if mixing is None or layer.config.spread == "own":
        terms = (below @ below.T) * (beside.T @ beside)
        kept = terms.new_ones(count, len(terms)) if mixing is None else mixing[0].double()
        return kept @ terms @ kept.T
    left, right = torch.linalg.qr(beside).R, torch.linalg.qr(below.T).R
    small = (left @ mixing[0].double() @ right.T).flatten(1)
    return small @ small.T


def _gates(adapter: Adapter) -> dict[str, Tensor]:
    """g of each layer [T, n], the mean over experts; nothing where the method has no gate for a task."""
    gates = {
        path: layer.config.gates(layer.tensors(None)) for path, layer in adapter.layers.items()
    }
    return {path: one.double().mean(0) for path, one in gates.items() if one is not None}


def _gate_gram(gates: Mapping[str, Tensor]) -> Tensor:
    """Inner products of the tasks' gates, those of all layers behind each other [T, T]."""
    together = torch.cat(list(gates.values()), dim=1)
    return together @ together.T


def _norms(layer: TaskLayer, tasks: Sequence[str], gram: Tensor | None) -> dict[str, Any]:
    """‖A_i‖, ‖B_i‖, and by task those of what is its own, ‖ΔW_t‖ among them, where there are any.

    mtl-lora's `transform_change` is ‖Λ_t − 1‖, 0 at the start without `transform_start`.
    """
    tensors, config = layer.tensors(None), layer.config
    norms: dict[str, Any] = {"A": _each(tensors["lora_A"]), "B": _each(config.up(tensors))}
    for name, stacked in config.own(tensors).items():
        norms[name] = _by_task(tasks, _each(stacked))
    if gram is not None:
        norms["update"] = _by_task(tasks, _roots(gram))
    return norms


def _each(stacked: Tensor) -> list[float]:
    """Norms of [L, n, …] for each of n: L is 1, or the experts, whose norms are one."""
    return stacked.double().transpose(0, 1).flatten(1).norm(dim=1).tolist()


def _roots(gram: Tensor) -> list[float]:
    return gram.diagonal().clamp(min=0).sqrt().tolist()


def _by_task(tasks: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(tasks, values, strict=True))


def _cosines(gram: Tensor) -> list[list[float | None]]:
    """⟨t, u⟩ / (‖t‖ ‖u‖); None beside a norm of 0."""
    norms = gram.diagonal().clamp(min=0).sqrt()
    scaled = gram / (norms.unsqueeze(0) * norms.unsqueeze(1))
    found: list[list[float | None]] = scaled.clamp(-1, 1).tolist()
    if not scaled.isfinite().all():  # 0 / 0 is no number
        found = _finite(found)
    return found


def _finite(content: Any) -> Any:
    """None for every number that is none: JSON has no word for those."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _sizes(adapter: Adapter) -> dict[str, int]:
    """Trained values by role."""
    sizes: dict[str, int] = {}
    for name, tensor in adapter.trained().items():
        part = adapter.role(name).part
        role = part if part in ("whole", "decoder") else name.rpartition(".")[2]
        sizes[role] = sizes.get(role, 0) + tensor.numel()
    return sizes


def _notes(adapter: Adapter, gated: bool) -> list[str]:
    method = adapter.config.method
    notes = [
        f"'{name}' holds numbers that are not finite"
        for name, tensor in adapter.tensors().items()
        if not tensor.isfinite().all()
    ]
    if adapter.config.scales_rows:
        notes.append(f"{method}: {NO_LORA}")
    elif not adapter.config.mergeable():
        notes.append(f"{method}: {NO_UPDATES}")
    elif not gated:
        notes.append(f"{method}: {NO_GATES}")
    if adapter.config.spread == "same":
        notes.append(f"{method}: {ALL_THE_SAME}")
    return notes
