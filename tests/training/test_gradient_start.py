"""A start of A from the gradient, against transformers' own gradient of W."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.errors import ProblemsError, UsageError
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import on_meta
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.training.drawn import Draw
from mtl_lora_cli.training.gradient_start import STEPS, require_gradients, start_by_gradient
from mtl_lora_cli.training.prepared import Prepared

from ..families.build import build
from ..families.models import MODELS
from ..often import often

pytestmark = pytest.mark.slow

PATH = "model.layers.2.self_attn.v_proj"


def gram_by_transformers(prepared: Prepared, steps: int) -> Tensor:
    """Σ G_sᵀ G_s of one layer's W [in, in], an example at a time, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(prepared.base.folder, dtype=torch.float32)
    weight = model.requires_grad_(False).get_submodule(PATH).weight.requires_grad_()
    total = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
    for step in range(steps):
        weight.grad = None
        units = 0
        for task, number in (place for row in prepared.data.mixture.step(step)[1] for place in row):
            split = prepared.data.splits[task]
            tokens = torch.from_numpy(split.example(number).astype("int64"))
            learned = split.learned(number, "answer")
            found = model(tokens[None, :-1]).logits.log_softmax(-1)[0]
            (-found[learned - 1, tokens[learned]]).sum().backward()
            units += len(learned)
        gradient = weight.grad.double() / units
        total += gradient.T @ gradient
    return total


def captured(down: Tensor, gram: Tensor) -> float:
    """Which share of the energy that so many directions can hold A's rows hold."""
    rows = torch.linalg.qr(down.detach().double().flatten(0, 1).T)[0].T
    best = torch.linalg.eigvalsh(gram)[-len(rows) :].sum()
    return float((rows @ gram @ rows.T).trace() / best)


@pytest.mark.parametrize(
    "method", often(["lora", "mtl-lora", "mtl-lora-fine"], ["lora", "mtl-lora-fine"])
)
def test_a_holds_the_strongest_directions_of_the_gradient(prepared: Prepared, method: str) -> None:
    config = configure(method, rank=4, down_start="gradient")
    own = replace(prepared, recipe=prepared.recipe.model_copy(update={"adapter": config}))
    host, adapter = own.build()
    before = {name: tensor.detach().clone() for name, tensor in adapter.tensors().items()}
    random = torch.get_rng_state()
    draw = Draw(own.data, own.recipe.training)
    start_by_gradient(host, adapter, draw, own.total_steps, 0, own.processes)
    gram = gram_by_transformers(own, min(STEPS, own.total_steps))
    found, chance = adapter.tensors()[f"{PATH}.lora_A"], before[f"{PATH}.lora_A"]
    assert captured(found, gram) > 0.9
    assert captured(chance, gram) < 0.4
    torch.testing.assert_close(found[0].norm(dim=1), torch.full((4,), 3**-0.5))
    assert torch.equal(random, torch.get_rng_state())
    for name, tensor in adapter.tensors().items():
        assert tensor.grad is None
        assert torch.equal(tensor, before[name]) is not name.endswith("lora_A")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        (
            ("adapter={method: multilora, down_start: gradient}",),
            "is not for multilora: its A has no",
        ),
        (
            ("adapter.down_start=gradient", "distributed.zero_stage=3"),
            "down_start: gradient does not go with zero_stage: 3",
        ),
    ],
)
def test_where_it_cannot_be_it_is_refused(
    recipe_file: str, changes: tuple[str, ...], error: str
) -> None:
    with pytest.raises(ProblemsError, match=error):
        load_recipe(recipe_file, changes)


@pytest.mark.parametrize("experts", ["each", "shared"])
def test_adapters_of_each_expert_are_refused(tmp_path: Path, experts: str) -> None:
    """One that nobody asks has no gradient; what experts share has one."""
    (model,) = (one for one in MODELS if str(one) == "qwen3_moe")
    base = find_base_model(str(build(model, tmp_path / "moe")))
    config = configure("lora", down_start="gradient", experts=experts, target_modules=["q_proj"])
    _, adapter = on_meta(base, config, ["a"])
    if experts == "shared":
        require_gradients(adapter)
        return
    with pytest.raises(UsageError, match=r"adapters of each expert .* take kaiming"):
        require_gradients(adapter)
