"""A run whose prompts go through a chat template, from the recipe to the answer, as a user calls it."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Finished = Any

# It prints the time, to the second; a turn ends with a token that is not the end-of-text token.
CHAT = """\
{{ bos_token }}Now: {{ strftime_now('%H:%M:%S') }}
{% for m in messages %}{{ m.role }}: {{ m.content }}<turn_end>
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
TASK = """\
description: Is a review good?
prompt: "Review: {{ sentence }} Good (no or yes)?"
label: label
choices: {0: no, 1: yes}
"""
RECIPE = """\
base_model: model
prompt_format: chat
adapter: {method: mtl-lora, rank: 4, alpha: 8, target_modules: [q_proj, v_proj]}
tasks: [{name: a, template: task.yaml, source: rows}]
training: {epochs: 20, max_steps: 2, row_length: 256, rows_per_step: 1, checkpoint_every: 1}
run: {name: dated}
"""


@pytest.fixture
def project(stories_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(stories_folder, tmp_path / "model")
    for path in (tmp_path / "model").iterdir():
        path.chmod(0o644)
    (tmp_path / "model").chmod(0o755)
    path = tmp_path / "model" / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    model = tokenizer["model"]
    # The new control token takes the number of a long word that no other word is made of.
    pairs = [one if isinstance(one, list) else one.split(" ") for one in model["merges"]]
    parts = {part for pair in pairs for part in pair}
    word = next(
        w for w in reversed(model["vocab"]) if len(w) > 2 and w not in parts and "<" not in w
    )
    number = model["vocab"].pop(word)
    model["merges"] = [pair for pair in pairs if "".join(pair) != word]
    model["vocab"]["<turn_end>"] = number
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"].append(
        {"id": number, "content": "<turn_end>", "special": True, **flags}
    )
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    (tmp_path / "model" / "chat_template.jinja").write_text(CHAT, encoding="utf-8")
    (tmp_path / "task.yaml").write_text(TASK, encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    rows = [{"sentence": "a fine film", "label": 1}, {"sentence": "dull </s> film", "label": 0}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows").mkdir()
    for split in ("train", "test"):
        (tmp_path / "rows" / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path


def ok(finished: Finished) -> str:
    assert finished.returncode == 0, finished.stderr
    text: str = finished.stdout
    return text


@pytest.mark.slow
def test_one_date_one_ending_no_cut_in_silence(
    project: Path, invoke: Callable[..., Finished]
) -> None:
    shown = ok(invoke("data", "show", "recipe.yaml", "--count", "1"))
    assert "".join(re.findall("⟦(.*?)⟧", shown)) == " yes<turn_end>"

    ok(invoke("train", "recipe.yaml"))
    kept = yaml.safe_load((project / "runs" / "dated" / "recipe.yaml").read_text(encoding="utf-8"))
    assert kept["chat"]["date"] is not None
    asked = []
    for name in ("1.jsonl", "2.jsonl"):
        ok(invoke("eval", "--run", "dated", "--task", "a", "--predictions", name))
        asked.append((project / name).read_text(encoding="utf-8"))
        time.sleep(1.1)
    assert asked[0] == asked[1]
    result = next((project / "runs" / "dated" / "evaluations").glob("2*.json"))
    assert json.loads(result.read_text(encoding="utf-8"))["chat"]["date"] == kept["chat"]["date"]

    rows = [{"sentence": "word " * 3000}, {"sentence": "short"}]
    (project / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    predicted = invoke("predict", "--run", "dated", "long.jsonl")
    long, short = map(json.loads, ok(predicted).splitlines())
    assert long["truncated"] is True
    assert "truncated" not in short
    assert "note: 1 of 2 rows were longer than the model's positions" in predicted.stderr

    # Another second, and the run goes on with the prompts that it began with.
    run = project / "runs" / "dated"
    before = (run / "adapter" / "mtl_lora.safetensors").read_bytes()
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "step-000002")
    ok(invoke("train", "recipe.yaml", "--resume"))
    assert (run / "adapter" / "mtl_lora.safetensors").read_bytes() == before


def test_a_template_that_raises_is_one_line(project: Path, invoke: Callable[..., Finished]) -> None:
    text = "{{ raise_exception('A system message is needed first') }}"
    (project / "model" / "chat_template.jinja").write_text(text, encoding="utf-8")
    refused = invoke("validate", "recipe.yaml")
    assert refused.returncode == 2
    assert refused.stderr == (
        "error: prompt_format: chat: the chat template of model refuses a message of user: A system "
        "message is needed first; use plain\n"
    )
