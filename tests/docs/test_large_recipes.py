"""The figures of the 7B and 8B recipes in docs/recipes.md are those that were measured."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

DOCS = Path(__file__).parents[2] / "docs"


def test_the_table_says_what_was_measured_on_an_h100() -> None:
    page = (DOCS / "recipes.md").read_text(encoding="utf-8")
    measured = json.loads((DOCS / "benchmarks" / "large-recipes.json").read_text(encoding="utf-8"))
    told = 0
    for one in measured:
        if "H100" not in one["environment"]["device"]:
            continue
        (case,) = one["cases"]
        recipe = one["environment"]["command_line"][3]
        estimate = case["picked"].rpartition("estimated peak ")[2].removesuffix(" GiB")
        row = (
            f"| {recipe} | {case['tokens_per_second']:,.0f} | {median(case['seconds']):.2f} s "
            f"| {case['peak_memory_gib']:.1f} GiB | {estimate} |"
        )
        assert row in page
        told += 1
    assert told == 4
