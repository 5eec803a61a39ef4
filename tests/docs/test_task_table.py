"""The table in docs/tasks.md: its smallest data sets again, and every file that there is."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from .pages import imported

SMALL = ("glue/wnli", "ads/esci_us_sample", "samples/animals", "samples/uses", "samples/search_ads")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return imported("make_task_table")


@pytest.fixture(scope="module")
def table(script: ModuleType) -> list[list[str]]:
    """The cells of the page's rows, without the two of the header."""
    page = script.PAGE.read_text(encoding="utf-8")
    text = page.partition(script.BEGIN)[2].partition(script.END)[0]
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


@pytest.mark.real_data
def test_small_data_sets_are_what_the_page_says(
    script: ModuleType, table: list[list[str]], real_data_folder: Path
) -> None:
    for name, path in script.data_sets(real_data_folder):
        if name in SMALL:
            made = [list(line.cells) for line in script.rendered(name, path)]
            assert made == [row for row in table if row[0] == name]


@pytest.mark.real_data
def test_the_page_has_every_file_with_its_rows(
    table: list[list[str]], real_data_folder: Path
) -> None:
    manifest = json.loads((real_data_folder / "manifest.json").read_text(encoding="utf-8"))
    expected = {entry["file"]: f"{entry['rows']:,}" for entry in manifest}
    found = {f"{row[0]}/{row[2]}": row[3] for row in table if not row[0].startswith("samples/")}
    assert found == expected


def test_every_row_of_a_file_was_rendered(table: list[list[str]]) -> None:
    assert table and all(rows == rendered for _, _, _, rows, rendered, _, _ in table)


def test_a_file_whose_rows_are_not_its_lines_is_an_error(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"sentence1": "a", "sentence2": "b", "label": 1}
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(row)}\n" * 3, encoding="utf-8")
    (line,) = script.rendered("glue/wnli", tmp_path)
    assert (line.rows, line.rendered, line.choices, line.majority) == (3, 3, (2,), 1.0)
    monkeypatch.setattr(script, "lines_in", lambda path: 4)
    with pytest.raises(Exception, match="4 lines, 3 rows read"):
        list(script.rendered("glue/wnli", tmp_path))
