"""Losses against formulas that are written pixel by pixel."""

from __future__ import annotations

import math

import torch

from mtl_lora_cli.dense.losses import map_losses
from mtl_lora_cli.tasks.maps import MapSpec

NAN = float("nan")


def test_classes() -> None:
    logits = torch.tensor([[[[1.0, 2.0]], [[0.5, -1.0]]]], dtype=torch.float64)
    expected = -math.log(math.exp(0.5) / (math.exp(1.0) + math.exp(0.5)))
    found = map_losses(logits, torch.tensor([[[1, -100]]]), MapSpec("segmentation", 2, ("a", "b")))
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64))


def test_depth_and_normals_leave_out_what_is_not_known() -> None:
    spec = MapSpec("depth", 1, low=1, high=9)
    depth = torch.tensor([[[[2.0, 5.0, 7.0]]], [[[1.0, 1.0, 1.0]]]], requires_grad=True)
    target = torch.tensor([[[3.0, NAN, 4.0]], [[NAN, NAN, NAN]]])
    losses = map_losses(depth, target, spec)
    assert losses.tolist() == [2.0, 0.0]
    losses.sum().backward()
    assert depth.grad is not None
    assert depth.grad.flatten().tolist() == [-0.5, 0, 0.5, 0, 0, 0]
    normals = torch.tensor([0.6, 0.0, 0.8]).view(1, 3, 1, 1).expand(1, 3, 1, 2)
    truth = torch.tensor([[[[0.0, NAN]], [[0.0, 0.0]], [[1.0, 1.0]]]])
    found = map_losses(normals, truth, MapSpec("normals", 3))
    torch.testing.assert_close(found, torch.tensor([0.2]))


def test_edges_weigh_each_kind_by_the_other_s_share() -> None:
    logits = torch.tensor([[[[0.3, -0.7, 1.1, 0.2]]]], dtype=torch.float64)
    target = torch.tensor([[[1.0, 0.0, 0.0, NAN]]], dtype=torch.float64)
    p = [1 / (1 + math.exp(-y)) for y in (0.3, -0.7, 1.1)]
    beta = 2 / 3
    parts = [-beta * math.log(p[0]), *(-(1 - beta) * math.log(1 - q) for q in p[1:])]
    found = map_losses(logits, target, MapSpec("edges", 1))
    torch.testing.assert_close(found, torch.tensor([sum(parts) / 3], dtype=torch.float64))
