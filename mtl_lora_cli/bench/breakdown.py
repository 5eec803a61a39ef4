"""Where the time of a step goes: the profiler's kernels, in groups.

On a card these are the kernels that ran on it, on a CPU torch's own operations. A product counts as
an adapter's where the operation that asked for it has a side smaller than any of the base's
products; a kernel that no operation is known to have asked for (in a replayed graph) is judged by
its name alone. What no kernel fills of a step is idle: the card waits for the program.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from mtl_lora_cli.machine.cards import synchronize

Batch = TypeVar("Batch")

BASE, ADAPTER = "matrix products (base)", "adapter products"
OTHER = "other"
# The first pattern that a name holds decides; upper and lower case are the same.
GROUPS: tuple[tuple[str, str], ...] = (
    ("NF4 expansion", r"dequant|nf4_expand"),
    ("attention", r"flash|fmha|attention|attn"),
    ("optimizer", r"multi_tensor|foreach|fused_adam|optimizer|clip_grad"),
    (ADAPTER, r"adapter|lora|route"),
    ("FP8 conversion", r"quantize|fp8_cast|to_fp8|fp8_rows"),
    ("loss", r"logit_normaliser|logit_gradient|log_?softmax|logsumexp|nll_loss"),
    (BASE, r"gemm|gemv|nvjet|cutlass|cublas|splitk|xmma|scaled_mm|aten::(add|b|badd)?mm\b"),
    ("norm", r"rms|layer_?norm|add_norm|head_norm|norm_gradient|apply_norm"),
    ("gated activation", r"gated|swiglu|silu|gelu"),
    ("rotary", r"rotary|rope"),
    (
        "elementwise and copies",
        r"elementwise|vectorized|copy|memcpy|memset|cat|fill|zero|reduce|sum|mean|index|gather"
        r"|scatter|where|softmax|aten::(add|sub|mul|div|neg|pow|rsqrt|exp|log|to|arange|sin|cos)",
    ),
)
_PATTERNS = tuple((group, re.compile(pattern, re.IGNORECASE)) for group, pattern in GROUPS)
SHOWN_KERNELS = 30


@dataclass(frozen=True)
class Kernel:
    """All launches of one kernel.

    Attributes:
        name: as the profiler gives it.
        group: one of `GROUPS`, or `OTHER`.
        microseconds: over all launches.
        count: of launches.
    """

    name: str
    group: str
    microseconds: float
    count: int


def group_of(name: str, smallest_side: int | None, smallest_base: int) -> str:
    """The group of a kernel or an operation.

    Args:
        name: of the kernel.
        smallest_side: of the matrices that its operation multiplied; None where that is not known.
        smallest_base: smallest side of the base's own products.
    """
    found = next((group for group, pattern in _PATTERNS if pattern.search(name)), OTHER)
    if found == BASE and smallest_side is not None and smallest_side < smallest_base:
        return ADAPTER
    return found


def profile_steps(
    step: Callable[[Batch], Any],
    batches: Sequence[Batch],
    *,
    device: torch.device,
    smallest_base: int,
    step_seconds: float,
) -> dict[str, Any]:
    """Profile a few steps.

    Args:
        step: one whole optimiser step.
        batches: what each is given.
        device: where it runs.
        smallest_base: smallest side of the base's own products.
        step_seconds: of a step without the profiler, which slows launches down.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports its own start and stop
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    synchronize(device)
    started = time.perf_counter()
    with profile(activities=activities, record_shapes=True) as profiler:
        for batch in batches:
            step(batch)
        synchronize(device)
    profiled = (time.perf_counter() - started) / len(batches)
    events = list(profiler.events() or [])
    kernels = (_cuda_kernels if cuda else _cpu_operations)(events, smallest_base)
    # On a CPU the profiler's own time lies between the operations: their sum would not fit a step.
    return summarise(kernels, len(batches), step_seconds if cuda else profiled)


def summarise(kernels: Sequence[Kernel], steps: int, step_seconds: float) -> dict[str, Any]:
    """Milliseconds of each group in a step, its share of the step, and the longest kernels."""
    milliseconds: dict[str, float] = {}
    for kernel in kernels:
        spent = kernel.microseconds / 1000 / steps
        milliseconds[kernel.group] = milliseconds.get(kernel.group, 0.0) + spent
    step, busy = step_seconds * 1000, sum(milliseconds.values())
    names = [group for group, _ in GROUPS if group in milliseconds]
    names += [OTHER] * (OTHER in milliseconds)
    longest = sorted(kernels, key=lambda kernel: -kernel.microseconds)[:SHOWN_KERNELS]
    return {
        "step_ms": step,
        "kernel_ms": busy,
        "idle_ms": max(0.0, step - busy),
        "groups": [
            {"group": name, "ms": milliseconds[name], "share": milliseconds[name] / step}
            for name in names
        ],
        "kernels": [
            {
                "name": kernel.name,
                "group": kernel.group,
                "ms": kernel.microseconds / 1000 / steps,
                "count": kernel.count / steps,
            }
            for kernel in longest
        ],
    }


def _cuda_kernels(events: Sequence[Any], smallest_base: int) -> list[Kernel]:
    """Kernels that ran on the card; products are told apart by the operations that asked for them."""
    adapters: dict[str, tuple[float, int]] = {}
    for event in events:
        for kernel in getattr(event, "kernels", ()):
            if group_of(kernel.name, _smallest_side(event), smallest_base) == ADAPTER:
                spent, count = adapters.get(kernel.name, (0.0, 0))
                adapters[kernel.name] = (spent + float(kernel.duration), count + 1)
    totals: dict[str, tuple[float, int]] = {}
    for event in events:
        on_card = event.device_type.name == "CUDA"
        if on_card and not getattr(event, "is_user_annotation", False):
            spent, count = totals.get(event.name, (0.0, 0))
            totals[event.name] = (spent + float(event.time_range.elapsed_us()), count + 1)
    found = []
    for name, (spent, count) in totals.items():
        small, few = adapters.get(name, (0.0, 0))
        if few:
            found.append(Kernel(name, ADAPTER, min(small, spent), few))
        if count > few:
            group = group_of(name, None, smallest_base)
            found.append(Kernel(name, group, max(0.0, spent - small), count - few))
    return found


def _cpu_operations(events: Sequence[Any], smallest_base: int) -> list[Kernel]:
    """torch's operations by the time that each spent itself, not in operations inside it."""
    totals: dict[tuple[str, str], tuple[float, int]] = {}
    for event in events:
        key = (event.name, group_of(event.name, _smallest_side(event), smallest_base))
        spent, count = totals.get(key, (0.0, 0))
        totals[key] = (spent + float(event.self_cpu_time_total), count + 1)
    return [Kernel(*key, spent, count) for key, (spent, count) in totals.items()]


def _smallest_side(event: Any) -> int | None:
    """The smallest side of the matrices among an operation's inputs."""
    shapes = getattr(event, "input_shapes", None) or ()
    sides = [side for shape in shapes if len(shape) >= 2 for side in shape[-2:]]
    return min((side for side in sides if isinstance(side, int)), default=None)
