"""Statements that a benchmark's script makes of pictures of towers are what the pictures show: read off the pixels."""

from __future__ import annotations

import importlib.util
import random
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "nlvr_statements.py"
GROUND = (211, 211, 211)
WORDS = {"one": 1, "two": 2, "three": 3, "four": 4}


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
            # Towers of equally many blocks of each colour cover as much: they may stand for each other.
            if sorted(seen) not in [sorted(towers[n]) for n in order if towers[n] != seen]:
                assert [script.COLOURS[one["color"]] for one in items] == seen
            else:
                continue
            made = script.statements_of([items], [crop], draw, 8)
            assert sum(truth for _, truth in made) <= 4
            for sentence, truth in made:
                for pattern, rule in RULES:
                    match = re.fullmatch(pattern, sentence)
                    if match is not None:
                        asked[pattern] += 1
                        assert rule(seen, match) == truth, (seen, sentence)
    assert min(asked.values()) > 5, asked
