"""How fast an adapted layer and a whole training step are on the CPU; run by `make benchmark`.

Each is timed in turns with a yardstick, so that what else the machine does meets both, and the ratio
of the two medians is printed and stored with the result. No time is asserted: machines differ. Save
results with `--benchmark-autosave` and compare them with `pytest-benchmark compare`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import nn

from mtl_lora_cli.adapters.inject import inject
from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.bench.yardstick import Yardstick
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.models.base import BaseModel, find_base_model
from mtl_lora_cli.models.load import load_model
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.training.passes import EagerPasses
from mtl_lora_cli.training.update import ParameterGroup, Update, make_optimizer

POSITIONS = 512
TASKS = tuple(f"task{number}" for number in range(8))
SideBySide = Callable[..., None]


@pytest.fixture
def side_by_side(
    benchmark: Any, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> SideBySide:
    """Times `subject`, before each round of it `yardstick`, and prints the ratio."""

    def run(
        subject: Callable[[], object], yardstick: Callable[[], object], *, rounds: int, of: str
    ) -> None:
        seconds: list[float] = []

        def before() -> None:
            started = time.perf_counter()
            yardstick()
            seconds.append(time.perf_counter() - started)

        benchmark.pedantic(subject, setup=before, rounds=rounds, warmup_rounds=2)
        subject_s, yardstick_s = benchmark.stats.stats.median, median(seconds[2:])
        benchmark.extra_info |= {
            "threads": torch.get_num_threads(),
            "yardstick": of,
            "yardstick_seconds": yardstick_s,
            "ratio": subject_s / yardstick_s,
        }
        with capsys.disabled():
            print(
                f"\n{request.node.name}: {subject_s * 1e3:,.1f} ms, {of} {yardstick_s * 1e3:,.1f} ms, "
                f"ratio {subject_s / yardstick_s:.3f} ({torch.get_num_threads()} threads)"
            )

    return run


class _Gate(nn.Module):
    """One layer under a name that an adapter can be put on."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(576, 1536, bias=False)


def test_one_layer(side_by_side: SideBySide) -> None:
    """Forward and backward of SmolLM2's gate projection, with an adapter and without."""
    torch.manual_seed(0)
    model = _Gate()
    adapter = inject(model, configure(target_modules=("proj",)), TASKS)
    with torch.no_grad():
        model.proj.lora_B.normal_()
    plain = nn.Linear(576, 1536, bias=False).requires_grad_(False)
    x = torch.randn(POSITIONS, 576, requires_grad=True)
    dy = torch.randn(POSITIONS, 1536)
    tasks = torch.arange(POSITIONS) // 8 % len(TASKS)

    def adapted() -> None:
        x.grad = None
        for tensor in adapter.tensors().values():
            tensor.grad = None
        with adapter.routing.assign(tasks):
            model.proj(x).backward(dy)

    def frozen() -> None:
        x.grad = None
        plain(x).backward(dy)

    side_by_side(adapted, frozen, rounds=100, of="frozen layer")


@pytest.fixture(scope="module")
def smollm2() -> BaseModel:
    try:
        return find_base_model("smollm2-135m")
    except UsageError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def stories(stories_folder: Path) -> BaseModel:
    return find_base_model(str(stories_folder))


def _steps(base: BaseModel, engine: Any) -> Callable[[], object]:
    """What does one optimiser step after the other: forward, backward, clip, AdamW."""
    torch.manual_seed(0)
    device = torch.device("cpu")
    model = load_model(base, dtype=torch.float32, device=device)
    adapter = inject(model, configure(target_modules=("*_proj",)), TASKS)
    packed = PackedModel(model, adapter, engine=engine).train()
    parameters = list(adapter.tensors().values())
    optimizer = make_optimizer([ParameterGroup(parameters, 3e-4, 0.0)], graphed=False)
    update = Update(parameters, optimizer, 1.0, graphed=False)
    passes = EagerPasses(packed.losses, packed, device)
    rows = Yardstick.build(model.config.vocab_size, len(TASKS), seed=0).steps(
        16, row_length=POSITIONS, rows_per_step=1, rows_per_pass=1, seed=0
    )
    batches = (batch for step in itertools.cycle(rows) for batch in step.batches)
    return lambda: _step(passes, update, batches)


def _step(passes: EagerPasses, update: Update, batches: Iterator[Any]) -> None:
    batch = next(batches)
    passes.run(passes.prepare(batch, torch.full((len(batch.owner),), 1 / len(batch.owner))))
    assert torch.isfinite(update(1.0))


def test_step_of_smollm2(side_by_side: SideBySide, smollm2: BaseModel) -> None:
    side_by_side(_steps(smollm2, "fused"), _steps(smollm2, "plain"), rounds=6, of="plain engine")


def test_step_of_stories260k(side_by_side: SideBySide, stories: BaseModel) -> None:
    side_by_side(_steps(stories, "fused"), _steps(stories, "plain"), rounds=40, of="plain engine")
