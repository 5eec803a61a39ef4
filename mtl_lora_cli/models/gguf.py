"""Turning a GGUF file into an ordinary transformers folder, once.

transformers expands the quantised weights; what it does not carry over is a part of what the file says of its
model (`gguf_config.py`), and how the tokenizer cuts text before the byte-level step. `tokenizer.ggml.pre` names
that rule; SmolLM's splits digits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from mtl_lora_cli.errors import MtlLoraError, UsageError
from mtl_lora_cli.models.gguf_config import require_all_read, take_over
from mtl_lora_cli.models.quiet import quiet_deepspeed, quiet_loading, quiet_warnings
from mtl_lora_cli.pointers import require_content
from mtl_lora_cli.runs.atomic import new_folder
from mtl_lora_cli.runs.kept import mark_used
from mtl_lora_cli.runs.paths import cache_folder, require_cache
from mtl_lora_cli.visible import tell

CONVERSION = 3  # raise it when a conversion gives another result than before


def converted_folder(path: Path) -> Path:
    """The safetensors folder of a GGUF file, converting it if that was not done before.

    Raises:
        UsageError: the file is not a GGUF file that transformers can read, or the cache cannot be written.
    """
    try:
        with path.open("rb") as file:
            start = file.read(1024)
            require_content(path, start)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    magic = start[:4]
    if magic != b"GGUF":
        raise UsageError(f"{path}: not a GGUF file (it starts with {magic!r}, expected b'GGUF')")
    folder = cache_folder() / "models" / f"{path.stem}-{digest[:16]}-v{CONVERSION}"
    if not folder.is_dir():
        require_cache(folder.parent)
        tell(f"converting {path.name} to safetensors (once; seconds to minutes)")
        _convert(path, folder)
    mark_used(folder)
    return folder


def _convert(path: Path, folder: Path) -> None:
    import gguf
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    kept = getattr(
        transformers, "GgufConfig", None
    )  # where it is not there, none is kept in few bits
    dense = {} if kept is None else {"quantization_config": kept(dequantize=True)}
    quiet_deepspeed()
    try:
        with _read_once(), quiet_loading(), quiet_warnings():
            reader = gguf.GGUFReader(str(path))
            pre = reader.fields.get("tokenizer.ggml.pre")
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
            kind = config.model_type.removesuffix("_text")
            take_over(reader, config, GGUF_CONFIG_MAPPING.get(kind, {}))
            model, loading = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                config=config,
                dtype=torch.float32,
                **dense,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told below
            )
            require_all_read(reader, model, loading)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        # The weights are ordinary numbers now; transformers would refuse to save a quantised model.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    except Exception as error:  # whatever a file's keys make transformers raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UsageError(f"{path}: cannot be converted: {reason}") from None
    if (
        "local_files_only" in tokenizer.init_kwargs
    ):  # of this process: the folder is the same without a network
        tokenizer.init_kwargs["local_files_only"] = False
    _restore_pre_tokenizer(tokenizer, pre.contents() if pre else "default", path)
    try:
        with new_folder(folder) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    except OSError:
        if not folder.is_dir():  # another process may have been faster
            raise


@contextmanager
def _read_once() -> Iterator[None]:
    """Inside, a GGUF file is parsed once: transformers does it four times, each as long as the vocabulary is large."""
    import gguf

    usual = gguf.GGUFReader
    gguf.GGUFReader = cache(usual)
    try:
        yield
    finally:
        gguf.GGUFReader = usual


def pre_tokenizer(rule: str) -> Any:
    """How a rule that `tokenizer.ggml.pre` names cuts text, as tokenizers does it.

    Returns:
        A pre-tokenizer, or None where the rule is not known here.
    """
    from tokenizers import Regex, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if rule in ("default", "gpt-2"):
        return byte_level
    if rule in ("smollm", "starcoder", "refact", "command-r", "codeshell"):
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, byte_level])
    if rule in ("llama-bpe", "llama3", "llama-v3"):
        words = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
            r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(words), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    return None


def _restore_pre_tokenizer(tokenizer: Any, rule: str, path: Path) -> None:
    restored = pre_tokenizer(rule)
    if restored is None:
        raise MtlLoraError(
            f"{path}: its tokenizer cuts text by the rule '{rule}', which is not known here; "
            "use the model's safetensors folder instead"
        )
    if rule not in ("default", "gpt-2"):  # transformers' own
        tokenizer.backend_tokenizer.pre_tokenizer = restored
