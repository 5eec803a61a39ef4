"""How engines are told of the adapters that were written for them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_TOGETHER = 32  # adapters in one batch: each takes a card's memory
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes


def vllm_command(folders: Sequence[tuple[str, Path]]) -> str | None:
    """The command by which vLLM serves PEFT folders of one base model; None: a rank is beyond what it takes.

    Args:
        folders: name of each task, and where its adapter lies.
    """
    rank = vllm_rank([folder for _, folder in folders])
    if rank is None:
        return None
    modules = [f"{name}={folder}" for name, folder in folders]
    words = ["vllm", "serve", _base_of(folders), "--enable-lora", "--max-lora-rank", str(rank)]
    together = str(min(_TOGETHER, len(folders)))
    return shlex.join([*words, "--max-loras", together, "--lora-modules", *modules])


def vllm_rank(folders: Sequence[Path]) -> int | None:
    """What --max-lora-rank has to be for PEFT folders; None: a rank is beyond what it takes."""
    rank = _rank(folders)
    return next((known for known in VLLM_RANKS if known >= rank), None)


def vllm_resolver(root: Path) -> str:
    """What vLLM's own resolver is told, which then finds each adapter in a folder by its name."""
    names = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_PLUGINS": "lora_filesystem_resolver",
        "VLLM_LORA_RESOLVER_CACHE_DIR": str(root),
    }
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in names.items())


def sglang_command(folders: Sequence[tuple[str, Path]]) -> str:
    """The command by which SGLang serves the same folders."""
    paths = [f"{name}={folder}" for name, folder in folders]
    rank = str(_rank([folder for _, folder in folders]))
    words = [
        "python",
        "-m",
        "sglang.launch_server",
        "--model-path",
        _base_of(folders),
        "--enable-lora",
    ]
    together = str(min(_TOGETHER, len(folders)))
    words += ["--max-lora-rank", rank, "--max-loras-per-batch", together]
    return shlex.join([*words, "--lora-paths", *paths])


def llama_server_command(folders: Sequence[tuple[str, Path]]) -> str:
    """The command by which llama.cpp's server takes adapters as GGUF files; a request names one by its place."""
    files = [word for _, folder in folders for word in ("--lora", str(folder / "adapter.gguf"))]
    return shlex.join(
        ["llama-server", "-m", "BASE_MODEL.gguf", "--lora-init-without-apply", *files]
    )


def ollama_command(folders: Sequence[tuple[str, Path]]) -> str:
    """The commands by which Ollama takes each of them as a model."""
    calls = [
        shlex.join(["ollama", "create", name, "-f", str(folder / "Modelfile")])
        for name, folder in folders
    ]
    return "; ".join(calls)


def _rank(folders: Sequence[Path]) -> int:
    configs = [_config(folder) for folder in folders]
    return max(max([one["r"], *one.get("rank_pattern", {}).values()]) for one in configs)


def _base_of(folders: Sequence[tuple[str, Path]]) -> str:
    return str(_config(folders[0][1])["base_model_name_or_path"])


def _config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return found
