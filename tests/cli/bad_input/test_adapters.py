"""Bad keys of the adapter: what the method does not read, what the model does not have."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .mistakes import TRAIN, Bad, more

CASES = [
    Bad(
        "shuffled ids of a method that knows no tasks",
        (
            "recipe.yaml:1: training.shuffled_tasks: adapter.method: moelora with tied: true has no part of a "
            "task's own, so shuffled ids change nothing; leave it out",
        ),
        files=more(
            "training: {shuffled_tasks: true}\nadapter: {method: moelora, tied: true}\n"
        ),
    ),
    Bad(
        "a control that the method does not have",
        ("recipe.yaml:10: adapter.tied: 'tied' is not read by method: multilora, only by…",),
        files=more("adapter:\n  method: multilora\n  tied: true\n"),
    ),
    Bad(
        "unknown part of the adapter",
        ("recipe.yaml:10: training.parts.gates: unknown key; did you mean 'gate'?",),
        files=more("training:\n  parts:\n    gates: {learning_rate: 1.0e-3}\n"),
    ),
    Bad(
        "parts of a larger rank than the layer's",
        ("recipe.yaml:8: adapter: 'up_rank' is at most the rank of a layer, 4, received 8",),
        files=more("adapter: {method: mtl-lora-fine, rank: 4, up_rank: 8}\n"),
    ),
    Bad(
        "a start from the gradient where there is none",
        (
            "recipe.yaml:8: adapter: 'down_start: gradient' is not for multilora: its A has no gradient at the "
            "start",
        ),
        files=more("adapter: {method: multilora, down_start: gradient}\n"),
    ),
    Bad(
        "a target module that matches nothing",
        (
            "adapter.target_modules: 'q_prog' matches no linear layer of the model; did you mean "
            "'q_proj'?; linear layers: down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, "
            "up_proj, v_proj",
        ),
        (*TRAIN, "adapter.target_modules=[q_prog]"),
        early=False,
    ),
    Bad(
        "a part that the adapter does not have",
        ("training.parts: this adapter (method lora) has no gate; its parts: down, up",),
        files=more(
            "adapter:\n  method: lora\ntraining:\n  parts: {gate: {learning_rate: 1.0e-3}}\n"
        ),
        early=False,
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(case: Bad, refused: Callable[[Bad], None]) -> None:
    refused(case)
