"""The page against its facts: every figure is there, everything of others is text, nothing is fetched."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.report import plots as drawing
from mtl_lora_cli.report.facts import gather
from mtl_lora_cli.report.page import (
    figure,
    render,
    require_ours,
    side_by_side,
    write,
    write_plots,
)
from mtl_lora_cli.report.plots import plots_of
from mtl_lora_cli.runs.folder import RunFolder

from .conftest import HOSTILE

VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """A page taken apart; a tag that closes another than the last opened one is an error.

    Attributes:
        numbers: values of all <data> elements.
        texts: what stands between tags.
        tags: names of all elements.
        attributes: name and value of all of them.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.numbers: list[float] = []
        self.texts: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "data":
            self.numbers.append(json.loads(dict(attrs)["value"] or ""))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for own in value.values():
            yield from leaves(own)
    elif isinstance(value, list):
        for own in value:
            yield from leaves(own)
    else:
        yield value


def numbers_in(facts: dict[str, Any]) -> Counter[float]:
    return Counter(
        v for v in leaves(facts) if isinstance(v, int | float) and not isinstance(v, bool)
    )


@pytest.fixture(scope="module")
def html(facts: dict[str, Any]) -> str:
    pytest.importorskip("matplotlib")
    return render(facts, plots_of(facts))


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_every_figure_of_the_facts_is_on_the_page(facts: dict[str, Any], page: Page) -> None:
    wanted, found = numbers_in(facts), Counter(page.numbers)
    assert sum(wanted.values()) > 350
    assert wanted - found == Counter()  # as often as in the facts, at least
    assert set(found) == set(wanted)  # and none that they do not hold


def test_every_word_of_the_facts_is_on_the_page(facts: dict[str, Any], page: Page) -> None:
    words = {" ".join(value.split()) for value in leaves(facts) if isinstance(value, str)}
    assert len(words) > 50
    assert [word for word in words if word not in page.text] == []


def test_so_it_is_of_several_runs(run: RunFolder, copied: Callable[..., RunFolder]) -> None:
    other = copied("another")
    facts = gather([run, other])
    # As if the other one had learned something else: what is overlaid must not be mixed up.
    for result in facts["runs"][1]["results"]:
        for metric in result["metrics"]:
            metric["value"] = 0.123456789
    page = Page(render(facts, plots_of(facts)[:1]))
    wanted, found = numbers_in(facts), Counter(page.numbers)
    assert wanted - found == Counter()
    assert set(found) == set(wanted)
    assert found[0.123456789] == 2 * wanted[0.123456789]  # in its own table, and side by side


def test_base_models_that_differ_are_not_shown_as_one(facts: dict[str, Any]) -> None:
    runs = [copy.deepcopy(facts["runs"][0]) for _ in range(2)]
    assert all(line["base"] is not None for line in side_by_side(runs))
    runs[1]["results"][0]["metrics"][0]["base"] = 0.123
    first, *others = side_by_side(runs)
    assert first["base"] is None and all(line["base"] is not None for line in others)
    assert [cell["value"] for cell in first["cells"]] == [
        run["results"][0]["metrics"][0]["value"] for run in runs
    ]


@pytest.mark.parametrize(
    "missing", ["results", "adapter", "gradients", "validation", "rows", "mixture"]
)
def test_whatever_is_missing_the_page_holds_the_rest(facts: dict[str, Any], missing: str) -> None:
    less = copy.deepcopy(facts)
    less["runs"][0][missing] = None if missing in ("adapter", "gradients") else []
    page = Page(render(less, plots_of(less)[:1]))
    assert numbers_in(less) - Counter(page.numbers) == Counter()


