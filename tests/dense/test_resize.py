"""Products that resize maps, against torch's interpolation and its gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mtl_lora_cli.dense import resize


@pytest.mark.parametrize("channels", [1, 3, 24])
@pytest.mark.parametrize("onto", [False, True])
def test_products_are_the_interpolation(channels: int, onto: bool) -> None:
    size = (20, 28)
    maps = [
        torch.randn(2, channels, *sides, dtype=torch.float64, requires_grad=True)
        for sides in ((10, 14), (5, 7), (3, 28))
    ]
    below = torch.randn(2, channels, *size, dtype=torch.float64) if onto else None
    weights = resize.weights_of(maps, size)
    assert weights is not None
    found = resize.by_products(maps, weights, below)
    expected = sum(F.interpolate(one, size=size, mode="bilinear") for one in maps)
    expected = expected if below is None else expected + below
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    upstream = torch.randn_like(found)
    mine, theirs = (torch.autograd.grad(y, maps, upstream) for y in (found, expected))
    for one, two in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


@torch.no_grad()
def test_without_gradients_the_sum_is_written_over_the_map_of_its_size() -> None:
    maps = [torch.randn(2, 16, *sides, dtype=torch.float64) for sides in ((10, 14), (5, 7))]
    maps = [one.to(memory_format=torch.channels_last) for one in maps]
    expected = maps[0] + F.interpolate(maps[1], size=(10, 14), mode="bilinear")
    weights = resize.weights_of(maps[1:], (10, 14))
    assert weights is not None
    found = resize.by_products(maps[1:], weights, maps[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    assert found.data_ptr() == maps[0].data_ptr()


def test_half_precision_takes_what_it_can_hold() -> None:
    x = torch.zeros(1, 3, 14, 16, dtype=torch.bfloat16)
    assert resize.weights_of([x], (56, 128)) is not None
    assert resize.weights_of([x], (49, 128)) is None
