"""What must be as it was when a run goes on: base model, tokenizer, templates and rows.

The recipe is compared in `going_on.py`; here is what it names, which may have changed under its name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from mtl_lora_cli.adapters.files import read_adapter_file
from mtl_lora_cli.data.bind import bind_tasks
from mtl_lora_cli.errors import MtlLoraError, UsageError
from mtl_lora_cli.machine.environment import describe
from mtl_lora_cli.models.base import find_base_model, is_complete
from mtl_lora_cli.recipe.load import LoadedRecipe, describe_changes
from mtl_lora_cli.runs.folder import RunFolder, read_json
from mtl_lora_cli.tasks.chosen import read_tasks
from mtl_lora_cli.tasks.task import Task
from mtl_lora_cli.training.checkpoints import newest_checkpoint
from mtl_lora_cli.training.prepared import Prepared

# Of what is in environment.json: what may change a number.
_COUNTING = ("mtl-lora", "torch", "transformers", "tokenizers", "bitsandbytes", "deepspeed")


def require_same_names(run: RunFolder, own: LoadedRecipe) -> None:
    """Refuse to go on where the recipe's names stand for something else by now.

    Args:
        run: the run.
        own: its own recipe.

    Raises:
        UsageError: another base model, tokenizer, chat template, or another text of a task's template;
            what was recorded and what is found are named.
    """
    _require_same_base(run, own)
    for before, now in _pairs(run, bind_tasks(own)):
        old, new = (one.template.model_dump(mode="json") for one in (before, now))
        if json.dumps(old) != json.dumps(new):  # in their order, too
            changes = describe_changes(old, new) or ["the order of its keys"]
            raise _changed(run, now, "template", f" ({'; '.join(changes)})")


def _require_same_base(run: RunFolder, own: LoadedRecipe) -> None:
    recorded = recorded_base(run)
    if recorded is None:
        return
    base = find_base_model(own.recipe.base_model, beside=own.base)
    changed = base.changes_since(recorded)
    if changed:
        raise UsageError(
            f"run '{run.name}': the base model at {base.folder} is not the one that the run began with "
            f"({changed}); go on with the model of then, or start a new run"
        )


def recorded_base(run: RunFolder) -> Mapping[str, str | None] | None:
    """The identity of the base model that a run began with; None where nothing says it.

    Early versions wrote it into checkpoints only.
    """
    found = read_json(run.environment).get("base_model") if run.environment.is_file() else None
    if isinstance(found, dict):
        return found
    checkpoint = newest_checkpoint(run.checkpoints)
    return None if checkpoint is None else read_adapter_file(checkpoint).base_model


def require_same_rows(run: RunFolder, prepared: Prepared) -> None:
    """Refuse to go on with other rows than the run began with.

    Raises:
        UsageError: naming the first task whose rows changed: those that it learns, or those by which
            `training.validation` picks the best step.
    """
    looked_at = ["train"] + ["validation"] * (prepared.validation is not None)
    for before, now in _pairs(run, prepared.data.tasks):
        for split in looked_at:
            old, new = before.fingerprints.get(split), now.fingerprints.get(split)
            if old != new:
                rows = "training rows" if split == "train" else "validation rows"
                raise _changed(run, now, rows, f" (fingerprint {new}, recorded {old})")


def _pairs(run: RunFolder, learned: list[Task]) -> Iterator[tuple[Task, Task]]:
    """Each task as it was recorded and as it is now."""
    recorded = read_tasks(run)[-len(learned) :]
    before, now = ([task.name for task in tasks] for tasks in (recorded, learned))
    if before != now:
        raise MtlLoraError(
            f"{run.tasks}: damaged: its tasks are {', '.join(before)}, the recipe's {', '.join(now)}"
        )
    return zip(recorded, learned, strict=True)


def _changed(run: RunFolder, task: Task, what: str, how: str) -> UsageError:
    return UsageError(
        f"task '{task.name}': its {what} changed since run '{run.name}' began{how}; "
        f"go on with the {what.rpartition(' ')[2]} of then, or start a new run"
    )


def as_begun(run: RunFolder, own: LoadedRecipe) -> LoadedRecipe:
    """The run's recipe with the engine that `auto` picked when it began.

    A later version may know on the fused engine what ran on the plain one then; sums are formed in another
    order there, and a run goes on to the last bit.
    """
    if own.recipe.engine != "auto" or _engine(run).get("engine") != "plain":
        return own
    return replace(own, recipe=own.recipe.model_copy(update={"engine": "plain"}))


def _engine(run: RunFolder) -> Mapping[str, Any]:
    """What environment.json says of the engine; early versions said nothing."""
    found = read_json(run.environment).get("engine") if run.environment.is_file() else None
    return found if isinstance(found, dict) else {}


def changes_around(run: RunFolder, prepared: Prepared) -> Iterator[str]:
    """What does not stop a run, but may change its numbers, a line each."""
    recorded = recorded_base(run)
    if recorded is not None and not is_complete(recorded):
        yield (
            "the run began with an early version, which did not record its tokenizer and chat template: "
            "whether they are the same is not known"
        )
    if not run.environment.is_file():
        return
    why = _engine(run).get("why_not_fused")
    if why is not None and prepared.recipe.engine == "plain" != why.removeprefix("engine: "):
        yield f"it began on the plain engine ({why}), and goes on there"
    before = read_json(run.environment)
    now = describe(prepared.device, prepared.dtype, prepared.processes)
    changes = [
        f"{name} {_of(before['versions'], name)} → {_of(now['versions'], name)}"
        for name in _COUNTING
        if name in before.get("versions", {}) and before["versions"][name] != now["versions"][name]
    ]
    sums = ("threads",) if now["device"] == "cpu" else ()  # their order is another
    changes += [
        f"{key} {before[key]} → {now[key]}"
        for key in ("device", "dtype", *sums)
        if key in before and before[key] != now[key]
    ]
    if changes:
        yield (
            f"since run '{run.name}' began: {', '.join(changes)}; it goes on, but not to the last bit as "
            "it would have"
        )


def _of(versions: Mapping[str, Any], name: str) -> str:
    return str(versions[name] or "none")
