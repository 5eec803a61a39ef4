"""MTL-LoRA, or LoRA, on one linear layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mtl_lora_cli.adapters.config import AdapterConfig
from mtl_lora_cli.adapters.frozen import FrozenWeights
from mtl_lora_cli.adapters.function import AdaptedProjections, AdapterProducts
from mtl_lora_cli.adapters.routing import Routing

ROLES = ("lora_A", "lora_B", "task_transform", "task_gate", "gate_projection")


class MultiTaskLinear(nn.Module):
    """y = W x + s · Σ_i g_{t,i} B_i Λ_t A x,   g_t = softmax(w_t / τ),   s = alpha / r.

    Source: MTL-LoRA, arXiv 2410.09437, equations 3 to 5; `gate: embedding` takes w_t = G e_t with
    one task embedding e_t for the whole model. The update starts at zero (every B_i = 0). With
    `method: lora` there is one B and neither gate nor Λ: y = W x + s · B A x for every task.

    Parameters, float32 unless the model is float64: `lora_A` [1, r, in], `lora_B` [n, out, r],
    `task_transform` [T, r, r] or [T, r], and `task_gate` [T, n] or `gate_projection` [n, d].

    Args:
        base: the frozen layer, `nn.Linear` or bitsandbytes' `Linear4bit`.
        config: sizes and kinds.
        routing: tells which task each activation belongs to; shared by the model's layers.
        task_embedding: e [T, d] of the whole model, where `config.gate` is `embedding`.
    """

    def __init__(
        self,
        base: nn.Linear,
        config: AdapterConfig,
        routing: Routing,
        task_embedding: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.config = config
        self.routing = routing
        # In a tuple: the parameter belongs to the model and must not be registered here again.
        self._shared = (task_embedding,)
        r, n, tasks = config.rank, config.up_projections, routing.tasks
        dtype = torch.float64 if base.weight.dtype == torch.float64 else torch.float32
        factory: Any = {"dtype": dtype, "device": base.weight.device}

        down = torch.empty(1, r, base.in_features, **factory)
        nn.init.kaiming_uniform_(down[0], a=math.sqrt(5))
        self.lora_A = nn.Parameter(down)
        self.lora_B = nn.Parameter(torch.zeros(n, base.out_features, r, **factory))
        if not config.routed:
            return
        identity = torch.ones(r, **factory)
        if config.transform == "full":
            identity = torch.diag(identity)
        self.task_transform = nn.Parameter(identity.expand(tasks, *identity.shape).clone())
        spread = config.gate_start * config.temperature
        if config.gate == "weights":
            self.task_gate = nn.Parameter(torch.randn(tasks, n, **factory) * spread)
        else:
            size = config.embedding_size
            projection = torch.randn(n, size, **factory) * (spread / math.sqrt(size))
            self.gate_projection = nn.Parameter(projection)

    def gates(self, tasks: Tensor) -> Tensor:
        """g [P, n] of the tasks [P]: softmax(w_t / τ), float32 or better."""
        return _gates([self], tasks)[0]

    def mixing(self, tasks: Tensor) -> Tensor:
        """M [P, n·r, r] of the tasks [P]: M_t = [g_{t,1} Λ_t; …; g_{t,n} Λ_t]."""
        found = mixing_of([self], tasks)
        assert found is not None
        return found[0]

    @torch.no_grad()
    def task_update(self, task: int) -> tuple[Tensor, Tensor]:
        """The ordinary LoRA that the adapter is for one task.

        B'_t = Σ_i g_{t,i} B_i Λ_t, so that ΔW_t = s · B'_t A exactly.

        Returns:
            A [r, in] and B'_t [out, r], both float64.
        """
        up = self.lora_B.permute(1, 0, 2).reshape(self.lora_B.shape[1], -1).double()
        mixing = mixing_of([self], torch.tensor([task], device=up.device))
        if mixing is not None:
            up = up @ mixing[0, 0].double()
        return self.lora_A[0].double(), up

    def forward(self, x: Tensor) -> Tensor:
        """x [*lead, in] → [*lead, out]; the task ids must lead `lead`."""
        lead = x.shape[:-1]
        slots = self.routing.slots(lead, x.device)
        flat = x.reshape(-1, x.shape[-1])
        frozen = FrozenWeights([self.base_layer])
        if slots.count == 0:
            # Not base_layer(x): a 4-bit layer may repack its weight for its own kernels.
            return frozen.product(flat, frozen.weights()).view(*lead, frozen.shape[0])
        products = self.products(((0, self.base_layer.out_features),))
        y = AdaptedProjections.apply(
            flat,
            frozen,
            products,
            slots,
            products.mask(flat) if self.training else None,
            mixing_of([self], slots.present),
            *frozen.weights(),
            self.lora_A,
            self.lora_B,
        )
        return cast(Tensor, y).view(*lead, frozen.shape[0])

    def products(self, spans: tuple[tuple[int, int], ...]) -> AdapterProducts:
        """The adapter's arithmetic for outputs that lie at `spans` of a group's output."""
        return AdapterProducts(spans, self.config.scale, self.config.dropout)

    def extra_repr(self) -> str:
        c = self.config
        return f"rank={c.rank}, up_projections={c.up_projections}, tasks={self.routing.tasks}"


def mixing_of(layers: Sequence[MultiTaskLinear], tasks: Tensor | None) -> Tensor | None:
    """M [L, P, n·r, r] of many layers of one configuration in a few operations, not a few each.

    Args:
        layers: of equal rank and number of up-projections.
        tasks: [P] task ids, or None for all tasks.

    Returns:
        M_{l,t} = [g_{l,t,1} Λ_{l,t}; …], float32 or better, through which gradients flow; None
        where the method has no such matrices.
    """
    config = layers[0].config
    if not config.routed:
        return None
    transform = _of_tasks(torch.stack([layer.task_transform for layer in layers]), tasks)
    if config.transform == "diagonal":
        transform = torch.diag_embed(transform)
    product = _gates(layers, tasks)[..., None, None] * transform[:, :, None]
    return product.flatten(2, 3)


def _gates(layers: Sequence[MultiTaskLinear], tasks: Tensor | None) -> Tensor:
    """g [L, P, n]."""
    config = layers[0].config
    if config.gate == "weights":
        logits = _of_tasks(torch.stack([layer.task_gate for layer in layers]), tasks)
    else:
        embedding = cast(nn.Parameter, layers[0]._shared[0])
        chosen = embedding if tasks is None else embedding.index_select(0, tasks)
        logits = chosen @ torch.stack([layer.gate_projection for layer in layers]).mT
    return torch.softmax(logits / config.temperature, dim=-1)


def _of_tasks(stacked: Tensor, tasks: Tensor | None) -> Tensor:
    return stacked if tasks is None else stacked.index_select(1, tasks)
