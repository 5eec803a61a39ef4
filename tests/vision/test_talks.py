"""A run of conversations about pictures, rows of text alone among them: learned, asked, told, and merged."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtl_lora_cli.evaluation.evaluate import evaluate
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.evaluation.predict import Predictor
from mtl_lora_cli.evaluation.protocols import Setting
from mtl_lora_cli.export.order import Options
from mtl_lora_cli.export.write import write_tasks
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.training.prepare import prepare
from mtl_lora_cli.training.run import start

from ..sights import tiny_llava, write_rows, write_squares

pytestmark = [pytest.mark.slow, pytest.mark.long]

# As LLaVA 1.5's: texts and pictures as parts, all pictures of a message first.
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: "
    "{% for p in m['content'] if p['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}"
    "{% else %} ASSISTANT: {{ m['content'][0]['text'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def talks(folder: Path, split: str) -> None:
    """Of each pair of pictures a conversation of two turns; every third row is text alone."""
    rows: list[dict[str, Any]] = []
    read = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
    for number, (one, other) in enumerate(pairwise(read)):
        asked = [{"from": "human", "value": "Say hello"}, {"from": "gpt", "value": "hello"}]
        if number % 3:
            asked = [
                {"from": "human", "value": "<image>\nWhich colour?"},
                {"from": "gpt", "value": one["colour"]},
                {"from": "human", "value": "And here?\n<image>"},
                {"from": "gpt", "value": other["colour"]},
            ]
        shown = [one["image"], other["image"]] if number % 3 else []
        rows.append({"images": shown, "conversations": asked})
    write_rows(folder / f"{split}.jsonl", rows)


def test_a_run_of_conversations(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path / "cache"))
    model = tiny_llava(small_model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(model)
    write_squares(tmp_path / "own", {"train": 13, "test": 6})
    for split in ("train", "test"):
        talks(tmp_path / "own", split)
    recipe = {
        "base_model": str(model),
        "prompt_format": "chat",
        "adapter": {
            "rank": 4,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "whole_modules": ["multi_modal_projector"],
        },
        "tasks": [{"name": "talk", "template": "instruct/llava", "source": "own"}],
        "training": {"max_steps": 4, "rows_per_step": 2, "row_length": 256},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = Run(start(prepare(load_recipe(tmp_path / "recipe.yaml")), tmp_path / "one"))
    (result,) = evaluate(run, run.tasks, Setting())
    assert result["examples"] == 5 and result["metrics"]["chrf"]["value"] is not None
    (swapped,) = evaluate(run, run.tasks, Setting(blind="swapped"))
    assert swapped["blind"] == "swapped"
    row = json.loads((tmp_path / "own/test.jsonl").read_text().splitlines()[1])
    (told,) = Predictor(run, tmp_path / "own").predict([row])
    assert [one["content"] for one in told["messages"][:3]] == [
        "<image>\nWhich colour?",
        row["conversations"][1]["value"],
        "And here?\n<image>",
    ]
    (written,) = write_tasks("merged", run, [(run.tasks[0], tmp_path / "out")], Options(limit=3))
    assert written.comparison is not None
    assert next(iter(written.comparison.models.values())).largest < 1e-4
