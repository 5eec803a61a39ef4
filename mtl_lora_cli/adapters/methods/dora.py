"""DoRA: the weight's rows keep a length of their own, and LoRA turns them.

    W' = m ∘ V / ‖V‖        V = W + s B A,  ‖V‖ [out] the norms of its rows,  m [out] = ‖W‖ at the start

‖V‖ counts as a constant in the gradient, as in the paper's section 4.3 and in PEFT.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from mtl_lora_cli.adapters.methods import method
from mtl_lora_cli.adapters.methods.base import Role, Settings, Sizes, zeros

if TYPE_CHECKING:
    from torch import Tensor


@method
class Dora(Settings):
    """r (in + out) + out values a layer."""

    source: ClassVar[str] = "arXiv 2402.09353"
    from_weight: ClassVar[bool] = True
    scales_rows: ClassVar[bool] = True

    method: Literal["dora"] = "dora"

    def roles(self, sizes: Sizes) -> tuple[Role, ...]:
        """A, B and m."""
        return (*super().roles(sizes), Role("magnitude", (sizes.out,), zeros, "up"))

    def starts(self, weight: Tensor, rank: int) -> dict[str, Tensor]:
        """m = ‖W‖, by rows."""
        return {"magnitude": weight.norm(dim=1)}
