"""One adapted weight with an adapter of any method, and the linear layer of which it is most often."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from mtl_lora_cli.adapters.frozen import FrozenWeights
from mtl_lora_cli.adapters.function import AdaptedProjections, AdapterProducts
from mtl_lora_cli.adapters.methods.base import Role, Settings, Sizes
from mtl_lora_cli.adapters.routing import Routing, Slots
from mtl_lora_cli.adapters.streams import AdaptedStreams, Streams
from mtl_lora_cli.errors import UsageError, did_you_mean
from mtl_lora_cli.extensions import origin


class TaskLayer(nn.Module):
    """The trained tensors of one adapted weight; `methods` says what A, M_t and B are.

    The tensors of the method's roles are Parameters under the roles' names, float32 unless the model is
    float64.

    Args:
        weight: the frozen one.
        sides: (out, in) of it.
        config: the method's settings for this layer.
        routing: tells which task each activation belongs to; shared by the model's layers.
        shared: role → the model's own tensor, for methods that have such.
        rank: r of this layer; by default `config.rank`.
        units: adapters that stand here, one of each expert; their tensors are stacked.

    Raises:
        UsageError: a role has a name that the layer uses itself, or does not start as declared.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self,
        weight: Tensor,
        sides: tuple[int, int],
        config: Settings,
        routing: Routing,
        shared: Mapping[str, nn.Parameter] | None = None,
        rank: int | None = None,
        units: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.routing = routing
        self.rank = rank or config.rank
        self.units = units or 1
        self.stacked = units is not None
        # Layers of one kind have matrices M of one shape.
        self.kind: tuple[Any, ...] = (repr(config), self.rank)
        # Not a module: its parameters belong to the model and must not be registered here again.
        self._shared = dict(shared or {})
        roles = config.roles(Sizes(*sides, self.rank, routing.tasks))
        if units is not None:
            roles = tuple(role.of_each(units) for role in roles)
        self.roles = {role.name: role for role in roles}
        self.roles_of_model = {role.name: role for role in config.roles_of_model(routing.tasks)}
        where = like(weight)
        for name, role in self.roles.items():
            if name == "base_layer" or hasattr(type(self), name) or hasattr(self, name):
                raise wrong(config, "roles", f"a role cannot be called '{name}'")
            value = nn.Parameter(fresh(config, role, **where), requires_grad=role.learned)
            setattr(self, name, value)

    @property
    def in_features(self) -> int:
        """Of the frozen weight."""
        raise NotImplementedError

    @property
    def out_features(self) -> int:
        """Of the frozen weight."""
        raise NotImplementedError

    @property
    def outer(self) -> nn.Module:
        """What stands in the place of the model's own module, which is its `base_layer`."""
        return self

    def weight_name(self, path: str) -> str:
        """The frozen weight's name in the untouched model, where this layer is at `path`."""
        raise NotImplementedError

    def own_tensors(self) -> list[Tensor]:
        """The tensors of its roles, and of the model's that it reads."""
        return [*(getattr(self, name) for name in self.roles), *self._shared.values()]

    def tensors(self, tasks: Tensor | None) -> TensorsOf:
        """The method's tensors by role, with an axis of layers; own ones of tasks [P], or of all."""
        return TensorsOf([self], tasks)

    def factors(self, tasks: Tensor | None) -> tuple[Tensor, Tensor]:
        """A [nA, k, in] and B [n, out, m] as the products want them; gradients flow through.

        With an adapter for each expert [E, nA, k, in] and [E, n, out, m].

        Args:
            tasks: [P] the tasks whose own parts are wanted, or None for all.
        """
        given = TensorsOf([self], tasks, stacked=self.stacked)
        if not self.stacked:
            return self.config.factors(given)
        names = [*self.roles, *self.roles_of_model]
        axes = tuple(0 if name in self.roles else None for name in names)

        def of_one(*values: Tensor) -> tuple[Tensor, Tensor]:
            return self.config.factors(OneOf(given, dict(zip(names, values, strict=True))))

        return torch.vmap(of_one, in_dims=axes)(*(given[name] for name in names))

    @torch.no_grad()
    def task_update(self, task: int) -> tuple[Tensor, Tensor]:
        """The ordinary LoRA that the adapter is for one task.

        A'_t [k, in] and B'_t [out, k] with ΔW_t = s · B'_t A'_t exactly; for MTL-LoRA A' = A and
        B'_t = Σ_i g_{t,i} B_i Λ_t. With an adapter for each expert [E, k, in] and [E, out, k].

        Returns:
            A'_t and B'_t, both float64.

        Raises:
            UsageError: the method reads the token; it is no LoRA for any task.
        """
        if self.config.scales_rows:
            raise UsageError(
                f"{self.config.method} gives the weights' rows lengths of their own: it is no LoRA for any "
                "task; merge it, or export it with --format peft"
            )
        if not self.config.mergeable():
            raise UsageError(
                f"{self.config.method} mixes its up-projections by the token, not by the task: "
                "no update of the weights equals it"
            )
        tasks = torch.tensor([task], device=self.lora_B.device)
        down, up = self.factors(tasks)
        side_by_side = up.movedim(-3, -2).flatten(-2).double()
        mixing = mixing_of([self], tasks)
        if mixing is not None and self.config.spread == "task":
            own = mixing[:, 0] if self.stacked else mixing[0, 0]
            side_by_side = side_by_side @ own.double()
        return down.flatten(-3, -2).double(), side_by_side

    @torch.no_grad()
    def direction(self) -> tuple[Tensor, Tensor]:
        """With `scales_rows`, A [k, in] and B [out, k] of V = W + s B A, both float64."""
        down, up = self.factors(None)
        return down.flatten(-3, -2).double(), up.movedim(-3, -2).flatten(-2).double()

    def products(self, span: tuple[int, int]) -> AdapterProducts:
        """The adapter's arithmetic for an output that lies there in a group's output."""
        config = self.config
        return AdapterProducts(
            (span,),
            (config.scale(self.rank),),
            config.dropout,
            config.spread,
            config.ups,
            config.tau,
            (self._gated_rank,),
        )

    @cached_property
    def _gated_rank(self) -> int:
        """Size of z′, where a gate reads the token."""
        with torch.no_grad():
            return self.factors(None)[1].shape[-1] if self.config.spread == "token" else self.rank

    def extra_repr(self) -> str:
        c = self.config
        return f"method={c.method}, rank={self.rank}, up_projections={c.ups}, tasks={self.routing.tasks}"


