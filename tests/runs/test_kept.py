"""What leaves the cache, and when; an entry has one writer at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.runs import kept
from mtl_lora_cli.runs.atomic import new_folder
from mtl_lora_cli.runs.kept import bytes_of, claimed, entries, give_up, keep_to_limit, seconds_of

DAY = 86400.0


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path))
    return tmp_path


def _file(path: Path, size: int, age: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    _age(path, age)
    return path


def _age(path: Path, age: float) -> None:
    os.utime(path, (time.time() - age,) * 2)


def _model(cache: Path, size: int, age: float) -> Path:
    folder = cache / "models" / "some"
    _file(folder / "model.safetensors", size, 0)
    _age(folder, age)
    return folder


def test_the_longest_unused_leave_first(cache: Path) -> None:
    old = _file(cache / "encoded" / "old", 100, 9 * DAY)
    model = _model(cache, 1000, 5 * DAY)
    new = _file(cache / "encoded" / "new", 10, DAY)
    assert [one.path for one in entries()] == [old, model, new]
    assert [one.bytes for one in entries()] == [100, 1000, 10]
    assert [one.path for one in give_up(size=1010)] == [old]
    assert [one.path for one in give_up(age=4 * DAY)] == [model]
    assert not model.exists()
    assert list(model.parent.iterdir()) == [], "nor anything half removed"
    assert [one.path for one in entries()] == [new]
    assert give_up(size=10, age=2 * DAY) == []


def test_of_its_own_accord_only_encoded_data_leave_and_none_in_use(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, used = (_file(cache / "encoded" / name, 600, DAY) for name in ("old", "used"))
    model = _model(cache, 5000, 9 * DAY)
    kept.mark_used(used)
    monkeypatch.setenv("MTL_LORA_CACHE_SIZE", "0.5KiB")
    assert [one.path for one in keep_to_limit()] == [old]
    assert used.exists(), "over the limit still, but read a moment ago"
    assert model.exists()


def test_what_a_writer_still_fills_stays(cache: Path) -> None:
    with new_folder(cache / "models" / "being-made") as temporary:
        (temporary / "part").touch()
        _age(temporary, DAY)
        assert give_up(size=0) == []
        assert temporary.exists()
    left = cache / "models" / ".killed.abc.partial"
    left.mkdir()
    _age(left, DAY)
    unfinished = _file(cache / "encoded" / ".key.safetensors.xyz", 5, 2 * DAY)
    assert {one.path for one in give_up()} == {left, unfinished}


_HOLDS = """
import sys, time
from pathlib import Path
from mtl_lora_cli.runs.kept import claimed
with claimed(Path(sys.argv[1]), lambda: None):
    print("mine", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("end", ["terminate", "kill"])
def test_an_entry_has_one_writer_until_its_end(cache: Path, end: str) -> None:
    path = cache / "encoded" / "entry"
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDS, str(path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "mine\n"
        waited = []

        def waiting() -> None:
            assert other.poll() is None
            waited.append(1)
            getattr(other, end)()

        with claimed(path, waiting):
            assert waited == [1]
            assert other.wait() != 0
    assert not list(path.parent.iterdir()), "no claim is left"


def test_a_claim_that_cannot_be_written_holds_nobody_up() -> None:
    with claimed(Path("/proc/none/entry"), lambda: pytest.fail("waits")):
        pass


def test_sizes_and_ages() -> None:
    assert bytes_of("20GiB", "") == 20 * 2**30
    assert bytes_of("1.5 kB", "") == 1500
    assert bytes_of("7", "") == 7
    assert seconds_of("12h", "") == DAY / 2
    assert seconds_of("2w", "") == 14 * DAY
    for text in ("", "GiB", "-1GiB", "3 apples", "1e9"):
        with pytest.raises(UsageError, match=f"^--size: {text!r} is not a size such as 20GiB"):
            bytes_of(text, "--size")
    with pytest.raises(
        UsageError, match=r"^--older-than: '5' is not an age such as 12h, 30d or 8w$"
    ):
        seconds_of("5", "--older-than")
