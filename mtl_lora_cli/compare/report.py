"""The report of a comparison, made from plan.json and the small result files alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from mtl_lora_cli.compare.grid import REFERENCES, UNTRAINED
from mtl_lora_cli.compare.markdown import markdown
from mtl_lora_cli.compare.plots import write_plots
from mtl_lora_cli.compare.results import (
    chosen_points,
    fixed_in,
    is_done,
    points_in,
    read_plan,
    read_result,
    require_same_rows,
    unpack,
    validation_scores,
)
from mtl_lora_cli.errors import MtlLoraError
from mtl_lora_cli.extensions import load_extensions
from mtl_lora_cli.metrics.declare import find
from mtl_lora_cli.metrics.guessing import one_answer
from mtl_lora_cli.metrics.seeds import RESAMPLES, TaskRuns, compare
from mtl_lora_cli.runs.atomic import write_text
from mtl_lora_cli.runs.folder import save_json
from mtl_lora_cli.training.spikes import TIMES

JSON_FILE, MARKDOWN_FILE = "report.json", "report.md"
_BOOTSTRAP_SEED = 0


def build_report(folder: Path) -> dict[str, Any]:
    """Everything that can be said of what is finished.

    Methods are compared on the seeds that all of them have finished. A method without any is left
    out, and named.

    Raises:
        MtlLoraError: there is no plan, no seed that the baseline and all other methods have
            finished, or their rows differ.
    """
    plan = read_plan(folder)
    load_extensions(plan["fixed"].get("recipe", {}).get("extensions", ()))
    score = fixed_in(plan)["score"]
    results = {run["id"]: read_result(folder, run["id"]) for run in plan["runs"]}
    chosen = chosen_points(plan, results)
    finished = {
        method: _finished(plan, results, method, chosen[method], score)
        for method in plan["methods"]
    }
    methods = [method for method in plan["methods"] if finished[method]]
    seeds = [seed for seed in plan["seeds"] if all(seed in finished[m] for m in methods)]
    baseline = plan["baseline"]
    if baseline not in methods or not seeds:
        raise MtlLoraError(
            f"{folder}: nothing can be compared yet: no seed is finished and scored on {score} for "
            f"{'the baseline ' + baseline if baseline not in methods else ', '.join(methods)}"
            f"{_first_reason(results)}"
        )
    own = {method: [finished[method][seed] for seed in seeds] for method in methods}
    scored: dict[str, list[Mapping[str, Any]]] = {m: [r[score] for r in own[m]] for m in methods}
    names = list(scored[baseline][0])
    of_maps = any("tallies" in entry for entry in scored[baseline][0].values())
    beside = REFERENCES if plan["fixed"].get("references") else UNTRAINED
    alone = read_result(folder, beside)
    if alone is not None and is_done(alone):
        scored[beside] = [alone[score]] * len(seeds)
    gains_over = None
    if of_maps:
        gains_over = beside if beside in scored else baseline
    compared = compare(
        {name: _task_runs(name, scored) for name in names},
        baseline,
        seed=_BOOTSTRAP_SEED,
        apart=(UNTRAINED, REFERENCES),
        gains_over=gains_over,
    )
    first = own[baseline][0]
    scores = validation_scores(plan, results) if plan["fixed"]["sweep"] else {}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe": plan["recipe_name"],
        "command_line": plan["command_line"],
        "environment": first["environment"],
        "devices": sorted({r["environment"]["device"] for each in own.values() for r in each}),
        "seeds": seeds,
        "planned_seeds": plan["seeds"],
        "baseline": baseline,
        **({"gains_over": gains_over} if of_maps else {}),
        "match": plan["fixed"]["match"],
        "target": plan["target"],
        "limit": plan["fixed"]["limit"],
        "score": score,
        "resamples": RESAMPLES,
        "bootstrap_seed": _BOOTSTRAP_SEED,
        "budget": plan["budget"],
        "variants": plan.get("variants", {}),
        "methods": {method: _method(own[method], plan, results, method) for method in methods},
        "tasks": {
            name: {
                "metric": scored[baseline][0][name]["metric"],
                "title": scored[baseline][0][name].get("title"),  # older results have none
                "split": scored[baseline][0][name]["split"],
                "examples": scored[baseline][0][name]["examples"],
                "validation": plan["validation"].get(name),
            }
            for name in names
        },
        "average": {method: one.to_json() for method, one in compared.average.items()},
        "scores": {
            method: {name: one.to_json() for name, one in own_tasks.items()}
            for method, own_tasks in compared.tasks.items()
        },
        "average_differences": {
            method: one.to_json() for method, one in compared.average_differences.items()
        },
        "differences": {
            method: {name: one.to_json() for name, one in own_tasks.items()}
            for method, own_tasks in compared.task_differences.items()
        },
        "tuning": [
            {
                "method": method,
                "point": label,
                "settings": _settings(plan, method, label),
                "validation": score,
                "chosen": label == chosen[method],
            }
            for method, labels in scores.items()
            for label, score in labels.items()
        ],
        "unfinished": [*_unfinished(plan, results, chosen), *_failed_base(alone, beside)],
        "undefined": list(_undefined(scored)),
        "not_learned": list(_not_learned(scored, own, seeds)),
        "left_out": [method for method in plan["methods"] if method not in methods],
        "gradients": _gradients(own),
        "validation_loss": _validation_loss(own),
    }


def write_report(folder: Path) -> dict[str, Any]:
    """Write report.json, report.md and the plots.

    Raises:
        MtlLoraError: see `build_report`.
    """
    report = build_report(folder)
    report["plots"] = write_plots(report, folder)
    save_json(folder / JSON_FILE, report)
    write_text(folder / MARKDOWN_FILE, markdown(report))
    return report


def _finished(
    plan: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any] | None],
    method: str,
    point: str | None,
    score: str,
) -> dict[int, Mapping[str, Any]]:
    """seed → result of a method's chosen setting, where it has the scores that are reported."""
    found = {}
    for run in plan["runs"]:
        result = results[run["id"]]
        if (run["method"], run["point"]) != (method, point) or not is_done(result):
            continue
        assert result is not None
        if result[score] is not None:
            found[run["seed"]] = result
    return found


