"""Tasks of a run of maps as one ONNX file: pixels in, a map of each task out. onnxruntime checks it."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtl_lora_cli.dense.backbones import Family, Size, Stages
from mtl_lora_cli.dense.decoders import Decoder
from mtl_lora_cli.dense.merged import MergedMaps
from mtl_lora_cli.dense.plain_code import SPEC
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.export.card import licence_text
from mtl_lora_cli.export.maps.check import MapDifference, in_words
from mtl_lora_cli.export.maps.folder import write_described, written
from mtl_lora_cli.export.maps.order import MapsOrder
from mtl_lora_cli.tasks.maps import MapSpec

FILE = "maps.onnx"
OPSET = 18
_NEEDED = ("onnx", "onnxscript", "onnxruntime")


def require_onnx() -> None:
    """Refuse where what writes and reads the file is not installed.

    Raises:
        UsageError: naming what is missing.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"--format onnx needs {', '.join(missing)}: pip install 'mtl-lora[onnx]'")


class MapsModule(nn.Module):
    """A merged trunk and its tasks as one module: pixels [N, 3, H, W] → a map [N, C, H, W] of each task.

    Args:
        merged: the trunk and what tasks have beside it.
        family, stages: of the trunk.
        specs: task → what its map holds.
        size: height and width of pictures.
    """

    def __init__(
        self,
        merged: MergedMaps,
        family: Family,
        stages: Stages,
        specs: Mapping[str, MapSpec],
        size: Size,
    ) -> None:
        super().__init__()
        self.trunk = merged.trunk
        self._family, self._stages, self._size = family, stages, size
        self.decoders = nn.ModuleList(
            _decoder(stages, spec, _part(merged.tensors, f"{task}.decoder."))
            for task, spec in specs.items()
        )
        self.own = nn.ModuleList(nn.ModuleList(_own_blocks(merged, stages, task)) for task in specs)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        found: list[list[Any]] = [[] for _ in self.decoders]
        blocks = [self.trunk.get_submodule(path) for path in self._stages.blocks]
        hooks = [
            block.register_forward_pre_hook(self._before(stage, found), with_kwargs=True)
            if len(self._own(0))
            else block.register_forward_hook(_behind(found))
            for stage, block in enumerate(blocks)
        ]
        self._family.run(self.trunk, pixels)
        for hook in hooks:
            hook.remove()
        return tuple(
            decoder(self._maps(outputs), self._size)
            for decoder, outputs in zip(self.decoders, found, strict=True)
        )

    def _own(self, task: int) -> nn.ModuleList:
        own = self.own[task]
        assert isinstance(own, nn.ModuleList)
        return own

    def _before(self, stage: int, found: list[list[Any]]) -> Callable[..., None]:
        def keep(block: nn.Module, x: Any, named: Any) -> None:
            for task, outputs in enumerate(found):
                outputs.append(self._own(task)[stage](*x, **named))

        return keep

    def _maps(self, outputs: Sequence[Any]) -> list[Tensor]:
        plain = [one[0] if isinstance(one, tuple) else one for one in outputs]
        return [
            self._family.to_map(self.trunk, one, stage, self._size)
            for stage, one in enumerate(plain)
        ]


def _behind(found: list[list[Any]]) -> Callable[..., None]:
    def keep(block: nn.Module, x: Any, y: Any) -> None:
        for outputs in found:
            outputs.append(y)

    return keep


def _part(tensors: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}


def _decoder(stages: Stages, spec: MapSpec, tensors: Mapping[str, Tensor]) -> Decoder:
    decoder = Decoder(stages.channels, spec)
    decoder.load_state_dict(dict(tensors))
    return decoder


def _own_blocks(merged: MergedMaps, stages: Stages, task: str) -> list[nn.Module]:
    """A task's copies of last blocks; none where it has no such."""
    found = []
    for stage, path in enumerate(stages.blocks):
        tensors = _part(merged.tensors, f"{task}.blocks.{stage}.")
        if tensors:
            own = copy.deepcopy(merged.trunk.get_submodule(path))
            own.load_state_dict(tensors)
            found.append(own)
    return found


def write_onnx(module: MapsModule, tasks: Sequence[str], size: Size, path: Path) -> None:
    """Trace the module and write it with its weights in one file; the number of pictures is free."""
    pixels = torch.zeros(2, 3, *size)
    with torch.no_grad():
        torch.onnx.export(
            module.eval(),
            (pixels,),
            str(path),
            input_names=["pixels"],
            output_names=list(tasks),
            dynamic_shapes={"pixels": {0: torch.export.Dim("pictures", min=1, max=4096)}},
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def run_onnx(path: Path, pixels: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
    """What onnxruntime answers to pictures [N, 3, H, W], on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    parts = [session.run(list(tasks), {"pixels": some.numpy()}) for some in pixels.split(8)]
    return {
        task: torch.cat([torch.from_numpy(part[number]) for part in parts])
        for number, task in enumerate(tasks)
    }


def export_maps(order: MapsOrder) -> dict[str, MapDifference]:
    """Write tasks of a run of maps as ONNX, let onnxruntime answer, compare, and only then put it in its place.

    Raises:
        UsageError: onnx is not installed; else as `folder.merge_maps`.
        CheckError: what was written differs; it lies aside.
    """
    require_onnx()
    names = [task.name for task in order.tasks]

    def write(merged: MergedMaps, folder: Path) -> None:
        order.say("tracing the model")
        host = order.host
        module = MapsModule(merged, host.family, host.stages, order.specs, order.size)
        write_onnx(module, names, order.size, folder / FILE)
        write_described(order, folder)

    return written(
        order,
        write,
        lambda folder: run_onnx(folder / FILE, order.pictures, names),
        lambda found: _readme(order, found),
        "onnxruntime",
    )


def _readme(order: MapsOrder, found: Mapping[str, MapDifference]) -> str:
    names = [task.name for task in order.tasks]
    height, width = order.size
    compared = (
        f"On {len(order.pictures)} held-out pictures, by onnxruntime: {in_words(found)}."
        if found
        else "It was not compared."
    )
    return (
        f"---\nlibrary_name: onnx\n---\n# {', '.join(names)} of {order.run.folder.name}, as ONNX\n\n"
        f"`{FILE}` takes `pixels`, float32 [N, 3, {height}, {width}], and gives a map [N, C, {height}, {width}] of "
        f"each task; `{SPEC}` has the mean and deviation of pixels, and what each map holds.\n\n"
        "## Use\n\n```python\nimport json\nimport onnxruntime\n\n"
        f'session = onnxruntime.InferenceSession("{FILE}")\n'
        f'spec = json.load(open("{SPEC}"))  # pixels: (colour / 255 - spec["mean"]) / spec["std"]\n'
        f'maps = session.run({names!r}, {{"pixels": pixels}})\n```\n\n'
        f"## Check\n\n{compared}\n\n## Licence\n\n{licence_text(order.run.base)}\n"
    )
