"""MTLoRA: a LoRA that all tasks share, and beside it one of each task's own.

    ΔW_t x = s B A x + s' B_t A_t x        s' = alpha / r'        starts with B = B_t = 0

z = [A x; A_1 x; …; A_T x], and M_t keeps the rows of A and A_t.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mtl_lora_cli.adapters.methods import method
from mtl_lora_cli.adapters.methods.base import (
    Names,
    Positive,
    Role,
    Settings,
    Sizes,
    Spread,
    Tensors,
    matches,
    zeros,
)
from mtl_lora_cli.adapters.methods.lora import Lora

if TYPE_CHECKING:
    from torch import Tensor


@method
class MtLora(Settings):
    """(r + T r') (in + out) values a layer."""

    source: ClassVar[str] = "arXiv 2403.20320"
    spread: ClassVar[Spread] = "own"

    method: Literal["mtlora"] = "mtlora"
    task_rank: Positive = Field(1, description="r', rows of each task's own A_t.")
    task_modules: Names | None = Field(
        None, description="The adapted layers with parts of the tasks' own; null: all of them."
    )

    def roles(self, sizes: Sizes) -> tuple[Role, ...]:
        """A, B, then A_t and B_t, which start as ever for a task that is added: a mean of products
        is no product of this rank."""
        tasks, own = sizes.tasks, self.task_rank
        downs, ups = (tasks, own, sizes.width), (tasks, sizes.out, own)
        start = self.start_of_down
        return (
            *super().roles(sizes),
            Role("task_lora_A", downs, start, "down", per_task=True, added="start"),
            Role("task_lora_B", ups, zeros, "up", per_task=True, added="start"),
        )

    def factors(self, p: Tensors) -> tuple[Tensor, Tensor]:
        """The shared part and those of the tasks, below and beside each other."""
        import torch

        stronger = self.scale(self.task_rank) / self.scale(p.rank)
        own_down, own_up = p["task_lora_A"], p["task_lora_B"]
        down = torch.cat([p["lora_A"][0], own_down.flatten(0, 1)])
        up = torch.cat([p["lora_B"][0], stronger * own_up.permute(1, 0, 2).flatten(1)], dim=1)
        return down.unsqueeze(0), up.unsqueeze(0)

    def mixing(self, p: Tensors) -> Tensor:
        """Which rows of z are a task's: bool [L, P, r + P r']."""
        import torch

        own = torch.eye(p.tasks, dtype=torch.bool, device=p.device)
        own = own.repeat_interleave(self.task_rank, dim=1)
        common = own.new_ones(p.tasks, p.rank)
        return torch.cat([common, own], dim=1).expand(p.layers, -1, -1)

    def own(self, p: Tensors) -> dict[str, Tensor]:
        """A_t and B_t."""
        return {"task_A": p["task_lora_A"], "task_B": p["task_lora_B"]}

    def at(self, path: str) -> Settings:
        """Where `task_modules` does not name it, what is common alone."""
        targets = self.task_modules
        if targets is None or any(matches(path, target) for target in targets):
            return self
        return self.common()

    def common(self) -> Settings:
        """Without parts of tasks' own a plain LoRA."""
        common = {key: value for key, value in dict(self).items() if key in Settings.model_fields}
        return Lora(**{**common, "method": "lora", "streams": None})

    def patterns(self) -> dict[str, list[str]]:
        """Those of every method, and `task_modules`."""
        return {**super().patterns(), "task_modules": self.task_modules or []}

    @property
    def own_rows(self) -> int:
        """r'."""
        return self.task_rank
