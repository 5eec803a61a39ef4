"""LoRA: one A and one B for all tasks.

ΔW x = s B A x        starts with B = 0
"""

from __future__ import annotations

from typing import ClassVar, Literal

from mtl_lora_cli.adapters.methods import method
from mtl_lora_cli.adapters.methods.base import Settings


@method
class Lora(Settings):
    """r (in + out) values a layer."""

    source: ClassVar[str] = "arXiv 2106.09685"

    method: Literal["lora"] = "lora"
