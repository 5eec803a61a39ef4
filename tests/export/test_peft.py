"""Exported adapters, loaded by PEFT itself; that they say what the run says: test_agreement.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtl_lora_cli.errors import CheckError, UsageError
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.export import peft_files

from .conftest import exported

pytest.importorskip("peft")


def export(run: Run, folder: Path, task: int = 0, **keys: Any) -> Any:
    return exported("peft", run, run.tasks[task], folder, **{"limit": 12, **keys})


@pytest.mark.usefixtures("in_process")
def test_the_folder_is_a_standard_one(run: Run, tmp_path: Path) -> None:
    found = export(run, tmp_path / "out").comparison
    assert found is not None
    assert found.equal == 1
    assert 0 < found.largest < 1e-4
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(run.adapter.layers)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape[0] == 4


@pytest.mark.usefixtures("in_process")
def test_a_wrong_file_is_noticed_and_lies_aside(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = peft_files.write_peft

    def wrong(updates: Any, names: Any, base: str, folder: Path, *others: Any) -> None:
        right(updates, names, base, folder, *others)
        file = folder / "adapter_model.safetensors"
        save_file({n: 1.5 * t for n, t in load_file(file).items()}, file)

    monkeypatch.setattr(peft_files, "write_peft", wrong)
    with pytest.raises(CheckError, match="differs from the run's on task 'sst2'"):
        export(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out.failed"]


def test_without_a_check_peft_is_not_needed_and_the_readme_says_so(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UsageError, match="PEFT, which is not installed"):
        export(run, tmp_path / "out")
    assert export(run, tmp_path / "out", checked=False).comparison is None
    assert "**Not checked.**" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_a_method_that_reads_the_token_is_refused(
    train: Callable[..., Run], stories_folder: Path, tmp_path: Path
) -> None:
    adapter = {"method": "hydralora", "rank": 4, "target_modules": ["q_proj"]}
    run = train(stories_folder, adapter=adapter)
    with pytest.raises(UsageError, match="by the token, not by the task"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
