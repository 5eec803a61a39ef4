"""Any choices behind any prompt: none wins by being shorter, and none stands twice unnoticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.data.examples import Examples
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.evaluation.choices import score
from mtl_lora_cli.evaluation.requests import build_requests, require_different
from mtl_lora_cli.evaluation.scored import normalised
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import load_model, load_tokenizer
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.recipe.source import Source
from mtl_lora_cli.tasks.rendering import Example
from mtl_lora_cli.tasks.task import Task
from mtl_lora_cli.tasks.template import Template

from ..by_transformers import log_probability

OWN = Task(
    name="own",
    id=0,
    template_name="own.yaml",
    template_text="",
    template=Template(description="x", prompt="{{ text }}", answer="{{ label }}"),
    source=Source(path="nowhere"),
)
Fuzz = settings.get_profile("fuzz")
CPU = torch.device("cpu")
FEW = st.text("10a .", min_size=1, max_size=4)  # of which one often begins another
ANY = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=4)
CHOICES = st.lists((FEW | ANY).map(str.strip).filter(bool), min_size=2, max_size=5, unique=True)
PROMPTS = ANY.map(str.strip).filter(bool) | st.just("great film Rating:")


@pytest.fixture(scope="module")
def encoder(stories_folder: Path) -> Encoder:
    return Encoder(load_tokenizer(find_base_model(str(stories_folder))), "plain")


@pytest.fixture(scope="module")
def packed(stories_folder: Path) -> PackedModel:
    found = find_base_model(str(stories_folder))
    return PackedModel(load_model(found, dtype=torch.float32, device=CPU)).eval()


@pytest.fixture(scope="module")
def plain(stories_folder: Path) -> Any:
    """The same model as transformers alone knows it, in float64."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(stories_folder, dtype=torch.float64).eval()


@settings(Fuzz)
@given(CHOICES, PROMPTS)
def test_any_choices(
    encoder: Encoder, packed: PackedModel, plain: Any, choices: list[str], prompt: str
) -> None:
    """Scores, with the end and without, are transformers' own, and lengths are of what was scored."""
    example = Example(prompt, choices[0], tuple(choices), 0)
    examples = Examples("test", [example], ["rows:1"], [], "")
    requests = build_requests(examples.examples, -1, encoder, 512)
    (request,) = requests
    _, (bare,) = encoder.continuations([prompt], [choices])
    if len(set(map(tuple, bare))) < len(bare):
        with pytest.raises(
            UsageError, match=r"^rows:1: task 'own': choices: .* have the same tokens"
        ):
            require_different(OWN, examples, requests)
        return
    require_different(OWN, examples, requests)
    assert not any(
        one is not other and other[: len(one)] == one
        for one in request.choices
        for other in request.choices
    )
    end = list(encoder.answer_end)
    begins = any(a != b and b[: len(a)] == a for a in bare for b in bare)
    assert request.choices == ([[*one, *end] for one in bare] if begins else bare)
    (found,) = score(packed, [request.with_open], device=CPU, tokens_per_pass=2048)
    asked, without = found[: len(bare)], found[-len(bare) :]
    expected = [log_probability(plain, request.prompt, one) for one in request.choices]
    np.testing.assert_allclose(asked, expected, rtol=1e-5, atol=1e-4)
    expected = [log_probability(plain, request.prompt, one) for one in bare]
    np.testing.assert_allclose(without, expected, rtol=1e-5, atol=1e-4)
    (a_token,) = normalised([asked], examples, requests, "token")
    np.testing.assert_allclose(a_token, asked / [len(one) for one in request.choices])
    (a_character,) = normalised([asked], examples, requests, "character")
    more = len(end) * begins
    np.testing.assert_allclose(a_character, asked / [len(one) + more for one in choices])
