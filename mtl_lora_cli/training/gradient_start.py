"""A start of A from the gradient of a few steps (LoRA-GA, arXiv 2407.05000; LoRA-One, arXiv 2502.01235).

Both papers take the strongest right singular vectors of ∇W, and so does this: A's rows point where the first
steps would move W. B stays zero, so the adapted model still starts as the base model.

∇W itself is never made. With A = 0 and a random B the model is the base model, and

    ∇A = s M_tᵀ Bᵀ ∇W

is a sketch of ∇W's rows (Halko, Martinsson and Tropp, arXiv 0909.4061). It comes from an ordinary backward pass,
on either engine, with weights of 4 bits too. The sketches of some steps, each with a B of its own, lie below
each other; the first r right singular vectors of them all become A, at the length of a kaiming row, 1 / √3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.adapters.layer import TaskLayer
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.machine.processes import Processes
from mtl_lora_cli.models.host import Host
from mtl_lora_cli.training.drawn import Draw, Drawn
from mtl_lora_cli.training.observers import undisturbed

STEPS = 8  # of the run, whose gradients are looked at
_LENGTH = 1 / math.sqrt(3)  # of a row that is uniform within ±1 / √columns


def require_gradients(adapter: Adapter) -> None:
    """Refuse layers whose A may get no gradient; before anything is written.

    Raises:
        UsageError: `down_start: gradient`, and each expert has an adapter.
    """
    stacked = any(layer.stacked for layer in adapter.layers.values())
    if stacked and adapter.config.down_start == "gradient":
        raise UsageError(
            "adapter.down_start: gradient: adapters of each expert (adapter.experts: each) have no such "
            "start: an expert that nobody asks has no gradient; take kaiming, or experts: shared"
        )


def start_by_gradient(
    host: Host, adapter: Adapter, draw: Draw, steps: int, seed: int, processes: Processes
) -> None:
    """Give every A of a fresh adapter its start; all else is as it was.

    Args:
        host: the model with the adapter injected.
        adapter: fresh.
        draw: what the run's steps are made of.
        steps: of the run.
        seed: of the sketches.
        processes: over which a step's rows are dealt out; all get the same A.

    Raises:
        UsageError: A has no gradient in some layer, or one that is no number.
    """
    generator = torch.Generator().manual_seed(seed)
    sketches: dict[str, list[Tensor]] = {path: [] for path in adapter.layers}
    with undisturbed(host, adapter), _sketching(adapter):
        for number in range(min(STEPS, steps)):
            for layer in adapter.layers.values():
                draws = torch.randn(layer.lora_B.shape, generator=generator)
                layer.lora_B.data.copy_(draws / math.sqrt(layer.out_features))
            _backward(host, draw(number))
            for path, layer in adapter.layers.items():
                sketches[path].append(_taken(layer, processes))
    for path, layer in adapter.layers.items():
        rows = torch.cat(sketches[path])
        if not rows.any() or not rows.isfinite().all():
            raise UsageError(
                f"adapter.down_start: gradient: the gradient of '{path}' is zero or no number in the first "
                f"{min(STEPS, steps)} steps (method {adapter.config.method}); take kaiming"
            )
        _begin(layer, rows)


@contextmanager
def _sketching(adapter: Adapter) -> Iterator[None]:
    """A = 0 inside; afterwards A and B are as before, and nothing has a gradient."""
    layers = list(adapter.layers.values())
    before = [(layer.lora_A.detach().clone(), layer.lora_B.detach().clone()) for layer in layers]
    for layer in layers:
        layer.lora_A.data.zero_()
    try:
        yield
    finally:
        for layer, (down, up) in zip(layers, before, strict=True):
            layer.lora_A.data.copy_(down)
            layer.lora_B.data.copy_(up)
        for tensor in adapter.tensors().values():
            tensor.grad = None


def _backward(host: Host, drawn: Drawn) -> None:
    """The gradient of a step's loss, as the run would compute it."""
    for batch, weights in zip(drawn.batches, drawn.weights, strict=True):
        moved = batch.to(_device(host))
        with host.routed(moved):
            losses = host.losses(moved)
            (losses * (weights / drawn.count).to(losses)).sum().backward()


def _device(host: Host) -> torch.device:
    assert host.adapter is not None, "a host has an adapter"
    return host.adapter.device


def _taken(layer: TaskLayer, processes: Processes) -> Tensor:
    """∇A of all processes, float64 [r, in] on the CPU; there is none left."""
    gradient = layer.lora_A.grad
    gradient = torch.zeros_like(layer.lora_A) if gradient is None else gradient
    layer.lora_A.grad = None
    whole = processes.sum_(gradient.detach().clone()) if processes.count > 1 else gradient.detach()
    return whole.flatten(0, 1).double().cpu()


@torch.no_grad()
def _begin(layer: TaskLayer, rows: Tensor) -> None:
    """A's first rows are the strongest directions of these; where there are fewer, the others stay."""
    down = layer.lora_A.flatten(0, 1)
    values, vectors = torch.linalg.eigh(rows @ rows.T)  # R Rᵀ = U S² Uᵀ, V = S⁻¹ Uᵀ R
    strong = [place for place in range(len(values)) if values[place] > 1e-12 * values[-1]]
    strong = strong[::-1][: len(down)]
    basis = (vectors[:, strong].T @ rows) / values[strong].sqrt().unsqueeze(1)
    down[: len(strong)] = (_LENGTH * basis).to(down)
