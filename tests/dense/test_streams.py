"""Streams against copies of blocks that are merged by hand, in float64."""

from __future__ import annotations

import copy
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mtl_lora_cli.adapters.files import read_alone, save_adapter
from mtl_lora_cli.dense.backbones import load_backbone
from mtl_lora_cli.dense.host import DenseHost
from mtl_lora_cli.dense.merged import merged_maps
from mtl_lora_cli.dense.plain_code import SPEC, TENSORS, described, plain_code
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.models.base import BaseModel, find_base_model

from .conftest import SPECS, TARGETS, Backbones, batch_of, host_of

# Windows of 4 that do not divide the maps; Hiera takes multiples of 32, and 8 is a DINOv2's patch here.
ODD = {
    "swin": (40, 72),
    "swinv2": (40, 72),
    "convnext": (40, 72),
    "hiera": (64, 96),
    "dinov2": (40, 72),
}


def by_hand(host: DenseHost, base: BaseModel, pixels: Tensor, task: int) -> list[Tensor]:
    """A task's four outputs: of a trunk with W + s B A, copies of last blocks with W + s B A + s' B_t A_t."""
    size = tuple(pixels.shape[-2:])
    trunk = load_backbone(base, size=size, dtype=torch.float64, device=torch.device("cpu"))
    for name, value in host.adapter.whole.items():
        trunk.get_parameter(name).data.copy_(value.data)
    for path, layer in host.adapter.layers.items():
        trunk.get_submodule(path).weight.data += (
            8.0 / 4 * layer.lora_B[0].data @ layer.lora_A[0].data
        )
    found: list[Any] = []
    for path in host.stages.blocks:
        own = copy.deepcopy(trunk.get_submodule(path))
        for name, layer in host.adapter.layers.items():
            if name.startswith(f"{path}."):
                update = 8.0 / 2 * layer.task_lora_B[task].data @ layer.task_lora_A[task].data
                own.get_submodule(name.removeprefix(f"{path}.")).weight.data += update

        def before(block: nn.Module, x: Any, named: Any, own: nn.Module = own) -> None:
            found.append(own(*x, **named))

        trunk.get_submodule(path).register_forward_pre_hook(before, with_kwargs=True)
    if trunk.config.model_type == "swin":
        trunk.encoder(*trunk.embeddings(pixels), always_partition=True)
    else:
        trunk(pixels)
    return [one[0] if isinstance(one, tuple) else one for one in found]


@torch.no_grad()
@pytest.mark.parametrize("kind", TARGETS)
def test_a_task_s_stream_is_its_own_blocks_behind_the_common_trunk(
    backbones: Backbones, kind: str
) -> None:
    base, size = backbones(kind), ODD[kind]
    host, batch = host_of(base, kind, size), batch_of(size)
    seen: list[Tensor] = []
    for tap in host.taps:
        taken = tap.taken
        tap.taken = lambda taken=taken: seen.append(taken()) or seen[-1]  # type: ignore[method-assign]
    host._features(batch.pixels, [0, 1, 2])
    for task in (0, 2):
        for mine, theirs in zip(seen, by_hand(host, base, batch.pixels, task), strict=True):
            torch.testing.assert_close(mine.unflatten(0, (3, -1))[task], theirs, rtol=0, atol=1e-12)
    assert not torch.allclose(seen[0][:2], seen[0][2:4], atol=1e-3)


@torch.no_grad()
def test_a_task_that_is_no_number_changes_no_bit_of_another(backbones: Backbones) -> None:
    size = ODD["swin"]
    host, batch = (
        host_of(backbones("swin"), "swin", size, torch.float32),
        batch_of(size, torch.float32),
    )
    before = host.answers(batch, [0, 1, 2])
    for layer in host.adapter.layers.values():
        if "task_lora_B" in layer.roles:
            layer.task_lora_B.data[1] = float("nan")
    after = host.answers(batch, [0, 1, 2])
    assert not after[1].isfinite().any()
    assert torch.equal(before[0], after[0]) and torch.equal(before[2], after[2])


