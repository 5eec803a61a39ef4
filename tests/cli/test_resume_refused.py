"""A run goes on with what it began with, or is refused by name: nothing changes under it in silence."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mtl_lora_cli.adapters.files import config_checksum

Finished = subprocess.CompletedProcess[str]


@pytest.fixture
def stopped(
    fresh_run: Path, small_run: tuple[Path, Finished], stories_folder: Path, tmp_path: Path
) -> Path:
    """The small run after step 4 of 6, with a base model, a template and rows that a test may change."""
    shutil.rmtree(fresh_run / "adapter")
    shutil.rmtree(fresh_run / "checkpoints" / "step-000006")
    source = small_run[0].parent.parent
    shutil.copytree(stories_folder, tmp_path / "model")
    for name in ("color.yaml", "warm", "cold"):
        copy = shutil.copytree if (source / name).is_dir() else shutil.copy
        copy(source / name, tmp_path / name)
    recipe = fresh_run / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8").replace(str(source), str(tmp_path))
    recipe.write_text(text.replace(str(stories_folder.resolve()), str(tmp_path / "model")), "utf-8")
    return fresh_run


def _weights(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def _edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | changes), encoding="utf-8")


def _vocabulary(model: Path) -> None:
    tokens = json.loads((model / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    _edit(model / "tokenizer.json", added_tokens=[tokens[0] | {"lstrip": True}, *tokens[1:]])


BASE: dict[str, Callable[[Path], object]] = {
    "fingerprint": _weights,
    "tokenizer": _vocabulary,
    "tokenizer, its special tokens": lambda model: _edit(
        model / "tokenizer_config.json", eos_token="<unk>"
    ),
    "chat template": lambda model: (model / "chat_template.jinja").write_text("{{ messages }}"),
    "chat template in the configuration": lambda model: _edit(
        model / "tokenizer_config.json", chat_template="{{ messages }}"
    ),
}


@pytest.mark.parametrize(
    ("what", "early"),
    [*((what, False) for what in BASE), ("fingerprint", True), ("chat template", True)],
)
def test_another_base_model(
    stopped: Path, invoke: Callable[..., Finished], what: str, early: bool
) -> None:
    """An early version recorded weights and configuration, in checkpoints alone: the rest is told."""
    if early:
        environment = json.loads((stopped / "environment.json").read_text("utf-8"))
        del environment["base_model"]
        (stopped / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
        _forget_tokenizer(stopped / "checkpoints" / "step-000004")
    BASE[what](stopped.parent.parent / "model")
    finished = invoke("train", "--resume")
    key = what.partition(",")[0].partition(" in ")[0]
    if early and key != "fingerprint":
        assert finished.returncode == 0, finished.stderr
        assert "did not record its tokenizer and chat template" in finished.stderr
        return
    assert finished.returncode == 2, finished.stderr
    (line,) = finished.stderr.splitlines()
    model = stopped.parent.parent / "model"
    assert line.startswith(
        f"error: run 'small': the base model at {model} is not the one that the run began with ({key} "
    )
    assert ", expected " in line
    assert not (stopped / "adapter").exists()


def _forget_tokenizer(folder: Path) -> None:
    """A checkpoint as it was written before tokenizers were recorded."""
    from mtl_lora_cli.runs.atomic import file_checksum

    path = folder / "mtl_lora_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for key in ("tokenizer", "chat_template"):
        del content["base_model"][key]
    content["checksum"] = config_checksum(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    _edit(folder / "checksums.json", **{path.name: file_checksum(path)})


CHANGES = {
    "color.yaml": (
        ("is a color", "is a colour"),
        "its template changed since run 'small' began (prompt: '{{ word }} is a color?' → "
        "'{{ word }} is a colour?')",
    ),
    "warm/train.jsonl": (("red", "rot"), "its training rows changed since run 'small' began ("),
}


@pytest.mark.parametrize("file", CHANGES)
def test_another_template_or_other_rows(
    stopped: Path, invoke: Callable[..., Finished], file: str
) -> None:
    (before, after), message = CHANGES[file]
    path = stopped.parent.parent / file
    path.write_text(path.read_text("utf-8").replace(before, after), encoding="utf-8")
    finished = invoke("train", "--resume")
    assert finished.returncode == 2, finished.stderr
    (line,) = finished.stderr.splitlines()
    assert line.startswith(f"error: task 'warm': {message}")


def test_what_is_only_said_otherwise_goes_on(
    stopped: Path, invoke: Callable[..., Finished]
) -> None:
    """A comment in a template; versions are told, since they may change the last digits."""
    path = stopped.parent.parent / "color.yaml"
    path.write_text("# colors\n" + path.read_text("utf-8"), encoding="utf-8")
    environment = json.loads((stopped / "environment.json").read_text("utf-8"))
    environment["versions"]["torch"] = "1.0"
    threads = environment["threads"]
    _edit(stopped / "environment.json", versions=environment["versions"], threads=threads + 3)
    finished = invoke("train", "--resume")
    assert finished.returncode == 0, finished.stderr
    (note,) = [line for line in finished.stderr.splitlines() if line.startswith("note: ")]
    assert note.startswith("note: since run 'small' began: torch 1.0 → ")
    assert f"threads {threads + 3} → {threads}" in note  # sums over them have another order


def test_an_early_adapter_is_read_and_it_is_said(
    fresh_run: Path, invoke: Callable[..., Finished]
) -> None:
    path = fresh_run / "adapter" / "mtl_lora_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for key in ("tokenizer", "chat_template"):
        del content["base_model"][key]
    content["checksum"] = config_checksum(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    for words in (("eval",), ("merge", "--no-check")):
        finished = invoke(*words, "--task", "warm")
        assert finished.returncode == 0, finished.stderr
        assert "note: run 'small' was trained by an early version, which did not" in finished.stderr
