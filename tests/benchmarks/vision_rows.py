"""Rows for the recipes vision-products, vision-statements and vision-questions, from photos of products, NLVR and easy-VQA.

    python tests/benchmarks/vision_rows.py products PRODUCTS OUT
    python tests/benchmarks/vision_rows.py statements NLVR OUT
    python tests/benchmarks/vision_rows.py boxes NLVR OUT
    python tests/benchmarks/vision_rows.py easy-vqa DATA OUT

PRODUCTS and NLVR hold `images/` and rows of JSON. OUT gets `images`, a link, and rows: of products `rows/`, and `titles/` with
one true and one false title a photo, the false one of the same type and audience with another colour named in it,
drawn by a seed within the split; of statements those of the test split that stand in the training split, too, are left
out. Titles of test photos that stand in training, too, are left out of `titles/`. To learn from, `titles/` has four more
a photo, made of its colour, type and audience: a title's words alone never say whether they are true. Each training
photo stands there three times, twice as a part of itself, in `crops/`. `boxes` are the
same statements with each box as a picture of its own, to learn from in each of six orders, and, of the training pictures alone, statements that a script makes
of what is in the boxes, of all three (`made/`) and of one (`inside/`),
eight at a time (`listed/`), questions of how many there are (`counts/`), and what is in each box in words (`described/`). DATA is the folder `data` of the package easy-vqa: a folder for each kind of
question.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from nlvr_statements import counts_of, described, in_order, statements_of
from PIL import Image, ImageOps

Row = dict[str, Any]
SPLITS = ("train", "validation", "test")
SEED = 0
MADE, INSIDE = 24, 4  # statements of a picture, and of each of its boxes
LISTED = 8  # statements of a picture that are asked at once


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


def made_folder(folder: Path) -> Path:
    """It, made."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


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
        link(out / folder, made_folder(out / "crops"), "crops")
    rows = {split: read(source / f"{split}.jsonl") for split in SPLITS}
    learned = {row["title"] for row in rows["train"]}
    rows["train"] = [one for row in rows["train"] for one in (row, *crops(row, source, out))]
    for split, own in rows.items():
        write(out / "rows" / f"{split}.jsonl", own)
        kept = own if split == "train" else [row for row in own if row["title"] not in learned]
        found = list(titles(kept))
        if split == "train":
            found += made_titles(kept)
        write(out / "titles" / f"{split}.jsonl", found)
        print(f"{split}: {len(own)} photos, {len(found)} titles of {len(kept)} photos")


def crops(row: Row, source: Path, out: Path) -> Iterator[Row]:
    """Two parts of a photo, one of them mirrored: as much as half of it is left out."""
    stem = Path(row["image"]).stem
    draw = random.Random(f"{SEED} {stem}")
    with Image.open(source / row["image"]) as photo:
        whole = photo.convert("RGB")
    for number in range(2):
        width, height = (int(side * draw.uniform(0.72, 0.97)) for side in whole.size)
        x, y = draw.randint(0, whole.width - width), draw.randint(0, whole.height - height)
        part = whole.crop((x, y, x + width, y + height))
        name = f"{stem}-{number}.jpg"
        (ImageOps.mirror(part) if number else part).save(out / "crops" / name, quality=92)
        yield {**row, "image": f"crops/{name}"}


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


def made_titles(rows: Sequence[Row]) -> Iterator[Row]:
    """Of each photo six, three of its own colour, three of another one: its words never say whether a title is true.

    Three are so short that many photos share them; one is the photo's own title with its colour exchanged, and two are
    titles of its type and audience that name a colour, with the photo's own in its place and with another. Other colours
    are drawn as often as they are some photo's, half of them among photos of the same type and audience.
    """
    draw = random.Random(SEED)
    colours = [row["colour"] for row in rows]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["type"], row["audience"]), []).append(row)
    for row in rows:
        own, group = row["colour"], groups[row["type"], row["audience"]]
        others = [one for one in colours if one != own]
        near = [one["colour"] for one in group if one["colour"] != own] or others
        named = [one for one in group if one["colour"] in one["title"]] or [row]

        def other(others: list[str] = others, near: list[str] = near) -> str:
            return draw.choice(near if draw.random() < 0.5 else others)

        def exchanged(one: Row, colour: str, row: Row = row) -> str:
            known = one["colour"] in one["title"]
            return (
                one["title"].replace(one["colour"], colour) if known else short(row, colour, True)
            )

        for fitting, false in (
            (short(row, own, True), short(row, other(), draw.random() < 0.5)),
            (short(row, own, False), exchanged(row, other())),
            (exchanged(draw.choice(named), own), exchanged(draw.choice(named), other())),
        ):
            yield {"image": row["image"], "title": fitting, "fits": "yes"}
            yield {"image": row["image"], "title": false, "fits": "no"}


