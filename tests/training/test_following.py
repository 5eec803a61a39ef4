"""What follows the losses of a run: stopped and resumed it is the same, and each rule is its formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtl_lora_cli.data.dynamic import DynamicMixture
from mtl_lora_cli.data.mixture import generator_of
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.recipe.mixing import DynamicMixing
from mtl_lora_cli.recipe.training import Balance
from mtl_lora_cli.runs.folder import RunFolder
from mtl_lora_cli.training.balance import GradNorm, Uncertainty
from mtl_lora_cli.training.checkpoints import newest_checkpoint
from mtl_lora_cli.training.following import LAG, FollowingShares
from mtl_lora_cli.training.loop import Trainer
from mtl_lora_cli.training.prepare import prepare
from mtl_lora_cli.training.prepared import ReadyRun
from mtl_lora_cli.training.reference import losses_of
from mtl_lora_cli.training.surgery import projected

from ..often import often
from .conftest import Small

STEPS = 8
BASE = (f"training.max_steps={STEPS}", "training.epochs=9", "training.rows_per_step=4")
# Three runs hold all that follows the losses, and what else says which rows come when.
KINDS: dict[str, tuple[str, ...]] = {
    "excess_loss": (
        "mixing={dynamic: excess_loss, every: 4, reference: {sst2: 1.5}}",
        "training.balance=uncertainty",
    ),
    "progress": (
        "mixing={dynamic: progress, every: 4, start: uniform}",
        "training.balance={method: gradnorm, every: 2}",
    ),
    "stages": (
        "training.epochs=1",
        "training.stages=[{tasks: [sst2, rte], epochs: 0.1}, {tasks: [rte, cola, home_depot]}]",
        "training.balance=pcgrad",
        "training.rows=one_task",
    ),
}


@pytest.fixture
def built(recipe_file: Path, tmp_path: Path) -> Callable[..., Small]:
    """`built(*overrides, folder=None)`: a run of the small recipe, ready to be trained."""

    def build(*overrides: str, folder: Path | None = None) -> Small:
        prepared = prepare(load_recipe(recipe_file, [*BASE, *overrides]))
        host, adapter = prepared.build()
        path = folder or tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        path.mkdir(exist_ok=True)
        run = RunFolder(path)
        ready = ReadyRun(prepared, run, host, adapter)
        return Small(Trainer(ready, prepared.observers(host, adapter)), run)

    return build


def told(run: Small) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock says."""
    clock = ("seconds", "tokens_per_second", "memory_gib")
    return [{k: v for k, v in event.items() if k not in clock} for event in run.events]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    often(["excess_loss", "progress", "stages"], ["stages"]),
)
def test_a_stopped_run_goes_on_to_the_last_bit(built: Callable[..., Small], kind: str) -> None:
    """Stopped inside a block and behind a decision that no row was drawn by yet."""
    whole = built(*KINDS[kind]).train()
    stopped = built(*KINDS[kind]).train(stop_after=5)
    again = built(*KINDS[kind], folder=stopped.run.path)
    torch.manual_seed(999)
    again.trainer.resume(newest_checkpoint(stopped.run.checkpoints))
    again.train()
    assert told(again) == told(whole)
    ours, theirs = again.tensors, whole.tensors
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    seen = {one["event"] for one in told(whole)}
    assert seen == ({"step"} if kind == "stages" else {"step", "mixing", "balance"})


def filled(names: tuple[str, ...], signal: dict[str, float]) -> np.ndarray:
    """Where nothing is known of a task, the mean of the others."""
    middle = sum(signal.values()) / max(1, len(signal))
    return np.array([signal.get(name, middle) for name in names])


