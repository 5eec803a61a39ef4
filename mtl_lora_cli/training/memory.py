"""`training.memory: auto`: rows a pass, and what to compute again, so that a step fits its device."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mtl_lora_cli.engine.memory import (
    GIB,
    fixed_bytes,
    needed_bytes,
    peak_bytes,
    recompute_of,
    weight_bytes,
)
from mtl_lora_cli.engine.sizes import Load, ModelSizes
from mtl_lora_cli.errors import MtlLoraError, UsageError
from mtl_lora_cli.machine.cards import free_memory, memory_in_use
from mtl_lora_cli.machine.processes import ALONE, Processes
from mtl_lora_cli.models.load import on_meta
from mtl_lora_cli.recipe.schema import Recipe, Recompute
from mtl_lora_cli.training.fit import (
    SHORTEST_ROW,
    Situation,
    UnknownLayersError,
    densest,
    longest_of,
    remedies,
    situation_of,
    together,
)

if TYPE_CHECKING:
    import torch

    from mtl_lora_cli.data.prepare import TrainingData
    from mtl_lora_cli.models.base import BaseModel
    from mtl_lora_cli.training.prepare import Prepared


@dataclass(frozen=True)
class Choice:
    """What was picked.

    Attributes:
        row_length, rows_per_step, rows_per_pass: concrete.
        recompute: the same.
        peak: of the tensors, estimated.
        saved: how much larger the peak would be with everything kept.
        free: what there was.
    """

    row_length: int
    rows_per_step: int
    rows_per_pass: int
    recompute: Recompute
    peak: int
    saved: int
    free: int

    def settings(self) -> dict[str, Any]:
        """The recipe's `training` keys that repeat this choice, on any machine."""
        one = self.recompute
        return {
            "memory": "manual",
            "row_length": self.row_length,
            "rows_per_step": self.rows_per_step,
            "rows_per_pass": self.rows_per_pass,
            "gradient_checkpointing": False if one == Recompute() else one,
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
        saving = f"{again} computed again (saves {self.saved / GIB:.1f} GiB)"
        return (
            f"memory: {self.free / GIB:.1f} GiB free on {device}: {rows}; "
            f"{saving if again else 'nothing computed again'}; "
            f"estimated peak {self.peak / GIB:.1f} GiB"
        )

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
) -> Choice | int:
    """The cheapest way that fits.

    First as many rows a pass as fit without computing a product again; then one row a pass, and as
    few products again as will do; then shorter rows, in halves, and as many more of them a step.

    Args:
        sizes: of model and adapter.
        free: bytes on the device.
        row_length, rows_per_step: of the recipe.
        supervised: for a row length, the most supervised tokens that a row has.
        longest: tokens of the longest example; no row is shorter.
        processes: among whom a step's rows are dealt out.

    Returns:
        The choice, or, where nothing fits, the bytes that would have to be free.
    """
    length, rows, least = row_length, rows_per_step, 0
    while True:
        each = Load(length, min(length, supervised(length)), longest)
        found = _within(sizes, free, each, -(-rows // processes))
        if found is not None:
            count, recompute = found
            load = together(sizes, each, count)
            peak = peak_bytes(sizes, recompute, load)
            saved = peak_bytes(sizes, Recompute(), load) - peak
            return Choice(length, rows, count, recompute, peak, saved, free)
        everything = recompute_of(True, len(sizes.layers))
        least = needed_bytes(peak_bytes(sizes, everything, together(sizes, each, 1)))
        if length // 2 < max(longest, SHORTEST_ROW):
            return least
        length, rows = length // 2, rows * 2


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
    qkv, gate_up = sizes.layers[0].qkv.outputs, sizes.layers[0].gate_up.outputs
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


def plan_memory(
    recipe: Recipe,
    base: BaseModel,
    config: Any,
    data: TrainingData,
    device: torch.device,
    dtype: torch.dtype,
    processes: Processes = ALONE,
) -> tuple[Recipe, str]:
    """The recipe with what `training.memory: auto` picks for this device, and the line that says so.

    Args:
        recipe: of the run.
        base: its base model.
        config: the adapter's settings.
        data: encoded tasks.
        device, dtype: where and in what the base model will compute.
        processes: of the run: all do as the one with the least memory can.

    Raises:
        UsageError: the layers are not the fused engine's, or nothing fits.
    """
    model, adapter = on_meta(base, config, [task.name for task in data.tasks])
    situation = Situation(
        recipe=recipe,
        model=model,
        adapter=adapter,
        device=device,
        dtype=dtype,
        processes=processes.count,
        densest=lambda length, loss_on: densest(data, length, loss_on),
        longest=longest_of(data),
    )
    free, name = min(processes.gather(free_memory(device)))
    training = recipe.training
    found = pick(situation, free)
    if isinstance(found, int):
        raise UsageError(
            f"training.memory: auto: {free / GIB:.1f} GiB are free on {name}, and the least that is "
            f"needed is {found / GIB:.1f} GiB, with everything computed again; "
            f"what would help: {'; '.join(_remedies(recipe, dtype)[:3])}"
        )
    picked = training.model_copy(update=found.settings())
    message = found.message(name, training.row_length, training.rows_per_step)
    return recipe.model_copy(update={"training": picked}), message


def pick(situation: Situation, free: int) -> Choice | int:
    """What `training.memory: auto` picks where so many bytes are free: see `choose`.

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
    return choose(
        sizes,
        free,
        row_length=training.row_length,
        rows_per_step=training.rows_per_step,
        supervised=lambda length: situation.densest(length, training.loss_on),
        longest=situation.longest,
        processes=situation.processes,
    )


def _remedies(recipe: Recipe, dtype: torch.dtype) -> list[str]:
    """Settings that take less memory, the most helpful first."""
    found = []
    if recipe.quantization == "none":
        found.append("quantization: nf4")
    if dtype.itemsize > 2:
        found.append("dtype: bfloat16")
    found.append("a smaller training.row_length with on_overflow: truncate_prompt")
    if recipe.training.loss_on == "all":
        found.append("training.loss_on: answer")
    found.append("fewer adapter.target_modules")
    found.append("a smaller base_model")
    return found


@contextmanager
def explained(prepared: Prepared) -> Iterator[None]:
    """Out of memory: what was in use, and which settings would help by how much.

    Raises:
        MtlLoraError: in the place of torch's error.
    """
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise MtlLoraError(_out_of_memory(prepared, error)) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # the CPU's allocator has no type of its own
            raise
        raise MtlLoraError(_out_of_memory(prepared, error)) from error


def _out_of_memory(prepared: Prepared, error: BaseException) -> str:
    asked = re.search(r"allocate:? (?:([\d.]+ [KMG]iB)|(\d+) bytes)", str(error))
    size = asked and (asked[1] or f"{int(asked[2]) / 2**20:,.1f} MiB")
    wanted = f", asked for {size} more" if size else ""
    where = memory_in_use(prepared.device)
    try:
        parts, helpful = _parts_and_remedies(prepared)
    except UnknownLayersError:
        parts, helpful = "", "; ".join(_remedies(prepared.recipe, prepared.dtype)[:3])
    return f"out of memory on {where}{wanted}{parts}; what would help: {helpful}"


def _parts_and_remedies(prepared: Prepared) -> tuple[str, str]:
    """What a step takes by estimate, and the three settings that save most of it."""
    situation = situation_of(prepared)
    sizes, recompute, load = situation.step()
    peak, fixed = peak_bytes(sizes, recompute, load), fixed_bytes(sizes)
    weights = weight_bytes(sizes)
    parts = (
        f"; by estimate a step takes {peak / GIB:.1f} GiB: weights {weights / GIB:.1f}, adapter, "
        f"optimiser and buffers {(fixed - weights) / GIB:.1f}, a pass of {load.positions:,} tokens "
        f"{(peak - fixed) / GIB:.1f}"
    )
    helpful = ", ".join(
        f"{one.text} (−{one.saves / GIB:.1f} GiB)" for one in remedies(situation)[:3]
    )
    return parts, helpful or "a smaller base_model"
