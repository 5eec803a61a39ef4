"""The report of a comparison as tables and sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mtl_lora_cli.compare.grid import CUT, VALIDATION


def summary_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table of averages: header and rows."""
    baseline = report["baseline"]
    header = [
        "method",
        "average" + _on(report) if report.get("gains_over") is None else "Δm, %",
        "95 % interval",
        f"− {baseline}",
        "95 % interval",
        "p",
    ]
    header += ["p (Holm)", "rank", "trained", f"{_amount(report)}/s", "GiB", "settings"]
    rows = []
    for method, one in report["average"].items():
        row = [method, f"{one['value']:.3f}", _interval(one)]
        other = report["average_differences"].get(method)
        row += ["", "", "", ""] if other is None else _difference_cells(other)
        about = report["methods"].get(method)
        if about is None:
            row += ["", "0", "", "", ""]
        else:
            memory = about["peak_memory_gib"]
            row += [
                str(about["rank"]),
                f"{about['parameters']:,}",
                f"{about['tokens_per_second']:,.0f}",
                "–" if memory is None else f"{memory:.1f}",
                str(about["settings_tried"]),
            ]
        rows.append(row)
    return header, rows


def _difference_cells(one: Mapping[str, Any]) -> list[str]:
    return [f"{one['value']:+.3f}", _interval(one, "+"), _p(one["p"]), _p(one["p_holm"])]


def notes(report: Mapping[str, Any]) -> list[str]:
    """What must be known to read the tables, a line each."""
    seeds, planned = report["seeds"], report["planned_seeds"]
    lines = [f"seeds: {', '.join(map(str, seeds))}"]
    if len(seeds) < len(planned):
        lines[0] += (
            f" of {', '.join(map(str, planned))}: the others are not finished for all methods"
        )
    if len(seeds) == 1:
        lines.append("one seed: the intervals say nothing of other seeds, only of other examples")
    elif len(seeds) < 5:
        lines.append(f"{len(seeds)} seeds: what the intervals say of other seeds is rough")
    match, target = report["match"], report["target"]
    if target is None:
        lines.append("ranks as in the recipe: the methods do not train equally many values")
    else:
        whose = "as the recipe's own adapter trains" if match == "params" else "as asked for"
        lines.append(f"ranks picked for trained values within 2 % of {target:,}, {whose}")
    lines += [f"{name} is {text}" for name, text in report["variants"].items()]
    lines += report["budget"]
    lines += _of_validation(report)
    lines += report.get("undefined", [])
    lines += report.get("not_learned", [])
    lines += [f"{method}: left out, no run is finished" for method in report["left_out"]]
    lines += [f"{one['id']}: {one['reason']}" for one in report["unfinished"]]
    sharing = max(one["sharing"] for one in report["methods"].values())
    if sharing > 1:
        lines.append(
            f"up to {sharing} runs at a time shared a device: {_amount(report)}/s and seconds are not those of a "
            f"run alone"
        )
    if len(report["devices"]) > 1:
        lines.append(
            f"speeds are of several devices and cannot be compared: {', '.join(report['devices'])}"
        )
    return lines


def _of_validation(report: Mapping[str, Any]) -> Iterator[str]:
    """By which rows settings were chosen, and which ones the tables are about."""
    cut = [name for name, one in report["tasks"].items() if one["validation"] == CUT]
    rows = (
        f"validation rows cut from train: {', '.join(cut)}"
        if cut
        else "validation rows: each task's validation split"
    )
    if report["score"] == VALIDATION:
        yield f"all scores are of validation rows, and no test file was read; {rows}"
        if report["tuning"]:
            yield (
                "settings chosen by these same scores: a score that chose is not one to publish; "
                "for that score the chosen settings on test"
            )
    elif report["tuning"]:
        yield (
            "settings chosen by the mean validation score, the chosen ones alone scored on test; "
            f"{rows}"
        )


def markdown(report: Mapping[str, Any]) -> str:
    """The whole report as Markdown."""
    tasks, baseline = report["tasks"], report["baseline"]
    methods = list(report["average"])
    parts = [
        f"# Methods compared on {report['recipe']}{_on(report)}",
        f"{_averaged(report)}; the mean over seeds, with 95 % intervals over seeds and examples.",
        _table(*summary_rows(report)),
        "\n".join(f"- {line}" for line in notes(report)),
        "## Tasks",
        _table(
            ["task", "metric", "rows", *(f"{method}{_on(report)}" for method in methods)],
            [
                [name, one.get("title") or one["metric"], f"{one['examples']:,} {one['split']}"]
                + [
                    f"{report['scores'][m][name]['value']:.3f} "
                    f"({_interval(report['scores'][m][name])})"
                    for m in methods
                ]
                for name, one in tasks.items()
            ],
        ),
    ]
    for method, found in report["differences"].items():
        rows = [[name, *_difference_cells(one), _p(one["p_sign"])] for name, one in found.items()]
        header = ["task", f"difference{_on(report)}", "95 % interval", "p", "p (Holm)", "p (sign)"]
        parts += [f"## {method} − {baseline}", _table(header, rows)]
    if report["tuning"]:
        rows = [
            [
                one["method"],
                ", ".join(f"{key}={value}" for key, value in one["settings"].items()),
                "–" if one["validation"] is None else f"{one['validation']:.3f}",
                "chosen" if one["chosen"] else "",
            ]
            for one in report["tuning"]
        ]
        parts += ["## Settings tried", _table(["method", "setting", "validation", ""], rows)]
    parts += ["## Runs", _table(*_run_rows(report))]
    for file, title in report.get("plots", {}).items():
        parts.append(f"![{title}]({file})")
    environment = report["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items() if v)
    limit = report["limit"]
    parts += [
        "## Made with",
        "\n".join(
            [
                f"- `{' '.join(report['command_line'])}`",
                f"- {', '.join(report['devices'])}, {environment['dtype']}; {versions}",
                f"- git {environment['git_revision'] or 'unknown'}; {report['date']}",
                f"- {report['resamples']:,} resamples, seed {report['bootstrap_seed']}; p by the "
                f"bootstrap is at least {2 / (report['resamples'] + 1):.1g}",
                "- all rows of each split score it"
                if limit is None
                else f"- at most {limit:,} rows of each task score it, drawn once for all runs",
            ]
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _amount(report: Mapping[str, Any]) -> str:
    """What speed is told in."""
    return "tokens" if report.get("gains_over") is None else "pictures"


def _averaged(report: Mapping[str, Any]) -> str:
    """What the average is."""
    over = report.get("gains_over")
    if over is None:
        return "Average over tasks, each by its own metric"
    return f"Δm: the mean over tasks of what each one's metric gains over {over}, in percent"


def _run_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = ["method", "alpha", "runs", "steps", _amount(report), "seconds", "last loss"]
    rows = [
        [
            method,
            f"{one['alpha']:g}",
            f"{one['runs_finished']} of {one['runs']}",
            f"{one['steps']:,}",
            f"{one['tokens']:,.0f}",
            f"{one['seconds']:,.1f}",
            f"{one['last_loss']:.3f}",
        ]
        for method, one in report["methods"].items()
    ]
    return header, rows


def _on(report: Mapping[str, Any]) -> str:
    """Said with every score that is not a test score."""
    return " (validation)" if report["score"] == VALIDATION else ""


def _interval(one: Mapping[str, Any], sign: str = "") -> str:
    return f"{one['low']:{sign}.3f} – {one['high']:{sign}.3f}"


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *rows))
