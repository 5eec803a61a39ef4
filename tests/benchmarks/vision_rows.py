"""Rows for the recipes vision-products and vision-statements, from photos of products and from NLVR.

    python tests/benchmarks/vision_rows.py products PRODUCTS OUT
    python tests/benchmarks/vision_rows.py statements NLVR OUT

PRODUCTS and NLVR hold `images/` and rows of JSON. OUT gets `images`, a link, and rows: of products `rows/`, and `titles/` with
one true and one false title a photo, the false one of the same type and audience with another colour named in it,
drawn by a seed within the split; of statements those of the test split that stand in the training split, too, are left
out. Titles of test photos that stand in training, too, are left out of `titles/`.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SPLITS = ("train", "validation", "test")
SEED = 0


def main() -> int:
    """Write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["products", "statements"])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    for folder in ("rows", "titles") if a.kind == "products" else ("rows",):
        link = a.out / folder / "images"
        link.parent.mkdir(exist_ok=True)
        if not link.is_symlink():
            link.symlink_to((a.source / "images").resolve())
    (products if a.kind == "products" else statements)(a.source, a.out)
    return 0


def products(source: Path, out: Path) -> None:
    """Rows and titles of each split."""
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
    learned, held = read(source / "dev.jsonl"), read(source / "test.jsonl")
    known = {row["sentence"] for row in learned}
    kept = [row for row in held if row["sentence"] not in known]
    for split, rows in (("train", learned), ("test", kept)):
        write(
            out / "rows" / f"{split}.jsonl",
            ({key: row[key] for key in ("image", "sentence", "label")} for row in rows),
        )
    true = sum(row["label"] == "true" for row in kept) / len(kept)
    print(f"test: {len(kept)} of {len(held)} statements, {true:.1%} true")


def read(path: Path) -> list[Row]:
    """Rows of JSON."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Likewise."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
