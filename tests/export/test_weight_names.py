"""Names in the files and names in the model: what transformers loads where is where a merge writes."""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mtl_lora_cli.errors import CheckError, UsageError
from mtl_lora_cli.export.alone import load_alone
from mtl_lora_cli.export.merge import Update, plan_merge, write_merged
from mtl_lora_cli.export.peft_files import write_peft
from mtl_lora_cli.export.peft_names import peft_names, require_named
from mtl_lora_cli.export.weight_names import (
    WeightNames,
    require_meant,
    same_names,
    weight_names,
    wrapper_class,
)
from mtl_lora_cli.models.base import find_base_model

from ..families.build import build
from ..families.models import MODELS

# Wrappers with a part that sees, renamed and fused weights, and a plain one.
KINDS = (
    "gemma3-window",
    "gemma4-cap-shared-keys",
    "mistral3",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen2_5_vl",
    "llama4-chunks",
    "mixtral",
    "qwen2_moe",
    "deepseek_v4",
    "phimoe",
    "gpt_neox",
    "qwen2",
)


@pytest.fixture(scope="module")
def folder_of(
    stories_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def find(kind: str) -> Path:
        if kind not in made:
            (model,) = (one for one in MODELS if str(one) == kind)
            folder = tmp_path_factory.mktemp("base") / kind
            made[kind] = build(model, folder)
            (folder / "preprocessor_config.json").write_text('{"size": 28}')
        return made[kind]

    return find


def linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """Of the layers that could be adapted."""
    return {
        f"{path}.weight": layer.weight
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and "visual" not in path and "vision" not in path
    }


def tied(model: Any) -> set[str]:
    return set(model.all_tied_weights_keys)


def updates_for(weights: dict[str, Tensor]) -> dict[str, Update]:
    torch.manual_seed(1)
    return {
        name: (torch.randn(3, weight.shape[1]), torch.randn(weight.shape[0], 3), 0.5)
        for name, weight in weights.items()
    }


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.suffix != ".safetensors"
    }


