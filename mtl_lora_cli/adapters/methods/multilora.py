"""MultiLoRA: several LoRAs beside each other, each with a learned scale for every output.

ΔW x = s Σ_i c_i ⊙ (B_i A_i x)        starts with c_i = 0, B_i like A_i
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mtl_lora_cli.adapters.methods import method
from mtl_lora_cli.adapters.methods.base import (
    Positive,
    Role,
    Settings,
    Sizes,
    Tensors,
    kaiming,
    zeros,
)

if TYPE_CHECKING:
    from torch import Tensor


@method
class MultiLora(Settings):
    """n r (in + out) + n out values a layer."""

    source: ClassVar[str] = "arXiv 2311.11501"

    gradient_start: ClassVar[bool] = False  # c = 0 hides A from the loss

    method: Literal["multilora"] = "multilora"
    up_projections: Positive = Field(3, description="n, number of modules.")

    def roles(self, sizes: Sizes) -> tuple[Role, ...]:
        """A_i, B_i and c_i."""
        n, r = self.up_projections, sizes.rank
        return (
            Role("lora_A", (n, r, sizes.width), self.start_of_down, "down"),
            Role("lora_B", (n, sizes.out, r), kaiming, "up"),
            Role("scale", (n, sizes.out), zeros, "up"),
        )

    def up(self, p: Tensors) -> Tensor:
        """diag(c_i) B_i."""
        return p["scale"].unsqueeze(-1) * p["lora_B"]
