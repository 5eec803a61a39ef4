"""What the self-test found is taken again only where nothing that computes has changed."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from mtl_lora_cli.models import trusted
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import load_model
from mtl_lora_cli.models.packed import PackedModel


def test_a_library_that_layers_call_when_it_is_there_asks_again(
    stories_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path))
    base = find_base_model(str(stories_folder))
    packed = PackedModel(load_model(base, dtype=torch.float32, device=torch.device("cpu"))).eval()
    asked = []
    settle = trusted.settle
    monkeypatch.setattr(trusted, "settle", lambda one: asked.append(1) or settle(one))
    for installed, times in (("nothing", 1), ("nothing", 1), ("mambapy", 2), ("mambapy", 2)):
        monkeypatch.setattr(
            trusted, "version", lambda name, new=installed: "1" if name == new else version(name)
        )
        trusted.settled(packed, base)
        assert len(asked) == times, installed
