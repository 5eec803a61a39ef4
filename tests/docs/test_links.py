"""Every relative link of the pages leads somewhere, to a heading where it names one; no page is half of two versions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        *REPOSITORY.glob("*.md"),
        *REPOSITORY.glob("docs/*.md"),
        REPOSITORY / "tests/fixtures/README.md",
    ]
)
FILE = re.compile(r"`([\w.-]+(?:/[\w.-]+)+/?)`")  # `folder/file.py`, `folder/`
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def headings(page: Path) -> set[str]:
    """Anchors of a page, made from its headings as GitHub makes them."""
    lines = FENCED.sub("", page.read_text(encoding="utf-8")).splitlines()
    titles = [line.lstrip("#").strip().lower() for line in lines if re.match(r"#+ ", line)]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_resolve(page: Path) -> None:
    for target in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name}: {target} does not exist"
        assert not anchor or anchor in headings(file), f"{page.name}: no heading for {target}"


def test_the_readme_leads_to_every_page() -> None:
    """By a link of its own to each of docs/, over others to what is beside them."""
    linked = set(LINK.findall((REPOSITORY / "README.md").read_text(encoding="utf-8")))
    pages = {page.relative_to(REPOSITORY).as_posix() for page in REPOSITORY.glob("docs/*.md")}
    assert pages | {"CHANGELOG.md"} <= linked
    reached, left = set[Path](), [REPOSITORY / "README.md"]
    while left:
        page = left.pop()
        if page in PAGES and page not in reached:
            reached.add(page)
            names = LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8")))
            left += [(page.parent / name.partition("#")[0]).resolve() for name in names]
    assert reached == set(PAGES)


def test_files_that_contributors_are_sent_to_are_there() -> None:
    named = FILE.findall((REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert len(named) > 10
    assert [name for name in named if not (REPOSITORY / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_pages_name_no_place_of_one_machine(page: Path) -> None:
    found = re.search(r"(?<![\w.$}])/(home|root|tmp|work)/\S*", page.read_text(encoding="utf-8"))
    assert found is None, f"{page.name}: {found and found[0]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_no_merge_was_left_undone(page: Path) -> None:
    """Lines that git puts around what it could not merge; between two of them both versions would stand."""
    lines = page.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if re.match(r"(<{7}|>{7}|\|{7})( |$)", line)]
