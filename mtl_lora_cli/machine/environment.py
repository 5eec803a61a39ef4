"""What a run ran on: written beside its results, so that a figure can be traced."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib import metadata
from typing import Any

import torch

from mtl_lora_cli.machine.processes import ALONE, Processes

_LIBRARIES = (
    "mtl-lora",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "deepspeed",
    "bitsandbytes",
    "tokenizers",
    "safetensors",
)


def describe(
    device: torch.device, dtype: torch.dtype, processes: Processes = ALONE
) -> dict[str, Any]:
    """Versions, devices, git revision of the working directory, command line."""
    versions: dict[str, str | None] = {}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processes": processes.count,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "git_revision": _git_revision(),
        "command_line": sys.argv,
    }


def _git_revision() -> str | None:
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
