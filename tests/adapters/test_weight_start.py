"""DoRA and PiSSA beside PEFT's own, in float64: they start from the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtl_lora_cli.adapters.inject import Adapter, inject
from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.adapters.weight_start import start_from_weights
from mtl_lora_cli.errors import UsageError

peft = pytest.importorskip("peft")


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(7, 5, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def ours(holder: Holder, method: str) -> tuple[Holder, Adapter]:
    own = Holder()
    own.load_state_dict(holder.state_dict())
    config = configure(method, rank=3, alpha=5.0, target_modules=["proj"])
    adapter = inject(own, config, ["a", "b"])
    start_from_weights(adapter)
    return own, adapter


def theirs(holder: Holder, **settings: Any) -> Any:
    config = peft.LoraConfig(r=3, lora_alpha=5.0, target_modules=["proj"], **settings)
    return peft.get_peft_model(holder, config, autocast_adapter_dtype=False).double()


def asked(model: nn.Module, adapter: Adapter, x: Tensor) -> Tensor:
    with adapter.routing.assign(torch.zeros(len(x), dtype=torch.long)):
        found: Tensor = model(x)
    return found


def test_dora_is_pefts_dora() -> None:
    torch.manual_seed(0)
    holder = Holder()
    model, adapter = ours(holder, "dora")
    x, weighting = (torch.randn(6, n, dtype=torch.float64) for n in (7, 5))
    torch.testing.assert_close(asked(model, adapter, x), holder(x), rtol=1e-12, atol=1e-12)
    other = theirs(holder, use_dora=True).base_model.model.proj
    layer: Any = adapter.layers["proj"]
    magnitude = other.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(layer.magnitude.data, magnitude.data.double(), rtol=1e-6, atol=0)
    pairs = [
        (layer.lora_A, other.lora_A["default"].weight, 0),
        (layer.lora_B, other.lora_B["default"].weight, 0),
        (layer.magnitude, magnitude, None),
    ]
    with torch.no_grad():
        for own, peft_s, index in pairs:
            own.copy_(torch.randn_like(own))
            peft_s.copy_(own if index is None else own[index])
    found = asked(model, adapter, x)
    expected = other(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    (found * weighting).sum().backward()
    (expected * weighting).sum().backward()
    for own, peft_s, index in pairs:
        gradient = own.grad if index is None else own.grad[index]
        torch.testing.assert_close(gradient, peft_s.grad, rtol=1e-10, atol=1e-10)


def test_pissa_is_pefts_pissa(tmp_path: Path) -> None:
    """Its start, its function, and what PEFT's own conversion makes of what was learned."""
    torch.manual_seed(0)
    holder = Holder().float().double()  # PEFT begins in float32
    weight = holder.proj.weight.detach().clone()
    model, adapter = ours(holder, "pissa")
    x = torch.randn(6, 7, dtype=torch.float64)
    torch.testing.assert_close(asked(model, adapter, x), holder(x), rtol=1e-12, atol=1e-12)
    bias = holder.proj.bias.detach().clone()
    wrapped = theirs(holder.float(), init_lora_weights="pissa")
    other = wrapped.base_model.model.proj
    layer: Any = adapter.layers["proj"]
    residual = weight - 5 / 3 * layer.start_B[0] @ layer.start_A[0]
    torch.testing.assert_close(residual, other.base_layer.weight.double(), rtol=1e-5, atol=1e-6)
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(str(tmp_path / "start"))
    wrapped.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for own, peft_s in (
            (layer.lora_A, other.lora_A["default"].weight),
            (layer.lora_B, other.lora_B["default"].weight),
        ):
            change = 0.1 * torch.randn_like(peft_s)
            # Singular vectors have either sign; both A and B have the same one.
            sign = torch.sign((layer.start_A[0] * other.lora_A["default"].weight).sum(1))
            peft_s += change
            own[0] += change * (sign[:, None] if own is layer.lora_A else sign)
    torch.testing.assert_close(asked(model, adapter, x), other(x), rtol=1e-5, atol=1e-5)
    wrapped.save_pretrained(
        str(tmp_path / "lora"), path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    plain = Holder()
    plain.proj.weight.data.copy_(weight)
    plain.proj.bias.data.copy_(bias)
    converted = peft.PeftModel.from_pretrained(plain, str(tmp_path / "lora"))
    delta = converted.base_model.model.proj.get_delta_weight("default").double()
    down, up = adapter.layers["proj"].task_update(1)
    assert len(down) == 6
    torch.testing.assert_close(5 / 3 * up @ down, delta, rtol=1e-4, atol=1e-5)


def test_what_starts_nowhere_is_refused() -> None:
    holder = Holder()
    config = configure("pissa", rank=6, target_modules=["proj"])
    with pytest.raises(UsageError, match="its rank is less than 6"):
        start_from_weights(inject(holder, config, ["a"]))
    with pytest.raises(ValueError, match="'dropout' is 0 with method: pissa"):
        configure("pissa", dropout=0.1)


def test_dora_is_no_lora() -> None:
    _, adapter = ours(Holder(), "dora")
    with pytest.raises(UsageError, match="gives the weights' rows lengths of their own"):
        adapter.layers["proj"].task_update(0)
