"""How engines are told of the adapters that were written for them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes


def vllm_command(folders: Sequence[tuple[str, Path]]) -> str | None:
    """The command by which vLLM serves PEFT folders of one base model; None: a rank is beyond what it takes.

    Args:
        folders: name of each task, and where its adapter lies.
    """
    configs = [
        json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        for _, folder in folders
    ]
    rank = max(max([one["r"], *one.get("rank_pattern", {}).values()]) for one in configs)
    fitting = next((known for known in VLLM_RANKS if known >= rank), None)
    if fitting is None:
        return None
    modules = [f"{name}={folder}" for name, folder in folders]
    base = configs[0]["base_model_name_or_path"]
    words = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(fitting)]
    return shlex.join([*words, "--max-loras", str(len(folders)), "--lora-modules", *modules])
