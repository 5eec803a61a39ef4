"""A frozen base model drops nothing, in training mode neither: what is learned is what is evaluated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    DbrxConfig,
    DbrxForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
)

from mtl_lora_cli.adapters.inject import inject
from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.engine.segments import Segments
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.batch import PackedBatch
from mtl_lora_cli.models.load import load_config, load_model
from mtl_lora_cli.models.packed import PackedModel

IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8, 9, 7]])


def opt() -> PreTrainedModel:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=40, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=32, word_embed_proj_dim=32, dropout=0.5, attention_dropout=0.5,
            layerdrop=0.5,
        )
    )  # fmt: skip


def gpt_neo() -> PreTrainedModel:
    return GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=40, hidden_size=32, num_layers=2, attention_types=[[["global"], 2]], num_heads=4,
            max_position_embeddings=32, embed_dropout=0.5, attention_dropout=0.5, resid_dropout=0.5,
        )
    )  # fmt: skip


def experts(kind: str) -> PreTrainedModel:
    """Routers that draw in training mode: which expert is the second one, or what they multiply with."""
    sizes = {
        "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4,
        "router_jitter_noise": 0.3,
    }  # fmt: skip
    if kind == "phimoe":
        made: PreTrainedModel = PhimoeForCausalLM(PhimoeConfig(**sizes, input_jitter_noise=0.3))
    elif kind == "mixtral":
        made = MixtralForCausalLM(MixtralConfig(**sizes))
    else:
        of_layers = {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_jitter_eps": 0.3}
        heads = {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}
        config = DbrxConfig(
            vocab_size=40,
            d_model=32,
            n_heads=4,
            n_layers=2,
            attn_config=heads,
            ffn_config=of_layers,
        )
        made = DbrxForCausalLM(config)
    for parameter in made.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("kind", ["phimoe", "mixtral", "dbrx"])
def test_a_frozen_router_draws_nothing(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    stock = experts(kind)
    target = "Wqkv" if kind == "dbrx" else "q_proj"
    _is_evaluated_as_learned(stock, tmp_path, target)


@pytest.mark.parametrize("make", [opt, gpt_neo])
def test_what_is_learned_is_what_is_evaluated(
    make: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    _is_evaluated_as_learned(make(), tmp_path, "q_proj")
    config = load_config(find_base_model(str(tmp_path)))
    drops = [name for name in vars(config) if "drop" in name]
    assert len(drops) >= 3 and not any(getattr(config, name) for name in drops)


def _is_evaluated_as_learned(stock: PreTrainedModel, folder: Path, target: str) -> None:
    """In training mode, three times, it gives what transformers alone gives in evaluation mode."""
    stock.save_pretrained(folder)
    with torch.no_grad():
        expected = stock.eval()(input_ids=IDS).logits.log_softmax(-1)[0, :-1]
        expected = expected.gather(1, IDS[0, 1:, None])[:, 0]
    base = find_base_model(str(folder))
    model = load_model(base, dtype=torch.float32, device=torch.device("cpu"))
    adapter = inject(model, configure(rank=2, target_modules=(target,)), ["a"])
    packed = PackedModel(model, adapter).train()
    count = IDS.shape[1] - 1
    batch = PackedBatch(
        input_ids=IDS[:, :count],
        position_ids=torch.arange(count).unsqueeze(0),
        task_ids=torch.zeros(1, count, dtype=torch.long),
        segments=Segments.build([count]),
        positions=torch.arange(count),
        owner=torch.arange(count),
        targets=IDS[0, 1:],
    )
    for _ in range(3):
        with packed.routed(batch):
            torch.testing.assert_close(packed(batch).detach(), expected, rtol=1e-5, atol=1e-5)
