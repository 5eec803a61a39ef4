"""One case of the yardstick: a model, an adapter, and whole training steps by the clock."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mtl_lora_cli.adapters.methods import METHODS, configure, unknown_method
from mtl_lora_cli.adapters.methods.base import Settings
from mtl_lora_cli.bench import breakdown
from mtl_lora_cli.bench.cases import Case
from mtl_lora_cli.bench.fitting import fitted
from mtl_lora_cli.bench.random_model import (
    empty_model,
    layer_linears,
    random_model,
)
from mtl_lora_cli.bench.shapes import find_config
from mtl_lora_cli.bench.timing import time_steps
from mtl_lora_cli.bench.yardstick import Step, Yardstick, supervised_share
from mtl_lora_cli.engine.memory import keep_of
from mtl_lora_cli.engine.plan import matrix_weights
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.machine.cards import peak_gib, pick_dtype, reset_peak, synchronize
from mtl_lora_cli.machine.rate import Rate, floor_json, flop_per_token
from mtl_lora_cli.models import registered
from mtl_lora_cli.models.load import adapt
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.models.trust import settle
from mtl_lora_cli.training.capacity import PassSizes
from mtl_lora_cli.training.step import Stepper, StepPlan
from mtl_lora_cli.training.update import ParameterGroup

LEARNING_RATE = 3e-4
PROFILED_STEPS = 2
LARGEST_ON_CPU = 2_000_000_000  # weights; one step of more would take most of an hour


@dataclass(frozen=True)
class Measuring:
    """How a case is measured.

    Attributes:
        device: where.
        rate: of the device's own matrix products.
        steps: timed ones.
        warmup: steps before them.
        breakdown: also say where the time goes.
        seed: of weights, tokens and the rows' order.
    """

    device: torch.device
    rate: Rate
    steps: int
    warmup: int
    breakdown: bool
    seed: int


def adapter_of_case(method: str, rank: int, **others: Any) -> Settings:
    """The adapter that a case asks for.

    Raises:
        UsageError: there is no such method here.
    """
    if method not in METHODS:
        raise UsageError(f"--method: {unknown_method(method)}")
    try:
        return configure(method, rank=rank, **others)
    except ValueError as error:
        raise UsageError(f"adapter.{error}") from None


def run_case(case: Case, measuring: Measuring) -> dict[str, Any]:
    """Build the model, train, and say how fast it was.

    Raises:
        UsageError: something that the case asks for does not exist here, or the recipe's `memory:
            auto` finds nothing that fits.
        MtlLoraError: the loss is no finite number.
        torch.OutOfMemoryError: it does not fit the card.
    """
    device = measuring.device
    config = find_config(case.shape)
    dtype = pick_dtype(case.dtype, device)
    wanted = adapter_of_case(**case.adapter)
    reset_peak(device)
    case, picked = fitted(case, wanted, device, dtype)
    profiled = PROFILED_STEPS if measuring.breakdown else 0
    count = measuring.warmup + measuring.steps
    yardstick = Yardstick.build(config.vocab_size, case.tasks, measuring.seed)
    steps = yardstick.steps(
        count + profiled,
        row_length=case.row_length,
        rows_per_step=case.rows_per_step,
        rows_per_pass=case.rows_per_pass,
        seed=measuring.seed,
    )
    started = time.perf_counter()
    torch.manual_seed(measuring.seed)
    sizes, flop = model_sizes(case.shape, device)
    model = random_model(
        config,
        dtype=dtype,
        device=device,
        quantization=case.quantization,
        attention=_register_attention(),
    )
    adapter = adapt(model, wanted, [f"task{number}" for number in range(case.tasks)])
    packed = PackedModel(
        model,
        adapter,
        engine=case.engine,
        keep=keep_of(case.gradient_checkpointing, config.num_hidden_layers),
        base_compute="fp8" if case.base_compute == "fp8" else "dtype",
    ).train()
    if packed.decoder is None:  # which layout is right, as a run would find it
        settle(packed)
    if packed.decoder is None and case.gradient_checkpointing:  # all or nothing there
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if packed.decoder is not None and case.quantization != "none":
        packed.decoder.leave_expanded(case.expanded_layers)
    stepper = Stepper(
        packed,
        adapter,
        lambda number: _plan_of(steps[number]),
        total=len(steps),
        groups=[ParameterGroup(list(adapter.trained().values()), LEARNING_RATE, weight_decay=0.0)],
        max_norm=case.max_gradient_norm,
        sizes=PassSizes.of_steps(
            case.row_length,
            case.tasks,
            yardstick.fullest(case.row_length),
            case.rows_per_step,
            case.rows_per_pass,
        ),
    )
    synchronize(device)
    built = {"build_seconds": time.perf_counter() - started, "build_memory_gib": peak_gib(device)}

    rounding = None
    if case.base_compute == "fp8":
        rounding = packed.rounding(steps[0].batches[0])
        packed.let_go()

    captures = []

    def step(number: int) -> Tensor:
        """The mean loss of its supervised tokens, no number where the gradient is none."""
        before = stepper.passes.captures
        running = stepper.launch(number, 1.0)
        captures.append(stepper.passes.captures - before)
        return running.losses[:-1].sum() / running.planned.count + 0.0 * running.norm

    timing = time_steps(
        step, range(count), lambda n: steps[n].tokens, warmup=measuring.warmup, device=device
    )
    floor = floor_json(measuring.rate, flop)
    result: dict[str, Any] = {
        **case.to_json(),
        "picked": picked,
        **timing.to_json(),
        "supervised": [one.supervised for one in steps[measuring.warmup : count]],
        "captures": captures[:count],
        "trained_parameters": adapter.parameter_count(),
        **sizes,
        **built,
        "dtype": str(dtype).removeprefix("torch."),
        "engine_used": "plain" if getattr(packed, "decoder", None) is None else "fused",
        "rounding": None if rounding is None else vars(rounding),
        "floor": floor,
        **shares_of_floor(timing.tokens_per_second, floor),
    }
    if profiled:
        result["breakdown"] = breakdown.profile_steps(
            step,
            range(count, len(steps)),
            device=device,
            smallest_base=smallest_side(case.shape),
            step_seconds=median(timing.seconds),
        )
    return result


def model_sizes(shape: str, device: torch.device) -> tuple[dict[str, int], float]:
    """N and H of a shape, and FLOP a token.

    Raises:
        UsageError: so large a model on a CPU.
    """
    empty = empty_model(find_config(shape), dtype=torch.float32)
    layers, head = matrix_weights(empty)
    if device.type == "cpu" and layers + head > LARGEST_ON_CPU:
        raise UsageError(
            f"--shape: '{shape}' has {layers + head:,} weights, too many for a CPU; "
            "choose a smaller one, such as tiny or smollm2-135m"
        )
    sizes = {"layer_weights": layers, "head_weights": head}
    return sizes, flop_per_token(layers, head, supervised_share())


def shares_of_floor(tokens_per_second: float, floor: Mapping[str, Any]) -> dict[str, float | None]:
    """What part of the possible was reached."""
    known = floor["known_tokens_per_second"]
    return {
        "share_of_floor": tokens_per_second / floor["tokens_per_second"],
        "share_of_known_floor": None if known is None else tokens_per_second / known,
    }


def smallest_side(shape: str) -> int:
    """The smallest width of a base product: whatever has a smaller side belongs to an adapter."""
    layers = layer_linears(empty_model(find_config(shape), dtype=torch.float32))
    return min(min(layer.in_features, layer.out_features) for layer in layers)


def _register_attention() -> str:
    registered.register()
    return registered.NAME


def _plan_of(one: Step) -> StepPlan:
    """A step of the yardstick: every question counts as much, whatever its task."""
    return StepPlan(
        batches=one.batches,
        weights=[torch.ones(len(batch.owner)) for batch in one.batches],
        owners=[batch.task_ids.view(-1)[batch.positions[batch.owner]] for batch in one.batches],
        count=one.supervised,
    )
