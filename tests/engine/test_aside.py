"""What runs beside the rest in a captured pass: the same gradients, all of them waited for before anybody reads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mtl_lora_cli.adapters.function import AdapterProducts
from mtl_lora_cli.engine import aside
from mtl_lora_cli.engine.group import Group
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.training.passes import add_gradients
from mtl_lora_cli.training.update import gradients_of

from .double import adapt_all, examples, in_double, packed_row, tiny


class Late(aside.Aside):
    """A stream that is late, without a card: what was made there holds no number until it is waited for."""

    def __init__(self) -> None:
        self.works = 0
        self.made: list[tuple[Tensor, Tensor]] = []

    @contextmanager
    def work(self, read: Any) -> Iterator[None]:
        self.works += 1
        yield

    def keep(self, found: Any) -> Any:
        for one in found:
            if one is not None:
                self.made.append((one, one.clone()))
                one.fill_(float("nan"))
        return found

    def join(self) -> None:
        for one, value in self.made:
            one.copy_(value)
        self.made.clear()


def test_nobody_reads_what_is_not_there_yet(monkeypatch: Any) -> None:
    model = tiny("llama")
    adapter = adapt_all(model)
    parameters = [one.requires_grad_() for one in adapter.tensors().values()]
    packed, batch, late = (
        PackedModel(model, adapter, engine="fused"),
        packed_row(examples()),
        Late(),
    )
    found = []
    last, mixing = Group._parameter_gradients, AdapterProducts._mixing_gradient
    for stream in (None, late):
        gradients_of(parameters)
        with in_double(), packed.routed(batch), aside.opened(stream):
            if stream is not None:
                monkeypatch.setattr(
                    Group, "_parameter_gradients", lambda *given: late.keep(last(*given))
                )
                monkeypatch.setattr(
                    AdapterProducts,
                    "_mixing_gradient",
                    lambda *given: late.keep([mixing(*given)])[0],
                )
            add_gradients(packed(batch).sum(), parameters)
        found.append([one.grad.clone() for one in parameters if one.grad is not None])
        for one in parameters:
            one.grad = None
    assert late.works == 8 * len(packed.decoder.layers) and not late.made
    for apart, beside in zip(*found, strict=True):
        assert torch.equal(apart, beside)
    assert any(one.any() for one in found[0])
