"""One ZeRO stage on one card or many: speed, memory, losses, and what a checkpoint costs.

    torchrun --standalone --nproc-per-node 2 tests/benchmarks/zero.py --stage 2 --out results.jsonl

trains a few steps of the training loop itself on a model of random weights and adds one JSON line to
the file. `--keep FOLDER` leaves its checkpoints there, one in the middle; `--from CHECKPOINT` goes on from one,
on any number of cards. Called with files alone,

    python tests/benchmarks/zero.py --table results.jsonl

prints what they hold, two cards over one. Compare lines of one machine only.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console

from mtl_lora_cli.adapters.inject import inject
from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.bench.random_model import random_model
from mtl_lora_cli.bench.shapes import find_config
from mtl_lora_cli.bench.yardstick import Yardstick
from mtl_lora_cli.data.mixture import Mixture, all_positions
from mtl_lora_cli.data.prepare import TrainingData
from mtl_lora_cli.machine.cards import pick_device, pick_dtype
from mtl_lora_cli.machine.processes import Processes, joined
from mtl_lora_cli.models import registered
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.recipe.schema import Distributed
from mtl_lora_cli.recipe.training import Training
from mtl_lora_cli.runs.folder import RunFolder
from mtl_lora_cli.training.journal import Journal
from mtl_lora_cli.training.loop import Trainer
from mtl_lora_cli.training.prepared import ReadyRun
from mtl_lora_cli.training.progress import TrainingProgress
from mtl_lora_cli.training.zero_config import deepspeed_config

TASKS = 8
WARM_UP = 3


def measure(wanted: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    """Train so many steps at one stage; what was seen, over all processes."""
    registered.register()
    device = pick_device()
    dtype = pick_dtype("auto", device)
    config = find_config(wanted.shape)
    cut = wanted.stage == 3
    torch.manual_seed(0)  # the same weights on every card
    model = random_model(
        config,
        dtype=dtype,
        device=device,
        quantization=wanted.quantization,
        attention=registered.NAME,
        storage=dtype if cut else torch.uint8,
    )
    names = [f"task{number}" for number in range(TASKS)]
    adapter = inject(model, configure(rank=8, target_modules=("*_proj",)), names)
    packed = PackedModel(model, adapter, resident=not cut)
    yardstick = Yardstick.build(config.vocab_size, TASKS, seed=0)
    settings = Training(
        row_length=wanted.row_length,
        rows_per_step=wanted.rows_per_step,
        rows_per_pass=wanted.rows_per_pass,
        checkpoint_every=(WARM_UP + wanted.steps) // 2 if wanted.keep else None,
    )
    mixture = Mixture(
        names=tuple(names),
        lengths=tuple(all_positions(split.lengths) for split in yardstick.splits),
        row_length=settings.row_length,
        rows_per_step=settings.rows_per_step,
    )
    tasks = [SimpleNamespace(name=name, loss_weight=1.0) for name in names]
    zero = None
    if wanted.stage:
        zero = deepspeed_config(
            Distributed(zero_stage=wanted.stage),
            max_gradient_norm=settings.max_gradient_norm,
            on_card=device.type == "cuda",
        )
    folder = wanted.keep or Path(processes.same(tempfile.mkdtemp()))
    folder.mkdir(parents=True, exist_ok=True)
    prepared = SimpleNamespace(
        recipe=SimpleNamespace(training=settings),
        data=TrainingData(tasks, list(yardstick.splits), [], mixture),
        base=SimpleNamespace(identity=lambda: {"name": wanted.shape}),
        total_steps=WARM_UP + wanted.steps,
        processes=processes,
        where=lambda task, number: f"example {number}",
    )
    run = RunFolder(folder)
    trainer = Trainer(ReadyRun(prepared, run, packed, adapter, zero))  # type: ignore[arg-type]
    if wanted.begins:
        trainer.resume(wanted.begins)
        trainer.position = replace(trainer.position, metrics_bytes=0)  # a file of its own
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    progress = TrainingProgress(trainer.total_steps, console=Console(quiet=True))
    trainer.train(Journal(run, progress, writes=processes.main))
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    started = time.monotonic()
    trainer._save()
    saving = time.monotonic() - started
    events = list(RunFolder(folder).events())
    timed = events[min(WARM_UP, len(events) - 1) :]
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "processes": processes.count,
        "stage": wanted.stage,
        "shape": wanted.shape,
        "quantization": wanted.quantization,
        "rows": [wanted.row_length, wanted.rows_per_step, wanted.rows_per_pass],
        "trained": adapter.parameter_count(),
        "seconds_per_step": median(event["seconds"] for event in timed),
        "tokens_per_second": median(event["tokens_per_second"] for event in timed),
        "floor_share": median(event.get("floor_share", 0.0) for event in timed),
        "peak_gib": processes.gather(peak),
        "checkpoint_seconds": saving,
        "begins": WARM_UP + wanted.steps - len(events),
        "losses": [event["loss"] for event in events],
    }


def _case(one: dict[str, Any]) -> tuple[Any, ...]:
    return (one["stage"], one["shape"], one["quantization"], *one["rows"])


def table(files: list[Path]) -> str:
    """A line a result, with the ratio to one process at the same settings, stage 0 and the same."""
    found = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    alone = {_case(one): one for one in found if one["processes"] == 1 and not one.get("begins")}
    lines = ["cards stage  tokens/s  floor  GiB/card     x1 same  x1 stage 0  save s  |dloss|  of"]
    for one in found:
        same, plain = (alone.get(_case(one | {"stage": stage})) for stage in (one["stage"], 0))
        ratios = [
            one["tokens_per_second"] / o["tokens_per_second"] if o else 0 for o in (same, plain)
        ]
        apart = max(
            abs(a - b)
            for a, b in zip(
                one["losses"], (plain or one)["losses"][-len(one["losses"]) :], strict=True
            )
        )
        peaks = "/".join(f"{peak or 0:.2f}" for peak in one["peak_gib"])
        lines.append(
            f"{one['processes']:5} {one['stage']:5} {one['tokens_per_second']:9,.0f} "
            f"{one['floor_share']:6.1%} {peaks:>12} {ratios[0]:8.3f} {ratios[1]:11.3f} "
            f"{one['checkpoint_seconds']:7.2f} {apart:8.1e}  {one['shape']} {one['quantization']}"
            + (f", from step {one['begins']}" if one.get("begins") else "")
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", type=int, default=0, choices=(0, 1, 2, 3))
    parser.add_argument("--shape", default="llama3-8b")
    parser.add_argument("--quantization", default="nf4", choices=("none", "nf4"))
    parser.add_argument("--row-length", type=int, default=8192)
    parser.add_argument("--rows-per-step", type=int, default=4)
    parser.add_argument("--rows-per-pass", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--from", type=Path, dest="begins")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, nargs="+")
    wanted = parser.parse_args()
    if wanted.table:
        print(table(wanted.table))
        return
    with joined() as processes:
        result = measure(wanted, processes)
        if processes.main:
            print(json.dumps(result))
            if wanted.out:
                with wanted.out.open("a") as file:
                    file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
