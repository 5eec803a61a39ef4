"""docs/families.md says what the table of models says, and what was found is near enough."""

from __future__ import annotations

import re

import transformers

from mtl_lora_cli.engine.families import known_types, plan_of
from mtl_lora_cli.engine.plan import NotPlanned

from .build import configuration
from .models import MODELS, Tiny
from .page import PAGE, rows
from .results import ENOUGH


def test_the_page_has_the_models_of_the_table() -> None:
    listed = [(row.model_type, row.variant, row.refused) for row in rows()]
    declared = [(model.model_type, model.variant, bool(model.refused)) for model in MODELS]
    assert sorted(listed) == sorted(declared), "make families writes the page anew"


def test_it_names_the_engine_that_has_a_plan() -> None:
    engines = {(row.model_type, row.variant): row.engine for row in rows() if not row.refused}
    for model in MODELS:
        if not model.refused:
            named = engines[model.model_type, model.variant]
            assert (named == "fused") == planned(model), f"{model}: {named}"


def planned(model: Tiny) -> bool:
    """Whether the fused engine knows it; a wrapper's text part has a type of its own."""
    if model.model_type not in known_types() and model.text is None:
        return False
    try:
        return bool(plan_of(configuration(model)))
    except NotPlanned:
        return False


def test_what_it_calls_right_is_near_enough() -> None:
    assert all(
        len(row.numbers) == 3 and max(row.numbers) <= ENOUGH for row in rows() if not row.refused
    )


def test_it_was_made_with_a_transformers_of_this_kind() -> None:
    (made_with,) = re.findall(r"transformers (\d+)\.", PAGE.read_text(encoding="utf-8"))
    assert made_with == transformers.__version__.partition(".")[0]
