"""Passes that are filled up for a graph say what they say as they come, and come to the same sizes again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mtl_lora_cli.evaluation.choices import Passes, score
from mtl_lora_cli.evaluation.predict import Predictor
from mtl_lora_cli.prediction.graphs import Graphs, _ready

from .conftest import rows_of


def requests_of(predictor: Predictor, count: int) -> list[Any]:
    rows = [(row, f"row {number}") for number, row in enumerate(rows_of(count))]
    return predictor.questions(rows, task_column="of").together


@pytest.mark.parametrize("shared_up_to", [None, 0], ids=["trees", "rows"])
def test_filled_up_they_say_the_same(predictor: Predictor, shared_up_to: int | None) -> None:
    packed = predictor._opened.packed.eval()
    requests = requests_of(predictor, 23)
    passes = Passes.build(requests, shared_up_to, 400)
    graphs = Graphs(packed, capture=False)
    values = []
    with torch.inference_mode():
        for batch in passes.batches:
            assert graphs.serves(batch)
            values.append(graphs(batch).double().numpy())
            assert len(values[-1]) == len(batch.targets)
    expected = score(packed, requests, device=torch.device("cpu"), tokens_per_pass=64)
    for one, other in zip(passes.scores(values), expected, strict=True):
        assert one == pytest.approx(other, abs=2e-5)


def test_sizes_are_those_of_all_passes_that_are_alike(predictor: Predictor) -> None:
    sizes = set()
    for count in (20, 21, 26):
        (batch,) = Passes.build(requests_of(predictor, count), None, 10**6).batches
        _, own, contents = _ready(batch, [16, 64])
        sizes.add((own, tuple((one.shape, one.dtype) for one in contents)))
    assert len(sizes) == 1
    (whole,) = Passes.build(requests_of(predictor, 600), None, 10**6).batches
    assert _ready(whole, [16, 64])[1] not in {own for own, _ in sizes}


def test_what_a_graph_cannot_do_goes_another_way(predictor: Predictor) -> None:
    packed = predictor._opened.packed
    assert not Graphs.possible(packed, torch.device("cpu"))
    graphs = Graphs(packed)
    (batch,) = Passes.build(requests_of(predictor, 9), None, 10**6).batches
    assert graphs.serves(batch)
    batch.task_ids[0, 3] = -1  # the base model alone: its positions are masked
    assert not graphs.serves(batch)
    (other,) = Passes.build(requests_of(predictor, 9), None, 10**6).batches
    graphs._limit = 100  # a segment of padding would be beyond
    assert not graphs.serves(other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
def test_a_replayed_pass_is_the_launched_one(predictor: Predictor) -> None:
    packed = predictor._opened.packed
    if not Graphs.possible(packed, torch.device("cuda")):
        pytest.skip("its kernels ask the CPU")
    graphs = Graphs(packed)
    batches = [
        Passes.build(requests_of(predictor, count), None, 10**6).batches[0] for count in (20, 26)
    ]
    with torch.inference_mode():
        first = [graphs(batch).clone() for batch in batches]
        assert len(graphs._graphs) == 1
        again = [graphs(batch).clone() for batch in batches]
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)
