"""Strangers' control characters are shown on a terminal, in a log and in a page, never sent."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_lora_cli.cli.frame import as_json
from mtl_lora_cli.cli.table import table
from mtl_lora_cli.visible import visible, visible_json, visible_line

Finished = subprocess.CompletedProcess[str]
TITLE = "\x1b]0;gone\x07\x9b2J\r\x7f"  # sets a window's title, clears the screen, goes to the line's start
SHOWN = "\\x1b]0;gone\\x07\\x9b2J\\r\\x7f"
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@given(st.text())
def test_nothing_is_sent_and_nothing_else_is_changed(text: str) -> None:
    shown = visible(text)
    assert not CONTROL.search(shown)
    assert visible(shown) == shown
    if not CONTROL.search(text):
        assert shown == text
    document = visible_json(json.dumps(text, ensure_ascii=False))
    assert json.loads(document) == text
    assert not CONTROL.search(document)


def test_a_cell_of_a_table_is_one_line_of_its_width() -> None:
    lines = table(("run", "why"), [(f"a{TITLE}", "b\nc\td"), ("x", "y")]).splitlines()
    assert len(lines) == 4
    assert lines[2] == f"a{SHOWN}  b\\nc\\td"
    assert visible_line(TITLE) == visible(TITLE) == SHOWN


def _everything(finished: Finished) -> str:
    text = finished.stdout + finished.stderr
    assert not CONTROL.search(text), repr(text)
    return text


def test_rows_and_labels_in_messages(
    small_recipe: Callable[[], Path], invoke: Callable[..., Finished]
) -> None:
    recipe = small_recipe()
    rows = recipe.parent / "warm" / "train.jsonl"
    rows.write_text(json.dumps({"word": "red", "label": TITLE}) + "\n", encoding="utf-8")
    finished = invoke("validate", str(recipe))
    assert finished.returncode == 2
    assert "gone" in _everything(finished)


@pytest.mark.parametrize("options", [(), ("--packed",)])
def test_rows_in_data_show(
    small_recipe: Callable[[], Path], invoke: Callable[..., Finished], options: tuple[str, ...]
) -> None:
    recipe = small_recipe()
    rows = recipe.parent / "warm" / "train.jsonl"
    row = {"word": f"red {TITLE}", "label": "yes"}
    rows.write_text(json.dumps(row) + "\n", encoding="utf-8")
    finished = invoke("data", "show", str(recipe), *options)
    assert finished.returncode == 0, finished.stderr
    assert "\\x1b|]" in _everything(finished)


@pytest.mark.slow
def test_rows_in_predict_on_a_terminal(
    fresh_run: Path, at_a_terminal: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    rows = [{"word": "red"}, {f"word{TITLE}": "red"}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    code, text = at_a_terminal(["predict", "--task", "warm", "rows.jsonl"], [], cwd=tmp_path)
    assert code == 2, text
    assert not CONTROL.search(text.replace("\r\n", "\n")), repr(text)
    assert "word\\x1b]0;gone\\x07" in text
    assert as_json({"answer": TITLE}) == '{"answer": "\\u001b]0;gone\\u0007\\u009b2J\\r\\u007f"}'


def test_names_of_runs(fresh_run: Path, invoke: Callable[..., Finished], tmp_path: Path) -> None:
    shutil.copytree(fresh_run, fresh_run.parent / f"a{TITLE}b")
    name = f"a{SHOWN}b"
    listed = invoke("runs")
    assert any(line.startswith(f"{name}  finished") for line in _everything(listed).splitlines())
    for words in (("runs", "show"), ("report", "--output", "page.html"), ("runs", "rm", "--yes")):
        finished = invoke(*words, f"a{TITLE}b")
        assert finished.returncode == 0, finished.stderr
        _everything(finished)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert name in page
    assert not CONTROL.search(page)
    finished = invoke("eval", "--task", "warm", "--run", f"no{TITLE}")
    assert finished.returncode == 2
    assert "no run 'no\\x1b]0;gone\\x07" in _everything(finished)
