"""The cache's folder and folders to write: where they are, and what is said where they cannot be."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.resources import expanded
from mtl_lora_cli.runs import paths
from mtl_lora_cli.runs.paths import cache_folder, require_cache, require_writable


@pytest.fixture
def homeless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """As in a container whose user nobody knows: no HOME, and no entry in the list of users."""
    for name in ("HOME", "XDG_CACHE_HOME", "MTL_LORA_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    paths._without_home.cache_clear()
    yield tmp_path / "mtl-lora-54321"
    paths._without_home.cache_clear()


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("MTL_LORA_CACHE", raising=False)
    assert cache_folder() == Path("/home/me/.cache/mtl-lora")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "mtl-lora"
    monkeypatch.setenv("MTL_LORA_CACHE", "~/kept")
    assert cache_folder() == Path("/home/me/kept")


def test_without_a_home(homeless: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cache_folder() == cache_folder() == homeless
    assert homeless.stat().st_mode & 0o777 == 0o700
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"note: there is no home folder; the cache is {homeless}; MTL_LORA_CACHE"
    )
    assert expanded("~/model") == Path("~/model"), "is looked for, and not there"


def test_without_a_home_a_folder_that_others_can_write_is_not_believed(homeless: Path) -> None:
    homeless.mkdir()
    homeless.chmod(0o777)
    with pytest.raises(UsageError, match=r"there is no home folder, and .* MTL_LORA_CACHE names"):
        cache_folder()


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (Path("/proc/none/models"), tmp_path / "file" / "models"):
        with pytest.raises(UsageError) as caught:
            require_cache(folder)
        (line,) = caught.value.lines
        assert line.startswith(f"the cache folder {folder} cannot be written: ")
        assert line.endswith("; MTL_LORA_CACHE names another folder")
    require_cache(tmp_path / "new" / "models")
    assert list((tmp_path / "new" / "models").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder, why in (
        (tmp_path / "file", f"{tmp_path}/file is a file, expected a folder"),
        (tmp_path / "file" / "a" / "b", f"{tmp_path}/file is a file, expected a folder"),
        (Path("/proc/none"), "/proc cannot be written: No such file or directory"),
    ):
        with pytest.raises(UsageError) as caught:
            require_writable(folder, "--output")
        assert list(caught.value.lines) == [f"--output: {why}"]
    for folder in (tmp_path, tmp_path / "new" / "one"):
        require_writable(folder, "--output")
    assert [one.name for one in tmp_path.iterdir()] == ["file"], "nothing is left"
