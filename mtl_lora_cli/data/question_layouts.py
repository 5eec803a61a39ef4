"""Questions, statements and captions about photos, as their own files lay them out, read as rows.

| layout | what lies in the folder | fields of a row |
| --- | --- | --- |
| `vqa-v2` | `v2_OpenEnded_mscoco_{train,val}2014_questions.json`, `v2_mscoco_{train,val}2014_annotations.json`, `train2014/`, `val2014/` | `image`, `question`, `answer`, `answers` (ten), `question_type`, `answer_type` |
| `gqa` | `train_balanced_questions.json`, `val_balanced_…`, `testdev_balanced_…`, `images/` | `image`, `question`, `answer` |
| `nlvr2` | `train.json`, `dev.json`, `test1.json` (JSON lines), `images/train/DIRECTORY/`, `dev/`, `test1/` | `left`, `right`, `sentence`, `label` |
| `coco-captions` | `annotations/captions_{train,val}2014.json` or `…2017.json`, and folders of photos of these names; or Karpathy's `dataset_coco.json` | `image`, `caption`, `captions` |

Others' `val` or `testdev` is our `test`, where no labels of a test split are public. Each caption of a training photo is a
row; a photo that is evaluated is one row with all of its captions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mtl_lora_cli.errors import UsageError, file_problem

Row = dict[str, Any]
Placed = tuple[Row, str]
_YEARS = ("2014", "2017")


def _vqa_v2(root: Path, split: str) -> Iterator[Placed] | None:
    """See the table of the module."""
    part = {"train": "train2014", "test": "val2014"}.get(split)
    if part is None:
        return None
    asked, said = (
        root / f"v2_OpenEnded_mscoco_{part}_questions.json",
        root / f"v2_mscoco_{part}_annotations.json",
    )
    if not asked.is_file() and not said.is_file():
        return _no_split(root, asked, _there(root, "v2_OpenEnded_*"))
    return _questions(asked, said, part)


def _questions(asked: Path, said: Path, part: str) -> Iterator[Placed]:
    known = {one["question_id"]: one for one in _listed(said, "annotations", _ANSWERED)}
    for one in _listed(asked, "questions", ("question_id", "image_id", "question")):
        where = f"{asked}, question {one['question_id']}"
        answered = known.get(one["question_id"])
        if answered is None:
            raise UsageError(f"{where}: has no annotation in {said.name}")
        people = [_field(person, "answer", where) for person in answered["answers"]]
        yield (
            {
                "image": f"{part}/COCO_{part}_{int(one['image_id']):012d}.jpg",
                "question": one["question"],
                "answer": answered["multiple_choice_answer"],
                "answers": people,
                "question_type": answered.get("question_type"),
                "answer_type": answered.get("answer_type"),
            },
            where,
        )


_ANSWERED = ("question_id", "multiple_choice_answer", "answers")


def _gqa(root: Path, split: str) -> Iterator[Placed] | None:
    """See the table of the module."""
    part = {"train": "train", "validation": "val", "test": "testdev"}[split]
    file = root / f"{part}_balanced_questions.json"
    if not file.is_file():
        return _no_split(root, file, _there(root, "*_balanced_questions.json"))
    return _gqa_rows(file)


def _gqa_rows(file: Path) -> Iterator[Placed]:
    found = _read(file)
    if not isinstance(found, Mapping):
        raise file_problem(file, "expected questions by their numbers, an object")
    for number, one in found.items():
        where = f"{file}, question {number}"
        image, question, answer = (_field(one, n, where) for n in ("imageId", "question", "answer"))
        yield {"image": f"images/{image}.jpg", "question": question, "answer": answer}, where


def _nlvr2(root: Path, split: str) -> Iterator[Placed] | None:
    """See the table of the module."""
    part = {"train": "train", "validation": "dev", "test": "test1"}[split]
    file = root / f"{part}.json"
    if not file.is_file():
        return _no_split(root, file, _there(root, "*.json"))
    return _statements(file, part)


def _statements(file: Path, part: str) -> Iterator[Placed]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                one = json.loads(line)
            except ValueError as error:
                raise UsageError(f"{where}: not valid JSON: {error}") from None
            name, sentence, label = (
                _field(one, n, where) for n in ("identifier", "sentence", "label")
            )
            pair = str(name).rpartition("-")[0]  # of several sentences about one pair
            within = f"{part}/{one['directory']}" if "directory" in one else part
            left, right = (f"images/{within}/{pair}-img{side}.png" for side in (0, 1))
            yield {"left": left, "right": right, "sentence": sentence, "label": label}, where


def _coco_captions(root: Path, split: str) -> Iterator[Placed] | None:
    """See the table of the module."""
    if (root / "dataset_coco.json").is_file():
        return _karpathy(root / "dataset_coco.json", split)
    part = {"train": "train", "test": "val"}.get(split)
    files = [(root / "annotations" / f"captions_{part}{year}.json", year) for year in _YEARS]
    file, year = next((one for one in files if one[0].is_file()), files[0])
    if part is None or not file.is_file():
        known = part is None or _there(root, "annotations/captions_*.json")
        return _no_split(root, file, known)
    return _captions(file, f"{part}{year}", split)


def _captions(file: Path, folder: str, split: str) -> Iterator[Placed]:
    names = {one["id"]: one["file_name"] for one in _listed(file, "images", ("id", "file_name"))}
    said: dict[Any, list[str]] = {}
    for one in _listed(file, "annotations", ("image_id", "caption")):
        if one["image_id"] not in names:
            raise UsageError(
                f"{file}: a caption of the photo {one['image_id']}, which is not listed"
            )
        said.setdefault(one["image_id"], []).append(one["caption"])
    for photo, captions in said.items():
        yield from _captioned(f"{folder}/{names[photo]}", captions, split, f"{file}, photo {photo}")


def _karpathy(file: Path, split: str) -> Iterator[Placed] | None:
    wanted = {"train": ("train", "restval"), "validation": ("val",), "test": ("test",)}[split]
    rows = [
        placed
        for one in _listed(file, "images", ("split", "filepath", "filename", "sentences"))
        if one["split"] in wanted
        for placed in _captioned(
            f"{one['filepath']}/{one['filename']}",
            [_field(said, "raw", str(file)) for said in one["sentences"]],
            split,
            f"{file}, photo {one['filename']}",
        )
    ]
    return iter(rows) if rows else None


def _captioned(image: str, captions: list[str], split: str, where: str) -> Iterator[Placed]:
    """A row for each caption that is learned, or one with all."""
    told = [" ".join(str(one).split()) for one in captions]
    for one in told if split == "train" else told[:1]:
        yield {"image": image, "caption": one, "captions": told}, where


def _listed(file: Path, name: str, fields: tuple[str, ...]) -> Iterator[Mapping[str, Any]]:
    """The objects of a list in a file of JSON.

    Raises:
        UsageError: it is not there, or one lacks a field.
    """
    whole = _read(file)
    if not isinstance(whole, Mapping) or not isinstance(whole.get(name), list):
        raise file_problem(file, "expected a list", key=name)
    for number, one in enumerate(whole[name]):
        for field in fields:
            _field(one, field, f"{file}: {name}[{number}]")
        yield one


def _field(one: Any, name: str, where: str) -> Any:
    if not isinstance(one, Mapping) or one.get(name) is None:
        raise UsageError(f"{where}: {name}: the row does not have it")
    return one[name]


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise file_problem(file, f"cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise file_problem(file, f"not valid JSON: {error}") from None


def _there(root: Path, pattern: str) -> bool:
    return any(root.glob(pattern))


def _no_split(root: Path, file: Path, others: bool) -> Iterator[Placed] | None:
    """Nothing, where other splits are there.

    Raises:
        UsageError: none is.
    """
    if others:
        return None
    raise file_problem(root, f"has no {file.relative_to(root)}, nor any other file of its layout")


QUESTIONS: dict[str, Callable[[Path, str], Iterator[Placed] | None]] = {
    "vqa-v2": _vqa_v2,
    "gqa": _gqa,
    "nlvr2": _nlvr2,
    "coco-captions": _coco_captions,
}
