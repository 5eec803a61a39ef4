"""The facts against the files that they come from."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from mtl_lora_cli.data.prepare import held_out_examples
from mtl_lora_cli.errors import MtlLoraError, UsageError
from mtl_lora_cli.evaluation.results import compare_with_base, stored
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.recipe.schema import Recipe
from mtl_lora_cli.report.adapter import inspect_run
from mtl_lora_cli.report.facts import gather
from mtl_lora_cli.report.settings import settings
from mtl_lora_cli.runs.folder import RunFolder
from mtl_lora_cli.tasks.chosen import read_tasks
from mtl_lora_cli.training.prepare import prepare

from .conftest import HOSTILE, STEPS, TASKS

Copy = Callable[..., RunFolder]


def of(run: RunFolder) -> dict[str, Any]:
    """Its facts, which must be JSON."""
    facts = gather([run])
    json.dumps(facts, allow_nan=False)
    return facts["runs"][0]


def lines(run: RunFolder, kind: str) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [event for event in events if event["event"] == kind]


def test_the_summary_is_that_of_the_log(run: RunFolder, facts: dict[str, Any]) -> None:
    found = facts["runs"][0]["summary"]
    steps = lines(run, "step")
    assert (found["status"], found["steps"], found["planned_steps"]) == ("finished", STEPS, STEPS)
    assert found["tokens"] == sum(step["tokens"] for step in steps)
    assert found["seconds"] == sum(step["seconds"] for step in steps)
    assert found["parameters"] == inspect_run(run)["parameters"]["total"]
    assert (found["method"], found["rank"], found["tasks"]) == ("mtl-lora", 4, 3)
    # So few steps teach nothing, and the page says so.
    notes = facts["runs"][0]["notes"]
    assert notes
    assert all("a guess" in note or "one answer" in note for note in notes)


def test_curves_of_a_short_run_are_its_steps(run: RunFolder, facts: dict[str, Any]) -> None:
    curves, steps = facts["runs"][0]["curves"], lines(run, "step")
    assert curves["steps_per_point"] == 1
    for name in ("step", "loss", "learning_rate", "tokens_per_second"):
        assert curves[name] == [step[name] for step in steps]
    for task in TASKS:
        assert curves["task_loss"][task] == [step["task_loss"].get(task) for step in steps]
    looks = lines(run, "validation")
    assert [look["step"] for look in facts["runs"][0]["validation"]] == [5, 10, STEPS]
    for found, look in zip(facts["runs"][0]["validation"], looks, strict=True):
        assert found["loss"] == look["loss"] and set(found["loss"]) == {"sst2", "rte"}
        assert found["metric"] == look["metric"] and found["macro"] == look["macro"]
    assert facts["runs"][0]["metric_names"] == dict.fromkeys(("sst2", "rte"), "accuracy")


def test_what_was_drawn_is_what_the_mixture_gives(recipe_file: Path, facts: dict[str, Any]) -> None:
    mixture = prepare(load_recipe(recipe_file)).data.mixture
    places = [place for n in range(STEPS) for row in mixture.step(n)[1] for place in row]
    drawn = Counter(TASKS[task] for task, _ in places)
    sizes = {"sst2": 60, "rte": 40, "markup": 12}
    roots = {task: size**0.5 for task, size in sizes.items()}  # temperature: 2
    for one in facts["runs"][0]["mixture"]:
        task = one["task"]
        assert (one["examples"], one["drawn"]) == (sizes[task], drawn[task])
        assert one["drawn_share"] == drawn[task] / len(places)
        assert one["planned_share"] == pytest.approx(roots[task] / sum(roots.values()), abs=0.01)


def test_results_are_the_stored_ones_beside_the_base_model(
    run: RunFolder, facts: dict[str, Any]
) -> None:
    results = facts["runs"][0]["results"]
    assert [result["task"] for result in results] == list(TASKS)
    files = {result["id"]: result for result in stored(run)}
    for found in results:
        own = files[found["id"]]
        base = compare_with_base(run, own)
        assert own["model"] == "adapter" and base is not None
        for key in ("split", "protocol", "examples", "majority", "chance"):
            assert found[key] == own[key]
        for metric in found["metrics"]:
            name = metric["name"]
            assert {key: metric[key] for key in ("value", "low", "high", "why")} == own["metrics"][
                name
            ]
            assert metric["base"] == base["metrics"][name]["value"]
            assert metric["p"] == base["p_value"]


def test_averages_are_over_the_newest_results(facts: dict[str, Any]) -> None:
    found = {one["name"]: one for one in facts["runs"][0]["averages"]}
    first = [result["metrics"][0] for result in facts["runs"][0]["results"]]
    assert found["all tasks"]["value"] == pytest.approx(fmean(one["value"] for one in first))
    assert found["all tasks"]["other"] == pytest.approx(fmean(one["base"] for one in first))
    assert (found["all tasks"]["tasks"], found["glue"]["tasks"]) == (3, 2)
    assert found["glue"]["limit"] is None and 0 < found["glue"]["p"] <= 1


def test_rows_are_right_and_wrong_as_stored(run: RunFolder, facts: dict[str, Any]) -> None:
    tasks = {task.name: task for task in read_tasks(run)}
    files = {result["id"]: result for result in stored(run)}
    seen = 0
    for one in facts["runs"][0]["rows"]:
        held, own = held_out_examples(tasks[one["task"]]), files[one["id"]]
        assert held is not None and one["note"] is None
        places = {Path(where).name: index for index, where in enumerate(held.wheres)}
        for kind in ("right", "wrong"):
            there = sum((g == p) == (kind == "right") for g, p in zip(own["gold"], own["predicted"], strict=True))  # fmt: skip
            assert len(one[kind]) == min(3, there)
            for row in one[kind]:
                index = places[row["where"]]
                example = held.examples[index]
                assert row["answer"] == example.choices[own["gold"][index]]
                assert row["predicted"] == example.choices[own["predicted"][index]]
                assert row["prompt"].split(" … ")[0] in example.prompt
                seen += 1
    assert seen >= 9
    assert HOSTILE in facts["runs"][0]["rows"][2]["wrong"][0]["prompt"]


def test_gates_and_similarities_are_those_of_inspect(run: RunFolder, facts: dict[str, Any]) -> None:
    found, inspected = facts["runs"][0]["adapter"], inspect_run(run)
    assert found["similarity"] == inspected["similarity"]
    assert found["update_norm"] == inspected["update_norm"]
    for path, layer in inspected["layers"].items():
        assert found["layers"][path]["gates"] == layer["gates"]
        assert found["layers"][path]["norms"]["update"] == layer["norms"]["update"]
    assert facts["runs"][0]["gradients"]["steps"] == len(lines(run, "gradients")) == 3


def test_an_unfinished_run_shows_its_checkpoint(copied: Copy) -> None:
    run = copied()
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.evaluations)
    found = of(run)
    assert found["summary"]["status"] != "finished"
    assert found["adapter"]["adapted_layers"] == 10
    assert found["results"] == found["rows"] == []
    assert any("step-000014" in note for note in found["notes"])
    assert any("mtl-lora eval" in note for note in found["notes"])


def test_a_run_that_only_began(copied: Copy) -> None:
    run = copied()
    for folder in (run.adapter, run.checkpoints, run.evaluations):
        shutil.rmtree(folder)
    run.metrics.unlink()
    found = of(run)
    assert found["summary"]["steps"] == 0 and found["summary"]["tokens"] is None
    assert found["adapter"] is found["gradients"] is None
    assert "no step is logged" in found["notes"]


def test_a_run_of_before_the_mixture_was_written_down(copied: Copy) -> None:
    run = copied()
    content = json.loads(run.tasks.read_text())
    del content["mixture"]
    run.tasks.write_text(json.dumps(content))
    events = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    run.metrics.write_text("".join(json.dumps({k: v for k, v in e.items() if k != "examples"}) + "\n" for e in events))  # fmt: skip
    found = of(run)
    assert found["summary"]["planned_steps"] is None
    assert all(one["planned_share"] is one["drawn"] is None for one in found["mixture"])


def test_damaged_lines_are_told(copied: Copy) -> None:
    run = copied()
    with run.metrics.open("a") as file:
        file.write('{"event": "step", "step": 15, "loss": NaN}\nnothing\n')
    found = of(run)
    assert found["summary"]["steps"] == STEPS
    assert any(note.startswith("2 lines of metrics.jsonl") for note in found["notes"])


@pytest.mark.parametrize("damage", ["{", '{"format_version": 1, "model": "adapter"}'])
def test_damaged_results_are_told(copied: Copy, damage: str) -> None:
    run = copied()
    next(run.evaluations.glob("2*.json")).write_text(damage)
    found = of(run)
    assert found["results"] == []
    assert any("results cannot be read" in note for note in found["notes"])


@pytest.mark.parametrize("gone", [True, False])
def test_rows_that_are_gone_or_others_are_not_shown(
    copied: Copy, tmp_path: Path, gone: bool
) -> None:
    run = copied()
    content = json.loads(run.tasks.read_text())
    other = tmp_path / "other"
    if not gone:
        other.mkdir()
        for split in ("train", "test"):
            (other / f"{split}.jsonl").write_text('{"text": "a", "word": "b", "label": "no"}\n')
    content["tasks"][2]["source"]["path"] = str(other)
    run.tasks.write_text(json.dumps(content))
    rows = of(run)["rows"][2]
    assert rows["right"] == rows["wrong"] == []
    assert rows["note"].startswith("the rows are not readable any more")


def test_of_a_task_that_only_the_base_model_answered_there_is_its_score(copied: Copy) -> None:
    run = copied()
    index = json.loads((run.evaluations / "index.json").read_text())
    base = [result["id"] for result in stored(run) if result["model"] == "base"]
    (run.evaluations / "index.json").write_text(json.dumps({**index, "evaluations": base}))
    found = of(run)
    for result in found["results"]:
        for metric in result["metrics"]:
            assert metric["value"] is metric["p"] is None and metric["base"] is not None
    assert found["rows"] == []


def test_a_damaged_run_is_one_line(copied: Copy) -> None:
    run = copied("damaged")
    run.tasks.write_text("[]")
    with pytest.raises(MtlLoraError, match=r"tasks\.json"):
        gather([run])
    run = copied("nonsense")
    run.recipe.write_text("tasks: 3\n")
    with pytest.raises(UsageError, match="tasks"):
        gather([run])


def test_runs_of_one_name_are_told_apart(run: RunFolder, copied: Copy) -> None:
    other = copied("real")
    labels = [one["label"] for one in gather([run, other])["runs"]]
    assert labels == [str(run.path), str(other.path)]


def test_changes_of_the_recipe_are_marked(facts: dict[str, Any]) -> None:
    keys = {one["key"]: one for one in facts["recipe"]}
    for key, value, default in (
        ("adapter.rank", 4, 8),
        ("training.max_steps", STEPS, None),
        ("training.validation.every", 5, None),
        ("mixing.temperature", 2.0, None),
        ("tasks.rte.max_examples", 40, None),
    ):
        assert keys[key] == {"key": key, "values": [value], "default": default, "changed": True}
    for key in ("adapter.alpha", "training.warmup", "tasks.sst2.max_examples"):
        assert not keys[key]["changed"]
    assert not any(key.endswith(("sample", "hub")) for key in keys)


def test_recipes_stand_side_by_side() -> None:
    one, two = (
        Recipe.model_validate({"tasks": [{"name": name, "template": "t"}], "adapter": adapter})
        for name, adapter in (("a", {"rank": 8}), ("b", {"rank": 16}))
    )
    keys = {entry["key"]: entry for entry in settings([one, two])}
    assert keys["adapter.rank"]["values"] == [8, 16] and keys["adapter.rank"]["changed"]
    assert keys["tasks.a.repeat"]["values"] == [1.0, None]
    assert not keys["tasks.a.repeat"]["changed"]  # the other recipe has no such task
    assert keys["tasks.b.name"]["values"] == [None, "b"]
