"""The device of this process: which it is, in what it computes, what memory is free, was taken, is given back."""

from __future__ import annotations

import gc
import os
from typing import Literal

import torch

Halves = Literal["vectors", "tiles"]  # instructions for bfloat16: avx512_bf16, or those of AMX

GIB = 2**30
SHARING = "MTL_LORA_SHARING"  # among how many processes a device's memory is divided; see `sharing`


def pick_device() -> torch.device:
    """The CUDA device of this process, or the CPU."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that `dtype:` asks for; `auto` is bfloat16 on CUDA and float32 on a CPU.

    bfloat16 on a CPU without the instructions for it is about ten times slower than float32; see
    `multiplies_halves`.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def multiplies_halves() -> Halves | None:
    """This CPU's instructions for products of bfloat16, where torch has the library that uses them; None: it has none,
    and float32 is faster."""
    if not torch.backends.mkldnn.is_available():
        return None
    kinds: dict[Halves, str] = {
        "tiles": "_is_amx_tile_supported",
        "vectors": "_is_avx512_bf16_supported",
    }
    for kind, name in kinds.items():
        asked = getattr(torch.cpu, name, None)
        if asked is not None and asked():
            return kind
    return None


def sharing() -> int:
    """How many processes, each with a run of its own, share this one's device."""
    return int(os.environ.get(SHARING, "1"))


def free_memory(device: torch.device) -> tuple[int, str]:
    """Bytes that this process may still take, and the device's name.

    Where runs share the device it is an equal part of the whole memory, if so much is free: what the
    others will take at their peak cannot be seen while they are starting.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        used = torch.cuda.memory_allocated(device)
        # What the allocator holds and no tensor uses is free for the next ones.
        own = torch.cuda.memory_reserved(device) - used
        return min(free + own, total // sharing() - used), torch.cuda.get_device_name(device)
    import psutil

    machine = psutil.virtual_memory()
    return int(min(machine.available, machine.total // sharing())), "the CPU"


def memory_in_use(device: torch.device) -> str:
    """What takes the device's memory now, in words: of this process, and of all."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        used = torch.cuda.memory_allocated(device)
        return (
            f"{torch.cuda.get_device_name(device)} ({total / GIB:.1f} GiB): {used / GIB:.1f} GiB in "
            f"tensors, {(total - free) / GIB:.1f} GiB in use by all"
        )
    import psutil

    own, machine = psutil.Process().memory_info().rss, psutil.virtual_memory()
    return (
        f"the CPU: {own / GIB:.1f} GiB in use by this process, {machine.available / GIB:.1f} of "
        f"{machine.total / GIB:.1f} GiB available"
    )


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give back what nothing holds any more, so that the next model starts with the whole card."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> None:
    """Start counting the peak anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float | None:
    """Most memory allocated since the last reset, GiB; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None
