"""What merge and export refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .mistakes import Bad

CASES = [
    Bad(
        "unknown format of an export",
        ("--format: expected merged, peft, gguf, gguf-merged, onnx, received 'gguff'; did you mean 'gguf'?",),
        ("export", "--task", "warm", "--runs", "RUNS", "--format", "gguff"),
    ),
    Bad(
        "a lower rank of a merged model",
        ("--rank is for adapters; a merged model has none",),
        ("export", "--task", "warm", "--runs", "RUNS", "--format", "gguf-merged", "--rank", "2"),
    ),
    Bad(
        "unknown task in merge",
        ("unknown task 'warn'; did you mean 'warm'?; tasks of this run: warm, cold",),
        ("merge", "--task", "warn", "--runs", "RUNS"),
        early=False,
    ),
    Bad(
        "merge into a folder that is not empty",
        ("output folder full exists and is not empty; choose another with --output",),
        ("merge", "--task", "warm", "--runs", "RUNS", "--output", "full"),
        {"full/x.txt": "x"},
        early=False,
    ),
    *(
        Bad(
            f"{command} below a file",
            ("output folder a/b/c: a is a file, expected a folder",),
            (command, "--task", "warm", "--runs", "RUNS", "--output", "a/b/c"),
            {"a": "x"},
            early=False,
        )
        for command in ("merge", "export")
    ),
    Bad(
        "merge of all tasks into one folder",
        ("--output names one folder; merge one task at a time with it",),
        ("merge", "--task", "all", "--runs", "RUNS", "--output", "one"),
        early=False,
    ),
    Bad(
        "an export at a higher rank than the adapter's",
        ("--rank 9: the update of task 'warm' has rank 8; expected at most that",),
        ("export", "--task", "warm", "--runs", "RUNS", "--rank", "9"),
        early=False,
    ),
    Bad(
        "merge of a run with no finished adapter",
        ("run 'half' has no finished adapter; finish it with: …",),
        ("merge", "--task", "warm", "--run", "half"),
        {"runs/half/recipe.yaml": "RUNS/small/recipe.yaml", "runs/half/tasks.json": "RUNS/small/tasks.json"},
        early=False,
    ),
    Bad(
        "merge into weights of no kind",
        ("--base: expected original or dequantized, received 'orginal'; did you mean 'original'?",),
        ("merge", "--task", "warm", "--runs", "RUNS", "--base", "orginal"),
        early=False,
    ),
    Bad(
        "dequantized weights of a run that is not quantised",
        (
            "--base dequantized is for quantised runs; run 'small' has quantization: none, so the "
            "original weights are what it saw",
        ),
        ("merge", "--task", "warm", "--runs", "RUNS", "--base", "dequantized"),
        early=False,
    ),
    Bad(
        "pushing several tasks into one repository",
        ("--push names one repository; push one task at a time",),
        ("merge", "--task", "all", "--runs", "RUNS", "--push", "me/it"),
        early=False,
    ),
    Bad(
        "pushing what nobody checked",
        ("--push does not go with --no-check: what is passed on has been compared",),
        ("merge", "--task", "warm", "--runs", "RUNS", "--push", "me/it", "--no-check"),
        early=False,
    ),
    Bad(
        "pushing to what is no name",
        ("--push: Repo id must …",),
        ("export", "--task", "warm", "--runs", "RUNS", "--push", "me/it/there"),
        early=False,
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(case: Bad, refused: Callable[[Bad], None]) -> None:
    refused(case)
