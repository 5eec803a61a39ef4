"""What a comparison does for one of its runs, in whichever process."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from mtl_lora_cli.compare.grid import REFERENCES, TEST, UNTRAINED, VALIDATION
from mtl_lora_cli.compare.maps import held_maps, of_maps, reference_scores, said, scores
from mtl_lora_cli.compare.results import DONE, average, pack, read_result, result_path
from mtl_lora_cli.compare.rows import report_rows, validation_rows
from mtl_lora_cli.compare.study import PlannedRun, Study
from mtl_lora_cli.data.examples import Examples
from mtl_lora_cli.errors import MtlLoraError, UsageError
from mtl_lora_cli.evaluation.answers import answer
from mtl_lora_cli.evaluation.evaluate import Setting
from mtl_lora_cli.evaluation.maps import HeldMaps
from mtl_lora_cli.evaluation.opened import Run, open_run
from mtl_lora_cli.machine.cards import pick_device, release, reset_peak, sharing
from mtl_lora_cli.report.events import training_facts
from mtl_lora_cli.runs.folder import RunFolder, read_json, save_json
from mtl_lora_cli.training import run as training
from mtl_lora_cli.training.checkpoints import newest_checkpoint
from mtl_lora_cli.training.prepare import prepare
from mtl_lora_cli.training.progress import duration
from mtl_lora_cli.training.signs import signs
from mtl_lora_cli.training.spikes import spikes

LEARN, CHOSEN, BASE = "learn", "chosen", "base"


@dataclass(frozen=True)
class Job:
    """What one process does at a time.

    Attributes:
        kind: LEARN: train a run and score it; CHOSEN: score it on test, since its setting was
            chosen; BASE: score what stands beside the methods, see `beside_of`.
        run: which; for BASE any finished one, whose base model is asked.
        beside: what BASE's result is called.
    """

    kind: str
    run: PlannedRun
    beside: str = UNTRAINED

    @property
    def name(self) -> str:
        """Of the result."""
        return self.beside if self.kind == BASE else self.run.id


@dataclass(frozen=True)
class JobOutcome:
    """How a job ended.

    Attributes:
        said: what was found, or why it failed.
        failed: whether it did.
        usage: the error, where the recipe or the data are wrong.
    """

    said: str
    failed: bool = False
    usage: UsageError | None = None


def beside_of(study: Study) -> str | None:
    """What stands beside the methods: the base model alone, or the runs over which Δm of maps is, if any."""
    if of_maps(study.tasks):
        return REFERENCES if study.options.references else None
    return UNTRAINED


class Work:
    """Does the jobs of a comparison, and writes their results.

    Args:
        study: the plan; its folder and the rows cut from train are there.
    """

    def __init__(self, study: Study) -> None:
        self.study = study

    @cached_property
    def held(self) -> list[HeldMaps]:
        """Of each task of maps, the pictures that test."""
        return held_maps(self.study.tasks, self.study.options.limit)

    @cached_property
    def test_rows(self) -> list[Examples]:
        """Of each task of texts, those that test."""
        return report_rows(self.study.tasks, self.study.options.limit)

    @cached_property
    def validation_rows(self) -> list[Examples]:
        """Of each task, those that choose settings, or stand for those that test."""
        study = self.study
        return validation_rows(study.folder, study.tasks, study.cut, study.options.limit)

    def attempt(self, job: Job) -> JobOutcome:
        """Do a job. Whatever goes wrong: an hour of other runs must not be lost with it."""
        kinds = {LEARN: self._learn, CHOSEN: self._score_chosen, BASE: self._score_beside}
        try:
            outcome = JobOutcome(kinds[job.kind](job.run))
        except MtlLoraError as error:
            usage = error if isinstance(error, UsageError) else None
            outcome = JobOutcome(error.lines[0], failed=True, usage=usage)
        except Exception as error:
            outcome = JobOutcome(f"{type(error).__name__}: {error}", failed=True)
        release(pick_device())
        return outcome

    def _learn(self, run: PlannedRun) -> str:
        """Train, score, and write the result; what to say of it."""
        started = time.monotonic()
        reset_peak(pick_device())
        folder = _trained(self.study, run)
        release(pick_device())  # the model that learned, before it is loaded to be asked
        opened, events = open_run(folder), list(folder.events())
        options = self.study.options
        result: dict[str, Any] = {
            "id": run.id,
            "status": DONE,
            "reason": None,
            **{k: v for k, v in run.to_json().items() if k not in ("id", "parameters")},
            "parameters": opened.adapter.parameter_count(),
            "planned_parameters": run.parameters,
            "recipe": run.recipe.model_dump(mode="json"),
            **training_facts(events),
            "signs": signs(events),
            "spikes": len(spikes(events)),
            "environment": {
                k: v for k, v in read_json(folder.environment).items() if k != "format_version"
            },
            "sharing": sharing(),
            VALIDATION: self._scores(opened, self.validation_rows) if options.validated else None,
            TEST: None if options.validated else self._tested(opened),
        }
        result["seconds_in_all"] = time.monotonic() - started
        save_json(result_path(self.study.folder, run.id), result)
        shutil.rmtree(folder.checkpoints, ignore_errors=True)  # nothing is left to resume
        amount = "pictures" if of_maps(self.study.tasks) else "tokens"
        return (
            f"{_average(result[VALIDATION if options.validated else TEST])}, "
            f"{result['tokens_per_second']:,.0f} {amount}/s, {duration(result['seconds_in_all'])}"
        )

    def _tested(self, opened: Run) -> dict[str, Any]:
        if of_maps(self.study.tasks):
            return scores(opened, self.held)
        return self._scores(opened, self.test_rows)

    def _score_chosen(self, run: PlannedRun) -> str:
        opened = open_run(_trained(self.study, run))
        result = read_result(self.study.folder, run.id)
        assert result is not None
        result[TEST] = self._scores(opened, self.test_rows)
        save_json(result_path(self.study.folder, run.id), result)
        return f"chosen; {_average(result[TEST])}"

    def _score_beside(self, run: PlannedRun) -> str:
        references = self.study.options.references
        if not references:
            return self._score_untrained(run)
        entries = reference_scores(self.held, references)
        result = {"id": REFERENCES, "status": DONE, "method": REFERENCES, TEST: entries}
        save_json(result_path(self.study.folder, REFERENCES), result)
        return said(entries)

    def _score_untrained(self, run: PlannedRun) -> str:
        score = self.study.options.score
        rows = self.test_rows if score == TEST else self.validation_rows
        entries = self._scores(open_run(_trained(self.study, run)), rows, base_only=True)
        result = {"id": UNTRAINED, "status": DONE, "method": UNTRAINED, score: entries}
        save_json(result_path(self.study.folder, UNTRAINED), result)
        return _average(entries)

    def _scores(
        self, opened: Run, rows: list[Examples], *, base_only: bool = False
    ) -> dict[str, Any]:
        tasks = self.study.tasks
        answers = answer(opened, tasks, rows, Setting(base_only=base_only), keep=True)
        return {
            task.name: pack(task, examples, own.outcome, own.scores)
            for task, examples, own in zip(tasks, rows, answers, strict=True)
        }


def _average(entries: dict[str, Any]) -> str:
    if any("tallies" in entry for entry in entries.values()):
        return said(entries)
    splits = " and ".join(dict.fromkeys(entry["split"] for entry in entries.values()))
    return f"average {average(entries):.3f} on {splits}"


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
