"""The run folder: its paths, what stands in it, and how it is found again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mtl_lora_cli.errors import MtlLoraError, UsageError, did_you_mean
from mtl_lora_cli.runs.atomic import new_folder, write_json, write_text

FORMAT_VERSION = 1
LATEST = "latest"  # the file beside runs that names the newest one


class RunFolder:
    """Paths and small files of one run; see docs/layout.md for the whole picture."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def tasks(self) -> Path:
        return self.path / "tasks.json"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def deepspeed(self) -> Path:
        return self.path / "deepspeed.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations"

    @property
    def extends(self) -> RunFolder:
        """Where tasks were added to a run's: that run's tasks.json and adapter/ as they were then."""
        return RunFolder(self.path / "extends")

    @property
    def begins(self) -> RunFolder:
        """Where a run began at another's adapter: that run's tasks.json and adapter/, and starts.json."""
        return RunFolder(self.path / "begins")

    def events(self) -> Iterator[dict[str, Any]]:
        """The whole lines of metrics.jsonl; a torn last line is passed over."""
        if not self.metrics.exists():
            return
        for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue

    def require_adapter(self) -> Path:
        """The folder of the finished adapter.

        Raises:
            UsageError: the run has not finished.
        """
        if not self.adapter.is_dir():
            raise UsageError(
                f"run '{self.name}' has no finished adapter; "
                f"finish it with: mtl-lora train --resume --run {self.path}"
            )
        return self.adapter


def require_new(path: Path) -> None:
    """Refuse a run folder that exists.

    Raises:
        UsageError: it exists, or has the name of the file that names the newest run.
    """
    if path.name == LATEST:
        raise UsageError(
            f"a run cannot be called '{LATEST}': that file in {path.parent} names the newest run; choose "
            "another run.name"
        )
    if path.exists():
        raise UsageError(
            f"run folder {path} exists; choose another run.name, or go on with: "
            f"mtl-lora train --resume --run {path}"
        )


def create_run(path: Path, fill: Callable[[RunFolder], None] = lambda run: None) -> RunFolder:
    """Make a new run folder, whole or not at all.

    Args:
        path: of the folder.
        fill: writes what it begins with.

    Raises:
        UsageError: it exists already, or cannot be made.
    """
    require_new(path)
    try:
        with new_folder(path) as folder:
            fill(RunFolder(folder))
    except OSError as error:
        require_new(path)  # another process has made it meanwhile
        raise UsageError(f"run folder {path} cannot be made: {error.strerror}") from None
    return RunFolder(path)


def mark_latest(run: RunFolder) -> None:
    """Let `runs/latest` name this run."""
    write_text(run.path.parent / LATEST, run.name + "\n")


def run_names(directory: Path) -> list[str]:
    """The runs in a folder, by name; none where there is no such folder."""
    if not directory.is_dir():
        return []
    found = (path for path in directory.iterdir() if (path / "recipe.yaml").is_file())
    return sorted(path.name for path in found if not path.name.startswith("."))


def find_run(run: str | None, directory: Path) -> RunFolder:
    """The run that `--run NAME|PATH` names; the newest one where nothing is named.

    Raises:
        UsageError: there is no such run, or none yet.
    """
    known = run_names(directory)
    if run is None:
        latest = directory / LATEST
        if not known or not latest.is_file():
            raise UsageError(
                f"no run yet in {directory}; start one with: mtl-lora train RECIPE, or name one with --run"
            )
        run = latest.read_text(encoding="utf-8").strip()
    candidates = [directory / run, Path(run)] if Path(run).name == run else [Path(run)]
    for path in candidates:
        if (path / "recipe.yaml").is_file():
            return RunFolder(path)
    raise UsageError(
        f"no run '{run}' in {directory}{did_you_mean(run, known)}; runs: {', '.join(known) or 'none'}"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read one of our JSON files and check its format version.

    Raises:
        MtlLoraError: it is missing, damaged, or of another format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MtlLoraError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise MtlLoraError(f"{path}: not valid JSON: {error}") from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise MtlLoraError(
            f"{path}: format_version {version!r} is not known; this release reads {FORMAT_VERSION}"
        )
    return content


def save_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file with its format version, atomically."""
    write_json(path, {"format_version": FORMAT_VERSION, **content})
