"""What a method declares: settings, roles, and the matrices that its tensors make.

Every method is, for an activation x of task t in a layer with the frozen weight W,

    y = W x + b + s · B M_t A x        s = alpha / r

with A and B as `Settings.factors` gives them, and the small matrix M_t between them (`Settings.mixing`).
Layer, autograd function and the fused engine know no more of a method. `Settings.spread` says which form
M_t has, for it is not always computed as a product:

    same    M is the identity: tasks do not differ
    task    M_t [m, k] is any matrix of the task: `mixing` gives M [L, P, m, k]
    own     M_t keeps some rows of z = A x and drops the others: `mixing` gives bool [L, P, k]
    token   u_i = softmax(z″ / τ)_i z′ with z = [z′; z″], z″ [n]: a gate that reads x; no LoRA for any task

(L layers, P tasks). This module loads torch only where tensors are made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Spread = Literal["same", "task", "own", "token"]
Part = Literal["down", "up", "transform", "gate", "embedding", "whole", "decoder"]
Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


Names = Annotated[list[str], Field(min_length=1), BeforeValidator(_as_list)]
Start = Callable[..., "Tensor"]  # start(*shape, dtype=…, device=…), as `torch.zeros` is called


@dataclass(frozen=True)
class Sizes:
    """Of one layer: W is [out, width], r its rank, T the number of tasks."""

    out: int
    width: int
    rank: int
    tasks: int


@dataclass(frozen=True)
class Role:
    """One trained tensor of a layer, or of the whole model.

    Attributes:
        name: in the adapter file, behind the layer's path.
        shape: of one that belongs to each task the first axis is T.
        start: makes it, called as `torch.zeros`.
        part: which of `training.parts` says its learning rate.
        per_task: it has a row for each task; the others are shared by all tasks.
        added: how the row of a task starts that is added to a trained adapter: the `mean` of the
            trained ones, or by `start` as ever.
        learned: False of what is set once, by `Settings.starts`, and stays.
    """

    name: str
    shape: tuple[int, ...]
    start: Start
    part: Part
    per_task: bool = False
    added: Literal["mean", "start"] = "mean"
    learned: bool = True

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def of_each(self, units: int) -> Role:
        """The same for each of several adapters, behind the axis of tasks where there is one."""
        first = 1 if self.per_task else 0
        shape = (*self.shape[:first], units, *self.shape[first:])

        def start(*_: int, **where: Any) -> Tensor:
            import torch

            return torch.stack([self.start(*self.shape, **where) for _ in range(units)], first)

        return replace(self, shape=shape, start=start)

    def by_unit(self, value: Tensor) -> Tensor:
        """A tensor of `of_each` with the axis of the adapters in front."""
        return value.transpose(0, 1) if self.per_task else value


class Tensors(Protocol):
    """A method's tensors by role, as `factors` and `mixing` are given them.

    `p["lora_A"]` is of one layer in `factors`, and of L layers in `mixing`, [L, …]. Of a role that has
    a row for each task it holds the P rows that are asked for, [P, …] or [L, P, …]. A role of the whole
    model has no axis of layers. Gradients flow through.
    """

    @property
    def layers(self) -> int:
        """L."""

    @property
    def tasks(self) -> int:
        """P."""

    @property
    def rank(self) -> int:
        """r of these layers."""

    @property
    def device(self) -> torch.device:
        """Where they are."""

    def __getitem__(self, role: str) -> Tensor: ...


def zeros(*shape: int, **where: Any) -> Tensor:
    """A start at zero."""
    import torch

    return torch.zeros(*shape, **where)


def normal(deviation: float = 1.0) -> Start:
    """A normal start around 0 with this standard deviation."""

    def start(*shape: int, **where: Any) -> Tensor:
        import torch

        return torch.randn(*shape, **where) * deviation

    return start


def beside_one(deviation: float) -> Start:
    """A start of diagonals [T, r], or of matrices [T, r, r] with such: 1 + σ ε, ε ~ N(0, 1)."""

    def start(tasks: int, rank: int, *same: int, **where: Any) -> Tensor:
        import torch

        diagonal = torch.ones(tasks, rank, **where)
        if deviation:
            diagonal += deviation * torch.randn(tasks, rank, **where)
        return torch.diag_embed(diagonal) if same else diagonal

    return start


def kaiming(*shape: int, **where: Any) -> Tensor:
    """Matrices [..., rows, columns] as a linear layer's weight starts: uniform within ±1 / √columns."""
    import torch

    value = torch.empty(*shape, **where)
    for matrix in value.view(-1, *shape[-2:]):
        torch.nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
    return value


