"""One row, several tasks: what is shared is exact, and nothing is shared that is not."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtl_lora_cli.adapters.inject import inject
from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.evaluation.choices import score
from mtl_lora_cli.evaluation.one_row import as_they_are, of_one_row, same_to
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.evaluation.predict import Predictor
from mtl_lora_cli.evaluation.requests import Request
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import load_model
from mtl_lora_cli.models.packed import PackedModel

from .test_choices import naive

TASKS = 17


def model(folder: Path, method: str) -> PackedModel:
    """The small model with an adapter of 17 tasks far from its start."""
    torch.manual_seed(0)
    base = load_model(find_base_model(str(folder)), dtype=torch.float32, device=torch.device("cpu"))
    adapter = inject(
        base, configure(method, target_modules=("*_proj",)), [f"t{n}" for n in range(TASKS)]
    )
    with torch.no_grad():
        for tensor in adapter.tensors().values():
            tensor.add_(0.05 * torch.randn_like(tensor))
    return PackedModel(base, adapter).eval()


def asked(shared: int) -> list[Request]:
    """A row of so many tokens, and behind it each task's own words and two to four candidates."""
    generator = np.random.default_rng(1)

    def tokens(count: int) -> list[int]:
        found: list[int] = generator.integers(3, 500, count).tolist()
        return found

    row = tokens(shared)
    found = []
    for task in range(TASKS):
        own = tokens(task % 4)  # some ask nothing of their own
        choices = [[*tokens(2), number] for number in range(2 + task % 3)]
        found.append(Request(task, row + own, choices))
    return found


def scores(packed: PackedModel, requests: list[Request]) -> list[np.ndarray]:
    return score(packed, requests, device=torch.device("cpu"), tokens_per_pass=4096)


@pytest.mark.parametrize("method", ["lora", "hydralora", "mtl-lora"])
def test_each_task_answers_as_if_it_were_asked_alone(stories_folder: Path, method: str) -> None:
    packed, requests = model(stories_folder, method), asked(60)
    assert packed.adapter is not None
    joined = of_one_row(requests, [0] * TASKS, same_to(packed.adapter))
    assert len(joined.requests) == (TASKS if method == "mtl-lora" else 1)
    for request, found in zip(requests, joined.apart(scores(packed, joined.requests)), strict=True):
        assert found == pytest.approx(naive(packed, request), abs=1e-5, rel=1e-5)


def test_the_row_is_paid_for_once_where_the_adapter_is_the_same(stories_folder: Path) -> None:
    """At most 1.5 times the row and what the tasks have of their own, in tokens and by the clock."""
    packed, requests = model(stories_folder, "lora"), asked(400)
    alone = as_they_are(requests)
    joined = of_one_row(requests, [0] * TASKS, [0] * TASKS)
    own = alone.cost - TASKS * 400
    assert 400 < joined.cost <= 400 + own
    assert alone.cost > 10 * joined.cost
    row = Request(0, [*requests[0].prompt[:400]], [[5]] * 1)
    parts = [Request(0, r.prompt[399:], r.choices) for r in requests]

    def seconds(some: list[Request]) -> float:
        times = []
        for _ in range(5):
            before = time.process_time()
            scores(packed, some)
            times.append(time.process_time() - before)
        return min(times)

    assert seconds(joined.requests) < 1.5 * (seconds([row]) + seconds(parts))


def test_only_what_is_equal_to_the_last_bit_is_the_same(stories_folder: Path) -> None:
    packed = model(stories_folder, "mtl-lora")
    adapter = packed.adapter
    assert adapter is not None
    assert same_to(adapter) == list(range(TASKS))
    with torch.no_grad():
        for name, tensor in adapter.tensors().items():
            if adapter.role(name).per_task:
                tensor[5] = tensor[2]
    expected = list(range(TASKS))
    expected[5] = 2
    assert same_to(adapter) == expected
    requests = asked(30)
    joined = of_one_row(requests, [0] * TASKS, expected)
    assert [2, 5] in joined.held
    for request, found in zip(requests, joined.apart(scores(packed, joined.requests)), strict=True):
        assert found == pytest.approx(naive(packed, request), abs=1e-5, rel=1e-5)
    assert (
        len(of_one_row(requests, range(TASKS), [0] * TASKS).requests) == TASKS
    )  # rows of their own


def test_predictions_of_several_tasks_are_those_of_each(opened: Run) -> None:
    row: dict[str, Any] = {
        "sentence": "a fine film", "sentence1": "One.", "sentence2": "Two.", "query": "cup",
        "product_title": "a cup", "title": "a cup", "product_description": "", "instruction": "Say yes or no.",
        "input": "", "search_term": "cup",
    }  # fmt: skip
    predictor = Predictor(opened)
    names = ["stsb", "sst2"]
    several = predictor.predict([row, row | {"sentence": "two lost hours"}], task=names)
    assert [list(one) for one in several] == [names, names]
    for number, sentence in enumerate(("a fine film", "two lost hours")):
        for name in names:
            (alone,) = predictor.predict([row | {"sentence": sentence}], task=name)
            found = several[number][name]
            assert found["label"] == alone["label"]
            assert found["probabilities"] == pytest.approx(alone["probabilities"], abs=1e-6)
    with pytest.raises(UsageError, match="'sst2' stands twice"):
        predictor.predict([row], task=["sst2", "sst2"])
    with pytest.raises(UsageError, match="unknown task 'sst3'"):
        predictor.predict([row], task=["sst3"])
    with pytest.raises(UsageError, match="not both"):
        predictor.predict([row], task="all", task_column="x")
    with pytest.raises(UsageError, match="at least one"):
        predictor.predict([row], task=[])
