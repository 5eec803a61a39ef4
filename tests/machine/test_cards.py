"""What there is of a device's memory, and for whom."""

from __future__ import annotations

import psutil
import pytest
import torch

from mtl_lora_cli.machine.cards import SHARING, free_memory, memory_in_use, pick_dtype

CPU = torch.device("cpu")


def test_who_shares_a_device_plans_with_a_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, _ = free_memory(CPU)
    monkeypatch.setenv(SHARING, "1000")
    share, _ = free_memory(CPU)
    assert share == psutil.virtual_memory().total // 1000 < alone


def test_memory_in_use_is_this_process_s() -> None:
    text = memory_in_use(CPU)
    own = float(text.removeprefix("the CPU: ").split()[0])
    assert own == pytest.approx(psutil.Process().memory_info().rss / 2**30, abs=0.06)


@pytest.mark.parametrize(
    ("name", "device", "dtype"),
    [
        ("auto", "cpu", torch.float32),
        ("auto", "cuda", torch.bfloat16),
        ("bfloat16", "cpu", torch.bfloat16),
    ],
)
def test_the_dtype_that_is_asked_for(name: str, device: str, dtype: torch.dtype) -> None:
    assert pick_dtype(name, torch.device(device)) == dtype