class MultiTaskLinear(TaskLayer):
    """y = W x + b + s · B M_t A x, for a position of task t.

    Args:
        base: the frozen layer, `nn.Linear` or bitsandbytes' `Linear4bit`.
        config, routing, shared, rank: as of `TaskLayer`.
    """

    def __init__(
        self,
        base: nn.Linear,
        config: Settings,
        routing: Routing,
        shared: Mapping[str, nn.Parameter] | None = None,
        rank: int | None = None,
    ) -> None:
        sides = base.out_features, base.in_features
        super().__init__(base.weight, sides, config, routing, shared, rank)
        self.base_layer = base.requires_grad_(False)

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

    def weight_name(self, path: str) -> str:
        """As of every linear layer."""
        return f"{path}.weight"

    def forward(self, x: Tensor) -> Tensor:
        """x [*lead, in] → [*lead, out]; the task ids must lead `lead`."""
        lead = x.shape[:-1]
        slots = self.routing.slots(lead, x.device)
        flat = x.reshape(-1, x.shape[-1])
        frozen = FrozenWeights([self.base_layer])
        if slots.count == 0:
            # Not base_layer(x): a 4-bit layer may repack its weight for its own kernels.
            return frozen.product(flat, frozen.weights()).view(*lead, frozen.shape[0])
        products = self.products((0, self.base_layer.out_features))
        mask = products.mask(flat) if self.training else None
        if slots.streams and self.config.spread == "own":
            return self._streams(flat, frozen, products, slots, mask).view(*lead, frozen.shape[0])
        y = AdaptedProjections.apply(
            flat,
            frozen,
            products,
            slots,
            mask,
            mixing_of([self], slots.tasks, shared=slots.shared),
            *frozen.weights(),
            *self.factors(slots.tasks),
        )
        if self.config.scales_rows:
            y = self._rows_scaled(y, slots)
        return cast(Tensor, y).view(*lead, frozen.shape[0])

    def _rows_scaled(self, y: Tensor, slots: Slots) -> Tensor:
        """b + m / ‖V‖ ∘ V x of y = V x + b, [N, out]; where the base model alone counts, y as it is."""
        with torch.no_grad():
            down, up = self.factors(None)
            change = self.config.scale(self.rank) * up[0] @ down[0]
            norm = (self.base_layer.weight.to(change.dtype) + change).norm(dim=1)
        factor = cast(Tensor, self.magnitude) / norm
        bias = self.base_layer.bias
        bare = (y if bias is None else y - bias).to(factor.dtype)
        scaled = (bare * factor).to(y.dtype)
        scaled = scaled if bias is None else scaled + bias
        return scaled if slots.active is None else torch.where(slots.active, scaled, y)

    def _streams(
        self,
        x: Tensor,
        frozen: FrozenWeights,
        products: AdapterProducts,
        slots: Slots,
        mask: Tensor | None,
    ) -> Tensor:
        """x [N, in], one piece a task, and one of what they share, → [N, out]."""
        down, up = self.factors(slots.tasks)
        tasks = len(slots.tasks)
        common = down.shape[1] - tasks * self.config.own_rows
        streams = Streams(slots.streams, tasks, common)
        (weight,) = frozen.weights()
        found = AdaptedStreams.apply(x, frozen, products, streams, mask, weight, down[0], up[0])
        return cast(Tensor, found)


