"""What to say where memory does not suffice."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mtl_lora_cli.engine.memory import GIB, fixed_bytes, peak_bytes, weight_bytes
from mtl_lora_cli.errors import MtlLoraError
from mtl_lora_cli.machine.cards import memory_in_use, pick_device
from mtl_lora_cli.memory.remedies import remedies, settings_that_help
from mtl_lora_cli.memory.situation import Situation, UnknownLayersError


@contextmanager
def explained(situation: Callable[[], Situation | None]) -> Iterator[None]:
    """Out of memory: what was in use, and which settings would help by how much.

    Args:
        situation: of what runs inside; asked for when it is needed; None where it is no text.

    Raises:
        MtlLoraError: in the place of torch's error.
    """
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise MtlLoraError(_explanation(situation, error)) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # the CPU's allocator has no type of its own
            raise
        raise MtlLoraError(_explanation(situation, error)) from error


def _explanation(situation: Callable[[], Situation | None], error: BaseException) -> str:
    known = situation()
    if known is not None:
        return _out_of_memory(known, error)
    return (
        f"out of memory on {memory_in_use(pick_device())}; what would help: fewer training.rows_per_pass, "
        "shorter rows (training.row_length) or smaller pictures (images.size)"
    )


def _out_of_memory(situation: Situation, error: BaseException) -> str:
    asked = re.search(r"allocate:? (?:([\d.]+ [KMG]iB)|(\d+) bytes)", str(error))
    size = asked and (asked[1] or f"{int(asked[2]) / 2**20:,.1f} MiB")
    wanted = f", asked for {size} more" if size else ""
    where = memory_in_use(situation.device)
    try:
        parts, helpful = _parts_and_remedies(situation)
    except UnknownLayersError:
        parts, helpful = "", "; ".join(settings_that_help(situation.recipe, situation.dtype)[:3])
    return f"out of memory on {where}{wanted}{parts}; what would help: {helpful}"


def _parts_and_remedies(situation: Situation) -> tuple[str, str]:
    """What a step takes by estimate, and the three settings that save most of it."""
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
