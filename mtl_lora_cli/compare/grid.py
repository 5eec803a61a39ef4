"""Which runs a comparison makes: methods × settings × seeds. Nothing slow to load is needed here."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from mtl_lora_cli.adapters import methods as adapter_methods
from mtl_lora_cli.adapters.methods import METHODS, every_key
from mtl_lora_cli.bench.cases import with_method
from mtl_lora_cli.errors import ProblemsError, UsageError, did_you_mean
from mtl_lora_cli.recipe.load import COMMAND_LINE
from mtl_lora_cli.recipe.names import NAME
from mtl_lora_cli.recipe.schema import Recipe
from mtl_lora_cli.recipe.training import Training
from mtl_lora_cli.recipe.yaml_file import Document, parse_scalar, validate_document

RATE = "training.learning_rate"
PARTS_OF_ALL = ("down", "up", "whole", "decoder")  # of `training.parts`, whatever the method
SWEPT = ("adapter", "training", "mixing")  # parts of a recipe whose keys may be swept
CUT = "rows cut from train"  # validation rows of a task that has no split for them
UNTRAINED = "untrained"  # stands beside the methods: the base model alone
REFERENCES = "references"  # likewise, of maps: the runs over which Δm is
TEST, VALIDATION = SCORED = ("test", "validation")  # rows that the report may be about


@dataclass(frozen=True)
class Point:
    """One setting of a method.

    Attributes:
        label: its part of a run's name; empty where nothing is swept.
        settings: key → value, what makes it differ from the recipe.
        filled: it stands for a key that the method does not read.
    """

    label: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    filled: bool = False

    @property
    def text(self) -> str:
        """As reports show it."""
        return ", ".join(f"{key}={shown(value)}" for key, value in self.settings.items())


@dataclass(frozen=True)
class Variant:
    """A method under a name of its own.

    Attributes:
        method: which one it is.
        settings: key → value, what holds in all of its runs.
    """

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """As reports show it."""
        settings = ", ".join(f"{key}={shown(value)}" for key, value in self.settings.items())
        return f"{self.method} with {settings}" if settings else self.method


def shown(value: Any) -> str:
    """A swept value as it is typed."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def parse_methods(text: str, variants: Mapping[str, Variant] | None = None) -> list[str]:
    """Methods with commas between them, or variants of them.

    Raises:
        UsageError: none, an unknown one, one twice, or a variant that is not among them.
    """
    known = [*METHODS, *(variants or {})]
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UsageError(
                f"--methods: unknown method '{name}'{did_you_mean(name, known)}; "
                f"methods: {', '.join(known)}"
            )
    _require_different("--methods", names)
    if not names:
        raise UsageError(f"--methods: expected at least one of {', '.join(known)}")
    for name in variants or {}:
        if name not in names:
            raise UsageError(f"--variant: '{name}' is not among --methods: {', '.join(names)}")
    return names


def parse_variants(texts: Sequence[str]) -> dict[str, Variant]:
    """`NAME=METHOD,key=value,…`, each name once.

    Raises:
        UsageError: a text that is not so, an unknown method, a key that it does not read, or that a
            comparison decides itself.
    """
    variants: dict[str, Variant] = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        method, *parts = re.split(r",(?=[A-Za-z_.]+=)", rest)
        if not equals or not NAME.fullmatch(name) or not all("=" in part for part in parts):
            raise UsageError(f"--variant: expected NAME=METHOD,key=value,…, received '{text}'")
        if name in METHODS or name in variants or name == UNTRAINED:
            raise UsageError(f"--variant: '{name}' is a name already; choose another one")
        if method not in METHODS:
            raise UsageError(
                f"--variant: '{name}': unknown method '{method}'{did_you_mean(method, METHODS)}; "
                f"methods: {', '.join(METHODS)}"
            )
        settings: dict[str, Any] = {}
        for part in parts:
            key, _, value = part.partition("=")
            _require_free(key, "--variant")
            if key == "adapter.rank":
                raise UsageError(f"--variant: '{name}': 'adapter.rank' is what --match picks")
            if not reads(method, key):
                raise UsageError(f"--variant: '{name}': {method} does not read '{key}'")
            try:
                settings[key] = parse_scalar(value)
            except ProblemsError:
                raise UsageError(f"--variant: '{part}': the value is not valid YAML") from None
        variants[name] = Variant(method, settings)
    return variants


