"""`training.memory: auto`: rows a pass, and what to compute again, so that a step fits its device."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mtl_lora_cli.engine.memory import GIB, needed_bytes, peak_bytes, recompute_of
from mtl_lora_cli.engine.sizes import Load, ModelSizes
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.machine.cards import free_memory
from mtl_lora_cli.machine.processes import ALONE, Processes
from mtl_lora_cli.memory.remedies import settings_that_help
from mtl_lora_cli.memory.situation import (
    SHORTEST_ROW,
    Situation,
    UnknownLayersError,
    row_load,
    together,
)
from mtl_lora_cli.recipe.schema import Recipe
from mtl_lora_cli.recipe.training import Recompute


@dataclass(frozen=True)
class Choice:
    """What was picked.

    Attributes:
        row_length, rows_per_step, rows_per_pass: concrete.
        recompute: the same.
        peak: of the tensors, estimated.
        saved: how much larger the peak would be with everything kept.
        free: what there was.
        expanded: layers of 4 or 8 bits that stay there as dense matrices, too.
        quantised: how many there are that could be.
        limit: of `training.memory_limit`, GiB.
    """

    row_length: int
    rows_per_step: int
    rows_per_pass: int
    recompute: Recompute
    peak: int
    saved: int
    free: int
    expanded: int = 0
    quantised: int = 0
    limit: float | None = None

    def settings(self) -> dict[str, Any]:
        """The recipe's `training` keys that repeat this choice, on any machine."""
        one = self.recompute
        return {
            "memory": "manual",
            "memory_limit": None,
            "row_length": self.row_length,
            "rows_per_step": self.rows_per_step,
            "rows_per_pass": self.rows_per_pass,
            "gradient_checkpointing": False if one == Recompute() else one,
            "expanded_layers": self.expanded,
        }

    def message(self, device: str, asked_row: int, asked_rows: int) -> str:
        """What was picked and why, in one line.

        Args:
            device: its name.
            asked_row, asked_rows: `row_length` and `rows_per_step` of the recipe.
        """
        some = "1 row" if self.rows_per_pass == 1 else f"{self.rows_per_pass} rows"
        rows = f"rows of {self.row_length:,}, {some} a pass"
        if self.rows_per_pass < self.rows_per_step:
            rows += " (fewer, larger passes do not fit)"
        if self.row_length != asked_row:
            rows += (
                f" INSTEAD OF {asked_row:,}, which do not fit even with everything computed again;"
                f" {self.rows_per_step} rows a step instead of {asked_rows} keep its tokens, but the"
                " packing differs"
            )
        again = self._again()
        allowed = "" if self.limit is None else f", {self.limit:g} allowed"
        saving = f"{again} computed again (saves {self.saved / GIB:.1f} GiB)"
        return (
            f"memory: {self.free / GIB:.1f} GiB free on {device}{allowed}: {rows}; "
            f"{saving if again else 'nothing computed again'}; {self._left()}"
            f"estimated peak {self.peak / GIB:.1f} GiB"
        )

    def _left(self) -> str:
        """Of quantised layers, how many are left expanded."""
        if not self.quantised:
            return ""
        return f"{self.expanded or 'none'} of {self.quantised} layers left expanded; "

    def _again(self) -> str:
        one = self.recompute
        words = ["attention"] if one.attended else []
        for word, count in (("gate and up", one.gate_up), ("q, k and v", one.qkv)):
            if count:
                words.append(f"{word} in {count} layer{'s' * (count > 1)}")
        return " and ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} and {words[-1]}"


_WITHOUT_PRODUCTS = (Recompute(), Recompute(attended=True))