def mixing_of(
    layers: Sequence[TaskLayer],
    tasks: Tensor | None,
    *,
    all_rows: bool = False,
    shared: bool = False,
) -> Tensor | None:
    """M [L, P, m, k] of many layers of one kind in a few operations, not a few each.

    Args:
        layers: of equal `kind`.
        tasks: [P] task ids, or None for all tasks.
        all_rows: z holds the own rows of all tasks, not only of these.
        shared: one more row follows, of what all tasks share: every task's own rows are dropped there.

    Returns:
        The method's `mixing`: with `spread: task` float32 or better, gradients flow through; `own`: bool
        [L, P, k], which rows of z are the task's, the shared ones among them. None where tasks do not
        differ.
    """
    config = layers[0].config
    if all_rows and tasks is not None:
        every = config.mixing(TensorsOf(layers, None))
        return None if every is None else every.index_select(1, tasks)
    found = config.mixing(TensorsOf(layers, tasks))
    if found is None or not shared:
        return found
    row = found.new_ones(len(found), 1, found.shape[2])
    row[..., found.shape[2] - found.shape[1] * config.own_rows :] = False
    return torch.cat([found, row], dim=1)


class TensorsOf:
    """`methods.base.Tensors` of some layers of one kind.

    Args:
        layers: of equal `kind`.
        tasks: [P] task ids, or None for all.
        stacked: with an axis of layers in front; otherwise it is one layer.
    """

    def __init__(
        self, layers: Sequence[TaskLayer], tasks: Tensor | None, *, stacked: bool = True
    ) -> None:
        self._layers = layers
        self._tasks = tasks
        self._stacked = stacked

    @property
    def layers(self) -> int:
        """L, each expert's own adapter as one."""
        return sum(layer.units for layer in self._layers)

    @property
    def tasks(self) -> int:
        """P."""
        return self._layers[0].routing.tasks if self._tasks is None else len(self._tasks)

    @property
    def rank(self) -> int:
        """r."""
        return self._layers[0].rank

    @property
    def device(self) -> torch.device:
        """Of the layers."""
        return self._layers[0].lora_A.device

    def __getitem__(self, name: str) -> Tensor:
        first = self._layers[0]
        if name in first.roles_of_model:
            return self._chosen(first.roles_of_model[name], first._shared[name], 0)
        if name not in first.roles:
            known = [*first.roles_of_model, *first.roles]
            raise UsageError(
                f"no role '{name}'{did_you_mean(name, known)}; roles: {', '.join(known)}"
            )
        if not self._stacked:
            return self._chosen(first.roles[name], getattr(first, name), 0)
        if first.stacked:
            own = [first.roles[name].by_unit(getattr(layer, name)) for layer in self._layers]
            return self._chosen(first.roles[name], torch.cat(own), 1)
        values = torch.stack([getattr(layer, name) for layer in self._layers])
        return self._chosen(first.roles[name], values, 1)

    def _chosen(self, role: Role, values: Tensor, dim: int) -> Tensor:
        if self._tasks is None or not role.per_task:
            return values
        return values.index_select(dim, self._tasks)


