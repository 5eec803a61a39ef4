"""Rows for the recipes vision-products, vision-statements and vision-four, from photos of products, NLVR and easy-VQA.

    python tests/benchmarks/vision_rows.py products PRODUCTS OUT
    python tests/benchmarks/vision_rows.py statements NLVR OUT
    python tests/benchmarks/vision_rows.py boxes NLVR OUT
    python tests/benchmarks/vision_rows.py easy-vqa DATA OUT

PRODUCTS and NLVR hold `images/` and rows of JSON. OUT gets `images`, a link, and rows: of products `rows/`, and `titles/` with
one true and one false title a photo, the false one of the same type and audience with another colour named in it,
drawn by a seed within the split; of statements those of the test split that stand in the training split, too, are left
out. Titles of test photos that stand in training, too, are left out of `titles/`. `boxes` are the same statements with
each box as a picture of its own, and, of the training pictures alone, statements that a script makes of what is in the
boxes (`made/`) and questions of how many there are (`counts/`). DATA is the folder `data` of the package easy-vqa: a
folder for each kind of question.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

Row = dict[str, Any]
SPLITS = ("train", "validation", "test")
SEED = 0


def main() -> int:
    """Write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["products", "statements", "boxes", "easy-vqa"])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    a = parser.parse_args()
    made = {
        "products": products,
        "statements": statements,
        "boxes": boxes,
        "easy-vqa": easy_vqa,
    }
    made[a.kind](a.source, a.out)
    return 0


def link(folder: Path, source: Path, name: str = "images") -> Path:
    """A folder of rows whose pictures lie elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / name).is_symlink():
        (folder / name).symlink_to(source.resolve())
    return folder


def products(source: Path, out: Path) -> None:
    """Rows and titles of each split."""
    for folder in ("rows", "titles"):
        link(out / folder, source / "images")
    rows = {split: read(source / f"{split}.jsonl") for split in SPLITS}
    learned = {row["title"] for row in rows["train"]}
    for split, own in rows.items():
        write(out / "rows" / f"{split}.jsonl", own)
        kept = own if split == "train" else [row for row in own if row["title"] not in learned]
        found = list(titles(kept))
        write(out / "titles" / f"{split}.jsonl", found)
        print(f"{split}: {len(own)} photos, {len(found)} titles of {len(kept)} photos")


def titles(rows: Sequence[Row]) -> Iterator[Row]:
    """Of each photo that has a false title in the split: its own, and that one."""
    draw = random.Random(SEED)
    for row in rows:
        others = sorted(
            {
                other["title"]
                for other in rows
                if (other["type"], other["audience"]) == (row["type"], row["audience"])
                and other["colour"] != row["colour"]
                and other["colour"].lower() in other["title"].lower().split()
            }
            - {row["title"]}
        )
        if others:
            yield {"image": row["image"], "title": row["title"], "fits": "yes"}
            yield {"image": row["image"], "title": draw.choice(others), "fits": "no"}


def statements(source: Path, out: Path) -> None:
    """NLVR's development rows to learn, its test rows without sentences that are learned."""
    link(out / "rows", source / "images")
    learned, kept = split_of_statements(source)
    for split, rows in (("train", learned), ("test", kept)):
        write(
            out / "rows" / f"{split}.jsonl",
            ({key: row[key] for key in ("image", "sentence", "label")} for row in rows),
        )
    true = sum(row["label"] == "true" for row in kept) / len(kept)
    print(f"test: {len(kept)} statements, {true:.1%} true")


def split_of_statements(source: Path) -> tuple[list[Row], list[Row]]:
    """What is learned, and what is evaluated: no sentence stands in both."""
    learned, held = read(source / "dev.jsonl"), read(source / "test.jsonl")
    known = {row["sentence"] for row in learned}
    return learned, [row for row in held if row["sentence"] not in known]


def boxes(source: Path, out: Path) -> None:
    """Statements over three pictures a row; and, of the training pictures, made statements and counts."""
    learned, kept = split_of_statements(source)
    crops = out / "crops"
    crops.mkdir(parents=True, exist_ok=True)
    shown = {row["image"]: cropped(source, row["image"], crops) for row in [*learned, *kept]}
    for folder in ("statements", "made", "counts"):
        link(out / folder, crops)
    for split, rows in (("train", learned), ("test", kept)):
        write(
            out / "statements" / f"{split}.jsonl",
            (
                {"boxes": shown[row["image"]], "sentence": row["sentence"], "label": row["label"]}
                for row in rows
            ),
        )
    draw = random.Random(SEED)
    made = [one for row in learned for one in statements_of(row, shown[row["image"]], draw)]
    counts = [one for row in learned for one in counts_of(row, shown[row["image"]], draw)]
    write(out / "made" / "train.jsonl", made)
    write(out / "counts" / "train.jsonl", counts)
    print(f"train: {len(learned)} statements, {len(made)} made, {len(counts)} counts")