@pytest.mark.parametrize("kind", ["excess_loss", "progress"])
def test_shares_are_their_formula(kind: str) -> None:
    """By the formulas of docs/mixtures.md, from losses of which a task has none for a while."""
    settings = DynamicMixing.model_validate(
        {"dynamic": kind, "every": 4, "floor": 0.2, "rate": 0.7}
        | ({"reference": {"a": 1.5}} if kind == "excess_loss" else {"keep": 0.25})
    )
    names, sizes = ("a", "b", "c"), np.array([90, 30, 60])
    lengths = tuple(np.full(size, 5) for size in sizes)
    mixture = DynamicMixture(names, lengths, row_length=16, rows_per_step=2, every=4, seed=3)
    rule = FollowingShares(mixture, settings, 30)
    generator = np.random.default_rng(1)
    start = sizes / sizes.sum()
    shares, losses, slope = start, dict[str, float](), dict[str, float]()
    sums, counts = np.zeros(3), np.zeros(3)
    for number in range(30):
        units = generator.integers(1, 9, 3)
        units[2] = 0 if number < 8 else units[2]
        loss = generator.uniform(0.2, 4, 3) * units
        seen = rule.observe(number, loss.tolist(), units.tolist())
        sums, counts = sums + loss, counts + units
        if (number + LAG) % 4 or number + LAG >= 30:
            assert seen is None
            continue
        before = dict(losses)
        losses |= {n: s / c for n, s, c in zip(names, sums, counts, strict=True) if c}
        sums, counts = np.zeros(3), np.zeros(3)
        if kind == "excess_loss":
            signal = {n: max(0.0, v - {"a": 1.5}.get(n, 0.0)) for n, v in losses.items()}
            raw = shares * np.exp(0.7 * filled(names, signal))
        else:
            for n in before:
                change = before[n] - losses[n]
                slope[n] = 0.25 * slope[n] + 0.75 * change if n in slope else change
            raw = start * np.exp(0.7 * filled(names, {n: abs(v) for n, v in slope.items()}))
        shares = 0.8 * raw / raw.sum() + 0.2 * start
        assert seen is not None
        assert list(seen.event["shares"].values()) == pytest.approx(shares.tolist(), abs=1e-12)
        block = (number + LAG) // 4
        assert seen.event["from_step"] == 4 * block + 1
        assert list(mixture.block(block).shares) == pytest.approx(shares.tolist(), abs=1e-12)


def test_uncertainty_against_autograd() -> None:
    """s follows the gradient of Σ exp(−s) L + s / 2, and what it says holds three steps later."""
    rule = Uncertainty(["a", "b", "c"], Balance(method="uncertainty", rate=0.1))
    logs = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    generator = np.random.default_rng(0)
    after = []
    for number in range(20):
        held = torch.ones(3) if number < LAG else after[number - LAG]
        assert torch.allclose(rule.factors.at(number), held, rtol=1e-6)
        counts = [int(n) for n in generator.integers(1, 9, 3)]
        counts[number % 3] = 0
        sums = [float(v) * n for v, n in zip(generator.uniform(0.1, 4, 3), counts, strict=True)]
        there = torch.tensor([bool(n) for n in counts])
        means = torch.tensor([s / n if n else 0.0 for s, n in zip(sums, counts, strict=True)])
        loss = ((-logs).exp() * means.double() + logs / 2)[there].sum()
        (gradient,) = torch.autograd.grad(loss, logs)
        logs = (logs - 0.1 * gradient).detach().requires_grad_()
        rule.observe(number, sums, counts)
        after.append((-logs).exp().detach().float())
        assert torch.allclose(after[-1], torch.tensor(rule.factors._coming[-1]), rtol=1e-6)


def test_gradnorm_against_autograd(built: Callable[..., Small]) -> None:
    """λ follows the gradient of Σ |G_t − Ḡ r_t^α| with the target held fixed, at gradients of autograd's."""
    run = built(
        "training.balance={method: gradnorm, every: 1, rate: 0.01, alpha: 0.5}", "adapter.dropout=0"
    )
    (rule,) = run.trainer._following
    assert isinstance(rule, GradNorm)
    factors, first = torch.ones(4, dtype=torch.float64), {}
    for step in range(3):
        event = rule.look(step + 1)
        drawn = run.trainer._draw(step)
        norms, losses = {}, {}
        for task in drawn.tasks:
            places = [p for row in drawn.rows for p in row if p[0] == task]
            host, adapter = run.trainer.host, run.trainer.adapter
            batch = run.trainer._draw.batch([places])
            shared = [t for n, t in adapter.tensors().items() if not adapter.role(n).per_task]
            host.train(False)
            with host.routed(batch):
                loss = host.losses(batch).mean()
            found = torch.autograd.grad(loss, shared)
            norms[task] = math.sqrt(sum(float(g.double().square().sum()) for g in found))
            losses[task] = loss.item()
            first.setdefault(task, losses[task])
        own = list(norms)
        rates = torch.tensor([losses[t] / first[t] for t in own], dtype=torch.float64)
        lam = factors[own].clone().requires_grad_()
        pull = lam * torch.tensor([norms[t] for t in own], dtype=torch.float64)
        target = (pull.mean() * (rates / rates.mean()) ** 0.5).detach()
        (gradient,) = torch.autograd.grad((pull - target).abs().sum(), lam)
        factors[own] = (lam - 0.01 * gradient).detach()
        factors *= 4 / factors.sum()
        assert event is not None
        assert list(event.event["factors"].values()) == pytest.approx(factors.tolist(), rel=1e-4)


