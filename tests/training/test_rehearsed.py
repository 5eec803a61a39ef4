"""A made-up row that is as full as a run's, so that its kernels are the run's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mtl_lora_cli.models import rehearsal_start
from mtl_lora_cli.recipe.training import Training
from mtl_lora_cli.training.rehearsed import made_up


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(
    ("loss_on", "length", "rows", "tasks"), [("answer", 512, 1, 3), ("all", 96, 2, 1)]
)
def test_a_made_up_pass_is_a_whole_one(
    loss_on: Any, length: int, rows: int, tasks: int, share: bool
) -> None:
    training = Training(
        row_length=length,
        rows_per_pass=rows,
        rows_per_step=rows,
        loss_on=loss_on,
        share_beginnings=share,
    )
    batch = made_up(training, tasks)
    assert batch.input_ids.numel() == rows * length
    assert (batch.segments.reach is not None) == share
    present = batch.task_ids.unique()
    assert set(present.tolist()) - {-1} == set(range(tasks))
    assert len(batch.positions) % 16 == 0, "round, as a run's"


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file that says that kernels are compiled, on a machine that has a card."""
    monkeypatch.setattr(rehearsal_start, "_CARDS", (tmp_path,))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return tmp_path / "kept.json"


def test_a_process_is_begun_where_something_is_to_be_compiled_and_waited_for(kept: Path) -> None:
    rehearsal_start.begin("platform", {"recipe": "x"}, kept)
    (process,) = rehearsal_start._begun
    rehearsal_start.wait()
    assert process.returncode == 0
    assert not rehearsal_start._begun
    kept.touch()
    rehearsal_start.begin("platform", {}, kept)
    assert not rehearsal_start._begun, "it is done"


def test_without_a_card_none_is_begun(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal_start, "_CARDS", (kept,))
    rehearsal_start.begin("platform", {}, kept)
    assert not rehearsal_start._begun


def test_what_was_compiled_for_one_recipe_is_not_taken_for_another(
    stories_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((stories_folder / "config.json").read_bytes())
    same = rehearsal_start.kept_file(tmp_path, rank=8)
    assert same == rehearsal_start.kept_file(stories_folder, rank=8)
    assert same != rehearsal_start.kept_file(tmp_path, rank=16)
    (tmp_path / "config.json").write_text("{}")
    assert same != rehearsal_start.kept_file(tmp_path, rank=8)