def by_rows(*shape: int, **where: Any) -> Tensor:
    """Matrices [..., rows, columns], normal with standard deviation 1 / rows."""
    import torch

    value = torch.empty(*shape, **where)
    for matrix in value.view(-1, *shape[-2:]):
        torch.nn.init.normal_(matrix, std=1 / shape[-2])
    return value


class Settings(BaseModel):
    """The settings of every method, and what a method is to the others.

    A method is a subclass with `method: Literal[NAME] = NAME`, the keys that it alone reads, and the
    functions below that differ. As it stands this is LoRA.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    source: ClassVar[str] = ""  # where it comes from
    spread: ClassVar[Spread] = "same"
    gradient_start: ClassVar[bool] = True  # A has a gradient where B is not zero
    from_weight: ClassVar[bool] = False  # `starts` says how some tensors follow from W
    scales_rows: ClassVar[bool] = False  # W' = m ∘ V / ‖V‖ with V = W + ΔW: no task is a LoRA
    start_keys: ClassVar[tuple[str, ...]] = ("down_start",)  # that nobody reads after the start

    method: str
    rank: Positive = Field(8, description="r, rows of the down-projection A.")
    alpha: PositiveFloat = Field(16.0, description="The update is scaled by alpha / rank.")
    scaling: Literal["rank", "sqrt_rank"] = Field(
        "rank", description="sqrt_rank: the update is scaled by alpha / √rank (arXiv 2312.03732)."
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Probability of dropping an input feature before A, while training."
    )
    down_start: Literal["kaiming", "normal", "gradient"] = Field(
        "kaiming",
        description="A starts as a linear layer's weight, normal by 1 / rank, or from the first steps' "
        "gradient.",
    )
    rank_pattern: dict[str, Positive] = Field(
        {}, description="Target or pattern → rank of the layers that it names."
    )
    experts: Literal["none", "shared", "each"] = Field(
        "none",
        description="Adapters on the experts of a mixture: one for all of a layer, or one for each.",
    )
    target_modules: Names = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj"],
        description="Names, last parts of names, or patterns of the layers to adapt.",
    )
    whole_modules: list[Annotated[str, Field(min_length=1)]] = Field(
        [],
        description="Modules or parameters, named likewise, that learn whole beside the adapter.",
    )
    streams: Literal["stages"] | None = Field(
        None, description="stages: a stream of each task from the last block of each stage on."
    )

    @model_validator(mode="after")
    def _streams_differ(self) -> Self:
        if self.streams is not None and self.spread != "own":
            raise ValueError(
                f"'streams' needs a method with a part that tasks share and one of each task's own "
                f"(mtlora), received method: {self.method}"
            )
        return self

    @model_validator(mode="after")
    def _ranks_can_be(self) -> Self:
        step = self.rank_step(dict(self))
        for rank in (self.rank, *self.rank_pattern.values()):
            if rank % step:
                raise ValueError(f"{self.method}: expected multiples of {step} as ranks: {rank}")
        return self

    @model_validator(mode="after")
    def _start_can_be(self) -> Self:
        if self.down_start == "gradient" and not self.gradient_start:
            raise ValueError(
                f"'down_start: gradient' is not for {self.method}: its A has no gradient at the start"
            )
        return self

    # What a method says.

    def roles(self, sizes: Sizes) -> tuple[Role, ...]:
        """The tensors of one layer, in the order in which they are drawn. Each method has `lora_A`
        and `lora_B`, and its update starts at zero."""
        return (
            Role("lora_A", (1, sizes.rank, sizes.width), self.start_of_down, "down"),
            Role("lora_B", (self.ups, sizes.out, sizes.rank), zeros, "up"),
        )

    def roles_of_model(self, tasks: int) -> tuple[Role, ...]:
        """The tensors that belong to the whole model; they are drawn before those of the layers."""
        return ()

    def factors(self, p: Tensors) -> tuple[Tensor, Tensor]:
        """A [nA, k, in] and B [n, out, m] of a layer: z = A x has nA·k rows, u = M z n·m."""
        return p["lora_A"], self.up(p)

    def up(self, p: Tensors) -> Tensor:
        """B_i as they act [n, out, m]."""
        return p["lora_B"]

    def mixing(self, p: Tensors) -> Tensor | None:
        """M, in the form that `spread` says; None where tasks do not differ."""
        return None

    def gates(self, p: Tensors) -> Tensor | None:
        """g [L, P, n] of tasks, what `inspect` shows as gates; None without."""
        return None

    def own(self, p: Tensors) -> dict[str, Tensor]:
        """What `inspect` shows the norm of for each task, by name: [L, T, …]."""
        return {
            role.name.removeprefix("task_"): p[role.name]
            for role in self.roles(self._any_layer)
            if role.per_task
        }

    def starts(self, weight: Tensor, rank: int) -> dict[str, Tensor]:
        """With `from_weight`: role → what training begins with, of W [out, in] in float32 or better."""
        return {}

    def at(self, path: str) -> Settings:
        """What the layer at this module path is made of."""
        return self

    def common(self) -> Settings:
        """What a layer is made of in which no task has a part of its own."""
        return self

    def patterns(self) -> dict[str, list[str]]:
        """Keys that speak of some of the adapted layers → their targets."""
        return {"rank_pattern": list(self.rank_pattern)}

    @property
    def own_rows(self) -> int:
        """Rows of z that are one task's alone, with `spread: own`. They follow those that tasks share, task
        by task, as the columns of B do."""
        return 0

    @property
    def per_task(self) -> bool:
        """Whether tasks differ anywhere: one has a tensor, or a row of one, of its own."""
        return any(role.per_task for role in self.all_roles())

    @classmethod
    def rank_step(cls, keys: Mapping[str, Any]) -> int:
        """With these settings only multiples of it are ranks."""
        return 1

    # What follows for the others.

    @property
    def ups(self) -> int:
        """n, `up_projections`; 1 where the method has no such key."""
        return int(getattr(self, "up_projections", 1))

    @property
    def tau(self) -> float:
        """τ, `temperature`; 1 where the method has no such key."""
        return float(getattr(self, "temperature", 1.0))

    @classmethod
    def mergeable(cls) -> bool:
        """Whether it is an ordinary LoRA for each task: what reads the token is none."""
        return cls.spread != "token" and not cls.scales_rows

    @classmethod
    def known_keys(cls) -> tuple[str, ...]:
        """Keys that a recipe's `adapter` may have, of whatever method."""
        from mtl_lora_cli.adapters.methods import every_key

        return every_key()

    @classmethod
    def start_of(cls, key: str) -> Any:
        """The default of a key."""
        return cls.model_fields[key].get_default(call_default_factory=True)

    @property
    def start_of_down(self) -> Start:
        """How A starts; with `gradient` until the first steps' gradient is known."""
        return by_rows if self.down_start == "normal" else kaiming

    @property
    def _any_layer(self) -> Sizes:
        return Sizes(1, 1, self.rank, 1)

    def all_roles(self) -> tuple[Role, ...]:
        """Those of the model and of a layer, whatever its size."""
        return (*self.roles_of_model(1), *self.roles(self._any_layer))

    def role(self, tensor: str) -> Role:
        """The role of a tensor in the adapter file, `{module path}.{role}`.

        Raises:
            KeyError: there is none of that name.
        """
        path, _, name = tensor.rpartition(".")
        roles = self.roles(self._any_layer) if path else self.roles_of_model(1)
        for role in roles:
            if role.name == name:
                return role
        raise KeyError(tensor)

    def rank_of(self, path: str) -> int:
        """r of the layer at this module path."""
        for target, rank in self.rank_pattern.items():
            if matches(path, target):
                return rank
        return self.rank

    def scale(self, rank: int) -> float:
        """s of a layer of this rank."""
        return self.alpha / (rank if self.scaling == "rank" else math.sqrt(rank))

    def count(self, shapes: Mapping[str, tuple[int, ...]], tasks: int) -> int:
        """Trained values of a whole adapter.

        Args:
            shapes: module path → (out, in) of each adapted layer, and how many adapters stand there.
            tasks: T.
        """
        found = sum(role.size for role in self.roles_of_model(tasks) if role.learned)
        for path, (out, width, *units) in shapes.items():
            roles = self.at(path).roles(Sizes(out, width, self.rank_of(path), tasks))
            found += sum(role.size for role in roles if role.learned) * math.prod(units)
        return found

    def changed(self, **settings: Any) -> Self:
        """With other values.

        Raises:
            ValueError: they cannot be.
        """
        return type(self)(**{**dict(self), **settings})


def first_fault(error: ValidationError) -> str:
    """The first of what is wrong with settings, in one line: `rank: input should be …, received 0`."""
    detail = error.errors(include_url=False)[0]
    key = ".".join(map(str, detail["loc"]))
    if detail["type"] == "value_error":
        said = str(detail["ctx"]["error"])
    else:
        said = f"{detail['msg'][0].lower()}{detail['msg'][1:]}, received {detail['input']!r:.60}"
    return f"{key}: {said}" if key else said


def matches(path: str, target: str) -> bool:
    """Whether a target names a module: its whole path, its last part or parts, or a pattern."""
    if "*" in target or "?" in target:
        return fnmatchcase(path, target)
    return path == target or path.endswith("." + target)
