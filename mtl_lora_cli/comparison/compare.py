"""Running a comparison: one run after the other in one process, each with a small result file.

What is finished is never done again: a run that has a result is passed over, one that was
interrupted goes on from its checkpoint, one that has an adapter is only scored. A run that fails
takes no other with it, and is tried again by the next call.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mtl_lora_cli.comparison.grid import UNTRAINED
from mtl_lora_cli.comparison.results import (
    DONE,
    FAILED,
    RESULTS,
    average,
    chosen_points,
    is_done,
    pack,
    read_result,
    result_path,
)
from mtl_lora_cli.comparison.rows import report_rows, validation_rows, write_cuts
from mtl_lora_cli.comparison.study import PlannedRun, Study, store_plan
from mtl_lora_cli.comparison.timing import release, reset_peak
from mtl_lora_cli.data.prepare import Examples
from mtl_lora_cli.errors import MtlLoraError, UsageError
from mtl_lora_cli.evaluation.evaluate import Setting, predict
from mtl_lora_cli.evaluation.open_run import OpenRun, open_run
from mtl_lora_cli.models.load import pick_device
from mtl_lora_cli.recipe.load import describe_changes, load_recipe
from mtl_lora_cli.recipe.schema import Recipe
from mtl_lora_cli.report.events import training_facts
from mtl_lora_cli.runs.folder import RunFolder, read_json, save_json
from mtl_lora_cli.training import run as training
from mtl_lora_cli.training.checkpoints import newest_checkpoint
from mtl_lora_cli.training.prepare import prepare
from mtl_lora_cli.training.progress import duration

# What a run decides for itself, or what stands in its own folder in another form.
_NOT_COMPARED = {"run", "base_model"}
_PICKED = {"rows_per_pass", "gradient_checkpointing", "row_length", "rows_per_step", "memory"}


def run_study(study: Study, say: Callable[[str], None]) -> dict[str, Any]:
    """Do whatever is not done yet.

    Args:
        study: the plan.
        say: told of each run that is done.

    Returns:
        plan.json as it is stored.

    Raises:
        UsageError: the folder holds something else, or the rows that score cannot be read.
        KeyboardInterrupt: the user stopped it; what is finished is kept.
    """
    _require_ours(study)
    limit = study.options.limit
    rows = report_rows(study.tasks, limit)  # a fault in them shows before anything is written
    plan = store_plan(study)
    (study.folder / RESULTS).mkdir(exist_ok=True)
    write_cuts(study.folder, [task for task in study.tasks if task.name in study.cut])
    runner = _Runner(study, rows, say)
    swept = bool(study.options.sweeps)
    if swept:
        runner.validation = validation_rows(study.folder, study.tasks, study.cut, limit)
    first = [run for run in study.runs if not is_done(read_result(study.folder, run.id))]
    runner.do(first, lambda run: runner.learn(run, score_test=not swept))
    if swept:
        results = {run.id: read_result(study.folder, run.id) for run in study.runs}
        chosen = chosen_points(plan, results)
        second = [
            run
            for run in study.runs
            if run.point.label == chosen[run.method]
            and is_done(results[run.id])
            and (results[run.id] or {}).get("test") is None
        ]
        runner.do(second, runner.score_chosen)
    return plan


@dataclass
class _Runner:
    """Does runs, counts what is left, and keeps going when one fails.

    Attributes:
        study: the plan.
        rows: of each task, that are reported.
        say: told of each run that is done.
        validation: of each task, that choose settings.
    """

    study: Study
    rows: list[Examples]
    say: Callable[[str], None]
    validation: list[Examples] | None = None

    def do(self, runs: list[PlannedRun], work: Callable[[PlannedRun], str]) -> None:
        """Work through some of the runs."""
        started = time.monotonic()
        for number, run in enumerate(runs):
            try:
                said = work(run)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"stopped in {run.id}; {number} of {len(runs)} runs were finished, the same "
                    f"command goes on"
                ) from None
            except Exception as error:
                if isinstance(error, UsageError) and not self._anything_done():
                    raise  # the recipe is wrong, and so it is for every run
                # Whatever it is: an hour of other runs must not be lost with it.
                said = self._failed(run, error)
            release(pick_device())
            left = len(runs) - number - 1
            seconds = (time.monotonic() - started) / (number + 1) * left
            self.say(f"{run.id}: {said}; {left} left" + (f", {duration(seconds)}" if left else ""))

    def learn(self, run: PlannedRun, *, score_test: bool) -> str:
        """Train, score, and write the result; what to say of it."""
        started = time.monotonic()
        reset_peak(pick_device())
        folder = _trained(self.study, run)
        release(pick_device())  # the model that learned, before it is loaded to be asked
        opened = open_run(folder)
        result: dict[str, Any] = {
            "id": run.id,
            "status": DONE,
            "reason": None,
            **{k: v for k, v in run.to_json().items() if k not in ("id", "parameters")},
            "parameters": opened.adapter.parameter_count(),
            "planned_parameters": run.parameters,
            "recipe": run.recipe.model_dump(mode="json"),
            **training_facts(folder.events()),
            "environment": {
                k: v for k, v in read_json(folder.environment).items() if k != "format_version"
            },
            "validation": None,
            "test": None,
        }
        if self.validation is not None:
            result["validation"] = self._scores(opened, self.validation)
        if score_test:
            result["test"] = self._scores(opened, self.rows)
            self._score_untrained(opened)
        result["seconds_in_all"] = time.monotonic() - started
        save_json(result_path(self.study.folder, run.id), result)
        shutil.rmtree(folder.checkpoints, ignore_errors=True)  # nothing is left to resume
        split = "test" if score_test else "validation"
        return (
            f"average {average(result[split]):.3f} on {_split_name(result[split])}, "
            f"{result['tokens_per_second']:,.0f} tokens/s, {duration(result['seconds_in_all'])}"
        )

    def score_chosen(self, run: PlannedRun) -> str:
        """Score a run of the chosen setting on test."""
        opened = open_run(_trained(self.study, run))
        result = read_result(self.study.folder, run.id)
        assert result is not None
        result["test"] = self._scores(opened, self.rows)
        self._score_untrained(opened)
        save_json(result_path(self.study.folder, run.id), result)
        return f"chosen; average {average(result['test']):.3f} on {_split_name(result['test'])}"

    def _scores(
        self, opened: OpenRun, rows: list[Examples], *, base_only: bool = False
    ) -> dict[str, Any]:
        tasks = self.study.tasks
        answers = predict(opened, tasks, rows, Setting(base_only=base_only))
        return {
            task.name: pack(task, examples, outcome)
            for task, examples, (_, outcome) in zip(tasks, rows, answers, strict=True)
        }

    def _score_untrained(self, opened: OpenRun) -> None:
        """The base model alone, once: what all methods start from."""
        if is_done(read_result(self.study.folder, UNTRAINED)):
            return
        scores = self._scores(opened, self.rows, base_only=True)
        result = {"id": UNTRAINED, "status": DONE, "method": UNTRAINED, "test": scores}
        save_json(result_path(self.study.folder, UNTRAINED), result)

    def _anything_done(self) -> bool:
        return any(is_done(read_result(self.study.folder, run.id)) for run in self.study.runs)

    def _failed(self, run: PlannedRun, error: Exception) -> str:
        known = isinstance(error, MtlLoraError)
        text = error.lines[0] if known else f"{type(error).__name__}: {error}"  # type: ignore[attr-defined]
        reason = " ".join(text.split())[:500]
        before = read_result(self.study.folder, run.id)
        if not is_done(before):  # a run that is done stays done when its scoring failed
            entry = run.to_json()
            save_json(
                result_path(self.study.folder, run.id),
                {**entry, "status": FAILED, "reason": reason},
            )
        return f"failed: {reason}"


def _trained(study: Study, run: PlannedRun) -> RunFolder:
    """The run's folder with its finished adapter: as it stands, resumed, or trained anew."""
    folder = RunFolder(study.folder / "runs" / run.id)
    if folder.adapter.is_dir():
        return folder
    if folder.path.exists():
        if newest_checkpoint(folder.checkpoints) is not None:
            return training.resume(folder, None, ())
        shutil.rmtree(folder.path)  # it stopped before its first checkpoint
    loaded = replace(study.loaded, recipe=run.recipe)
    return training.start(prepare(loaded), folder.path)


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


def _split_name(entries: Mapping[str, Mapping[str, Any]]) -> str:
    return " and ".join(dict.fromkeys(entry["split"] for entry in entries.values()))
