"""Putting a written folder on the Hugging Face hub, on request and never otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mtl_lora_cli.errors import MtlLoraError, UsageError


def require_hub(repository: str) -> None:
    """Ask the hub who we are before any work is done for it.

    Raises:
        UsageError: `repository` is no name, the hub cannot be reached, or nobody is logged in.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UsageError(f"--push: {_line(error)}") from None
    with _told(UsageError, f"--push {repository}: the hub cannot be had"):
        HfApi().whoami()


def push(folder: Path, repository: str) -> str:
    """Upload a folder; a repository that is not there yet is made, private.

    Returns:
        Its address.

    Raises:
        MtlLoraError: the hub refuses; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    with _told(MtlLoraError, f"{folder} is written, but not pushed to {repository}"):
        api = HfApi()
        place = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=place.repo_id, folder_path=folder)
        return str(place)


@contextmanager
def _told(kind: type[MtlLoraError], what: str) -> Iterator[None]:
    """Whatever goes wrong between here and the hub, in one line: its errors and those of the network
    have no class in common."""
    try:
        yield
    except Exception as error:
        raise kind(f"{what}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
