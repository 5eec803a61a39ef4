"""The rival is built right: its loss and gradients are those of each example alone, on our rows."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from mtl_lora_cli.bench import packed_baseline
from mtl_lora_cli.bench.case import Measuring
from mtl_lora_cli.bench.cases import Case
from mtl_lora_cli.bench.packed_baseline import mean_loss, packed_rows
from mtl_lora_cli.bench.rival import peft_model
from mtl_lora_cli.bench.shapes import SHAPES
from mtl_lora_cli.bench.yardstick import Yardstick

pytest.importorskip("peft")


def test_it_trains_on_every_token_of_our_rows(tiny: Case, measuring: Measuring) -> None:
    told: list[str] = []
    entries = packed_baseline.run_all(tiny, measuring, lambda entry: told.append(entry["name"]))
    assert told == [
        "tiny packed peft eager float32, 1 row",
        "tiny packed peft eager float32, 2 rows",
    ]
    ours = Yardstick.build(256, tiny.tasks, measuring.seed)
    for entry, rows in zip(entries, (1, 2), strict=True):
        assert entry["status"] == "done", entry["reason"]
        steps = ours.steps(6, row_length=512, rows_per_step=rows, rows_per_pass=rows, seed=0)
        assert entry["tokens"] == [step.tokens for step in steps[2:]]
        assert entry["trained_parameters"] == 2 * 8 * (4 * 64 + 64 + 32 + 32 + 64)
    assert [entry["best"] for entry in entries].count(True) == 1


@pytest.mark.parametrize("window", [None, 16])
def test_packed_is_as_each_example_alone(
    window: int | None, tiny: Case, measuring: Measuring, monkeypatch: pytest.MonkeyPatch
) -> None:
    if window is not None:
        sizes = SHAPES["tiny"] | {"model_type": "mistral", "sliding_window": window}
        monkeypatch.setitem(SHAPES, "tiny", sizes)
    packed_baseline._register()
    model = peft_model(
        tiny, measuring, "none", checkpointing=False, attention=packed_baseline.NAME, narrow=True
    )
    torch.manual_seed(1)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.normal_(std=0.3)
    plain = peft_model(tiny, measuring, "none", checkpointing=False)
    plain.load_state_dict(model.state_dict())
    (row,) = packed_rows(Yardstick.build(256, 3, 0), 512, 1, 1, 0)
    mean_loss(model, row.to(torch.device("cpu"))).backward()
    bounds = row.bounds.tolist()
    losses = []
    for start, end in pairwise(bounds):
        asked = (row.asked >= start) & (row.asked < end)
        if asked.any():
            logits = plain(input_ids=row.input_ids[:, start:end]).logits[0]
            chosen = logits[row.asked[asked] - start].log_softmax(-1)
            losses.append(-chosen[torch.arange(len(chosen)), row.targets[asked]])
    torch.cat(losses).mean().backward()
    for (name, one), (_, other) in zip(
        model.named_parameters(), plain.named_parameters(), strict=True
    ):
        if one.requires_grad:
            assert one.grad is not None and other.grad is not None, name
            assert torch.allclose(one.grad, other.grad, atol=1e-6, rtol=1e-4), name


@pytest.mark.parametrize(
    ("shape", "what"),
    [
        ("gpt-oss-20b", ", without its sinks"),
        ("gemma2-2b", ", without its soft caps"),
        ("llama3-8b", ""),
    ],
)
def test_a_rival_names_what_it_leaves_out(measuring: Measuring, shape: str, what: str) -> None:
    case = Case(shape, shape, {"method": "lora"})
    name = packed_baseline._entry(case, measuring, "compile", 2)["name"]
    assert name.endswith(f"2 rows{what}")
