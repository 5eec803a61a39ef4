"""What the files of a transformers folder are: one rule for everybody who reads them.

Loading, fingerprints, estimates, merging and GGUF files all ask here, so that none reads other weights
than another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mtl_lora_cli.errors import UsageError

CONFIG = "config.json"
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PEFT_CONFIG = "adapter_config.json"
_PICKLES = ("bin", "pt", "pth", "ckpt", "pkl")
# What a tokenizer is read from, whichever of them there are. Its chat template is told apart.
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)
_TOKENIZER_CONFIG = "tokenizer_config.json"
_TEMPLATE = "chat_template"


def require_model(folder: Path) -> None:
    """Refuse a folder that is no base model, or may be one or another.

    Raises:
        UsageError: it has no config.json, holds a PEFT adapter, or names its weights in its own way.
    """
    if (folder / PEFT_CONFIG).is_file():
        raise UsageError(
            f"{folder} holds {PEFT_CONFIG}: where peft is installed, transformers would put that "
            "adapter into the model in silence; to begin with the adapted model, merge it first "
            f"(peft's merge_and_unload), to begin without it, use a folder without {PEFT_CONFIG}"
        )
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{folder} holds no {CONFIG}")
    if "transformers_weights" in _object(folder / CONFIG):
        raise UsageError(
            f"{folder / CONFIG}: 'transformers_weights' names other weights than {WHOLE}, which is not "
            f"read; call that file {WHOLE} and take the key out"
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up a folder's model, by name.

    `model.safetensors`, or those that `model.safetensors.index.json` names, as transformers has it.
    Other safetensors beside them (`consolidated.safetensors`, `model.fp16.safetensors`, shards that no
    index names) are no part of the model.

    Raises:
        UsageError: there are none, one that the index names is missing, or index and `model.safetensors`
            are of different models: transformers would take the one, and many others the other.
    """
    index, whole = folder / INDEX, folder / WHOLE
    if not index.is_file():
        if not whole.is_file():
            raise UsageError(f"{folder} holds no safetensors weights{_instead(folder)}")
        return [whole]
    named = _named_in(index)
    if whole.is_file() and named != [WHOLE]:
        raise UsageError(
            f"{folder} holds {WHOLE} and {INDEX}, which names {named[0]}: which of them is the model "
            "cannot be known; remove the one that is left over"
        )
    missing = [name for name in named if not (folder / name).is_file()]
    if missing:
        raise UsageError(
            f"{index}: names {len(named)} file{'s' * (len(named) > 1)}, and '{missing[0]}' "
            f"is not there{f' ({len(missing)} are missing)' * (len(missing) > 1)}"
        )
    return [folder / name for name in named]


def _named_in(index: Path) -> list[str]:
    """The files that an index names, in order."""
    named = _object(index).get("weight_map")
    files = set(named.values()) if isinstance(named, dict) else set()
    if not files or not all(isinstance(name, str) for name in files):
        raise UsageError(f"{index}: damaged: its weight_map names no files")
    return sorted(files)


def _instead(folder: Path) -> str:
    """What a folder without weights has in their place."""
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return (
            f" under the names that transformers reads ({WHOLE}, or {INDEX} with its shards); "
            f"it holds {', '.join(others[:3])}{', …' * (len(others) > 3)}"
        )
    pickles = sorted(path.name for end in _PICKLES for path in folder.glob(f"*.{end}"))
    if not pickles:
        return ""
    return (
        f"; {pickles[0]} is a pickle, which can run any code when it is read: save the model as "
        "safetensors on a machine where you trust it"
    )


def weights_fingerprint(folder: Path, files: Iterable[Path]) -> str:
    """Hash of the configuration, every safetensors header, and samples of the weights.

    Reading all bytes of a large model would take minutes at every start; a header names each
    tensor's type, shape and place, and three samples of a MiB notice other values.
    """
    digest = hashlib.sha256((folder / CONFIG).read_bytes())
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            digest.update(f"{path.name} {size} {header}".encode())
            digest.update(file.read(min(header, size)))
            for place in (8 + header, size // 2, max(8 + header, size - 2**20)):
                file.seek(min(place, size))  # what is no such file names any place
                digest.update(file.read(2**20))
    return digest.hexdigest()[:32]


def tokenizer_fingerprint(folder: Path) -> str:
    """Hash of the files that a tokenizer is read from, special tokens included, chat template aside."""
    digest = hashlib.sha256()
    for name in _TOKENIZER:
        if (folder / name).is_file():
            digest.update(f"{name} {(folder / name).stat().st_size} ".encode())
            digest.update((folder / name).read_bytes())
    settings = _tokenizer_config(folder)
    settings.pop(_TEMPLATE, None)
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()[:32]


def template_fingerprint(folder: Path) -> str | None:
    """Hash of a tokenizer's chat templates, wherever they are kept; None where there is none.

    Files go before what the tokenizer's configuration says, as in transformers.
    """
    single = folder / f"{_TEMPLATE}.jinja"
    files = [single, *sorted((folder / "additional_chat_templates").glob("*.jinja"))]
    found: Any = {path.stem: _text(path) for path in files if path.is_file()}
    if not found:
        found = _tokenizer_config(folder).get(_TEMPLATE)
    if not found:
        return None
    if list(found) == [_TEMPLATE]:  # the same text in either place is the same template
        found = found[_TEMPLATE]
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:32]


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / _TOKENIZER_CONFIG
    return _object(path) if path.is_file() else {}


def _object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        UsageError: it does not.
    """
    try:
        content = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path}: expected an object, received {content!r:.40}")
    return content


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{path}: cannot be read: {said}") from None
