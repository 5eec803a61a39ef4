"""What the loss is: a mean over supervised tokens, however rows are grouped, weighted by task."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.training.prepared import Prepared


def test_the_first_loss_is_the_plain_models_mean_over_answer_tokens(
    small: Callable[..., Any], stories_folder: Any
) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(stories_folder, attn_implementation="eager").eval()
    run = small(steps=1).train()
    data = run.trainer.data
    sums: dict[str, list[float]] = {}
    for row in data.mixture.step(0)[1]:
        for task, number in row:
            split = data.splits[task]
            tokens = torch.from_numpy(split.example(number).astype("int64"))
            with torch.no_grad():
                logits = plain(tokens[None]).logits[0].log_softmax(-1)
            first = int(split.prompt_lengths[number])
            for place in range(first, len(tokens)):
                loss = -float(logits[place - 1, tokens[place]])
                sums.setdefault(data.tasks[task].name, []).append(loss)
    (event,) = run.events
    everything = [loss for losses in sums.values() for loss in losses]
    assert event["supervised"] == len(everything)
    assert event["loss"] == pytest.approx(sum(everything) / len(everything), abs=1e-4)
    assert set(event["task_loss"]) == set(sums)
    for name, losses in sums.items():
        assert event["task_loss"][name] == pytest.approx(sum(losses) / len(losses), abs=1e-4)


@pytest.mark.slow
def test_rows_may_pass_one_by_one_or_together(small: Callable[..., Any]) -> None:
    losses = []
    for rows in (1, 2, 4):
        run = small(rows_per_pass=rows, adapter=configure(rank=4))  # without dropout
        losses.append([event["loss"] for event in run.train().events])
    assert len(losses[0]) == 6
    for others in losses[1:]:
        assert others == pytest.approx(losses[0], abs=1e-5)


def test_the_loss_falls(small: Callable[..., Any]) -> None:
    losses = [event["loss"] for event in small(steps=15).train().events]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_the_reported_loss_is_weighted_and_the_tasks_losses_are_not(
    small: Callable[..., Any],
) -> None:
    plain = small(steps=1).train().events[0]
    heavy = small(steps=1, weights=(3.0,) * 4).train().events[0]
    assert heavy["task_loss"] == plain["task_loss"]
    assert heavy["loss"] == pytest.approx(3 * plain["loss"])
    assert heavy["gradient_norm"] == pytest.approx(3 * plain["gradient_norm"], rel=1e-4)


@pytest.mark.slow
def test_a_tasks_weight_scales_its_part_of_the_gradient(
    small: Callable[..., Any], prepared: Prepared
) -> None:
    """|w g₁ + g₂|² follows from |g₁|², |g₂|² and |g₁ + g₂|²."""
    names = [task.name for task in prepared.data.tasks]
    learned = names.index(min(small(steps=1).train().events[0]["task_loss"]))  # in the first step

    def square(one: float, others: float) -> float:
        weights = [others] * len(names)
        weights[learned] = one
        run = small(steps=1, weights=tuple(weights)).train()
        return run.events[0]["gradient_norm"] ** 2

    tiny = 1e-9
    first, rest, both = square(1, tiny), square(tiny, 1), square(1, 1)
    assert first > 0.01 * both
    expected = 9 * first + rest + 3 * (both - first - rest)
    assert square(3, 1) == pytest.approx(expected, rel=1e-3)


def test_loss_on_all_supervises_prompts_too(small: Callable[..., Any]) -> None:
    event = small(steps=1, loss_on="all").train().events[0]
    data = small().trainer.data
    examples = [place for row in data.mixture.step(0)[1] for place in row]
    assert event["supervised"] == event["tokens"] - len(examples)


def test_gradients_are_clipped(small: Callable[..., Any]) -> None:
    """Plain clipping shows in what AdamW keeps of the first gradient: 0.1 of it."""
    run = small(steps=1, max_gradient_norm=0.01).train()
    assert run.events[0]["gradient_norm"] > 0.1
    inner = run.trainer.stepper.update.optimizer
    kept = [inner.state[t]["exp_avg"] for t in run.trainer.adapter.tensors().values()]
    norm = math.sqrt(sum(float(t.double().square().sum()) for t in kept))
    assert norm == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_the_learning_rate_follows_the_schedule(small: Callable[..., Any]) -> None:
    from mtl_lora_cli.training.schedule import learning_rate_factor

    run = small(steps=4, learning_rate=0.5, warmup=0.5, schedule="linear").train()
    rates = [event["learning_rate"] for event in run.events]
    assert rates == [0.5 * learning_rate_factor(i, 4, 0.5, "linear") for i in range(4)]
    assert rates == pytest.approx([0.5 / 3, 1 / 3, 0.5, 0.25])
