"""docs/record_session.py on a short script; docs/quickstart.md is of one run, and README.md of the same."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from .pages import imported

SHORT = """\
set -eu
step() { printf '\\n== %s\\n' "$*" >&2; }
step "1 of 3: one"
echo "\\$ mtl-lora train $*" >&2
echo to stdout
echo to stderr >&2
step "2 of 3: two"
echo "$BIN/mtl-lora wrote $PWD/runs/a, cached in $MTL_LORA_CACHE, colors: $NO_COLOR"
step "3 of 3: three"
echo the last table
exit ${CODE:-0}
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = imported("record_session")
    (tmp_path / "short.sh").write_text(SHORT, encoding="utf-8")
    monkeypatch.setattr(module, "SCRIPT", tmp_path / "short.sh")
    return module


def test_both_streams_are_recorded_in_order(script: ModuleType, tmp_path: Path) -> None:
    parts = script.recorded(tmp_path, ["training.seed=1"])
    assert [part.title for part in parts] == ["1 of 3: one", "2 of 3: two", "3 of 3: three"]
    assert parts[0].lines[:3] == ["$ mtl-lora train training.seed=1", "to stdout", "to stderr"]
    assert parts[1].lines[0] == "mtl-lora wrote runs/a, cached in …/cache, colors: 1"
    assert all(0 <= part.seconds < 60 for part in parts)


def test_the_page_and_the_readme_tell_the_same(script: ModuleType, tmp_path: Path) -> None:
    parts = script.recorded(tmp_path, [])
    page, summary = script.rendered(parts), script.summary(parts)
    assert "## 1 of 3: one\n\n```text\n$ mtl-lora train \nto stdout\nto stderr\n```\n" in page
    assert "```text\nthe last table\n```" in page and "```text\nthe last table\n```" in summary
    assert script.circumstances(parts) in page and script.circumstances(parts) in summary


def test_a_session_that_fails_is_not_written(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODE", "3")
    with pytest.raises(SystemExit, match="ended with code 3"):
        script.recorded(tmp_path, [])


def test_what_stands_in_the_readme_stands_in_the_page(script: ModuleType) -> None:
    text = script.README.read_text(encoding="utf-8")
    assert script.BEGIN in text and script.END in text
    if not script.PAGE.exists():
        pytest.skip("docs/quickstart.md is not recorded: make record")
    ours = text.partition(script.BEGIN)[2].partition(script.END)[0]
    page = script.PAGE.read_text(encoding="utf-8")
    shown = ours.partition("```text\n")[2].partition("```")[0]
    assert shown and shown in page
    assert ours.strip().partition("\n\n")[0] in page
