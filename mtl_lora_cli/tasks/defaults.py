"""What a first recipe sets, by the size of the base model and of the mixture. What the card is like decides
about weights and memory only: `starter`.

Too few steps were the first reason why nothing was learned, too high a rate the second (docs/study.md). So a
step takes fewer tokens where the mixture is small, until there are a thousand steps, two thousand with a small model;
and a smaller step gets a lower rate, by the square root of its share.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

# A CPU's instructions for bfloat16, as `multiplies_halves` names them.
Halves = Literal["vectors", "tiles"]

FEW = 500  # below so many `validate` warns
# By where it is learned. A small model left hard tasks at one answer in three epochs of a small mixture and learned
# them in six; and of as many tokens it learned more in twice the steps of half as many.
_EPOCHS = {"cpu": 6, "small": 6, "large": 3}
_STEPS = {
    "cpu": 2_000,
    "small": 2_000,
    "large": 1_000,
}  # a step is made smaller until there are so many
_FEWEST = {
    "cpu": 1_000,
    "small": 2_000,
    "large": 1_000,
}  # the smallest step is taken so often, however few rows
_SMALL, _LARGE = 10**9, 5 * 10**9  # parameters of a base model
_HOUR = 3600.0
_FLOP = 8  # a token and parameter, forward and backward, at half of what a matrix product reaches


class _Core(NamedTuple):
    """What a core of a CPU does, with smollm2-135m. What is written depends on this and never on how busy the machine is.

    Attributes:
        rate: operations a second of a step, as `_FLOP` counts them, with something to spare.
        fixed: seconds of a step that no tokens take.
        told: for what is told: operations of a step as those of its products, at the speed that they reach here.
        told_fixed: for what is told, seconds likewise.
    """

    rate: float
    fixed: float
    told: float
    told_fixed: float


# Of float32 two thirds of what the recorded quickstart reached on an AMD EPYC, of vectors five sixths of what a run with
# one thread did there. An Intel Xeon with tiles multiplies 2.6 times as fast and is no faster: the rest takes longer.
_CORES: dict[Halves | None, _Core] = {
    None: _Core(60e9, 0.0, 4.5, 0.25),
    "vectors": _Core(450e9, 0.0, 5.5, 0.25),
    "tiles": _Core(380e9, 0.6, 25.0, 0.6),
}
_ROUND = 50  # steps that an hour allows are rounded down to a multiple
# Tokens of a step that the rates are for, how far a larger step may raise them, and the tokens that a mixture may have.
_MEASURED_AT = {"cpu": 2_048, "small": 2_048, "large": 8_192}
_RAISED = {"cpu": 1.0, "small": math.sqrt(2), "large": 1.0}
_TOKENS = {
    "cpu": (128, 256, 512, 1_024, 2_048),
    "small": (2_048, 4_096, 8_192),
    "large": (4_096, 8_192, 16_384),
}


@dataclass(frozen=True)
class Mixture:
    """How much there is to learn from.

    Attributes:
        tokens: of all training rows, about.
        longest: tokens of the longest row that was looked at, about.
    """

    tokens: int
    longest: int


@dataclass(frozen=True)
class Choice:
    """What a first recipe sets.

    Attributes:
        rank, alpha: of the adapter; the update is scaled by 2.
        rate, up_rate, transform_rate: of A, of B and of the diagonals.
        clipping: by each tensor's own history, which these rates need.
        row_length, rows_per_step: of packed rows.
        epochs: over the rows.
        max_steps: where the mixture is small; None: as many as the epochs have.
        why: of the steps, in words.
        hours: that it takes on this CPU, about, with its cores for itself; None where nothing says so.
        looked_at: held-out rows of each task at a look, at most; None: there are none.
        dtype: of the base weights; None: as `auto` says.
    """

    rank: int
    alpha: int
    rate: float
    up_rate: float
    transform_rate: float
    clipping: bool
    row_length: int
    rows_per_step: int
    epochs: int
    max_steps: int | None
    why: str
    hours: float | None = None
    looked_at: int | None = None
    dtype: str | None = None


def choose(
    parameters: int | None,
    mixture: Mixture | None,
    *,
    cores: int | None = None,
    halves: Halves | None = None,
    flops: float | None = None,
    held_out: bool = False,
) -> Choice:
    """The settings for a base model and a mixture.

    Args:
        parameters: of the base model; None: not known, and taken for large.
        mixture: None: its rows are not at hand.
        cores: of the CPU that learns; None: there is a card.
        halves: that CPU's instructions for bfloat16; None: it has none.
        flops: that the CPU's matrix products reach a second; it says what is told, not what is written.
        held_out: some task has a validation split.
    """
    size = parameters or 7 * 10**9
    kind = "cpu" if cores else "small" if size < _SMALL else "large"
    sizes: tuple[int, ...] = _TOKENS[kind]
    dtype = "bfloat16" if halves else "float32"
    core = _CORES[halves]
    if cores:  # a step holds a whole row, and a CPU makes one pass of it
        sizes = tuple(dict.fromkeys(max(each, _row(each, mixture)) for each in sizes))
    in_an_hour = {each: _affordable(size, each, cores, core) for each in sizes}
    sizes = tuple(each for each in sizes if in_an_hour[each] >= _STEPS[kind]) or sizes[:1]
    tokens, max_steps, epochs, why = _steps(sizes, mixture, kind)
    row = tokens if cores else _row(tokens, mixture)
    step = row * max(1, tokens // row)
    wanted = max_steps or (math.inf if mixture is None else epochs * mixture.tokens / step)
    if in_an_hour[tokens] < wanted:
        max_steps = max(FEW, int(in_an_hour[tokens]) // _ROUND * _ROUND)
        most = "as many as an hour allows" if max_steps <= in_an_hour[tokens] else "the fewest"
        why = f"{max_steps:,} steps: {most} on {cores} CPU core{'s' * (cores != 1)}."
    hours = None
    steps = max_steps or wanted
    if flops and steps < math.inf:
        hours = steps * (core.told_fixed + core.told * size * step / flops) / _HOUR
    rate = (1e-3 if size < _SMALL else 4e-4 if size < _LARGE else 2e-4) * _share(tokens, kind)
    return Choice(
        rank=16,
        alpha=32,
        rate=rate,
        up_rate=4 * rate,
        transform_rate=10 * rate,
        clipping=size < _SMALL,
        row_length=row,
        rows_per_step=max(1, tokens // row),
        epochs=epochs,
        max_steps=max_steps,
        why=why,
        hours=hours,
        looked_at=(40 if cores else 200) if held_out else None,
        dtype=dtype if cores and halves else None,
    )


def _affordable(size: int, tokens: int, cores: int | None, core: _Core) -> float:
    """Steps of so many tokens that an hour of a CPU's cores allows; without cores any number."""
    if not cores:
        return math.inf
    return _HOUR / (core.fixed + _FLOP * size * tokens / (cores * core.rate))


