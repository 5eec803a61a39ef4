"""Whole commands on a run whose prompts show pictures, and what is refused in a line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from mtl_lora_cli.models.base import BaseModel

from ..forks import Call, Forks
from ..kills import killed_and_left_alone
from ..sights import CAPTION, COLOUR, SIDE

pytestmark = [pytest.mark.slow, pytest.mark.long]  # test_run.py has a run in one process

TEMPLATES = {
    "colour": COLOUR,
    "caption": CAPTION,
    "side": SIDE,
}


@pytest.fixture(scope="module")
def place(forks: Forks, llava: BaseModel, squares: Path, tmp_path_factory: Any) -> Path:
    """A run `one` of two tasks with pictures and one of text alone."""
    folder = Path(tmp_path_factory.mktemp("seen"))
    shutil.copytree(squares, folder / "squares")
    for name, template in TEMPLATES.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(template))
    recipe = {
        "base_model": str(llava.folder),
        "adapter": {
            "method": "mtl-lora",
            "rank": 8,
            "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"],
            "whole_modules": ["multi_modal_projector"],
        },
        "tasks": [
            {"name": name, "template": f"{name}.yaml", "source": "squares"} for name in TEMPLATES
        ],
        "training": {
            "epochs": 4,
            "rows_per_step": 4,
            "row_length": 200,
            "learning_rate": 4e-3,
            "checkpoint_every": 10,
            "validation": {"every": 20, "examples": 8},
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    ended = forks.run("train", "recipe.yaml", "run.name=one", cwd=folder)
    assert ended.returncode == 0, ended.stderr
    return folder


def test_colours_are_learned_and_seen_by_who_sees(call: Call) -> None:
    scores = {}
    for blind in ((), ("--blind", "grey"), ("--blind", "swapped")):
        (found,) = json.loads(call("eval", "--task", "colour", "--json", *blind).stdout)["results"]
        assert found.get("blind") == (blind[1] if blind else None)
        scores["".join(blind)] = found["metrics"]["accuracy"]["value"]
    assert scores[""] >= 0.9
    assert max(scores["--blindgrey"], scores["--blindswapped"]) <= 0.7


def test_the_base_model_beside_it_has_its_own_projector(
    call: Call, place: Path, llava: BaseModel
) -> None:
    """Against transformers alone: what learned whole takes no part in --base-only."""
    from transformers import LlavaForConditionalGeneration

    from mtl_lora_cli.models.load import load_tokenizer

    call("eval", "--task", "colour", "--base-only", "--limit", "3", "--predictions", "base.jsonl")
    lines = [json.loads(line) for line in (place / "base.jsonl").read_text().splitlines()]
    tokenizer = load_tokenizer(llava)
    vision = tokenizer.vision()
    model = LlavaForConditionalGeneration.from_pretrained(llava.folder).eval()
    rows = [json.loads(line) for line in (place / "squares/test.jsonl").read_text().splitlines()]
    for line, row in zip(lines, rows, strict=False):
        seen = vision.look(Image.open(place / "squares" / row["image"]).convert("RGB"))
        prompt = f"{vision.token * 16} The colour is"
        sums = []
        for choice in sorted(TEMPLATES["colour"]["choices"]):  # as YAML has them
            ids = torch.tensor([tokenizer(f"{prompt} {choice}")["input_ids"]])
            start = len(tokenizer(prompt)["input_ids"])
            with torch.no_grad():
                logprobs = model(input_ids=ids, **seen).logits[0].log_softmax(-1)
            sums.append(float(logprobs[start - 1 : -1].gather(1, ids[0, start:, None]).sum()))
        assert line["log_probabilities"] == pytest.approx(sums, abs=1e-3)


def test_a_merged_folder_is_transformers_own_and_says_the_same(call: Call) -> None:
    (found,) = json.loads(call("merge", "--task", "colour", "--limit", "6", "--json").stdout)
    assert found["largest_difference"] < 1e-4
    assert found["equal_answers"] == 1.0


def test_peft_reads_what_learned_whole_and_answers_are_generated_alike(call: Call) -> None:
    for arguments in (
        ("export", "--format", "peft", "--task", "colour"),
        ("merge", "--task", "caption", "--limit", "4"),
    ):
        (found,) = json.loads(call(*arguments, "--json").stdout)
        assert found["largest_difference"] < 1e-4
        assert found["equal_answers"] == 1.0


def test_predict_reads_pictures_beside_its_file(call: Call, place: Path) -> None:
    rows = (place / "squares/test.jsonl").read_text().splitlines()[:3]
    (place / "squares/new.jsonl").write_text("\n".join(rows) + "\n")
    lines = call("predict", "--task", "all", "squares/new.jsonl").stdout.splitlines()
    for line, row in zip(map(json.loads, lines), map(json.loads, rows), strict=True):
        assert line["colour"]["label"] == row["colour"]
        assert set(line) == set(TEMPLATES)


def test_show_counts_picture_tokens_instead_of_repeating_them(call: Call) -> None:
    shown = call("data", "show", "recipe.yaml", "--task", "colour", "--count", "1").stdout
    assert "<image> × 16" in shown


def test_a_run_goes_on_with_what_learned_whole(call: Call, place: Path) -> None:
    from safetensors.torch import load_file

    ends = []
    for name, steps in (("through", ()), ("on", ("training.max_steps=6",))):
        call("train", "recipe.yaml", f"run.name={name}", "training.max_steps=12", *steps,
             "training.checkpoint_every=3", "training.validation=null", "training.schedule=constant",
             "training.warmup=0")  # fmt: skip
        ends.append(place / "runs" / name / "adapter" / "mtl_lora.safetensors")
    shutil.rmtree(place / "runs/on/adapter")
    text = (place / "runs/on/recipe.yaml").read_text().replace("max_steps: 6", "max_steps: 12")
    (place / "runs/on/recipe.yaml").write_text(text)
    call("train", "--resume", "--run", "on")
    through, on = map(load_file, ends)
    assert any(name.startswith("whole:") for name in through)
    for name, tensor in through.items():
        assert torch.equal(tensor, on[name]), name


def test_models_that_read_no_pictures_and_formats_that_hold_none_say_so(
    call: Call, small_model: Path
) -> None:
    said = call("train", "recipe.yaml", f"base_model={small_model}", code=2).stderr
    assert "pictures in prompts are not supported for models of type 'llama'" in said
    said = call("export", "--format", "gguf", "--task", "colour", code=2).stderr
    assert "a model of type 'llava' that reads pictures cannot be written so" in said
    said = call("eval", "--task", "side", "--blind", "grey", code=2).stderr
    assert "its prompts show no pictures" in said


def test_kills_change_no_bit(forks: Forks, place: Path) -> None:
    """Five times, at any instruction: the run goes on, its projector among what it goes on with."""
    longer = ("training.max_steps=150", "training.epochs=40", "training.checkpoint_every=1")
    assert killed_and_left_alone(forks, place, *longer, kills=5) == 5, "the run ended too soon"
    still, found = (
        load_file(place / "runs" / name / "adapter" / "mtl_lora.safetensors")
        for name in ("still", "killed")
    )
    assert any(name.startswith("whole:") for name in still) and still.keys() == found.keys()
    assert all(torch.equal(still[name], found[name]) for name in still)


@pytest.mark.long
def test_a_folder_of_rows_reads_pictures_beside_its_files(call: Call, place: Path) -> None:
    rows = (place / "squares/test.jsonl").read_text().splitlines()[:5]
    (place / "new.jsonl").write_text("\n".join(rows) + "\n")
    shutil.copytree(place / "squares", place / "many" / "inner")
    for path in (place / "many" / "inner").glob("*.jsonl"):
        path.unlink()
    (place / "many" / "inner" / "new.jsonl").write_text("\n".join(rows) + "\n")
    for task in ("colour", "colour,caption,side"):
        output = f"answers-{len(task)}"
        arguments = ("--task", task, "--input", "many", "--output", output, "--part-rows", "3")
        assert json.loads(call("predict", *arguments).stdout)["parts"] == 2
        files = sorted((place / output / "inner").glob("*.jsonl"))
        lines = "".join(path.read_text() for path in files).splitlines()
        for line, row in zip(map(json.loads, lines), map(json.loads, rows), strict=True):
            found = line.pop("prediction")
            assert line == row
            assert (found if task == "colour" else found["colour"])["label"] == row["colour"]
    pytest.importorskip("ray")
    own = [
        sys.executable,
        "-m",
        "mtl_lora_cli.cli.main",
        "predict",
        "--task",
        "colour",
        "--input",
        "many",
    ]
    more = ["--output", "rayed", "--part-rows", "3", "--ray", "local", "--actors", "1"]
    said = subprocess.run([*own, *more], cwd=place, capture_output=True, text=True, check=True)
    assert json.loads(said.stdout)["rows"] == 5
    for path in sorted((place / "answers-6" / "inner").glob("*.jsonl")):
        other = (place / "rayed" / "inner" / path.name).read_text().splitlines()
        for line, beside in zip(path.read_text().splitlines(), other, strict=True):
            one, two = (json.loads(text)["prediction"] for text in (line, beside))
            assert one.pop("probabilities") == pytest.approx(two.pop("probabilities"), abs=1e-5)
            assert one == two
