"""Conversations beside classification tasks in one run: trained, evaluated, written on, exported, each by its command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ..forks import Ended, Forks

pytestmark = pytest.mark.slow

CHAT = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
TEMPLATE = """\
description: Does a word name a color?
prompt: "{{ word }} is a color?"
label: label
choices: {yes: "yes", no: "no"}
"""
RECIPE = """\
base_model: model
prompt_format: chat
adapter: {rank: 8, target_modules: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]}
tasks:
  - {name: pets, template: instruct/messages, source: pets}
  - {name: share, template: instruct/sharegpt, source: share, conversation: {learn: last, system: Be brief.}}
  - {name: sums, template: instruct/alpaca, source: sums}
  - {name: text, template: instruct/completion, source: text}
  - {name: color, template: color.yaml, source: color}
training:
  epochs: 100
  max_steps: 24
  learning_rate: 1.0e-2
  row_length: 256
  rows_per_step: 2
  validation: {every: 12}
run: {name: talks}
"""
NAMES = ("Tom", "Lily", "Ben", "Sue", "Max", "Mia")


def talk(*turns: str, role: str = "role", content: str = "content") -> list[dict[str, str]]:
    names = ("human", "gpt") if role == "from" else ("user", "assistant")
    return [{role: names[n % 2], content: text} for n, text in enumerate(turns)]


def rows() -> dict[str, list[dict[str, Any]]]:
    pets = [talk(f"{name} has a", "cat.", "And a", "dog.") for name in NAMES]
    share = [
        talk(f"Hi {n}", "Hello.", "Bye", "See you.", role="from", content="value") for n in NAMES
    ]
    return {
        "pets": [{"messages": messages} for messages in pets],
        "share": [{"conversations": messages} for messages in share],
        "sums": [{"instruction": "Say it.", "input": n, "output": n} for n in NAMES],
        "text": [{"prompt": f"{n} saw a", "completion": " bird."} for n in NAMES],
        "color": [{"word": w, "label": "yes" if n % 2 else "no"} for n, w in enumerate(NAMES)],
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("talks")
    (folder / "model").mkdir()
    for file in small_model.iterdir():
        (folder / "model" / file.name).write_bytes(file.read_bytes())
    (folder / "model" / "chat_template.jinja").write_text(CHAT)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "color.yaml").write_text(TEMPLATE)
    for name, all_rows in rows().items():
        (folder / name).mkdir()
        for split, some in (
            ("train", all_rows),
            ("validation", all_rows[:2]),
            ("test", all_rows[:3]),
        ):
            lines = "".join(json.dumps(row) + "\n" for row in some)
            (folder / name / f"{split}.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def call(place: Path, warm: Forks) -> Callable[..., Ended]:
    def run(*arguments: str) -> Ended:
        ended = warm.run(*arguments, cwd=place, seconds=300)
        assert ended.returncode == 0, ended.stderr
        return ended

    return run


@pytest.fixture(scope="module")
def trained(call: Callable[..., Ended], place: Path) -> Path:
    call("train", "recipe.yaml")
    return place / "runs" / "talks"


def test_every_tasks_held_out_loss_falls(trained: Path) -> None:
    events = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    first = next(event for event in events if event["event"] == "step" and event["step"] == 1)
    looks = [event for event in events if event["event"] == "validation"]
    assert set(looks[-1]["loss"]) == set(rows())
    for task, loss in looks[-1]["loss"].items():
        assert loss < 0.8 * first["task_loss"].get(task, looks[0]["loss"][task] + 1e-9), task


def test_free_answers_and_choices_are_evaluated_together(
    trained: Path, call: Callable[..., Ended], place: Path
) -> None:
    call("eval", "--task", "all", "--base-only")
    found = json.loads(call("eval", "--task", "all", "--json", "--predictions", "p.jsonl").stdout)
    results = {one["task"]: one for one in found["results"]}
    assert set(results) == set(rows())
    for task in ("pets", "share", "sums", "text"):
        assert list(results[task]["metrics"]) == ["rouge_l", "token_f1", "chrf", "exact_match"]
        assert results[task]["protocol"] == "generate"
        assert results[task]["base"]["paired"]["rouge_l"] is not None
    lines = [json.loads(line) for line in (place / "p.jsonl").read_text().splitlines()]
    said = [
        (line["task"], line["answer"], line["generated"]) for line in lines if "generated" in line
    ]
    for task in ("pets", "share", "sums", "text"):
        right = [answer == generated.strip() for name, answer, generated in said if name == task]
        assert results[task]["metrics"]["exact_match"]["value"] == sum(right) / len(right)


def test_predict_writes_conversations_on(
    call: Callable[..., Ended], trained: Path, place: Path
) -> None:
    rows_to_do = [{"messages": talk("Tom has a")}, {"messages": talk("Tom has a", "cat.", "And a")}]
    (place / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_to_do))
    plain = [
        json.loads(line)
        for line in call("predict", "--task", "pets", "new.jsonl").stdout.splitlines()
    ]
    for row, found in zip(rows_to_do, plain, strict=True):
        answer = {"role": "assistant", "content": found["answer"]}
        assert found["messages"] == [*row["messages"], answer]
    drawn = ("predict", "--task", "pets", "--temperature", "3", "--answers", "3", "new.jsonl")
    once, again, other = (call(*drawn, "--seed", seed).stdout for seed in ("1", "1", "2"))
    assert once == again != other
    for line in once.splitlines():
        found = json.loads(line)
        assert len(found["answers"]) == 3 and found["answer"] == found["answers"][0]


@pytest.mark.long  # tests/export reads such folders by PEFT
def test_an_exported_folder_answers_the_same_in_transformers(
    call: Callable[..., Ended], trained: Path, place: Path
) -> None:
    """Greedy tokens of transformers' generate, with the adapter that PEFT loads."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    call("export", "--task", "pets", "--format", "peft", "--output", "out")
    card = (place / "out" / "README.md").read_text()
    assert "Messages are written by the base model's chat template" in card
    assert "{{" not in card and '"messages": "messages"' not in card, "defaults are not listed"
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, place / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    ours = [
        json.loads(line)
        for line in call("predict", "--task", "pets", "pets/test.jsonl").stdout.splitlines()
    ]
    for row, found in zip(rows()["pets"], ours, strict=False):
        asked = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, return_tensors="pt")  # fmt: skip
        ids = asked["input_ids"] if not torch.is_tensor(asked) else asked
        with torch.no_grad():
            whole = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)  # fmt: skip
        said = tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
        assert found["answer"] == said.strip()


def test_python_takes_messages(trained: Path, place: Path, call: Callable[..., Ended]) -> None:
    import mtl_lora_cli
    from mtl_lora_cli.errors import UsageError
    from mtl_lora_cli.evaluation.asked import Sampling

    run = mtl_lora_cli.load(trained)
    messages = talk("Tom has a", "cat.", "And a")
    (place / "one.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    printed = json.loads(call("predict", "--task", "pets", "one.jsonl").stdout)
    assert run.chat(messages, task="pets") == printed
    drawn = [run.chat(messages, task="pets", sampling=Sampling(3.0, seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert run.chat(messages, task="share")["messages"][0] == {
        "role": "system",
        "content": "Be brief.",
    }
    with pytest.raises(UsageError, match=r"messages\[0\]\.content: is null, expected a text"):
        run.chat([{"role": "user", "content": None}], task="pets")
    with pytest.raises(UsageError, match="task 'color' is no conversation: use predict"):
        run.chat(messages, task="color")
