"""Models that read pictures by the clock: ours, the strongest stack of public parts, padded rows, and kept features.

    python tests/benchmarks/vision_speed.py --case llava-7b:none:ours,kept,padded,liger --out results.jsonl
    torchrun --standalone --nproc-per-node 2 tests/benchmarks/vision_speed.py \
        --case llava-7b/qwen3-vl-8b:nf4:ours:alone --case llava-7b:nf4:ours:2

Random weights, the same rows for all columns: a picture a row's example, words before it and an answer behind. The
tower is frozen and its features are made without a gradient. `liger` is PEFT over the same packed rows, with torch's
attention of variable length, Liger's kernels, fused AdamW, and the head where something is asked; `padded` is one
example a row, as an ordinary SFT of such models has it. Tokens are those of examples, never padding.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vision_rivals import RANK, RATE, TARGETS, WARM_UP, padded, rival, stepped
from vision_shapes import TASKS, Shape, built, rows_of, shape_of, tokens_of, vision_of

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.data.kept_features import KeptFeatures, Tower
from mtl_lora_cli.engine.memory import GIB, peak_bytes, sizes_of
from mtl_lora_cli.engine.sizes import Load
from mtl_lora_cli.machine.cards import pick_device, pick_dtype, release, reset_peak
from mtl_lora_cli.machine.processes import ALONE, Processes, joined
from mtl_lora_cli.memory.pictures import sizes_at_sight
from mtl_lora_cli.memory.situation import together
from mtl_lora_cli.models.batch import PackedBatch
from mtl_lora_cli.models.load import adapt
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.recipe.schema import Distributed
from mtl_lora_cli.training.capacity import PassSizes
from mtl_lora_cli.training.step import Stepper, StepPlan
from mtl_lora_cli.training.update import ParameterGroup
from mtl_lora_cli.training.zero_config import deepspeed_config


def ours(model: Any, shape: Shape, batches: list[PackedBatch], device: torch.device, row_length: int,
         processes: Processes, stage: int, passes: int) -> dict[str, Any]:  # fmt: skip
    names = [f"task{number}" for number in range(TASKS)]
    adapter = adapt(model, configure("mtl-lora", rank=RANK, target_modules=TARGETS), names)
    packed = PackedModel(model, adapter, resident=stage < 3).train()
    zero = None
    if stage:
        zero = deepspeed_config(
            Distributed(zero_stage=stage), max_gradient_norm=1.0, on_card=device.type == "cuda"
        )

    def planned(number: int) -> StepPlan:
        every = batches[number * passes :][:passes]
        own = processes.mine(every)
        weights = [torch.ones(len(one.owner)) for one in own]
        return StepPlan(own, weights, [one.owners for one in own], sum(len(b.owner) for b in every))

    steps = len(batches) // passes
    sizes = PassSizes(row_length, len(adapter.tasks))
    stepper = Stepper(
        packed, adapter, planned, total=steps, max_norm=1.0, sizes=sizes, processes=processes, zero=zero,
        groups=[ParameterGroup(list(adapter.trained().values()), RATE, weight_decay=0.0)],
    )  # fmt: skip

    def step(number: int) -> Tensor:
        running = stepper.launch(number, 1.0)
        return running.losses[:-1].sum() / running.planned.count

    found = stepped(
        step,
        range(steps),
        lambda n: sum(map(tokens_of, batches[n * passes :][:passes])),
        device,
    )
    return {**found, "engine": packed.engine_line(), "trained": adapter.parameter_count()}


def estimated(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str,
    batches: list[PackedBatch],
    kept: bool,
    parts: int,
) -> float:
    """GiB that `doctor` would say, of the tensors alone."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(shape.config, dtype=dtype)
        adapter: Adapter = adapt(
            model,
            configure("mtl-lora", rank=RANK, target_modules=TARGETS),
            [f"t{n}" for n in range(TASKS)],
        )
    sizes = sizes_of(
        model,
        adapter,
        value=dtype.itemsize,
        on_card=device.type == "cuda",
        quantization=quantization,
        parts=parts,
    )
    sight = sizes_at_sight(model, {} if kept else shape.seen, shape.count, dtype.itemsize)
    most = max(batches, key=lambda batch: batch.input_ids.shape[1])
    shown = 0 if most.pictures is None else len(most.pictures.places)
    load = Load(
        most.input_ids.shape[1],
        max(len(b.positions) for b in batches),
        most.segments.longest,
        shown,
    )
    from mtl_lora_cli.recipe.training import Recompute

    return peak_bytes(replace(sizes, sight=sight), Recompute(), together(sizes, load, 1)) / GIB


