"""`eval` as a user calls it: protocols, rows read once, and a base model that has changed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtl_lora_cli.adapters.files import config_checksum

Finished = Any


@pytest.fixture
def run(fresh_run: Path) -> Path:
    """The finished run; nothing is evaluated yet."""
    return fresh_run


@pytest.mark.slow
def test_rows_are_read_once(
    run: Path, invoke: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mtl_lora_cli.evaluation import evaluate as room

    read: list[str] = []
    held_out_examples = room.held_out_examples

    def counted(task: Any, split: str | None = None) -> Any:
        read.append(task.name)
        return held_out_examples(task, split)

    monkeypatch.setattr(room, "held_out_examples", counted)
    finished = invoke("eval", "--task", "all", "--json")
    assert finished.returncode == 0, finished.stderr
    assert read == ["warm", "cold"]


def test_each_protocol_stands_in_the_table_and_in_the_result(
    run: Path, invoke: Callable[..., Finished]
) -> None:
    table = invoke("eval", "--task", "all", "--normalisation", "token").stdout
    assert "warm 6 test rows, cold 6 test rows; protocol choices (per token)" in table
    generated = invoke("eval", "--task", "warm", "--protocol", "generate", "--json")
    (result,) = json.loads(generated.stdout)["results"]
    assert (result["protocol"], result["normalisation"]) == ("generate", None)
    kept = json.loads((run / "evaluations" / "index.json").read_text(encoding="utf-8"))
    assert len(kept["evaluations"]) == 3


def test_another_run_stands_beside_it(run: Path, invoke: Callable[..., Finished]) -> None:
    """It is asked what it has not been asked yet, once; averages are compared, too."""
    other = run.parent / "other"
    shutil.copytree(run, other)
    first = invoke("eval", "--task", "all", "--run", "small", "--baseline", "other", "--json")
    assert first.returncode == 0, first.stderr
    told = json.loads(first.stdout)
    for result in told["results"]:
        beside = result["beside"]
        assert beside["run"] == "other"
        assert beside["metrics"] == result["metrics"]
        apart = beside["paired"]["accuracy"]
        assert (apart["difference"], apart["p"], apart["test"]) == (0, 1, "mcnemar")
    (average,) = told["averages"]
    assert (average["name"], average["tasks"], average["difference"]) == ("all tasks", 2, 0)
    index = other / "evaluations" / "index.json"
    before = index.read_text(encoding="utf-8")
    table = invoke("eval", "--task", "all", "--run", "small", "--baseline", "other").stdout
    assert index.read_text(encoding="utf-8") == before
    assert table.splitlines()[0].split() == (
        [
            "task",
            "metric",
            "score",
            "95",
            "%",
            "interval",
            "other",
            "difference",
            "p",
            "majority",
            "chance",
        ]
    )
    assert "+0.000 (+0.000 – +0.000)" in table


def test_every_example_is_written_down(run: Path, invoke: Callable[..., Finished]) -> None:
    finished = invoke("eval", "--task", "all", "--predictions", "rows.jsonl", "--json")
    assert finished.returncode == 0, finished.stderr
    lines = (run.parent.parent / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    results = json.loads(finished.stdout)["results"]
    assert len(rows) == sum(result["examples"] for result in results) == 12
    for result in results:
        own = [row for row in rows if row["task"] == result["task"]]
        accuracy = sum(row["right"] for row in own) / len(own)
        assert accuracy == pytest.approx(result["metrics"]["accuracy"]["value"])
        for row in own:
            best = max(range(2), key=lambda choice, row=row: row["scores"][choice])
            assert best == row["predicted"]
            assert row["answer"] == row["choices"][row["gold"]]
            assert row["where"].endswith(f"test.jsonl:{row['row'] + 1}")
    prompts = {row["prompt_sha256"] for row in rows}
    assert hashlib.sha256(b"pink is a color?").hexdigest() in prompts
    assert invoke("eval", "--task", "warm", "--predictions", "rows.jsonl").returncode == 0
    data = run.parent.parent / "mine.jsonl"
    data.write_text('{"task": "warm", "word": "crimson", "label": "yes"}\n', encoding="utf-8")
    before = data.read_bytes()
    refused = invoke("eval", "--task", "warm", "--predictions", "mine.jsonl")
    assert (refused.returncode, data.read_bytes()) == (2, before)
    assert refused.stderr == (
        "error: --predictions mine.jsonl: exists and holds no predictions; choose another file\n"
    )


@pytest.mark.slow
def test_two_processes_say_what_one_says(
    run: Path, command: Callable[..., Finished], invoke: Callable[..., Finished]
) -> None:
    folder = run.parent.parent
    call = ("eval", "--task", "all", "--json", "--predictions")
    both = command(*call, "two.jsonl", "--num-processes", "2", cwd=folder)
    assert both.returncode == 0, both.stderr
    one = invoke(*call, "one.jsonl")
    results = [json.loads(found.stdout)["results"] for found in (both, one)]
    for two, alone in zip(*results, strict=True):
        assert two["metrics"] == alone["metrics"]
    texts = [(folder / f"{name}.jsonl").read_text(encoding="utf-8") for name in ("two", "one")]
    for two, alone in zip(*(map(json.loads, text.splitlines()) for text in texts), strict=True):
        assert two["scores"] == pytest.approx(alone["scores"], abs=1e-5)
        assert {**two, "scores": 0, "log_probabilities": 0} == {
            **alone, "scores": 0, "log_probabilities": 0
        }  # fmt: skip


def test_a_merged_model_is_scored_by_the_same_code(
    run: Path, invoke: Callable[..., Finished]
) -> None:
    assert invoke("merge", "--task", "all", "--no-check").returncode == 0
    finished = invoke("eval", "--task", "all", "--against", "merged/small", "--json")
    assert finished.returncode == 0, finished.stderr
    for result in json.loads(finished.stdout)["results"]:
        beside = result["beside"]
        assert beside["folder"] == f"merged/small/{result['task']}"
        assert beside["equal"] == 1
        assert 0 < beside["largest"] < 1e-4  # another order of adding up, so not zero
        assert beside["metrics"] == result["metrics"]
    one = invoke("eval", "--task", "warm", "--against", "merged/small/warm").stdout
    assert "warm: equal answers 100.0%, largest difference of log-probabilities" in one
    other = invoke("eval", "--task", "warm", "--against", "merged/small/cold", "--json")
    (result,) = json.loads(other.stdout)["results"]
    assert result["beside"]["largest"] > 1e-3  # another task's weights are told apart


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--baseline", "small"), "--baseline small: is the run itself"),
        (("--baseline", "smal"), "no run 'smal' in runs; did you mean 'small'?"),
        (("--baseline", "x", "--base-only"), "give one of --baseline, --against and --base-only"),
        (("--against", "nowhere"), "--against nowhere: no such folder"),
        (("--against", "runs"), "expected a folder that merge or export wrote"),
        (("--against", "runs/small/adapter"), "is a run's own adapter; compare runs with --base"),
        (("--predictions", "no/rows.jsonl"), "the folder no is not there"),
        (("--predictions", "runs"), "--predictions runs: is a folder, expected a file"),
    ],
)
def test_what_cannot_stand_beside_it(
    run: Path, invoke: Callable[..., Finished], options: tuple[str, ...], message: str
) -> None:
    finished = invoke("eval", "--task", "warm", *options)
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (run / "evaluations").exists()


@pytest.mark.parametrize("key", ["fingerprint", "revision"])
def test_a_base_model_that_has_changed_is_refused_unless_forced(
    run: Path, invoke: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """The adapter remembers another one than the one that lies there now."""
    from mtl_lora_cli.evaluation import opened

    path = run / "adapter" / "mtl_lora_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["base_model"][key] = "another"
    content["checksum"] = config_checksum(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    if key == "revision":  # a folder has none: let this one have come from the hub
        find = opened.find_base_model

        def from_hub(name: str) -> Any:
            from dataclasses import replace

            return replace(find(name), revision="newer")

        monkeypatch.setattr(opened, "find_base_model", from_hub)
    refused = invoke("eval", "--task", "warm")
    assert refused.returncode == 2
    assert f"{key} " in refused.stderr and "expected another); --force goes on" in refused.stderr
    forced = invoke("eval", "--task", "warm", "--force", "--json")
    assert forced.returncode == 0, forced.stderr
    assert "not the one that the adapter was trained on" in forced.stderr
    (result,) = json.loads(forced.stdout)["results"]
    assert result["adapter_base_model"][key] == "another"
    assert result["base_model"][key] != "another"


def test_the_harness_is_asked_for_a_task_that_it_has(
    run: Path, invoke: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its index of some thousand tasks takes seconds to read; here it is a short one."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    from lm_eval import tasks as harness

    class Short:
        all_subtasks = ("warmth", "boolq")

    monkeypatch.setattr(harness, "TaskManager", lambda: Short())
    refused = invoke("eval", "--task", "warm", "--protocol", "lm-eval")
    assert refused.returncode == 2
    assert refused.stderr == (
        "error: task 'warm': cannot be scored by the protocol lm-eval: the harness has no task "
        "'warm' and none 'color'; did you mean 'warmth'?; name one with --harness-task\n"
    )
    refused = invoke("eval", "--task", "warm", "--protocol", "lm-eval", "--harness-task", "bolq")
    assert (
        refused.stderr
        == "error: --harness-task: the harness has no task 'bolq'; did you mean 'boolq'?\n"
    )


def test_without_the_harness_its_protocol_says_how_to_get_it(
    run: Path, invoke: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mtl_lora_cli.evaluation import lm_eval_bridge

    monkeypatch.setattr(lm_eval_bridge.importlib.util, "find_spec", lambda name: None)
    refused = invoke("eval", "--task", "warm", "--protocol", "lm-eval")
    assert refused.returncode == 2
    assert "pip install 'mtl-lora[lm-eval]'" in refused.stderr


def test_rows_that_are_not_those_of_when_the_run_began_are_told(
    run: Path, invoke: Callable[..., Finished]
) -> None:
    asked = ("eval", "--task", "all", "--limit", "2")
    assert "not those" not in invoke(*asked).stdout
    path = run / "tasks.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["tasks"][0]["fingerprints"]["test"] = "another"
    path.write_text(json.dumps(content), encoding="utf-8")
    told = invoke(*asked).stdout
    assert (
        "\nwarm: the test rows are not those of when the run began; these were not compared with"
        in told
    )
    assert "\ncold: the test rows" not in told
    told = invoke(*asked, "--split", "train").stdout
    assert "not those" not in told
    assert "\nwarm: the run learned from these rows" in told


def test_other_rows_of_a_known_task(
    run: Path, invoke: Callable[..., Finished], tmp_path: Path
) -> None:
    """They are what is scored, their result says so, and no average takes them for the task's own."""
    (tmp_path / "more.jsonl").write_text('{"word": "crimson", "label": "yes"}\n' * 3)
    finished = invoke("eval", "--task", "warm", "--source", "more.jsonl", "--json")
    assert finished.returncode == 0, finished.stderr
    (result,) = json.loads(finished.stdout)["results"]
    assert (result["examples"], result["split"], result["source"]) == (3, "test", "more.jsonl")
    own = json.loads(invoke("eval", "--task", "warm", "--json").stdout)["results"][0]
    assert (own["examples"], own["source"]) == (6, None)
    kept = json.loads((run / "evaluations" / "index.json").read_text(encoding="utf-8"))
    assert len(kept["evaluations"]) == 2
    shown = invoke("report", "small", "--json")
    assert shown.returncode == 0, shown.stderr
    report = json.loads(shown.stdout)["runs"][0]
    assert sorted(one["examples"] for one in report["results"]) == [3, 6]
    for words, error in (
        (("warm", "--source", "no.jsonl"), "--source: no such file or folder: no.jsonl"),
        (
            ("all", "--source", "more.jsonl"),
            "--source goes with one --task, and without --baseline",
        ),
    ):
        refused = invoke("eval", "--task", *words)
        assert refused.returncode == 2
        assert refused.stderr.startswith(f"error: {error}")
