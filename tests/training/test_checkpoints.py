"""Checkpoints: whole or passed over, and never the last good one removed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl_lora_cli.errors import MtlLoraError
from mtl_lora_cli.training.checkpoints import COMPLETE, newest_checkpoint

FILES = (
    "mtl_lora_config.json",
    "mtl_lora.safetensors",
    "optimizer.safetensors",
    "random.safetensors",
    "state.json",
)


@pytest.fixture(scope="module")
def kept() -> dict[str, Path]:
    return {}


@pytest.fixture
def folder(
    small: Callable[..., Any], kept: dict[str, Path], tmp_path: Path, tmp_path_factory: Any
) -> Path:
    """The checkpoints of steps 2, 4 and 6 of one run, to be damaged at will."""
    if "folder" not in kept:
        kept["folder"] = tmp_path_factory.mktemp("checkpoints") / "kept"
        shutil.copytree(small().train().run.checkpoints, kept["folder"])
    return Path(shutil.copytree(kept["folder"], tmp_path / "checkpoints"))


def test_what_a_checkpoint_holds(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "step-000002",
        "step-000004",
        "step-000006",
    ]
    names = {path.name for path in (folder / "step-000004").iterdir()}
    assert names == {*FILES, "checksums.json", COMPLETE}
    assert json.loads((folder / "step-000004" / "state.json").read_text())["step"] == 4


def test_a_checkpoint_holds_nothing_frozen(folder: Path) -> None:
    size = sum(path.stat().st_size for path in (folder / "step-000004").iterdir())
    adapter = (folder / "step-000004" / "mtl_lora.safetensors").stat().st_size
    assert size < 4 * adapter  # itself, and two moments of AdamW


def test_no_checkpoint_is_a_pickle(folder: Path) -> None:
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {
        ".json",
        ".safetensors",
        "",
    }


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_passed_over(folder: Path, name: str, damage: str) -> None:
    path = folder / "step-000006" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    if damage == "flip":
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    assert newest_checkpoint(folder) == folder / "step-000004"


@pytest.mark.parametrize("text", ["", "{", '{"state.json": "0"}', "\x00\x00", "[]", "null"])
def test_damaged_checksums_are_a_damaged_checkpoint(folder: Path, text: str) -> None:
    (folder / "step-000006" / "checksums.json").write_text(text)
    assert newest_checkpoint(folder) == folder / "step-000004"


def test_an_unfinished_checkpoint_is_passed_over(folder: Path) -> None:
    (folder / "step-000006" / COMPLETE).unlink()
    (folder / ".step-000008.x.partial").mkdir()
    assert newest_checkpoint(folder) == folder / "step-000004"


def test_no_good_checkpoint_is_none(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (path / "state.json").unlink()
    assert newest_checkpoint(folder) is None
    assert newest_checkpoint(tmp_path / "missing") is None


def test_loading_a_damaged_checkpoint_says_which_file(
    folder: Path, small: Callable[..., Any]
) -> None:
    (folder / "step-000004" / "optimizer.safetensors").write_bytes(b"x")
    with pytest.raises(MtlLoraError, match=r"step-000004: damaged: optimizer\.safetensors"):
        small().trainer.resume(folder / "step-000004")


def test_only_the_newest_are_kept(small: Callable[..., Any]) -> None:
    run = small(checkpoint_every=1, keep_checkpoints=2).train()
    names = sorted(path.name for path in run.run.checkpoints.iterdir())
    assert names == ["step-000005", "step-000006"]


def test_the_last_step_is_always_kept(small: Callable[..., Any]) -> None:
    run = small(checkpoint_every=None).train()
    assert [path.name for path in run.run.checkpoints.iterdir()] == ["step-000006"]


def test_a_damaged_later_checkpoint_never_costs_the_newest_good_one(
    folder: Path, small: Callable[..., Any]
) -> None:
    """After going back, the damaged step 6 is still there while steps 3 and 4 are written."""
    (folder / "step-000006" / "optimizer.safetensors").write_bytes(b"x")
    (folder / "step-000004" / "optimizer.safetensors").write_bytes(b"x")
    again = small(folder=folder.parent, checkpoint_every=1, keep_checkpoints=1)
    again.run.metrics.write_bytes(b" " * 10**5)
    good = newest_checkpoint(folder)
    assert good == folder / "step-000002"
    again.trainer.resume(good)
    seen: list[Path | None] = []

    def look(step: int) -> None:
        again.trainer.saver.join()
        seen.append(newest_checkpoint(folder))

    again.train(after=look)
    assert [path and path.name for path in seen] == [
        "step-000002",
        "step-000003",
        "step-000004",
        "step-000005",
    ]


def test_a_million_steps_are_newer_than_all_before(folder: Path) -> None:
    (folder / "step-000004").rename(folder / "step-999999")
    (folder / "step-000006").rename(folder / "step-1000000")
    assert newest_checkpoint(folder) == folder / "step-1000000"


def test_a_poisoned_weight_ends_the_run_in_one_line_and_the_last_checkpoint_is_good(
    small: Callable[..., Any],
) -> None:
    run = small()

    def poison(step: int) -> None:
        if step == 5:
            with torch.no_grad():
                next(iter(run.trainer.adapter.layers.values())).lora_A[0, 0, 0] = float("nan")

    with pytest.raises(MtlLoraError) as caught:
        run.train(after=poison)
    (line,) = caught.value.lines
    assert "no longer a finite number at step 6" in line
    good = newest_checkpoint(run.run.checkpoints)
    assert good is not None
    assert good.name == "step-000004"
    fresh = small()
    fresh.trainer.resume(good)
    assert all(tensor.isfinite().all() for tensor in fresh.tensors.values())


def test_a_huge_learning_rate_ends_the_run_in_one_line(small: Callable[..., Any]) -> None:
    run = small(learning_rate=1e25, checkpoint_every=1, warmup=0.0)
    with pytest.raises(MtlLoraError) as caught:
        run.train()
    (line,) = caught.value.lines
    assert "the loss is no longer a finite number at step" in line
    assert "lower training.learning_rate" in line
    steps = [event["step"] for event in run.events]
    good = newest_checkpoint(run.run.checkpoints)
    assert good is not None
    assert good.name == f"step-{steps[-1]:06d}"
    json.dumps(run.events, allow_nan=False)
