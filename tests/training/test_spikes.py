"""Spikes are seen in a run's own log, and told."""

from __future__ import annotations

from typing import Any

from mtl_lora_cli.training.spikes import spikes, told


def step(number: int, norm: float, **losses: float) -> dict[str, Any]:
    return {"event": "step", "step": number, "gradient_norm": norm, "task_loss": losses}


def run(**changed: dict[str, Any]) -> list[dict[str, Any]]:
    events = [step(n, 0.1 + 0.01 * (n % 3), cola=0.5, sst2=0.4, rte=0.6) for n in range(1, 81)]
    for key, event in changed.items():
        events[int(key[1:]) - 1] |= event
    return events


def test_a_spike_names_step_and_tasks() -> None:
    loss = {"cola": 0.6, "sst2": 2.0, "rte": 1.2}
    events = run(s60={"gradient_norm": 2.2, "task_loss": loss}, s10={"gradient_norm": 9.0})
    (one,) = spikes(events)  # at step 10 nothing is usual yet
    assert (one.step, one.tasks) == (60, ("sst2", "rte"))
    assert one.times == 2.2 / one.usual
    (line,) = told([one], 80, clipped=False)
    assert line == (
        "1 of 80 steps had a gradient more than 5 times the usual: step 60 (20 times, rows of sst2, "
        "rte); training.clipping=true holds each tensor to its own history"
    )
    assert "training.clipping" not in "".join(told([one], 80, clipped=True))


def test_of_many_the_highest_are_shown() -> None:
    events = run(**{f"s{n}": {"gradient_norm": float(n)} for n in (30, 40, 50, 60, 70, 80)})
    found = spikes(events)
    assert [one.step for one in found] == [30, 40, 50, 60, 70, 80]
    (line,) = told(found, 80, clipped=True)
    assert "6 of 80" in line
    assert "step 30" not in line
    assert line.endswith("and others")


def test_a_steady_run_has_none() -> None:
    assert spikes(run()) == []
    assert list(told([], 80, clipped=False)) == []
    lines = [{"event": "validation", "step": 1}, {"event": "step", "step": 2}]
    assert spikes(lines * 40) == []
