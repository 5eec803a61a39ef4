"""Examples shared among processes: each is done once, and the work is even."""

from __future__ import annotations

import numpy as np
import pytest

from mtl_lora_cli.machine.processes import Place, Processes


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_example_is_done_once_and_the_costs_are_even(count: int) -> None:
    costs = np.random.default_rng(0).integers(1, 500, size=101).tolist()
    shares = [Processes(Place(rank, count)).share(costs) for rank in range(count)]
    assert sorted(number for share in shares for number in share) == list(range(101))
    sums = [sum(costs[number] for number in share) for share in shares]
    assert max(sums) - min(sums) <= max(costs)


def test_more_processes_than_examples() -> None:
    assert [Processes(Place(rank, 3)).share([5, 7]) for rank in range(3)] == [[1], [0], []]


def test_outside_of_a_group_a_process_is_alone() -> None:
    alone = Processes.of_group()
    assert (alone.rank, alone.count) == (0, 1)
    assert alone.collect({1: "b", 0: "a"}) == ["a", "b"]
