"""Which activation belongs to which task: shapes, mistakes, nesting, recomputation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mtl_lora_cli.adapters.layer import MultiTaskLinear
from mtl_lora_cli.adapters.pairs import Pairs
from mtl_lora_cli.adapters.routing import Routing, slots_of

MakeLayer = Callable[..., MultiTaskLinear]


def per_token(layer: MultiTaskLinear, x: Tensor, ids: Tensor) -> Tensor:
    with torch.no_grad(), layer.routing.assign(ids):
        return layer(x)


@pytest.mark.parametrize(
    "ids",
    [
        torch.zeros(2, 4, dtype=torch.long),
        torch.zeros(3, 5, dtype=torch.long),
        torch.zeros(6, dtype=torch.long),
        torch.zeros(3, 4, 7, dtype=torch.long),
        torch.zeros(3, 4, 7, 1, dtype=torch.long),
        torch.zeros(12, dtype=torch.long),
        torch.zeros(1, dtype=torch.long),
        torch.zeros(0, dtype=torch.long),
    ],
    ids=lambda ids: str(list(ids.shape)),
)
def test_ids_that_do_not_lead_the_activation_raise(make_layer: MakeLayer, ids: Tensor) -> None:
    layer = make_layer()
    with layer.routing.assign(ids), pytest.raises(ValueError, match=r"do not lead .*\(3, 4\)"):
        layer(torch.randn(3, 4, 7, dtype=torch.float64))


@pytest.mark.parametrize("bad", [-2, 4, 100])
def test_ids_out_of_range_raise(bad: int) -> None:
    routing = Routing(4)
    with (
        pytest.raises(ValueError, match=rf"\[-1, 4\), received .*{bad}"),
        routing.assign([0, bad, 1]),
    ):
        pass


@pytest.mark.parametrize("ids", [torch.tensor([0.0, 1.0]), torch.tensor([True, False])])
def test_ids_that_are_no_integers_raise(ids: Tensor) -> None:
    with pytest.raises(ValueError, match=f"integers, received {ids.dtype}"), Routing(2).assign(ids):
        pass


def test_no_tasks_at_all_raise() -> None:
    with pytest.raises(ValueError, match="at least one task"):
        Routing(0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.uint8])
def test_any_integer_type_will_do(make_layer: MakeLayer, dtype: torch.dtype) -> None:
    layer = make_layer()
    x = torch.randn(3, 7, dtype=torch.float64)
    ids = torch.tensor([2, 0, 3])
    assert torch.equal(per_token(layer, x, ids.to(dtype)), per_token(layer, x, ids))


def test_a_call_without_ids_raises(make_layer: MakeLayer) -> None:
    layer = make_layer()
    with pytest.raises(ValueError, match="no task ids are assigned"):
        layer(torch.randn(3, 7, dtype=torch.float64))
    with pytest.raises(ValueError, match="no task ids"), layer.routing.select(torch.tensor([0])):
        pass


def test_blocks_nest_and_give_back_what_held_before(make_layer: MakeLayer) -> None:
    layer = make_layer()
    x = torch.randn(2, 7, dtype=torch.float64)
    alone = [per_token(layer, x, torch.tensor(ids)) for ids in ([0, 1], [3, 2])]
    with torch.no_grad(), layer.routing.assign([0, 1]):
        with layer.routing.assign([3, 2]):
            assert torch.equal(layer(x), alone[1])
        assert torch.equal(layer(x), alone[0])
        with pytest.raises(RuntimeError), layer.routing.assign([2, 2]):
            raise RuntimeError
        assert torch.equal(layer(x), alone[0])
    with pytest.raises(ValueError, match="no task ids"):
        layer(x)


def test_select_keeps_the_tasks_of_the_kept_positions(make_layer: MakeLayer) -> None:
    layer = make_layer()
    ids = torch.tensor([[0, 1, 2], [3, -1, 1]])
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    whole = per_token(layer, x, ids).reshape(6, 5)
    index = torch.tensor([5, 0, 3, 3])
    with torch.no_grad(), layer.routing.assign(ids):
        with layer.routing.select(index):
            torch.testing.assert_close(layer(x.reshape(6, 7)[index]), whole[index])
        assert torch.equal(layer(x).reshape(6, 5), whole)


@pytest.mark.parametrize("index", [[0, 4], [-1, 0]])
def test_select_outside_of_the_ids_raises(index: list[int]) -> None:
    routing = Routing(2)
    with (
        routing.assign([[0, 1], [1, 0]]),
        pytest.raises(ValueError, match="does not fit 4 task ids"),
        routing.select(torch.tensor(index)),
    ):
        pass


@pytest.mark.parametrize("middle", [(), (5,), (2, 3), (2, 1, 3)])
def test_ids_of_examples_hold_for_all_axes_between(
    make_layer: MakeLayer, middle: tuple[int, ...]
) -> None:
    layer = make_layer()
    ids = torch.tensor([2, -1, 0, 2])
    x = torch.randn(4, *middle, 7, dtype=torch.float64)
    whole = per_token(layer, x, ids)
    assert whole.shape == (4, *middle, 5)
    for row, task in enumerate(ids.tolist()):
        alone = per_token(layer, x[row], torch.full(x[row].shape[:-1], task))
        torch.testing.assert_close(whole[row], alone)


def test_one_assignment_serves_activations_of_several_shapes(make_layer: MakeLayer) -> None:
    layer = make_layer()
    ids = torch.tensor([1, 3])
    inputs = [torch.randn(2, 7, dtype=torch.float64), torch.randn(2, 4, 7, dtype=torch.float64)]
    alone = [per_token(layer, x, ids) for x in inputs]
    with torch.no_grad(), layer.routing.assign(ids):
        for x, expected in zip([*inputs, *inputs], [*alone, *alone], strict=True):
            assert torch.equal(layer(x), expected)


def test_an_activation_without_positions_passes(make_layer: MakeLayer) -> None:
    layer = make_layer()
    empty = per_token(layer, torch.randn(0, 7, dtype=torch.float64), torch.zeros(0).long())
    assert empty.shape == (0, 5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputation_gives_identical_gradients(make_layer: MakeLayer, dropout: float) -> None:
    layer = make_layer(base=torch.nn.Linear(7, 7, dtype=torch.float64), dropout=dropout)
    ids = torch.tensor([[0, 2, -1, 1], [3, 3, 0, 1]])
    x = torch.randn(2, 4, 7, dtype=torch.float64)

    def block(x: Tensor) -> Tensor:
        return torch.tanh(layer(torch.tanh(layer(x))))

    def gradients(recompute: bool) -> list[Tensor]:
        layer.zero_grad()
        torch.manual_seed(5)
        start = x.clone().requires_grad_()
        with layer.routing.assign(ids):
            y = checkpoint(block, start, use_reentrant=False) if recompute else block(start)
            y.square().sum().backward()
        return [start.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]  # type: ignore[list-item]

    kept, again = gradients(False), gradients(True)
    assert len(kept) == len(again) == 5
    for one, two in zip(kept, again, strict=True):
        assert torch.equal(one, two)


def test_recomputation_under_select_reads_the_selected_ids(make_layer: MakeLayer) -> None:
    layer = make_layer()
    ids = torch.tensor([0, 2, 1, 3])
    x = torch.randn(2, 7, dtype=torch.float64)

    def gradient(recompute: bool) -> Tensor:
        layer.zero_grad()
        with layer.routing.assign(ids), layer.routing.select(torch.tensor([3, 1])):
            y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
            y.sum().backward()
        assert layer.task_transform.grad is not None
        return layer.task_transform.grad.clone()

    assert torch.equal(gradient(False), gradient(True))


@pytest.mark.parametrize("ids", [torch.tensor(1), torch.tensor([1]), torch.tensor([[1], [0]])])
def test_there_is_a_number_for_each_position(ids: Tensor) -> None:
    """In memory, too: kernels read them one after another."""
    routing = Routing(2)
    shape = torch.Size([ids.shape[0] if ids.ndim else 1, 7])
    with routing.assign(ids):
        slots = routing.slots(shape, torch.device("cpu"))
    assert slots.index.shape == (shape.numel(),)
    assert slots.index.is_contiguous()


@pytest.mark.parametrize("each", [False, True])
def test_runs_of_positions_are_not_those_of_pairs(each: bool) -> None:
    """What is said of positions in their order says nothing of pairs, which are sorted by their experts."""
    ids = torch.tensor([1, 1, 0, -1, 2, 2])
    slots = slots_of(ids, ids.device)
    assert slots.runs is not None
    assert [range(*piece) for piece in slots.runs.pieces.tolist()] == [
        range(2, 3),
        range(2),
        range(4, 6),
    ]
    chosen = torch.tensor([[0, 2], [1, 2], [2, 0], [0, 1], [1, 0], [2, 1]])
    assert Pairs.of(chosen, experts=3).slots(slots, each=each).runs is None