@torch.no_grad()
def test_decoders_answer_in_half_precision_as_they_learn(backbones: Backbones) -> None:
    """Copies in half precision last until the host learns or answers anew."""
    size = (32, 32)
    host = host_of(backbones("convnext"), "convnext", size, torch.bfloat16, method="lora")
    batch = batch_of(size, torch.float32)
    learning = host.train(True).answers(batch, [0, 1])
    answered = host.train(False).answers(batch, [0, 1])
    assert all(torch.equal(learning[task], answered[task]) for task in (0, 1))
    host.decoders[0].out.bias += 1
    again = host.train(False).answers(batch, [0, 1])
    assert torch.equal(again[1], answered[1]) and not torch.equal(again[0], answered[0])


def test_a_missing_map_gives_its_task_no_gradient(backbones: Backbones) -> None:
    """And losses and gradients of the others are what they are without that task."""
    size = ODD["dinov2"]
    host, batch = host_of(backbones("dinov2"), "dinov2", size), batch_of(size)
    batch.present[:, 1] = False
    batch.owners = torch.tensor([0, 2, 0, 2])
    batch.task_ids = torch.tensor([0, 2])
    del batch.targets[1]
    losses = host.losses(batch)
    losses.sum().backward()
    assert len(losses) == 4
    for name, tensor in host.adapter.tensors().items():
        own = name.startswith("decoder:depth")
        assert (tensor.grad is None) == own, name
        if "task_lora" in name:
            assert not tensor.grad[1].any() and tensor.grad[0].any() and tensor.grad[2].any()


