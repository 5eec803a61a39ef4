"""What stands between an expert's products, in plain torch and as kernels: against autograd in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from mtl_lora_cli.kernels.clamped import Clamped
from mtl_lora_cli.kernels.expert_gate import ExpertActivation, expert_gated, expert_gated_gradient
from mtl_lora_cli.kernels.pair_mix import pair_mix_gradient
from mtl_lora_cli.kernels.row_sums import row_sums

CLAMPED = Clamped(alpha=1.702, limit=1.5)


def by_others(both: Tensor, activation: ExpertActivation) -> Tensor:
    """As transformers has it."""
    if isinstance(activation, Clamped):
        own = SimpleNamespace(alpha=activation.alpha, limit=activation.limit)
        return GptOssExperts._apply_gate(own, both)
    gate, up = both.chunk(2, dim=-1)
    f = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return f * up


@pytest.fixture(params=["plain", "triton"], autouse=True)
def _kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "triton" and torch.cuda.is_available():
        pytest.skip("in the interpreter, on a CPU")
    monkeypatch.setenv("MTL_LORA_KERNELS", request.param)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", CLAMPED], ids=str)
def test_the_gate_is_transformers(activation: ExpertActivation) -> None:
    torch.manual_seed(0)
    both, values, da = 2 * torch.randn(5, 2 * 33), torch.rand(5), torch.randn(5, 33)
    leaves = [one.double().requires_grad_() for one in (both, values)]
    right = by_others(leaves[0], activation) * leaves[1][:, None]
    wanted, dvalues = torch.autograd.grad(right, leaves, da.double())
    close = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(expert_gated(both, values, activation), right.detach(), **close)
    gradient, through, again = expert_gated_gradient(
        da, both.clone(), values, activation, again=True
    )
    torch.testing.assert_close(gradient, wanted, **close)
    torch.testing.assert_close(through, dvalues * values, **close)
    torch.testing.assert_close(again, right.detach(), **close)


def test_the_gradient_of_each_experts_mixing() -> None:
    """An empty expert, pairs without a task, and a task that nobody has."""
    torch.manual_seed(0)
    ends, tasks = torch.tensor([70, 70, 75], dtype=torch.int32), 2
    du, z = torch.randn(75, 5), torch.randn(75, 3)
    task = torch.randint(-1, 1, (75,))
    expert = torch.searchsorted(ends, torch.arange(75), right=True)
    slot = torch.where(task >= 0, expert * tasks + task, -1).to(torch.int32)
    wanted = torch.zeros(6, 5, 3, dtype=torch.float64)
    for number, place in enumerate(slot.tolist()):
        if place >= 0:
            wanted[place] += torch.outer(du[number], z[number])
    found = pair_mix_gradient(du, z, slot, ends, torch.Size((6, 5, 3)))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, check_dtype=False)


def test_rows_are_summed() -> None:
    x, places = torch.randn(12, 20), torch.randperm(12).view(6, 2)
    wanted = torch.stack([x[one].sum(0) for one in places])
    torch.testing.assert_close(row_sums(x, places), wanted)
