"""Which cases a call measures."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mtl_lora_cli.bench.cases import Case, choose, plan, target_modules
from mtl_lora_cli.bench.measure import ratios
from mtl_lora_cli.errors import UsageError


def test_one_case_alone(tiny: Case) -> None:
    planned = plan(tiny, table=None, versus=[], own_shape=True)
    assert [case.name for case in planned.cases] == ["tiny mtl-lora"]
    assert planned.peft is None


def test_the_yardstick(tiny: Case) -> None:
    large = replace(tiny, shape="llama3-8b")
    planned = plan(large, table="yardstick", versus=[], own_shape=False)
    assert [case.name for case in planned.cases] == [
        "llama3-8b mtl-lora",
        "llama3-8b mtl-lora nf4",
        "llama3-8b lora",
        "llama3-8b mtl-lora all",
        "llama3-8b mtl-lora fp8",
        "smollm2-135m mtl-lora",
    ]
    assert planned.peft is not None and planned.peft.shape == "llama3-8b"
    own = plan(tiny, table="yardstick", versus=[], own_shape=True)
    assert {case.shape for case in own.cases} == {"tiny"}


def test_growth(tiny: Case) -> None:
    cases = plan(replace(tiny, row_length=512), table="growth", versus=[], own_shape=True).cases
    assert len({case.name for case in cases}) == len(cases) == 8
    assert cases[0].name == "tiny mtl-lora, T = 8, 2 x 512"
    assert {case.tasks for case in cases} == {8, 64, 256, 1000}
    assert {case.row_length for case in cases} == {512, 2048}
    assert [(case.rows_per_step, case.memory) for case in cases[-2:]] == [(8, "auto")] * 2


def test_baselines(tiny: Case) -> None:
    planned = plan(tiny, table=None, versus=["peft", "plain", "lora"], own_shape=True)
    assert [(case.name, case.baseline) for case in planned.cases] == [
        ("tiny mtl-lora", None),
        ("tiny mtl-lora plain", "plain"),
        ("tiny lora", "lora"),
    ]
    lora = planned.cases[2].adapter
    assert (lora["rank"], lora["method"]) == (8, "lora")
    assert "up_projections" not in lora
    assert planned.peft is not None


def test_a_baseline_that_the_table_holds_is_measured_once(tiny: Case) -> None:
    planned = plan(tiny, table="yardstick", versus=["lora"], own_shape=True)
    assert [case.baseline for case in planned.cases if case.name == "tiny lora"] == ["lora"]


def test_a_case_is_not_its_own_baseline(tiny: Case) -> None:
    with pytest.raises(UsageError, match="the plain engine"):
        plan(replace(tiny, engine="plain"), table=None, versus=["plain"], own_shape=True)
    lora = replace(tiny, adapter={**tiny.adapter, "method": "lora"})
    with pytest.raises(UsageError, match="plain LoRA"):
        plan(lora, table=None, versus=["lora"], own_shape=True)


def test_choices_are_checked() -> None:
    assert choose("--vs", "peft") == "peft"
    with pytest.raises(UsageError, match="did you mean 'peft'"):
        choose("--vs", "pefd")
    assert target_modules("a, b", "tiny") == ("a", "b")
    assert len(target_modules("all", "llama3-8b")) == 7
    with pytest.raises(UsageError, match="received nothing"):
        target_modules(" , ", "tiny")


def test_ratios() -> None:
    """Speed over speed, memory over memory, for one shape, to PEFT's best setting alone."""

    def entry(name: str, rate: float, gib: float | None, **others: object) -> dict[str, object]:
        common = {"status": "done", "baseline": None, "shape": "a", "best": False}
        measured = {"tokens_per_second": rate, "peak_memory_gib": gib}
        return {"name": name, **common, **measured, **others}

    found = ratios(
        [
            entry("ours", 300.0, 20.0),
            entry("other shape", 9.0, None, shape="b"),
            entry("slow", 50.0, 80.0, baseline="peft"),
            entry("fast", 100.0, 40.0, baseline="peft", best=True),
            entry("broken", 1.0, 1.0, status="failed"),
        ]
    )
    assert found == [
        {
            "case": "ours",
            "baseline": "peft",
            "baseline_name": "fast",
            "tokens_per_second": 3.0,
            "memory": 0.5,
        }
    ]
