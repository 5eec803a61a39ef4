"""Rows that benchmarks' scripts make: statements are what the pictures show, read off the pixels; titles what a photo's row says."""

from __future__ import annotations

import importlib.util
import random
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "nlvr_statements.py"
GROUND = (211, 211, 211)
WORDS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nlvr_statements", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _drawn(tower: list[str], pixels: dict[str, tuple[int, int, int]], left: int) -> np.ndarray:
    crop = np.full((100, 100, 3), GROUND, np.uint8)
    for number, colour in enumerate(tower):
        bottom = 100 - 20 * number
        crop[bottom - 20 : bottom, left : left + 20] = pixels[colour]
    return crop


def _read(crop: np.ndarray, pixels: dict[str, tuple[int, int, int]]) -> list[str]:
    """A tower's colours from its base on."""
    names = {value: name for name, value in pixels.items()}
    found = []
    for y in range(90, 0, -20):
        seen = {tuple(int(v) for v in one) for one in crop[y]} - {GROUND}
        found += [names[one] for one in seen]
    return found


def _number(word: str) -> int:
    return WORDS[word] if word in WORDS else int(word)


def _hold(
    made: Iterable[tuple[str, bool]],
    rules: Sequence[tuple[str, Callable[[Any, re.Match[str]], bool]]],
    seen: Any,
    asked: dict[str, int],
) -> None:
    """Statements are true of what is seen where they say so; `asked` counts those that each rule judged."""
    for sentence, truth in made:
        for pattern, rule in rules:
            match = re.fullmatch(pattern, sentence)
            if match is not None:
                asked[pattern] += 1
                assert rule(seen, match) == truth, (seen, sentence)


RULES: list[tuple[str, Callable[[list[str], re.Match[str]], bool]]] = [
    (r"The tower has exactly (\w+) blocks?", lambda t, m: len(t) == _number(m[1])),
    (r"The tower has at least (\w+) blocks?", lambda t, m: len(t) >= _number(m[1])),
    (r"The tower has a (\w+) block at the top", lambda t, m: t[-1] == m[1]),
    (r"The tower has a (\w+) block at the base", lambda t, m: t[0] == m[1]),
    (r"The tower has only (\w+) blocks", lambda t, m: set(t) == {m[1]}),
    (r"The second block from the base is (\w+)", lambda t, m: t[1:2] == [m[1]]),
    (
        r"There is a (\w+) block above a (\w+) block",
        lambda t, m: any(t[n + 1] == m[1] and t[n] == m[2] for n in range(len(t) - 1)),
    ),
]


def test_statements_of_a_tower_are_what_its_pixels_say(script: ModuleType) -> None:
    draw = random.Random(3)
    names = {name: code for code, name in script.COLOURS.items()}
    asked = {pattern: 0 for pattern, _ in RULES}
    for _ in range(60):
        towers = [draw.choices(list(script.PIXELS), k=draw.randint(1, 4)) for _ in range(3)]
        boxes = [[{"type": "square", "size": 20, "color": names[one]} for one in t] for t in towers]
        order = draw.sample(range(3), 3)
        crops = [_drawn(towers[n], script.PIXELS, draw.randrange(80)) for n in order]
        placed = script.in_order(boxes, crops)
        for crop, items in zip(crops, placed, strict=True):
            seen = _read(crop, script.PIXELS)
            assert [script.COLOURS[one["color"]] for one in items] == seen
            made = script.statements_of([items], [crop], draw, 8)
            assert sum(truth for _, truth in made) <= 4
            _hold(made, RULES, seen, asked)
    assert min(asked.values()) > 5, asked


OF_THREE: list[tuple[str, Callable[[list[list[str]], re.Match[str]], bool]]] = [
    (
        r"There is a (\w+) block (?:over|above|on top of|on) a (\w+) block",
        lambda all, m: any([m[2], m[1]] == t[n : n + 2] for t in all for n in range(3)),
    ),
    (
        r"The tower with (\w+) blocks? has a (\w+) block at the top",
        lambda all, m: any(len(t) == _number(m[1]) and t[-1] == m[2] for t in all),
    ),
    (
        r"There are at least (\w+) (\w+) blocks",
        lambda all, m: sum(t.count(m[2]) for t in all) >= _number(m[1]),
    ),
    (
        r"There is exactly (?:one|1) tower with only (\w+) blocks",
        lambda all, m: sum(set(t) == {m[1]} for t in all) == 1,
    ),
    (
        r"There is at least (?:one|1) tower with blocks of all 3 colours",
        lambda all, _: any(len(set(t)) == 3 for t in all),
    ),
    (
        r"There is exactly (?:one|1) tower with 2 (\w+) blocks stacked together",
        lambda all, m: sum(any(t[n : n + 2] == [m[1]] * 2 for n in range(3)) for t in all) == 1,
    ),
    (
        r"The base of a (\w+) blocks? tower is (\w+)",
        lambda all, m: any(len(t) == _number(m[1]) and t[0] == m[2] for t in all),
    ),
    (r"All 3 towers have a (\w+) top", lambda towers, m: all(t[-1] == m[1] for t in towers)),
    (
        r"There are (?:at least )?two towers with the same height",
        lambda all, _: len({len(t) for t in all}) < 3,
    ),
]


