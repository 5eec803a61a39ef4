"""The shapes are those of the models that they are named after."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mtl_lora_cli.bench.random_model import empty_model, random_model
from mtl_lora_cli.bench.shapes import SHAPES, find_config, projections, require_shape
from mtl_lora_cli.bench.yardstick import supervised_share
from mtl_lora_cli.engine.families import plan_of
from mtl_lora_cli.engine.plan import matrix_weights
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.machine.rate import flop_per_token, known_rate

from ..often import often

WEIGHTS = {  # all weights of the published models
    "llama3-8b": 8_030_261_248,
    "llama3.2-3b": 3_212_749_824,
    "llama3.2-1b": 1_235_814_400,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "smollm2-135m": 134_515_008,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "gpt-oss-20b": 20_914_757_184,
    "gemma2-2b": 2_614_341_888,
    "smollm3-3b": 3_075_098_624,
    "olmo3-7b": 7_298_011_136,
    "phi4-mini": 3_836_021_760,
    "granite-2b": 2_533_531_648,
    "granite-8b": 8_170_848_256,
    "glm4-9b": 9_400_279_040,
    "qwen2.5-7b": 7_615_616_512,
    "gemma3-4b": 4_300_079_472 - 416_866_032 - 2_950_272,  # without what sees and its projector
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_shape_has_as_many_weights_as_its_model(name: str) -> None:
    model = empty_model(find_config(name), dtype=torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) == WEIGHTS[name]


@pytest.mark.parametrize("name", SHAPES)
def test_layer_weights_are_the_matrices_of_the_layers(name: str) -> None:
    model = empty_model(find_config(name), dtype=torch.float32)
    theirs = sum(
        p.numel()
        for key, p in model.model.layers.named_parameters()
        if key.endswith("_proj.weight")
    )
    s = SHAPES[name]
    if "num_experts_per_tok" in s:
        own = [p for p in model.model.layers.parameters() if p.ndim == 3]
        met = sum(p.numel() for p in own) * s["num_experts_per_tok"] // len(own[0])
        assert matrix_weights(model)[0] == theirs + met
        return
    width, heads, key_heads = (
        s[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    head = s.get("head_dim", width // heads)
    layer = 2 * width * (heads + key_heads) * head + 3 * width * s["intermediate_size"]
    assert matrix_weights(model)[0] == theirs == s["num_hidden_layers"] * layer
    plan = plan_of(model.config)
    projections = [
        one.get_submodule(path).weight.numel()
        for one, own in zip(plan.modules(model), plan.layers, strict=True)
        for group in own.groups
        for path in group
    ]
    assert sum(projections) == theirs


def test_the_floor_of_8b() -> None:
    """4 × 6.98 G = 27.9 GFLOP a token; 27,900 tokens/s at 780 TFLOP/s."""
    model = empty_model(find_config("llama3-8b"), dtype=torch.float32)
    layers, head = matrix_weights(model)
    assert head == model.lm_head.weight.numel()
    assert flop_per_token(layers, head, 0.0) == pytest.approx(27.9e9, rel=2e-3)
    rate = known_rate("NVIDIA H100 80GB HBM3")
    assert rate == 780e12
    assert rate / flop_per_token(layers, head, supervised_share()) == pytest.approx(
        27_900, rel=1e-2
    )
    assert known_rate("some other card") is None


def test_a_folder_is_a_shape(tmp_path: Path) -> None:
    find_config("tiny").save_pretrained(tmp_path)
    assert find_config(str(tmp_path)).hidden_size == SHAPES["tiny"]["hidden_size"]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    with pytest.raises(UsageError, match=r"config\.json cannot be read"):
        find_config(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(UsageError, match=r"holds no config\.json"):
        require_shape(str(tmp_path))
    with pytest.raises(UsageError, match="did you mean 'llama3-8b'"):
        require_shape("lama3-8b")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_random_model_is_whole(quantization: str, tied: bool) -> None:
    """Nothing is left on the meta device, and what is tied stays one weight."""
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes")
    config = find_config("tiny")
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    model = random_model(
        config,
        dtype=torch.float32,
        device=torch.device("cpu"),
        quantization=quantization,
        attention="sdpa",
    )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.device.type == "cpu", name
        assert not tensor.requires_grad, name
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    four_bit = model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    assert four_bit == (quantization == "nf4")
    assert model.lm_head.weight.dtype == torch.float32
    assert torch.equal(model.model.norm.weight, torch.ones(64))
    with torch.no_grad():
        logits = model(torch.randint(0, 256, (2, 9))).logits
    assert torch.isfinite(logits).all()
    assert logits.std() > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", often(["tiny", "qwen3-8b", "gemma3-4b"], ["tiny", "gemma3-4b"]))
def test_what_a_random_model_computes_is_what_its_configuration_says(name: str) -> None:
    """Rotary frequencies and scales, beside transformers' own model with few words and layers."""
    config = find_config(name)
    config.num_hidden_layers, config.vocab_size, config.intermediate_size = 6, 32, 16
    if config.layer_types if hasattr(config, "layer_types") else None:
        config.layer_types = config.layer_types[:6]
    cpu = torch.device("cpu")
    model = random_model(
        config, dtype=torch.float32, device=cpu, quantization="none", attention="sdpa"
    )
    theirs = dict(AutoModelForCausalLM.from_config(config).named_buffers())
    ours = dict(model.named_buffers())
    assert ours.keys() == theirs.keys() and ours
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_names_of_projections_are_the_shapes_own(tmp_path: Path) -> None:
    llama = ("q_proj", "k_proj", "v_proj", "o_proj")
    assert projections("llama3-8b") == {
        "qkvo": llama,
        "all": (*llama, "gate_proj", "up_proj", "down_proj"),
    }
    AutoConfig.for_model("phi3").save_pretrained(tmp_path)
    assert projections(str(tmp_path)) == {
        "qkvo": ("qkv_proj", "o_proj"),
        "all": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    }
    AutoConfig.for_model("gpt_neox").save_pretrained(tmp_path)
    assert projections(str(tmp_path)) == projections("tiny")
