"""Base models whose files are quantised already: trained around, expanded, or refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.export.alone import load_alone
from mtl_lora_cli.export.merge import plan_merge, write_merged
from mtl_lora_cli.models.base import BaseModel, find_base_model
from mtl_lora_cli.models.load import load_model

from ..families.build import build
from ..families.models import MODELS
from .conftest import exported

CPU = torch.device("cpu")
BLOCK = 32


def tell(folder: Path, **quantization: Any) -> Path:
    """Let a folder's configuration say how its files are quantised."""
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="session")
def packed_by_bitsandbytes(
    stories_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    def make(**how: Any) -> Path:
        folder = Path(
            shutil.copytree(stories_folder, tmp_path_factory.mktemp("base") / "quantised")
        )
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=BitsAndBytesConfig(**how), dtype=torch.bfloat16
        )
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder)
        return folder

    return make


def tiny(kind: str, stories: Path, folder: Path) -> Path:
    (model,) = (one for one in MODELS if str(one) == kind)
    return build(model, folder)


@pytest.fixture
def in_fp8(stories_folder: Path, tmp_path: Path) -> Path:
    """DeepSeek's way: 8-bit floats, and a scale for each block of 32 × 32."""
    folder = tiny("llama", stories_folder, tmp_path / "fp8")
    tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            tensors[name] = weight.bfloat16()
            continue
        rows, columns = (side // BLOCK for side in weight.shape)
        blocks = weight.view(rows, BLOCK, columns, BLOCK)
        scale = blocks.abs().amax(dim=(1, 3)) / 448
        tensors[name] = (
            (blocks / scale[:, None, :, None]).view(weight.shape).to(torch.float8_e4m3fn)
        )
        tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tell(
        folder, quant_method="fp8", activation_scheme="dynamic", weight_block_size=[BLOCK, BLOCK]
    )


@pytest.fixture
def in_mxfp4(stories_folder: Path, tmp_path: Path) -> Path:
    """gpt-oss: experts in 4-bit floats, 32 with one scale, and all else in bfloat16."""
    folder = tiny("gpt_oss-window-sinks", stories_folder, tmp_path / "mxfp4")
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = weight.bfloat16()
            continue
        experts, rows, columns = weight.mT.shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_blocks"] = blocks
        tensors[f"{name}_scales"] = torch.randint(122, 125, blocks.shape[:3], dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tell(folder, quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn"])


ATTENTION = {"target_modules": ["q_proj", "o_proj"], "rank": 4}
FORMS = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "stored as bfloat16": {"load_in_4bit": True, "bnb_4bit_quant_storage": torch.bfloat16},
    "int8": {"load_in_8bit": True},
}


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("form", FORMS)
def test_bitsandbytes_weights_are_trained_around_as_they_are(
    train: Callable[..., Run],
    packed_by_bitsandbytes: Callable[..., Path],
    tmp_path: Path,
    form: str,
) -> None:
    """PEFT on transformers' own expansion says the same; merging would round a sum."""
    base = packed_by_bitsandbytes(**FORMS[form])
    for dtype in ("float32", "bfloat16")[: 1 + (form == "nf4")]:
        run = train(base, dtype=dtype)
        found = exported("peft", run, run.tasks[0], tmp_path / f"peft-{dtype}", limit=6).comparison
        assert found is not None
        assert (found.dtype, found.equal) == ("float32", 1)
        assert found.largest < 5e-5
    with pytest.raises(UsageError, match="would have to be quantised again") as caught:
        exported("merged", run, run.tasks[0], tmp_path / "out")
    assert "export --format peft leaves the base model as it is" in str(caught.value)
    readme = (tmp_path / "peft-float32" / "README.md").read_text(encoding="utf-8")
    assert "quantised already (bitsandbytes)" in readme


@pytest.mark.usefixtures("in_process")
def test_fp8_weights_are_expanded_to_the_runs_dtype(
    train: Callable[..., Run], in_fp8: Path, tmp_path: Path
) -> None:
    tensors = load_file(in_fp8 / "model.safetensors")
    model = load_model(find_base_model(str(in_fp8)), dtype=torch.float32, device=CPU)
    name = "model.layers.1.mlp.down_proj.weight"
    scale = tensors[f"{name}_scale_inv"].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    torch.testing.assert_close(model.get_parameter(name), tensors[name].float() * scale)
    assert {one.dtype for one in model.parameters()} == {torch.float32}
    run = train(in_fp8, adapter=ATTENTION)
    assert exported("peft", run, run.tasks[0], tmp_path / "peft", limit=6).comparison
    with pytest.raises(UsageError, match=r"is stored as F8_E4M3.*quantised again"):
        exported("merged", run, run.tasks[0], tmp_path / "out")


@pytest.mark.usefixtures("in_process")
def test_beside_experts_in_mxfp4_attention_is_merged_exactly(
    train: Callable[..., Run], in_mxfp4: Path, tmp_path: Path
) -> None:
    # Small updates: rounding turns routers of random weights far otherwise.
    run = train(in_mxfp4, adapter={**ATTENTION, "alpha": 1.0})
    written = exported("merged", run, run.tasks[0], tmp_path / "out", limit=6)
    assert written.comparison is not None
    before, after = (load_file(f / "model.safetensors") for f in (in_mxfp4, tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{path}.weight" for path in run.adapter.layers}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "mxfp4", "the experts still are"


@pytest.mark.long
@pytest.mark.usefixtures("in_process")
def test_adapters_on_experts_in_mxfp4_are_not_merged_and_peft_reads_them(
    train: Callable[..., Run], in_mxfp4: Path, tmp_path: Path
) -> None:
    run = train(in_mxfp4, adapter={**ATTENTION, "experts": "each"})
    found = exported("peft", run, run.tasks[0], tmp_path / "peft", limit=6).comparison
    assert found is not None and found.equal == 1
    with pytest.raises(UsageError, match=r"stored in 4 bits \(mxfp4\).*export --format peft"):
        exported("merged", run, run.tasks[0], tmp_path / "out")


def test_a_quantisation_that_no_tensor_has_is_not_told_of_the_merged_one(
    run: Run, stories_folder: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(stories_folder, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    tell(base, quant_method="fp8", activation_scheme="dynamic")
    (tmp_path / "out").mkdir()
    model = find_base_model(str(base))
    updates = {
        "model.layers.0.self_attn.q_proj.weight": (torch.ones(1, 64), torch.ones(64, 1), 1.0)
    }
    write_merged(plan_merge(model, updates), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    load_alone(tmp_path / "out", torch.float32)


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "quark"])
def test_other_kinds_are_refused_with_what_to_do(
    stories_folder: Path, tmp_path: Path, method: str
) -> None:
    base = Path(shutil.copytree(stories_folder, tmp_path / "base"))
    model = find_base_model(str(tell(base, quant_method=method, bits=4)))
    with pytest.raises(UsageError) as caught:
        load_model(model, dtype=torch.float32, device=CPU)
    (line,) = caught.value.lines
    assert line.endswith(
        f"is quantised already ({method}), and such weights are not trained around here; use the model "
        "that it was made from, and `quantization: nf4` for 4 bits"
    )


def test_nothing_is_quantised_twice(stories_folder: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(stories_folder, tmp_path / "base"))
    model: BaseModel = find_base_model(str(tell(base, quant_method="fp8")))
    with pytest.raises(
        UsageError, match=r"quantization: nf4: .* is quantised already \(fp8\); leave"
    ):
        load_model(model, dtype=torch.float32, device=CPU, quantization="nf4")
