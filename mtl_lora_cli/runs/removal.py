"""Removing runs: what is asked for and nothing beside it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mtl_lora_cli.errors import MtlLoraError, UsageError, did_you_mean
from mtl_lora_cli.runs.atomic import sync
from mtl_lora_cli.runs.folder import LATEST, RunFolder, mark_latest, run_names
from mtl_lora_cli.runs.listing import activity_of, newest_first


def find_removable(names: Sequence[str], directory: Path, *, force: bool) -> list[RunFolder]:
    """The runs that are to be removed; all of them, or an error and none.

    Args:
        names: of runs in `directory`, or paths of such.
        directory: in which runs lie.
        force: a run at which a process seems to be, too.

    Raises:
        UsageError: one is no run of this folder, or seems to be running.
    """
    known, found = run_names(directory), []
    for name in dict.fromkeys(names):
        path = Path(name) if "/" in name else directory / name
        if path.name in ("", "..") or path.parent.resolve() != directory.resolve():
            raise UsageError(f"'{name}' lies outside of {directory}; only its runs can be removed")
        if path.name not in known:
            raise UsageError(
                f"no run '{name}' in {directory}{did_you_mean(name, known)}; "
                f"runs: {', '.join(known) or 'none'}"
            )
        run = RunFolder(directory / path.name)
        if not force and activity_of(run) is not None:
            raise UsageError(
                f"run '{run.name}' seems to be running; stop it first, or remove it with --force"
            )
        found.append(run)
    return found


def remove_run(run: RunFolder) -> None:
    """Remove a run at once from its folder, then from the disk; `latest` names the newest one left.

    It is renamed first. What a killed process leaves is called `.NAME.….partial`, is no run any more,
    and goes when a run of that name begins. A link is removed, not what it leads to.

    Raises:
        MtlLoraError: it cannot be removed.
    """
    directory = run.path.parent
    try:
        if run.path.is_symlink():
            run.path.unlink()
            _repair_latest(directory)
            return
        aside = tempfile.mkdtemp(dir=directory, prefix=f".{run.name}.", suffix=".partial")
        run.path.replace(aside)
        sync(directory)
        _repair_latest(directory)
        shutil.rmtree(aside)
    except OSError as error:
        raise MtlLoraError(f"{run.path} cannot be removed: {error.strerror}") from None


def _repair_latest(directory: Path) -> None:
    latest = directory / LATEST
    if not latest.is_file():
        return
    named = latest.read_text(encoding="utf-8").strip()
    if (directory / named / "recipe.yaml").is_file():
        return
    left = newest_first(directory)
    if left:
        mark_latest(left[0])
    else:
        latest.unlink()
