"""Clipping relative to each tensor's own history: AdaGC (arXiv 2502.11034).

One limit for all gradients together lets a step pass that is ten times the usual, where the usual lies far
below the limit; and AdamW remembers it for 1 / (1 − β₂) steps. Here tensor i of the step t is held against
γ_i, a moving mean of its own clipped norms:

    h_{t,i} = min(1, M / ‖g_t‖)              while t ≤ `after`, M is `max_gradient_norm`
              min(1, λ γ_{t−1,i} / ‖g_{t,i}‖)  then
    γ_{t,i} = β γ_{t−1,i} + (1 − β) h_{t,i} ‖g_{t,i}‖        λ is `relative`, β `decay`

In two things it is not the paper's. There γ is the least norm of the first steps: but A's first gradient is
zero, since every B is, and a least norm of zero would stop A for ever. So the mean begins with the first
norm that is not zero, and a norm of zero is not counted. And a tensor without a history is held against M.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtl_lora_cli.recipe.training import Clipping

USUAL = "usual_norm"  # key of a tensor's γ in a checkpoint, beside AdamW's moments
_TINY = 1e-6  # as in `torch.nn.utils.clip_grad_norm_`


def scale_alike(tensors: Sequence[Tensor], factors: Tensor) -> None:
    """Multiply each tensor, where it lies, by its own factor, those of one shape together.

    On a card torch has no one kernel for many tensors with a factor each, and a launch for each of them was a
    quarter of a small step.

    Args:
        tensors: on one device.
        factors: [tensors], on that device.
    """
    alike: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
    for place, tensor in enumerate(tensors):
        alike.setdefault((tensor.shape, tensor.dtype), []).append(place)
    each = factors.unbind()
    for (shape, _), places in alike.items():
        own = [tensors[place] for place in places]
        factor = torch.stack([each[place] for place in places]).view(-1, *(1 for _ in shape))
        torch._foreach_copy_(own, list(torch.stack(own).mul_(factor).unbind()))


class RelativeClipping:
    """The history of some tensors, and what it makes of their next gradients.

    All of it stays on the device, so that a CUDA graph can hold it.

    Args:
        tensors: what is trained.
        settings: the recipe's.
        max_norm: M.

    Attributes:
        usual: γ, one value a tensor; 0: none yet.
        steps: t, of the steps that were taken.
    """

    def __init__(self, tensors: Sequence[Tensor], settings: Clipping, max_norm: float) -> None:
        first = tensors[0]
        self._settings, self._max_norm = settings, max_norm
        self.usual = torch.zeros(len(tensors), dtype=first.dtype, device=first.device)
        self.steps = torch.zeros((), dtype=torch.int64, device=first.device)
        self._places = {id(tensor): place for place, tensor in enumerate(tensors)}

    @torch.no_grad()
    def clip(self, gradients: Sequence[Tensor]) -> Tensor:
        """Scale the gradients where they lie, in the order of the tensors.

        Returns:
            The norm of all of them together before.
        """
        settings, usual = self._settings, self.usual
        self.steps += 1
        norms = torch.stack([one.to(usual) for one in torch._foreach_norm(list(gradients))])
        total = torch.linalg.vector_norm(norms)
        absolute = (self._max_norm / (total + _TINY)).clamp(max=1)
        relative = (settings.relative * usual / (norms + _TINY * usual)).clamp(max=1)
        early = (self.steps <= settings.after) | (usual == 0)
        factors = torch.where(early, absolute, relative)
        if factors.is_cuda:
            scale_alike(gradients, factors)
        else:
            torch._foreach_mul_(list(gradients), list(factors.unbind()))
        kept = factors * norms
        mean = torch.where(usual == 0, kept, settings.decay * usual + (1 - settings.decay) * kept)
        usual.copy_(torch.where(norms == 0, usual, mean))
        return total

    def state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """γ of each tensor by name, `{name}/usual_norm`."""
        usual = self.usual.cpu()
        return {
            f"{name}/{USUAL}": usual[self._places[id(tensor)]].clone()
            for name, tensor in tensors.items()
        }

    def restore(self, tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
        """Go back to such a state, and to the step that AdamW's says."""
        for name, tensor in tensors.items():
            self.usual[self._places[id(tensor)]] = saved[f"{name}/{USUAL}"]
        self.steps.fill_(int(saved[f"{next(iter(tensors))}/step"]))
