"""Every model is right, packed as alone, or refused in one line; none is wrong in silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mtl_lora_cli.errors import UsageError

from .judge import judge
from .models import MODELS, Tiny
from .results import ENOUGH, Result

LONGEST_REFUSAL = 400


def chosen(model: Tiny, *, quick: bool) -> object:
    """The model as a parameter of a test; where it is not quick, `make families` alone has it."""
    marks = [] if quick else [pytest.mark.families]
    return pytest.param(model, marks=marks, id=str(model))


@pytest.mark.parametrize("model", [chosen(model, quick=model.quick) for model in MODELS])
def test_packed_is_as_alone(
    model: Tiny, folder_of: Callable[[Tiny], Path], record: Callable[[Result], None]
) -> None:
    folder = folder_of(model)
    try:
        verdict = judge(model, folder)
    except UsageError as refusal:
        record(Result(model, None, str(refusal)))
        assert model.refused, f"refused: {refusal}"
        assert model.refused in str(refusal)
        assert "\n" not in str(refusal) and len(str(refusal)) < LONGEST_REFUSAL
        return
    result = Result(model, verdict)
    record(result)
    assert verdict.worst <= ENOUGH, f"{result.word}: {verdict}"
    assert not model.refused, "is right now; the table says that it is refused"


def test_the_table_is_wide_enough() -> None:
    names = [str(model) for model in MODELS]
    assert len(names) == len(set(names))
    assert len({model.model_type for model in MODELS}) >= 75
    assert len({model.model_type for model in MODELS if model.quick}) >= 25
    right = {model.model_type for model in MODELS if not model.refused}
    assert len(right) >= 65
