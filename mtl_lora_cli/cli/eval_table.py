"""The tables and the JSON of `mtl-lora eval`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mtl_lora_cli.cli.table import table

if TYPE_CHECKING:
    from mtl_lora_cli.evaluation.averages import Average
    from mtl_lora_cli.evaluation.delta import DeltaM

Result = dict[str, Any]


def as_json(
    run: str,
    results: Sequence[Result],
    beside: Sequence[Result | None],
    means: Sequence[Average],
    name: str | None,
) -> dict[str, Any]:
    """What `--json` prints: results without their rows, and what stands beside them."""
    from mtl_lora_cli.evaluation.results import OUTCOME

    rows = []
    for result, other in zip(results, beside, strict=True):
        row = {key: value for key, value in result.items() if key not in (*OUTCOME, "shown")}
        shown = None if other is None else {k: v for k, v in other.items() if k != "outcome"}
        rows.append({**row, "base" if name is None else "beside": shown})
    return {"run": run, "results": rows, "averages": [dataclasses.asdict(mean) for mean in means]}


def as_table(
    results: Sequence[Result],
    beside: Sequence[Result | None],
    means: Sequence[Average],
    name: str | None,
    *,
    base_only: bool,
) -> str:
    """One table of all tasks, averages under it, and what has to be known to read it.

    Args:
        results: of each task.
        beside: of another model, on the same rows.
        means: averages over the tasks.
        name: of the other model; None: the untouched base model.
        base_only: the results themselves are the base model's.
    """
    from mtl_lora_cli.evaluation.results import title_in
    from mtl_lora_cli.metrics.paired import right_or_wrong

    header = ["task", "metric", "base" if base_only else "score", "95 % interval"]
    if not base_only:
        header += [name or "base", "difference", "p"]
    of_maps = any(result["protocol"] == "maps" for result in results)
    header += [] if of_maps else ["majority", "chance"]
    rows = []
    for result, other in zip(results, beside, strict=True):
        for number, (metric, measured) in enumerate(result["metrics"].items()):
            title = title_in(result, metric)
            row = [result["task"] if number == 0 else "", title, *_value(metric, measured)]
            if not base_only:
                row += _other(metric, other)
            shares = right_or_wrong(metric)
            if not of_maps:
                row += [_share(result[key]) if shares else "" for key in ("majority", "chance")]
            rows.append(row)
    lines = [table(header, rows)]
    if means:
        lines += ["", _means(means, name, base_only=base_only)]
    return "\n".join([*lines, *_notes(results, beside)])


def delta_line(delta: DeltaM) -> str:
    """Δm in a line, and its parts."""
    parts = ", ".join(f"{task} {value:+.2f}" for task, value in delta.tasks.items())
    interval = "" if delta.low is None else f" ({delta.low:+.2f} – {delta.high:+.2f})"
    return f"Δm {delta.value:+.2f} %{interval}: {parts}"


def _means(means: Sequence[Average], name: str | None, *, base_only: bool) -> str:
    header = ["average", "tasks", "base" if base_only else "score", "95 % interval"]
    compared = not base_only and any(mean.difference is not None for mean in means)
    if compared:
        header += [name or "base", "difference", "p"]
    rows = []
    for mean in means:
        row = [mean.name, f"{mean.tasks} of {mean.of}", _shown(mean.value)]
        row.append(_interval(mean.low, mean.high))
        if compared:
            row += [
                _share(mean.other),
                _apart(mean.difference, mean.difference_low, mean.difference_high),
                _p(mean.p),
            ]
        rows.append(row)
    return "\n".join(
        [table(header, rows), *(f"{m.name}: undefined, {m.why}" for m in means if m.why)]
    )


def _value(metric: str, measured: Result) -> list[str]:
    digits = _digits(metric)
    interval = _interval(measured["low"], measured["high"], digits)
    return [_shown(measured["value"], digits), interval]


def _other(metric: str, other: Result | None) -> list[str]:
    if other is None:
        return ["–", "", ""]
    theirs = other["metrics"].get(metric)
    if theirs is None:
        return ["–", "", ""]
    apart = other["paired"].get(metric)
    digits = _digits(metric)
    shown = _shown(theirs["value"], digits)
    if apart is None:
        return [shown, "", ""]
    difference = _apart(apart["difference"], apart["low"], apart["high"], digits)
    return [shown, difference, _p(apart["p"])]


def _digits(metric: str) -> int:
    """Behind the point; the harness's metrics are not ours, and have as many as most."""
    from mtl_lora_cli.metrics import METRICS

    return METRICS[metric].digits if metric in METRICS else 3


_CHANGED = (
    "are not those of when the run began; these were not compared with its training rows",
    "are not those of when the run began; what it learned of them says nothing of others",
)


