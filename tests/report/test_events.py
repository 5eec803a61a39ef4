"""metrics.jsonl as it is found: what can be used is used, and the rest is counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mtl_lora_cli.report.curves import drawn_examples, training_curves, validation_looks
from mtl_lora_cli.report.events import Events, mean_cosine, read_events, training_facts
from mtl_lora_cli.runs.folder import RunFolder

STEP = {
    "event": "step", "step": 1, "loss": 1.0, "task_loss": {"a": 1.0}, "tokens": 8, "seconds": 0.5,
}  # fmt: skip


def test_facts_of_a_run_by_hand() -> None:
    events = [
        {"event": "step", "tokens": 100, "seconds": seconds, "loss": loss, "memory_gib": 2.0}
        for seconds, loss in ((50.0, 9.0), (1.0, 3.0), (2.0, 2.0), (4.0, 1.0))
    ]
    facts = training_facts([*events, {"event": "validation", "step": 4, "loss": {"a": 1.0}}])
    assert facts["tokens_per_second"] == 50.0  # the median of 100, 50 and 25
    assert (facts["tokens"], facts["seconds"], facts["last_loss"]) == (400, 57.0, 1.0)
    assert facts["validation_loss"] == [{"step": 4, "loss": {"a": 1.0}}]


def test_cosines_are_means_over_the_steps_that_held_both_tasks() -> None:
    events = [
        {"tasks": ["a", "b"], "cosine": [[1.0, 0.5], [0.5, 1.0]]},
        {"tasks": ["b", "c"], "cosine": [[1.0, None], [None, 1.0]]},
        {"tasks": ["a", "b"], "cosine": [[1.0, 0.1], [0.1, 1.0]]},
    ]
    found = mean_cosine(events)
    assert found is not None
    assert found["cosine"] == [[1.0, 0.3, None], [0.3, 1.0, None], [None, None, 1.0]]


@pytest.mark.parametrize(
    "line",
    [
        b'{"event": "step", "step"',
        b"17",
        b"[]",
        b'{"step": 1}',
        b"\xff\xfe",
        json.dumps({**STEP, "loss": float("nan")}).encode(),
        json.dumps({**STEP, "step": "one"}).encode(),
        json.dumps({**STEP, "task_loss": None}).encode(),
        json.dumps({**STEP, "memory_gib": "much"}).encode(),
        b'{"event": "validation", "step": 1}',
        b'{"event": "gradients", "step": 1, "tasks": ["a"], "cosine": [[1.0], [1.0]]}',
        b'{"event": "gradients", "step": 1, "tasks": ["a"], "cosine": [["one"]]}',
    ],
)
def test_a_damaged_line_is_left_out_and_counted(line: bytes, tmp_path: Path) -> None:
    good = json.dumps(STEP).encode()
    (tmp_path / "metrics.jsonl").write_bytes(good + b"\n" + line + b"\n" + good + b"\n" + good[:20])
    events = read_events(RunFolder(tmp_path))
    assert (events.steps, events.unreadable) == ([STEP, STEP], 1)  # the torn end is none yet
    assert not events.validations and not events.gradients


def test_events_of_another_kind_are_no_damage(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"event": "stopped", "step": 1}\n')
    assert read_events(RunFolder(tmp_path)) == Events([], [], [], None, 0)


def test_the_last_best_look_counts(tmp_path: Path) -> None:
    looks = [{"event": "best", "step": step, "of": "macro", "value": 0.5} for step in (5, 15)]
    lines = [json.dumps(look) for look in (*looks, {**looks[0], "value": None})]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    events = read_events(RunFolder(tmp_path))
    assert (events.best, events.unreadable) == (looks[1], 1)


def test_a_run_without_a_step_has_empty_curves(tmp_path: Path) -> None:
    events = read_events(RunFolder(tmp_path))
    curves = training_curves(events.steps, ["a"])
    assert (curves["step"], curves["loss"], curves["task_loss"]) == ([], None, {"a": None})
    assert validation_looks(events, ["a"]) == []
    assert drawn_examples(events.steps, ["a"]) is None


def test_long_curves_are_means_of_groups() -> None:
    steps = [
        {**STEP, "step": number + 1, "loss": float(number), "task_loss": {"a": 1.0} if number % 2 else {}}
        for number in range(1001)
    ]  # fmt: skip
    curves = training_curves(steps, ["a", "b"])
    assert curves["steps_per_point"] == 6  # 1001 / 200, rounded up
    assert curves["step"][:2] == [6, 12] and curves["step"][-1] == 1001
    assert curves["loss"][:2] == [2.5, 8.5] and curves["loss"][-1] == 998.0
    assert curves["task_loss"]["a"][0] == 1.0 and curves["task_loss"]["b"] is None
    assert curves["memory_gib"] is None


def test_a_thousand_tasks_have_short_curves() -> None:
    names = [f"task{number}" for number in range(1000)]
    curves = training_curves([{**STEP, "step": n} for n in range(500)], names)
    assert len(curves["step"]) == 20


def test_of_many_looks_the_last_one_stays() -> None:
    looks = [
        {"event": "validation", "step": number, "loss": {"a": 1.0, "gone": 2.0, "b": float("inf")}}
        for number in range(1, 351)
    ]
    found = validation_looks(Events([], looks, [], None, 0), ["a", "b"])
    assert len(found) <= 100 and found[-1]["step"] == 350
    assert found[0]["loss"] == {"a": 1.0, "b": None}
    assert found[0]["metric"] == found[0]["macro"] == {}


def test_draws_are_not_guessed() -> None:
    told = {**STEP, "examples": {"a": 2, "b": 1}}
    assert drawn_examples([told, told], ["a", "b", "c"]) == {"a": 4, "b": 2, "c": 0}
    assert drawn_examples([told, STEP], ["a", "b"]) is None
