"""The seed decides everything: two runs with one seed give the same adapter, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ..forks import Ended

pytestmark = pytest.mark.slow

SHORT = (
    "training.max_steps=8",
    "adapter.dropout=0.2",
    "adapter.gate=embedding",
    "tasks.sst2.max_examples=100",
)


def test_one_seed_one_adapter(
    command: Callable[..., Ended],
    workplace: Path,
    stories_folder: Path,
) -> None:
    def train(name: str) -> Path:
        base = f"base_model={stories_folder.resolve()}"
        command("train", "real-small", base, *SHORT, "training.seed=3", f"run.name={name}")
        return workplace / "runs" / name

    first, again = train("first"), train("again")
    for file in ("adapter/mtl_lora.safetensors", "adapter/mtl_lora_config.json"):
        assert (first / file).read_bytes() == (again / file).read_bytes()
