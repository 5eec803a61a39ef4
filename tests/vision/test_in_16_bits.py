"""The self-test in 16 bits: a small model with a tower of its own is asked in 32, where wrong plans show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.models import small, trust
from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.models.stand_in import NoStandIn
from mtl_lora_cli.models.trust import settle
from mtl_lora_cli.models.vision.qwen_vl import QwenVL

from .. import wrong_plans as wrong
from ..sights import TOKENS
from .conftest import packed_of, some_at_once

Patch = pytest.MonkeyPatch
Models = Callable[[str], BaseModel]


@pytest.mark.parametrize(
    ("kind", "change", "dtype"),
    [
        ("qwen3_vl", wrong.NO_HEAD_NORMS, torch.bfloat16),
        ("qwen3_vl", wrong.NO_HEAD_NORMS, torch.float16),
        ("qwen3_vl", wrong.neighbours, torch.bfloat16),
        ("qwen2_5_vl", wrong.neighbours, torch.float16),
        ("qwen2_5_vl", wrong.UNSCALED, torch.bfloat16),
        ("gemma3", wrong.NO_WINDOW, torch.bfloat16),
    ],
)
def test_a_wrong_plan_falls_to_the_plain_engine(
    models: Models, monkeypatch: Patch, kind: str, change: wrong.Change, dtype: torch.dtype
) -> None:
    wrong.planned_wrongly(monkeypatch, change)
    packed = packed_of(models(kind), kind=kind, dtype=dtype)
    assert packed.decoder is not None
    found = settle(packed)
    assert found.way is not None and found.unasked == ""
    assert "differ by" in str(packed.not_fused)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_wrong_places_of_pictures_are_refused(
    models: Models, monkeypatch: Patch, kind: str
) -> None:
    """Rows for columns: text alone does not show it."""
    real = QwenVL.spread
    monkeypatch.setattr(QwenVL, "spread", lambda *given: real(*given)[[0, 2, 1]])
    packed = packed_of(models(kind), kind=kind, dtype=torch.bfloat16)
    with pytest.raises(UsageError, match=r"with pictures, log-probabilities differ"):
        settle(packed)


@pytest.mark.parametrize(
    "kind", some_at_once(["llava", *TOKENS], "llava", "gemma3", "qwen2_5_vl", "qwen3_vl")
)
def test_every_type_is_asked_in_32_bits_with_its_pictures(
    llava: BaseModel, models: Models, kind: str
) -> None:
    packed = packed_of(llava if kind == "llava" else models(kind), kind=kind, dtype=torch.bfloat16)
    fused = kind not in ("gemma4_small", "paligemma")
    found = settle(packed)
    assert (found.way is None) == fused, packed.engine_line()
    assert (found.unasked, bool(found.stand_in)) == ("", True)


def test_what_nobody_was_asked_in_32_bits_is_said(models: Models, monkeypatch: Patch) -> None:
    """And the fused engine is given up for transformers' own layers."""

    def refused(*_: Any, **__: Any) -> Any:
        raise NoStandIn("it is too wide")

    monkeypatch.setattr(small, "stand_in", refused)
    base = models("qwen3_vl")
    packed = packed_of(base, kind="qwen3_vl", dtype=torch.bfloat16)
    packed.trust = settle(packed)
    assert packed.decoder is None
    (note,) = packed.notes()
    assert "nothing was asked in 32 bits, where rounding hides less (it is too wide)" in note
    wanted = packed_of(base, "fused", kind="qwen3_vl", dtype=torch.bfloat16)
    wanted.trust = settle(wanted)
    assert wanted.decoder is not None and "it is too wide" in str(wanted.trust)
    (note,) = wanted.notes()
    assert note.startswith("self-test: nothing was asked in 32 bits")
    assert "32 bits" in wanted.engine_report()["self_test"]
    assert not settle(packed_of(base, kind="qwen3_vl")).unasked  # a run in 32 bits is asked itself


def test_pictures_that_would_take_long_are_named(llava: BaseModel, monkeypatch: Patch) -> None:
    monkeypatch.setitem(small._OPERATIONS, "cpu", 1.0)
    found = settle(packed_of(llava, dtype=torch.bfloat16))
    assert found.way is None and found.stand_in
    assert found.unasked.startswith("pictures were not asked in 32 bits (its ")
    assert trust.Trust.__str__(found).endswith("would take long on a CPU)")