def _notes(results: Sequence[Result], beside: Sequence[Result | None]) -> list[str]:
    from mtl_lora_cli.evaluation.results import title_in
    from mtl_lora_cli.metrics.guessing import guessed, one_sided

    examples = ", ".join(f"{r['task']} {r['examples']:,} {_rows(r)}" for r in results)
    protocols = " and ".join(dict.fromkeys(_protocol(result) for result in results))
    notes = [f"{examples}; protocol {protocols}"]
    for result, other in zip(results, beside, strict=True):
        task = result["task"]
        if result.get("rows_changed"):
            notes.append(
                f"{task}: the {result['split']} rows {_CHANGED[result['split'] == 'train']}"
            )
        elif (
            result["split"] == "train" and result["model"] == "adapter" and not result.get("source")
        ):
            notes.append(f"{task}: the run learned from these rows: this says nothing of others")
        for metric, measured in result["metrics"].items():
            if measured["value"] is None:
                title = title_in(result, metric)
                notes.append(f"{task}: {title} is undefined: {measured['why']}")
        if result.get("ends_counted"):
            notes.append(f"{task}: {_ends_counted(result)}")
        if result.get("one_answer"):
            notes.append(f"{task}: {one_sided(result['one_answer'])}")
        elif result.get("guess") and result["model"] == "adapter":
            notes.append(f"{task}: {guessed(result['guess'])}")
        if result.get("pass_at"):
            notes.append(f"{task}: {_several(result)}")
        if result["unparsable"]:
            notes.append(
                f"{task}: {result['unparsable']} answers could not be read and count as wrong"
            )
        if result.get("unreadable"):
            notes.append(
                f"{task}: {result['unreadable']:,} of {result['examples']:,} right answers cannot be generated so that they are "
                "read (generate's stop and max_new_tokens, the tokenizer) and count as wrong"
            )
        if result.get("ties"):
            rows = f"{result['ties']:,} of {result['examples']:,} rows"
            notes.append(
                f"{task}: in {rows} the highest score stands twice; the first choice counts"
            )
        if result.get("constant") and other is result["constant"]:
            notes.append(f"{task}: constant is {other['answer']}, by training pictures")
        if other is not None and other.get("differs"):
            notes.append(f"{task}: the other run differs in {', '.join(other['differs'])}")
        if other is not None and "equal" in other:
            largest = other["largest"]
            told = (
                ""
                if largest is None
                else f", largest difference of log-probabilities {largest:.2e}"
            )
            notes.append(f"{task}: equal answers {100 * other['equal']:.1f}%{told}")
    cut = sum(result["truncated_prompts"] or 0 for result in results)
    if cut:
        notes.append(
            f"{cut} prompts were longer than the model's positions and lost their beginning"
        )
    return notes


def _several(result: Result) -> str:
    """Which figures rows that were answered several times have besides the mean over their answers."""
    how = result["sampling"]
    passed = ", ".join(
        f"pass@{k} {_shown(one['value'])}"
        + (f" ({_interval(one['low'], one['high'])})" if one["low"] is not None else "")
        for k, one in result["pass_at"].items()
    )
    return (
        f"scores are means over {how['answers']} answers a row (temperature {how['temperature']:g}, seed "
        f"{how['seed']}); {passed}: the chance that one of k answers is right"
    )


def _rows(result: Result) -> str:
    return f"{result['split']} {'pictures' if result['protocol'] == 'maps' else 'rows'}"


def _ends_counted(result: Result) -> str:
    """What was counted besides the choices' own tokens, and what the figure is without it."""
    rows = f"in {result['ends_counted']:,} of {result['examples']:,} rows"
    text = f"{rows} one choice begins another; there the end of each choice counts, too"
    harness = result.get("harness")
    if harness is None:
        return text
    return (
        f"{text}; without it, as in lm-evaluation-harness, acc is {_shown(harness['acc']['value'])}"
    )


def _protocol(result: Result) -> str:
    """The protocol with what decides its figures."""
    if result.get("harness_task"):
        task = result["harness_task"]
        return f"{result['protocol']} ({task['task']}, lm_eval {task['lm_eval']})"
    if result.get("blind"):
        return f"{result['protocol']} (pictures {result['blind']})"
    if result["normalisation"] not in (None, "sum"):
        return f"{result['protocol']} (per {result['normalisation']})"
    return str(result["protocol"])


def _shown(value: float | None, digits: int = 3) -> str:
    return "undefined" if value is None else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _interval(low: float | None, high: float | None, digits: int = 3) -> str:
    return "" if low is None or high is None else f"{low:.{digits}f} – {high:.{digits}f}"


def _apart(difference: float | None, low: float | None, high: float | None, digits: int = 3) -> str:
    if difference is None:
        return ""
    if low is None or high is None:
        return f"{difference:+.{digits}f}"
    return f"{difference:+.{digits}f} ({low:+.{digits}f} – {high:+.{digits}f})"


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"
