"""What writing a merged model takes of memory does not grow with the model."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mtl_lora_cli.export.merge import Update, plan_merge, write_merged
from mtl_lora_cli.export.weight_names import weight_names
from mtl_lora_cli.models.base import BaseModel, find_base_model

SIZE = 4096  # of the matrices, 32 MiB each in bfloat16


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """More than 224 MiB of random weights in one file: about half to change, half to leave."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        vocab_size=16, hidden_size=SIZE, intermediate_size=SIZE, num_hidden_layers=1
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = LlamaForCausalLM(config).state_dict()
    weight = torch.rand(SIZE, SIZE).bfloat16()
    tensors = {
        name: weight[: w.shape[0]].clone().view(w.shape)
        if w.ndim == 2
        else w.new_ones(w.shape, device="cpu")
        for name, w in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return find_base_model(str(folder))


def peak(reset: bool = False) -> int:
    """This process's most resident memory so far, in MiB."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def measured(work: Callable[[], Any], base: BaseModel, answer: Connection) -> None:
    """What `work` adds to the memory of a process that has all libraries and does nothing else."""
    weight_names(base)
    before = peak(reset=True)
    work()
    answer.send(peak() - before)


def write(base: BaseModel, updates: dict[str, Update], folder: Path) -> None:
    write_merged(plan_merge(base, updates), folder)


@pytest.mark.slow
def test_writing_needs_blocks_not_files(base: BaseModel, tmp_path: Path) -> None:
    updates = {
        f"model.layers.0.self_attn.{name}_proj.weight": (
            torch.rand(8, SIZE),
            torch.rand(SIZE, 8),
            2.0,
        )
        for name in "qkvo"
    }
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mtl_lora_cli.export.write"])
    here, there = context.Pipe()
    work = partial(write, base, updates, tmp_path)
    process = context.Process(target=measured, args=(work, base, there))
    process.start()
    taken = here.recv()
    process.join()
    print(f"{taken} MiB for a file of 224 MiB")
    assert (tmp_path / "model.safetensors").stat().st_size > 7 * 2**25
    assert taken < 128
