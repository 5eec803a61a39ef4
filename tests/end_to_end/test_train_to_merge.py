"""Four tasks on a small model: trained, evaluated before and after, merged, loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl_lora_cli.adapters.files import load_adapter, read_adapter_file
from mtl_lora_cli.adapters.inject import inject

from ..forks import Ended

pytestmark = pytest.mark.slow

Command = Callable[..., Ended]

TASKS = ["boolq", "rte", "sst2", "home_depot"]
LIMIT = ("--limit", "40")


def _mean_losses(events: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Each task's mean over the steps that held it."""
    seen: dict[str, list[float]] = {}
    for event in events:
        for task, loss in event["task_loss"].items():
            seen.setdefault(task, []).append(loss)
    return {task: sum(losses) / len(losses) for task, losses in seen.items()}


def _by_task(finished: Ended) -> dict[str, dict[str, Any]]:
    return {result["task"]: result for result in json.loads(finished.stdout)["results"]}


@pytest.fixture(scope="module")
def evaluations(
    command: Command, real_run: tuple[Path, float]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]], list[str]]:
    """The base model's results, the adapted model's beside them, and those as a table."""
    arguments = ("eval", "--task", "all", *LIMIT, "--run", "real")
    base = _by_task(command(*arguments, "--base-only", "--json"))
    adapted = _by_task(command(*arguments, "--json"))
    return base, adapted, command(*arguments).stdout.splitlines()


@pytest.fixture(scope="module")
def merged(command: Command, real_run: tuple[Path, float], workplace: Path) -> list[dict[str, Any]]:
    """Every task of the run, merged."""
    return json.loads(command("merge", "--task", "all", "--run", "real", "--json").stdout)


def test_every_task_learns(real_run: tuple[Path, float]) -> None:
    run, seconds = real_run
    events = [json.loads(line) for line in (run / "metrics.jsonl").open(encoding="utf-8")]
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, 101))
    first, last = _mean_losses(steps[:20]), _mean_losses(steps[-20:])
    assert set(first) == set(last) == set(TASKS)
    for task in TASKS:
        assert last[task] < first[task], (task, first, last)
    assert seconds < 120


def test_the_run_folder_is_complete(real_run: tuple[Path, float], workplace: Path) -> None:
    run, _ = real_run
    for name in ("recipe.yaml", "environment.json", "tasks.json", "metrics.jsonl"):
        assert (run / name).is_file(), name
    names = {"mtl_lora_config.json", "mtl_lora.safetensors", "README.md"}
    assert {path.name for path in (run / "adapter").iterdir()} == names
    checkpoints = sorted((run / "checkpoints").iterdir())
    assert checkpoints[-1].name == "step-000100"
    assert all((checkpoint / "COMPLETE").is_file() for checkpoint in checkpoints)
    assert (run.parent / "latest").read_text(encoding="utf-8") == "real\n"
    assert not list(workplace.rglob("*.partial")), "an unfinished folder was left"
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    assert environment["format_version"] == 1


def test_evaluation_with_and_without_the_adapter(
    evaluations: tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]], list[str]],
) -> None:
    base, adapted, _ = evaluations
    assert list(base) == list(adapted) == TASKS
    for task in TASKS:
        accuracy = adapted[task]["metrics"]["accuracy"]
        assert 0 <= accuracy["low"] <= accuracy["value"] <= accuracy["high"] <= 1
        assert accuracy["low"] < accuracy["high"]
        beside = adapted[task]["base"]
        assert beside["metrics"] == base[task]["metrics"]
        assert 0 <= beside["p_value"] <= 1
        assert adapted[task]["examples"] == base[task]["examples"] == 40
        assert (base[task]["model"], adapted[task]["model"]) == ("base", "adapter")
        assert base[task]["base"] is None


def test_the_table_says_what_json_says(
    evaluations: tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]], list[str]],
) -> None:
    _, adapted, table = evaluations
    header = table[0].split()
    for word in ("task", "metric", "score", "interval", "base", "p", "majority"):
        assert word in header
    rows = {line.split()[0]: line for line in table[2:] if line.split()[1:2] == ["accuracy"]}
    assert list(rows) == TASKS
    for task, line in rows.items():
        accuracy = adapted[task]["metrics"]["accuracy"]
        for number in (accuracy["value"], accuracy["low"], accuracy["high"]):
            assert f"{number:.3f}" in line
        assert f"{adapted[task]['base']['metrics']['accuracy']['value']:.3f}" in line
        assert f"{adapted[task]['base']['p_value']:.2g}" in line.split()


def test_every_merge_holds(merged: list[dict[str, Any]]) -> None:
    assert [result["task"] for result in merged] == TASKS
    for result in merged:
        assert result["largest_difference"] < 1e-3
        assert result["equal_answers"] == 1


@pytest.mark.parametrize("task", TASKS)
def test_merged_logits_are_the_adapted_ones(
    task: str,
    merged: list[dict[str, Any]],
    real_run: tuple[Path, float],
    workplace: Path,
    stories_folder: Path,
) -> None:
    """Both on transformers' own attention over rows that are not packed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, _ = real_run
    folder = workplace / next(result["path"] for result in merged if result["task"] == task)
    plain = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    model = AutoModelForCausalLM.from_pretrained(
        stories_folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    file = read_adapter_file(run / "adapter")
    adapter = inject(model, file.config, file.tasks)
    load_adapter(adapter, run / "adapter")
    model.eval()

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Once upon a time a little dog asked a question: is it true? The answer is"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    number = file.tasks.index(task)
    with torch.no_grad():
        expected = plain(ids).logits
        with adapter.routing.assign(torch.full_like(ids, number)):
            received = model(ids).logits
        with adapter.routing.assign(torch.full_like(ids, -1)):
            untouched = model(ids).logits
    torch.testing.assert_close(received, expected, rtol=0, atol=1e-4)
    assert (untouched - expected).abs().max() > 1e-2, "the adapter changes something"


def test_merged_folders_speak_for_themselves(merged: list[dict[str, Any]], workplace: Path) -> None:
    for result in merged:
        folder = workplace / result["path"]
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert result["task"] in text
        assert "from_pretrained" in text
        assert not list(folder.glob("*mtl_lora*")), "an ordinary model carries no adapter"
