"""HydraLoRA: one A, and up-projections that a router weighs anew for each token.

    ΔW x = s Σ_i g_i(x) B_i A x        g(x) = softmax(G x / τ)        starts with B_i = 0

The gate reads the token, so there is no update of the weights that equals it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mtl_lora_cli.adapters.methods import method
from mtl_lora_cli.adapters.methods.base import (
    Positive,
    PositiveFloat,
    Role,
    Settings,
    Sizes,
    Spread,
    Tensors,
)

if TYPE_CHECKING:
    from torch import Tensor


@method
class HydraLora(Settings):
    """r (in + n out) + n in values a layer."""

    source: ClassVar[str] = "arXiv 2404.19245"
    spread: ClassVar[Spread] = "token"

    method: Literal["hydralora"] = "hydralora"
    up_projections: Positive = Field(3, description="n, number of up-projections B_i.")
    temperature: PositiveFloat = Field(1.0, description="τ of the router softmax(G x / τ).")

    def roles(self, sizes: Sizes) -> tuple[Role, ...]:
        """A, B_i and G."""
        shape = (self.up_projections, sizes.width)
        return (
            *super().roles(sizes),
            Role("gate_projection", shape, self.start_of_down, "gate"),
        )

    def factors(self, p: Tensors) -> tuple[Tensor, Tensor]:
        """z = [A x; G x]."""
        import torch

        down = torch.cat([p["lora_A"], p["gate_projection"].unsqueeze(0)], dim=1)
        return down, p["lora_B"]
