"""Rows are encoded piece by piece, by several processes, with the result of one process and one piece."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtl_lora_cli.data import encode_task, parts
from mtl_lora_cli.data.bind import bind_tasks
from mtl_lora_cli.data.parts import Parts
from mtl_lora_cli.data.prepare import TrainingData, prepare_training
from mtl_lora_cli.errors import MtlLoraError, UsageError
from mtl_lora_cli.machine.pool import in_pieces
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import load_tokenizer
from mtl_lora_cli.recipe.load import load_recipe

from .test_prepare import TEMPLATE, write_rows


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "own.yaml").write_text(TEMPLATE, encoding="utf-8")
    return tmp_path


def recipe_of(folder: Path, model: Path, keys: str = "") -> Path:
    path = folder / "recipe.yaml"
    tasks = "tasks: [{name: own, template: own.yaml, source: {path: d}}]\n"
    path.write_text(f"base_model: {model}\n{tasks}{keys}", encoding="utf-8")
    return path


def prepare(folder: Path, model: Path, keys: str = "") -> TrainingData:
    loaded = load_recipe(recipe_of(folder, model, keys))
    tokenizer = load_tokenizer(find_base_model(str(model)))
    return prepare_training(bind_tasks(loaded), loaded.recipe, tokenizer, 512)


def mixed_rows(count: int) -> list[dict[str, Any]]:
    """Some twice, some with two answers, some blank, some with a control token, some long."""
    texts = [
        " " if n % 97 == 5 else f"</s> {n}" if n % 83 == 7 else f"row {n % 211} " * (1 + n % 5)
        for n in range(count)
    ]
    return [{"text": text or "x", "label": n % 2} for n, text in enumerate(texts)]


def as_values(data: TrainingData) -> list[Any]:
    split = data.splits[0]
    arrays = (split.tokens, split.starts, split.prompt_lengths)
    return [*(one.tolist() for one in arrays), data.audits[0].to_json(), split.rows, split.dropped]


def test_several_processes_and_pieces_give_what_one_gives(
    folder: Path, stories_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "own.yaml").write_text(TEMPLATE.replace("{{ text }}", "It: {{ text }}"), "utf-8")
    write_rows(folder / "d" / "train.jsonl", mixed_rows(700))
    write_rows(folder / "d" / "test.jsonl", mixed_rows(90)[40:])
    keys = "training: {row_length: 16, on_overflow: drop}\n"
    whole = prepare(folder, stories_folder, keys)
    found = whole.audits[0]
    assert found.repeated and found.contradictory and found.leaks and found.odd and found.dropped
    assert any("control token" in note for note in found.notes)
    monkeypatch.setattr(encode_task, "_PIECE", 64)
    monkeypatch.setattr(encode_task, "MANY_ROWS", 1)
    monkeypatch.setattr("mtl_lora_cli.machine.pool.cores", lambda: 3)
    monkeypatch.setattr(parts, "_IN_MEMORY", 256)  # arrays in files, and mapped
    monkeypatch.setenv("MTL_LORA_CACHE", str(folder / "other"))
    assert as_values(prepare(folder, stories_folder, keys)) == as_values(whole)
    again = lambda *a, **k: pytest.fail("encoded again")  # noqa: E731
    monkeypatch.setattr("mtl_lora_cli.data.prepare.encode_task", again)
    assert as_values(prepare(folder, stories_folder, keys)) == as_values(whole)


def test_an_error_of_a_later_piece_names_its_line(
    folder: Path, stories_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_task, "_PIECE", 16)
    monkeypatch.setattr(encode_task, "MANY_ROWS", 1)
    monkeypatch.setattr("mtl_lora_cli.machine.pool.cores", lambda: 2)
    rows = [{"text": f"row {n}", "label": n % 2} for n in range(100)]
    write_rows(folder / "d" / "train.jsonl", [*rows, {"text": "late", "label": 7}])
    with pytest.raises(UsageError, match=r"train\.jsonl:101: task 'own': label: received 7"):
        prepare(folder, stories_folder)
    assert not list((folder / "cache" / "encoded").glob("*"))


def test_pieces_come_in_order_and_a_killed_process_is_told() -> None:
    def late_first(first: int, last: int) -> tuple[int, int, bool]:
        time.sleep(0.1 if first == 0 else 0)
        return first, last, os.getpid() == here

    here = os.getpid()
    found = list(in_pieces(late_first, 10, 3, processes=2))
    assert found == [(0, 3, False), (3, 6, False), (6, 9, False), (9, 10, False)]
    assert list(in_pieces(late_first, 4, 3, processes=1)) == [(0, 3, True), (3, 4, True)]

    def killed(first: int, last: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(MtlLoraError, match="a process that worked for this one was killed"):
        list(in_pieces(killed, 10, 3, processes=2))


@pytest.mark.parametrize("limit", [0, 2**22])
def test_arrays_are_what_was_added_and_written(
    tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.numpy import load_file  # who else reads such files

    monkeypatch.setattr(parts, "_IN_MEMORY", limit)
    growing = Parts(tmp_path / "new")
    for _ in range(3):
        growing.add("a", np.arange(5, dtype=np.int32))
        growing.add("b", np.array([True, False, True]))
    arrays = {
        "a": growing.array("a"),
        "b": growing.array("b"),
        "c": np.arange(8, dtype=np.uint64).reshape(4, 2),
        "none": np.empty(0, np.int64),
    }
    assert arrays["a"].tolist() == [*range(5)] * 3
    parts.write(tmp_path / "whole", arrays, "said")
    about, found = parts.read(tmp_path / "whole")
    assert about == "said"
    theirs = load_file(tmp_path / "whole")
    for name, values in arrays.items():
        np.testing.assert_array_equal(found[name], values, strict=True)
        np.testing.assert_array_equal(theirs[name], values, strict=True)
        assert not found[name].flags.writeable or not found[name].size
    assert [one.name for one in tmp_path.iterdir() if one.is_file()] == ["whole"]
    content = (tmp_path / "whole").read_bytes()
    for damaged in (content[:-1], content + b"x", content[:5], b""):
        (tmp_path / "whole").write_bytes(damaged)
        with pytest.raises(ValueError):
            parts.read(tmp_path / "whole")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_was_written_does_not_stay_in_memory(tmp_path: Path) -> None:
    growing = Parts(tmp_path)
    for _ in range(4):
        growing.add("a", np.ones(2**21, np.int64))

    def mapped() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Pss_File"))

    values = growing.array("a")
    before = mapped()
    assert int(values.sum()) == 2**23
    assert mapped() - before > 50_000  # kB: all 64 MiB
    parts.write(tmp_path / "whole", {"a": values}, "")
    assert mapped() - before < 20_000
    assert int(values.sum()) == 2**23


@pytest.mark.long
def test_a_crash_while_encoding_loses_nothing_and_leaves_nothing(
    folder: Path, stories_folder: Path
) -> None:
    """Killed at ten moments; what is kept after them is what an undisturbed run keeps, byte by byte."""
    (folder / "own.yaml").write_text(TEMPLATE.replace("{{ text }}", "It: {{ text }}"), "utf-8")
    write_rows(folder / "d" / "train.jsonl", mixed_rows(18_000))
    program = (
        "import sys; from pathlib import Path; from mtl_lora_cli.recipe.load import load_recipe\n"
        "from mtl_lora_cli.training.prepare import prepare\n"
        "print('begun', flush=True); prepare(load_recipe(Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", program, str(recipe_of(folder, stories_folder))]

    def run(kept: str, killed_after: float | None = None) -> float:
        environment = {**os.environ, "MTL_LORA_CACHE": str(folder / kept)}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, start_new_session=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        started = time.monotonic()
        try:
            assert process.wait(killed_after) == 0
        except subprocess.TimeoutExpired:
            process.kill()  # it alone: its own processes have to end by themselves
            process.wait()
        seconds = time.monotonic() - started
        deadline = time.monotonic() + 10
        while _alive(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not _alive(process.pid)
        return seconds

    seconds = run("whole")
    moments = np.random.default_rng(0).uniform(0.0, seconds, size=10)
    for moment in moments:
        run("crashed", float(moment))
    run("crashed")
    (expected,) = (folder / "whole" / "encoded").iterdir()
    left = [one for one in (folder / "crashed" / "encoded").iterdir() if one.name[0] != "."]
    assert [one.name for one in left] == [expected.name]
    assert left[0].read_bytes() == expected.read_bytes()


def _alive(session: int) -> bool:
    """Whether a process of that session is there."""
    for one in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = one.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            return True
    return False
