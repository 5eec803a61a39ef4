"""A short run in this process: learned, asked, predicted and merged; its merged folder is asked by transformers alone."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from mtl_lora_cli.errors import MtlLoraError, UsageError
from mtl_lora_cli.evaluation.answers import answer
from mtl_lora_cli.evaluation.evaluate import asking, evaluate, find_rows, held_out
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.evaluation.predict import Predictor
from mtl_lora_cli.evaluation.protocols import Setting
from mtl_lora_cli.export.order import Options
from mtl_lora_cli.export.write import write_tasks
from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.recipe.load import LoadedRecipe, load_recipe
from mtl_lora_cli.report.facts import gather
from mtl_lora_cli.report.page import render
from mtl_lora_cli.report.rows import answered
from mtl_lora_cli.training.prepare import prepare
from mtl_lora_cli.training.prepared import require_fit
from mtl_lora_cli.training.run import start

TEMPLATE = {
    "description": "Which colour?",
    "images": ["image"],
    "prompt": "<image> The colour is",
    "choices": {"red": "red", "green": "green", "blue": "blue"},
    "label": "colour",
}
ADAPTER = {
    "method": "mtl-lora",
    "rank": 4,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "whole_modules": ["multi_modal_projector"],
}
Load = Callable[..., LoadedRecipe]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory, llava: BaseModel, squares: Path) -> Load:
    folder = tmp_path_factory.mktemp("one")
    (folder / "colour.yaml").write_text(yaml.safe_dump(TEMPLATE))
    recipe = {
        "base_model": str(llava.folder),
        "adapter": ADAPTER,
        "tasks": [{"name": "colour", "template": "colour.yaml", "source": str(squares)}],
        "training": {
            "max_steps": 10,
            "rows_per_step": 3,
            "row_length": 128,
            "learning_rate": 5e-3,
            "checkpoint_every": None,
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return lambda *changes: load_recipe(folder / "recipe.yaml", changes)


@pytest.fixture(scope="module")
def run(load: Load, tmp_path_factory: pytest.TempPathFactory) -> Run:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MTL_LORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        return Run(start(prepare(load()), tmp_path_factory.mktemp("runs") / "one"))


def test_a_merged_folder_says_by_transformers_alone_what_the_run_says(
    run: Run, squares: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, CLIPImageProcessorPil, LlavaForConditionalGeneration

    (task,) = run.tasks
    setting = Setting(limit=4)
    (said,) = answer(run, [task], [held_out(task, setting)], setting)
    assert said.scores is not None
    write_tasks("merged", run, [(task, tmp_path / "out")], Options(checked=False))
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path / "out")
    rows = [json.loads(line) for line in (squares / "test.jsonl").read_text().splitlines()]
    for scores, row in zip(said.scores, rows, strict=False):
        shown = processor(images=[Image.open(squares / row["image"])], return_tensors="pt")
        prompt = f"{'<image>' * 16} The colour is"
        start = len(tokenizer(prompt)["input_ids"])
        for score, choice in zip(scores, sorted(TEMPLATE["choices"]), strict=True):  # type: ignore[type-var]
            ids = torch.tensor([tokenizer(f"{prompt} {choice}")["input_ids"]])
            with torch.no_grad():
                logprobs = model(input_ids=ids, **shown).logits[0].log_softmax(-1)
            right = logprobs[start - 1 : -1].gather(1, ids[0, start:, None]).sum()
            assert score == pytest.approx(float(right), abs=1e-4)


def test_predictions_read_pictures_from_their_root_and_a_blind_control_does_not(
    run: Run, squares: Path
) -> None:
    rows = [json.loads(line) for line in (squares / "test.jsonl").read_text().splitlines()[:3]]
    found = Predictor(run, squares).predict(rows)
    assert len({json.dumps(one["probabilities"]) for one in found}) > 1
    setting = Setting(limit=3, blind="grey")
    (blind,) = answer(run, run.tasks, [held_out(run.tasks[0], setting)], setting)
    assert blind.scores is not None
    first, *others = (scores.tolist() for scores in blind.scores)
    assert all(scores == pytest.approx(first, abs=1e-5) for scores in others)


def test_models_are_made_by_one_thread_alone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's default dtype is all threads': who sets it while another model is loaded gives that one weights of his."""
    makers, own = set(), torch.set_default_dtype

    def setting_it(dtype: torch.dtype) -> None:
        makers.add(threading.current_thread())
        own(dtype)

    monkeypatch.setattr(torch, "set_default_dtype", setting_it)
    fresh, setting = Run(run.folder), Setting(limit=4)
    rows = find_rows(fresh.tasks, setting)
    with asking(fresh, fresh.tasks, setting, rows) as questions:
        assert fresh.packed.vision is not None
        questions()
    assert makers == {threading.current_thread()}