def kept(
    model: Any, shape: Shape, batches: list[PackedBatch]
) -> tuple[list[PackedBatch], dict[str, Any]]:
    """The same passes with features that were written to a disk and read again; what that takes."""
    vision = vision_of(shape.config)
    object.__setattr__(vision, "processor", None)
    tower = Tower(model, vision, False)
    with tempfile.TemporaryDirectory() as folder:
        store = KeptFeatures(Path(folder))
        every = [seen for batch in batches for seen in batch.pictures.seen]  # type: ignore[union-attr]
        tower.see(every[:16], [shape.count] * len(every[:16]))
        began = time.perf_counter()
        for start in range(0, len(every), 16):
            some = every[start : start + 16]
            found = tower.see(some, [shape.count] * len(some))
            store.write({f"{start + number}": one for number, one in enumerate(found)})
        seconds = time.perf_counter() - began
        store.look_again()
        size = store.bytes
        began = time.perf_counter()
        read = [
            {k: v.clone() for k, v in store.read(str(number)).items()}
            for number in range(len(every))
        ]
        reading = time.perf_counter() - began
    made, start = [], 0
    for batch in batches:
        count = len(batch.pictures.seen)  # type: ignore[union-attr]
        own = replace(batch.pictures, seen=read[start : start + count])  # type: ignore[type-var]
        made.append(replace(batch, pictures=own))
        start += count
    return made, {
        "pictures": len(every),
        "bytes_a_picture": size / len(every),
        "pictures_a_second_made": len(every) / seconds,
        "pictures_a_second_read": len(every) / reading,
    }


def measured(run: str, wanted: argparse.Namespace, processes: Processes, began: float) -> None:
    """One shape with all its columns; each says its line, and one that fails takes no other with it."""
    name, quantization, columns, *others = run.split(":")
    passes = processes.count
    if others == ["alone"]:
        names = name.split("/")
        name, processes, others = names[processes.rank % len(names)], ALONE, []
    stage = int(others[0]) if others else 0
    device = pick_device()
    dtype = pick_dtype("auto", device)
    shape = shape_of(name)
    steps = (WARM_UP + wanted.steps) * passes
    cut = stage == 3
    for column in columns.split(","):
        if processes.same(time.monotonic() - began > wanted.seconds):
            print(f"no time for {run}", flush=True)
            return
        batches = rows_of(name, shape, wanted.row_length, wanted.rows, steps)
        made: dict[str, Any] = {}
        model = None
        try:
            release(device)
            made["held_gib"] = held_gib(device)  # what a case before left behind
            model = built(shape, device, dtype, quantization, cut)
            own = batches
            if column == "kept":
                own, more = kept(model, shape, batches)
                made |= more
            release(device)
            reset_peak(device)
            if column in ("ours", "kept"):
                length = wanted.row_length
                result = ours(model, shape, own, device, length, processes, stage, passes)
                parts = processes.count if cut else 1
                made["estimate_gib"] = estimated(
                    shape, dtype, device, quantization, own, column == "kept", parts
                )
            elif column == "padded":
                result = padded(model, batches, device, dtype)
            else:
                result = rival(model, batches, device, dtype, column)
            if processes.main:
                said = {
                    "shape": name, "quantization": quantization, "column": column,
                    "stage": stage, "processes": processes.count, "passes": passes, **made, **result,
                }  # fmt: skip
                print(f"{_line(said, made)}, at {time.monotonic() - began:.0f} s", flush=True)
                if wanted.out:
                    with wanted.out.open("a") as file:
                        file.write(json.dumps(said) + "\n")
        except Exception:
            traceback.print_exc()
            print(f"{run}: {column} failed", flush=True)
        del model
        gc.collect()
        release(device)


def held_gib(device: torch.device) -> float:
    return torch.cuda.memory_allocated(device) / GIB if device.type == "cuda" else 0.0


def _line(said: dict[str, Any], made: dict[str, Any]) -> str:
    rates = (said[f"tokens_per_second{end}"] for end in ("", "_min", "_max"))
    middle, low, high = (f"{rate:,.0f}" for rate in rates)
    found = (
        f"{said['shape']} {said['quantization']} {said['column']} stage {said['stage']} x{said['processes']}: "
        f"{middle} tokens/s ({low} - {high}), peak {said['peak_memory_gib'] or 0.0:.2f} GiB"
    )
    found += "".join(f", {key} {value:,.2f}" for key, value in made.items())
    return f"{found}, losses {said['losses'][0]:.4f} {said['losses'][-1]:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--case", action="append", required=True,
        help="SHAPE:none|nf4:COLUMNS[:ZERO STAGE], or SHAPE/SHAPE:none|nf4:ours:alone; columns of ours, kept, "
        "padded, liger, compile, eager; liger last: it changes functions of transformers for the whole process",
    )  # fmt: skip
    parser.add_argument("--row-length", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=2, help="a pass, and a step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=600, help="nothing is begun after so many")
    parser.add_argument("--out", type=Path)
    wanted = parser.parse_args()
    began = time.monotonic()
    with joined() as processes:
        for run in wanted.case:
            measured(run, wanted, processes, began)


if __name__ == "__main__":
    main()