def test_the_page_is_whole_without_plots(
    facts: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for room in ("plots", "page"):
        monkeypatch.setattr(f"mtl_lora_cli.report.{room}.can_be_drawn", lambda: False)
    page = Page(render(facts, plots_of(facts)))
    assert "svg" not in page.tags and "matplotlib is not installed" in page.text
    assert numbers_in(facts) - Counter(page.numbers) == Counter()
    with pytest.raises(UsageError, match="pip install matplotlib"):
        write_plots([], tmp_path)


def test_nothing_is_fetched_and_nothing_runs(html: str, page: Page) -> None:
    assert "script" not in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    links = [
        v for name, v in page.attributes if name in ("src", "href", "xlink:href", "data", "action")
    ]
    assert len(links) > 20
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "http://" not in html and "https://" not in html and "@import" not in html
    assert all(part.startswith("#") for part in re.findall(r"url\(([^)]*)\)", html))
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\';' in html


def test_what_is_not_ours_is_text(html: str, page: Page) -> None:
    assert " ".join(HOSTILE.split()) in page.text
    assert html.count(HOSTILE) == 0
    assert "<b>yes &lt;b&gt;</b>" in html and "yes <b>" not in html


def test_a_task_of_any_name_is_text(facts: dict[str, Any]) -> None:
    name = '<script>alert("$1$")</script>'
    renamed = json.loads(json.dumps(facts).replace('"markup"', json.dumps(name)))
    text = render(renamed, plots_of(renamed))
    page = Page(text)
    assert "script" not in page.tags and "<script" not in text
    assert page.text.count(name) > 10


def test_ids_differ_and_links_lead_somewhere(html: str, page: Page) -> None:
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 50
    wanted = {
        v[1:] for name, v in page.attributes if name in ("href", "xlink:href") and v[0] == "#"
    }
    wanted |= {part[1:] for part in re.findall(r"url\(([^)]*)\)", html)}
    assert wanted <= set(ids)


@pytest.mark.parametrize(
    ("value", "how", "shown"),
    [
        (1234567, "number", "1,234,567"),
        (12345.6, "number", "12,346"),
        (0.00012345678, "number", "0.0001235"),
        (-3.25, "number", "−3.25"),
        (0.83333333, "score", "0.833"),
        (0.05, "change", "+0.050"),
        (0.1234, "share", "12.3%"),
        (1.5e-21, "p", "1.5e−21"),
        (125.0, "duration", "2 min 05 s"),
    ],
)
def test_a_figure_is_short_and_keeps_its_value(value: float, how: str, shown: str) -> None:
    assert figure(value, how) == f'<data value="{json.dumps(value)}">{shown}</data>'


def test_only_a_report_is_replaced(facts: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write(facts, [], path)
    write(facts, [], path)
    path.write_text("my own page")
    with pytest.raises(UsageError, match="is no report"):
        write(facts, [], path)
    assert path.read_text() == "my own page"
    for wrong in (tmp_path, tmp_path / "none" / "page.html"):
        with pytest.raises(UsageError, match="--output"):
            require_ours(wrong)


def test_plots_are_pictures_of_their_own(facts: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plots = plots_of(facts)
    write_plots(plots, tmp_path / "new" / "folder")
    files = sorted((tmp_path / "new" / "folder").iterdir())
    assert len(files) == len(plots) == len({plot.name for plot in plots})
    assert {plot.section for plot in plots} >= {
        "curves", "task-loss", "mixture", "layers", "similarity", "gradients",
    }  # fmt: skip
    for file in files:
        assert file.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written to"):
        write_plots(plots, tmp_path / "file" / "below")


def test_plots_have_the_page_s_colour_of_letters(html: str, page: Page) -> None:
    assert page.tags["svg"] > 10
    assert html.count("fill: currentColor") > 100 and drawing._INK not in html


def test_smoothing_keeps_what_is_straight() -> None:
    assert drawing.smoothed([2.0] * 7) == [2.0] * 7
    line = [float(n) for n in range(100)]
    assert drawing.smoothed(line)[10:-10] == line[10:-10]
    assert drawing.smoothed([0.0, 3.0, 0.0, 0.0, 2.0, 4.0])[2] == 1.0
