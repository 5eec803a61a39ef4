"""What a run's folder is given when it begins, and when it is finished."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from mtl_lora_cli.adapters.extend import save_beside
from mtl_lora_cli.adapters.files import CONFIG_FILE, load_adapter, save_adapter
from mtl_lora_cli.machine.environment import describe
from mtl_lora_cli.models.host import examples_of
from mtl_lora_cli.recipe.load import dump_recipe
from mtl_lora_cli.runs.atomic import file_checksum, new_folder, write_json, write_text
from mtl_lora_cli.runs.folder import (
    RunFolder,
    create_run,
    mark_latest,
    read_json,
    save_json,
)
from mtl_lora_cli.tasks.chosen import read_tasks
from mtl_lora_cli.training.checkpoints import checkpoint_of
from mtl_lora_cli.training.loop import Trainer
from mtl_lora_cli.training.prepared import Prepared, ReadyRun


def create(
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
        write_zero(run, zero)

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


def write_zero(run: RunFolder, zero: dict[str, Any] | None) -> None:
    """DeepSpeed's configuration as it is now; it may be another one when a run goes on."""
    if zero is None:
        run.deepspeed.unlink(missing_ok=True)
    else:
        write_json(run.deepspeed, zero)


def write_adapter(ready: ReadyRun, trainer: Trainer) -> None:
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
