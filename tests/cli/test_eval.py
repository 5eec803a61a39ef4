"""`eval` as a user calls it: protocols, rows read once, and a base model that has changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Finished = Any


@pytest.fixture
def run(small_run: tuple[Path, Finished], tmp_path: Path) -> Path:
    """A copy of the finished run, in `runs` of the working directory; nothing is evaluated yet."""
    copy = tmp_path / "runs" / "small"
    shutil.copytree(small_run[0], copy, ignore=shutil.ignore_patterns("evaluations"))
    (tmp_path / "runs" / "latest").write_text("small\n", encoding="utf-8")
    return copy


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


@pytest.mark.parametrize("key", ["fingerprint", "revision"])
def test_a_base_model_that_has_changed_is_refused_unless_forced(
    run: Path, invoke: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """The adapter remembers another one than the one that lies there now."""
    from mtl_lora_cli.evaluation import open_run

    path = run / "adapter" / "mtl_lora_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["base_model"][key] = "another"
    path.write_text(json.dumps(content), encoding="utf-8")
    if key == "revision":  # a folder has none: let this one have come from the hub
        find = open_run.find_base_model

        def from_hub(name: str) -> Any:
            from dataclasses import replace

            return replace(find(name), revision="newer")

        monkeypatch.setattr(open_run, "find_base_model", from_hub)
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
