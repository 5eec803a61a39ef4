"""What one pass through the blocks is told, and what they save for its backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtl_lora_cli.adapters.routing import Slots
from mtl_lora_cli.engine.attention import Packing
from mtl_lora_cli.engine.group import Tape
from mtl_lora_cli.engine.segments import Segments
from mtl_lora_cli.kernels.stream import Entry


@dataclass(frozen=True)
class Keep:
    """What the forward pass leaves for the backward pass instead of having it computed again.

    Attributes:
        attended: outputs of attention. Again: attention.
        qkv, gate_up: outputs of these projections. Again: a large product each.
    """

    attended: bool = True
    qkv: bool = True
    gate_up: bool = True


@dataclass(frozen=True)
class Pass:
    """What holds for all layers of one pass through the model.

    Attributes:
        slots: the routing of the N positions.
        segments: which of them belong together.
        packing: attention's view of them, in this layer; None where it has no attention.
        positions: [U] int64: the last layer goes on with these positions alone; None for all.
        chosen_slots: the routing of the positions that go on.
        keep: what is kept for the backward pass.
        training: whether dropout is on.
        learn: whether a backward pass will come.
        told: is told [q | k | v] of the N positions, normed and turned; its memory is the pass's own.
    """

    slots: Slots
    segments: Segments
    packing: Packing | None
    positions: Tensor | None
    chosen_slots: Slots
    keep: Keep
    training: bool
    learn: bool
    told: Callable[[Tensor], None] | None = None


class Saved:
    """Names for what a block saves: `save_for_backward` takes a flat list."""

    def __init__(self, ctx: Any) -> None:
        self.names: list[tuple[str, int, Any]] = []
        self.flat: list[Tensor | None] = []
        self._ctx = ctx

    def add(self, name: str, tensor: Tensor | None) -> None:
        self.names.append((name, 1, None))
        self.flat.append(tensor)

    def add_entry(self, entry: Entry) -> None:
        for name, tensor in zip(Entry._fields, entry, strict=True):
            self.add(name, tensor)

    def add_tape(self, name: str, tape: Tape | None) -> None:
        if tape is not None:
            tensors = tape.tensors()
            self.names.append((name, len(tensors), tape.shapes))
            self.flat += tensors

    def close(self) -> None:
        self._ctx.save_for_backward(*self.flat)
        self._ctx.names = self.names


def opened(ctx: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    tensors = list(ctx.saved_tensors)
    for name, count, shapes in ctx.names:
        own, tensors = tensors[:count], tensors[count:]
        found[name] = own[0] if shapes is None else Tape.of(own, shapes)
    return found


def entry_of(saved: dict[str, Any]) -> Entry:
    """What `Saved.add_entry` was given."""
    return Entry(*(saved[name] for name in Entry._fields))


def both_gradients(
    ctx: Any, both: tuple[Tensor, Tensor] | None, at: int
) -> tuple[Tensor | None, Tensor | None]:
    """Those of x and of the output of the block before, as far as they are wanted."""
    if both is None:
        return None, None
    x_wanted, out_wanted = ctx.needs_input_grad[at : at + 2]
    return both[0] if x_wanted else None, both[1] if out_wanted else None


def spread_out(chosen: Tensor, positions: Tensor | None, like: Tensor) -> Tensor:
    """Rows put back to their positions, zero elsewhere."""
    if positions is None:
        return chosen
    return torch.zeros_like(like).index_add_(0, positions, chosen)