def choose(
    sizes: ModelSizes,
    free: int,
    *,
    row_length: int,
    rows_per_step: int,
    supervised: Callable[[int], int],
    longest: int,
    processes: int = 1,
    shares: bool = False,
    shown: Callable[[int], int] = lambda length: 0,
    expandable: bool = True,
) -> Choice | int:
    """The cheapest way that fits.

    First as many rows a pass as fit without computing a product again; then one row a pass, and as
    few products again as will do; then shorter rows, in halves, and as many more of them a step. What is
    free then holds layers of 4 or 8 bits as dense matrices: no pass expands these.

    Args:
        sizes: of model and adapter.
        free: bytes on the device.
        row_length, rows_per_step: of the recipe.
        supervised: for a row length, the most supervised tokens that a row has.
        longest: tokens of the longest example; no row is shorter.
        processes: among whom a step's rows are dealt out.
        shares: examples of a row share what they begin with.
        shown: for a row length, the most picture tokens that a row has.
        expandable: layers of 4 or 8 bits may be left expanded.

    Returns:
        The choice, or, where nothing fits, the bytes that would have to be free.
    """
    length, rows, least = row_length, rows_per_step, 0
    while True:
        each = row_load(length, supervised(length), longest, shares=shares)._replace(
            shown=shown(length)
        )
        found = _within(sizes, free, each, -(-rows // processes))
        if found is not None:
            count, recompute = found
            load = together(sizes, each, count)
            quantised = len(sizes.layers) if expandable and sizes.expanded else 0
            left = _left_expanded(sizes, free, recompute, load) if quantised else 0
            sizes = replace(sizes, left_expanded=left)
            peak = peak_bytes(sizes, recompute, load)
            saved = peak_bytes(sizes, Recompute(), load) - peak
            return Choice(length, rows, count, recompute, peak, saved, free, left, quantised)
        everything = recompute_of(True, len(sizes.layers))
        least = needed_bytes(peak_bytes(sizes, everything, together(sizes, each, 1)))
        if length // 2 < max(longest, SHORTEST_ROW):
            return least
        length, rows = length // 2, rows * 2


def _left_expanded(sizes: ModelSizes, free: int, recompute: Recompute, load: Load) -> int:
    """The most layers that fit beside a step."""

    def fits(count: int) -> bool:
        return (
            needed_bytes(peak_bytes(replace(sizes, left_expanded=count), recompute, load)) <= free
        )

    return bisect_left(range(1, len(sizes.layers) + 1), True, key=lambda count: not fits(count))


def _within(
    sizes: ModelSizes, free: int, row: Load, rows_per_step: int
) -> tuple[int, Recompute] | None:
    """Rows a pass and what is computed again; None where not even everything helps."""

    def fits(recompute: Recompute, count: int) -> bool:
        peak = peak_bytes(sizes, recompute, together(sizes, row, count))
        return needed_bytes(peak) <= free

    # Passes of equal size: 8 rows go in 4 and 4, not in 5 and 3.
    counts = dict.fromkeys(-(-rows_per_step // passes) for passes in range(1, rows_per_step + 1))
    for count in counts:
        for recompute in _WITHOUT_PRODUCTS:
            if fits(recompute, count):
                return count, recompute
    return _with_products(sizes, lambda recompute: fits(recompute, 1))


def _with_products(
    sizes: ModelSizes, fits: Callable[[Recompute], bool]
) -> tuple[int, Recompute] | None:
    """As few values of large products again as will do.

    A value of qkv costs as much as one of gate_up: both are a sum over d. So what counts is how
    many there are.
    """
    layers = len(sizes.layers)
    qkv, gate_up = sizes.layers[0].qkv.outputs, sizes.layers[0].gated
    best: tuple[int, Recompute] | None = None
    base = _WITHOUT_PRODUCTS[-1]
    for count in range(layers + 1):
        # More layers of qkv always take less memory: the fewest are found by halving.
        low, high = 0, layers
        while low < high:
            middle = (low + high) // 2
            if fits(base.model_copy(update={"gate_up": count, "qkv": middle})):
                high = middle
            else:
                low = middle + 1
        one = base.model_copy(update={"gate_up": count, "qkv": low})
        cost = count * gate_up + low * qkv
        if (best is None or cost < best[0]) and fits(one):
            best = cost, one
    return None if best is None else (1, best[1])


def plan_memory(situation: Situation, processes: Processes = ALONE) -> tuple[Recipe, str]:
    """The recipe with what `training.memory: auto` picks for this device, and the line that says so.

    Args:
        situation: of the run.
        processes: of the run: all do as the one with the least memory can.

    Raises:
        UsageError: the layers are not the fused engine's, or nothing fits.
    """
    recipe = situation.recipe
    training = recipe.training
    free, name = min(processes.gather(free_memory(situation.device)))
    choice = pick(situation, free)
    if isinstance(choice, int):
        helpful = "; ".join(settings_that_help(recipe, situation.dtype)[:3])
        raise UsageError(
            f"training.memory: auto: {there(free, training.memory_limit, name)}, and the least that is "
            f"needed is {choice / GIB:.1f} GiB, with everything computed again; "
            f"what would help: {helpful}"
        )
    picked = training.model_copy(update=choice.settings())
    message = choice.message(name, training.row_length, training.rows_per_step)
    return recipe.model_copy(update={"training": picked}), message


def there(free: int, limit: float | None, name: str) -> str:
    """How much memory is free, and how much of it is allowed, in words.

    Args:
        free: bytes.
        limit: of `training.memory_limit`, GiB.
        name: of the device.
    """
    text = f"{free / GIB:.1f} GiB are free on {name}"
    return text if limit is None else f"{text}, {limit:g} are allowed by memory_limit"


def pick(situation: Situation, free: int) -> Choice | int:
    """What `training.memory: auto` picks where so many bytes are free, within `memory_limit`: see `choose`.

    Raises:
        UsageError: the layers are not the fused engine's.
    """
    training = situation.recipe.training
    try:
        sizes = situation.sizes()
    except UnknownLayersError as error:
        raise UsageError(
            f"training.memory: auto: {error}; set memory: manual, and rows_per_pass and "
            "gradient_checkpointing by hand"
        ) from None
    limit = training.memory_limit
    found = choose(
        sizes,
        free if limit is None else min(free, int(limit * GIB)),
        row_length=training.row_length,
        rows_per_step=training.rows_per_step,
        supervised=lambda length: situation.densest(length, training.loss_on),
        longest=situation.longest,
        processes=situation.processes,
        shares=training.share_beginnings,
        shown=situation.shown,
        expandable=situation.recipe.distributed.zero_stage < 3,
    )
    return found if isinstance(found, int) else replace(found, free=free, limit=limit)
