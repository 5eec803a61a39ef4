"""Rows with pictures: where they stand in a prompt, what is wrong with them, and what knows them again."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from mtl_lora_cli.data.bind import bind_tasks
from mtl_lora_cli.data.prepare import prepare_training, read_examples, with_fingerprints
from mtl_lora_cli.errors import MtlLoraError, UsageError
from mtl_lora_cli.models.base import BaseModel, find_base_model
from mtl_lora_cli.models.load import load_tokenizer
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.tasks.pictured import PLACE, placed
from mtl_lora_cli.tasks.rendering import Renderer
from mtl_lora_cli.tasks.template import Template

from ..sights import write_rows

TEMPLATE = {
    "description": "Which?",
    "images": ["image"],
    "prompt": "<image> {{ question }}",
    "choices": {"yes": "yes", "no": "no"},
    "label": "label",
}
ROW = {"image": "a.png", "question": "Is it?", "label": "yes"}
Prepare = Callable[..., Any]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path / "cache"))
    for number, name in enumerate("ab"):
        Image.new("RGB", (20, 30), (number * 90, 60, 200)).save(tmp_path / f"{name}.png")
    return tmp_path


@pytest.fixture
def prepared(place: Path, llava: BaseModel) -> Prepare:
    """What a recipe of one task over these rows is, read and encoded."""

    def prepare(
        rows: list[dict[str, Any]],
        template: dict[str, Any] | None = None,
        held: list[dict[str, Any]] | None = None,
        **training: Any,
    ) -> Any:
        write_rows(place / "train.jsonl", rows)
        if held is not None:
            write_rows(place / "test.jsonl", held)
        (place / "own.yaml").write_text(yaml.safe_dump({**TEMPLATE, **(template or {})}))
        recipe = {
            "base_model": str(llava.folder),
            "tasks": [{"name": "own", "template": "own.yaml", "source": "."}],
            "training": {"row_length": 64, **training},
        }
        (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        loaded = load_recipe(place / "recipe.yaml")
        return prepare_training(bind_tasks(loaded), loaded.recipe, load_tokenizer(llava), 512)

    return prepare


def test_places_follow_marks_or_stand_before_the_text() -> None:
    assert placed("one <image> two <image>", 2) == f"one {PLACE} two {PLACE}"
    assert placed("one", 2) == f"{PLACE}\n{PLACE}\none"
    with pytest.raises(ValueError, match="1 times <image> in the prompt and 2 pictures"):
        placed("<image>", 2)


def test_a_row_may_show_several_and_expressions_may_give_lists() -> None:
    document = {**TEMPLATE, "images": ["image", "others"], "prompt": "{{ question }}"}
    renderer = Renderer(Template.model_validate(document), "own", Path("root"))
    example = renderer.render({**ROW, "others": ["b.png", "c.png"]}, "rows:1")
    assert [one.address for one in example.images] == ["a.png", "b.png", "c.png"]
    assert example.prompt == f"{PLACE}\n{PLACE}\n{PLACE}\nIs it?"


def test_picture_tokens_stand_where_the_picture_does_and_are_never_learned(
    prepared: Prepare,
) -> None:
    data = prepared([ROW, {**ROW, "image": "b.png", "label": "no"}])
    (split,), token = data.splits, data.eyes.vision.token_id
    for loss_on in ("answer", "all"):
        learned = split.example(0)[split.learned(0, loss_on)]
        assert token not in learned
        assert split.learned_counts(loss_on)[0] == len(learned)
    whole = split.example(0).tolist()
    assert whole[1:17] == [token] * 16
    assert split.learned(0, "all").tolist() == list(range(17, len(whole)))
    batch = data.dataset("answer").collate([[(0, 1), (0, 0)]])
    assert batch.pictures.counts == [16, 16]
    assert (batch.input_ids[0][batch.pictures.places] == token).all()
    assert len(batch.pictures.places) == 32
    again = prepared([ROW, {**ROW, "image": "b.png", "label": "no"}])  # from the cache
    assert again.splits[0].pictures == split.pictures
    assert again.splits[0].picture_token == token


def test_rows_that_were_moved_are_read_where_they_lie_now(
    prepared: Prepare, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the cache keeps of the same rows and pictures elsewhere does not count."""
    data = prepared([ROW])
    assert data.splits[0].pictures[0][0].read().size == (20, 30)
    moved = place.rename(place.with_name("moved"))
    monkeypatch.setenv("MTL_LORA_CACHE", str(moved / "cache"))
    loaded = load_recipe(moved / "recipe.yaml")
    again = prepare_training(bind_tasks(loaded), loaded.recipe, load_tokenizer(_base(loaded)), 512)
    assert again.splits[0].pictures[0][0].read().size == (20, 30)


def _base(loaded: Any) -> BaseModel:
    return find_base_model(loaded.recipe.base_model)


def test_room_is_made_behind_pictures_alone(prepared: Prepare) -> None:
    long = {**ROW, "question": "Is it? " * 30}
    (split,) = prepared([long], on_overflow="truncate_prompt").splits
    assert split.truncated == 1
    tokens = split.example(0).tolist()
    assert tokens.count(512) == 16
    assert len(tokens) == 64
    with pytest.raises(UsageError, match="its 1 pictures and what stands around them have"):
        prepared([long], row_length=18, on_overflow="truncate_prompt")


