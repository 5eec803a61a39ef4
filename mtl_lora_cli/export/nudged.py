"""What one more rounding moves a model's answers by, where models are asked in 16 bits.

Sums in 16 bits differ from program to program, and a deep model amplifies that by as much as it will. So no fixed number
says how far two right models may be apart. It is measured at the run itself: each value of its embedding goes to one
of its neighbours with a chance of 1/12, which varies it as much as rounding to the nearest does, 1/12 of a step
squared. Nothing of an update or of a merge is in that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHANCE = 1 / 12


@torch.no_grad()
def nudge(model: Any, seed: int = 0) -> None:
    """Round the embedding of a transformers model of 16 bits once more, in place."""
    weight: Tensor = model.get_input_embeddings().weight
    if weight.element_size() != 2:
        return
    drawn = torch.Generator(device=weight.device).manual_seed(seed)
    chance = torch.rand(weight.shape, generator=drawn, device=weight.device)
    step = (chance < _CHANCE / 2).to(torch.int16) - (chance > 1 - _CHANCE / 2).to(torch.int16)
    step[weight == 0] = 0
    weight.view(torch.int16).add_(step)  # the next number of the same sign
