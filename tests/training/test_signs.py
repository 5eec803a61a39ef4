"""What a run's log says of tasks that were not learned."""

from __future__ import annotations

from typing import Any

import pytest

from mtl_lora_cli.training.signs import signs


def look(step: int, loss: float, **more: Any) -> dict[str, Any]:
    return {"event": "validation", "step": step, "loss": {"sst2": loss, "rte": 0.5}, **more}


def step(number: int, loss: float) -> dict[str, Any]:
    return {"event": "step", "step": number, "task_loss": {"sst2": loss}}


def guess(better: bool) -> dict[str, Any]:
    return {"guess": {"sst2": {"loss": 0.69, "guess": 0.693, "better": better}}}


def test_a_run_that_learns_has_none() -> None:
    events = [
        step(10, 0.6),
        look(10, 0.7, **guess(False)),
        step(20, 0.3),
        look(20, 0.4, **guess(True)),
    ]
    assert signs(events) == []
    assert signs([]) == signs([step(1, 0.5)]) == []


def test_answers_that_were_never_better_than_a_guess() -> None:
    events = [look(10, 0.7, **guess(False)), look(20, 0.69, **guess(False))]
    (line,) = signs(events)
    assert line.startswith("sst2: at none of 2 looks were its answers better than a guess")
    assert "0.690 nats a row at best, the guess 0.693" in line


def test_one_answer_at_the_last_look() -> None:
    one = {"one_answer": {"sst2": {"choice": "negative", "share": 0.98, "right": 0.51}}}
    assert signs([look(10, 0.7, **one), look(20, 0.5, one_answer={})]) == []
    (line,) = signs([look(10, 0.7), look(20, 0.5, **one)])
    assert line == "sst2: 'negative' is the answer to 98 % of the held-out rows, and right of 51 %"


@pytest.mark.parametrize(
    ("held_out", "trained", "told"),
    [
        ((0.5, 0.4, 0.6), (0.5, 0.3, 0.1), True),
        ((0.5, 0.4, 0.42), (0.5, 0.3, 0.1), False),
        ((0.5, 0.4, 0.6), (0.5, 0.3, 0.4), False),  # both rose: no sign of rows known by heart
    ],
)
def test_losses_that_part(
    held_out: tuple[float, ...], trained: tuple[float, ...], told: bool
) -> None:
    events = []
    for number, (own, theirs) in enumerate(zip(trained, held_out, strict=True)):
        events += [*(step(10 * number + k, own) for k in range(10)), look(10 * number + 9, theirs)]
    lines = signs(events)
    assert bool(lines) == told
    if told:
        assert "lowest after step 19 (0.400) and is 0.600 after step 29" in lines[0]
        assert "fell from 0.300 to 0.100" in lines[0]
