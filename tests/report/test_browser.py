"""The page in a real browser: light and dark, wide and narrow, without a word on its console."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mtl_lora_cli.report.page import write
from mtl_lora_cli.report.plots import plots_of

from .browser import NAMES, Browser, find_browser, started


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    command = find_browser()
    if command is None:
        pytest.skip(
            f"no browser found: none of {', '.join(NAMES)}, and MTL_LORA_BROWSER is not set"
        )
    with started(command, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def page(facts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write(facts, plots_of(facts), path)
    return path


def colors_of(screenshot: bytes) -> tuple[int, list[float]]:
    """How many colours a picture has, and the mean of each channel."""
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(screenshot)).convert("RGB")
    counted = image.getcolors(maxcolors=2**24)
    total = image.width * image.height
    return len(counted), [sum(n * color[i] for n, color in counted) / total for i in range(3)]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_in_a_browser(
    browser: Browser, page: Path, facts: dict[str, Any], width: int, dark: bool
) -> None:
    seen = browser.see(page, width=width, dark=dark)
    assert seen.problems == []
    assert seen.width <= width  # nothing to scroll to at the side, with everything unfolded
    colors, means = colors_of(seen.screenshot)
    assert colors > 50
    assert all(mean < 80 for mean in means) if dark else all(mean > 180 for mean in means)
    assert browser.evaluate("document.title") == facts["runs"][0]["label"]  # no markup took it
    drawn = browser.evaluate(
        "[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().width)"
    )
    assert len(drawn) > 10 and all(250 < one <= max(width, 800) for one in drawn)
    fill = browser.evaluate("getComputedStyle(document.querySelector('svg text')).fill")
    assert fill == browser.evaluate("getComputedStyle(document.body).color")


def test_what_a_browser_complains_of_is_noticed(browser: Browser, tmp_path: Path) -> None:
    """The test above can fail."""
    for number, body in enumerate(
        (
            "<script>console.error('wrong')</script>",
            "<script>nothing.at.all</script>",
            "<img src='http://127.0.0.1:9/picture.png'>",
            "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\"><script>1</script>",
        )
    ):
        path = tmp_path / f"{number}.html"
        path.write_text(f"<!doctype html><link rel=icon href='data:,'>{body}", encoding="utf-8")
        assert browser.see(path, width=390, dark=False).problems, body
    path = tmp_path / "wide.html"
    path.write_text("<!doctype html><div style='width: 2000px'>x</div>", encoding="utf-8")
    assert browser.see(path, width=390, dark=False).width >= 2000