def short(row: Row, colour: str, audience: bool) -> str:
    """A title of nothing but what the row says, and a colour."""
    return " ".join([*([row["audience"]] if audience else []), colour, row["type"]])


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
    for folder in ("statements", "made", "listed", "inside", "counts", "described"):
        link(out / folder, crops)
    for split, rows in (("train", learned), ("test", kept)):
        write(
            out / "statements" / f"{split}.jsonl",
            (
                {"boxes": order, "sentence": row["sentence"], "label": row["label"]}
                for row in rows
                for order in orders(shown[row["image"]], split)
            ),
        )
    draw = random.Random(SEED)
    made, together, inside, counts = [], [], [], []
    words: dict[str, str] = {}
    for row in learned:
        names = shown[row["image"]]
        arrays = [np.asarray(Image.open(crops / Path(name).name)) for name in names]
        items = in_order(row["boxes"], arrays)
        claims = statements_of(items, arrays, draw, MADE)
        draw.shuffle(claims)
        made += [
            {"boxes": names, "sentence": sentence, "label": "true" if truth else "false"}
            for sentence, truth in claims[: MADE // 2]
        ]
        together += [
            listed(draw.sample(names, 3), claims[first : first + LISTED])
            for first in range(0, len(claims) - LISTED + 1, LISTED)
        ]
        for name, own, array in zip(names, items, arrays, strict=True):
            words[name] = described(own, array)
            inside += [
                {"image": name, "sentence": sentence, "label": "true" if truth else "false"}
                for sentence, truth in statements_of([own], [array], draw, INSIDE)
            ]
            counts += [
                {"image": name, "thing": thing, "count": str(count)}
                for thing, count in counts_of(own, draw)
            ]
    said = [{"image": name, "description": text} for name, text in words.items()]
    for folder, rows in (
        ("made", made),
        ("listed", together),
        ("inside", inside),
        ("counts", counts),
        ("described", said),
    ):
        write(out / folder / "train.jsonl", rows)
    print(
        f"train: {len(learned)} statements, {len(made)} made of three boxes, {len(inside)} of one, "
        f"{len(counts)} counts"
    )


def listed(boxes: list[str], claims: Sequence[tuple[str, bool]]) -> Row:
    """Several statements of the same three boxes, and of each whether it is true: many answers for the tokens of one picture."""
    return {
        "boxes": boxes,
        "statements": "\n".join(f"{n}. {sentence}" for n, (sentence, _) in enumerate(claims, 1)),
        "answers": " ".join(
            f"{n} {'yes' if true else 'no'}" for n, (_, true) in enumerate(claims, 1)
        ),
    }


def orders(boxes: list[str], split: str) -> list[list[str]]:
    """Of boxes to learn from all six: no sentence of NLVR says which box is which, and the whole of it has them all."""
    return [list(order) for order in permutations(boxes)] if split == "train" else [boxes]


def cropped(source: Path, image: str, crops: Path) -> list[str]:
    """The three boxes of a picture of 400 x 100, each in a file of its own."""
    names = [f"{Path(image).stem}-box{number}.png" for number in range(3)]
    with Image.open(source / image) as whole:
        for number, name in enumerate(names):
            whole.convert("RGB").crop((150 * number, 0, 150 * number + 100, 100)).save(crops / name)
    return [f"images/{name}" for name in names]


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
