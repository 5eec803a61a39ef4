"""Real instruction files, and rows as odd as their forms allow, train and evaluate as they are, without a template file.

They are those of LLaMA-Factory's source archive on PyPI: MTL_LORA_INSTRUCT names the folder that holds them, or
pip fetches the archive (5 MB).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from ..forks import Forks

pytestmark = pytest.mark.long

ARCHIVE = "llamafactory==0.9.5"
# Roles, tool calls and tools, as little as a template has to write of them.
CHAT = (
    "{% if tools %}<s>tools\n{{ tools | tojson }}</s>{% endif %}"
    "{% for m in messages %}<s>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
TASKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "alpaca": ("alpaca", "alpaca_en_demo.json", {}),
    "identity": ("alpaca", "identity.json", {"system": "Be brief."}),
    "glaive": ("sharegpt", "glaive_toolcall_en_demo.json", {}),
    "web": ("completion", "c4_demo.jsonl", {}),
    "marked": ("messages", "v1_sft_demo.jsonl", {"learn": {"field": "loss_weight"}}),
    "odd": ("messages", "odd.jsonl", {}),
    "share": ("sharegpt", "share.jsonl", {}),
}


def call(arguments: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "x", "function": function}]}


Q, A = {"role": "user", "content": "Is it red?"}, {"role": "assistant", "content": "It is."}
TOLD = {"role": "tool", "content": '{"red": 1}'}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
ODD: dict[str, list[dict[str, Any]]] = {
    "odd.jsonl": [
        {"messages": [Q, Q, A]},  # two questions, no system message
        {"messages": [{"from": "human", "value": "And a cat?"}, A, Q, {"from": "gpt", "value": "No."}]},
        {"messages": [Q, call('{"a": 1}'), TOLD, A], "tools": [TOOL]},  # arguments as text, no content
        {"messages": [Q, call({"a": 1}), TOLD, A], "tools": [TOOL]},  # as an object
        {"messages": [Q, call({"a": 1})], "tools": [TOOL]},  # nothing but a call is answered
    ],
    "share.jsonl": [
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
        {"conversations": [Q, {"from": "gpt", "value": "No."}], "system": "", "tools": None},
        {"conversations": [Q, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
                           {"from": "observation", "value": "1"}, A], "tools": [TOOL]},
    ],
    "empty.jsonl": [{"messages": [Q, A]}, {"messages": [Q, {**A, "content": ""}, Q, A]}],
}  # fmt: skip


def task(name: str) -> dict[str, Any]:
    """A task of a recipe; its test rows are those that it learns: nothing is said of its score here."""
    form, file, keys = TASKS[name]
    source = {"path": ".", "splits": {"train": file, "test": file}}
    made = {"name": name, "template": f"instruct/{form}", "source": source}
    return {**made, "conversation": keys} if keys else made


RECIPE = {
    "base_model": "model",
    "prompt_format": "chat",
    "tasks": [task(name) for name in TASKS],
    "training": {
        "max_steps": 4,
        "row_length": 512,
        "rows_per_step": 2,
        "on_overflow": "truncate_prompt",
    },
    "run": {"name": "files"},
}


@pytest.fixture(scope="module")
def instruct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    named = os.environ.get("MTL_LORA_INSTRUCT")
    if named is not None:
        return Path(named)
    folder = tmp_path_factory.mktemp("archive")
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
    done = subprocess.run(
        [*pip, "--no-build-isolation", ARCHIVE, "-d", str(folder)], capture_output=True, text=True
    )
    archive = next(folder.glob("*.tar.gz"), None)
    if archive is None:
        pytest.skip(f"pip cannot fetch {ARCHIVE}: {done.stderr.strip()[-200:]}")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return next(folder.glob("*/data"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, small_model: Path, instruct: Path) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "model").mkdir()
    for file in small_model.iterdir():
        (folder / "model" / file.name).write_bytes(file.read_bytes())
    (folder / "model" / "chat_template.jinja").write_text(CHAT)
    for name, rows in ODD.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _, name, _ in TASKS.values():
        if name not in ODD:
            (folder / name).write_bytes((instruct / name).read_bytes())
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE))
    return folder


def test_they_train_and_evaluate(place: Path, warm: Forks) -> None:
    def run(*arguments: str) -> Any:
        ended = warm.run(*arguments, cwd=place, seconds=600)
        assert ended.returncode == 0, ended.stderr
        return ended

    run("train", "recipe.yaml")
    lines = (place / "runs" / "files" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert all(step["loss"] > 0 for step in steps if step["event"] == "step")
    found = json.loads(
        run("eval", "--task", "all", "--limit", "3", "--temperature", "0", "--json").stdout
    )
    results = {one["task"]: one for one in found["results"]}
    for task in ("alpaca", "identity", "glaive", "marked", "share"):
        assert results[task]["examples"] == 3
        assert results[task]["metrics"]["rouge_l"]["value"] is not None
    assert "web" in found["left_out"], "plain text asks nothing"
    (odd,) = json.loads(run("eval", "--task", "odd", "--json").stdout)["results"]
    assert odd["examples"] == len(ODD["odd.jsonl"])
    assert odd["metrics"]["rouge_l"]["value"] is not None


def test_an_empty_answer_is_refused_with_file_line_and_field(place: Path, warm: Forks) -> None:
    made = {"name": "t", "template": "instruct/messages", "source": "empty.jsonl"}
    (place / "empty.yaml").write_text(
        json.dumps({**RECIPE, "tasks": [made], "run": {"name": "empty"}})
    )
    ended = warm.run("train", "empty.yaml", cwd=place, seconds=100)
    assert ended.returncode == 2
    expected = "empty.jsonl:2: task 't': conversation: messages[1].content: is empty, expected a text to learn"
    assert ended.stderr.rstrip().endswith(expected)
