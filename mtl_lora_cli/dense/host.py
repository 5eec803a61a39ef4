"""The host of dense tasks: a backbone with adapters, streams, and a decoder a task.

Which streams an image makes follows from the adapter:

| adapter | streams | a task, merged |
| --- | --- | --- |
| `streams: stages` | a shared one, and one of each task from the last block of each stage on | the trunk, and its own last blocks |
| tasks differ, no `streams` | one of each task through the whole trunk | a trunk of its own |
| tasks do not differ (`lora`, full tuning) | one | the trunk |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.data.map_batch import MapBatch
from mtl_lora_cli.dense.backbones import Family, Size, Stages
from mtl_lora_cli.dense.decoders import Decoder
from mtl_lora_cli.dense.losses import map_losses
from mtl_lora_cli.dense.streams import Fork, Tap
from mtl_lora_cli.models.host import ModuleHost
from mtl_lora_cli.tasks.maps import MapSpec

Way = Literal["stages", "tasks", "one"]


def way_of(adapter: Adapter) -> Way:
    """Which streams an image makes; see the module."""
    if adapter.config.streams is not None:
        return "stages"
    return "tasks" if adapter.layers and adapter.config.per_task else "one"


class DenseHost(ModuleHost):
    """See the module and `models.host.Host`.

    Args:
        trunk: the backbone with the adapter injected; the last blocks of its stages are wrapped here.
        family: whose it is.
        adapter: in it; its decoders are made here.
        specs: what each task's map holds, in the order of the adapter's tasks.
        dtype: in which the trunk computes.
    """

    def __init__(
        self,
        trunk: Any,
        family: Family,
        adapter: Adapter,
        specs: Sequence[MapSpec],
        dtype: torch.dtype,
    ) -> None:
        super().__init__(trunk, adapter)
        self.family, self.specs, self.dtype = family, list(specs), dtype
        self.way: Way = way_of(adapter)
        self.stages: Stages = family.stages(trunk.config)
        self.taps = [self._tapped(path) for path in self.stages.blocks]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        device = next(trunk.parameters()).device
        made = [Decoder(self.stages.channels, spec).to(device, wide) for spec in specs]
        self.decoders = nn.ModuleList(made)
        self._copies: dict[int, Decoder] = {}
        adapter.decoders = dict(zip(adapter.tasks, made, strict=True))

    def _tapped(self, path: str) -> Tap:
        parent, _, name = path.rpartition(".")
        block = self.model.get_submodule(path)
        last = path == self.stages.blocks[-1]
        tap = Fork(block, self._adapter.routing, last=last) if self.way == "stages" else Tap(block)
        setattr(self.model.get_submodule(parent), name, tap)
        return tap

    def wrap_layers(self, wrapped: Callable[[nn.Module], nn.Module]) -> None:
        """See `models.host.Cuttable`: the blocks of all stages."""
        for path in self.family.all_blocks(self.model):
            parent, _, name = path.rpartition(".")
            block = self.model.get_submodule(path)
            if isinstance(block, Tap):
                block.block = wrapped(block.block)
            else:
                setattr(self.model.get_submodule(parent), name, wrapped(block))

    @contextmanager
    def routed(self, batch: Any) -> Iterator[None]:
        """Streams are routed where they are made."""
        yield

    def losses(self, batch: MapBatch) -> Tensor:
        """ℓ of each unit, float32 [S]: pictures in their order, of each its tasks."""
        tasks = batch.task_ids.tolist()
        maps = self._features(batch.pixels, tasks)
        found, places = [], []
        for number, task in enumerate(tasks):
            rows = batch.present[:, task].nonzero().flatten()
            own: Sequence[Tensor] = maps[self._stream(number)]
            target = batch.targets[task]
            if len(rows) < len(batch.pixels):
                chosen = without_waiting(rows, target.device)
                own, target = [stage[chosen] for stage in own], target[chosen]
            answers = self._decoded(task, own, _size(batch.pixels))
            found.append(map_losses(answers, target, self.specs[task]))
            places.append(rows * len(batch.present[0]) + task)
        if not found:
            return batch.pixels.new_zeros(0)
        if all(len(rows) == len(batch.pixels) for rows in places):
            return torch.stack(found, 1).flatten().float()
        order = torch.cat(places).argsort()
        return torch.cat(found)[without_waiting(order, batch.pixels.device)].float()

    def answers(self, batch: MapBatch, tasks: Sequence[int]) -> dict[int, Tensor]:
        """Task id → what its decoder gives for every picture, float32 [I, C, H, W]: logits of classes, edges
        and salience, depth in its unit, normals of length 1. The trunk runs once for all tasks."""
        rising = sorted(set(tasks))
        maps = self._features(batch.pixels, rising)
        return {
            task: self._decoded(task, maps[self._stream(number)], _size(batch.pixels))
            for number, task in enumerate(rising)
        }

    def _stream(self, number: int) -> int:
        return 0 if self.way == "one" else number

    def _features(self, pixels: Tensor, tasks: Sequence[int]) -> list[tuple[Tensor, ...]]:
        """Of each stream, of which there is one a task or one alone, [I, h, w, C] of each stage."""
        routing = self._adapter.routing
        pictures, size = len(pixels), _size(pixels)
        ids = torch.zeros(pictures, dtype=torch.long)
        x = pixels.to(self.dtype)
        if self.way == "tasks" and tasks:
            ids = torch.tensor(tasks).repeat_interleave(pictures)
            x = x.repeat(len(tasks), 1, 1, 1)
        if self.way == "stages":
            assert routing.shared is not None, "an id of what all tasks share"
            ids += routing.shared
            for tap in self.taps:
                cast(Fork, tap).tasks = tasks
        with routing.assign(ids, windows=True):
            self.family.run(self.model, x)
        stages = [
            self.family.to_map(self.model, tap.taken(), stage, size).split(pictures)
            for stage, tap in enumerate(self.taps)
        ]
        return list(zip(*stages, strict=True))

    def _decoded(self, task: int, maps: Sequence[Tensor], size: Size) -> Tensor:
        """By the task's decoder, in the backbone's dtype; it learns in float32."""
        decoder = cast(Decoder, self.decoders[task])
        if self.dtype in (torch.float32, torch.float64):
            return cast(Tensor, decoder(maps, size))
        if not (self.training or torch.is_grad_enabled()):
            return cast(Tensor, self._narrowed(task, decoder)(maps, size))
        narrow = {name: own.to(self.dtype) for name, own in decoder.named_parameters()}
        return cast(Tensor, functional_call(decoder, narrow, (maps, size)))

    def _narrowed(self, task: int, decoder: Decoder) -> Decoder:
        """A copy in the backbone's dtype, until `train` is called again."""
        if task not in self._copies:
            with torch.inference_mode(False):
                self._copies[task] = deepcopy(decoder).to(self.dtype).requires_grad_(False)
        return self._copies[task]

    def train(self, mode: bool = True) -> Self:
        """See `ModuleHost`; what decoders learned until now counts from here on."""
        self._copies.clear()
        return super().train(mode)

    def counts(self) -> Mapping[str, int]:
        """Values that learn, by what they are."""
        found = {"adapter": 0, "whole modules": 0, "decoders": 0}
        names = {"whole": "whole modules", "decoder": "decoders"}
        for name, tensor in self._adapter.trained().items():
            found[names.get(self._adapter.role(name).part, "adapter")] += tensor.numel()
        return found

    def engine_report(self) -> dict[str, Any]:
        """See `Host`."""
        kind = cast(Any, self.model).config.model_type
        return {
            "engine": "dense",
            "line": f"dense: transformers' {kind}, {self._streams_in_words()}",
            "remarks": [],
        }

    def _streams_in_words(self) -> str:
        tasks, stages = len(self._adapter.tasks), len(self.stages.blocks)
        if self.way == "stages":
            return f"one stream of all tasks, and one of each from the last blocks of {stages} stages on"
        return "one stream of all tasks" if self.way == "one" else f"{tasks} streams, one a task"

    def notes(self) -> Sequence[str]:
        """What learns, in values, and how streams run."""
        counts = self.counts()
        learned = ", ".join(f"{count:,} in {name}" for name, count in counts.items() if count)
        lines = [f"learns {sum(counts.values()):,} values: {learned}"]
        if self.way == "tasks" and len(self._adapter.tasks) > 1:
            lines.append(
                f"the whole trunk runs once for each of {len(self._adapter.tasks)} tasks; "
                "adapter.streams: stages (mtlora) runs it once"
            )
        return lines


def without_waiting(index: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device; a card that is busy takes it in its turn, and nobody waits."""
    pinned = index.pin_memory() if device.type == "cuda" else index
    return pinned.to(device, non_blocking=True)


def _size(pixels: Tensor) -> Size:
    return int(pixels.shape[-2]), int(pixels.shape[-1])
