"""The model card: README.md of whatever leaves a run, with the hub's metadata at its head."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mtl_lora_cli.data.mixed import mixture_of
from mtl_lora_cli.data.sources import read_split
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.evaluation.results import compare_with_base, stored, title_in
from mtl_lora_cli.export.comparison import Comparison
from mtl_lora_cli.metrics.intervals import Measured
from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.models.prequantised import method_of
from mtl_lora_cli.recipe.source import Source
from mtl_lora_cli.runs.folder import RunFolder
from mtl_lora_cli.tasks.task import Task

_SHOWN = 30  # tasks in a card's table


def model_card(
    run: Run,
    task: Task,
    comparison: Comparison | None,
    *,
    title: str,
    library: str,
    relation: str,
    about: str,
    use: str,
) -> str:
    """What everything that leaves a run says of itself.

    Args:
        run: where it comes from.
        task: which it is for.
        comparison: how it compared; None: it was not.
        title: of the page.
        library: `library_name` on the hub.
        relation: `base_model_relation` on the hub: `finetune` or `adapter`.
        about: what it is and what was done, in Markdown.
        use: how it is loaded, in Markdown.
    """
    evaluated = _evaluation(run, task)
    sections = {
        "Use": use,
        "Prompt": _prompt(run, task),
        "Method": _method(run),
        "Data": _data(run, task),
        "Scores": _scores(run, evaluated),
        "Check": _check(comparison),
        "Licence": licence_text(run.base),
    }
    body = "\n\n".join(f"## {name}\n\n{text.rstrip()}" for name, text in sections.items())
    metadata = _metadata(run, task, evaluated, title, library, relation)
    return f"---\n{metadata}\n---\n# {title}\n\n{about.rstrip()}\n\n{body}\n"


def _prompt(run: Run, task: Task) -> str:
    """The task's template, and what stands around it."""
    talk = task.template.conversation
    if talk is None:
        text = f"A Jinja template over the fields of a row:\n\n```\n{task.template.prompt.rstrip()}\n```\n\n"
    else:
        given = json.dumps(talk.model_dump(exclude_defaults=True), ensure_ascii=False, indent=1)
        text = f"Messages of a conversation, which are read from a row by:\n\n```json\n{given}\n```\n\n"
    if run.recipe.prompt_format != "chat":
        return f"{text}The answer stands behind it and a space." if talk is None else text
    chat = run.recipe.chat
    text += (
        "It is a user message in the base model's chat template, and the answer is the reply."
        if talk is None
        else "Messages are written by the base model's chat template; those of the role `text` as they are."
    )
    if chat.template_kwargs:
        given = json.dumps(chat.template_kwargs, ensure_ascii=False)
        text += f" The template was given `chat_template_kwargs` = `{given}`: give it the same."
    if chat.date is not None:
        text += f" It prints the date, which was {chat.date} in training and in the scores below."
    if chat.answers is not None:
        place = {
            "conversation": "where the template writes it in a conversation",
            "generation_prompt": "behind the template's generation prompt",
        }[chat.answers]
        text += f" The template contradicts itself on where an answer stands: it was {place}."
    return text


def _metadata(
    run: Run,
    task: Task,
    evaluated: Mapping[str, Any] | None,
    title: str,
    library: str,
    relation: str,
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=task.source.hub or task.template_name.rpartition("/")[2],
            dataset_name=task.name,
            dataset_split=(evaluated or {})["split"],
            metric_type=name,
            metric_value=measured["value"],
        )
        for name, measured in (evaluated or {"metrics": {}})["metrics"].items()
        if measured["value"] is not None
    ]
    hub_sets = {one.source.hub for one in run.tasks if one.source.hub is not None}
    of_hub = run.base.revision is not None
    data = ModelCardData(
        base_model=run.base.name if of_hub else None,
        base_model_relation=relation if of_hub else None,
        datasets=sorted(hub_sets) or None,
        library_name=library,
        pipeline_tag="text-generation",
        tags=["mtl-lora", "multi-task", run.recipe.adapter.method],
        model_name=title if results else None,
        eval_results=results or None,
        **_licence(run.base),
    )
    return data.to_yaml().rstrip()


