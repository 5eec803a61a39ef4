"""Train, evaluate, merge, export: transformers and PEFT alone, elsewhere, give the run's answers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mtl_lora_cli.adapters.files import read_tensors
from mtl_lora_cli.engine.families import known_types
from mtl_lora_cli.errors import ExitCode
from mtl_lora_cli.evaluation.evaluate import held_out
from mtl_lora_cli.evaluation.protocols import Setting
from mtl_lora_cli.runs.folder import find_run
from mtl_lora_cli.tasks.chosen import read_tasks

from .alone import Alone
from .models import MODELS, Tiny
from .test_matrix import chosen

TASKS = ("animals", "uses", "search_ads")
SCORED, GENERATED = 6, 3  # rows of each task
CLOSE = 1e-3  # of a candidate of several tokens, whose merged weights were rounded once
Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """`ask(folder=…, adapter=…, asked=…)` puts questions to the process of `plain_process.py`."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("plain_process.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None

    def put(**question: Any) -> dict[str, Any]:
        question = {"adapter": None, "said": [], **question}
        print(json.dumps(question, default=str), file=process.stdin, flush=True)
        answer = json.loads(process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer

    yield put
    process.stdin.close()
    process.wait(timeout=60)


@pytest.fixture
def mtl_lora(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., None]:
    """The command inside this process, working in `tmp_path`; what is not refused must succeed."""
    from mtl_lora_cli.cli.app import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MTL_LORA_RUNS", raising=False)
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path / "cache"))
    for name in ("TOKENIZERS_PARALLELISM", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, "error" if name.endswith("VERBOSITY") else "true")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(*arguments: str, refused: str = "") -> None:
        capfd.readouterr()
        with pytest.raises(SystemExit) as leaving:
            app(list(arguments), prog_name="mtl-lora")
        said = capfd.readouterr()
        expected = ExitCode.USAGE if refused else 0
        assert (leaving.value.code or 0) == expected, f"mtl-lora {arguments}: {said.err}{said.out}"
        assert refused in said.err

    return run


def write_recipe(folder: Path, base: Path, targets: list[str]) -> None:
    content = {
        "base_model": str(base),
        "adapter": {"rank": 4, "target_modules": targets},
        "tasks": [{"name": name, "template": f"samples/{name}"} for name in TASKS],
        "training": {
            "max_steps": 10,
            "epochs": 100,
            "row_length": 256,
            "rows_per_step": 1,
            "learning_rate": 1e-2,
        },
        "run": {"name": "small"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


def lines_of(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of each task."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {name: [line for line in lines if line["task"] == name] for name in TASKS}


@pytest.mark.parametrize(
    "model", [chosen(model, quick=False) for model in MODELS if not model.refused]
)
def test_a_run_is_what_it_leaves_behind(
    model: Tiny,
    folder_of: Callable[[Tiny], Path],
    mtl_lora: Callable[..., None],
    ask: Ask,
    record_commands: Callable[[Tiny], None],
    tmp_path: Path,
) -> None:
    base = folder_of(model)
    targets = model.targets or Alone(base, sees=model.vision is not None).targets()
    write_recipe(tmp_path, base, list(targets))
    mtl_lora("train", "recipe.yaml")
    scored = ("--task", "all", "--limit", str(SCORED), "--predictions", "scored.jsonl")
    mtl_lora("eval", *scored)
    generated = ("--task", "all", "--limit", str(GENERATED), "--predictions", "generated.jsonl")
    mtl_lora("eval", *generated, "--protocol", "generate")
    mtl_lora("merge", "--task", "all", "--no-check")
    by_peft = not model.not_for_peft
    mtl_lora("export", "--task", "all", "--no-check", refused=model.not_for_peft)
    scores, texts = lines_of(tmp_path / "scored.jsonl"), lines_of(tmp_path / "generated.jsonl")
    for task in read_tasks(find_run("small", tmp_path / "runs")):
        examples = held_out(task, Setting(limit=SCORED)).examples
        asked = [[example.prompt, list(example.choices)] for example in examples]
        said = [line["generated"] for line in texts[task.name]]
        own = [line["log_probabilities"] for line in scores[task.name]]
        untouched = ask(folder=base, asked=asked)
        assert apart(untouched["scores"], own) > 10 * CLOSE, "training changed nothing"
        merged = ask(folder=tmp_path / "merged/small" / task.name, asked=asked, said=said)
        assert apart(own, merged["scores"]) < CLOSE
        assert [text.strip() for text in said] == [text.strip() for text in merged["continued"]]
        if by_peft:
            exported = tmp_path / "exported/small" / task.name
            assert apart(own, ask(folder=base, adapter=exported, asked=asked)["scores"]) < CLOSE
    record_commands(model)


@pytest.mark.parametrize(
    "model", [chosen(model, quick=False) for model in MODELS if model.model_type in known_types()]
)
def test_a_run_that_was_cut_off_ends_with_the_same_bits(
    model: Tiny,
    folder_of: Callable[[Tiny], Path],
    mtl_lora: Callable[..., None],
    tmp_path: Path,
) -> None:
    base = folder_of(model)
    targets = model.targets or Alone(base, sees=model.vision is not None).targets()
    write_recipe(tmp_path, base, list(targets))
    mtl_lora("train", "recipe.yaml", "training.checkpoint_every=4")
    run = find_run("small", tmp_path / "runs")
    whole = read_tensors(run.require_adapter())
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.checkpoints / "step-000010")
    mtl_lora("train", "--resume")
    again = read_tensors(run.require_adapter())
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []
    assert [event["step"] for event in run.events() if event["event"] == "step"] == [*range(1, 11)]


def apart(one: list[list[float]], two: list[list[float]]) -> float:
    """Largest difference of two models' log-probabilities of the same candidates."""
    return max(
        abs(a - b)
        for some, others in zip(one, two, strict=True)
        for a, b in zip(some, others, strict=True)
    )
