"""A frozen base model drops nothing, in training mode neither: what is learned is what is evaluated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

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


@pytest.mark.parametrize("make", [opt, gpt_neo])
def test_what_is_learned_is_what_is_evaluated(
    make: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    stock = make()  # type: ignore[operator]
    stock.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = stock.eval()(input_ids=IDS).logits.log_softmax(-1)[0, :-1]
        expected = expected.gather(1, IDS[0, 1:, None])[:, 0]
    base = find_base_model(str(tmp_path))
    model = load_model(base, dtype=torch.float32, device=torch.device("cpu"))
    adapter = inject(model, configure(rank=2, target_modules=("q_proj",)), ["a"])
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
    drops = [name for name in vars(load_config(base)) if "drop" in name]
    assert len(drops) >= 3 and not any(getattr(load_config(base), name) for name in drops)