def test_statements_of_three_towers_are_what_their_pixels_say(script: ModuleType) -> None:
    draw = random.Random(5)
    names = {name: code for code, name in script.COLOURS.items()}
    asked = {pattern: 0 for pattern, _ in OF_THREE}
    for _ in range(200):
        towers = [draw.choices(list(script.PIXELS), k=draw.randint(1, 4)) for _ in range(3)]
        boxes = [[{"type": "square", "size": 20, "color": names[one]} for one in t] for t in towers]
        crops = [_drawn(tower, script.PIXELS, draw.randrange(80)) for tower in towers]
        seen = [_read(crop, script.PIXELS) for crop in crops]
        for crop, items, tower in zip(crops, boxes, seen, strict=True):
            assert script.described(items, crop) == f"a tower of {len(tower)}: {', '.join(tower)}"
        _hold(script.statements_of(boxes, crops, draw, 12), OF_THREE, seen, asked)
    assert min(asked.values()) > 2, asked


def test_things_at_an_edge_are_counted_where_the_pixels_say_it(script: ModuleType) -> None:
    """Of a blue circle at the left wall and two black squares that touch none."""
    crop = np.full((10, 10, 3), GROUND, np.uint8)
    crop[4:5, 0:1] = script.PIXELS["blue"]
    crop[6:7, 3:4] = crop[2:3, 7:8] = script.PIXELS["black"]
    codes = {name: code for code, name in script.COLOURS.items()}
    kinds = [("circle", "blue"), ("square", "black"), ("square", "black")]
    box = [{"type": kind, "size": 10, "color": codes[colour]} for kind, colour in kinds]
    empty = np.full((10, 10, 3), GROUND, np.uint8)
    draw = random.Random(0)
    told = dict(script._edges([box, [], []], [crop, empty, empty], draw) for _ in range(4000))
    assert told["There is exactly one blue circle touching the edge"] is True
    assert told["There are exactly two black squares not touching any edge"] is True
    assert told["There is exactly one black square touching the edge"] is False
    said = "3 items: 2 small black square, 1 small blue circle; touching: blue left"
    assert script.described(box, crop) == said


def test_words_of_made_titles_never_say_whether_they_are_true(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    rows = importlib.import_module("vision_rows")
    colours = ["Red", "Blue", "Black", "White"]
    photos = [
        {
            "image": f"{n}.jpg",
            "type": "Shirts",
            "audience": "Men",
            "colour": colours[n % 4],
            "title": f"Maker{n} Men {colours[n % 4]} Shirt",
        }
        for n in range(40)
    ]
    own = {row["image"]: row["colour"] for row in photos}
    made = list(rows.made_titles(photos))
    assert [row["fits"] for row in made] == ["yes", "no"] * (3 * len(photos))
    for row in made:
        named = [colour for colour in colours if colour in row["title"].split()]
        assert len(named) == 1
        assert (named == [own[row["image"]]]) == (row["fits"] == "yes"), row
    per_title = {row["title"] for row in made if row["fits"] == "yes"}
    assert len(per_title & {row["title"] for row in made if row["fits"] == "no"}) > 10


def test_boxes_to_learn_from_stand_in_each_order_others_in_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    rows = importlib.import_module("vision_rows")
    found = rows.orders(["a", "b", "c"], "train")
    assert len({tuple(one) for one in found}) == 6 and all(
        sorted(o) == ["a", "b", "c"] for o in found
    )
    assert rows.orders(["a", "b", "c"], "test") == [["a", "b", "c"]]


def test_listed_statements_have_an_answer_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    rows = importlib.import_module("vision_rows")
    found = rows.listed(["a", "b", "c"], [("There is a box", True), ("There is none", False)])
    assert found == {
        "boxes": ["a", "b", "c"],
        "statements": "1. There is a box\n2. There is none",
        "answers": "1 yes 2 no",
    }


def test_what_is_drawn_smoothly_is_seen_by_its_share_of_a_pixel(script: ModuleType) -> None:
    """NLVR's own yellow, a corner that covers a quarter of a pixel at the wall, and one that stays a pixel away."""
    crop = np.full((10, 10, 3), GROUND, np.uint8)
    crop[4:6, 4:6] = (254, 254, 0)
    assert script.shown(crop, "yellow").sum() == 4
    assert script.touching(crop) == {"blue": set(), "black": set(), "yellow": set()}
    crop[0, 3] = [round(0.75 * 211 + 0.25 * part) for part in script.PIXELS["blue"]]
    crop[5, 9] = (222, 222, 158)
    assert script.touching(crop) == {"blue": {"top"}, "black": set(), "yellow": {"right"}}


def test_things_that_lie_together_are_what_the_row_says(script: ModuleType) -> None:
    """A box of a yellow circle and two black items, one with a blue square, one with nothing."""
    codes = {name: code for code, name in script.COLOURS.items()}
    box = [("circle", "yellow"), ("square", "black"), ("circle", "black")]
    boxes = [
        [{"type": kind, "size": 10, "color": codes[colour]} for kind, colour in one]
        for one in (box, [("square", "blue")], [])
    ]
    draw = random.Random(0)
    told = dict(script._of_several_things(boxes, draw) for _ in range(6000))
    assert told["There is a box with a yellow circle and a black square"] is True
    assert told["There is a box with a black square and a blue square"] is False
    assert told["There is a box with a yellow circle and exactly two black items"] is True
    assert told["There is a box with a yellow circle and at least three black items"] is False
    assert told["There is a box with one item of only one colour"] is True
    assert told["There is a box with 3 items of only yellow and black colour"] is True
    assert told["There is a box with three items of all 3 colours"] is False
    assert told["There is exactly 1 box with only black and yellow items"] is True
