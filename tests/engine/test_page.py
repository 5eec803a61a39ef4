"""docs/recipes.md names the families that are built in."""

from __future__ import annotations

import re
from pathlib import Path

from mtl_lora_cli.engine.families import known_types

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"


def test_the_page_names_every_type_that_has_a_family() -> None:
    text = PAGE.read_text(encoding="utf-8").partition("## The engine")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| [^|]+ \| (`[^|]+) \| [^|]+ \|$", text, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == set(known_types())
