"""A case trains for real, and what it reports agrees with itself. Nothing here looks at a clock."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mtl_lora_cli.bench import case as bench
from mtl_lora_cli.bench import measure
from mtl_lora_cli.bench.case import LEARNING_RATE, Measuring, adapter_of_case, run_case
from mtl_lora_cli.bench.cases import Case, plan
from mtl_lora_cli.bench.timing import time_steps
from mtl_lora_cli.bench.yardstick import Yardstick
from mtl_lora_cli.errors import MtlLoraError, UsageError


@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_a_case(tiny: Case, measuring: Measuring, engine: str) -> None:
    case = replace(tiny, engine=engine)
    result = run_case(case, measuring)
    steps = Yardstick.build(256, 8, 0).steps(
        3, row_length=512, rows_per_step=2, rows_per_pass=1, seed=0
    )
    assert result["tokens"] == [step.tokens for step in steps[1:]]
    assert result["supervised"] == [step.supervised for step in steps[1:]]
    assert len(result["seconds"]) == len(result["losses"]) == 2
    low, middle, high = (result[f"tokens_per_second{end}"] for end in ("_min", "", "_max"))
    assert low <= middle <= high
    flop = 4 * result["layer_weights"] + 4 * result["head_weights"] * 21_600 / 327_456
    assert result["floor"]["flop_per_token"] == pytest.approx(flop)
    assert result["share_of_floor"] == pytest.approx(middle * flop / 1e11)
    assert result["share_of_known_floor"] is None
    assert result["peak_memory_gib"] is None
    # A [8, 64] each, and (64 + 32 + 32 + 64) · 3 · 8 of B, 8 transforms [8, 8] and gates [3] a layer.
    layer = 4 * 8 * 64 + (64 + 32 + 32 + 64) * 3 * 8 + 4 * 8 * (64 + 3)
    assert result["trained_parameters"] == 2 * layer
    assert result["loss"] == pytest.approx(torch.tensor(256.0).log().item(), abs=0.3)


def test_a_step_is_the_training_loops(tiny: Case, measuring: Measuring) -> None:
    """The mean of −log p over all passes, its clipped gradient, AdamW: by hand."""
    from mtl_lora_cli.adapters.inject import inject
    from mtl_lora_cli.bench.random_model import random_model
    from mtl_lora_cli.bench.shapes import find_config
    from mtl_lora_cli.models import registered
    from mtl_lora_cli.models.packed import PackedModel
    from mtl_lora_cli.training.capacity import PassSizes
    from mtl_lora_cli.training.step import Stepper
    from mtl_lora_cli.training.update import ParameterGroup, make_optimizer

    registered.register()
    made, adapters = [], []
    for _ in range(2):
        torch.manual_seed(3)
        model = random_model(
            find_config("tiny"),
            dtype=torch.float32,
            device=torch.device("cpu"),
            quantization="none",
            attention=registered.NAME,
        )
        adapter = inject(model, adapter_of_case(**tiny.adapter), [str(i) for i in range(8)])
        packed = PackedModel(model, adapter).train()
        parameters = list(adapter.tensors().values())
        group = ParameterGroup(parameters, LEARNING_RATE, weight_decay=0.0)
        optimizer = make_optimizer([group], graphed=False)
        adapters.append(adapter)
        made.append((packed, parameters, optimizer))
    step = Yardstick.build(256, 8, 0).steps(
        1, row_length=512, rows_per_step=2, rows_per_pass=1, seed=0
    )[0]
    packed, parameters, optimizer = made[0]
    stepper = Stepper(
        packed,
        adapters[0],
        lambda number: bench._plan_of(step),
        total=1,
        groups=[ParameterGroup(parameters, LEARNING_RATE, weight_decay=0.0)],
        max_norm=0.01,
        sizes=PassSizes(512, 8),
    )
    losses = stepper.launch(0, 1.0).losses
    loss = float(losses.sum()) / step.supervised

    packed, expected, optimizer = made[1]
    total = torch.zeros(())
    for batch in step.batches:
        with packed.routed(batch):
            total = total - packed(batch).sum() / step.supervised
    total.backward()
    norm = torch.stack([p.grad.norm() for p in expected if p.grad is not None]).norm()
    assert norm > 0.01, "the gradient is clipped"
    for parameter in expected:
        if parameter.grad is not None:
            parameter.grad.mul_(0.01 / (norm + 1e-6))
    optimizer.step()
    assert loss == pytest.approx(float(total.detach()), rel=1e-5)
    for mine, theirs in zip(parameters, expected, strict=True):
        assert mine.grad is None
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_nf4(tiny: Case, measuring: Measuring) -> None:
    pytest.importorskip("bitsandbytes")
    result = run_case(replace(tiny, quantization="nf4"), measuring)
    assert result["layer_weights"] == run_case(tiny, measuring)["layer_weights"]


def test_what_is_not_known_here_is_said(tiny: Case, measuring: Measuring) -> None:
    with pytest.raises(UsageError, match="--method: unknown method 'loha'"):
        adapter_of_case("loha", 8)
    with pytest.raises(UsageError, match="'foo' matches no linear layer"):
        run_case(replace(tiny, adapter={**tiny.adapter, "target_modules": ("foo",)}), measuring)
    with pytest.raises(UsageError, match="too many for a CPU"):
        run_case(replace(tiny, shape="llama3-8b"), measuring)


@pytest.mark.slow
def test_one_failure_leaves_the_others(
    tiny: Case, measuring: Measuring, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = {
        "tiny mtl-lora nf4": torch.OutOfMemoryError("CUDA out of memory"),
        "tiny lora": UsageError("no such method"),
        "tiny mtl-lora all": RuntimeError("a kernel\nis broken"),
    }
    done = {"shape": "tiny", "tokens_per_second": 1.0, "peak_memory_gib": None}

    def run(case: Case, _: Measuring) -> dict[str, object]:
        if case.name in faults:
            raise faults[case.name]
        return dict(done)

    monkeypatch.setattr(measure, "run_case", run)
    whole = plan(tiny, table="yardstick", versus=[], own_shape=True)
    planned = replace(whole, peft=None, packed=None)
    said: list[str] = []
    report = measure.run_plan(planned, measuring, said.append)
    assert {case["name"]: case["reason"] for case in report["cases"]} == {
        "tiny mtl-lora": None,
        "tiny mtl-lora nf4": "does not fit",
        "tiny lora": "no such method",
        "tiny mtl-lora all": "RuntimeError: a kernel is broken",
        "tiny mtl-lora fp8": "FP8 needs a CUDA card",
    }
    assert said[0] == "tiny mtl-lora: 1 tokens/s"
    alone = replace(planned, cases=planned.cases[:1])
    faults["tiny mtl-lora"] = UsageError("not here")
    with pytest.raises(UsageError, match="not here"):
        measure.run_plan(alone, measuring, said.append)


def test_a_loss_must_be_finite() -> None:
    with pytest.raises(MtlLoraError, match="not a finite number in step 2"):
        time_steps(
            lambda loss: loss,
            [1.0, float("nan")],
            lambda _: 1,
            warmup=0,
            device=torch.device("cpu"),
        )
