"""Clipping by each tensor's own history, and β₂."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from mtl_lora_cli.recipe.training import Clipping
from mtl_lora_cli.training.checkpoints import newest_checkpoint
from mtl_lora_cli.training.clipping import RelativeClipping, scale_alike
from mtl_lora_cli.training.update import ParameterGroup, Update, make_optimizer


def by_the_paper(
    steps: Sequence[Sequence[np.ndarray]], relative: float, decay: float, after: int, limit: float
) -> list[list[np.ndarray]]:
    """AdaGC, a tensor and a step at a time; the mean begins with the first norm above zero."""
    usual: list[float | None] = [None] * len(steps[0])
    clipped = []
    for number, gradients in enumerate(steps, start=1):
        whole = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        row = []
        for place, gradient in enumerate(gradients):
            norm, known = math.sqrt(float((gradient**2).sum())), usual[place]
            bound, size = (
                (limit, whole) if number <= after or known is None else (relative * known, norm)
            )
            factor = bound / size if size > bound else 1.0
            row.append(factor * gradient)
            if norm:
                kept = factor * norm
                usual[place] = kept if known is None else decay * known + (1 - decay) * kept
        clipped.append(row)
    return clipped


def test_the_rule_is_the_papers_formula() -> None:
    """A's first gradients are zero, one step is a spike, and a tensor learns nothing for a while."""
    random = np.random.default_rng(0)
    shapes = [(3, 4), (5,), (2, 2)]
    sizes = np.exp(random.normal(size=(30, 3)))
    sizes[:3, 0] = 0
    sizes[10:12, 2] = 0
    sizes[20] *= 50
    steps = [
        [size * random.normal(size=shape) for size, shape in zip(row, shapes, strict=True)]
        for row in sizes
    ]
    tensors = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    settings = Clipping(relative=1.2, decay=0.9, after=5)
    history = RelativeClipping(tensors, settings, max_norm=0.7)
    expected = by_the_paper(steps, relative=1.2, decay=0.9, after=5, limit=0.7)
    for given, right in zip(steps, expected, strict=True):
        gradients = [torch.from_numpy(gradient.copy()) for gradient in given]
        norm = history.clip(gradients)
        whole = np.concatenate([g.ravel() for g in given])
        assert float(norm) == pytest.approx(np.linalg.norm(whole), rel=1e-12)
        for found, one in zip(gradients, right, strict=True):
            np.testing.assert_allclose(found.numpy(), one, rtol=3e-6, atol=1e-12)
    assert np.linalg.norm(expected[20][1]) < np.linalg.norm(steps[20][1]) / 10


def test_tensors_of_one_shape_are_scaled_together_each_by_its_own_factor() -> None:
    """As the card does it; numpy on the other side, to the last bit."""
    random = np.random.default_rng(1)
    shapes = [(3, 4), (4, 3), (3, 4), (5,), (), (3, 4)]
    given = [np.float32(random.normal(size=shape)) for shape in shapes]
    factors = np.float32(random.uniform(size=len(shapes)))
    tensors = [torch.tensor(one) for one in given]
    tensors[1] = torch.tensor(given[1].T.copy()).T  # not in the order of its values
    scale_alike(tensors, torch.from_numpy(factors))
    for found, one, factor in zip(tensors, given, factors, strict=True):
        np.testing.assert_array_equal(found.numpy(), one * factor)


def test_a_gradient_of_zero_stops_no_tensor_for_ever() -> None:
    """With the least norm of the first steps, as in the paper, A would get nothing."""
    tensor = torch.zeros(3)
    history = RelativeClipping([tensor], Clipping(after=2), max_norm=1.0)
    for _ in range(3):
        history.clip([torch.zeros(3)])
    gradient = torch.tensor([0.3, 0.0, 0.0])
    history.clip([gradient])
    assert gradient[0] == pytest.approx(0.3)


def test_beta2_is_adams() -> None:
    """Two steps by the formula in float64."""
    value = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    group = ParameterGroup([value], 0.1, 0.0, beta2=0.5)
    update = Update([value], make_optimizer([group], graphed=False), 1e9, graphed=False)
    x, m, v = 1.0, 0.0, 0.0
    for step, gradient in enumerate((3.0, -1.0), start=1):
        value.grad = torch.tensor([gradient], dtype=torch.float64)
        update(1.0)
        m, v = 0.9 * m + 0.1 * gradient, 0.5 * v + 0.5 * gradient**2
        x -= 0.1 * (m / (1 - 0.9**step)) / (math.sqrt(v / (1 - 0.5**step)) + 1e-8)
        assert value.item() == pytest.approx(x, rel=1e-6)


@pytest.mark.slow
def test_killed_and_resumed_it_is_the_same_run(small: Callable[..., Any]) -> None:
    settings: dict[str, Any] = {"clipping": Clipping(after=1), "adam_beta2": 0.98, "steps": 4}
    whole = small(**settings).train()
    stopped = small(checkpoint_every=None, **settings).train(stop_after=2)
    again = small(folder=stopped.run.path, **settings)
    again.trainer.resume(newest_checkpoint(stopped.run.checkpoints))
    again.train()
    assert again.losses == whole.losses
    assert all(torch.equal(again.tensors[name], one) for name, one in whole.tensors.items())
