"""Merged models: base + s · B' A where adapted, the base's own bytes elsewhere, or nothing at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtl_lora_cli.adapters.layer import MultiTaskLinear
from mtl_lora_cli.errors import CheckError, MtlLoraError, UsageError
from mtl_lora_cli.evaluation.open_run import OpenRun
from mtl_lora_cli.export.merge import task_updates, write_merged
from mtl_lora_cli.export.run_merge import Merged, merge_task
from mtl_lora_cli.models.base import find_base_model


def merge(opened: OpenRun, folder: Path, task: int = 0, **keys: Any) -> Merged:
    settings = {"limit": 8, "tolerance": None, "say": lambda text: None, **keys}
    return merge_task(opened, opened.tasks[task], folder, **settings)


def weights(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def exact(layer: MultiTaskLinear, weight: Tensor, task: int) -> Tensor:
    """W + (alpha / r) Σ_i g_i B_i Λ_t A in float64, written out."""
    config = layer.config
    gate = (layer.task_gate[task].double() / config.temperature).softmax(0)
    update = torch.zeros_like(weight, dtype=torch.float64)
    for value, up in zip(gate, layer.lora_B.double(), strict=True):
        update += value * up @ layer.task_transform[task].double() @ layer.lora_A[0].double()
    return (weight.double() + config.alpha / config.rank * update).detach()


@pytest.mark.parametrize("task", [0, 1])
def test_adapted_weights_are_base_plus_update_and_the_others_keep_every_bit(
    opened: OpenRun, tmp_path: Path, task: int
) -> None:
    merge(opened, tmp_path / "out", task)
    before, after = weights(opened.base.folder), weights(tmp_path / "out")
    assert set(before) == set(after)
    adapted = {f"{path}.weight": layer for path, layer in opened.adapter.layers.items()}
    assert len(adapted) == 10
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        if name in adapted:
            assert not torch.equal(tensor, before[name])
            expected = exact(adapted[name], before[name], task)
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(tensor, before[name])


def test_two_tasks_merge_into_two_models(opened: OpenRun, tmp_path: Path) -> None:
    for task in (0, 1):
        merge(opened, tmp_path / str(task), task)
    one, two = weights(tmp_path / "0"), weights(tmp_path / "1")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(one[name], two[name])


def test_the_merged_model_answers_like_the_adapter(opened: OpenRun, tmp_path: Path) -> None:
    comparison = merge(opened, tmp_path / "out").comparison
    assert comparison.examples == 8
    assert 0 < comparison.largest < 1e-3
    assert comparison.equal == 1.0


def test_transformers_reads_the_folder_alone(opened: OpenRun, tmp_path: Path) -> None:
    """Against the adapted model through its own plain forward, not through our packed one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merge(opened, tmp_path / "out", 1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    plain = AutoModelForCausalLM.from_pretrained(opened.base.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    state = {k: v.clone() for k, v in plain.state_dict().items()}
    for path, layer in opened.adapter.layers.items():
        state[f"{path}.weight"] = exact(layer, state[f"{path}.weight"], 1).float()
    with torch.no_grad():
        base = plain(ids).logits
        plain.load_state_dict(state)
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
        assert (model(ids).logits - base).abs().max() > 1e-2


def test_the_folder_holds_the_bases_other_files_and_a_readme(
    opened: OpenRun, tmp_path: Path
) -> None:
    merge(opened, tmp_path / "out")
    names = {path.name for path in tmp_path.joinpath("out").iterdir()}
    assert names == {path.name for path in opened.base.folder.iterdir()} | {"README.md"}
    assert "sst2" in (tmp_path / "out" / "README.md").read_text()
    for name in ("config.json", "tokenizer.json"):
        merged, base = tmp_path / "out" / name, opened.base.folder / name
        assert merged.read_bytes() == base.read_bytes()


def test_a_sharded_base_keeps_its_shards(
    train: Callable[..., OpenRun], opened: OpenRun, sharded: Path, tmp_path: Path
) -> None:
    run = train(sharded)
    merge(run, tmp_path / "out")
    merge(opened, tmp_path / "whole")
    before, after = weights(sharded), weights(tmp_path / "out")
    assert set(before) == set(after)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)
    for path, layer in run.adapter.layers.items():
        name = f"{path}.weight"
        expected = exact(layer, before[name], 0)
        torch.testing.assert_close(after[name].double(), expected, rtol=1e-6, atol=1e-7)


def test_a_bfloat16_base_is_cast_once(
    train: Callable[..., OpenRun], half: Path, tmp_path: Path
) -> None:
    run = train(half, dtype="bfloat16")
    merge(run, tmp_path / "out", tolerance=10.0)
    before, after = weights(half), weights(tmp_path / "out")
    same = total = 0
    for path, layer in run.adapter.layers.items():
        name = f"{path}.weight"
        assert after[name].dtype == torch.bfloat16
        expected = exact(layer, before[name], 0).to(torch.bfloat16)
        same += int((after[name] == expected).sum())
        total += expected.numel()
    assert same > 0.999 * total  # all but near ties of the rounding


def test_a_base_that_lacks_a_weight_is_named(opened: OpenRun, tmp_path: Path) -> None:
    base = Path(shutil.copytree(opened.base.folder, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.3.mlp.down_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(MtlLoraError) as caught:
        write_merged(find_base_model(str(base)), task_updates(opened.adapter, 0), out)
    assert str(caught.value).endswith(
        "no weight 'model.layers.3.mlp.down_proj.weight' to merge into"
    )


def test_a_failing_merge_leaves_nothing(opened: OpenRun, tmp_path: Path) -> None:
    base = Path(shutil.copytree(opened.base.folder, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.3.mlp.down_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    broken = replace(opened, base=find_base_model(str(base)))
    with pytest.raises(MtlLoraError, match="no weight"):
        merge(broken, tmp_path / "here" / "out")
    assert not list((tmp_path / "here").rglob("*"))


def test_a_weight_of_another_shape_is_refused(opened: OpenRun, tmp_path: Path) -> None:
    base = Path(shutil.copytree(opened.base.folder, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"] = torch.zeros(64, 100)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(MtlLoraError, match=r"has shape \[64, 100\], the adapter fits \[64, 172\]"):
        write_merged(find_base_model(str(base)), task_updates(opened.adapter, 0), out)


def test_an_output_folder_that_holds_something_is_refused(opened: OpenRun, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match="exists and is not empty"):
        merge(opened, out)
    with pytest.raises(UsageError, match="exists and is not empty"):
        merge(opened, out / "mine.txt")
    assert (out / "mine.txt").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_output_folder_will_do(opened: OpenRun, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    merge(opened, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_beyond_tolerance_nothing_is_left(opened: OpenRun, tmp_path: Path) -> None:
    with pytest.raises(CheckError) as caught:
        merge(opened, tmp_path / "out", tolerance=0.0)
    (line,) = caught.value.lines
    assert "the merged model differs from the adapted one on task 'sst2'" in line
    assert list(tmp_path.iterdir()) == []


def test_a_merge_that_went_wrong_is_found_out(opened: OpenRun, tmp_path: Path) -> None:
    """The check is no formality: another task's weights do not pass as this one's."""
    from mtl_lora_cli.export.check import compare_merged

    out = tmp_path / "out"
    out.mkdir()
    write_merged(opened.base, task_updates(opened.adapter, 1), out)
    right = compare_merged(opened, opened.tasks[1], out, 8)
    wrong = compare_merged(opened, opened.tasks[0], out, 8)
    assert right.holds
    assert not wrong.holds


def test_a_poisoned_adapter_does_not_pass(opened: OpenRun, tmp_path: Path) -> None:
    layer = next(iter(opened.adapter.layers.values()))
    kept = layer.lora_B.detach().clone()
    layer.lora_B.data[0, 0, 0] = float("nan")
    try:
        with pytest.raises(CheckError):
            merge(opened, tmp_path / "out")
    finally:
        layer.lora_B.data.copy_(kept)
    assert list(tmp_path.iterdir()) == []
