"""The self-test sees what the plain engine was mended of: each mend is taken away again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl_lora_cli.adapters.inject import inject
from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.engine.families import llama
from mtl_lora_cli.engine.segment_forms import EVERYTHING
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.models import packed, plain, registered, trust
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import load_model
from mtl_lora_cli.models.packed import Engine, PackedModel
from mtl_lora_cli.models.plain import Way
from mtl_lora_cli.models.stand_in import dtype_of

from .models import MODELS

Patch = pytest.MonkeyPatch


def everything_seen(patch: Patch) -> None:
    """No window, no chunks."""
    attend = registered.attend_segments
    patch.setattr(registered, "attend_segments", lambda *a: attend(*a[:5], EVERYTHING))


def one_too_many(patch: Patch) -> None:
    """A window's edge is one key further away."""
    attend = registered.attend_segments

    def wide(*a: Any) -> Any:
        rule = a[5]
        return attend(
            *a[:5], rule if rule.window is None else rule._replace(window=rule.window + 1)
        )

    patch.setattr(registered, "attend_segments", wide)


def scores_without(**left_out: Any) -> Callable[[Patch], None]:
    """Attention that passes over one of its keywords."""

    def take_away(patch: Patch) -> None:
        attend = registered.attend_segments

        def deaf(q: Any, k: Any, v: Any, scores: Any, *others: Any) -> Any:
            return attend(q, k, v, replace(scores, **left_out), *others)

        patch.setattr(registered, "attend_segments", deaf)

    return take_away


def bare_head(patch: Patch) -> None:
    """Logits are the output layer's product, whatever the model does with them."""
    patch.setattr(trust, "head_is_bare", lambda *_: True)


def one_rotary(patch: Patch) -> None:
    """Short and long examples get one rotary embedding."""
    patch.setattr(trust, "Way", lambda layout, bare_head, _: Way(layout, bare_head))


def no_mask(patch: Patch) -> None:
    """Attention of the model's own, which is told to be ours and gets no mask."""

    def told(model: Any, name: str) -> bool:
        model.config.get_text_config()._attn_implementation = name
        return True

    patch.setattr(plain, "use_attention", told)
    patch.setattr(registered, "_mask", lambda *_, **__: None)


def packed_alone(patch: Patch) -> None:
    """There is no other layout: the state of one example runs on into the next."""


TAKEN_AWAY = [
    ("mistral-window", everything_seen),
    ("gemma3_text-window", everything_seen),
    ("olmo3-window", one_too_many),
    ("llama4_text-chunks", everything_seen),
    ("gemma2-caps", scores_without(softcap=None)),
    ("gemma2-window-caps", bare_head),
    ("gemma3_text-window-cap", bare_head),
    ("granite-scales", bare_head),
    ("cohere", bare_head),
    ("gpt_oss-window-sinks", scores_without(sinks=None)),
    ("gemma2-no-caps", scores_without(scaling=None)),
    ("phi3-longrope", one_rotary),
    ("llama-longrope", one_rotary),
    ("mamba", packed_alone),
    ("lfm2", packed_alone),
    ("qwen3_next", packed_alone),
    ("recurrent_gemma-window-cap", packed_alone),
    ("bloom", no_mask),
    ("xglm", no_mask),
    ("codegen", no_mask),
]


LAYOUT = (packed_alone, no_mask)  # mended by another layout, not within packed rows
DTYPES = (torch.float32, torch.bfloat16)


def loaded(
    name: str,
    folder_of: Callable[..., Path],
    dtype: torch.dtype = torch.float32,
    engine: Engine = "plain",
) -> PackedModel:
    (model,) = (model for model in MODELS if str(model) == name)
    base = find_base_model(str(folder_of(model)))
    model = load_model(base, dtype=dtype, device=torch.device("cpu"))
    return PackedModel(model, engine=engine)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "take_away"), TAKEN_AWAY)
def test_what_is_taken_away_is_missed(
    name: str,
    take_away: Callable[[Patch], None],
    dtype: torch.dtype,
    folder_of: Callable[..., Path],
    monkeypatch: Patch,
) -> None:
    model = loaded(name, folder_of, dtype)
    found = trust.settle(model)
    assert found.way is not None
    assert (found.way.layout == "packed") == (take_away not in LAYOUT)
    monkeypatch.setattr(packed, "LAYOUTS", ("packed",))
    take_away(monkeypatch)
    with pytest.raises(UsageError, match=r"differ by|must not be seen"):
        trust.settle(model)


@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_rounding_is_the_models_whatever_dtype_the_adapter_has(
    engine: Engine, folder_of: Callable[..., Path]
) -> None:
    """A task embedding is one float32 tensor of the whole model, and stands before its weights."""
    model = loaded("llama", folder_of, torch.bfloat16, engine).model
    adapter = inject(model, configure(gate="embedding", target_modules=("q_proj",)), ("one", "two"))
    assert next(model.parameters()).dtype == torch.float32
    assert dtype_of(model) == torch.bfloat16
    trust.settle(PackedModel(model, adapter, engine=engine))


def test_the_fused_engine_is_tested_like_the_other(
    folder_of: Callable[..., Path], monkeypatch: Patch
) -> None:
    model = loaded("qwen2-window", folder_of, engine="auto")
    assert model.decoder is not None
    assert trust.settle(model).way is None
    monkeypatch.setattr(llama, "window", lambda *_: None)  # a plan that forgets it
    model = loaded("qwen2-window", folder_of, engine="auto")
    assert trust.settle(model).way is not None
    assert "differ by" in str(model.not_fused)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (float("nan"), "1 of its weights hold NaN or infinity, the first is model.norm.weight"),
        (3e38, "its sums leave float32; another dtype may hold them"),
    ],
)
def test_a_model_without_numbers_is_told_from_one_that_differs(
    stories_folder: Path, value: float, said: str
) -> None:
    model = load_model(
        find_base_model(str(stories_folder)), dtype=torch.float32, device=torch.device("cpu")
    )
    model.get_parameter("model.norm.weight").data[3:9] = value
    with pytest.raises(UsageError, match=f"transformers itself finds no log-.* with it: {said}"):
        trust.settle(PackedModel(model).eval())
