"""The memory of a step over maps: what a run without numbers counts is what a real one takes."""

from __future__ import annotations

import torch

from mtl_lora_cli.memory.maps import _Live


def test_it_counts_what_lives_at_once() -> None:
    with _Live() as live:
        x = torch.empty(1000, device="meta", requires_grad=True)
        y = x * 2  # 4000 bytes beside x
        view = y.view(10, 100)  # none
        assert live.now == 8000
        z = view.exp()
        del y, view, z
        assert live.now == 4000 and live.most == 12000
        (x.exp() + x.cos()).sum().backward()
    assert 12000 <= live.most - 4000 <= 20000  # exp and cos, their sum, and gradients
