"""Exported adapters, loaded by PEFT itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtl_lora_cli.adapters.config import METHODS
from mtl_lora_cli.errors import CheckError, UsageError
from mtl_lora_cli.evaluation.open_run import OpenRun
from mtl_lora_cli.export import peft_adapter
from mtl_lora_cli.export.peft_adapter import export_peft

pytest.importorskip("peft")
FORMS: dict[str, dict[str, Any]] = {
    "mtl-lora": {},
    "mtl-lora embedding diagonal": {"gate": "embedding", "transform": "diagonal"},
    "lora": {},
    "mtlora": {"task_rank": 2},
    "moelora": {"up_projections": 2},
    "multilora": {"up_projections": 2},
    "lora ranks": {"rank_pattern": {"down_proj": 2}, "scaling": "sqrt_rank"},
}


def export(opened: OpenRun, folder: Path, task: int = 0, **keys: Any) -> Any:
    settings = {"limit": 12, "tolerance": None, "say": lambda text: None, **keys}
    return export_peft(opened, opened.tasks[task], folder, **settings)


@pytest.mark.parametrize("form", FORMS)
def test_peft_gives_the_runs_own_log_probabilities(
    train: Callable[..., OpenRun], stories_folder: Path, tmp_path: Path, form: str
) -> None:
    adapter = {"method": form.split()[0], "rank": 4, "target_modules": ["q_proj", "down_proj"]}
    opened = train(stories_folder, adapter={**adapter, **FORMS[form]})
    for task in (0, 1):
        # Sums of up to four float32 log-probabilities of about -7: 2e-6 is the last bit of such a sum.
        result = export(opened, tmp_path / str(task), task, tolerance=3e-5)
        assert result.comparison.equal == 1


def test_all_mergeable_methods_are_tried() -> None:
    tried = {form.split()[0] for form in FORMS}
    assert tried == {name for name, family in METHODS.items() if family.mergeable}


def test_the_folder_is_a_standard_one(opened: OpenRun, tmp_path: Path) -> None:
    export(opened, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(opened.adapter.layers)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape[0] == 4
    readme = (tmp_path / "out" / "README.md").read_text()
    assert readme.startswith("---\nlibrary_name: peft\n")


def test_a_wrong_file_is_noticed_and_not_left(
    opened: OpenRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = peft_adapter.write_peft

    def wrong(adapter: Any, task: int, base: str, folder: Path) -> None:
        right(adapter, task, base, folder)
        file = folder / "adapter_model.safetensors"
        save_file({n: 1.5 * t for n, t in load_file(file).items()}, file)

    monkeypatch.setattr(peft_adapter, "write_peft", wrong)
    with pytest.raises(CheckError, match="differs from the run's on task 'sst2'"):
        export(opened, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_method_that_reads_the_token_is_refused(
    train: Callable[..., OpenRun], stories_folder: Path, tmp_path: Path
) -> None:
    adapter = {"method": "hydralora", "rank": 4, "target_modules": ["q_proj"]}
    opened = train(stories_folder, adapter=adapter)
    with pytest.raises(UsageError, match="by the token, not by the task"):
        export(opened, tmp_path / "out")
    assert not (tmp_path / "out").exists()