def naive_pcgrad(gradients: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Algorithm 1 of arXiv 2001.06782, vector by vector."""
    projected_ = gradients.copy()
    for i in range(len(gradients)):
        for j in generator.permutation(len(gradients)):
            if i != j and (product := projected_[i] @ gradients[j]) < 0:
                projected_[i] -= product / (gradients[j] @ gradients[j]) * gradients[j]
    return projected_.sum(0)


@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_projections_against_the_papers_algorithm(tasks: int) -> None:
    generator = np.random.default_rng(tasks)
    for number in range(20):
        gradients = generator.normal(size=(tasks, 3))
        if number == 1:
            gradients[0] = 0
        ours = projected(torch.from_numpy(gradients), np.random.default_rng(number))
        theirs = naive_pcgrad(gradients, np.random.default_rng(number))
        assert np.allclose(ours.numpy(), theirs, atol=1e-12)


def test_pcgrad_without_conflict_is_the_ordinary_gradient(built: Callable[..., Small]) -> None:
    """And with it, it is what the algorithm makes of each task's own gradient."""
    many = "training.rows_per_step=8"
    plain = built("adapter.dropout=0", many)
    run = built("training.balance=pcgrad", "adapter.dropout=0", many)
    for one in (plain, run):
        one.trainer.host.train()
    plain.trainer.stepper.accumulate(plain.trainer.stepper.prepare(0))
    prepared = run.trainer.stepper.prepare(0)
    run.trainer.stepper.accumulate(prepared)
    tasks = prepared.planned.tasks
    assert len(tasks) > 1
    names = list(run.tensors)
    shared = [n for n in names if not run.trainer.adapter.role(n).per_task]
    ours, usual = run.trainer.adapter.tensors(), plain.trainer.adapter.tensors()
    for name in names:  # what is a task's own learns as ever
        if name not in shared:
            assert torch.allclose(ours[name].grad, usual[name].grad, atol=1e-7)
    own = []
    for task in tasks:
        alone = built("adapter.dropout=0", many)
        alone.trainer.host.train()
        planned = alone.trainer.stepper.prepare(0)
        for ready, owner in zip(planned.passes, planned.planned.owners, strict=True):
            ready.weights.mul_(owner == task)
        alone.trainer.stepper.accumulate(planned)
        tensors = alone.trainer.adapter.tensors()
        own.append(torch.cat([tensors[name].grad.reshape(-1) for name in shared]).double().numpy())
    expected = naive_pcgrad(np.stack(own), generator_of(0, "pcgrad", 0))
    got = torch.cat([ours[name].grad.reshape(-1) for name in shared]).double().numpy()
    assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()
    total = torch.cat([usual[name].grad.reshape(-1) for name in shared]).double().numpy()
    assert np.abs(sum(own) - total).max() < 1e-5 * np.abs(total).max()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            ["training.balance=pcgrad", "distributed.zero_stage=1"],
            "pcgrad does not go with zero_stage: 1",
        ),
        (
            ["training.balance=gradnorm", "distributed.zero_stage=3"],
            "gradnorm does not go with zero_stage: 3",
        ),
        (
            ["training.balance={method: pcgrad, rate: 1}"],
            "'rate' is read by uncertainty and gradnorm only",
        ),
        (
            ["mixing={dynamic: progress, reference: {sst2: 1}}"],
            "'reference' is read with dynamic: excess_loss",
        ),
        (["mixing={dynamic: excess_loss, reference: {sst3: 1}}"], "'sst3' is no task"),
        (["mixing={dynamic: excess_loss, reference_run: nowhere}"], "no folder of a run"),
        (
            [
                "mixing={dynamic: progress}",
                "training.stages=[{tasks: [sst2]}]",
                "training.epochs=1",
            ],
            "mixing.dynamic does not go with training.stages",
        ),
        (["training.stages=[{tasks: [sst2]}]"], "'epochs' is not read with 'stages'"),
        (["training.stages=[{tasks: [sst2]}]", "training.epochs=1"], "task 'rte' is in no stage"),
        (["training.stages=[{tasks: [sst]}]", "training.epochs=1"], "unknown task 'sst'"),
    ],
)
def test_what_does_not_go_together_is_refused(
    recipe_file: Path, override: list[str], said: str
) -> None:
    with pytest.raises(UsageError, match=said.replace("'", ".").replace("{", ".")):
        prepare(load_recipe(recipe_file, [*BASE, *override]))


def test_a_run_as_the_reference(built: Callable[..., Small], recipe_file: Path) -> None:
    run = built().train()
    losses = losses_of(run.run)
    steps = [event["task_loss"] for event in run.events if event["event"] == "step"]
    known = {name: value for step in steps for name, value in step.items() if value is not None}
    assert (
        losses == known
    )  # the last one of each: a tenth of six steps is the last, and has not all tasks
    assert set(known) > {name for name, value in steps[-1].items() if value is not None}
