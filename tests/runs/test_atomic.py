"""Files and folders that are whole or not there."""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path

import pytest

from mtl_lora_cli.runs.atomic import file_checksum, new_folder, write_json, write_text


def test_a_file_is_written_or_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "é one\n")
    write_text(path, "two\n")
    assert path.read_bytes() == b"two\n"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    for bad in ({"a": float("nan")}, {"a": float("inf")}, {"a": object()}):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, bad)
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "folder"
    with new_folder(target) as temporary:
        (temporary / "file").write_text("x")
        assert not target.exists()
        assert temporary.parent == target.parent
        assert temporary.name.startswith(".")
        assert temporary.name.endswith(".partial")
    assert (target / "file").read_text() == "x"
    assert [p.name for p in target.parent.iterdir()] == ["folder"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o755


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_folder_that_fails_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), new_folder(tmp_path / "folder") as temporary:
        (temporary / "file").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    (target / "mine").write_text("x")
    with pytest.raises(OSError), new_folder(target) as temporary:
        (temporary / "file").write_text("y")
    assert [p.name for p in tmp_path.rglob("*")] == ["folder", "mine"]


def test_another_name_of_somebody_elses_file_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("x")
    (tmp_path / "theirs").chmod(0o400)
    with new_folder(tmp_path / "folder") as temporary:
        (temporary / "link").hardlink_to(tmp_path / "theirs")
        (temporary / "own").write_text("x")
        (temporary / "own").chmod(0o600)
    modes = [stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "theirs", tmp_path / "folder/own")]
    assert modes == [0o400, 0o644]


def test_what_a_dead_process_left_is_removed_and_what_a_living_one_fills_is_not(
    tmp_path: Path,
) -> None:
    for name in (".folder.dead.partial", ".other.dead.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    with new_folder(tmp_path / "folder") as first:
        (first / "file").write_text("first")
        # flock belongs to an open file: a second one is refused as another process would be.
        with new_folder(tmp_path / "folder") as second:
            (second / "file").write_text("second")
            names = {path.name for path in tmp_path.iterdir()}
            assert names == {first.name, second.name, ".other.dead.partial"}
        assert (tmp_path / "folder" / "file").read_text() == "second"
        (tmp_path / "folder" / "file").unlink()
    assert (tmp_path / "folder" / "file").read_text() == "first"


def test_a_checksum_is_sha_256(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc" * 1000)
    assert file_checksum(tmp_path / "f") == hashlib.sha256(b"abc" * 1000).hexdigest()
