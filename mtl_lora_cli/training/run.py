"""A whole training run: from a recipe to a run folder that holds a finished adapter."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import SafetensorError

from mtl_lora_cli.adapters.extend import save_beside
from mtl_lora_cli.adapters.files import CONFIG_FILE, load_adapter, save_adapter
from mtl_lora_cli.errors import MtlLoraError, UsageError
from mtl_lora_cli.machine import threads
from mtl_lora_cli.machine.environment import describe
from mtl_lora_cli.machine.processes import ALONE, Processes
from mtl_lora_cli.memory.explain import explained
from mtl_lora_cli.models.host import examples_of
from mtl_lora_cli.recipe.load import LoadedRecipe, describe_changes, dump_recipe, load_recipe
from mtl_lora_cli.recipe.schema import Recipe, RunSettings
from mtl_lora_cli.recipe.training import Training
from mtl_lora_cli.runs.atomic import file_checksum, new_folder, write_json, write_text
from mtl_lora_cli.runs.folder import (
    RunFolder,
    create_run,
    mark_latest,
    read_json,
    require_new,
    save_json,
)
from mtl_lora_cli.runs.lock import only_writer
from mtl_lora_cli.tasks.chosen import read_tasks
from mtl_lora_cli.tasks.maps import MAPS
from mtl_lora_cli.training.best import Best
from mtl_lora_cli.training.checkpoints import checkpoint_of, newest_checkpoint
from mtl_lora_cli.training.drawn import Draw
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
from mtl_lora_cli.visible import tell

# What may be another when a run goes on: it does not change what is learned.
_FREE = ("run", "distributed")
_FREE_OF_TRAINING = (
    "checkpoint_every",
    "keep_checkpoints",
    "validation",
    "diagnose",
    "expanded_layers",
)


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
            _create(prepared, path, zero, host.engine_report())
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


def _create(
    prepared: Prepared, path: Path, zero: dict[str, Any] | None, engine: dict[str, Any]
) -> None:
    """The run folder, whole or not at all."""
    where = prepared.recipe.run.model_copy(
        update={"name": path.name, "directory": str(path.parent.resolve())}
    )
    recipe = prepared.recipe.model_copy(update={"run": where})

    def fill(run: RunFolder) -> None:
        write_text(run.recipe, dump_recipe(recipe))
        save_json(run.tasks, _tasks(prepared))
        for other, kept in ((prepared.extends, run.extends), (prepared.begins, run.begins)):
            if other is not None:
                kept.path.mkdir()
                shutil.copy(other.tasks, kept.tasks)
                shutil.copytree(other.adapter, kept.adapter)
        around = describe(prepared.device, prepared.dtype, prepared.processes)
        save_json(
            run.environment, {**around, "base_model": prepared.base.identity(), "engine": engine}
        )
        _write_zero(run, zero)

    mark_latest(create_run(path, fill))


def _tasks(prepared: Prepared) -> dict[str, Any]:
    """What tasks.json says; tasks that are added to a run's stand behind them."""
    own = [task.to_json() for task in prepared.data.tasks]
    mixture = _mixture(prepared)
    if prepared.begins is not None:
        return {"tasks": own, "mixture": mixture, "began_at": _named(prepared.begins)}
    run = prepared.extends
    if run is None:
        return {"tasks": own, "mixture": mixture}
    known = read_json(run.tasks)["tasks"]
    return {
        "tasks": [*known, *({**one, "id": len(known) + one["id"]} for one in own)],
        "mixture": mixture,
        "added_to": _named(run),
    }


def _named(run: RunFolder) -> dict[str, str]:
    """Another run, and which adapter it had: checksums of all tensors are in its configuration."""
    return {
        "run": run.name,
        "path": str(run.path.resolve()),
        "adapter": file_checksum(run.adapter / CONFIG_FILE),
    }


def _mixture(prepared: Prepared) -> dict[str, Any]:
    """What the run is planned to draw, of the tasks that it learns."""
    mixture = prepared.data.mixture
    others = prepared.data.others
    sizes = list(map(len, mixture.lengths)) if others is None else examples_of(others)
    return {
        "steps": prepared.total_steps,
        "examples": dict(zip(mixture.names, sizes, strict=True)),
        "examples_an_epoch": dict(zip(mixture.names, prepared.data.planned(), strict=True)),
    }


def _write_zero(run: RunFolder, zero: dict[str, Any] | None) -> None:
    """DeepSpeed's configuration as it is now; it may be another one when a run goes on."""
    if zero is None:
        run.deepspeed.unlink(missing_ok=True)
    else:
        write_json(run.deepspeed, zero)


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
        wanted = prepare(_as_picked(given, own.recipe), processes, extends=extends, begins=begins)
        own = replace(own, recipe=_with_free(own.recipe, wanted.recipe, run))
    prepared = prepare(as_begun(run, own), processes, extends=extends, begins=begins)
    require_same_rows(run, prepared)
    if processes.main:
        for line in changes_around(run, prepared):
            tell(f"note: {line}")
    with explained(prepared.situation):
        host, adapter = prepared.build()
        _learn(ReadyRun(prepared, run, host, adapter, prepared.zero()), resume=True)