def _steps(
    sizes: tuple[int, ...], mixture: Mixture | None, kind: str
) -> tuple[int, int | None, int, str]:
    """Tokens a step, the steps where they end the run, epochs, and why."""
    epochs, fewest = _EPOCHS[kind], _FEWEST[kind]
    why = "How often each task's rows are gone over."
    if mixture is None:
        return sizes[-1], None, epochs, why
    for tokens in reversed(sizes):
        if epochs * mixture.tokens >= _STEPS[kind] * tokens:
            return tokens, None, epochs, why
    if epochs * mixture.tokens >= fewest * sizes[0]:
        return sizes[0], None, epochs, why
    passes = fewest * sizes[0] / max(1, mixture.tokens)
    why = f"The mixture is small: {fewest:,} steps go over it about {max(1, round(passes))} times."
    # Packed rows are never full, and tokens were estimated: `max_steps` is what ends it.
    return sizes[0], fewest, math.ceil(4 * passes) + epochs, why


def _share(tokens: int, kind: str) -> float:
    """A smaller step is noisier: the rate falls with the square root, to a half at most."""
    share = math.sqrt(tokens / _MEASURED_AT[kind])
    return min(_RAISED[kind], max(0.5, share))


def _row(tokens: int, mixture: Mixture | None) -> int:
    """Tokens of a packed row: the least that holds the rows that were looked at."""
    longest = 2_048 if mixture is None else mixture.longest
    fitting = [row for row in (128, 256, 512, 1_024, 2_048) if row >= longest]
    wanted = fitting[0] if fitting else 2_048
    return wanted if tokens <= wanted else min(tokens, max(wanted, 512))


def parameters_of(base_model: str) -> int | None:
    """How many parameters a base model has, about, without fetching it; None where nothing says so.

    A folder's configuration says it, a GGUF file's tensors, or a name such as `Llama-2-7b-hf`.
    """
    path = Path(base_model).expanduser()
    if (path / "config.json").is_file():
        return _by_config(path / "config.json")
    if path.suffix == ".gguf" and path.is_file():
        return _by_gguf(path)
    found = re.findall(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)([mb])(?![a-z])", base_model.lower())
    if not found:
        return None
    number, unit = found[-1]
    return int(float(number) * (10**6 if unit == "m" else 10**9))


def _by_gguf(path: Path) -> int:
    from gguf import GGUFReader

    try:
        return sum(int(tensor.n_elements) for tensor in GGUFReader(str(path)).tensors)
    except (OSError, ValueError, KeyError, IndexError):  # `validate` says what is wrong with it
        return path.stat().st_size  # about a byte a weight


def _by_config(path: Path) -> int | None:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config = config.get("text_config") or config
        hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
        inner = int(config.get("intermediate_size") or 4 * hidden)
        experts = int(config.get("num_local_experts") or config.get("num_experts") or 1)
        return layers * (4 * hidden**2 + 3 * hidden * inner * experts) + hidden * int(
            config["vocab_size"]
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
