"""One of the two processes that test_distributed.py looks at; each start costs seconds, so one does all.

RANK=… WORLD_SIZE=2 … python distributed_worker.py RECIPE FOLDER [further]
"""

from __future__ import annotations

import gc
import itertools
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from mtl_lora_cli.errors import MtlLoraError
from mtl_lora_cli.machine.processes import Processes, joined
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.runs.folder import RunFolder
from mtl_lora_cli.training.cut_embedding import CutEmbedding
from mtl_lora_cli.training.journal import Journal
from mtl_lora_cli.training.loop import Trainer
from mtl_lora_cli.training.prepare import prepare
from mtl_lora_cli.training.prepared import Prepared, ReadyRun
from mtl_lora_cli.training.progress import TrainingProgress
from mtl_lora_cli.training.run import resume, start
from mtl_lora_cli.training.validation import Validation

# A constant rate: the first steps of a long run are those of a short one.
COMMON = (
    "adapter.dropout=0",
    "training.max_steps=10",
    "training.row_length=64",
    "training.schedule=constant",
    "training.warmup=0",
    "training.checkpoint_every=5",
)
SHORT = ("training.max_steps=4",)
FOUR_BIT = ("quantization=nf4",)
PARTS = (
    "training.parts={up: {learning_rate: 0.002, weight_decay: 0.1}, gate: {learning_rate: 0.01}}",
)
# Three rows for one process and two for the other; parts learn at rates of their own.
UNEVEN = ("training.rows_per_step=5", *PARTS)
# From the second step on each tensor is held to its own history.
CLIPPED = ("training.clipping={after: 1}", "training.checkpoint_every=2")
VALIDATED = ("training.validation={every: 10, examples: 8}",)
# A file beside the recipe: what lets DeepSpeed cut so small a model at all.
CUT = ("distributed.zero_stage=3", "distributed.deepspeed=small.json")
CASES: dict[str, tuple[str, ...]] = {
    "float32-0": VALIDATED,
    "float32-1": ("distributed.zero_stage=1", *VALIDATED),
    "float32-2": ("distributed.zero_stage=2", *VALIDATED),
    "float32-3": (*CUT, *VALIDATED),
    "float32-3-plain": (*CUT, "engine=plain", *VALIDATED),
    "nf4-2": (*FOUR_BIT, "distributed.zero_stage=2", *VALIDATED),
    "nf4-3": (*FOUR_BIT, *CUT, *VALIDATED),
    "nf4-3-plain": (*FOUR_BIT, *CUT, "engine=plain", *VALIDATED),
    "uneven-0": (*UNEVEN, *SHORT),
    "uneven-3": (*UNEVEN, *CUT, *SHORT),
    "clipped-0": (*CLIPPED, *SHORT),
    "clipped-2": (*CLIPPED, "distributed.zero_stage=2", *SHORT),
    "clipped-3": (*CLIPPED, *CUT, *SHORT),
    "offload-optimizer": ("distributed.zero_stage=2", "distributed.offload=optimizer", *SHORT),
    "offload-all": (*CUT, "distributed.offload=all", *SHORT),
    "apart-3": (*CUT, *SHORT),
    "dropout-2": ("adapter.dropout=0.1", "distributed.zero_stage=2", *PARTS, *CLIPPED[:1]),
    "dropout-3": ("adapter.dropout=0.1", *CUT, *PARTS),
}
# Nothing of the base is cut in these: what goes wrong shows in `nf4-2` and `uneven-0`, or without processes, too.
FURTHER: dict[str, tuple[str, ...]] = {
    "nf4-0": (*FOUR_BIT, *VALIDATED),
    "nf4-1": (*FOUR_BIT, "distributed.zero_stage=1", *VALIDATED),
    "fp4-2": ("quantization=fp4", "distributed.zero_stage=2", *SHORT),
    "int8-2": ("quantization=int8", "distributed.zero_stage=2", *SHORT),
    "uneven-2": (*UNEVEN, "distributed.zero_stage=2", *SHORT),
}
RELEASED = ("fused", "plain")
PATIENCE = 2.0  # seconds until gloo's own threads, too, have let go of what they have gathered
# Nothing is learned, so the first look stays the best, and the third is the last that is waited for.
BEST = {
    name: (
        *overrides,
        "training.learning_rate=1e-12",
        "training.validation={every: 2, examples: 8, best: sst2, patience: 2}",
    )
    for name, overrides in {"best-0": (), "best-3": CUT}.items()
}
POISONED = ("poisoned-0", "poisoned-2", "poisoned-3")
NO_GRADIENT = ("gradient-0", "gradient-2")


