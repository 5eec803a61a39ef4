"""VQAv2, GQA, NLVR2 and COCO captions in miniature: their own files, over pictures of one colour."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from .sights import COLOURS

# Layout → the template that reads its rows.
LAYOUTS = {
    "vqa-v2": "vision/vqa_v2",
    "gqa": "vision/gqa",
    "nlvr2": "vision/nlvr2",
    "coco-captions": "vision/coco_captions",
}
NAMES = list(COLOURS)
COUNT = 4  # pictures a split


def _picture(path: Path, number: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40 + number, 32), COLOURS[NAMES[number % 3]]).save(path)
    return NAMES[number % 3]


def _json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_layout(folder: Path, layout: str) -> Path:
    """A folder as the set's authors lay it out."""
    {"vqa-v2": _vqa, "gqa": _gqa, "nlvr2": _nlvr2, "coco-captions": _coco}[layout](folder)
    return folder


def _vqa(folder: Path) -> None:
    for begin, part in ((0, "train2014"), (COUNT, "val2014")):
        asked, said = [], []
        for number in range(begin, begin + COUNT):
            colour = _picture(folder / part / f"COCO_{part}_{number:012d}.jpg", number - begin)
            key = {"question_id": number, "image_id": number}
            asked.append({**key, "question": "What colour is it?"})
            people = [colour] * 7 + [f"dark {colour}"] * 3
            said.append(
                {
                    **key,
                    "question_type": "what",
                    "answer_type": "other",
                    "multiple_choice_answer": colour,
                    "answers": [{"answer": one, "answer_id": n} for n, one in enumerate(people)],
                }
            )
        _json(folder / f"v2_OpenEnded_mscoco_{part}_questions.json", {"questions": asked})
        _json(folder / f"v2_mscoco_{part}_annotations.json", {"annotations": said})


def _gqa(folder: Path) -> None:
    for number, part in enumerate(("train", "val", "testdev")):
        rows = {}
        for one in range(COUNT):
            name = f"n{COUNT * number + one}"
            colour = _picture(folder / "images" / f"{name}.jpg", one)
            rows[f"0{one}"] = {"imageId": name, "question": "What colour?", "answer": colour}
        _json(folder / f"{part}_balanced_questions.json", rows)


def _nlvr2(folder: Path) -> None:
    for part in ("train", "dev", "test1"):
        rows = []
        for pair in range(COUNT // 2):
            within = folder / "images" / part / ("7" if part == "train" else "")
            for side in (0, 1):
                _picture(within / f"{part}-{pair}-0-img{side}.png", pair + side)
            for number, label in enumerate(("True", "False")):
                row = {"identifier": f"{part}-{pair}-0-{number}", "sentence": "They differ."}
                more = {"directory": 7} if part == "train" else {}
                rows.append({**row, "label": label, **more})
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{part}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _coco(folder: Path) -> None:
    for part in ("train2014", "val2014"):
        images, said = [], []
        for number in range(COUNT):
            name = f"COCO_{part}_{number:012d}.jpg"
            colour = _picture(folder / part / name, number)
            images.append({"id": number, "file_name": name})
            for text in (f"A {colour} box.", f"all of it is {colour}"):
                said.append({"image_id": number, "id": len(said), "caption": text})
        _json(
            folder / "annotations" / f"captions_{part}.json",
            {"images": images, "annotations": said},
        )
