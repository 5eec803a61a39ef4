"""PiSSA: LoRA that begins as the principal part of the weight.

    ΔW x = s (B A − B₀ A₀) x        A = A₀ = √Σ_r V_rᵀ / √s,  B = B₀ = U_r √Σ_r / √s   at the start

of the singular value decomposition W = U Σ Vᵀ. What is frozen is the residual W − s B₀ A₀, and the largest
directions learn. A₀ and B₀ stay beside A and B in the adapter file: so the base model is the untouched one, and a
task is a LoRA of rank 2 r on it, which is PEFT's own conversion of PiSSA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import model_validator

from mtl_lora_cli.adapters.methods import method
from mtl_lora_cli.adapters.methods.base import Role, Settings, Sizes, Tensors, zeros

if TYPE_CHECKING:
    from torch import Tensor


@method
class Pissa(Settings):
    """r (in + out) values a layer learn, and as many are kept beside them."""

    source: ClassVar[str] = "arXiv 2404.02948"
    from_weight: ClassVar[bool] = True
    gradient_start: ClassVar[bool] = False

    method: Literal["pissa"] = "pissa"

    @model_validator(mode="after")
    def _drops_nothing(self) -> Self:
        if self.dropout:
            raise ValueError(
                "'dropout' is 0 with method: pissa: what begins as a part of the weight would be dropped"
            )
        return self

    def roles(self, sizes: Sizes) -> tuple[Role, ...]:
        """A, B, and where they began."""
        down, up = super().roles(sizes)
        return (
            down,
            up,
            Role("start_A", down.shape, zeros, "down", learned=False),
            Role("start_B", up.shape, zeros, "up", learned=False),
        )

    def factors(self, p: Tensors) -> tuple[Tensor, Tensor]:
        """[A; A₀] and [B, −B₀]."""
        import torch

        down = torch.cat([p["lora_A"], p["start_A"]], dim=1)
        return down, torch.cat([p["lora_B"], -p["start_B"]], dim=2)

    def starts(self, weight: Tensor, rank: int) -> dict[str, Tensor]:
        """The first r singular values and vectors of W."""
        import torch

        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        root = (values[:rank] / self.scale(rank)).sqrt()
        down, up = (root[:, None] * right[:rank])[None], (left[:, :rank] * root)[None]
        return {"lora_A": down, "lora_B": up, "start_A": down, "start_B": up}