def test_rows_differ_by_what_their_pictures_show(prepared: Prepare, place: Path) -> None:
    """Contradictions, repetitions and leaks: by prompt and pictures, whatever files are called."""
    (place / "same.png").write_bytes((place / "a.png").read_bytes())
    rows = [ROW, {**ROW, "image": "same.png", "label": "no"}, {**ROW, "image": "b.png"}, ROW]
    (audit,) = prepared(rows, held=[{**ROW, "image": "same.png"}]).audits
    assert audit.contradictory == 3
    assert audit.repeated == 1
    assert [(one.split, one.found) for one in audit.leaks] == [("test", 1)]
    assert "1 of 1 test pictures are shown in train, too" in audit.notes
    Image.new("RGB", (9, 9), (1, 2, 3)).save(place / "new.png")
    other = {**ROW, "image": "new.png"}
    (audit,) = prepared([ROW, {**ROW, "image": "b.png", "label": "no"}], held=[other]).audits
    assert (audit.contradictory, audit.leaks) == (0, ())


def test_a_picture_that_changes_is_another_split(prepared: Prepare, place: Path) -> None:
    (task,) = prepared([ROW]).tasks
    before = task.fingerprints["train"]
    assert with_fingerprints(task).fingerprints["train"] == before
    Image.new("RGB", (20, 30), (255, 0, 0)).save(place / "a.png")
    assert with_fingerprints(task).fingerprints["train"] != before
    found = read_examples(task, "train")
    assert found is not None
    assert found.fingerprint not in ("", before)


def test_bytes_in_rows_are_kept_as_files(place: Path, prepared: Prepare) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = (place / "a.png").read_bytes()
    rows = [{**ROW, "image": {"bytes": content, "path": "x.png"}}]
    prepared([ROW])
    (place / "train.jsonl").unlink()
    pq.write_table(pa.Table.from_pylist(rows), place / "train.parquet")
    loaded = load_recipe(place / "recipe.yaml")
    (task,) = bind_tasks(loaded)
    found = read_examples(task, "train")
    assert found is not None
    (picture,) = found.examples[0].images
    assert picture.content is None
    assert (picture.root / picture.address).read_bytes() == content


def _bomb() -> bytes:
    head = io.BytesIO()
    Image.new("1", (1, 1)).save(head, "PNG")
    content = bytearray(head.getvalue())
    content[16:24] = (60000).to_bytes(4, "big") * 2
    import zlib

    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    return bytes(content)


BROKEN = {
    "none.png": (None, "images: no such file: 'none.png'"),
    "cut.png": (lambda whole: whole[:60], "images: cut.png: broken or cut off"),
    "empty.png": (lambda whole: b"", "images: empty.png: is empty"),
    "text.png": (lambda whole: b"hello there", "images: text.png: is no picture that is known"),
    "bomb.png": (lambda whole: _bomb(), "images: bomb.png: too large; expected"),
    "../a.png": (None, "images: '../a.png' leads out of the data's folder"),
    7: (None, "images: expected the path of a picture, received 7"),
    "": (None, "images: the row shows no picture"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_wrong_picture_is_one_line_with_file_and_line(
    prepared: Prepare, place: Path, name: Any
) -> None:
    made, said = BROKEN[name]
    if made is not None:
        (place / name).write_bytes(made((place / "a.png").read_bytes()))
    with pytest.raises(MtlLoraError) as caught:
        prepared([ROW, {**ROW, "image": name}])
    text = str(caught.value)
    assert "train.jsonl:2" in text
    assert said in text
    assert "\n" not in text


def test_marks_that_do_not_fit_are_one_line(prepared: Prepare) -> None:
    with pytest.raises(
        UsageError, match=r"train.jsonl:1: task 'own': prompt: 2 times <image> .* 1 pict"
    ):
        prepared([{**ROW, "question": "and <image>?"}])


def test_control_tokens_of_rows_stay_text_beside_pictures(prepared: Prepare) -> None:
    data = prepared([{**ROW, "question": "</s> is it?"}])
    tokens = data.splits[0].example(0).tolist()
    assert tokens.count(512) == 16
    assert tokens.count(2) == 1, "the end of the answer alone"


def test_16_bits_palette_cmyk_and_turned_pictures_are_read(prepared: Prepare, place: Path) -> None:
    base = Image.open(place / "a.png")
    Image.fromarray(np.full((9, 7), 40000, np.uint16)).save(place / "deep.png")
    base.convert("P").save(place / "palette.png")
    base.convert("CMYK").save(place / "print.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    base.save(place / "turned.jpg", exif=exif)
    names = ["deep.png", "palette.png", "print.jpg", "turned.jpg"]
    data = prepared([{**ROW, "image": name} for name in names])
    sizes = [one.read().size for (one,) in data.splits[0].pictures]
    assert sizes == [(7, 9), (20, 30), (20, 30), (30, 20)]
    assert [one.size() for (one,) in data.splits[0].pictures][-1] == (20, 30)
    json.dumps(data.audits[0].to_json())