def parse_seeds(text: str, first: int = 0) -> list[int]:
    """`3`: three seeds from the recipe's own one on; `0,7`: these seeds.

    Raises:
        UsageError: it is neither, or a seed stands twice.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isdecimal() for word in words):
        raise UsageError(
            f"--seeds: expected a number of seeds, or seeds with commas between, received '{text}'"
        )
    numbers = [int(word) for word in words]
    if "," not in text:
        if numbers[0] < 1:
            raise UsageError("--seeds: expected at least one seed, received 0")
        return list(range(first, first + numbers[0]))
    _require_different("--seeds", numbers)
    return numbers


def parse_match(text: str) -> int | str | None:
    """`params`, `none` (None), or N of `params:N`.

    Raises:
        UsageError: it is none of them.
    """
    word, colon, number = text.partition(":")
    digits = number.replace("_", "")
    if word == "params" and not colon:
        return "params"
    if word == "params" and digits.isdecimal() and int(digits) > 0:
        return int(digits)
    if text == "none":
        return None
    raise UsageError(f"--match: expected params, params:N or none, received '{text}'")


def parse_score(text: str) -> str:
    """`test` or `validation`: the rows that the report is about.

    Raises:
        UsageError: it is neither.
    """
    if text not in SCORED:
        raise UsageError(
            f"--score: expected {' or '.join(SCORED)}, received '{text}'{did_you_mean(text, SCORED)}"
        )
    return text


def parse_baseline(name: str | None, methods: Sequence[str]) -> str:
    """The method that the others are compared with: by default lora, else the first.

    Raises:
        UsageError: it is none of the methods.
    """
    if name is None:
        return "lora" if "lora" in methods else methods[0]
    if name not in methods:
        raise UsageError(
            f"--baseline: expected one of {', '.join(methods)}, received '{name}'"
            f"{did_you_mean(name, methods)}"
        )
    return name


def parse_sweeps(texts: Sequence[str]) -> dict[str, list[Any]]:
    """`key=v1,v2`, each key once.

    Raises:
        UsageError: a text that is not so, a key twice, or one that a comparison decides itself.
    """
    sweeps: dict[str, list[Any]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or not key or not values.strip():
            raise UsageError(f"--sweep: expected key=v1,v2, received '{text}'")
        try:
            found = parse_scalar(f"[{values}]")
        except ProblemsError:
            raise UsageError(f"--sweep: '{text}': the values are not valid YAML") from None
        if key in sweeps:
            raise UsageError(f"--sweep: the key '{key}' stands twice")
        _require_free(key, "--sweep")
        _require_different(f"--sweep: {key}", found)
        sweeps[key] = found
    return sweeps


def _require_free(key: str, option: str) -> None:
    """Refuse a key that does not belong to a setting."""
    if key.split(".")[0] not in SWEPT:
        raise UsageError(
            f"{option}: '{key}' cannot be swept; keys below {', '.join(SWEPT)} can"
            f"{did_you_mean(key, _known_keys())}"
        )
    owner = {"adapter.method": "--methods", "training.seed": "--seeds"}.get(key)
    if owner:
        raise UsageError(f"{option}: '{key}' is what {owner} says")


def require_known(sweeps: Mapping[str, Sequence[Any]], recipe: Recipe) -> None:
    """Every swept key exists, and its values are allowed in some method.

    Raises:
        ProblemsError: with one line for every fault.
    """
    for key, values in sweeps.items():
        name = key.partition(".")[2]
        readers = [method for method in METHODS if reads(method, key)]
        if key.startswith("adapter.") and not readers:
            raise UsageError(f"--sweep: '{key}': unknown key{did_you_mean(name, every_key())}")
        method = recipe.adapter.method if recipe.adapter.method in readers else readers[0]
        if key in ("adapter.rank", "adapter.up_projections"):
            continue  # what goes with them (moelora's even share) is checked for each run
        for value in values:
            with_settings(recipe, method, {key: value}, option="--sweep")


def reads(method: str, key: str) -> bool:
    """Whether a key of the recipe means anything to a method."""
    part, _, name = key.partition(".")
    return part != "adapter" or adapter_methods.reads(method, name.split(".")[0])


def points_of(
    method: str | Variant, sweeps: Mapping[str, Sequence[Any]], rate: float
) -> list[Point]:
    """The settings that a method is tried with: Π |values| of them, whatever it reads.

    Every method gets the same number of settings, since the best of many is better than the best
    of one by chance alone. Where it does not read a key, its settings are filled up with multiples
    of the learning rate, 1, 1/2, 2, 1/4, 4, …, that are not among them yet.

    Args:
        method: one of the methods, or a variant, which does not read what its own settings say.
        sweeps: key → values.
        rate: the recipe's learning rate.
    """
    if not sweeps:
        return [Point()]
    variant = Variant(method) if isinstance(method, str) else method
    rate = float(variant.settings.get(RATE, rate))
    budget = 1
    for values in sweeps.values():
        budget *= len(values)
    own = {
        key: values
        for key, values in sweeps.items()
        if reads(variant.method, key) and key not in variant.settings
    }
    grid = [dict(zip(own, values, strict=True)) for values in product(*own.values())]
    settings: list[tuple[dict[str, Any], bool]] = [(one, False) for one in grid]
    seen = {_identity(one, rate) for one in grid}
    factors = _factors()
    next(factors)  # 1: the grid itself
    while len(settings) < budget:
        factor = next(factors)
        for one in grid:
            filled = {**one, RATE: one.get(RATE, rate) * factor}
            if len(settings) < budget and _identity(filled, rate) not in seen:
                seen.add(_identity(filled, rate))
                settings.append((filled, True))
    if not own:  # one setting says nothing: it is the recipe's own rate, and is called so
        settings[0] = ({RATE: rate}, True)
    labels = [_label(one) for one, _ in settings]
    if len(set(labels)) < len(labels) or max(map(len, labels)) > 50:
        labels = [f"setting{number}" for number in range(1, len(settings) + 1)]
    return [
        Point(label, one, filled) for label, (one, filled) in zip(labels, settings, strict=True)
    ]


def with_settings(
    recipe: Recipe, method: str, settings: Mapping[str, Any], option: str = COMMAND_LINE
) -> Recipe:
    """The recipe with another method and other values.

    The keys that only some methods read are the recipe's own method's, and so are the rates of parts that only some have:
    another method starts from its own defaults.

    Raises:
        ProblemsError: a value that a recipe may not have.
    """
    data = recipe.model_dump()
    data["adapter"] = with_method(data["adapter"], method)
    if method != recipe.adapter.method:
        parts = data["training"]["parts"]
        data["training"]["parts"] = {name: parts[name] for name in PARTS_OF_ALL}
    for key, value in settings.items():
        *parents, last = key.split(".")
        here = data
        for part in parents:
            below = here.get(part)
            here[part] = copy.copy(below) if isinstance(below, dict) else {}
            here = here[part]
        here[last] = value
    return validate_document(Document(file=option, data=data), Recipe)


def budget_lines(points: Mapping[str, Sequence[Point]], seeds: int) -> list[str]:
    """What each method is tried with, in words: the tuning budget."""
    count = len(next(iter(points.values())))
    runs = f"{seeds} seed{'s' * (seeds > 1)}"
    if count == 1:
        return [f"tuning: none; each method runs as it stands, on {runs}"]
    lines = [f"tuning: {count} settings for each method, on {runs}: {count * seeds} runs each"]
    for method, own in points.items():
        filled = [point for point in own if point.filled]
        if filled:
            lines.append(
                f"{method} does not read every swept key: {len(filled)} of its {count} settings are "
                f"learning rates instead ({', '.join(point.text for point in filled)})"
            )
    return lines


def run_name(method: str, point: Point, seed: int) -> str:
    """`METHOD[-POINT]-seedN`."""
    return "-".join(part for part in (method, point.label, f"seed{seed}") if part)


def _label(settings: Mapping[str, Any]) -> str:
    parts = (f"{key.rpartition('.')[2]}-{shown(value)}" for key, value in settings.items())
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", "-".join(parts)).strip("_")


def _identity(settings: Mapping[str, Any], rate: float) -> str:
    """Equal for equal settings; a rate that is the recipe's own need not be said."""
    full = {**settings, RATE: round(float(settings.get(RATE, rate)), 12)}
    return repr(sorted((key, repr(value)) for key, value in full.items()))


def _factors() -> Iterator[float]:
    yield 1.0
    power = 2.0
    while True:
        yield 1 / power
        yield power
        power *= 2


def _known_keys() -> list[str]:
    return [
        *(f"adapter.{name}" for name in every_key()),
        *(f"training.{name}" for name in Training.model_fields),
    ]


def _require_different(what: str, values: Sequence[Any]) -> None:
    for place, value in enumerate(values):
        if value in values[:place]:
            raise UsageError(f"{what}: '{value}' stands twice")
