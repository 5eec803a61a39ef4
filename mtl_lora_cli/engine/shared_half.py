"""The MLP of a mixture that every position asks: σ(g h) D(f(G h) ⊙ (U h)), or without σ(g h)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtl_lora_cli.adapters.routing import Slots
from mtl_lora_cli.engine.group import Group, Tape
from mtl_lora_cli.engine.plan import SharedPlan
from mtl_lora_cli.kernels.gated import gated, gated_gradient


class SharedTape(NamedTuple):
    """What a forward pass leaves: [g | u], g h [M, 1] where there is a gate, and the adapters' tapes."""

    both: Tensor | None
    gate: Tensor | None
    tapes: tuple[Tape | None, ...]


@dataclass(frozen=True)
class SharedHalf:
    """See the module; its weights are frozen, and may carry adapters."""

    plan: SharedPlan
    gate_up: Group
    down: Group
    gate: Group | None

    @property
    def groups(self) -> tuple[Group, ...]:
        """In the order of `SharedPlan.groups`."""
        return (self.gate_up, self.down, *([] if self.gate is None else [self.gate]))

    def forward(
        self, wide: Tensor, tensors: Sequence[Sequence[Any]], slots: Slots, training: bool
    ) -> tuple[Tensor, SharedTape]:
        """What it adds [M, d], and its tape, from [h | room] and the tensors of each group."""
        both, first = self.gate_up.forward(wide, tensors[0], slots, training)
        active = gated(both, self.plan.activation, room=self.down.room.columns)
        out, second = self.down.forward(active, tensors[1], slots, training)
        if self.gate is None:
            return out, SharedTape(both, None, (first, second))
        logits, third = self.gate.forward(self._bare(wide), tensors[2], slots, training)
        return out * torch.sigmoid(logits), SharedTape(both, logits, (first, second, third))

    def backward(
        self, dout: Tensor, wide: Tensor, tape: SharedTape, slots: Slots
    ) -> tuple[Tensor, list[list[Tensor | None]]]:
        """dh [M, d] from the gradient of what it adds, and the gradients of each group's tensors.

        With a = f(G h) ⊙ (U h) and da the gradient that comes to it through σ(g h) D, that of g h is
        (1 − σ(g h)) ⟨da, a⟩.
        """
        both = tape.both
        if both is None:
            both = self.gate_up.again(wide, tape.tapes[0], slots)
        share = None if tape.gate is None else torch.sigmoid(tape.gate)
        ddown = dout if share is None else dout * share
        dactive, down_gradients = self.down.backward(ddown, tape.tapes[1], slots, True, roomy=False)
        assert dactive is not None
        again = share is not None or tape.tapes[1] is not None
        room = self.gate_up.room.rows
        dboth, active = gated_gradient(dactive, both, self.plan.activation, again=again, room=room)
        found = [[], self.down.finish(down_gradients, tape.tapes[1], active)]  # type: ignore[arg-type]
        dh, gradients = self.gate_up.backward(dboth, tape.tapes[0], slots, True, roomy=True)
        h = self._bare(wide)
        found[0] = self.gate_up.finish(gradients, tape.tapes[0], h)
        assert dh is not None
        if share is not None and self.gate is not None and active is not None:
            exact = torch.promote_types(h.dtype, torch.float32)
            through = (dactive.to(exact) * active.to(exact)).sum(-1, keepdim=True)
            dlogits = ((1 - share.to(exact)) * through).to(h.dtype)
            dgate, gradients = self.gate.backward(dlogits, tape.tapes[2], slots, True, roomy=False)
            assert dgate is not None
            dh = dh + dgate
            found.append(self.gate.finish(gradients, tape.tapes[2], h))
        return dh, found

    def _bare(self, wide: Tensor) -> Tensor:
        """h of [h | room]."""
        return self.gate_up.input(wide)
