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
from mtl_lora_cli.models.base import BaseModel

SIZE = 4096  # of the matrices, 32 MiB each in bfloat16


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """256 MiB of random weights in one file: half to change, half to leave."""
    folder = tmp_path_factory.mktemp("base")
    weight = torch.rand(SIZE, SIZE).bfloat16()
    tensors = {f"{number}.weight": weight.clone() for number in range(8)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")
    return BaseModel("random", folder, None, "")


def peak(reset: bool = False) -> int:
    """This process's most resident memory so far, in MiB."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def measured(work: Callable[[], Any], answer: Connection) -> None:
    """What `work` adds to the memory of a process that does nothing else."""
    before = peak(reset=True)
    work()
    answer.send(peak() - before)


def write(base: BaseModel, updates: dict[str, Update], folder: Path) -> None:
    write_merged(plan_merge(base, updates), folder)


def test_writing_needs_blocks_not_files(base: BaseModel, tmp_path: Path) -> None:
    updates = {
        f"{number}.weight": (torch.rand(8, SIZE), torch.rand(SIZE, 8), 2.0) for number in range(4)
    }
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mtl_lora_cli.export.run_merge"])
    here, there = context.Pipe()
    work = partial(write, base, updates, tmp_path)
    process = context.Process(target=measured, args=(work, there))
    process.start()
    taken = here.recv()
    process.join()
    print(f"{taken} MiB for a file of 256 MiB")
    assert (tmp_path / "model.safetensors").stat().st_size > 2**28
    assert taken < 128