def cropped(source: Path, image: str, crops: Path) -> list[str]:
    """The three boxes of a picture of 400 x 100, each in a file of its own."""
    names = [f"{Path(image).stem}-box{number}.png" for number in range(3)]
    with Image.open(source / image) as whole:
        for number, name in enumerate(names):
            whole.convert("RGB").crop((150 * number, 0, 150 * number + 100, 100)).save(crops / name)
    return [f"images/{name}" for name in names]


COLOURS = {"#0099ff": "blue", "Black": "black", "Yellow": "yellow"}
NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight"]


def kinds_in(items: Sequence[Row]) -> dict[str, int]:
    """How many of each kind of thing are in a box: of a colour, of a shape, of both, in all."""
    found = {"item": len(items)}
    for colour in COLOURS.values():
        own = [one for one in items if COLOURS[one["color"]] == colour]
        found[f"{colour} item"] = len(own)
        for shape in ("square", "triangle", "circle"):
            found[f"{colour} {shape}"] = sum(one["type"] == shape for one in own)
            found[shape] = found.get(shape, 0) + found[f"{colour} {shape}"]
    return found


def claims(row: Row, draw: random.Random) -> Iterator[tuple[str, bool]]:
    """Statements about all three boxes, each with whether it is true."""
    each = [kinds_in(items) for items in row["boxes"]]
    thing = draw.choice([kind for kind in each[0] if kind != "item"])
    inside = [box[thing] for box in each]
    many = draw.randint(1, 5)
    plural = f"{NUMBERS[many]} {thing}{'s' if many > 1 else ''}"
    yield f"There is at least one {thing}", sum(inside) > 0
    yield f"There is a box with {plural}", many in inside
    yield f"There is a box with at least {plural}", max(inside) >= many
    yield f"Each box contains at least one {thing}", min(inside) > 0
    yield f"There are exactly {plural} in all", sum(inside) == many
    boxes = draw.randint(1, 2)
    which = f"There {'is 1 box' if boxes == 1 else 'are 2 boxes'} with a {thing}"
    yield which, sum(count > 0 for count in inside) == boxes
    total = draw.randint(1, 8)
    yield (
        f"One of the grey boxes has exactly {NUMBERS[total]} objects",
        total in [box["item"] for box in each],
    )
    colours = [{one["color"] for one in items} for items in row["boxes"]]
    colour, name = draw.choice(list(COLOURS.items()))
    yield f"There is a box with only {name} items", {colour} in colours
    yield "There is a box with items of only one colour", any(len(c) == 1 for c in colours)
    yield "There is a box with items of all 3 different colours", any(len(c) == 3 for c in colours)


def statements_of(row: Row, shown: Sequence[str], draw: random.Random) -> Iterator[Row]:
    """Four statements of a training picture, as many of them true as can be."""
    found = [*claims(row, draw), *claims(row, draw), *claims(row, draw)]
    draw.shuffle(found)
    for truth in (True, False):
        for sentence, _ in dict.fromkeys([one for one in found if one[1] == truth][:2]):
            label = "true" if truth else "false"
            yield {"boxes": list(shown), "sentence": sentence, "label": label}


def counts_of(row: Row, shown: Sequence[str], draw: random.Random) -> Iterator[Row]:
    """Two questions of how many a box of a training picture holds."""
    for image, items in zip(shown, row["boxes"], strict=True):
        found = kinds_in(items)
        there = [kind for kind, count in found.items() if count]
        for thing in dict.fromkeys([draw.choice(there), draw.choice(list(found))]):
            yield {"image": image, "thing": thing, "count": str(min(found[thing], 8))}


def easy_vqa(source: Path, out: Path) -> None:
    """The four kinds of question: which shape, which colour, whether a shape, whether a colour is there."""
    for split in ("train", "test"):
        kinds: dict[str, list[Row]] = {}
        for question, answer, number in json.loads((source / split / "questions.json").read_text()):
            row = {"image": f"{split}/{number}.png", "question": question, "answer": answer}
            kinds.setdefault(kind_of(question, answer), []).append(row)
        for kind, rows in kinds.items():
            link(out / kind, source / split / "images", split)
            write(out / kind / f"{split}.jsonl", rows)
        print(split, {kind: len(rows) for kind, rows in kinds.items()})


def kind_of(question: str, answer: str) -> str:
    """Which of the four a question is."""
    if answer in ("yes", "no"):
        about = any(shape in question for shape in ("circle", "rectangle", "triangle"))
        return "has_shape" if about else "has_colour"
    return "shape" if answer in ("circle", "rectangle", "triangle") else "colour"


def read(path: Path) -> list[Row]:
    """Rows of JSON."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Likewise."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
