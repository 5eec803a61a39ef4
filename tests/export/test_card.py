"""The model card: valid for the hub, and it says where the thing comes from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from mtl_lora_cli.evaluation.evaluate import evaluate
from mtl_lora_cli.evaluation.opened import Run, open_run
from mtl_lora_cli.evaluation.protocols import Setting
from mtl_lora_cli.export.card import model_card
from mtl_lora_cli.recipe.schema import Chat

from .conftest import exported


def card(run: Run, task: int = 0) -> ModelCard:
    text = model_card(
        run,
        run.tasks[task],
        None,
        title="A title",
        library="transformers",
        relation="finetune",
        about="About it.",
        use="Use it.",
    )
    return ModelCard(text)


def row(text: str, first: str) -> list[str]:
    """The cells of the table row that begins so."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture
def of_the_hub(run: Run) -> Run:
    """As if the base model had come from the hub."""
    return run.but(base=replace(run.base, name="somebody/stories", revision="abc123"))


def test_a_written_folder_has_a_card_that_the_hub_reads(run: Run, tmp_path: Path) -> None:
    exported("merged", run, run.tasks[0], tmp_path / "out", checked=False)
    found = ModelCard.load(tmp_path / "out" / "README.md")
    data = found.data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert set(data["tags"]) == {"mtl-lora", "multi-task"}
    assert "base_model" not in data, "a folder on this disk is no model of the hub"
    assert (data["license"], data["license_name"]) == ("other", "that-of-the-base-model")
    sections = [line for line in found.text.splitlines() if line.startswith("## ")]
    wanted = ["Use", "Prompt", "Method", "Data", "Scores", "Check", "Licence"]
    assert sections == [f"## {name}" for name in wanted]
    for loading in ("AutoModelForCausalLM.from_pretrained", "vllm serve", "llama-cli"):
        assert loading in found.text
    assert str(run.base.folder.parent) not in found.text, "paths are nobody's business"


def test_it_names_base_method_and_sizes(of_the_hub: Run) -> None:
    found = card(of_the_hub)
    data = found.data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("somebody/stories", "finetune")
    assert data["license_link"] == "https://huggingface.co/somebody/stories"
    assert "revision `abc123`" in row(found.text, "base model")[1]
    assert row(found.text, "method")[1] == "mtl-lora, arXiv 2410.09437"
    count = of_the_hub.adapter.parameter_count()
    assert row(found.text, "trained values")[1] == f"{count:,}, for 2 tasks"
    assert row(found.text, "optimiser steps")[1] == "3"
    assert "{{ sentence | trim }}" in found.text


def test_it_names_sources_and_shares(train: Callable[..., Run], stories_folder: Path) -> None:
    run = train(stories_folder, mixing={"temperature": 2.0})
    tasks = [replace(run.tasks[0], max_examples=15), run.tasks[1]]
    text = card(run.but(tasks=tasks)).text
    # Shares go with the square roots of 15 and 60 rows: 1 to 2.
    assert row(text, "**sst2**")[1:4] == ["sst2", row(text, "**sst2**")[2], "15"]
    assert row(text, "**sst2**")[2].endswith("/sst2")
    assert row(text, "**sst2**")[4] == "33.3%"
    assert row(text, "home_depot")[3:] == ["60", "66.7%"]


def test_a_source_that_is_gone_is_no_obstacle(run: Run) -> None:
    source = run.tasks[1].source.model_copy(update={"path": "/nowhere/at/all"})
    tasks = [run.tasks[0], replace(run.tasks[1], source=source)]
    found = row(card(run.but(tasks=tasks)).text, "home_depot")
    assert found[2:] == ["files at/all", "not readable any more", "not readable any more"]


def test_the_runs_own_evaluation_stands_in_it(
    train: Callable[..., Run], stories_folder: Path
) -> None:
    run = train(stories_folder)
    assert "The run has no evaluation of this task" in card(run).text
    opened = open_run(run.folder)
    for base_only in (True, False):
        (result,) = evaluate(opened, run.tasks[:1], Setting(base_only=base_only))
    measured = result["metrics"]["accuracy"]
    found = card(run)
    shown = f"{measured['value']:.3f} ({measured['low']:.3f} – {measured['high']:.3f})"
    assert row(found.text, "the run's adapter")[1] == shown
    assert row(found.text, "the untouched base model")
    assert "20 test rows, protocol choices" in found.text
    (told,) = [one for one in found.data.eval_results or [] if one.metric_type == "accuracy"]
    assert told.metric_value == measured["value"]
    assert (told.dataset_name, told.dataset_split) == ("sst2", "test")
    assert "The run has no evaluation of this task" in card(run, 1).text


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("license: apache-2.0\n", {"license": "apache-2.0"}),
        (
            "license: other\nlicense_name: llama3\nlicense_link: LICENSE\n",
            {"license": "other", "license_name": "llama3", "license_link": "LICENSE"},
        ),
    ],
)
def test_the_base_models_licence_is_taken_over(
    run: Run, tmp_path: Path, head: str, expected: dict[str, str]
) -> None:
    shutil.copy(run.base.folder / "config.json", tmp_path)
    (tmp_path / "README.md").write_text(f"---\n{head}---\n# A model\n")
    data = card(run.but(base=replace(run.base, folder=tmp_path))).data.to_dict()
    assert {key: data[key] for key in data if key.startswith("license")} == expected


def test_it_says_how_a_chat_template_was_used(run: Run) -> None:
    assert "The answer stands behind it and a space." in card(run).text
    chat = Chat(
        template_kwargs={"enable_thinking": False}, answers="generation_prompt", date="2026-11-30"
    )
    recipe = run.recipe.model_copy(update={"prompt_format": "chat", "chat": chat})
    text = card(run.but(recipe=recipe)).text
    assert "a user message in the base model's chat template" in text
    assert '`chat_template_kwargs` = `{"enable_thinking": false}`' in text
    assert "which was 2026-11-30 in training" in text
    assert "it was behind the template's generation prompt" in text
