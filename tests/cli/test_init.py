"""`init` writes a recipe that validates and trains, a comment above every key, and nothing over another."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.tasks.starter import HARDWARE, hardware_here

Finished = subprocess.CompletedProcess[str]

OWN = """\
description: What is a word's color?
prompt: "The color of {{ word }} is"
answer: "{{ color }}"
metrics: [exact_match]
"""
# Every kind of task: by label, by number, choices that rows bring along, expectation, a free answer.
KINDS = {
    "animals": None,
    "search_ads": None,
    "rte": ("rte", [{"sentence1": "a b", "sentence2": "c", "label": n % 2} for n in range(4)]),
    "piqa": ("piqa", [{"goal": "g", "sol1": "a", "sol2": "b", "label": n % 2} for n in range(4)]),
    "stsb": ("stsb", [{"sentence1": "a", "sentence2": "b", "label": float(n)} for n in range(5)]),
    "colors": ("templates/own.yaml", [{"word": "sky", "color": "blue"}] * 3),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with files for some tasks and a template of one's own."""
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "own.yaml").write_text(OWN, encoding="utf-8")
    (tmp_path / "my  dätä: 1").mkdir()
    for name, given in KINDS.items():
        if given is not None:
            rows = "".join(json.dumps(row) + "\n" for row in given[1])
            (tmp_path / "my  dätä: 1" / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    return tmp_path


def tasks() -> list[str]:
    words = []
    for name, given in KINDS.items():
        words += [
            "--task",
            name if given is None else f"{name}={given[0]}:my  dätä: 1/{name}.jsonl",
        ]
    return words


@pytest.mark.parametrize("hardware", HARDWARE)
def test_it_validates(
    hardware: str, folder: Path, stories_folder: Path, invoke: Callable[..., Finished]
) -> None:
    finished = invoke("init", "--base-model", str(stories_folder), "--hardware", hardware, *tasks())
    assert (finished.returncode, finished.stdout) == (0, "recipe.yaml\n"), finished.stderr
    written = load_recipe(folder / "recipe.yaml").recipe
    assert [task.name for task in written.tasks] == list(KINDS)
    assert written.tasks[2].source is not None
    assert written.tasks[2].source.path == "my  dätä: 1/rte.jsonl"
    checked = invoke("validate", "recipe.yaml", "--json")
    assert checked.returncode == 0, checked.stderr
    assert [task["task"] for task in json.loads(checked.stdout)["tasks"]] == list(KINDS)


def test_it_trains(folder: Path, stories_folder: Path, invoke: Callable[..., Finished]) -> None:
    invoke("init", "--base-model", str(stories_folder), "--hardware", "cpu", *tasks())
    finished = invoke("train", "recipe.yaml", "training.max_steps=2", "run.name=first")
    assert finished.returncode == 0, finished.stderr
    (entry,) = json.loads(invoke("runs", "--json").stdout)
    assert (entry["status"], entry["step"], entry["tasks"]) == ("finished", 2, list(KINDS))
    assert (folder / "runs" / "first" / "adapter" / "mtl_lora.safetensors").is_file()


@pytest.mark.parametrize("hardware", HARDWARE)
def test_every_key_has_a_comment_where_it_stands_first(
    hardware: str, folder: Path, invoke: Callable[..., Finished]
) -> None:
    invoke("init", "--base-model", "a/b", "--hardware", hardware, *tasks())
    lines = (folder / "recipe.yaml").read_text(encoding="utf-8").splitlines()
    seen: set[str] = set()
    for before, line in pairwise(lines):
        found = re.match(r"(\s*(?:- )?)([a-z_]+):( .+)?", line)
        if found is None or found[3] is None or (found[2] in seen and "- " not in found[1]):
            continue
        seen.add(found[2])
        assert before.lstrip().startswith("# "), line
    assert {"base_model", "rank", "name", "template", "source", "mixing", "seed"} <= seen


def test_held_out_rows_are_looked_at_where_there_are_some(
    tmp_path: Path, stories_folder: Path, invoke: Callable[..., Finished]
) -> None:
    (tmp_path / "reviews").mkdir()
    rows = [json.dumps({"sentence": f"a {n} b", "label": n % 2}) + "\n" for n in range(30)]
    for split in ("train", "validation"):
        (tmp_path / "reviews" / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
    words = ("init", "--base-model", str(stories_folder), "--hardware", "cpu", "--force")
    for tasks, looks in ((("sst2:reviews", "animals"), 200), (("animals",), None)):
        made = invoke(*words, *(word for task in tasks for word in ("--task", task)))
        assert made.returncode == 0, made.stderr
        validation = load_recipe(tmp_path / "recipe.yaml").recipe.training.validation
        assert (None if validation is None else validation.every) == looks
        assert invoke("validate", "recipe.yaml").returncode == 0


def test_conversations_are_written_by_the_chat_template(
    tmp_path: Path, invoke: Callable[..., Finished]
) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    words = ("init", "--yes", "--base-model", "some/model", "--hardware", "cpu", "--output")
    for form, chat in (("messages", True), ("completion", False)):
        made = invoke(*words, f"{form}.yaml", "--task", f"t=instruct/{form}:rows.jsonl")
        assert made.returncode == 0, made.stderr
        text = (tmp_path / f"{form}.yaml").read_text()
        assert ("prompt_format: chat" in text) is chat


def test_a_recipe_elsewhere_finds_its_files(
    folder: Path, stories_folder: Path, invoke: Callable[..., Finished]
) -> None:
    (folder / "recipes").mkdir()
    finished = invoke(
        "init", "--base-model", str(stories_folder), "--hardware", "cpu", *tasks(),
        "--output", "recipes/mine.yaml",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    checked = invoke("validate", "recipes/mine.yaml")
    assert checked.returncode == 0, checked.stderr


def test_yes_takes_defaults(tmp_path: Path, invoke: Callable[..., Finished]) -> None:
    finished = invoke("init", "--task", "animals", "--yes")
    assert finished.returncode == 0, finished.stderr
    assert load_recipe(tmp_path / "recipe.yaml").recipe.base_model == HARDWARE[hardware_here()].base_model  # fmt: skip


FLAGS = ("--base-model", "a/b", "--hardware", "cpu")
BOTH = "are missing, and there is no terminal to ask at"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((), f"--base-model and --task and --hardware {BOTH}"),
        (("--task", "animals"), f"--base-model and --hardware {BOTH}"),
        (FLAGS, "--task is missing, and there is no terminal to ask at"),
        (("--yes",), "--task is missing"),
        ((*FLAGS, "--task", "bolq"), "--task bolq: unknown template 'bolq'; did you mean 'boolq'?"),
        (
            (*FLAGS, "--task", "mine=click"),
            "--task mine=click: the template 'ads/click' has no source of its own; add a file or "
            "folder: --task mine=click:FILE",
        ),
        ((*FLAGS, "--task", "rte:x.csv"), "--task rte:x.csv: no such file or folder: x.csv"),
        ((*FLAGS, "--task", "a="), "--task a=: expected NAME[=TEMPLATE][:FILE]"),
        (
            (*FLAGS, "--task", "rte", "--task", "rte"),
            "--task: the name 'rte' stands twice; name one of them otherwise: --task OTHER=glue/rte",
        ),
        (
            ("--base-model", "a/b", "--hardware", "gpu", "--task", "rte"),
            "--hardware: expected one of cpu, gpu-24, gpu-80, multi, received 'gpu'; did you mean "
            "'gpu-80'?",
        ),
        ((*FLAGS, "--task", "rte", "--output", "no/a.yaml"), "--output: no such folder: no"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_written_is_one_line(
    arguments: tuple[str, ...],
    error: str,
    tmp_path: Path,
    invoke: Callable[..., Finished],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", (tmp_path / "empty").open("w+"))
    (tmp_path / "empty").unlink()
    finished = invoke("init", *arguments)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == f"error: {error}\n"
    assert list(tmp_path.iterdir()) == []


def test_another_file_is_replaced_only_by_force(
    tmp_path: Path, invoke: Callable[..., Finished]
) -> None:
    (tmp_path / "recipe.yaml").write_text("mine", encoding="utf-8")
    arguments = ("init", *FLAGS, "--task", "animals")
    finished = invoke(*arguments)
    assert finished.returncode == 2
    assert finished.stderr == (
        "error: recipe.yaml exists; choose another --output, or replace it: --force\n"
    )
    assert (tmp_path / "recipe.yaml").read_text(encoding="utf-8") == "mine"
    assert invoke(*arguments, "--force").returncode == 0
    assert load_recipe(tmp_path / "recipe.yaml").recipe.base_model == "a/b"


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 24564", "gpu-24"),
        ("echo 81559", "gpu-80"),
        ("echo 24564; echo 24564", "multi"),
        ("echo 'no devices'; exit 9", "cpu"),
        ("echo 'No devices were found'", "cpu"),
        (None, "cpu"),
    ],
)
def test_the_hardware_is_what_nvidia_smi_says(
    script: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script is not None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware_here() == expected
