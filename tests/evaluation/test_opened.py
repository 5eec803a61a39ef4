"""A run that is opened: each file is read once, and nothing before it is asked for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mtl_lora_cli.adapters import files
from mtl_lora_cli.adapters.files import CONFIG_FILE, TENSOR_FILE
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.evaluation.opened import Run, open_run


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a file of an adapter was read."""
    counts: Counter[str] = Counter()
    read_bytes, load_file = Path.read_bytes, files.load_file

    def counted(self: Path) -> bytes:
        counts[self.name] += 1
        return read_bytes(self)

    def loaded(path: Path, *rest: Any) -> Any:
        counts[Path(path).name] += 1
        return load_file(path, *rest)

    monkeypatch.setattr(Path, "read_bytes", counted)
    monkeypatch.setattr(files, "load_file", loaded)
    return counts


def test_files_then_tensors_then_model(opened: Run, read: Counter[str]) -> None:
    run = open_run(opened.folder)
    assert read[CONFIG_FILE] == read[TENSOR_FILE] == 1
    assert "packed" not in vars(run) and "adapter" not in vars(run)
    assert run.adapter.parameter_count() > 0 and len(run.checkpoint) == 16
    assert run.packed.adapter is not None
    exact = run.but(quantization="none", in_float32=True)
    assert exact.packed is not run.packed and exact.base is run.base
    assert read[CONFIG_FILE] == read[TENSOR_FILE] == 1


def test_who_asks_for_the_adapter_alone_needs_no_base_model(
    opened: Run, read: Counter[str]
) -> None:
    recipe = opened.folder.recipe
    recipe.write_text(
        recipe.read_text().replace(f"base_model: {opened.base.folder}", "base_model: ./gone")
    )
    run = Run(opened.folder)
    assert run.adapter.tasks == tuple(task.name for task in opened.tasks)
    with pytest.raises(UsageError, match=r"'\./gone' does not exist"):
        run.base  # noqa: B018
    with pytest.raises(UsageError, match=r"'\./gone' does not exist"):
        open_run(opened.folder)
