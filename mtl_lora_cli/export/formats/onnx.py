"""ONNX files: of runs of maps alone, which `export/maps/onnx_file.py` writes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.export.formats import Format, export_format

if TYPE_CHECKING:
    from mtl_lora_cli.export.order import Order
    from mtl_lora_cli.export.questions import Questions, Scored


@export_format
class Onnx(Format):
    """Language models leave a run in the other formats."""

    name = "onnx"
    about = "maps of pictures for onnxruntime"
    marker = "maps.onnx"
    reducible = False

    def refuses(self, order: Order) -> None:
        raise UsageError(_WHY)

    def write(self, order: Order, folder: Path) -> None:
        raise UsageError(_WHY)

    def read(self, questions: Questions, folder: Path) -> Scored:
        raise UsageError(_WHY)


_WHY = "--format onnx is for maps of pictures; a language model leaves a run as peft, gguf, gguf-merged, or by merge"