def stopped_after(run: Path, step: int, copy: Path) -> Path:
    """A copy of a finished run as if it had been killed behind a checkpoint: lines of a lost future."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "adapter")
    for path in (copy / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    with (copy / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"event": "step", "step": 11, "lo')
    return copy


class _Run:
    """This process's part of all cases."""

    def __init__(self, processes: Processes, recipe: Path, folder: Path) -> None:
        self.processes, self.recipe, self.folder = processes, recipe, folder

    def prepared(self, overrides: Iterable[str], recipe: Path | None = None) -> Prepared:
        return prepare(load_recipe(recipe or self.recipe, [*COMMON, *overrides]), self.processes)

    def trainer(self, name: str, overrides: Iterable[str]) -> Trainer:
        """A trainer without the steps around it, for looking inside."""
        prepared = self.prepared(overrides)
        packed, adapter = prepared.build()
        run = RunFolder(self.folder / name)
        run.path.mkdir(exist_ok=True)
        return Trainer(ReadyRun(prepared, run, packed, adapter, prepared.zero()))

    def train(self, trainer: Trainer, steps: int) -> None:
        progress = TrainingProgress(steps, 0, Console(quiet=True))
        trainer.train(Journal(trainer.run, progress, writes=self.processes.main))

    def note(self, name: str, found: Any) -> None:
        """`NAME.json`: what every process found."""
        everybody = self.processes.gather(found)
        if self.processes.main:
            (self.folder / f"{name}.json").write_text(json.dumps(everybody), encoding="utf-8")

    def resumed(self, name: str) -> None:
        """Half of a run again: its folder, `NAME-again`."""
        copy = self.folder / f"{name}-again"
        if self.processes.main:
            stopped_after(self.folder / name, 5, copy)
        self.processes.wait()
        resume(RunFolder(copy), None, [], self.processes)

    def best(self, name: str) -> None:
        """A run in which the second process finds each look better than the one before."""
        metrics, rising = Validation.metrics, itertools.count()

        def otherwise(validation: Validation) -> dict[str, float | None]:
            return {task: next(rising) for task in metrics(validation)}

        if not self.processes.main:
            Validation.metrics = otherwise  # type: ignore[method-assign]
        start(self.prepared(BEST[name]), self.folder / name)
        Validation.metrics = metrics  # type: ignore[method-assign]

    def released(self, engine: str) -> None:
        """How many layers' 4-bit bytes are in memory while they run, and how many between the passes."""
        overrides = (*FOUR_BIT, *CUT, f"engine={engine}", "training.max_steps=3")
        trainer = self.trainer(f"released-{engine}", overrides)
        layers = trainer.stepper.update.losses.layers  # type: ignore[union-attr]
        gathered: list[StorageWeakRef] = []
        for layer in layers:
            self._watch(layer, gathered)
        found: list[dict[str, int]] = []
        forward = trainer.stepper.passes._losses  # type: ignore[union-attr]

        def look(batch: Any) -> Any:
            gathered.clear()
            logprobs = forward(batch)
            gc.collect()  # a handle that waited for a gather may still wait for the collector
            until = time.monotonic() + PATIENCE
            while time.monotonic() < until and not all(ref.expired() for ref in gathered):
                time.sleep(0.001)
            between = [ref for ref in gathered if not ref.expired()]
            found.append(
                {
                    "gathered": len(gathered),
                    "in_memory": len(between),
                    "status": sum(
                        flat.ds_status.name != "NOT_AVAILABLE" or flat.numel() > 0
                        for layer in layers
                        for flat in layer.flats
                    ),
                }
            )
            return logprobs

        trainer.stepper.passes._losses = look  # type: ignore[union-attr]
        self.train(trainer, 3)
        self.note(f"released-{engine}", found)

    @staticmethod
    def _watch(layer: Any, gathered: list[StorageWeakRef]) -> None:
        def remember(module: Any, arguments: Any) -> None:
            gathered.extend(StorageWeakRef(flat.untyped_storage()) for flat in module.flats)

        layer.register_forward_pre_hook(remember)

    def embedded(self) -> None:
        """When the parts of an embedding are put together, and what it then says."""
        table = torch.arange(21.0).view(7, 3)  # odd: the parts are filled up
        embedding, layer = nn.Embedding.from_pretrained(table.clone()), nn.Linear(3, 1)
        ids, when, gather = torch.tensor([6, 0, 3]), list[str](), dist.all_gather_into_tensor

        def gathered(*given: Any, **named: Any) -> Any:
            when.append(moment)
            return gather(*given, **named)

        dist.all_gather_into_tensor = gathered
        CutEmbedding(embedding).fetch_behind(layer)
        same, sizes = [], []
        for count in range(2):
            moment = f"forward {count}"
            found = embedding(ids)
            moment = f"backward {count}"
            layer(found).sum().backward()
            same.append(torch.equal(found, table[ids]))
            sizes.append(embedding.weight.numel())
        moment = "without"
        with torch.no_grad():
            layer(embedding(ids))
            layer(embedding(ids))
        dist.all_gather_into_tensor = gather
        self.note("embedded", {"when": when, "same": same, "sizes": sizes})

    def failing(self, name: str, train: Callable[[], object]) -> None:
        try:
            train()
        except MtlLoraError as error:
            self.note(name, error.lines)
        else:
            self.note(name, ["it ended well"])

    def poisoned(self, name: str) -> None:
        """A base model that makes no number of one token, which one row of one process has."""
        stage = CUT if name.endswith("3") else (f"distributed.zero_stage={name[-1]}",)
        recipe = self.recipe.with_name("poisoned.yaml")
        overrides = (*stage, "training.max_steps=100", "training.checkpoint_every=1")
        prepared = self.prepared(overrides, recipe)
        self.failing(name, lambda: start(prepared, self.folder / name))

    def no_gradient(self, name: str) -> None:
        """A gradient of one process that is no number, though all losses are."""
        overrides = (f"distributed.zero_stage={name[-1]}", "training.checkpoint_every=1")
        trainer = self.trainer(name, overrides)
        tensor = next(iter(trainer.adapter.tensors().values()))
        if not self.processes.main:
            number = 2 * 3  # three steps of two passes
            calls = iter(range(10**6))
            tensor.register_hook(lambda g: g * math.nan if next(calls) >= number else g)
        self.failing(name, lambda: self.train(trainer, 10))


def train_all(run: _Run, cases: dict[str, tuple[str, ...]]) -> None:
    for name, overrides in cases.items():
        own = run.recipe.with_name("apart.yaml") if name.startswith("apart") else None
        start(run.prepared(overrides, own), run.folder / name)


def main(recipe: Path, folder: Path, further: bool) -> None:
    with joined() as processes:
        run = _Run(processes, recipe, folder)
        if further:
            train_all(run, FURTHER)
            return
        train_all(run, CASES)
        for name in ("dropout-2", "dropout-3"):
            run.resumed(name)
        for name in BEST:
            run.best(name)
        for engine in RELEASED:
            run.released(engine)
        for name in POISONED:
            run.poisoned(name)
        for name in NO_GRADIENT:
            run.no_gradient(name)
        run.embedded()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:] == ["further"])