def shown_name(base: BaseModel) -> str:
    """A hub id or an alias as it is; of a path the last part: the rest is nobody's business."""
    return base.name if base.revision is not None else Path(base.name).name


def _method(run: Run) -> str:
    config = run.adapter.config
    steps = _steps(run)
    rows = {
        "base model": f"{shown_name(run.base)}, "
        + (f"revision `{run.base.revision}`, " if run.base.revision else "")
        + f"fingerprint `{run.base.fingerprint}`",
        "method": f"{config.method}, {config.source}",
        "rank, alpha, up-projections": f"{config.rank}, {config.alpha:g}, {config.ups}",
        "adapted": f"{', '.join(config.target_modules)}: {len(run.adapter.layers)} layers",
        "trained values": f"{run.adapter.parameter_count():,}, for {len(run.tasks)} tasks",
        "optimiser steps": f"{steps:,}" if steps else "not recorded",
        "base weights in training": _base_weights(run),
    }
    return _table([["", ""], *([key, value] for key, value in rows.items())])


@lru_cache(maxsize=1)
def _steps(run: Run) -> int:
    """That the run took; 0: not recorded."""
    steps = [event["step"] for event in run.folder.events() if event.get("event") == "step"]
    return steps[-1] if steps else 0


def _base_weights(run: Run) -> str:
    """How the base model's weights were quantised, by the recipe or before."""
    before = method_of(run.base)
    if before is not None:
        return f"quantised already ({before})"
    return run.recipe.quantization if run.recipe.quantization != "none" else "not quantised"


def _data(run: Run, task: Task) -> str:
    # Tasks that were added to a run's are the recipe's; the others were there before.
    own = {entry.name for entry in run.recipe.tasks}
    learned = [one for one in run.tasks if one.name in own]
    planned = _planned(run, tuple(one.name for one in learned))
    total = sum(count for _, count in planned or [])
    rows = [["task", "template", "source", "training rows", "share of the examples"]]
    shown_tasks = run.tasks
    if len(run.tasks) > _SHOWN:
        shown_tasks = [task, *(one for one in run.tasks if one.name != task.name)][:_SHOWN]
    place = {one.name: number for number, one in enumerate(learned)}
    for one in shown_tasks:
        name = f"**{one.name}**" if one.name == task.name else one.name
        if one.name not in place:
            shown = ["learned before"] * 2
        elif planned is None:
            shown = ["not readable any more"] * 2
        else:
            count, drawn = planned[place[one.name]]
            shown = [f"{count:,}", f"{drawn / total:.1%}"]
        rows.append([name, one.template_name.rpartition("/")[2], _source(one.source), *shown])
    together = "All tasks were learned together:"
    if len(learned) < len(run.tasks):
        together = (
            f"{', '.join(one.name for one in learned)}: added to tasks that had been learned before, "
            "with everything that tasks share left as it was:"
        )
    more = len(run.tasks) - len(shown_tasks)
    return f"{together}\n\n{_table(rows)}" + (f"\n\nAnd {more:,} more tasks." if more else "")


@lru_cache(maxsize=1)
def _planned(run: Run, names: tuple[str, ...]) -> list[tuple[int, int]] | None:
    """Rows of each task's training split, and how many examples an epoch draws of it."""
    tasks = [task for task in run.tasks if task.name in set(names)]
    try:
        found = [read_split(task.source, "train", base=Path(), task=task.name) for task in tasks]
    except UsageError:
        return None
    if any(rows is None for rows in found):
        return None
    sizes = [
        min(len(rows.rows), task.max_examples or len(rows.rows))
        for rows, task in zip(found, tasks, strict=True)
        if rows is not None
    ]
    mixture = mixture_of(run.recipe, tasks, [np.zeros(size, dtype=np.int64) for size in sizes])
    return list(zip(sizes, mixture.planned_counts(), strict=True))


def _source(source: Source) -> str:
    """Where rows come from; of a path the last two parts."""
    if source.hub is not None:
        more = [part for part in (source.config, source.revision) if part]
        return ", ".join([f"{source.hub} on the hub", *more])
    if source.sample is not None:
        return f"the sample {source.sample}"
    return f"files {'/'.join(Path(str(source.path)).parts[-2:])}"


