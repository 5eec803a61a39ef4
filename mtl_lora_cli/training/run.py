"""A whole training run: from a recipe to a run folder that holds a finished adapter."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from rich.console import Console
from safetensors import SafetensorError

from mtl_lora_cli.errors import MtlLoraError, UsageError, errno_of, strerror_of
from mtl_lora_cli.machine import threads
from mtl_lora_cli.machine.processes import ALONE, Processes
from mtl_lora_cli.memory.explain import explained
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.recipe.load import LoadedRecipe, load_recipe
from mtl_lora_cli.recipe.schema import RunSettings
from mtl_lora_cli.recipe.training import Training
from mtl_lora_cli.runs.folder import RunFolder, require_new, save_json
from mtl_lora_cli.runs.lock import only_writer
from mtl_lora_cli.tasks.maps import MAPS
from mtl_lora_cli.training.best import Best
from mtl_lora_cli.training.checkpoints import newest_checkpoint
from mtl_lora_cli.training.drawn import Draw
from mtl_lora_cli.training.going_on import as_picked, with_free
from mtl_lora_cli.training.gradient_start import start_by_gradient
from mtl_lora_cli.training.journal import Journal
from mtl_lora_cli.training.loop import Trainer
from mtl_lora_cli.training.prepare import prepare
from mtl_lora_cli.training.prepared import Prepared, ReadyRun
from mtl_lora_cli.training.progress import TrainingProgress
from mtl_lora_cli.training.signs import signs, undrawn
from mtl_lora_cli.training.spikes import spikes, told
from mtl_lora_cli.training.trackers import tracked
from mtl_lora_cli.training.unchanged import (
    as_begun,
    changes_around,
    require_same_names,
    require_same_rows,
)
from mtl_lora_cli.training.warm_start import begin_there
from mtl_lora_cli.training.word_start import WORD_START, start_by_words
from mtl_lora_cli.training.written import create, write_adapter, write_zero
from mtl_lora_cli.visible import tell


def new_run_path(loaded: LoadedRecipe, runs: Path, processes: Processes = ALONE) -> Path:
    """Where a new run goes: `run.directory`, or `runs`; `run.name`, or the recipe's stem and time.

    Raises:
        UsageError: it exists; said before any work is done.
    """
    settings = loaded.recipe.run
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    directory = Path(settings.directory) if settings.directory else runs
    path = directory / (settings.name or f"{loaded.path.stem}-{processes.same(stamp)}")
    require_new(path)
    processes.wait()  # before anybody makes it
    return path


def start(prepared: Prepared, path: Path, ready: Callable[[], None] = lambda: None) -> RunFolder:
    """Train a new run.

    Args:
        prepared: from its recipe.
        path: of its folder.
        ready: called once nothing can be wrong any more, before anything is written.

    Raises:
        UsageError: the adapter fits nothing in the model, or the run folder exists.
        MtlLoraError: memory or disk do not suffice, or the loss is no number.
        Interrupted: the user stopped the run; it can be resumed.
    """
    with explained(prepared.situation):
        host, adapter = prepared.build()
        zero = prepared.zero()
        ready()
        if prepared.processes.main:
            create(prepared, path, zero, host.engine_report())
        prepared.processes.wait()
        run = RunFolder(path)
        with _only_writer(run, prepared.processes):
            _learn(ReadyRun(prepared, run, host, adapter, zero), resume=False)
    return run


@contextmanager
def _only_writer(run: RunFolder, processes: Processes) -> Iterator[None]:
    """The processes of a run are one writer, and there is no other.

    Raises:
        UsageError: another process writes into the run; all raise it.
        MtlLoraError: nobody can write there; likewise.
    """
    with ExitStack() as held:
        refused: MtlLoraError | None = None
        if processes.main:
            try:
                with _disk(run):
                    held.enter_context(only_writer(run))
            except MtlLoraError as error:
                refused = error
        refused = processes.same(refused)
        if refused is not None:
            raise refused
        yield


def resume(
    run: RunFolder,
    recipe_path: Path | None,
    overrides: Sequence[str],
    processes: Processes = ALONE,
) -> RunFolder:
    """Go on with a run from its newest complete checkpoint; from the start where there is none.

    How many processes there are, and what ZeRO cuts into parts, may differ from before.

    Args:
        run: the run.
        recipe_path: a recipe to compare with the run's own, or None.
        overrides: on the command line, for that recipe, or for the run's own.
        processes: this one among those of the run.

    Raises:
        UsageError: another process trains it, it is finished, or the recipe, the base model, a
            template or the data are others than those that it began with.
        MtlLoraError: memory or disk do not suffice, or the loss is no number.
        Interrupted: the user stopped the run; it can be resumed.
    """
    _require_unfinished(run)
    with _only_writer(run, processes):
        _go_on(run, recipe_path, overrides, processes)
    return run


def _require_unfinished(run: RunFolder) -> None:
    if run.adapter.is_dir():
        raise UsageError(f"run '{run.name}' is finished; nothing is left to resume")


def _go_on(
    run: RunFolder, recipe_path: Path | None, overrides: Sequence[str], processes: Processes
) -> None:
    own = load_recipe(run.recipe)
    extends, begins = (one if one.path.is_dir() else None for one in (run.extends, run.begins))
    _require_unfinished(run)  # by whoever wrote until now
    with processes.one_after_another():
        require_same_names(run, own)
    if recipe_path is not None or overrides:
        heir_of = own.recipe if extends is not None or begins is not None else None
        given = load_recipe(recipe_path or run.recipe, overrides, heir_of=heir_of)
        wanted = prepare(as_picked(given, own.recipe), processes, extends=extends, begins=begins)
        own = replace(own, recipe=with_free(own.recipe, wanted.recipe, run))
    prepared = prepare(as_begun(run, own), processes, extends=extends, begins=begins)
    require_same_rows(run, prepared)
    if processes.main:
        for line in changes_around(run, prepared):
            tell(f"note: {line}")
    with explained(prepared.situation):
        host, adapter = prepared.build()
        _learn(ReadyRun(prepared, run, host, adapter, prepared.zero()), resume=True)


def _learn(ready: ReadyRun, *, resume: bool) -> None:
    """Train, and write the finished adapter."""
    prepared, run = ready.prepared, ready.run
    recipe, processes = prepared.recipe, prepared.processes
    trackers_of = recipe.run if processes.main else RunSettings()
    with _disk(run), tracked(trackers_of, run, recipe.model_dump(mode="json")) as trackers:
        checkpoint = newest_checkpoint(run.checkpoints) if resume else None
        if checkpoint is None:
            _set_start(ready)
        trainer = Trainer(ready, prepared.observers(ready.host, ready.adapter))
        lost = None if checkpoint is None else trainer.resume(checkpoint)
        if processes.main:
            if resume:
                write_zero(run, ready.zero)
            for line in _beginning(ready, trainer, checkpoint, lost):
                tell(line)
        else:
            ready.rounded(told=False)
        progress = TrainingProgress(
            prepared.total_steps,
            trainer.position.step,
            None if processes.main else Console(quiet=True),
            tasks=[task.name for task in prepared.data.tasks],
            every=_every(recipe.training),
            amount="pictures" if prepared.data.tasks[0].objective in MAPS else "tokens",
        )
        try:
            trainer.train(Journal(run, progress, trackers.tell, writes=processes.main))
        finally:
            progress.close()
        for line in _ending(trainer):
            progress.say(line)
        events = list(run.events())
        found = spikes(events)
        clipped = recipe.training.clipping is not None
        names = [task.name for task in prepared.data.tasks]
        said = (*signs(events), *undrawn(events, names))
        for line in (*said, *told(found, trainer.position.step, clipped=clipped)):
            progress.say(f"note: {line}")
        if (yielded := threads.note()) is not None:
            progress.say(f"note: {yielded}")
        if processes.main:
            write_adapter(ready, trainer)
            if recipe.run.router:
                progress.say(_router(run))
    processes.wait()


def _set_start(ready: ReadyRun) -> None:
    """What of a fresh adapter's start depends on more than chance: gradients come through the projector's."""
    prepared = ready.prepared
    recipe = prepared.recipe
    if prepared.starts_by_words:
        _start_by_words(ready)
    if prepared.begins is not None:
        for line in begin_there(ready):
            if prepared.processes.main:
                tell(line)
    elif recipe.adapter.down_start == "gradient" and prepared.extends is None:
        draw = Draw(prepared.data, recipe.training, prepared.processes)
        start_by_gradient(
            ready.host,
            ready.adapter,
            draw,
            prepared.total_steps,
            recipe.training.seed,
            prepared.processes,
        )


def _start_by_words(ready: ReadyRun) -> None:
    """The projector's start, found by the first process; what it was found to be is told and written."""
    prepared, whole, processes = ready.prepared, ready.adapter.whole, ready.prepared.processes
    eyes = prepared.data.eyes
    assert eyes is not None and isinstance(ready.host, PackedModel), "required before"
    found, values = None, None
    if processes.main:
        seed, splits = prepared.recipe.training.seed, prepared.data.splits
        found = start_by_words(ready.host.model, ready.adapter, eyes, splits, seed)
        tell(str(found))
        save_json(ready.run.path / WORD_START, found.to_json())
        values = {name: one.detach().cpu() for name, one in whole.items()}
    if processes.count > 1:
        for name, value in (processes.same(values) or {}).items():
            whole[name].data.copy_(value)


