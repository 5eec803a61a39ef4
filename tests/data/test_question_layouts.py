"""VQAv2, GQA, NLVR2 and COCO captions in their own files, in miniature: what the rows are, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mtl_lora_cli.data.sources import available_splits, read_split, split_fingerprint
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.recipe.source import Source
from mtl_lora_cli.tasks.registry import find_template
from mtl_lora_cli.tasks.rendering import Example, Renderer

from ..questions import LAYOUTS, write_layout


def examples(folder: Path, layout: str, split: str) -> list[Example]:
    source = Source.model_validate({"path": str(folder), "layout": layout})
    found = read_split(source, split, base=Path(), task="own")
    assert found is not None
    _, _, template = find_template(LAYOUTS[layout], None)
    renderer = Renderer(template, "own", folder)
    return [renderer.render(row, found.where(n)) for n, row in enumerate(found.rows)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_becomes_rows_with_pictures_that_are_there(tmp_path: Path, layout: str) -> None:
    write_layout(tmp_path, layout)
    source = Source.model_validate({"path": str(tmp_path), "layout": layout})
    expected = ("train", "validation", "test") if layout in ("gqa", "nlvr2") else ("train", "test")
    assert available_splits(source, base=Path(), task="own") == expected
    for split in expected:
        found = examples(tmp_path, layout, split)
        assert len(found) >= 4
        for one in found:
            assert all((tmp_path / picture.address).is_file() for picture in one.images)
        assert len(found[0].images) == (2 if layout == "nlvr2" else 1)
    prints = {split_fingerprint(source, s, base=Path(), task="own") for s in expected}
    assert len(prints) == len(expected) and None not in prints


def test_what_rows_hold(tmp_path: Path) -> None:
    for layout in LAYOUTS:
        write_layout(tmp_path / layout, layout)
    (vqa, *_) = examples(tmp_path / "vqa-v2", "vqa-v2", "test")
    assert vqa.answer == "red" and vqa.answers == ("red",) * 7 + ("dark red",) * 3
    assert vqa.images[0].address == "val2014/COCO_val2014_000000000004.jpg"
    (gqa, *_) = examples(tmp_path / "gqa", "gqa", "train")
    assert (gqa.answer, gqa.images[0].address) == ("red", "images/n0.jpg")
    first, second, *_ = examples(tmp_path / "nlvr2", "nlvr2", "train")
    assert [one.address for one in first.images] == [
        "images/train/7/train-0-0-img0.png",
        "images/train/7/train-0-0-img1.png",
    ]
    assert first.images == second.images  # two sentences about one pair
    assert (first.answer, second.answer) == ("yes", "no")
    learned = examples(tmp_path / "coco-captions", "coco-captions", "train")
    held = examples(tmp_path / "coco-captions", "coco-captions", "test")
    assert len(learned) == 2 * len(held) and len(held[0].answers) == 2
    assert learned[0].images == learned[1].images and learned[0].answer != learned[1].answer


def test_karpathys_split_is_taken_where_it_lies_there(tmp_path: Path) -> None:
    said = [{"raw": "A red box.\n"}, {"raw": "A box"}]
    images = [
        {"split": split, "filepath": "val2014", "filename": f"{n}.jpg", "sentences": said}
        for n, split in enumerate(["train", "restval", "val", "test"])
    ]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images}))
    assert [one.answer for one in examples(tmp_path, "coco-captions", "train")] == [
        "A red box.",
        "A box",
    ] * 2
    for split, name in (("validation", "2.jpg"), ("test", "3.jpg")):
        (one,) = examples(tmp_path, "coco-captions", split)
        assert one.images[0].address == f"val2014/{name}"


def _without(file: str, key: str, number: int, field: str) -> Any:
    def spoil(folder: Path) -> None:
        whole = json.loads((folder / file).read_text())
        del whole[key][number][field]
        (folder / file).write_text(json.dumps(whole))

    return spoil


def _text(file: str, text: str) -> Any:
    return lambda folder: (folder / file).write_text(text)


VQA = "v2_mscoco_train2014_annotations.json"
ASKED = "v2_OpenEnded_mscoco_train2014_questions.json"


@pytest.mark.parametrize(
    ("layout", "spoil", "said"),
    [
        ("vqa-v2", _text(VQA, "{"), "not valid JSON"),
        ("vqa-v2", _text(VQA, '{"annotations": 3}'), "annotations: expected a list"),
        ("vqa-v2", lambda folder: (folder / VQA).unlink(), "cannot be read: No such file"),
        ("vqa-v2", _text(VQA, '{"annotations": []}'), "question 0: has no annotation in v2_mscoco"),
        (
            "vqa-v2",
            _without(VQA, "annotations", 1, "answers"),
            r"annotations\[1\]: answers: the row does not have it",
        ),
        (
            "vqa-v2",
            _without(ASKED, "questions", 0, "image_id"),
            r"questions\[0\]: image_id: the row does not have it",
        ),
        (
            "gqa",
            _text("train_balanced_questions.json", "[]"),
            "expected questions by their numbers",
        ),
        (
            "gqa",
            _text("train_balanced_questions.json", '{"07": {"imageId": "1", "question": "x"}}'),
            "question 07: answer: the row does not have it",
        ),
        ("nlvr2", _text("train.json", '{"identifier": "a-0-0-0"}\n'), "train.json:1: sentence"),
        ("nlvr2", _text("train.json", "{}\n{"), "train.json:1: identifier"),
        (
            "coco-captions",
            _without("annotations/captions_train2014.json", "images", 0, "file_name"),
            r"images\[0\]: file_name",
        ),
        (
            "coco-captions",
            _text(
                "annotations/captions_train2014.json",
                '{"images": [], "annotations": [{"image_id": 5, "caption": "x"}]}',
            ),
            "a caption of the photo 5, which is not listed",
        ),
    ],
)
def test_what_is_wrong_names_the_file_and_the_row(
    tmp_path: Path, layout: str, spoil: Any, said: str
) -> None:
    write_layout(tmp_path, layout)
    spoil(tmp_path)
    source = Source.model_validate({"path": str(tmp_path), "layout": layout})
    with pytest.raises(UsageError, match=said) as caught:
        read_split(source, "train", base=Path(), task="own")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_folder_is_told_what_was_looked_for(tmp_path: Path, layout: str) -> None:
    source = Source.model_validate({"path": str(tmp_path), "layout": layout})
    with pytest.raises(UsageError, match="nor any other file of its layout"):
        read_split(source, "train", base=Path(), task="own")
