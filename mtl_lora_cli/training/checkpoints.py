"""Checkpoints: everything a run needs to go on as if it had never stopped, and nothing frozen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtl_lora_cli.adapters.files import AdapterState, load_adapter, save_state
from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.errors import MtlLoraError
from mtl_lora_cli.runs.atomic import file_checksum, new_folder, write_json, write_text
from mtl_lora_cli.runs.folder import read_json, save_json
from mtl_lora_cli.training.best import Best
from mtl_lora_cli.training.update import Updating

COMPLETE = "COMPLETE"
_OPTIMIZER = "optimizer.safetensors"
_RANDOM = "random.safetensors"
_STATE = "state.json"
_CHECKSUMS = "checksums.json"


@dataclass(frozen=True)
class Position:
    """Where a run stands.

    Attributes:
        step: optimiser steps done.
        metrics_bytes: length of metrics.jsonl at that moment.
        seconds: spent training.
        tokens: learned from, prompts included.
        best: the best look so far; None where there is none, or nobody asks for it.
        following: what follows the losses, by name; None where nothing does.
    """

    step: int
    metrics_bytes: int
    seconds: float
    tokens: int
    best: Best | None = None
    following: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Snapshot:
    """All of a checkpoint, as it was at one moment: no step changes what stands in it.

    Attributes:
        position: where the run stood.
        adapter: what is trained.
        moments: the optimiser's state, whole: `Updating.state`.
        states: `random_states` of every process.
    """

    position: Position
    adapter: AdapterState
    moments: Mapping[str, Tensor]
    states: Sequence[Mapping[str, Tensor]]


def write_checkpoint(folder: Path, snapshot: Snapshot, keep: int) -> Path:
    """Write `step-000200` with checksums, `COMPLETE` last, then remove the oldest beyond `keep`.

    What one of those that stay names as the best so far stays, too.

    Args:
        folder: the run's `checkpoints`.
        snapshot: what is written.
        keep: so many checkpoints stay.
    """
    position = snapshot.position
    path = checkpoint_of(folder, position.step)
    for number, other in _numbered(folder):
        if number >= position.step:  # of a future that this run has left
            shutil.rmtree(other)
    for unfinished in folder.glob(".step-*.partial"):  # of a process that was killed
        shutil.rmtree(unfinished)
    with new_folder(path) as temporary:
        save_state(snapshot.adapter, temporary)
        moments = {name: value.cpu().contiguous() for name, value in snapshot.moments.items()}
        save_file(moments, temporary / _OPTIMIZER)
        states = enumerate(snapshot.states)
        random = {f"{name}.{rank}": s for rank, own in states for name, s in own.items()}
        save_file(random, temporary / _RANDOM)
        state = asdict(position)
        if position.following is None:
            del state["following"]
        save_json(temporary / _STATE, state)
        sums = {file.name: file_checksum(file) for file in sorted(temporary.iterdir())}
        write_json(temporary / _CHECKSUMS, sums)
        write_text(temporary / COMPLETE, f"{position.step}\n")
    every = _numbered(folder)
    best = {_best_of(kept) for _, kept in every[-keep:]}
    for number, old in every[:-keep]:
        if number not in best:
            shutil.rmtree(old)
    return path


def checkpoint_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies, if there is one."""
    return folder / f"step-{step:06d}"


def _best_of(path: Path) -> int | None:
    """The step that was the best one when a checkpoint was written."""
    try:
        best = read_json(path / _STATE).get("best")
    except MtlLoraError:
        return None
    return None if best is None else best["step"]


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run with their steps, oldest first."""
    found = ((path.name.removeprefix("step-"), path) for path in folder.glob("step-*"))
    return sorted((int(number), path) for number, path in found if number.isdigit())


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint whose files are what was written."""
    for _, path in reversed(_numbered(folder)):
        if is_whole(path):
            return path
    return None


def is_whole(path: Path) -> bool:
    """Whether a checkpoint was written to its end and holds what was written."""
    return (path / COMPLETE).is_file() and not list(_damaged(path))


def load_checkpoint(
    path: Path, adapter: Adapter, update: Updating, rank: int = 0, seed: int = 0
) -> Position:
    """Put a run back to where it stood: adapter, optimiser and random states.

    The number of processes may be another one than before: moments are kept whole. A process that
    was not there has no random state to go back to, and begins one that follows from `seed`, the
    step and its rank.

    Args:
        path: from `newest_checkpoint`.
        adapter: what is trained.
        update: of the optimiser.
        rank: of this process.
        seed: of the run.

    Raises:
        MtlLoraError: a file is damaged or fits another adapter.
    """
    damaged = list(_damaged(path))
    if damaged:
        raise MtlLoraError(f"{path}: damaged: {', '.join(damaged)}")
    load_adapter(adapter, path)
    update.restore(adapter.trained(), load_file(path / _OPTIMIZER))
    random, state = load_file(path / _RANDOM), read_json(path / _STATE)
    if f"cpu.{rank}" in random:
        torch.set_rng_state(random[f"cpu.{rank}"])
        if torch.cuda.is_available() and f"cuda.{rank}" in random:
            torch.cuda.set_rng_state(random[f"cuda.{rank}"])
    else:
        torch.manual_seed(hash((seed, state["step"], rank)) % 2**63)
    best = state.get("best")
    return Position(
        state["step"],
        state["metrics_bytes"],
        state["seconds"],
        state["tokens"],
        None if best is None else Best(**best),
        state.get("following"),
    )


def _damaged(path: Path) -> Iterator[str]:
    try:
        sums = json.loads((path / _CHECKSUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        sums = None
    if not isinstance(sums, dict):
        yield _CHECKSUMS
        return
    for name, checksum in sums.items():
        if not (path / name).is_file() or file_checksum(path / name) != checksum:
            yield name


def random_states() -> dict[str, Tensor]:
    """Of this process: torch's generators."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states
