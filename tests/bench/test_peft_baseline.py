"""PEFT trains on the same examples."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mtl_lora_cli.bench import peft_baseline, rival
from mtl_lora_cli.bench.case import Measuring
from mtl_lora_cli.bench.cases import Case
from mtl_lora_cli.bench.yardstick import lengths

pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_baseline, "BATCHES", (2, 4))


def test_every_setting_and_the_best(tiny: Case, measuring: Measuring) -> None:
    told: list[str] = []
    entries = peft_baseline.run_all(tiny, measuring, lambda entry: told.append(entry["name"]))
    assert told == ["tiny peft float32 batch 2", "tiny peft float32 batch 4"]
    for entry in entries:
        size = entry["batch_size"]
        assert entry["status"] == "done"
        # Six batches, two of them not timed.
        assert entry["tokens"] == [
            sum(one.tokens for one in lengths()[size * i : size * i + size]) for i in range(2, 6)
        ]
        assert entry["trained_parameters"] == 2 * 8 * (4 * 64 + 64 + 32 + 32 + 64)
        assert entry["loss"] == pytest.approx(torch.tensor(256.0).log().item(), abs=0.3)
    (best,) = [entry for entry in entries if entry["best"]]
    assert best["tokens_per_second"] == max(entry["tokens_per_second"] for entry in entries)


def test_four_bit_base(tiny: Case, measuring: Measuring) -> None:
    """PEFT takes our 4-bit layers for its own kind, and trains no base weight."""
    pytest.importorskip("bitsandbytes")
    model = rival.peft_model(tiny, measuring, "nf4", checkpointing=False)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert type(layer).__module__ == "peft.tuners.lora.bnb"
    found = peft_baseline._run(model, tiny, measuring, 2)
    assert found["trained_parameters"] == 2 * 8 * (4 * 64 + 64 + 32 + 32 + 64)


@pytest.mark.slow
def test_checkpointing_only_where_nothing_else_fits(
    tiny: Case, measuring: Measuring, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[bool, int]] = []
    run = peft_baseline._run

    def short_of_memory(model: object, case: Case, how: Measuring, size: int) -> dict[str, object]:
        checkpointing = model.base_model.model.is_gradient_checkpointing  # type: ignore[attr-defined]
        tried.append((checkpointing, size))
        if not checkpointing or size > 2:
            raise torch.OutOfMemoryError
        return run(model, case, how, size)

    monkeypatch.setattr(peft_baseline, "_run", short_of_memory)
    entries = peft_baseline.run_all(replace(tiny, tasks=1), measuring, lambda _: None)
    assert tried == [(False, 2), (True, 2), (True, 4)], "what is larger does not fit either"
    assert [entry["reason"] for entry in entries] == [
        "does not fit",
        "does not fit",
        None,
        "does not fit",
    ]
    assert [entry["best"] for entry in entries] == [False, False, True, False]