def test_a_picture_that_is_missing_is_told_with_its_row_once(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        Predictor(run, tmp_path).answer([({"image": "gone.png"}, "rows.jsonl:3")], task="colour")
    assert raised.value.lines[0].startswith("rows.jsonl:3: images: no such file: 'gone.png'")


def test_the_base_model_alone_has_its_own_projector(run: Run) -> None:
    learned = run.packed.adapter.whole  # type: ignore[union-attr]
    kept = {name: tensor.detach().clone() for name, tensor in learned.items()}
    assert any(not torch.equal(kept[name], first) for name, first in run.packed.base_whole.items())
    with run.packed.untouched():
        for name, first in run.packed.base_whole.items():
            assert torch.equal(learned[name], first)
    assert all(torch.equal(tensor, learned[name]) for name, tensor in kept.items())


def test_a_tower_s_layer_that_nobody_reads_is_named_at_the_start_and_in_the_report(
    load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`vision_feature_layer: -2`: what the last of three layers gives goes nowhere."""
    targets = "adapter.target_modules=[q_proj,'*.vision_tower.*.q_proj']"
    folder = start(prepare(load(targets, "training.max_steps=2")), tmp_path / "one")
    (event,) = [one for one in folder.events() if one["event"] == "unreached"]
    (name,) = event["modules"]
    assert name.endswith("vision_tower.encoder.layers.2.self_attn.q_proj")
    said = " ".join(capsys.readouterr().err.split())
    assert f"note: adapter.target_modules: {name} of the tower: behind the last layer" in said
    line = f"1 module got no gradient in 2 steps and learned nothing: {name}"
    assert line in said and line in gather([folder])["runs"][0]["notes"]


REFUSED = {
    "images.size=[48,48]": "images.size: 48 x 48: Input image size (48*48) doesn't match",
    "images.augment.flip=true": "is for maps of pictures",
    "adapter.whole_modules=[nothing]": "'nothing' matches no module or parameter",
    "adapter.target_modules=[k_proj,fc1]": "'fc1' matches no linear layer",
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_does_not_go_with_pictures_is_one_line(load: Load, change: str) -> None:
    with pytest.raises(MtlLoraError) as caught:
        require_fit(prepare(load(change)))
    (line,) = caught.value.lines
    assert REFUSED[change] in line


def test_a_model_that_reads_no_pictures_is_named(load: Load, small_model: Path) -> None:
    with pytest.raises(MtlLoraError, match="not supported for models of type 'llama'"):
        prepare(load(f"base_model={small_model}"))


def test_a_blind_run_learns_from_grey(load: Load) -> None:
    data: Any = prepare(load("images.blind=true")).data
    batch = data.dataset("answer").collate([[(0, 0), (0, 1)]])
    first, second = (one["pixel_values"] for one in batch.pictures.seen)
    assert torch.equal(first, second)
    assert first.std(dim=(2, 3)).max() < 1e-6


def test_a_report_has_the_pictures_beside_rows_right_and_wrong(run: Run, squares: Path) -> None:
    (result,) = evaluate(run, run.tasks, Setting())
    (found,) = answered(run.tasks, [result])
    assert found["note"] is None and len(found["right"]) + len(found["wrong"]) >= 4
    lines = (squares / "test.jsonl").read_text().splitlines()
    for kind in ("right", "wrong"):
        for row in found[kind]:
            (shown,) = row["pictures"]
            told = json.loads(lines[int(row["where"].partition(":")[2]) - 1])
            with Image.open(squares / told["image"]) as own:
                small = Image.open(io.BytesIO(base64.b64decode(shown)))
                assert small.size == own.size and small.tobytes() == own.convert("RGB").tobytes()
    page = render(gather([run.folder]), [])
    assert all(shown in page for kind in ("right", "wrong") for shown in found[kind][0]["pictures"])


def test_what_has_no_place_where_a_prompt_sees_itself_is_one_line(
    load: Load, models: Callable[[str], BaseModel], squares: Path, tmp_path: Path
) -> None:
    own = f"base_model={models('paligemma').folder}"
    with pytest.raises(MtlLoraError, match="loss_on: all learns tokens of prompts"):
        prepare(load(own, "training.loss_on=all"))
    text = {**TEMPLATE, "prompt": "The colour is"}
    del text["images"]
    (tmp_path / "text.yaml").write_text(yaml.safe_dump(text))
    tasks = [
        {"name": "colour", "template": str(load().base / "colour.yaml"), "source": str(squares)},
        {"name": "text", "template": str(tmp_path / "text.yaml"), "source": str(squares)},
    ]
    with pytest.raises(MtlLoraError, match="'text' shows no pictures"):
        prepare(load(own, f"tasks={json.dumps(tasks)}"))
