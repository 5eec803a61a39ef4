"""Run folders: made once, found by name, path or as the newest, read only when whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtl_lora_cli.errors import MtlLoraError, UsageError
from mtl_lora_cli.runs.folder import (
    RunFolder,
    create_run,
    find_run,
    mark_latest,
    read_json,
    save_json,
)


def make(directory: Path, name: str) -> RunFolder:
    run = create_run(directory / name)
    run.recipe.write_text("tasks: []\n")
    mark_latest(run)
    return run


def test_the_newest_run_is_found_without_a_name(tmp_path: Path) -> None:
    for name in ("b", "a"):
        make(tmp_path / "runs", name)
    assert find_run(None, tmp_path / "runs").name == "a"


def test_no_run_takes_the_place_of_the_file_that_names_the_newest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a run cannot be called 'latest'"):
        make(tmp_path / "runs", "latest")
    assert not (tmp_path / "runs").exists()


def test_a_run_is_found_by_name_or_path(tmp_path: Path) -> None:
    run = make(tmp_path / "runs", "mine")
    assert find_run("mine", tmp_path / "runs").path == run.path
    assert find_run(str(run.path), tmp_path / "elsewhere").path == run.path


def test_a_run_is_found_by_a_path_that_ends_in_a_slash(tmp_path: Path) -> None:
    run = make(tmp_path / "runs", "mine")
    assert find_run(f"{run.path}/", tmp_path / "elsewhere").path == run.path


def test_no_run_yet(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run yet in"):
        find_run(None, tmp_path / "runs")


def test_the_newest_run_may_be_gone(tmp_path: Path) -> None:
    import shutil

    make(tmp_path, "one")
    shutil.rmtree(make(tmp_path, "two").path)
    with pytest.raises(UsageError, match=r"no run 'two' in .*runs: one"):
        find_run(None, tmp_path)


def test_an_unknown_run_suggests_the_nearest(tmp_path: Path) -> None:
    make(tmp_path, "quickstart")
    with pytest.raises(UsageError, match=r"no run 'quikstart' .*did you mean 'quickstart'\?"):
        find_run("quikstart", tmp_path)


def test_a_run_folder_is_made_once(tmp_path: Path) -> None:
    make(tmp_path, "mine")
    with pytest.raises(UsageError, match=r"run folder .*mine exists; choose another run\.name"):
        create_run(tmp_path / "mine")


def test_a_run_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be made"):
        create_run(tmp_path / "file" / "mine")


def test_an_unfinished_run_says_how_to_finish_it(tmp_path: Path) -> None:
    run = make(tmp_path, "mine")
    with pytest.raises(
        UsageError, match="no finished adapter; finish it with: mtl-lora train --res"
    ):
        run.require_adapter()
    run.adapter.mkdir()
    assert run.require_adapter() == run.adapter


def test_a_torn_last_event_is_passed_over(tmp_path: Path) -> None:
    run = make(tmp_path, "mine")
    assert list(run.events()) == []
    run.metrics.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert [event["step"] for event in run.events()] == [1, 2]


def test_json_comes_back_with_its_version(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    save_json(path, {"a": [1, "é"]})
    assert read_json(path) == {"format_version": 1, "a": [1, "é"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("{", "not valid JSON"),
        ("[]", "format_version None is not known"),
        ('{"a": 1}', "format_version None is not known"),
        ('{"format_version": 2}', "format_version 2 is not known; this release reads 1"),
    ],
)
def test_json_that_cannot_be_trusted(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(MtlLoraError, match=message) as caught:
        read_json(path)
    assert str(path) in str(caught.value)