def _router(run: RunFolder) -> str:
    """Learn the run's router; the run is finished, whatever becomes of it."""
    from mtl_lora_cli.evaluation.opened import Run
    from mtl_lora_cli.evaluation.router import train_router

    try:
        found = train_router(Run(run))
    except MtlLoraError as error:
        return f"note: no router: {error}"
    if not found["rows"]:
        return "router learned; there are no held-out rows to try it on"
    return (
        f"router: right on {found['accuracy']:.1%} of {found['rows']:,} held-out rows; it names a task for "
        f"{found['named']:.1%}"
    )


def _beginning(
    ready: ReadyRun, trainer: Trainer, checkpoint: Path | None, lost: Best | None
) -> Iterator[str]:
    """What there is to say before the first step."""
    if lost is not None:
        yield (
            f"note: the best so far, {lost}, does not count any more: its checkpoint is damaged or gone"
        )
    if checkpoint is not None:
        yield f"resuming {ready.run.name} after step {trainer.position.step}"
    for line in (*ready.host.notes(), *ready.adapter.remarks):
        yield f"note: {line}"
    yield from ready.rounded(told=True)


def _every(training: Training) -> dict[str, int | None]:
    """What comes every so many steps."""
    validation = training.validation
    return {
        "validation": None if validation is None else validation.every,
        "checkpoint": training.checkpoint_every,
    }


def _ending(trainer: Trainer) -> Iterator[str]:
    """What there is to say of a run that ended otherwise than with its last step."""
    best, validation = trainer.position.best, trainer.settings.validation
    if best is not None:
        if trainer.position.step < trainer.total_steps:
            yield (
                f"stopped after step {trainer.position.step}/{trainer.total_steps}: "
                f"{best.waited} looks were no better"
            )
        yield f"the adapter is that of the best look: {best}"
    elif validation is not None and validation.best is not None:
        yield "no look could be judged: the adapter is that of the last step"


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO)


@contextmanager
def _disk(run: RunFolder) -> Iterator[None]:
    """A disk that takes no more: what there is, and how to go on.

    Raises:
        MtlLoraError: in the place of the system's error.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if errno_of(error) not in _FULL:
            raise
        last = newest_checkpoint(run.checkpoints)
        free = shutil.disk_usage(run.path).free / 2**20
        raise MtlLoraError(
            f"{run.path} cannot be written: {strerror_of(error)} ({free:,.1f} MiB free); "
            + (f"{last.name} is intact" if last is not None else "no checkpoint was written yet")
            + f"; when it can, go on with: mtl-lora train --resume --run {run.path}"
        ) from error