def merged(base: Path, updates: dict[str, Update], folder: Path) -> Path:
    folder.mkdir()
    write_merged(plan_merge(find_base_model(str(base)), updates), folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_changes_what_transformers_loads_and_nothing_else(
    folder_of: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    base = folder_of(kind)
    before = load_alone(base, torch.float32)
    weights = linear_weights(before)
    updates = updates_for({n: w for n, w in weights.items() if n not in tied(before)})
    after = load_alone(merged(base, updates, tmp_path / "out"), torch.float32)
    now = dict(after.named_parameters())
    for name, weight in before.named_parameters():
        expected = weight.clone()
        if name in updates:
            down, up, scale = updates[name]
            expected += scale * up @ down
        torch.testing.assert_close(now[name], expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(now[name], weight) == (name not in updates)
    old, new = tensors_of(base), tensors_of(tmp_path / "out")
    assert list(old) == list(new)
    assert sum(not torch.equal(old[name], new[name]) for name in old) == len(updates)
    assert digests(base) == digests(tmp_path / "out"), "every other file"


def test_files_without_a_prefix_are_merged_under_their_own_names(
    stories_folder: Path, tmp_path: Path
) -> None:
    """As a model is saved that was loaded without its head."""
    base = Path(shutil.copytree(stories_folder, tmp_path / "base"))
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors_of(base).items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    before = load_alone(base, torch.float32)
    updates = updates_for(
        {n: w for n, w in linear_weights(before).items() if n != "lm_head.weight"}
    )
    after = linear_weights(load_alone(merged(base, updates, tmp_path / "out"), torch.float32))
    assert set(tensors_of(tmp_path / "out")) == set(tensors)
    for name, (down, up, scale) in updates.items():
        expected = linear_weights(before)[name] + scale * up @ down
        torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-5)


def test_the_hubs_first_gemma3_names_are_found(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """`language_model.model.layers…` in the files, `model.language_model.layers…` in the model."""
    base = folder_of("gemma3-window")
    found = weight_names(find_base_model(str(base)))
    weight = "model.language_model.layers.1.mlp.down_proj.weight"
    assert found.tensor(weight) == "language_model.model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    "kind",
    [
        *("qwen3_5", "llama4-chunks", "gemma3-window", "gemma4-cap-shared-keys", "mistral3"),
        *("phimoe", "deepseek_v3", "laguna-window", "qwen2_moe"),
    ],
)
@pytest.mark.parametrize(("whole_paths", "ranks"), [(False, False), (True, True)])
def test_peft_finds_every_layer_in_the_model_for_text_and_in_its_wrapper(
    folder_of: Callable[[str], Path], tmp_path: Path, kind: str, whole_paths: bool, ranks: bool
) -> None:
    """And nothing of it in a vision tower, whose layers have the same names."""
    peft = pytest.importorskip("peft")
    base = find_base_model(str(folder_of(kind)))
    own = load_alone(base.folder, torch.float32)
    weights = {n: w for n, w in linear_weights(own).items() if n.split(".")[-2][1:] == "_proj"}
    updates = {n: (a / 20, b, s) for n, (a, b, s) in updates_for(weights).items()}
    targets = [n.removesuffix(".weight") for n in updates]
    if not whole_paths:
        targets = sorted({path.rpartition(".")[2] for path in targets})
    if ranks:
        updates = {
            n: (a[: 1 + number % 2], b[:, : 1 + number % 2], s)
            for number, (n, (a, b, s)) in enumerate(updates.items())
        }
    write_peft(updates, peft_names(base, updates, targets), "x", tmp_path)
    require_named(base, tmp_path)
    ids = torch.tensor([[1, 17, 230, 41, 99, 7, 55, 300]])
    for model in (type(own), wrapper_class(base) or type(own)):
        plain = model.from_pretrained(base.folder, dtype=torch.float32).eval()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adapted = peft.PeftModel.from_pretrained(
                model.from_pretrained(base.folder, dtype=torch.float32), str(tmp_path)
            ).eval()
        assert not [one for one in caught if "missing adapter keys" in str(one.message)]
        before = plain(ids).logits
        own_names = weight_names(base).tensors
        inside = weight_names(base, None if model is type(own) else model)
        names = {tensor: name for name, tensor in inside.tensors.items()}
        with torch.no_grad():
            for weight, (down, up, scale) in updates.items():
                plain.get_parameter(names[own_names[weight]]).add_(scale * up @ down)
        assert (plain(ids).logits - before).abs().max() > 0.1
        torch.testing.assert_close(
            adapted(input_ids=ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4
        )


# A merge that changes nothing, or less than it should.


NAME = "model.layers.{}.mlp.down_proj.weight"


def test_an_adapter_of_zeros_is_refused(stories_folder: Path, tmp_path: Path) -> None:
    updates = {NAME.format(n): (torch.randn(2, 172), torch.zeros(64, 2), 1.0) for n in range(2)}
    with pytest.raises(UsageError, match=r"2 adapted weights would change 0 tensors of .* nothing"):
        merged(stories_folder, updates, tmp_path / "out")


def test_an_update_that_rounding_swallows_is_told(stories_folder: Path, tmp_path: Path) -> None:
    updates = {
        NAME.format(n): (torch.randn(2, 172), torch.randn(64, 2), scale)
        for n, scale in enumerate((1.0, 1e-20, 1e-20))
    }
    with pytest.raises(
        CheckError, match="2 of 3 tensors that the adapter changes came out as they"
    ):
        merged(stories_folder, updates, tmp_path / "out")


def test_a_layer_without_an_update_need_not_change(stories_folder: Path, tmp_path: Path) -> None:
    updates = {NAME.format(n): (torch.randn(2, 172), n * torch.ones(64, 2), 1.0) for n in range(2)}
    merged(stories_folder, updates, tmp_path / "out")
    old, new = tensors_of(stories_folder), tensors_of(tmp_path / "out")
    assert [name for name in old if not torch.equal(old[name], new[name])] == [NAME.format(1)]


def test_what_the_files_hold_in_pieces_is_refused(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Experts lie apart in the files and together in the model."""
    base = find_base_model(str(folder_of("mixtral")))
    with pytest.raises(
        UsageError,
        match=r"no weight 'model\.layers\.0\.mlp\.experts\.down_proj' to merge into: .* in pieces",
    ):
        weight_names(base).tensor("model.layers.0.mlp.experts.down_proj")


@pytest.mark.parametrize(("kind", "alike"), [("qwen2", True), ("gemma3-window", False)])
def test_names_that_are_alike_are_known_without_asking_and_asked_in_the_end(
    folder_of: Callable[[str], Path], kind: str, alike: bool
) -> None:
    base = find_base_model(str(folder_of(kind)))
    meant = weight_names(base)
    weights = [name for name in meant.tensors if "q_proj" in name or "down_proj" in name]
    found = same_names(base, weights)
    assert (found is not None) == alike
    if found is not None:
        assert found.tensors == {name: meant.tensors[name] for name in weights}
        require_meant(found)


def test_a_name_that_transformers_reads_otherwise_does_not_hold(
    folder_of: Callable[[str], Path],
) -> None:
    base = find_base_model(str(folder_of("gemma3-window")))
    meant = weight_names(base)
    weight, tensor = next((w, t) for w, t in meant.tensors.items() if w != t)
    assert same_names(base, [tensor]) is not None, "there is a tensor of that name"
    with pytest.raises(CheckError, match="is not the weight of that name"):
        require_meant(WeightNames(base, {tensor: tensor}, frozenset()))
    require_meant(WeightNames(base, {weight: tensor}, frozenset()))
