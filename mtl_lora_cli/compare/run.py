"""Running a comparison: one run after the other, or several side by side, each with a small result file.

What is finished is never done again: a run that has a result is passed over, one that was
interrupted goes on from its checkpoint, one that has an adapter is only scored. A run that fails
takes no other with it, and is tried again by the next call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtl_lora_cli.compare.grid import TEST
from mtl_lora_cli.compare.maps import of_maps
from mtl_lora_cli.compare.results import (
    FAILED,
    RESULTS,
    chosen_points,
    is_done,
    read_result,
    result_path,
)
from mtl_lora_cli.compare.rows import validation_rows, write_cuts
from mtl_lora_cli.compare.study import Study, checked_plan, store_plan
from mtl_lora_cli.compare.work import BASE, CHOSEN, LEARN, Job, Work, beside_of
from mtl_lora_cli.compare.workers import WorkerProcesses, processes_for
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.recipe.load import describe_changes, load_recipe
from mtl_lora_cli.recipe.schema import Recipe
from mtl_lora_cli.runs.folder import RunFolder, save_json
from mtl_lora_cli.runs.lock import only_writer
from mtl_lora_cli.training.progress import duration

# What a run decides for itself, or what stands in its own folder in another form.
_NOT_COMPARED = {"run", "base_model"}
_PICKED = {"rows_per_pass", "gradient_checkpointing", "row_length", "rows_per_step", "memory"}


def run_study(study: Study, say: Callable[[str], None], jobs: int = 1) -> dict[str, Any]:
    """Do whatever is not done yet.

    Args:
        study: the plan.
        say: told of each run that is done.
        jobs: how many are done at a time, each in a process of its own.

    Returns:
        plan.json as it is stored.

    Raises:
        UsageError: the folder holds something else, another process works there, or the rows that score
            cannot be read.
        KeyboardInterrupt: the user stopped it; what is finished is kept.
    """
    plan = checked_plan(study)
    _require_ours(study)
    work = Work(study)
    _require_rows(study, work)  # a fault in them shows before anything is written
    store_plan(study.folder, plan)
    with only_writer(RunFolder(study.folder), f"the comparison in {study.folder} is being made"):
        _do(study, plan, work, say, jobs)
    return plan


def _do(
    study: Study, plan: Mapping[str, Any], work: Work, say: Callable[[str], None], jobs: int
) -> None:
    """What is not done yet."""
    (study.folder / RESULTS).mkdir(exist_ok=True)
    write_cuts(study.folder, [task for task in study.tasks if task.name in study.cut])
    runner = _Runner(study, work, jobs, say)
    runner.do([Job(LEARN, run) for run in study.runs if not is_done(_result(study, run.id))])
    runner.do(_what_follows(study, plan))


def _require_rows(study: Study, work: Work) -> None:
    """Read what is there of the rows that score.

    Raises:
        UsageError: a file, a row or a label is wrong.
    """
    options = study.options
    if options.score == TEST:
        assert work.held if of_maps(study.tasks) else work.test_rows
    if options.validated:
        own = [task for task in study.tasks if task.name not in study.cut]
        validation_rows(study.folder, own, (), options.limit)


def _what_follows(study: Study, plan: Mapping[str, Any]) -> list[Job]:
    """What can be asked when all runs have learned: those of the chosen settings, and the base model."""
    results = {run.id: _result(study, run.id) for run in study.runs}
    done = [run for run in study.runs if is_done(results[run.id])]
    jobs = []
    if study.options.sweeps and study.options.score == TEST:
        chosen = chosen_points(plan, results)
        jobs = [
            Job(CHOSEN, run)
            for run in done
            if run.point.label == chosen[run.method] and (results[run.id] or {}).get(TEST) is None
        ]
    beside = beside_of(study)
    if done and beside is not None and not is_done(_result(study, beside)):
        jobs.append(Job(BASE, done[0], beside))
    return jobs


def _result(study: Study, name: str) -> dict[str, Any] | None:
    return read_result(study.folder, name)


@dataclass
class _Runner:
    """Has jobs done, counts what is left, and keeps going when one fails.

    Attributes:
        study: the plan.
        work: does a job in this process.
        most: jobs at a time.
        say: told of each job that is done.
    """

    study: Study
    work: Work
    most: int
    say: Callable[[str], None]

    def do(self, jobs: Sequence[Job]) -> None:
        """Work through some jobs, in no more processes than there are jobs.

        Raises:
            UsageError: all that began first failed with one: the recipe is wrong for every run.
        """
        with processes_for(self.study, self.work, min(self.most, len(jobs))) as processes:
            self._watch(jobs, processes)

    def _watch(self, jobs: Sequence[Job], processes: WorkerProcesses) -> None:
        started, done, failed = time.monotonic(), 0, 0
        first = {job.name for job in jobs[: processes.count]}
        try:
            for job, outcome in processes.each(jobs):
                done += 1
                first.discard(job.name)
                said = outcome.said
                if outcome.failed:
                    if outcome.usage is not None and not first and not self._anything_done():
                        raise outcome.usage
                    failed += 1
                    said = f"failed: {self._failed(job, said)}"
                left = len(jobs) - done
                seconds = (time.monotonic() - started) / done * left
                rest = f", {duration(seconds)}" if left else ""
                self.say(f"{job.name}: {said}; {left} left{rest}")
        except KeyboardInterrupt:
            at = ", ".join(processes.busy())
            raise KeyboardInterrupt(
                f"stopped{f' in {at}' if at else ''}; {done - failed} of {len(jobs)} runs were "
                f"finished, the same command goes on"
            ) from None

    def _anything_done(self) -> bool:
        return any(is_done(_result(self.study, run.id)) for run in self.study.runs)

    def _failed(self, job: Job, text: str) -> str:
        """Write down why; a run that is done stays done when its scoring failed."""
        reason = " ".join(text.split())[:500]
        if not is_done(_result(self.study, job.name)):
            about = {"id": job.name} if job.kind == BASE else job.run.to_json()
            save_json(
                result_path(self.study.folder, job.name),
                {**about, "status": FAILED, "reason": reason},
            )
        return reason


def _require_ours(study: Study) -> None:
    """Refuse what stands in the folder and was made by other recipes.

    Raises:
        UsageError: naming the run and the difference.
    """
    for run in study.runs:
        wanted = _comparable(run.recipe)
        result = read_result(study.folder, run.id)
        if is_done(result):
            assert result is not None
            _refuse(study.folder, run.id, _without_names(result["recipe"]), wanted)
        path = study.folder / "runs" / run.id / "recipe.yaml"
        if path.is_file():
            found = _comparable(load_recipe(path).recipe)
            if run.recipe.training.memory == "auto":
                for recipe in (found, wanted):
                    for key in _PICKED:
                        recipe["training"].pop(key)
            _refuse(study.folder, run.id, found, wanted)


def _refuse(folder: Path, run: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    changes = describe_changes(found, wanted)
    if changes:
        raise UsageError(
            f"{folder}: the run {run} was made by another recipe: {'; '.join(changes)[:500]}; "
            f"choose another --output"
        )


def _comparable(recipe: Recipe) -> dict[str, Any]:
    return _without_names(recipe.model_dump(mode="json"))


def _without_names(dump: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in dump.items() if key not in _NOT_COMPARED}
