"""What eval refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .mistakes import Bad

CASES = [
    Bad(
        "unknown split",
        ("--split: expected one of train, validation, test, received 'tset'",),
        ("eval", "--task", "warm", "--runs", "RUNS", "--split", "tset"),
    ),
    Bad(
        "unknown task in eval",
        ("unknown task 'warn'; did you mean 'warm'?; tasks of this run: warm, cold",),
        ("eval", "--task", "warn", "--runs", "RUNS"),
        early=False,
    ),
    Bad(
        "a split that the source lacks",
        ("task 'warm': its source has no validation split",),
        ("eval", "--task", "warm", "--runs", "RUNS", "--split", "validation"),
        early=False,
    ),
    Bad(
        "unknown protocol",
        ("--protocol: expected one of choices, generate, lm-eval, received 'choice'; did you mean 'choices'?",),
        ("eval", "--task", "warm", "--runs", "RUNS", "--protocol", "choice"),
        early=False,
    ),
    Bad(
        "unknown normalisation",
        ("--normalisation: expected one of sum, token, character, received 'char'…",),
        ("eval", "--task", "warm", "--runs", "RUNS", "--normalisation", "char"),
        early=False,
    ),
    Bad(
        "a normalisation of generated answers",
        ("--normalisation goes with --protocol choices",),
        ("eval", "--task", "warm", "--runs", "RUNS", "--protocol", "generate", "--normalisation", "sum"),
        early=False,
    ),
    Bad(
        "answers that are drawn where none is generated",
        ("--temperature: no answer of warm is generated; use --protocol generate",),
        ("eval", "--task", "warm", "--runs", "RUNS", "--temperature", "1"),
        early=False,
    ),
    Bad(
        "several answers that are all alike",
        ("--answers: several answers are alike without --temperature above 0",),
        ("eval", "--task", "warm", "--runs", "RUNS", "--answers", "3"),
    ),
    Bad(
        "several answers beside another run's",
        ("--answers above 1 goes without --baseline and --against",),
        ("eval", "--task", "warm", "--runs", "RUNS", "--answers", "3", "--temperature", "1", "--against", "."),
    ),
    Bad(
        "drawn answers of the harness",
        ("--temperature goes with --protocol generate",),
        ("eval", "--task", "warm", "--runs", "RUNS", "--temperature", "1", "--protocol", "lm-eval"),
        early=False,
    ),
    Bad(
        "eval of a run with no finished adapter",
        ("run 'half' has no finished adapter; finish it with: …",),
        ("eval", "--task", "warm", "--run", "half"),
        {"runs/half/recipe.yaml": "RUNS/small/recipe.yaml", "runs/half/tasks.json": "RUNS/small/tasks.json"},
        early=False,
    ),
    Bad(
        "eval of a run whose results cannot be written",
        ("run 'half': runs/half/evaluations is a file, expected a folder",),
        ("eval", "--task", "warm", "--run", "half"),
        {
            "runs/half/recipe.yaml": "RUNS/small/recipe.yaml",
            "runs/half/tasks.json": "RUNS/small/tasks.json",
            "runs/half/evaluations": "x",
        },
        early=False,
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(case: Bad, refused: Callable[[Bad], None]) -> None:
    refused(case)
