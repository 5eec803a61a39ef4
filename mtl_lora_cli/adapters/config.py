"""What an adapter is made of, apart from its weights; the family of methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

Method = Literal["mtl-lora", "lora", "mtlora", "moelora", "multilora", "hydralora"]
Transform = Literal["full", "diagonal", "bases"]
Gate = Literal["weights", "embedding"]
Scaling = Literal["rank", "sqrt_rank"]
DownStart = Literal["kaiming", "normal"]
Spread = Literal["same", "task", "own", "token"]
KINDS = {
    "method": get_args(Method),
    "transform": get_args(Transform),
    "gate": get_args(Gate),
    "scaling": get_args(Scaling),
    "down_start": get_args(DownStart),
}

# Read by every method; the others are in `Family.reads`.
COMMON = ("rank", "alpha", "scaling", "dropout", "down_start", "rank_pattern", "target_modules")


@dataclass(frozen=True)
class Family:
    """A method: a member of ΔW_t = s Σ_i g_i B_i Λ_t A_i with parts switched off or tied.

    Attributes:
        source: where it comes from.
        spread: how u follows from z = A x, see `function.AdapterProducts`: the `same` (u = z), by a
            matrix of the `task`, the task's `own` rows, or a gate that reads the `token`.
        reads: the keys that it reads beside the common ones.
        defaults: of keys whose default differs between methods, as in its paper.
    """

    source: str
    spread: Spread
    reads: tuple[str, ...]
    defaults: Mapping[str, Any]

    @property
    def mergeable(self) -> bool:
        """Whether it is an ordinary LoRA for each task: what reads the token is none."""
        return self.spread != "token"


METHODS: dict[str, Family] = {
    "lora": Family("arXiv 2106.09685", "same", (), {"up_projections": 1}),
    "mtl-lora": Family(
        "arXiv 2410.09437",
        "task",
        (
            "up_projections",
            "temperature",
            "transform",
            "transform_start",
            "transform_bases",
            "gate",
            "gate_start",
            "embedding_size",
        ),
        {"up_projections": 3, "temperature": 0.5, "embedding_size": 16},
    ),
    "mtlora": Family(
        "arXiv 2403.20320", "own", ("task_rank", "task_modules"), {"up_projections": 1}
    ),
    "moelora": Family(
        "arXiv 2310.18339",
        "task",
        ("up_projections", "temperature", "embedding_size"),
        {"up_projections": 8, "temperature": 1.0, "embedding_size": 64},
    ),
    "multilora": Family("arXiv 2311.11501", "same", ("up_projections",), {"up_projections": 3}),
    "hydralora": Family(
        "arXiv 2404.19245", "token", ("up_projections", "temperature"), {"up_projections": 3}
    ),
}
_OTHERWISE = {"up_projections": 1, "temperature": 1.0, "embedding_size": 16}


def method_default(method: str, key: str) -> Any:
    """The default of a key that differs between methods."""
    return METHODS[method].defaults.get(key, _OTHERWISE[key])


@dataclass(frozen=True)
class AdapterConfig:
    """The numbers and kinds of an adapter.

    Attributes:
        rank: r, rows of the shared down-projection A [r, in]; of moelora the rows of all its A_i
            together, r / n each; of multilora the rows of each of its A_i.
        alpha: the update is scaled by s = alpha / rank, or alpha / √rank.
        up_projections: n, number of shared up-projections B_i; None for the method's default.
        temperature: τ of the gate softmax(w / τ); None for the method's default.
        transform: Λ_t is a `full` [r, r] matrix, a `diagonal` [r], or I + Σ_k c_{t,k} S_k of `bases`
            S_k [r, r] that the tasks of a layer share and weights c_t [K] of the task's own.
        transform_start: Λ_t's diagonal starts as 1 plus a normal number of this standard deviation;
            not with `bases`, whose Λ_t starts as I.
        transform_bases: K.
        gate: w_t is learned as it stands (`weights`), or is G e_t with one task embedding e_t [d]
            for the whole model and a projection G [n, d] in each layer (`embedding`).
        embedding_size: d; None for the method's default.
        dropout: probability of dropping an input feature before A, while training.
        gate_start: standard deviation of the gate's logits w_t / τ at the start. It must not be 0:
            equal gates give every B_i the same gradient, and the B_i stay copies of each other.
        task_rank: r', rows of the A_t of a task's own in mtlora.
        task_modules: targets, as in `target_modules`; only the adapted layers that one of them names
            have parts of each task's own in mtlora. None: all of them.
        scaling: `rank` or `sqrt_rank`, see alpha (rsLoRA, arXiv 2312.03732).
        down_start: A starts `kaiming` uniform with a = √5 (LoRA's), or `normal` with standard
            deviation 1 / r.
        rank_pattern: target or pattern → rank of the layers that it names, instead of `rank`.
        target_modules: names (or last parts of names, or patterns with `*`) of the layers to adapt.
        method: one of `METHODS`.

    Raises:
        ValueError: sizes that do not fit the method.
    """

    rank: int = 8
    alpha: float = 16.0
    up_projections: int | None = None
    temperature: float | None = None
    transform: Transform = "full"
    transform_start: float = 0.0
    transform_bases: int = 4
    gate: Gate = "weights"
    embedding_size: int | None = None
    dropout: float = 0.0
    gate_start: float = 2.0
    task_rank: int = 1
    task_modules: tuple[str, ...] | None = None
    scaling: Scaling = "rank"
    down_start: DownStart = "kaiming"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    method: Method = "mtl-lora"

    def __post_init__(self) -> None:
        for key in _OTHERWISE:
            if getattr(self, key) is None:
                object.__setattr__(self, key, method_default(self.method, key))
        for key in ("target_modules", "task_modules"):  # a file has lists
            if getattr(self, key) is not None:
                object.__setattr__(self, key, tuple(getattr(self, key)))
        for key in ("rank", "up_projections", "embedding_size", "task_rank", "transform_bases"):
            _require(
                key, getattr(self, key), int, lambda value: value >= 1, "a whole number above 0"
            )
        for pattern, rank in self.rank_pattern.items():
            _require(f"rank_pattern.{pattern}", rank, int, lambda value: value >= 1, "a rank")
        for key in ("alpha", "temperature"):
            _require(key, getattr(self, key), float, lambda value: 0 < value < math.inf, "above 0")
        _require("gate_start", self.gate_start, float, math.isfinite, "a number")
        start = self.transform_start
        _require("transform_start", start, float, lambda value: 0 <= value < math.inf, "0 or above")
        if self.task_modules == ():
            raise ValueError("task_modules: expected at least one target, or None for all layers")
        if self.transform == "bases" and start:
            raise ValueError(f"transform_start: not read with transform: bases, received {start}")
        _require("dropout", self.dropout, float, lambda value: 0 <= value < 1, "from 0 to below 1")
        if "up_projections" not in self.family.reads and self.ups != 1:
            raise ValueError(f"{self.method} has one up-projection, received {self.ups}")
        if self.method == "moelora":
            for rank in (self.rank, *self.rank_pattern.values()):
                if rank % self.ups:
                    raise ValueError(
                        f"moelora shares its rank among {self.ups} experts evenly, received {rank}"
                    )

    @property
    def family(self) -> Family:
        """The method."""
        return METHODS[self.method]

    @property
    def ups(self) -> int:
        """n."""
        assert self.up_projections is not None
        return self.up_projections

    @property
    def tau(self) -> float:
        """τ."""
        assert self.temperature is not None
        return self.temperature

    @property
    def embedded(self) -> bool:
        """Whether there is a task embedding."""
        return self.method == "moelora" or (self.method == "mtl-lora" and self.gate == "embedding")

    def rank_of(self, path: str) -> int:
        """r of the layer at this module path."""
        for target, rank in self.rank_pattern.items():
            if matches(path, target):
                return rank
        return self.rank

    def at(self, path: str) -> AdapterConfig:
        """What the layer at this module path is made of: without parts of tasks' own a plain LoRA."""
        if self.method != "mtlora" or self.task_modules is None:
            return self
        if any(matches(path, target) for target in self.task_modules):
            return self
        return replace(self, method="lora", task_modules=None)

    def scale(self, rank: int) -> float:
        """s of a layer of this rank."""
        return self.alpha / (rank if self.scaling == "rank" else math.sqrt(rank))


def _require(key: str, value: Any, kind: type, holds: Callable[[Any], bool], what: str) -> None:
    """Raises ValueError: a number is none, or none of those that are possible."""
    kinds = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not holds(value):
        raise ValueError(f"{key}: expected {what}, received {value!r}")


def matches(path: str, target: str) -> bool:
    """Whether a target names a module: its whole path, its last part or parts, or a pattern."""
    if "*" in target or "?" in target:
        return fnmatchcase(path, target)
    return path == target or path.endswith("." + target)