def _undefined(scored: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    """A line for each method and task whose metric is 0 / 0, and what it counts as."""
    for method, each in scored.items():
        for name, first in each[0].items():
            metric = find(first["metric"])
            whys = [metric.undefined(unpack(one[name])) for one in each]
            known = [why for why in whys if why is not None]
            if known:
                value = metric.value(unpack(each[whys.index(known[0])][name]))
                yield (
                    f"{name}: {first.get('title') or first['metric']} of {method} is undefined with "
                    f"{len(known)} of {len(each)} seeds ({known[0]}) and counts as {value:g}"
                )


def _not_learned(
    scored: Mapping[str, Sequence[Mapping[str, Any]]],
    own: Mapping[str, Sequence[Mapping[str, Any]]],
    seeds: Sequence[int],
) -> Iterator[str]:
    """A line for each method and task that gives one answer to nearly all rows, or answers that cannot be told from
    a guess; then what the runs' own looks showed (`training.signs`), and where gradients spiked. Older results know
    the first alone."""
    for method, each in scored.items():
        for name in _of_texts(each[0]) if method != UNTRAINED else ():
            outcomes = [unpack(one[name]) for one in each]
            same = [one_answer(one.gold, one.predicted) is not None for one in outcomes]
            if any(same):
                yield (
                    f"{name}: {method} gives one answer to nearly all rows with {sum(same)} of "
                    f"{len(each)} seeds"
                )
            guessed = [
                bool(one[name].get("guess")) and not alike
                for one, alike in zip(each, same, strict=True)
            ]
            if any(guessed):
                yield (
                    f"{name}: answers of {method} cannot be told from a guess by how often each is right with "
                    f"{sum(guessed)} of {len(each)} seeds"
                )
    for method, runs in own.items():
        for seed, run in zip(seeds, runs, strict=True):
            yield from (f"{method}, seed {seed}: {line}" for line in run.get("signs", ()))
        spiked = sum(run.get("spikes", 0) for run in runs)
        if spiked:
            yield (
                f"{method}: {spiked} of {sum(run['steps'] for run in runs):,} steps had a gradient more than "
                f"{TIMES:g} times the usual"
            )


def _of_texts(entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The tasks whose answers are no maps."""
    return [name for name, entry in entries.items() if "tallies" not in entry]


def _task_runs(name: str, scored: Mapping[str, Sequence[Mapping[str, Any]]]) -> TaskRuns:
    entries = [one[name] for each in scored.values() for one in each]
    require_same_rows(name, entries)
    outcomes = {}
    for method, each in scored.items():
        known = {id(one[name]): unpack(one[name]) for one in each}
        outcomes[method] = [known[id(one[name])] for one in each]
    return TaskRuns(entries[0]["metric"], outcomes)


def _method(
    own: Sequence[Mapping[str, Any]],
    plan: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any] | None],
    method: str,
) -> dict[str, Any]:
    """What a method is and costs; speed and seconds are means over the seeds, memory the most.

    `sharing` is the most processes among which the device of one of its runs was divided.
    """
    first = own[0]
    memory = [one["peak_memory_gib"] for one in own if one["peak_memory_gib"] is not None]
    runs = [run["id"] for run in plan["runs"] if run["method"] == method]
    return {
        "rank": first["rank"],
        "alpha": first["alpha"],
        "settings": first["settings"],
        "parameters": first["parameters"],
        "tokens_per_second": fmean(one["tokens_per_second"] for one in own),
        "seconds": fmean(one["seconds"] for one in own),
        "steps": first["steps"],
        "tokens": fmean(one["tokens"] for one in own),
        "peak_memory_gib": max(memory) if memory else None,
        "last_loss": fmean(one["last_loss"] for one in own),
        "sharing": max(one.get("sharing", 1) for one in own),
        "settings_tried": len(points_in(plan, method)),
        "runs": len(runs),
        "runs_finished": sum(is_done(results[name]) for name in runs),
    }


def _settings(plan: Mapping[str, Any], method: str, label: str) -> dict[str, Any]:
    return next(
        dict(run["settings"])
        for run in plan["runs"]
        if (run["method"], run["point"]) == (method, label)
    )


def _unfinished(
    plan: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any] | None],
    chosen: Mapping[str, str | None],
) -> list[dict[str, Any]]:
    score = fixed_in(plan)["score"]
    found = []
    for run in plan["runs"]:
        result = results[run["id"]]
        if result is None:
            reason = "not run yet"
        elif not is_done(result):
            reason = result["reason"]
        elif result[score] is None and run["point"] == chosen[run["method"]]:
            reason = f"not scored on {score} yet"
        else:
            continue
        found.append({"id": run["id"], "reason": reason})
    return found


def _failed_base(alone: Mapping[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """What stands beside the methods, where its scoring failed."""
    if alone is None or is_done(alone):
        return []
    return [{"id": name, "reason": alone["reason"]}]


def _first_reason(results: Mapping[str, Mapping[str, Any] | None]) -> str:
    reasons = [f"{r['id']}: {r['reason']}" for r in results.values() if r and not is_done(r)]
    return f"; {reasons[0]}" if reasons else ""


def _gradients(own: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """method → mean cosine of the tasks' gradients over seeds, where the runs measured it."""
    found = {}
    for method, each in own.items():
        known = [one["gradients"] for one in each if one["gradients"]]
        if not known:
            continue
        tasks = list(dict.fromkeys(name for one in known for name in one["tasks"]))
        values: dict[tuple[str, str], list[float]] = {}
        for one in known:
            for left, row in zip(one["tasks"], one["cosine"], strict=True):
                for right, value in zip(one["tasks"], row, strict=True):
                    if value is not None:
                        values.setdefault((left, right), []).append(value)
        cosine = [
            [fmean(values[left, right]) if (left, right) in values else None for right in tasks]
            for left in tasks
        ]
        found[method] = {"tasks": tasks, "cosine": cosine}
    return found


def _validation_loss(own: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """method → task → [[step, loss]], mean over the seeds that have the step."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for method, each in own.items():
        values: dict[str, dict[int, list[float]]] = {}
        for event in (event for one in each for event in one["validation_loss"]):
            for name, loss in event["loss"].items():
                if loss is not None:
                    values.setdefault(name, {}).setdefault(event["step"], []).append(loss)
        if values:
            found[method] = {
                name: [[step, fmean(losses)] for step, losses in sorted(steps.items())]
                for name, steps in values.items()
            }
    return found
