"""What a training run refuses before it begins: its folder, its start, what it goes on with or adds to."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .mistakes import TRAIN, Bad, more, recipe

CASES = [
    Bad(
        "--run with a new run",
        ("--run goes with --resume; a new run is named by run.name=NAME",),
        (*TRAIN, "--run", "x"),
    ),
    Bad(
        "a run folder that exists",
        ("run folder runs/new exists; choose another run.name, or go on with: …",),
        files={"runs/new/notes.txt": "mine"},
        early=False,
    ),
    Bad(
        "a run folder that exists, found in a dry run",
        ("run folder runs/new exists; choose another run.name, or go on with: …",),
        (*TRAIN, "--dry-run"),
        {"runs/new/notes.txt": "mine"},
        early=False,
    ),
    Bad(
        "resuming a finished run",
        ("run 'small' is finished; nothing is left to resume",),
        ("train", "--resume", "--runs", "RUNS"),
        early=False,
    ),
    Bad(
        "beginning at a run that is not there",
        ("no run 'nobody' in runs; runs: none",),
        ("train", "recipe.yaml", "--from", "nobody"),
    ),
    Bad(
        "beginning at a run, and going on with another",
        ("--from goes without --resume and --find-rate",),
        ("train", "--resume", "--from", "small", "--runs", "RUNS"),
    ),
    Bad(
        "beginning at another adapter",
        (
            "the recipe differs from that of run 'small', at which it begins: …",
        ),
        ("train", "recipe.yaml", "--from", "small", "adapter.rank=3", "--runs", "RUNS"),
        early=False,
    ),
    Bad(
        "adding a task to a run with no finished adapter",
        ("run 'half' has no finished adapter; finish it with: …",),
        ("add-task", "recipe.yaml", "--run", "half"),
        {"runs/half/recipe.yaml": "RUNS/small/recipe.yaml", "runs/half/tasks.json": "RUNS/small/tasks.json"},
    ),
    Bad(
        "adding a task that the run has",
        ("recipe.yaml:2: tasks: run 'small' has a task 'warm' already; choose another name",),
        ("add-task", "recipe.yaml", "--runs", "RUNS"),
        recipe("name: color", "name: warm"),
        early=False,
    ),
    Bad(
        "adding a task on another adapter",
        (
            "the recipe differs from that of run 'small', which it adds to: adapter.rank: 8 → 4; "
            "adapter.gate: 'embedding' → 'weights'",
        ),
        ("add-task", "recipe.yaml", "adapter.gate=weights", "--runs", "RUNS"),
        more("adapter: {rank: 4}\n"),
        early=False,
    ),
    Bad(
        "adding a task and asking for cosines between tasks",
        ("recipe.yaml:8: training.diagnose: looks at what tasks share, which does not learn here",),
        ("add-task", "recipe.yaml", "--runs", "RUNS"),
        more("training: {diagnose: true}\n"),
        early=False,
    ),
    Bad(
        "adding a task under the name of a run that exists",
        ("run folder RUNS/small exists; choose another run.name, …",),
        ("add-task", "recipe.yaml", "run.name=small", "--runs", "RUNS"),
        early=False,
    ),
    Bad(
        "validation without a validation split",
        ("recipe.yaml:9: training.validation: no task's source has a validation split",),
        files=more("training:\n  validation: {every: 5}\n"),
        early=False,
    ),
    Bad(
        "a DeepSpeed file that writes elsewhere",
        (
            "TMP/ds.json: csv_monitor: is not done: it writes outside of the run folder",
            "TMP/ds.json: flops_profiler.output_file: is not done: it writes outside of the run folder",
        ),
        files={
            **more("distributed: {zero_stage: 1, deepspeed: ds.json}\n"),
            "ds.json": '{"csv_monitor": {"enabled": true}, "flops_profiler": {"output_file": "/x"}}',
        },
        early=False,
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(case: Bad, refused: Callable[[Bad], None]) -> None:
    refused(case)
