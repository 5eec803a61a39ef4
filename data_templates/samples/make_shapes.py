"""Draw the sample of pictures with questions: a few coloured shapes, and what can be asked of them.

    python data_templates/samples/make_shapes.py            rewrite the files
    python data_templates/samples/make_shapes.py --check    exit 1 if a row or a pixel differs

A picture has two to four shapes of at most three colours in four places, two columns and two rows; each follows from
the number of its picture alone. Of every question each answer is equally frequent, whatever the question's words are: who
sees nothing does no better than by chance. Each answer to one question comes equally often with each answer to the others:
who sees how many shapes there are knows no more of anything else. Whether a colour is there is asked of pictures that are
drawn without regard to the answer.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent / "shapes"
COUNTS = {"train": 1152, "test": 192}
CELL = 28  # pixels of a place
COLOURS = {
    "red": (220, 40, 40),
    "green": (50, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 40),
}
FORMS = ("circle", "square", "triangle")
GROUND = (235, 235, 230)


def main() -> int:
    """Write, or compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    wrong = [place for split in COUNTS for place in (_compare if check else _write)(split)]
    for place in wrong:
        print(f"{place} differs", file=sys.stderr)
    return 1 if wrong else 0


def _write(split: str) -> list[Path]:
    HERE.mkdir(exist_ok=True)
    (HERE / split).mkdir(exist_ok=True)
    rows = []
    for number in range(COUNTS[split]):
        row, pixels = scene(split, number)
        Image.fromarray(pixels).quantize(8).save(HERE / row["image"], optimize=True)
        rows.append(row)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (HERE / f"{split}.jsonl").write_text(text, encoding="ascii")
    return []


def _compare(split: str) -> list[Path]:
    lines = (HERE / f"{split}.jsonl").read_text(encoding="ascii").splitlines()
    found = []
    for number, line in enumerate(lines):
        row, pixels = scene(split, number)
        stored = np.asarray(Image.open(HERE / row["image"]).convert("RGB"))
        if json.loads(line) != row or not np.array_equal(stored, pixels):
            found.append(HERE / row["image"])
    return found if len(lines) == COUNTS[split] else [HERE / f"{split}.jsonl", *found]


def scene(split: str, number: int) -> tuple[dict[str, str], np.ndarray]:
    """One row and its picture, uint8 [56, 56, 3]."""
    draw = np.random.default_rng([list(COUNTS).index(split), number])
    count = 2 + number // 4 % 3
    while True:
        places = draw.permutation(4)[:count]
        shapes = [(str(draw.choice(list(COLOURS))), str(draw.choice(FORMS))) for _ in places]
        row = _asked(number, places, shapes, draw)
        if row is not None:
            break
    pixels = np.full((2 * CELL, 2 * CELL, 3), GROUND, np.uint8)
    for place, (colour, form) in zip(places, shapes, strict=True):
        _paint(pixels, int(place), colour, form, draw)
    return {"image": f"{split}/{number:04d}.png", "count": str(count), **row}, pixels


def _asked(
    number: int, places: np.ndarray, shapes: list[tuple[str, str]], draw: np.random.Generator
) -> dict[str, str] | None:
    """What is asked of a picture, and the answers; None where one of the questions has no answer in it."""
    forms = [form for _, form in shapes]
    alone = [index for index, form in enumerate(forms) if forms.count(form) == 1]
    columns = places % 2
    pairs = [
        (a, b)
        for a in range(len(shapes))
        for b in range(len(shapes))
        if columns[a] < columns[b] and shapes.count(shapes[a]) == shapes.count(shapes[b]) == 1
    ]
    present = {colour for colour, _ in shapes}
    wanted = list(COLOURS)[number % 4]
    lone = [index for index in alone if shapes[index][0] == wanted]
    if not lone or not pairs or len(present) == len(COLOURS):
        return None
    left, right = pairs[int(draw.integers(len(pairs)))]
    is_left = number // 12 % 2 == 0
    first, second = (left, right) if is_left else (right, left)
    named = [" ".join(shapes[index]) for index in np.argsort(places)]
    there = number // 24 % 2 == 0
    asked = [colour for colour in COLOURS if (colour in present) == there]
    return {
        "form": forms[lone[0]],
        "colour": wanted,
        "thing": asked[int(draw.integers(len(asked)))],
        "there": "yes" if there else "no",
        "one": " ".join(shapes[first]),
        "other": " ".join(shapes[second]),
        "side": "left" if is_left else "right",
        "caption": ", ".join(named),  # from the upper left on, row by row
    }


def _paint(
    pixels: np.ndarray, place: int, colour: str, form: str, draw: np.random.Generator
) -> None:
    half = int(draw.integers(9, 12))
    top, left = (place // 2) * CELL, (place % 2) * CELL
    y = top + CELL // 2 + int(draw.integers(-2, 3))
    x = left + CELL // 2 + int(draw.integers(-2, 3))
    rows, columns = np.mgrid[: pixels.shape[0], : pixels.shape[1]]
    down, across = rows - y, columns - x
    inside = {
        "circle": down**2 + across**2 <= half**2,
        "square": np.maximum(abs(down), abs(across)) <= half - 1,
        "triangle": (abs(down) <= half) & (2 * abs(across) <= down + half),
    }[form]
    pixels[inside] = COLOURS[colour]


if __name__ == "__main__":
    sys.exit(main())
