"""What may be wrong with pictures, their conversations and their sets' own files: one line each, code 2, no run left."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from ..questions import write_layout
from ..sights import tiny_llava

pytestmark = [pytest.mark.slow, pytest.mark.long]

ROW = {"image": "a.png", "question": "Is it?", "label": "yes"}
TEMPLATE: dict[str, Any] = {
    "description": "Which?",
    "images": ["image"],
    "prompt": "<image> {{ question }}",
    "choices": {"yes": "yes", "no": "no"},
    "label": "label",
}
ASKED = {"from": "human", "value": "<image>\nWhat is it?"}
SAID = {"from": "gpt", "value": "A box."}
TALK: dict[str, Any] = {"image": "a.png", "conversations": [ASKED, SAID]}
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@dataclass(frozen=True)
class Bad:
    """One mistake.

    Attributes:
        said: a part of the line.
        row: the second row of the good ones' file.
        template: what is another one in it; or the name of one that is there.
        recipe: what is another one in it.
        layout: the rows are those of a set's own files.
        spoil: done to the folder before.
        call: behind `mtl-lora`.
    """

    said: str
    row: Any = None
    template: dict[str, Any] | str = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    layout: str = ""
    spoil: Callable[[Path], object] = lambda folder: None
    call: tuple[str, ...] = ("train", "recipe.yaml", "run.name=new")


def _talk(said: str, **changes: Any) -> Bad:
    return Bad(said, {**TALK, **changes}, "instruct/llava", {"prompt_format": "chat"})


def _cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / "a.png").read_bytes()[:50])


def _write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


BASE64 = base64.b64encode(b"no picture at all").decode()
MISTAKES = {
    "missing": Bad("rows.jsonl:2: images: no such file: 'b.png'", {**ROW, "image": "b.png"}),
    "cut off": Bad("b.png: broken or cut off", {**ROW, "image": "b.png"}, spoil=_cut("b.png")),
    "no picture": Bad(
        "b.png: is no picture", {**ROW, "image": "b.png"}, spoil=_write("b.png", "hello there")
    ),
    "empty": Bad("b.png: is empty", {**ROW, "image": "b.png"}, spoil=_write("b.png", "")),
    "leads out": Bad("leads out of the data's folder", {**ROW, "image": "../a.png"}),
    "absolute": Bad("rows.jsonl:2: images: '/etc/a.png'", {**ROW, "image": "/etc/a.png"}),
    "a number": Bad("expected the path of a picture, received 7", {**ROW, "image": 7}),
    "none": Bad("the row shows no picture", {**ROW, "image": ""}),
    "an address": Bad("nothing is fetched", {**ROW, "image": "https://x.org/a.png"}),
    "no base64": Bad("expected data:image/…;base64", {**ROW, "image": "data:image/png,x"}),
    "bytes of nothing": Bad("is no picture", {**ROW, "image": f"data:image/png;base64,{BASE64}"}),
    "a mark too many": Bad(
        "2 times <image> in the prompt and 1 pictures", {**ROW, "question": "<image>?"}
    ),
    "fewer pictures": _talk("1 times <image> in the messages and 2 pictures", images=["a.png"]),
    "fewer marks": _talk(
        "2 times <image> in the messages and 1 pictures",
        conversations=[{**ASKED, "value": "<image><image>"}, SAID],
    ),
    "shown by an answer": _talk(
        "a message of assistant shows a picture",
        conversations=[ASKED, {**SAID, "value": "<image>"}],
    ),
    "nobody asks": _talk("has no message to be answered", conversations=[SAID]),
    "no answer": _talk("has no answer of an assistant to learn", conversations=[ASKED]),
    "a part that is none": _talk(
        "a part of type 'video' is no text",
        conversations=[{"from": "human", "value": [{"type": "video"}]}, SAID],
    ),
    "mark and parts": _talk(
        "has <image> in a text and pictures as parts",
        image=None,
        conversations=[
            {"from": "human", "value": ["<image>", {"type": "image", "image": "a.png"}]},
            SAID,
        ],
    ),
    "not in the template": Bad(
        "the row shows pictures ('image'), which the template does not read",
        TALK,
        "instruct/sharegpt",
        {"prompt_format": "chat"},
    ),
    "no list": Bad("images: input should be a valid list", None, {"images": "image"}),
    "answers of choices": Bad("answers: goes with free answers", None, {"answers": "[question]"}),
    "a metric of others": Bad("'cider' does not fit", None, {"metrics": ["cider"]}),
    "an expression": Bad("images", None, {"images": ["image |"]}),
    "a row too short": Bad(
        "pictures and what stands around them",
        None,
        {},
        {"training": {"row_length": 16, "on_overflow": "truncate_prompt"}},
    ),
    "a size too small": Bad("images.size", None, {}, {"images": {"size": [0, 32]}}),
    "a layout that is none": Bad("source.layout", None, {}, layout="vqa-v3"),
    "another set's layout": Bad("nor any other file of its layout", None, {}, layout="gqa"),
    "no annotation": Bad(
        "question 0: has no annotation",
        None,
        "vision/vqa_v2",
        layout="vqa-v2",
        spoil=_write("own/v2_mscoco_train2014_annotations.json", '{"annotations": []}'),
    ),
    "answers no list": Bad(
        "answers: expected a list of texts, received 'red'",
        None,
        {"choices": None, "label": None, "answer": "{{ label }}", "answers": "'red'"},
    ),
}


@pytest.fixture(scope="module")
def model(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llava(small_model, tmp_path_factory.mktemp("llava"))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", MISTAKES)
def test_one_line_says_it(
    name: str, model: Path, invoke: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), (200, 60, 20)).save("a.png")
    good = TALK if isinstance(bad.template, str) and bad.template.startswith("instruct") else ROW
    rows = [good] if bad.template != "instruct/sharegpt" else []
    rows += [bad.row] if bad.row is not None else [ROW]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    template, source = bad.template, "rows.jsonl"
    if isinstance(template, dict):
        document = {k: v for k, v in {**TEMPLATE, **template}.items() if v is not None}
        Path("own.yaml").write_text(yaml.safe_dump(document))
        template = "own.yaml"
    if bad.layout:
        write_layout(tmp_path / "own", "vqa-v2")
        source = {"path": "own", "layout": bad.layout}
    recipe = {
        "base_model": str(model),
        "adapter": {"target_modules": ["q_proj"]},
        "tasks": [{"name": "own", "template": template, "source": source}],
        **bad.recipe,
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    bad.spoil(tmp_path)
    ended = invoke(*bad.call)
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error")]
    assert ended.returncode == 2, ended.stderr
    assert len(errors) == 1 and bad.said in errors[0], ended.stderr
    assert not (tmp_path / "runs").exists()