class OneOf:
    """`methods.base.Tensors` of one of several, whose tensors are given."""

    layers = 1

    def __init__(self, every: TensorsOf, tensors: Mapping[str, Tensor]) -> None:
        self._every = every
        self._tensors = tensors
        self.tasks, self.rank, self.device = every.tasks, every.rank, every.device

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name] if name in self._tensors else self._every[name]


def fresh(config: Settings, role: Role, **where: Any) -> Tensor:
    """The tensor that training begins with.

    Raises:
        UsageError: it has not the declared shape.
    """
    value = cast(Tensor, _tried(config, "roles", lambda: role.start(*role.shape, **where)))
    if tuple(value.shape) != role.shape:
        raise wrong(
            config,
            "roles",
            f"'{role.name}' starts as {list(value.shape)}, and is declared as {list(role.shape)}",
        )
    return value


def like(weight: Tensor) -> dict[str, Any]:
    """dtype and device of what learns beside a frozen weight: float32 unless that is float64."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return {"dtype": dtype, "device": weight.device}


@torch.no_grad()
def require_declared(layer: MultiTaskLinear) -> None:
    """Refuse a method whose roles or matrices are not what it says of them.

    Raises:
        UsageError: naming its file.
    """
    config, tasks = layer.config, layer.routing.tasks
    for name in ("lora_A", "lora_B"):
        if name not in layer.roles:
            raise wrong(config, "roles", f"there is no '{name}'")
    for role in (*layer.roles_of_model.values(), *layer.roles.values()):
        if role.per_task and role.shape[:1] != (tasks,):
            raise wrong(
                config,
                "roles",
                f"'{role.name}' belongs to each task, and its shape {list(role.shape)} does not begin "
                f"with the {tasks} tasks",
            )
    down, up = _tried(config, "factors", lambda: layer.factors(None))
    mixing = _tried(config, "mixing", lambda: mixing_of([layer], None))
    k, m = down.shape[0] * down.shape[1], up.shape[0] * up.shape[2]
    forms = {"task": [1, tasks, m, k], "own": [1, tasks, k], "same": None, "token": None}
    expected, received = forms[config.spread], None if mixing is None else list(mixing.shape)
    if received != expected:
        raise wrong(
            config,
            "mixing",
            f"with spread: {config.spread} and {tasks} tasks, A of {k} rows and B of {m} columns "
            f"expected a mixing of shape {expected}, received {received}",
        )
    if config.spread in ("same", "own") and k != m:
        raise wrong(config, "factors", f"A has {k} rows and B {m} columns")


def _tried(config: Settings, function: str, make: Callable[[], Any]) -> Any:
    """What a method's function makes; a failure of it is one line."""
    try:
        return make()
    except UsageError as error:
        raise wrong(config, function, str(error)) from error
    except Exception as error:  # it is the user's own code
        raise wrong(config, function, f"{type(error).__name__}: {error}") from error


def wrong(config: Settings, function: str, what: str) -> UsageError:
    """An error about one function of a method, with its file and line."""
    where = origin(getattr(type(config), function))
    return UsageError(f"{where}: method {config.method}: {function}: {what}")
