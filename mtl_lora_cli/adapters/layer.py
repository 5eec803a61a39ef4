"""One linear layer with an adapter of any method of the family."""

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
from mtl_lora_cli.errors import UsageError

ROLES = (
    "lora_A",
    "lora_B",
    "task_transform",
    "transform_basis",
    "task_gate",
    "gate_projection",
    "task_lora_A",
    "task_lora_B",
    "scale",
)


class Shared:
    """What belongs to the whole model and not to one layer.

    Attributes:
        task_embedding: e [T, d].
        gate_projection: G [n, d], where one gate serves all layers.
    """

    def __init__(
        self,
        task_embedding: nn.Parameter | None = None,
        gate_projection: nn.Parameter | None = None,
    ) -> None:
        self.task_embedding = task_embedding
        self.gate_projection = gate_projection


class MultiTaskLinear(nn.Module):
    """y = W x + ΔW_t x with ΔW_t = s Σ_i g_i B_i Λ_t A_i and parts switched off or tied.

    | method | ΔW_t x | start |
    | --- | --- | --- |
    | lora | s B A x | B = 0 |
    | mtl-lora | s Σ_i g_{t,i} B_i Λ_t A x, g_t = softmax(w_t / τ), w_t learned or G e_t | B = 0, Λ = I |
    | mtlora | s B A x + s' B_t A_t x, s' = s r / r' | B = B_t = 0 |
    | moelora | s Σ_i g_{t,i} B_i A_i x, g_t = softmax(G e_t / τ), one G for the model | B = 0 |
    | multilora | s Σ_i c_i ⊙ (B_i A_i x) | c = 0, B_i like A_i |
    | hydralora | s Σ_i g_i(x) B_i A x, g(x) = softmax(G x / τ) | B = 0 |

    Sources: `config.METHODS`. The update starts at zero in all of them. Λ_t is a matrix or a diagonal,
    which may start beside I (`transform_start`), or I + Σ_k c_{t,k} S_k, which starts with S = 0 and
    c ~ N(0, 1).

    Parameters, float32 unless the model is float64: `lora_A` [nA, r, in] with nA = 1 or n, `lora_B`
    [n, out, r], `task_transform` [T, r, r] or [T, r], with bases c [T, K] beside `transform_basis` S
    [K, r, r], `task_gate` [T, n], `gate_projection` [n, d] or [n, in], `task_lora_A` [T, r', in],
    `task_lora_B` [T, out, r'], `scale` c [n, out].

    Args:
        base: the frozen layer, `nn.Linear` or bitsandbytes' `Linear4bit`.
        config: sizes and kinds.
        routing: tells which task each activation belongs to; shared by the model's layers.
        shared: the model's own parts, for methods that have them.
        rank: r of this layer; by default `config.rank`.
    """

    def __init__(
        self,
        base: nn.Linear,
        config: AdapterConfig,
        routing: Routing,
        shared: Shared | None = None,
        rank: int | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.config = config
        self.routing = routing
        self.rank = rank or config.rank
        # Not a module: its parameters belong to the model and must not be registered here again.
        self._shared = shared or Shared()
        dtype = torch.float64 if base.weight.dtype == torch.float64 else torch.float32
        factory: Any = {"dtype": dtype, "device": base.weight.device}
        self._start(base.in_features, base.out_features, factory)

    def _start(self, width: int, out: int, factory: dict[str, Any]) -> None:
        config, n, r, tasks = self.config, self.config.ups, self.rank, self.routing.tasks
        method = config.method
        if method == "moelora":
            r //= n
        downs = n if method in ("moelora", "multilora") else 1
        self.lora_A = nn.Parameter(self._fresh_down(downs, r, width, factory))
        self.lora_B = nn.Parameter(torch.zeros(n, out, r, **factory))
        if method == "mtl-lora":
            self._start_transform(tasks, r, factory)
            spread = config.gate_start * config.tau
            if config.gate == "weights":
                self.task_gate = nn.Parameter(torch.randn(tasks, n, **factory) * spread)
            else:
                size = cast(int, config.embedding_size)
                projection = torch.randn(n, size, **factory) * (spread / math.sqrt(size))
                self.gate_projection = nn.Parameter(projection)
        elif method == "mtlora":
            own = config.task_rank
            self.task_lora_A = nn.Parameter(self._fresh_down(tasks, own, width, factory))
            self.task_lora_B = nn.Parameter(torch.zeros(tasks, out, own, **factory))
        elif method == "multilora":
            for up in self.lora_B.data:
                nn.init.kaiming_uniform_(up, a=math.sqrt(5))
            self.scale = nn.Parameter(torch.zeros(n, out, **factory))
        elif method == "hydralora":
            self.gate_projection = nn.Parameter(self._fresh_down(1, n, width, factory)[0])

    def _start_transform(self, tasks: int, rank: int, factory: dict[str, Any]) -> None:
        config = self.config
        if config.transform == "bases":
            bases = config.transform_bases
            self.task_transform = nn.Parameter(torch.randn(tasks, bases, **factory))
            self.transform_basis = nn.Parameter(torch.zeros(bases, rank, rank, **factory))
            return
        diagonal = torch.ones(tasks, rank, **factory)
        if config.transform_start:
            diagonal += config.transform_start * torch.randn(tasks, rank, **factory)
        full = config.transform == "full"
        self.task_transform = nn.Parameter(torch.diag_embed(diagonal) if full else diagonal)

    def _fresh_down(self, count: int, rank: int, width: int, factory: dict[str, Any]) -> Tensor:
        down = torch.empty(count, rank, width, **factory)
        for one in down:
            if self.config.down_start == "kaiming":
                nn.init.kaiming_uniform_(one, a=math.sqrt(5))
            else:
                nn.init.normal_(one, std=1 / rank)
        return down

    @property
    def weight(self) -> Tensor:
        """The frozen weight: some models look at its device or dtype before they call the layer."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias."""
        return self.base_layer.bias

    @property
    def in_features(self) -> int:
        """Of the frozen layer."""
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        """Of the frozen layer."""
        return self.base_layer.out_features

    @property
    def kind(self) -> tuple[Any, ...]:
        """Layers of one kind have matrices M of one shape."""
        return (self.config.method, self.rank)

    def factors(self, tasks: Tensor | None) -> tuple[Tensor, Tensor]:
        """A [nA, k, in] and B [n, out, m] as the products want them; gradients flow through.

        Args:
            tasks: [P] the tasks whose own parts are wanted, or None for all.
        """
        method = self.config.method
        if method == "multilora":
            return self.lora_A, self.scale.unsqueeze(-1) * self.lora_B
        if method == "hydralora":
            return torch.cat([self.lora_A, self.gate_projection.unsqueeze(0)], dim=1), self.lora_B
        if method == "mtlora":
            own_a, own_b = (_of_tasks(p, tasks, 0) for p in (self.task_lora_A, self.task_lora_B))
            stronger = self.config.scale(self.config.task_rank) / self.config.scale(self.rank)
            down = torch.cat([self.lora_A[0], own_a.flatten(0, 1)])
            up = torch.cat([self.lora_B[0], stronger * own_b.permute(1, 0, 2).flatten(1)], dim=1)
            return down.unsqueeze(0), up.unsqueeze(0)
        return self.lora_A, self.lora_B

    def gates(self, tasks: Tensor) -> Tensor:
        """g [P, n] of the tasks [P]: softmax(w_t / τ), float32 or better."""
        return _gates([self], tasks)[0]

    def transforms(self, tasks: Tensor | None) -> Tensor:
        """Λ [P, r, r] of the tasks [P], or of all; gradients flow through."""
        return _transforms([self], tasks)[0]

    def mixing(self, tasks: Tensor) -> Tensor:
        """M [P, m, k] of the tasks [P]; see `mixing_of`."""
        found = mixing_of([self], tasks)
        if found is None:
            raise ValueError(f"{self.config.method} has no matrices of tasks")
        return found[0]

    @torch.no_grad()
    def task_update(self, task: int) -> tuple[Tensor, Tensor]:
        """The ordinary LoRA that the adapter is for one task.

        A'_t [k, in] and B'_t [out, k] with ΔW_t = s · B'_t A'_t exactly; for MTL-LoRA A' = A and
        B'_t = Σ_i g_{t,i} B_i Λ_t.

        Returns:
            A'_t and B'_t, both float64.

        Raises:
            UsageError: the method reads the token; it is no LoRA for any task.
        """
        if not self.config.family.mergeable:
            raise UsageError(
                f"{self.config.method} mixes its up-projections by the token, not by the task: "
                "no update of the weights equals it"
            )
        tasks = torch.tensor([task], device=self.lora_B.device)
        down, up = self.factors(tasks)
        side_by_side = up.permute(1, 0, 2).flatten(1).double()
        mixing = mixing_of([self], tasks)
        if mixing is not None and mixing.dtype != torch.bool:
            side_by_side = side_by_side @ mixing[0, 0].double()
        return down.flatten(0, 1).double(), side_by_side

    def products(self, spans: tuple[tuple[int, int], ...]) -> AdapterProducts:
        """The adapter's arithmetic for outputs that lie at `spans` of a group's output."""
        config = self.config
        return AdapterProducts(
            spans,
            config.scale(self.rank),
            config.dropout,
            config.family.spread,
            config.ups,
            config.tau,
        )

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
            *self.factors(slots.present),
        )
        return cast(Tensor, y).view(*lead, frozen.shape[0])

    def extra_repr(self) -> str:
        c = self.config
        return f"method={c.method}, rank={self.rank}, up_projections={c.ups}, tasks={self.routing.tasks}"


