"""Which cases one call measures, and against what. Nothing here needs a library that is slow to load."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from mtl_lora_cli.adapters.methods import METHODS, common_keys
from mtl_lora_cli.bench.shapes import projections
from mtl_lora_cli.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from mtl_lora_cli.recipe.training import Recompute

BASELINES = ("packed", "peft", "plain", "lora")
TABLES = ("yardstick", "growth")
# What an option may be; `choose` checks it.
CHOICES: dict[str, Collection[str]] = {
    "--method": METHODS,
    "--quantization": ("none", "nf4"),
    "--base-compute": ("bf16", "fp8"),
    "--engine": ("auto", "fused", "plain"),
    "--case": TABLES,
    "--vs": BASELINES,
}


@dataclass(frozen=True)
class Case:
    """Everything that one measurement depends on.

    Attributes:
        name: as the table shows it.
        shape: of the base model, see `shapes`.
        adapter: the settings of a method.
        tasks: T.
        quantization: of the base weights, `none` or `nf4`.
        base_compute: arithmetic of the frozen products, `bf16` or `fp8`.
        engine: of the packed model: `auto`, `fused` or `plain`.
        row_length: tokens that a packed row holds.
        rows_per_step: rows of one optimiser step.
        rows_per_pass: of them, rows that go through the model together.
        dtype: as a recipe spells it.
        gradient_checkpointing: what the backward pass computes again, as a recipe spells it.
        memory: `auto`: `rows_per_pass`, `gradient_checkpointing` and `expanded_layers` are picked where it is
            measured.
        memory_limit: GiB that `auto` plans with, or None for all that are free.
        expanded_layers: of NF4, first layers that stay there as dense matrices, too.
        max_gradient_norm: at which gradients are clipped.
        baseline: which of `BASELINES` it is, or None.
    """

    name: str
    shape: str
    adapter: Mapping[str, Any]
    tasks: int = 8
    quantization: str = "none"
    base_compute: str = "bf16"
    engine: Literal["auto", "fused", "plain"] = "auto"
    row_length: int = 8192
    rows_per_step: int = 1
    rows_per_pass: int = 1
    dtype: str = "auto"
    gradient_checkpointing: bool | Recompute = False
    memory: Literal["manual", "auto"] = "manual"
    memory_limit: float | None = None
    expanded_layers: int = 0
    max_gradient_norm: float = 1.0
    baseline: Literal["packed", "peft", "plain", "lora"] | None = None

    def to_json(self) -> dict[str, Any]:
        again = self.gradient_checkpointing
        return asdict(self) | {
            "gradient_checkpointing": again if isinstance(again, bool) else again.model_dump()
        }

    def named(self) -> Case:
        """With a name that says what it is."""
        parts = [self.adapter["method"]]
        modules = tuple(self.adapter["target_modules"])
        known = projections(self.shape)
        if modules != known["qkvo"]:
            short = {names: word for word, names in known.items()}
            parts.append(
                short.get(modules, ",".join(name.removesuffix("_proj") for name in modules))
            )
        if self.quantization != "none":
            parts.append(self.quantization)
        if self.base_compute != "bf16":
            parts.append(self.base_compute)
        if self.engine != "auto":
            parts.append(self.engine)
        return replace(self, name=f"{self.shape} {' '.join(parts)}")


@dataclass(frozen=True)
class CasePlan:
    """The cases in the order in which they are measured; PEFT's settings are tried after them.

    Attributes:
        cases: our own, baselines `plain` and `lora` among them.
        peft: the case whose examples PEFT trains on, too, padded; None if it is not asked for.
        packed: the case whose rows PEFT trains on, too, with public kernels; None likewise.
    """

    cases: tuple[Case, ...]
    peft: Case | None = None
    packed: Case | None = None


def choose(option: str, value: str) -> str:
    """The value, if the option knows it.

    Raises:
        UsageError: it does not.
    """
    known = CHOICES[option]
    if value not in known:
        raise UsageError(
            f"{option}: expected one of {', '.join(known)}, received '{value}'"
            f"{did_you_mean(value, known)}"
        )
    return value


def with_method(adapter: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The adapter's fields with this method: another one takes only what every method reads."""
    if method == adapter["method"]:
        return dict(adapter)
    return {**{name: adapter[name] for name in common_keys() if name in adapter}, "method": method}