def _evaluation(run: Run, task: Task) -> dict[str, Any] | None:
    """The newest evaluation of this adapter on this task."""
    for result in reversed(_results(run)):
        if (result["task"], result["model"]) == (task.name, "adapter") and result[
            "checkpoint"
        ] == run.checkpoint:
            return result
    return None


def _results(run: Run) -> list[dict[str, Any]]:
    """All results of the run, read once for all of its tasks."""
    index = run.folder.evaluations / "index.json"
    return _stored(run.folder.path, index.stat().st_mtime_ns) if index.is_file() else []


@lru_cache(maxsize=1)
def _stored(run: Path, stamp: int) -> list[dict[str, Any]]:
    return stored(RunFolder(run))


def _scores(run: Run, result: Mapping[str, Any] | None) -> str:
    if result is None:
        return "The run has no evaluation of this task; see *Check* for the rows compared there."
    beside = compare_with_base(run.folder, dict(result), _results(run))
    metrics = list(result["metrics"])
    rows = [["model", *(title_in(result, name) for name in metrics)]]
    found = {"the run's adapter": result["metrics"]}
    if beside is not None:
        found["the untouched base model"] = beside["metrics"]
    for label, values in found.items():
        rows.append([label, *(_measured(Measured(**values[name])) for name in metrics)])
    limit = "" if result["limit"] is None else f" (the first {result['limit']:,})"
    quantisation = "" if result["quantization"] == "none" else f", {result['quantization']} weights"
    return (
        f"The run's own evaluation: {result['examples']:,} {result['split']} rows{limit}, protocol "
        f"{result['protocol']}, {result['dtype']}{quantisation}, with 95 % intervals:\n\n"
        + _table(rows)
    )


def _check(comparison: Comparison | None) -> str:
    if comparison is None:
        return (
            "**Not checked.** This was written with `--no-check`: it has not been compared with "
            "the run that it comes from."
        )
    c = comparison
    metrics = list(c.metrics)
    rows = [
        [
            "model",
            *map(c.title, metrics),
            "largest difference of log-probabilities",
            "equal predictions",
        ]
    ]
    rows.append(["this one", *(_measured(c.metrics[name]) for name in metrics), "", ""])
    for label, other in c.models.items():
        scores = [_measured(other.metrics[name]) for name in metrics]
        rows.append([label, *scores, f"{other.largest:.2e}", f"{other.equal:.1%}"])
    return (
        f"Loaded again after writing, in a process of its own, and compared on {c.examples:,} "
        f"{c.split} rows in {c.dtype}, with 95 % intervals. The first model below this one had to "
        f"agree {c.asked}:\n\n" + _table(rows) + (c.told and f"\n\n{_sentence(c.told)}")
    )


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _measured(measured: Measured) -> str:
    if measured.value is None:
        return f"undefined: {measured.why}"
    if measured.low is None:
        return f"{measured.value:.3f}"
    return f"{measured.value:.3f} ({measured.low:.3f} – {measured.high:.3f})"


def _licence(base: BaseModel) -> dict[str, Any]:
    """The base model's own licence, as its card says; the hub's `other` where nothing is said."""
    from huggingface_hub import ModelCard

    path = base.folder / "README.md"
    said = (
        ModelCard.load(path, ignore_metadata_errors=True).data.to_dict() if path.is_file() else {}
    )
    found = {
        key: str(said[key]) for key in ("license", "license_name", "license_link") if key in said
    }
    if "license" not in found:
        found = {"license": "other", "license_name": "that-of-the-base-model"}
        if base.revision is not None:
            found["license_link"] = f"https://huggingface.co/{base.name}"
    return found


def licence_text(base: BaseModel) -> str:
    said = _licence(base)
    named = said["license"] if said["license"] != "other" else said["license_name"]
    return (
        f"{named}: these weights are made of the base model's. The data sets have terms of their own; "
        "whoever passes this on has to look at both."
    )


def _table(rows: list[list[str]]) -> str:
    head, *others = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *others])
