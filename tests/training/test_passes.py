"""Gradients of a captured pass: added together, bit by bit what autograd adds one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from mtl_lora_cli.training.passes import add_gradients
from mtl_lora_cli.training.update import gradients_of


def losses(parameters: list[Tensor], seed: int) -> Tensor:
    """Of all parameters but the last; the first two side by side, as mixings of many layers are."""
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(seed))
    both = torch.stack(parameters[:2])
    return (x @ both.sum(0) @ parameters[2]).square().mean()


def test_added_together_is_added_one_by_one() -> None:
    own = torch.Generator().manual_seed(0)
    made = [torch.randn(4, 4, generator=own) for _ in range(4)]
    one, two = ([value.clone().requires_grad_() for value in made] for _ in range(2))
    gradients_of(one)
    gradients_of(two)
    for seed in range(3):
        losses(one, seed).backward()
        add_gradients(losses(two, seed), two)
    for theirs, ours in zip(one, two, strict=True):
        assert theirs.grad is not None and ours.grad is not None
        assert torch.equal(theirs.grad, ours.grad)
