"""What a captured step does otherwise: gradients added together, an update in parts; bit by bit the same."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from mtl_lora_cli.data.collate import training_batch
from mtl_lora_cli.training.capacity import PassSizes, padded
from mtl_lora_cli.training.passes import _segments, _tables, add_gradients
from mtl_lora_cli.training.update import ParameterGroup, gradients_of, make_optimizer, part_of

from ..engine.test_shared_beginnings import of


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


def test_one_graph_serves_any_trees() -> None:
    """What is copied to a graph's buffers has one size, says where the trees lie, and padding is no part of them."""
    drawn = random.Random(0)
    keys, sizes = [(64, False), (64, True)], set()
    for count in (10, 11):
        trunk = [drawn.randrange(90) for _ in range(40)]
        examples = [trunk + [drawn.randrange(90) for _ in range(25)] for _ in range(count)]
        rows = [[(0, number) for number in range(count)]]
        batch = training_batch(rows, [of(examples)], loss_on="answer", share=True)
        capacity = PassSizes(1024, 1).capacity(batch)
        filled = padded(batch, capacity)
        tables = _tables(filled.segments, capacity, keys)
        sizes.add((capacity, *(tuple(one.shape) for one in tables)))
        there, whole = _segments(filled.segments, tables, keys), filled.segments
        assert there.trees is not None and whole.trees is not None
        assert all(map(torch.equal, there.trees, whole.trees))
        taken = batch.input_ids.numel()
        assert taken < 1024 == filled.input_ids.numel()
        assert torch.equal(filled.segments.trees.reach[:taken], batch.segments.trees.reach)
        assert there.trees.reach[taken:].unique().tolist() == [*range(taken + 256, 1024, 256), 1024]
        for ours, alone in (
            (there.tiles(64), whole.tiles(64)),
            (there.key_tiles(64).parts, whole.key_tiles(64).parts),
        ):
            assert torch.equal(ours[: len(alone)], alone)
            assert (ours[len(alone) :, 0] == -1).all()
    assert len(sizes) == 1


def test_an_update_in_parts_is_the_update() -> None:
    """Bit by bit, its state, too; of groups of other sizes and rates."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(3, 5, generator=generator) for _ in range(7)]
    found = []
    for count in (1, 4, 9):
        own = [one.clone().requires_grad_() for one in made]
        optimizer = make_optimizer(
            [ParameterGroup(own[:6], 1e-2, 0.1), ParameterGroup(own[6:], 1e-3, 0.0)], graphed=False
        )
        for seed in range(3):
            for one in own:
                one.grad = torch.sin(one.detach() + seed)
            for number in range(count):
                with part_of(optimizer, number, count):
                    optimizer.step()
        assert [len(group["params"]) for group in optimizer.param_groups] == [6, 1]
        state = [value for one in own for value in optimizer.state[one].values()]
        found.append([*(one.detach() for one in own), *state])
    for other in found[1:]:
        assert len(other) == len(found[0])
        assert all(map(torch.equal, found[0], other))
