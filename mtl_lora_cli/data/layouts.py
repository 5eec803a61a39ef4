"""Folders of pictures and maps as others lay them out, read as rows of paths.

| layout | what lies in the folder | fields of a row |
| --- | --- | --- |
| `folders` | `images/`, and a folder of maps with the same stems for each field; splits as folders `train/`, `validation/`, `test/` around them, or as lists of stems `train.txt` …; with neither, every fifth stem by its hash is `test` | `image`, and each folder's name |
| `nyud-mt` | the NYUD-MT archive: `images/*.jpg`, `segmentation/*.png`, `depth/*.npy`, `normals/*.npy`, `edge/*.npy`, `gt_sets/{train,val}.txt` | `image`, `segmentation`, `depth`, `normals`, `edge` |
| `nyu-mat` | the official `nyu_depth_v2_labeled.mat`, `splits.mat`, and perhaps `labels40.mat` | `image`, `depth`, `segmentation` |
| `pascal-context` | the PASCAL-Context archive of multi-task learning: `JPEGImages/`, `semseg/`, `human_parts/`, `sal_distill/`, `normals_distill/`, `pascal-context/trainval/`, `ImageSets/Context/{train,val}.txt` | `image`, `semseg`, `parts`, `saliency`, `normals`, `edges` |

Others' `val` is our `test`. A map that is not there is left out of its row. Questions and captions about pictures are in
`question_layouts.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from mtl_lora_cli.data.file_formats import Rows, fingerprint
from mtl_lora_cli.data.question_layouts import QUESTIONS, Placed
from mtl_lora_cli.errors import UsageError, file_problem
from mtl_lora_cli.pictures.matfiles import read_mat

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".npy")
SPLITS = ("train", "validation", "test")
_MAPS = (*PICTURES, ".mat")
_NYU = "nyu_depth_v2_labeled.mat"


def layout_rows(root: Path, layout: str, split: str, task: str) -> Rows | None:
    """The rows of one split; None where the folder has no such split.

    Args:
        root: the folder.
        layout: a key of `LAYOUTS`.
        split: train, validation or test.
        task: for errors.

    Raises:
        UsageError: there is no such folder, it is laid out otherwise, or a listed picture is missing.
    """
    if not root.is_dir():
        raise file_problem(root, "no such folder", key=f"source of task '{task}'")
    found = LAYOUTS[layout](root, split)
    if found is None:
        return None
    placed = list(found)
    if not placed:
        raise file_problem(
            root,
            f"no picture of the {split} split, laid out as {layout}",
            key=f"source of task '{task}'",
        )
    rows, wheres = [row for row, _ in placed], [where for _, where in placed]
    return Rows(rows, str(root), fingerprint(repr(rows).encode()), wheres)


def _folders(root: Path, split: str) -> Iterator[Placed] | None:
    """See the table of the module."""
    if any((root / name / "images").is_dir() for name in SPLITS):
        home = root / split
        return _by_stem(root, home, None) if (home / "images").is_dir() else None
    if not (root / "images").is_dir():
        raise file_problem(
            root,
            "has no folder 'images', nor 'train/images'; expected pictures there and maps beside it",
        )
    if any((root / f"{name}.txt").is_file() for name in SPLITS):
        listed = root / f"{split}.txt"
        return _by_stem(root, root, set(_lines(listed))) if listed.is_file() else None
    if split == "validation":
        return None
    stems = {path.stem for path in _pictures(root / "images")}
    held = {stem for stem in stems if hashlib.sha256(stem.encode()).digest()[0] % 5 == 0}
    chosen = held if split == "test" else stems - held
    return _by_stem(root, root, chosen) if chosen else None


def _by_stem(root: Path, home: Path, stems: set[str] | None) -> Iterator[Placed]:
    maps: dict[str, dict[str, Path]] = {}
    for folder in sorted(home.iterdir()):
        if folder.is_dir() and folder.name not in ("images", *SPLITS):
            there = (one for one in folder.iterdir() if one.suffix.lower() in _MAPS)
            maps[folder.name] = {one.stem: one for one in sorted(there)}
    for picture in _pictures(home / "images"):
        if stems is None or picture.stem in stems:
            row = {"image": picture.relative_to(root).as_posix()}
            for name, files in maps.items():
                if picture.stem in files:
                    row[name] = files[picture.stem].relative_to(root).as_posix()
            yield row, str(picture)


def _pictures(folder: Path) -> list[Path]:
    return sorted(one for one in folder.iterdir() if one.suffix.lower() in PICTURES)


def _lines(path: Path) -> list[str]:
    """The names in a list, without blank lines.

    Raises:
        UsageError: there is no such list.
    """
    try:
        return [
            line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
        ]
    except (OSError, UnicodeDecodeError) as error:
        raise file_problem(path, f"cannot be read: {error}") from None


def _listed(
    root: Path, split: str, lists: str, fields: Mapping[str, tuple[str, ...]]
) -> Iterator[Placed] | None:
    """Rows of a list of names; each field's file is the first of its patterns that is there."""
    names = {"train": "train", "test": "val"}
    if split not in names:
        return None
    path = root / lists / f"{names[split]}.txt"
    lines = _lines(path)

    def rows() -> Iterator[Placed]:
        for number, name in enumerate(lines, start=1):
            where = f"{path}:{number}"
            row = {}
            for field, patterns in fields.items():
                places = (pattern.replace("*", name) for pattern in patterns)
                there = (one for one in places if (root / one.partition("#")[0]).is_file())
                found = next(there, None)
                if found is not None:
                    row[field] = found
            if "image" not in row:
                raise UsageError(f"{where}: no picture '{fields['image'][0].replace('*', name)}'")
            yield row, where

    return rows()