def _with_free(own: Recipe, given: Recipe, run: RunFolder) -> Recipe:
    """The run's recipe with what may differ taken from the given one.

    Raises:
        UsageError: something else differs.
    """
    own = _with_streams(own, given)
    hidden: Any = dict.fromkeys(_FREE, True) | {"training": set(_FREE_OF_TRAINING)}
    before, after = (one.model_dump(mode="json", exclude=hidden) for one in (own, given))
    for old, new in zip(before["tasks"], after["tasks"], strict=False):
        if None in (old["objective"], new["objective"]):  # the template's, which is compared itself
            old["objective"] = new["objective"] = None
    changes = describe_changes(before, after)
    if changes:
        raise UsageError(f"the recipe differs from that of run '{run.name}': {'; '.join(changes)}")
    training = own.training.model_copy(
        update={name: getattr(given.training, name) for name in _FREE_OF_TRAINING}
    )
    return own.model_copy(update={"training": training, "distributed": given.distributed})


def _with_streams(own: Recipe, given: Recipe) -> Recipe:
    """The run's recipe; what becomes of rows of streams that cannot be learned is the given one's."""
    tasks = list(own.tasks)
    for number, (old, new) in enumerate(zip(own.tasks, given.tasks, strict=False)):
        if old.source is not None and old.source.stream and new.source is not None:
            source = old.source.model_copy(update={"broken_rows": new.source.broken_rows})
            tasks[number] = old.model_copy(update={"source": source})
    return own.model_copy(update={"tasks": tasks})


def _as_picked(given: LoadedRecipe, own: Recipe) -> LoadedRecipe:
    """A recipe with what was picked when the run began: its date, and, with `memory: auto`, its rows."""
    if given.recipe.chat.date is None and given.recipe.prompt_format == "chat":
        chat = given.recipe.chat.model_copy(update={"date": own.chat.date})
        given = replace(given, recipe=given.recipe.model_copy(update={"chat": chat}))
    wanted, found = given.recipe.training, own.training
    if wanted.memory != "auto":
        return given
    picked = {
        name: getattr(found, name)
        for name in (
            "memory",
            "memory_limit",
            "rows_per_pass",
            "gradient_checkpointing",
            "expanded_layers",
        )
    }
    halves = wanted.row_length // found.row_length
    if halves > 1 and found.rows_per_step == wanted.rows_per_step * halves:
        picked |= {"row_length": found.row_length, "rows_per_step": found.rows_per_step}
    training = wanted.model_copy(update=picked)
    return replace(given, recipe=given.recipe.model_copy(update={"training": training}))


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
                _write_zero(run, ready.zero)
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
            _write_adapter(ready, trainer)
            if recipe.run.router:
                progress.say(_router(run))
    processes.wait()


def _set_start(ready: ReadyRun) -> None:
    """What of a fresh adapter's start depends on more than chance."""
    prepared = ready.prepared
    recipe = prepared.recipe
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


def _write_adapter(ready: ReadyRun, trainer: Trainer) -> None:
    """The finished adapter: of the best look, where there is one, else of the last step."""
    prepared, run, adapter = ready.prepared, ready.run, ready.adapter
    best, identity = trainer.position.best, prepared.base.identity()
    if best is not None:
        load_adapter(adapter, checkpoint_of(run.checkpoints, best.step))
    with new_folder(run.adapter) as folder:
        if prepared.extends is None:
            save_adapter(adapter, folder, identity)
        else:
            save_beside(adapter, run.extends.adapter, folder, identity)
        write_text(folder / "README.md", _adapter_readme(run, prepared, trainer))


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
        said = getattr(error, "strerror", None) or str(error)
        if getattr(error, "errno", None) not in _FULL and "No space left" not in said:
            raise
        last = newest_checkpoint(run.checkpoints)
        free = shutil.disk_usage(run.path).free / 2**20
        raise MtlLoraError(
            f"{run.path} cannot be written: {said} ({free:,.1f} MiB free); "
            + (f"{last.name} is intact" if last is not None else "no checkpoint was written yet")
            + f"; when it can, go on with: mtl-lora train --resume --run {run.path}"
        ) from error


def _adapter_readme(run: RunFolder, prepared: Prepared, trainer: Trainer) -> str:
    recipe = prepared.recipe
    names = ", ".join(task.name for task in prepared.data.tasks)
    if prepared.extends is not None:
        known = ", ".join(task.name for task in read_tasks(run.extends))
        origin = read_json(run.tasks)["added_to"]["run"]
        names += f", added to those of the run `{origin}`, which are as they were: {known}"
    if prepared.begins is not None:
        names += f", begun at the adapter of the run `{read_json(run.tasks)['began_at']['run']}`"
    best = trainer.position.best
    chosen = "" if best is None else f" This is the best look's adapter: {best}."
    return (
        "---\n"
        "library_name: mtl-lora\n"
        "---\n"
        f"# A multi-task adapter for {recipe.base_model}\n\n"
        f"Method: {recipe.adapter.method}, rank {recipe.adapter.rank}, "
        f"{trainer.adapter.config.ups} up-projections, "
        f"{trainer.adapter.parameter_count():,} trained values.\n\n"
        f"Tasks: {names}.\n\n"
        f"Trained for {trainer.position.step} steps on {trainer.position.tokens:,} tokens.{chosen}\n\n"
        "Read it with `mtl-lora eval` and `mtl-lora merge`; PEFT cannot read this format.\n"
    )
