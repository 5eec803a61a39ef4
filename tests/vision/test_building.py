"""A model is built as it is asked for, whatever other threads build meanwhile."""

from __future__ import annotations

import threading

import torch

from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.models.load import load_model, skeleton


def test_what_another_thread_counts_on_a_skeleton_changes_no_weight_s_dtype(
    llava: BaseModel,
) -> None:
    """As in `eval`, which counts picture tokens while the model is loaded."""
    ended = threading.Event()

    def count() -> None:
        while not ended.is_set():
            skeleton(llava)

    other = threading.Thread(target=count)
    other.start()
    try:
        for _ in range(4):
            model = load_model(llava, dtype=torch.bfloat16, device=torch.device("cpu"))
            assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    finally:
        ended.set()
        other.join()
    assert torch.get_default_dtype() == torch.float32
