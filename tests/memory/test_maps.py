"""The memory of a step over maps: what a run without numbers counts is what a real one takes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mtl_lora_cli.memory.maps import _attention_of_cards, _Live


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


def test_attention_keeps_no_probabilities() -> None:
    """As the kernels of cards: beside q, k, v and the answer there are a number a query, and the mask filled up."""
    usual = F.scaled_dot_product_attention
    q, k, v = (torch.empty(64, 2, 49, 8, device="meta", requires_grad=True) for _ in range(3))
    mask = torch.empty(64, 1, 49, 49, device="meta")
    with _Live() as live, _attention_of_cards():
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        assert y.shape == q.shape
        kept = 4 * (64 * 2 * 49 * 8 + 64 * 2 * 64 + 64 * 49 * 56)
        assert kept - 4 * 64 * 2 * 64 < live.now <= kept + 64  # a state of random numbers
        five = torch.empty(4, 2, 3, 5, 8, device="meta")
        assert F.scaled_dot_product_attention(five, five, five).shape == five.shape
    assert F.scaled_dot_product_attention is usual