def target_modules(words: str, shape: str) -> tuple[str, ...]:
    """`qkvo`, `all`, or names with commas between them, in a shape.

    Raises:
        UsageError: it names nothing.
    """
    known = projections(shape)
    if words in known:
        return known[words]
    names = tuple(name.strip() for name in words.split(",") if name.strip())
    if not names:
        raise UsageError("--modules: expected qkvo, all, or names of layers, received nothing")
    return names


def plan(base: Case, *, table: str | None, versus: Sequence[str], own_shape: bool) -> CasePlan:
    """The cases of a call.

    Args:
        base: what the options say.
        table: one of `TABLES`, or None for the case alone.
        versus: baselines.
        own_shape: a shape was asked for; the yardstick then leaves out its second model.

    Raises:
        UsageError: a case would be its own baseline.
    """
    base = base.named()
    cases = [base]
    if table is not None:
        cases = _yardstick(base, own_shape) if table == "yardstick" else _growth(base)
    first = cases[0]
    if "plain" in versus:
        if first.engine == "plain":
            raise UsageError("--vs plain: the case itself runs on the plain engine")
        cases = _with_baseline(cases, replace(first, engine="plain", baseline="plain").named())
    if "lora" in versus:
        if first.adapter["method"] == "lora":
            raise UsageError("--vs lora: the case itself is plain LoRA")
        lora = replace(first, adapter=_as_lora(first), baseline="lora").named()
        cases = _with_baseline(cases, lora)
    whole = table == "yardstick"
    return CasePlan(
        tuple(cases),
        peft=replace(first, baseline="peft") if whole or "peft" in versus else None,
        packed=replace(first, baseline="packed") if whole or "packed" in versus else None,
    )


def _yardstick(base: Case, own_shape: bool) -> list[Case]:
    every = {**base.adapter, "target_modules": projections(base.shape)["all"]}
    cases = [
        base,
        replace(base, quantization="nf4"),
        replace(base, adapter=_as_lora(base)),
        replace(base, adapter=every),
        replace(base, base_compute="fp8"),
    ]
    if not own_shape:
        cases.append(replace(base, shape="smollm2-135m"))
    named = [case.named() for case in cases]
    return [case for place, case in enumerate(named) if case not in named[:place]]


def _growth(base: Case) -> list[Case]:
    """More tasks, longer rows, and several rows a step of which `memory: auto` picks how many go together."""
    long, many = 4 * base.row_length, 1000
    cases = [
        base,
        replace(base, tasks=64),
        replace(base, tasks=256),
        replace(base, tasks=many),
        replace(base, row_length=long),
        replace(base, row_length=long, tasks=many),
        replace(base, rows_per_step=8, memory="auto"),
        replace(base, rows_per_step=8, memory="auto", tasks=many),
    ]
    return [replace(one, name=f"{one.named().name}, {_size(one)}") for one in cases]


def _size(case: Case) -> str:
    several = f"{case.rows_per_step} x " if case.rows_per_step > 1 else ""
    return f"T = {case.tasks:,}, {several}{case.row_length:,}"


def _with_baseline(cases: list[Case], baseline: Case) -> list[Case]:
    """With the baseline at the end, or in place of a case that is the same."""
    if any(case.name == baseline.name for case in cases):
        return [baseline if case.name == baseline.name else case for case in cases]
    return [*cases, baseline]


def _as_lora(case: Case) -> dict[str, Any]:
    """Plain LoRA of the same rank: one up-projection, no transforms, no gates."""
    return with_method(case.adapter, "lora")
