"""Models that llama.cpp's own converter turns into GGUF files: those whose form is not known here (`gguf_model.py`).

It comes with llama.cpp's sources and is a program of its own: it is run in another process, by this Python.
Where it stands, `MTL_LORA_LLAMA_CPP` says; else it is looked for on the PATH.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from gguf import GGUFReader
from safetensors.torch import save_file

from mtl_lora_cli.engine.families import plan_of
from mtl_lora_cli.engine.plan import AttentionPlan, NotPlanned
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.export.merge import Update

VARIABLE = "MTL_LORA_LLAMA_CPP"
MODELS, ADAPTERS = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
_WHOLE = "--format gguf-merged writes the whole model"
_TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
# Whose windows llama.cpp knows, too; of others it would see all keys.
_WINDOWED = ("gemma2", "gemma3_text", "gemma4_text", "olmo3", "gpt_oss")
# Whose files may hold a head that drafts tokens, which transformers does not load: it is left out.
_DRAFTING = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
_UNADAPTED = "per_layer_model_projection.weight"  # llama.cpp multiplies with it without an adapter


def find_sources() -> Path | None:
    """The folder of llama.cpp's converter, or None where there is none."""
    said = os.environ.get(VARIABLE)
    if said:
        folder = Path(said).expanduser()
        return folder if (folder / MODELS).is_file() else None
    program = shutil.which(MODELS)
    return None if program is None else Path(program).resolve().parent


def require_sources(kind: str) -> Path:
    """The same.

    Raises:
        UsageError: there is none, and how to get it.
    """
    found = find_sources()
    if found is not None:
        return found
    said = os.environ.get(VARIABLE)
    reason = f"{VARIABLE}={said} holds no {MODELS}" if said else "it is not here"
    raise UsageError(
        f"a model of type '{kind}' goes to GGUF through llama.cpp's own converter, and {reason}; get it with: "
        f"git clone --depth 1 https://github.com/ggml-org/llama.cpp && export {VARIABLE}=$PWD/llama.cpp"
    )


def require_convertible(config: Any, folder: Path, *, whole: bool = True) -> None:
    """Refuse a model that the converter does not take, before anything is written.

    Args:
        config: of the model.
        folder: where it lies, with its tokenizer.
        whole: the model itself will be written, and not an adapter alone, which needs no tokenizer.

    Raises:
        UsageError: there is no converter, it refuses, or llama.cpp would compute something else.
    """
    text = config.get_text_config()
    require_sources(text.model_type)
    window = _window(config)
    if window is not None and text.model_type not in _WINDOWED:
        raise UsageError(
            f"attention in a sliding window ({window} tokens) of a model of type '{text.model_type}' cannot be "
            "exported to GGUF: llama.cpp sees all tokens there"
        )
    if not whole:
        return
    with TemporaryDirectory() as scratch:
        file = f"{scratch}/model.gguf"
        _run(MODELS, "--dry-run", "--outfile", file, *_without_draft(config), str(folder))


def convert_model(folder: Path, path: Path, *, title: str, dtype: torch.dtype) -> None:
    """A transformers folder as one GGUF file.

    Args:
        folder: with its tokenizer.
        path: the file.
        title: `general.name`.
        dtype: of the matrices.

    Raises:
        UsageError: the converter refuses, and its last words.
    """
    kind = _TYPES.get(dtype, "auto")
    options = ("--outtype", kind, "--model-name", title, *_without_draft(_config(folder)))
    _run(MODELS, "--outfile", str(path), *options, str(folder))


def convert_adapter(updates: Mapping[str, Update], base: Path, path: Path) -> None:
    """A LoRA as a GGUF file in float32.

    Args:
        updates: weight → A' [k, in], B' [out, k], s.
        base: the base model's folder; its configuration alone is read.
        path: the file.

    Raises:
        UsageError: as `convert_model`; or what it wrote is no adapter; or llama.cpp would leave a part of it out.
    """
    left_out = next((weight for weight in updates if weight.endswith(_UNADAPTED)), None)
    if left_out is not None:
        raise UsageError(
            f"llama.cpp leaves the adapter of '{left_out.removesuffix('.weight')}' out; {_WHOLE}"
        )
    with TemporaryDirectory(dir=path.parent) as scratch:
        _write_lora(updates, Path(scratch))
        found = _drafting(base, Path(scratch)) if _without_draft(_config(base)) else base
        _run(ADAPTERS, "--base", str(found), "--outfile", str(path), "--outtype", "f32", scratch)
    kind = GGUFReader(path).fields["general.type"].contents()
    if kind != "adapter":  # of some types it writes a file that llama.cpp crashes on
        raise UsageError(
            f"llama.cpp's converter cannot write an adapter for this model (it wrote a file of type '{kind}'); "
            f"{_WHOLE}"
        )


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def _without_draft(config: Any) -> tuple[str, ...]:
    return ("--no-mtp",) if config.get_text_config().model_type in _DRAFTING else ()


def _drafting(base: Path, scratch: Path) -> Path:
    """A folder with the base's configuration and a head that drafts: to write an adapter, the converter insists."""
    folder = scratch / "base"
    folder.mkdir()
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    text["mtp_num_hidden_layers"] = text.get("mtp_num_hidden_layers") or 1
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _write_lora(updates: Mapping[str, Update], folder: Path) -> None:
    """What the converter reads: in PEFT's form, but scaled as llama.cpp does it, by alpha / (a pair's own r)."""
    alpha = max(len(down) for down, _, _ in updates.values())
    tensors = {}
    for weight, (down, up, scale) in updates.items():
        path = f"base_model.model.{weight.removesuffix('.weight')}"
        tensors[f"{path}.lora_A.weight"] = down.float().clone()
        tensors[f"{path}.lora_B.weight"] = (up * (scale * len(down) / alpha)).float().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": alpha, "lora_alpha": alpha}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def _window(config: Any) -> int | None:
    """The shortest window that is shorter than the model's context."""
    text = config.get_text_config()
    try:
        plans = plan_of(config).attentions
    except NotPlanned:
        return None
    some = [
        one.window for one in plans if isinstance(one, AttentionPlan) and one.window is not None
    ]
    narrow = [window for window in some if window < text.max_position_embeddings]
    return min(narrow, default=None)


def _run(program: str, *arguments: str) -> None:
    folder = find_sources()
    assert folder is not None, "require_sources comes first"
    command = [sys.executable, str(folder / program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1][:300] if lines else f"exit code {done.returncode}"
        advice = f"; {_WHOLE}" if program == ADAPTERS else ""
        raise UsageError(f"llama.cpp's converter ({program}) refuses this model: {reason}{advice}")