@torch.no_grad()
@pytest.mark.parametrize(
    ("settings", "streams"),
    [({"streams": "stages"}, 3), ({"streams": None}, 3), ({"method": "lora"}, 1)],
)
def test_which_streams_run(backbones: Backbones, settings: dict[str, Any], streams: int) -> None:
    """Without `streams` tasks that differ run through the whole trunk; merged, it is a trunk of each."""
    base, size = backbones("convnext"), (32, 32)
    host, batch = host_of(base, "convnext", size, **settings), batch_of(size)
    assert len(host._features(batch.pixels, [0, 1, 2])) == streams
    if settings["streams" if "streams" in settings else "method"] == "stages":
        return
    trunk = load_backbone(base, size=size, dtype=torch.float64, device=torch.device("cpu"))
    merged = merged_maps(trunk, host.stages, host.adapter, ["depth"])
    plain: list[Tensor] = []
    for path in host.stages.blocks:
        merged.trunk.get_submodule(path).register_forward_hook(lambda m, a, x: plain.append(x))
    merged.trunk(batch.pixels)
    ours = [stage.permute(0, 3, 1, 2) for stage in host._features(batch.pixels, [1])[0]]
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "settings"), [("swin", {}), ("hiera", {"method": "lora"})])
def test_the_readme_s_program_is_the_run(
    backbones: Backbones,
    kind: str,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Here it runs in this process; `long` tests and the command itself give it one of its own."""
    base, size = backbones(kind), ODD[kind]
    host, batch = host_of(base, kind, size, **settings), batch_of(size)
    code = written(host, base, size, tmp_path)
    monkeypatch.chdir(tmp_path)
    program: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), program)
    found = program["predict"](batch.pixels)
    for task, ours in zip(SPECS, host.answers(batch, [0, 1, 2]).values(), strict=True):
        torch.testing.assert_close(found[task], ours, rtol=0, atol=1e-12)


def written(host: DenseHost, base: BaseModel, size: tuple[int, int], folder: Path) -> str:
    """A folder of all tasks, in float64, and the program that runs it."""
    trunk = load_backbone(base, size=size, dtype=torch.float64, device=torch.device("cpu"))
    merged = merged_maps(trunk, host.stages, host.adapter, list(SPECS))
    merged.trunk.save_pretrained(folder)
    save_file({k: v.contiguous() for k, v in merged.tensors.items()}, folder / TENSORS)
    said = described(SPECS, host.stages.blocks, size, (0, 0, 0), (1, 1, 1))
    (folder / SPEC).write_text(json.dumps(said))
    own = host.way == "stages"
    specs = list(SPECS.values())
    return plain_code(host.family, trunk.config, specs, own=own, dtype="torch.float64")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"whole_modules": ["nothing_here"]},
            r"whole_modules: 'nothing_here' matches no module or parameter of the model",
        ),
        (
            {"target_modules": ["nothing_here"]},
            r"'nothing_here' matches no linear layer of the model",
        ),
        (
            {"task_modules": ["encoder.layers.1.blocks.0.*"]},
            r"tasks have streams in the last blocks of stages, and the adapter has no part of tasks' own",
        ),
    ],
)
def test_an_adapter_that_does_not_fit(
    backbones: Backbones, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        host_of(backbones("swin"), "swin", (32, 32), **settings)


LONG = {"swin": (168, 224), "swinv2": (168, 224), "convnext": (168, 224), "hiera": (192, 224)}
LONG |= {"dinov2": (168, 224)}


@pytest.mark.long
@torch.no_grad()
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("size", [(224, 224), (448, 448), None])
def test_merged_is_the_run_in_a_process_of_its_own(
    backbones: Backbones, kind: str, size: tuple[int, int] | None, tmp_path: Path
) -> None:
    """By the README's program, which imports transformers and torch, in float64."""
    base, size = backbones(kind), size or LONG[kind]
    host, batch = host_of(base, kind, size), batch_of(size)
    ours = host.answers(batch, [0, 1, 2])
    code = written(host, base, size, tmp_path)
    save_file({"x": batch.pixels}, tmp_path / "x.safetensors")
    code += (
        "\nimport sys\nfrom safetensors.torch import save_file\nfound = predict(load_file('x.safetensors')['x'])\n"
        "save_file({k: v.contiguous() for k, v in found.items()}, 'y.safetensors')\n"
        "assert not [name for name in sys.modules if name.startswith('mtl_lora')]\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)
    for number, (task, theirs) in enumerate(
        (task, load_file(tmp_path / "y.safetensors")[task]) for task in SPECS
    ):
        assert float((ours[number] - theirs).abs().max()) <= 1e-12, (task, math.prod(size))


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "other"),
    [
        ("swin", "SwinForImageClassification"),  # what microsoft/swin-tiny-patch4-window7-224 is
        ("swin", "SwinBackbone"),
        ("dinov2", "Dinov2Backbone"),
        ("hiera", "HieraForImageClassification"),
        ("convnext", "ConvNextForImageClassification"),
    ],
)
def test_folders_of_other_classes_are_the_same_backbone(
    backbones: Backbones, kind: str, other: str, tmp_path: Path
) -> None:
    import transformers

    first = transformers.AutoModel.from_pretrained(backbones(kind).folder)
    whole = getattr(transformers, other)(first.config)
    own = whole.base_model if hasattr(whole, whole.base_model_prefix) else whole
    own.load_state_dict(first.state_dict(), strict=False)
    whole.save_pretrained(tmp_path)
    loaded = load_backbone(
        find_base_model(str(tmp_path)),
        size=(64, 64),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    for name, parameter in loaded.named_parameters():
        if name.startswith(("encoder.", "embeddings.")):
            assert torch.equal(parameter, first.get_parameter(name)), name


def test_a_backbone_that_lacks_weights_is_refused(backbones: Backbones, tmp_path: Path) -> None:
    shutil.copytree(backbones("swin").folder, tmp_path / "swin")
    path = tmp_path / "swin" / "model.safetensors"
    weights = {n: t for n, t in load_file(path).items() if "layers.1.blocks.1" not in n}
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UsageError, match="weights are missing, the first is"):
        load_backbone(
            find_base_model(str(tmp_path / "swin")),
            size=(64, 64),
            dtype=torch.float32,
            device=torch.device("cpu"),
        )


@pytest.mark.parametrize("settings", [{}, {"method": "lora", "whole_modules": ["*"]}])
def test_an_adapter_file_is_read_without_its_backbone(
    backbones: Backbones, settings: dict[str, Any], tmp_path: Path
) -> None:
    """What learns whole and decoders come back, and with full tuning there is no adapted layer at all."""
    host = host_of(backbones("swin"), "swin", (32, 32), torch.float32, **settings)
    adapter = host.adapter
    assert bool(adapter.layers) == (not settings)
    save_adapter(adapter, tmp_path, {"name": "base"})
    read = read_alone(tmp_path)
    ours, theirs = adapter.tensors(), read.tensors()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].detach(), theirs[name].detach()) for name in ours)
