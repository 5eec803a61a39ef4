"""The memory of one pass: what torch allocates, and what the engine's arithmetic says."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.engine.memory import fixed_bytes, keep_of, peak_bytes, recompute_of, sizes_of
from mtl_lora_cli.engine.sizes import Load
from mtl_lora_cli.models.batch import PackedBatch
from mtl_lora_cli.models.packed import PackedModel

from .double import VOCABULARY, packed_row

LENGTHS = (128,) * 8
WIDE = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "head_dim": 16}


def peaks(
    model: Any, adapter: Adapter, recompute: Any, make: Callable[[], PackedBatch] | None = None
) -> tuple[int, int]:
    """Bytes over those of weights and optimiser, estimated and measured, in float32 on a CPU.

    Args:
        make: the batch; None: eight examples of 128 tokens.
    """
    layers = len(model.get_submodule("model.layers"))
    packed = PackedModel(model, adapter, engine="fused", keep=keep_of(recompute, layers)).train()
    generator = torch.Generator().manual_seed(0)
    some = [
        (torch.randint(3, VOCABULARY, (length,), generator=generator), number % 3)
        for number, length in enumerate(LENGTHS)
    ]

    def run(batch: PackedBatch) -> None:
        with packed.routed(batch):
            packed(batch).sum().backward()

    make = make or partial(packed_row, some, every=14)
    run(make())  # gradients have their memory from now on
    batch = make()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run(batch)
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    taken = measured = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        taken += event.nbytes()
        measured = max(measured, taken)
    sizes = sizes_of(model, adapter, value=4, on_card=False)
    load = Load(
        batch.input_ids.numel(),
        len(batch.positions),
        batch.segments.longest,
        batch.segments.reach is not None,
    )
    estimate = peak_bytes(sizes, recompute_of(recompute, layers), load) - fixed_bytes(sizes)
    return estimate, measured