def mixing_of(
    layers: Sequence[MultiTaskLinear], tasks: Tensor | None, *, all_rows: bool = False
) -> Tensor | None:
    """M [L, P, m, k] of many layers of one kind in a few operations, not a few each.

    Args:
        layers: of equal `kind`.
        tasks: [P] task ids, or None for all tasks.
        all_rows: z holds the own rows of all tasks, not only of these.

    Returns:
        mtl-lora: M_{l,t} = [g_{l,t,1} Λ_{l,t}; …] [n·r, r]. moelora: the diagonal of the gates, each
        as often as its expert has rows. Both float32 or better, and gradients flow through them.
        mtlora: bool [L, P, k], which rows of z are the task's, the shared ones among them. None
        where tasks do not differ.
    """
    config = layers[0].config
    if config.method == "mtlora":
        if all_rows and tasks is not None:
            return _own_rows(layers, None).index_select(1, tasks)
        return _own_rows(layers, tasks)
    if config.family.spread != "task":
        return None
    gates = _gates(layers, tasks)
    if config.method == "moelora":
        return torch.diag_embed(gates.repeat_interleave(layers[0].rank // config.ups, dim=-1))
    return (gates[..., None, None] * _transforms(layers, tasks)[:, :, None]).flatten(2, 3)


def _transforms(layers: Sequence[MultiTaskLinear], tasks: Tensor | None) -> Tensor:
    """Λ [L, P, r, r]."""
    own = _of_tasks(torch.stack([layer.task_transform for layer in layers]), tasks, 1)
    match layers[0].config.transform:
        case "full":
            return own
        case "diagonal":
            return torch.diag_embed(own)
        case "bases":
            basis = torch.stack([layer.transform_basis for layer in layers])  # S [L, K, r, r]
            identity = torch.eye(basis.shape[-1], dtype=basis.dtype, device=basis.device)
            return identity + (own @ basis.flatten(2)).unflatten(2, basis.shape[2:])


def _own_rows(layers: Sequence[MultiTaskLinear], tasks: Tensor | None) -> Tensor:
    first = layers[0]
    count = first.routing.tasks if tasks is None else len(tasks)
    own = torch.eye(count, dtype=torch.bool, device=first.lora_A.device)
    own = own.repeat_interleave(first.config.task_rank, dim=1)
    common = own.new_ones(count, first.rank)
    return torch.cat([common, own], dim=1).expand(len(layers), -1, -1)


def _gates(layers: Sequence[MultiTaskLinear], tasks: Tensor | None) -> Tensor:
    """g [L, P, n]."""
    config, shared = layers[0].config, layers[0]._shared
    if not config.embedded:
        logits = _of_tasks(torch.stack([layer.task_gate for layer in layers]), tasks, 1)
    else:
        embedding = cast(nn.Parameter, shared.task_embedding)
        chosen = _of_tasks(embedding, tasks, 0)
        if shared.gate_projection is not None:
            logits = (chosen @ shared.gate_projection.T).expand(len(layers), -1, -1)
        else:
            logits = chosen @ torch.stack([layer.gate_projection for layer in layers]).mT
    return torch.softmax(logits / config.tau, dim=-1)


def _of_tasks(values: Tensor, tasks: Tensor | None, dim: int) -> Tensor:
    return values if tasks is None else values.index_select(dim, tasks)
