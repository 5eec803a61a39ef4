"""What `memory: auto` picks for a case is what training picks, and is what the steps then are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mtl_lora_cli.bench import fitting
from mtl_lora_cli.bench.case import Measuring, adapter_of_case, run_case
from mtl_lora_cli.bench.cases import Case
from mtl_lora_cli.bench.fitting import fitted
from mtl_lora_cli.bench.yardstick import Yardstick, densest
from mtl_lora_cli.engine.memory import GIB
from mtl_lora_cli.errors import UsageError

LLAMA = Case(
    name="llama",
    shape="llama3-8b",
    adapter={"method": "mtl-lora", "rank": 8, "alpha": 16.0, "dropout": 0.05},
    quantization="nf4",
    row_length=2048,
    rows_per_step=8,
    memory="auto",
)


def picked(case: Case, monkeypatch: pytest.MonkeyPatch, free: float) -> Case:
    """The case on a card with so many GiB free; nothing of the model is made."""
    monkeypatch.setattr(fitting, "free_memory", lambda _: (int(free * GIB), "a card"))
    config = adapter_of_case(**case.adapter)
    found, message = fitted(case, config, torch.device("cuda"), torch.bfloat16)
    assert message is not None
    assert message.startswith(f"memory: {free:.1f} GiB free on a card: rows of ")
    assert found.memory == "manual"
    return found


def test_less_memory_means_smaller_passes_then_more_computed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    large, middle, small = (picked(LLAMA, monkeypatch, free) for free in (79.0, 23.5, 11.0))
    assert (large.rows_per_pass, large.gradient_checkpointing) == (8, False)
    assert 1 < middle.rows_per_pass < 8
    assert small.rows_per_pass == 1
    assert not isinstance(small.gradient_checkpointing, bool)
    assert small.gradient_checkpointing.gate_up > 0
    assert small.to_json()["gradient_checkpointing"] == small.gradient_checkpointing.model_dump()
    assert {one.row_length * one.rows_per_step for one in (large, middle, small)} == {8 * 2048}


def test_nf4_is_what_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    four_bit = picked(LLAMA, monkeypatch, 40.0)
    sixteen = picked(replace(LLAMA, quantization="none"), monkeypatch, 40.0)
    assert sixteen.rows_per_pass < four_bit.rows_per_pass


def test_the_plain_baseline_goes_over_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = replace(LLAMA, engine="plain", baseline="plain")
    found = picked(plain, monkeypatch, 23.5)
    assert found.rows_per_pass == picked(LLAMA, monkeypatch, 23.5).rows_per_pass
    assert found.engine == "plain"


def test_what_cannot_be_picked_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"4\.0 GiB are free on a card, and the least"):
        picked(LLAMA, monkeypatch, 4.0)
    with pytest.raises(UsageError, match="found engine: plain"):
        picked(replace(LLAMA, engine="plain"), monkeypatch, 79.0)


def test_by_hand_nothing_is_picked(tiny: Case) -> None:
    config = adapter_of_case(**tiny.adapter)
    assert fitted(tiny, config, torch.device("cpu"), torch.float32) == (tiny, None)


def test_the_densest_row() -> None:
    yardstick = Yardstick.build(vocabulary=50, tasks=8, seed=0)
    supervised = [
        sum(
            len(yardstick.splits[task].example(number))
            - yardstick.splits[task].prompt_lengths[number]
            for task, number in row
        )
        for row in yardstick.rows(2048, seed=0)
    ]
    assert max(supervised) <= densest(2048) <= 2048
    assert densest(2048) < 2 * max(supervised)


def test_the_steps_are_as_picked(
    tiny: Case, measuring: Measuring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows go through at once, and a run that is told so by hand learns the same."""
    auto = run_case(replace(tiny, memory="auto", rows_per_pass=1), measuring)
    assert auto["rows_per_pass"] == tiny.rows_per_step == 2
    assert "2 rows a pass; nothing computed again" in auto["picked"]
    assert (auto["memory"], auto["gradient_checkpointing"]) == ("manual", False)
    by_hand = run_case(replace(tiny, rows_per_pass=2), measuring)
    assert by_hand["picked"] is None
    assert auto["losses"] == by_hand["losses"]
    assert auto["tokens"] == by_hand["tokens"]
