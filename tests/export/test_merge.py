"""Merged folders: base + s · B' A' where adapted, the base's own bytes elsewhere, or nothing at all."""

from __future__ import annotations

import json
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtl_lora_cli.adapters.files import config_checksum
from mtl_lora_cli.adapters.layer import MultiTaskLinear
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.evaluation import opened as room
from mtl_lora_cli.evaluation.opened import Run, open_run
from mtl_lora_cli.export import quantised as quantised_room
from mtl_lora_cli.export.merge import MergePlan, plan_merge, task_updates, write_merged
from mtl_lora_cli.export.order import Options
from mtl_lora_cli.export.quantised import Quantised, measure_rounding, quantised
from mtl_lora_cli.export.write import write_tasks
from mtl_lora_cli.kernels import int8, nf4
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import BUILDING, load_model
from mtl_lora_cli.runs.folder import RunFolder

from .conftest import exported


def merge(run: Run, folder: Path, task: int = 0, **keys: Any) -> Path:
    exported("merged", run, run.tasks[task], folder, **{"checked": False, **keys})
    return folder


def plan(run: Run, base: Path | None = None, task: int = 0) -> MergePlan:
    found = run.base if base is None else find_base_model(str(base))
    return plan_merge(found, task_updates(run.adapter, task))


def weights(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def adapted(run: Run) -> dict[str, MultiTaskLinear]:
    return {f"{path}.weight": layer for path, layer in run.adapter.layers.items()}


def exact(layer: MultiTaskLinear, weight: Tensor, task: int) -> Tensor:
    """W + (alpha / r) Σ_i g_i B_i Λ_t A in float64, written out."""
    config = layer.config
    gate = (layer.task_gate[task].double() / config.tau).softmax(0)
    update = torch.zeros_like(weight, dtype=torch.float64)
    for value, up in zip(gate, layer.lora_B.double(), strict=True):
        update += value * up @ layer.task_transform[task].double() @ layer.lora_A[0].double()
    return (weight.double() + config.alpha / config.rank * update).detach()


def changed(base: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a base model with other tensors."""
    copy = Path(shutil.copytree(base, folder))
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("task", [0, 1])
def test_adapted_weights_are_base_plus_update_and_the_others_keep_every_bit(
    run: Run, tmp_path: Path, task: int
) -> None:
    before, after = weights(run.base.folder), weights(merge(run, tmp_path / "out", task))
    assert list(before) == list(after)
    layers = adapted(run)
    assert len(layers) == 10
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        if name in layers:
            assert not torch.equal(tensor, before[name])
            expected = exact(layers[name], before[name], task)
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(tensor, before[name])


def test_two_tasks_merge_into_two_models(run: Run, tmp_path: Path) -> None:
    targets = [(task, tmp_path / task.name) for task in run.tasks]
    written = write_tasks("merged", run, targets, Options(checked=False))
    assert [(one.task, one.folder, one.comparison) for one in written] == [
        (task.name, tmp_path / task.name, None) for task in run.tasks
    ]
    one, two = (weights(folder) for _, folder in targets)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(one[name], two[name])


def test_transformers_reads_the_folder_alone(run: Run, tmp_path: Path) -> None:
    """Against the adapted model through its own plain forward, not through our packed one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merge(run, tmp_path / "out", 1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    plain = AutoModelForCausalLM.from_pretrained(run.base.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    state = {k: v.clone() for k, v in plain.state_dict().items()}
    for name, layer in adapted(run).items():
        state[name] = exact(layer, state[name], 1).float()
    with torch.no_grad():
        base = plain(ids).logits
        plain.load_state_dict(state)
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
        assert (model(ids).logits - base).abs().max() > 1e-2


def test_the_folder_holds_the_bases_other_files_and_a_readme(run: Run, tmp_path: Path) -> None:
    merge(run, tmp_path / "out")
    names = {path.name for path in tmp_path.joinpath("out").iterdir()}
    assert names == {path.name for path in run.base.folder.iterdir()} | {"README.md"}
    for name in ("config.json", "tokenizer.json"):
        merged, base = tmp_path / "out" / name, run.base.folder / name
        assert merged.read_bytes() == base.read_bytes()
        assert not merged.samefile(base), "text files invite to be edited"


def test_weights_of_the_base_in_other_formats_stay_behind(run: Run, tmp_path: Path) -> None:
    base = Path(shutil.copytree(run.base.folder, tmp_path / "base"))
    for name in ("pytorch_model.bin", "model.gguf", "LICENSE"):
        (base / name).write_bytes(b"x" * 100)
    save_file({"x": torch.ones(3)}, base / "consolidated.safetensors")
    (tmp_path / "out").mkdir()
    write_merged(plan(run, base), tmp_path / "out")
    before, after = ({p.name for p in folder.iterdir()} for folder in (base, tmp_path / "out"))
    assert before - after == {"pytorch_model.bin", "model.gguf", "consolidated.safetensors"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_dtype_is_computed_wide_and_cast_once(
    run: Run, tmp_path: Path, dtype: torch.dtype
) -> None:
    def cast(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})
        tensors["counts"] = torch.arange(5)  # no floating point: never touched

    base = changed(run.base.folder, tmp_path / "base", cast)
    (tmp_path / "out").mkdir()
    write_merged(plan(run, base), tmp_path / "out")
    before, after = weights(base), weights(tmp_path / "out")
    same = total = 0
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        if name in adapted(run):
            expected = exact(adapted(run)[name], before[name], 0)
            same += int((tensor == expected.to(dtype)).sum())
            total += tensor.numel()
            torch.testing.assert_close(tensor.double(), expected, rtol=0.01, atol=0.01)
        else:
            assert torch.equal(tensor, before[name])
    if dtype.itemsize == 2:
        assert same > 0.999 * total  # all but near ties of the rounding


def test_a_matrix_larger_than_a_block_is_written_in_rows(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = weights(merge(run, tmp_path / "whole"))
    block = 5000  # bytes: 19 rows of 64 numbers, and no multiple of them
    monkeypatch.setattr("mtl_lora_cli.export.shards.BLOCK", block)
    parts = weights(merge(run, tmp_path / "parts"))
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-6, atol=1e-7)


def test_a_sharded_base_keeps_its_shards(
    train: Callable[..., Run], sharded: Path, tmp_path: Path
) -> None:
    run = train(sharded)
    merge(run, tmp_path / "out")
    before, after = weights(sharded), weights(tmp_path / "out")
    assert set(before) == set(after)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, framework="pt") as opened:
            assert name in opened.keys()  # noqa: SIM118 - safe_open is no mapping
            assert opened.metadata() == {"format": "pt"}
    for name, layer in adapted(run).items():
        expected = exact(layer, before[name], 0)
        torch.testing.assert_close(after[name].double(), expected, rtol=1e-6, atol=1e-7)


@pytest.fixture
def two_shards(run: Run, tmp_path: Path) -> Path:
    """The base model with every adapted weight in its first shard, laid out as the hub's cache does."""
    base = Path(shutil.copytree(run.base.folder, tmp_path / "base"))
    (base / "model.safetensors").unlink()
    (tmp_path / "blobs").mkdir()
    tensors, layers = weights(run.base.folder), adapted(run)
    weight_map = {}
    for number in (1, 2):
        file = f"model-{number:05d}-of-00002.safetensors"
        part = {name: t for name, t in tensors.items() if (name in layers) == (number == 1)}
        save_file(part, tmp_path / "blobs" / file, metadata={"format": "pt"})
        (base / file).symlink_to(f"../blobs/{file}")
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    return base


def test_what_does_not_change_is_a_hard_link_to_the_file_itself(
    run: Run, two_shards: Path, tmp_path: Path
) -> None:
    kept = two_shards / "model-00002-of-00002.safetensors"
    kept.chmod(0o440)
    same = run.but(base=find_base_model(str(two_shards)))
    merge(same, tmp_path / "out")
    linked = tmp_path / "out" / kept.name
    assert not linked.is_symlink()
    assert linked.samefile(kept)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o440, "a link's mode is the base model's"
    assert "Hard links to the base model's own files: `model-00002-of-00002.safetensors`" in (
        tmp_path / "out" / "README.md"
    ).read_text(encoding="utf-8")
    assert set(weights(tmp_path / "out")) == set(weights(run.base.folder))
    planned = plan_merge(same.base, task_updates(run.adapter, 0))
    written = sum(p.stat().st_size for p in (tmp_path / "out").iterdir() if p.stat().st_nlink == 1)
    readme = (tmp_path / "out" / "README.md").stat().st_size
    assert planned.size(tmp_path) == written - readme


def test_what_does_not_change_is_copied_to_another_file_system(
    run: Run, two_shards: Path, tmp_path: Path
) -> None:
    other = Path("/dev/shm")
    if not os.access(other, os.W_OK) or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip(f"{other} is no other file system that can be written to")
    planned = plan(run, two_shards)
    kept = two_shards / "model-00002-of-00002.safetensors"
    assert planned.size(other) == planned.size(tmp_path) + kept.stat().st_size
    out = other / f"mtl-lora-{os.getpid()}"
    out.mkdir()
    try:
        write_merged(planned, out)
        assert (out / kept.name).read_bytes() == kept.read_bytes()
        assert (out / kept.name).stat().st_nlink == 1
    finally:
        shutil.rmtree(out)


# Base weights as a quantised run saw them.


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_the_loaded_models_to_the_last_bit(
    run: Run, kind: str, dtype: torch.dtype
) -> None:
    how = quantised(run.base, kind, dtype)
    cpu = torch.device("cpu")
    model = load_model(run.base, dtype=dtype, device=cpu, quantization=kind)
    before = weights(run.base.folder)
    assert len(how.names) == 35
    for name in how.names:
        weight = model.get_parameter(name)
        out = torch.empty(before[name].shape, dtype=dtype)
        if kind == "int8":
            int8.expand(weight, weight.SCB, out)
        else:
            nf4.expand(weight, weight.quant_state, out)
        assert torch.equal(how.rounded(before[name]), out)


class Asked:
    """A lock that says when somebody wants it."""

    def __init__(self, lock: AbstractContextManager[Any]) -> None:
        self._lock, self.wanted = lock, threading.Event()

    def __enter__(self) -> None:
        self.wanted.set()
        self._lock.__enter__()

    def __exit__(self, *given: Any) -> None:
        self._lock.__exit__(*given)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_rounding_waits_while_a_model_is_built(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' levels are numbers of torch's default dtype, which who builds a model sets for all threads."""
    how = Quantised(kind, frozenset(), torch.float32, torch.device("cpu"))
    weight = torch.randn(16, 96)  # rows of half a block: the levels are read from the state
    expected, asked = how.rounded(weight), Asked(BUILDING)
    monkeypatch.setattr(quantised_room, "BUILDING", asked)
    before = torch.get_default_dtype()
    with ThreadPoolExecutor(max_workers=1) as pool:
        with BUILDING:
            torch.set_default_dtype(torch.bfloat16)
            try:
                found = pool.submit(how.rounded, weight)
                while not (asked.wanted.is_set() or found.done()):
                    time.sleep(0.001)
            finally:
                torch.set_default_dtype(before)
        assert torch.equal(found.result(), expected)


def test_dequantized_weights_are_those_of_the_run_plus_the_update(
    four_bit_run: Run, tmp_path: Path
) -> None:
    run = four_bit_run
    after = weights(merge(run, tmp_path / "out", base="dequantized"))
    original = weights(merge(run, tmp_path / "original"))
    how = quantised(run.base, "nf4", torch.float32)
    before = weights(run.base.folder)
    for name, tensor in after.items():
        seen = how.rounded(before[name]) if name in how.names else before[name]
        if name in adapted(run):
            expected = exact(adapted(run)[name], seen, 0)
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
            assert not torch.equal(tensor, original[name])
        else:
            assert torch.equal(tensor, seen)
    rounding = measure_rounding(run.base, how)
    ratios = {
        n: float((before[n] - how.rounded(before[n])).norm() / before[n].norm()) for n in how.names
    }
    assert rounding.matrices == 35
    assert rounding.mean == pytest.approx(sum(ratios.values()) / 35, rel=1e-5)
    assert rounding.largest == pytest.approx(ratios[rounding.where], rel=1e-5)
    assert ratios[rounding.where] == max(ratios.values())
    assert 0.05 < rounding.mean < 0.15, "four bits round by about a tenth"


def test_dequantized_weights_have_the_runs_dtype(
    four_bit_run: Run, sharded: Path, tmp_path: Path
) -> None:
    base = find_base_model(str(sharded))
    how = quantised(base, "nf4", torch.bfloat16)
    (tmp_path / "out").mkdir()
    write_merged(plan_merge(base, task_updates(four_bit_run.adapter, 0), how), tmp_path / "out")
    after = weights(tmp_path / "out")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * sum(t.numel() for t in after.values())
    norm = "model.norm.weight"
    assert torch.equal(after[norm], weights(sharded)[norm].bfloat16())


def test_dequantized_weights_are_for_quantised_runs(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--base dequantized is for quantised runs"):
        merge(run, tmp_path / "here" / "out", base="dequantized")
    assert not (tmp_path / "here").exists()


# What is refused, before anything is written.


def test_a_base_that_lacks_a_weight_is_named(run: Run, tmp_path: Path) -> None:
    name = "model.layers.3.mlp.down_proj.weight"
    base = changed(run.base.folder, tmp_path / "base", lambda tensors: tensors.pop(name))
    broken = run.but(base=find_base_model(str(base)))
    with pytest.raises(UsageError, match=f"no weight '{name}' to merge into"):
        merge(broken, tmp_path / "here" / "out")
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize(
    ("weight", "told"),
    [
        (torch.zeros(64, 100), r"has shape \[64, 100\], the adapter fits \[64, 172\]"),
        (torch.zeros(64, 172, dtype=torch.int8), "is stored as I8, expected one of F64, F32, F16"),
    ],
)
def test_a_weight_that_does_not_fit_is_refused(
    run: Run, tmp_path: Path, weight: Tensor, told: str
) -> None:
    name = "model.layers.3.mlp.down_proj.weight"
    base = changed(
        run.base.folder, tmp_path / "base", lambda tensors: tensors.update({name: weight})
    )
    with pytest.raises(UsageError, match=f"weight '{name}' {told}"):
        plan(run, base)


def test_a_shard_that_is_gone_or_cut_short_is_refused(
    run: Run, sharded: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(sharded, tmp_path / "base"))
    updates, found = task_updates(run.adapter, 0), find_base_model(str(base))
    shard = base / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(UsageError, match=f"{shard}: damaged: .* bytes, its header tells of"):
        plan_merge(found, updates)
    for rubbish in (b"\xff" * 100, b"", whole[:50], b"\x02" + b"\0" * 7 + b"[]"):
        shard.write_bytes(rubbish)
        with pytest.raises(UsageError, match=f"{shard}: no safetensors file"):
            plan_merge(found, updates)
    shard.unlink()
    with pytest.raises(UsageError, match=f"names 3 files, and '{shard.name}' is not there"):
        plan_merge(found, updates)


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    run: Run, tmp_path: Path
) -> None:
    """A base model larger than the disk: a sparse file, of which no byte but the header exists."""
    base = Path(shutil.copytree(run.base.folder, tmp_path / "base"))
    free = shutil.disk_usage(tmp_path).free
    names = {name: t for name, t in weights(run.base.folder).items() if name in adapted(run)}
    header, start = {}, 0
    for name, tensor in names.items():
        end = start + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    vast = free // 4 + 2**28
    header["vast"] = {"dtype": "F32", "shape": [vast], "data_offsets": [start, start + 4 * vast]}
    text = json.dumps(header).encode()
    with (base / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + start + 4 * vast)
    larger = run.but(base=find_base_model(str(base)))
    with pytest.raises(UsageError, match=r"GiB are needed, .* GiB are free") as caught:
        merge(larger, tmp_path / "here" / "out")
    needed = float(str(caught.value).split(": ")[1].split()[0])
    assert needed == pytest.approx((start + 4 * vast) / 2**30, abs=0.02)
    assert not (tmp_path / "here").exists()


def test_an_output_folder_that_holds_something_is_refused(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match="exists and is not empty"):
        merge(run, out)
    with pytest.raises(UsageError, match="exists and is not empty"):
        merge(run, out / "mine.txt")
    assert (out / "mine.txt").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_output_folder_will_do(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    merge(run, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_task_without_held_out_rows_is_refused_unless_nothing_is_compared(
    run: Run, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(Path(str(run.tasks[0].source.path)), tmp_path / "data"))
    (data / "test.jsonl").unlink()
    source = run.tasks[0].source.model_copy(update={"path": str(data)})
    task = replace(run.tasks[0], source=source)
    with pytest.raises(UsageError, match="no test or validation split; --no-check writes without"):
        exported("merged", run, task, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    exported("merged", run, task, tmp_path / "out", checked=False)


# Runs that cannot be merged.


@pytest.fixture
def copied(run: Run, tmp_path: Path) -> Path:
    """A run folder that a test may spoil."""
    return Path(shutil.copytree(run.folder.path, tmp_path / "mine"))


def adapter_file(run: Path) -> Path:
    return run / "adapter" / "mtl_lora.safetensors"


def test_a_damaged_tensor_is_named(copied: Path) -> None:
    tensors = load_file(adapter_file(copied))
    name = "model.layers.1.self_attn.q_proj.lora_B"
    tensors[name][0, 0, 0] += 1
    save_file(tensors, adapter_file(copied))
    with pytest.raises(UsageError, match=f"tensor '{name}' is damaged: its checksum differs"):
        open_run(RunFolder(copied))


def test_a_missing_tensor_is_named(copied: Path) -> None:
    tensors = load_file(adapter_file(copied))
    name = "model.layers.1.self_attn.q_proj.lora_B"
    del tensors[name]
    save_file(tensors, adapter_file(copied))
    with pytest.raises(UsageError, match=f"tensor '{name}' is missing"):
        open_run(RunFolder(copied))


def test_an_adapter_file_cut_short_is_refused(copied: Path) -> None:
    adapter_file(copied).write_bytes(adapter_file(copied).read_bytes()[:-5])
    with pytest.raises(UsageError, match="damaged"):
        open_run(RunFolder(copied))


def test_a_run_that_has_not_finished_is_refused(copied: Path) -> None:
    shutil.rmtree(copied / "adapter")
    with pytest.raises(UsageError, match="run 'mine' has no finished adapter"):
        open_run(RunFolder(copied))


def test_another_base_model_is_refused(run: Run, copied: Path, tmp_path: Path) -> None:
    def shift(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"] += 1

    base = changed(run.base.folder, tmp_path / "base", shift)
    recipe = copied / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(run.base.folder), str(base)))
    with pytest.raises(
        UsageError, match="is not the one that the adapter was trained on"
    ) as caught:
        open_run(RunFolder(copied))
    assert f"expected {run.base.fingerprint}" in str(caught.value)


def test_another_revision_is_told(run: Run, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a hub model that moved on since: another commit, and other files with it."""
    config = copied / "adapter" / "mtl_lora_config.json"
    content = json.loads(config.read_text())
    content["base_model"] = {"name": "a/b", "revision": "old", "fingerprint": "0" * 32}
    content["checksum"] = config_checksum(content)
    config.write_text(json.dumps(content))
    moved = replace(run.base, name="a/b", revision="new")
    monkeypatch.setattr(room, "find_base_model", lambda name: moved)
    with pytest.raises(UsageError, match=r"\(revision new, expected old, fingerprint"):
        open_run(RunFolder(copied))


def test_the_adapter_read_alone_is_the_loaded_one(run: Run) -> None:
    opened = open_run(run.folder)
    assert opened.checkpoint == run.checkpoint
    ours, theirs = run.adapter.tensors(), opened.packed.adapter.tensors()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    layer = next(iter(run.adapter.layers.values()))
    assert layer.base_layer.weight.untyped_storage().nbytes() == 4, "no base weights"


def test_a_method_that_reads_the_token_is_refused(
    train: Callable[..., Run], stories_folder: Path, tmp_path: Path
) -> None:
    adapter = {"method": "hydralora", "rank": 4, "target_modules": ["q_proj"]}
    with pytest.raises(UsageError, match="by the token, not by the task"):
        merge(train(stories_folder, adapter=adapter), tmp_path / "here" / "out")
    assert not (tmp_path / "here").exists()