def _nyud_mt(root: Path, split: str) -> Iterator[Placed] | None:
    fields = {
        "image": ("images/*.jpg", "images/*.png"),
        "segmentation": ("segmentation/*.png", "segmentation/*.mat"),
        "depth": ("depth/*.npy", "depth/*.mat"),
        "normals": ("normals/*.npy", "normals/*.png"),
        "edge": ("edge/*.npy", "edge/*.png"),
    }
    return _listed(root, split, "gt_sets", fields)


def _pascal_context(root: Path, split: str) -> Iterator[Placed] | None:
    fields = {
        "image": ("JPEGImages/*.jpg",),
        "semseg": ("semseg/VOC12/*.png", "semseg/pascal-context/*.png"),
        "parts": ("human_parts/*.mat#person parts",),
        "saliency": ("sal_distill/*.png",),
        "normals": ("normals_distill/*.png",),
        "edges": ("pascal-context/trainval/*.mat#LabelMap",),
    }
    return _listed(root, split, "ImageSets/Context", fields)


def _nyu_mat(root: Path, split: str) -> Iterator[Placed] | None:
    """The official file, whose parts are counted from 1 in splits.mat."""
    names = {"train": "trainNdxs", "test": "testNdxs"}
    if split not in names:
        return None
    for name in (_NYU, "splits.mat"):
        if not (root / name).is_file():
            raise file_problem(root, f"no file '{name}', which layout: nyu-mat needs")
    splits = root / "splits.mat"
    numbers = read_mat(splits, names[split], lambda said: file_problem(splits, said))
    classes = (root / "labels40.mat").is_file()

    def rows() -> Iterator[Placed]:
        for number in np.asarray(numbers).ravel().astype(int):
            at = int(number) - 1
            row = {"image": f"{_NYU}#images/{at}", "depth": f"{_NYU}#depths/{at}"}
            if classes:
                row["segmentation"] = f"labels40.mat#labels40/{at}"
            yield row, f"{root / _NYU}, picture {number}"

    return rows()


LAYOUTS: dict[str, Callable[[Path, str], Iterator[Placed] | None]] = {
    "folders": _folders,
    "nyud-mt": _nyud_mt,
    "nyu-mat": _nyu_mat,
    "pascal-context": _pascal_context,
    **QUESTIONS,
}
