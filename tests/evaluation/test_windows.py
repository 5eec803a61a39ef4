"""Large sets, asked window by window: the same result as at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mtl_lora_cli.data.examples import Examples
from mtl_lora_cli.data.lazy_rows import Lazy
from mtl_lora_cli.evaluation import windows
from mtl_lora_cli.evaluation.evaluate import Setting, evaluate
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.metrics import intervals as metrics
from mtl_lora_cli.tasks.rendering import Example
from mtl_lora_cli.tasks.task import Task


class Counted(Lazy[Example]):
    """Examples that are made when they are asked for."""

    def __init__(self, rows: Examples) -> None:
        self._rows, self.most = list(rows.examples), 0

    def __len__(self) -> int:
        return len(self._rows)

    def between(self, first: int, last: int) -> list[Example]:
        self.most = max(self.most, last - first)
        return self._rows[first:last]


@pytest.mark.parametrize("protocol", [None, "generate"])
def test_windows_give_what_all_rows_together_give(
    opened: Run,
    tasks: list[Task],
    held: list[Examples],
    protocol: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows with choices, two and several of them, an expectation; written, and generated answers."""
    monkeypatch.setattr(metrics, "RESAMPLES", 10)
    count = 4 if protocol is None else 2
    told: list[tuple[str, int, int]] = []
    shown: list[tuple[int, int]] = []
    setting = Setting(protocol=protocol)
    at_once = evaluate(opened, tasks[:count], setting, rows=held[:count])
    monkeypatch.setattr(windows, "MANY", 4)
    lazy = [
        Examples(one.split, Counted(one), one.wheres, one.rows, one.fingerprint)
        for one in held[:count]
    ]
    in_windows = evaluate(
        opened,
        tasks[:count],
        setting,
        lambda done, total: shown.append((done, total)),
        rows=lazy,
        told=lambda task, some, _: told.append((task.name, some.first, len(some.examples))),
    )
    for one, other in zip(at_once, in_windows, strict=True):
        for key in one.keys() - {"id", "seconds_of_all_tasks"}:
            assert close(one[key], other[key]), key
    assert told[:2] == [(tasks[0].name, 0, 4), (tasks[0].name, 4, 2)]
    assert max(one.examples.most for one in lazy) == 4  # type: ignore[attr-defined]
    assert shown[-1] == (6 * count, 6 * count)
    assert all(done <= total for done, total in shown)


def close(one: Any, other: Any) -> bool:
    """The same, numbers to what another order of sums may change."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(close, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return bool(np.isclose(one, other, rtol=1e-4, atol=1e-5, equal_nan=True))
    return bool(one == other)
