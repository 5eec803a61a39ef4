"""The page: one HTML file made of the facts alone. It runs no script and asks no network for anything."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.metrics.paired import right_or_wrong
from mtl_lora_cli.report.plots import MEASURES, Plot, can_be_drawn
from mtl_lora_cli.runs.atomic import write_text
from mtl_lora_cli.runs.paths import require_writable
from mtl_lora_cli.training.progress import duration
from mtl_lora_cli.visible import visible

GENERATOR = "mtl-lora report"
_TEMPLATE = "report.html.j2"
_SECTIONS = {
    "summary": "Summary",
    "tasks": "Tasks",
    "curves": "Training",
    "by-task": "Loss and metric of each task",
    "mixture": "Mixture",
    "layers": "Gates and updates by layer",
    "similarity": "How alike the tasks are",
    "gradients": "Gradients",
    "rows": "Rows right and wrong",
    "recipe": "Recipe",
}
_LABELS = {
    "best": "best look, whose adapter counts",
    "seconds": "time of training",
    "parameters": "trained values",
    "tokens_per_second": "tokens/s, median step",
    "floor_share": "share of the floor, median step",
    "peak_memory_gib": "most memory, GiB",
    "last_loss": "loss of the last tenth",
}
_FORMATS = {"seconds": "duration", "floor_share": "share"}


def _finalized(value: Any) -> Any:
    """Strangers' control characters are shown in a page, too; markup stays markup."""
    return type(value)(visible(value)) if isinstance(value, str) else value


def render(facts: Mapping[str, Any], plots: Sequence[Plot]) -> str:
    """The page as text.

    Args:
        facts: from `gather`.
        plots: from `plots_of` of the same facts; none where they cannot be drawn.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        finalize=_finalized,
    )
    drawn = [(plot, Markup(plot.svg)) for plot in plots]
    runs = facts["runs"]

    def of_section(section: str, run: int | None) -> list[dict[str, Any]]:
        return [
            {"title": plot.title, "wide": plot.wide, "markup": markup}
            for plot, markup in drawn
            if (plot.section, plot.run) == (section, run)
        ]

    return environment.get_template(_TEMPLATE).render(
        facts=facts,
        several=len(runs) > 1,
        title=", ".join(run["label"] for run in runs),
        generator=GENERATOR,
        sections=_SECTIONS.items(),
        label=lambda key: _LABELS.get(key, key.replace("_", " ")),
        formats=_FORMATS,
        measures=MEASURES,
        drawable=can_be_drawn(),
        plots=of_section,
        side_by_side=side_by_side(runs),
        looked_at=_looked_at,
        figure=figure,
        place=_place,
        right_or_wrong=right_or_wrong,
    )


def figure(value: float, how: str = "number") -> Markup:
    """A number for people, with its exact value for machines: `<data value="0.8333…">0.833</data>`."""
    return Markup('<data value="{}">{}</data>').format(
        json.dumps(value), escape(_shown(value, how))
    )


def _shown(value: float, how: str) -> str:
    if how == "duration":
        return duration(value)
    if how != "number":
        form = {"score": ".3f", "change": "+.3f", "share": ".1%", "p": ".2g"}[how]
    elif isinstance(value, int):
        form = ","
    else:
        form = ",.0f" if abs(value) >= 1000 else ".4g"
    return format(value, form).replace("-", "−")


def _place(value: float) -> float:
    """Where a score stands in a bar from 0 to 1, in percent."""
    return round(100 * min(1.0, max(0.0, value)), 1)


def _looked_at(looks: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Kind and task of everything that was measured on held-out examples."""
    found = ((kind, task) for kind in ("loss", "metric") for look in looks for task in look[kind])
    return list(dict.fromkeys(found))


def side_by_side(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line for each task, way of asking and metric, with what every run has for it.

    The base model's score stands there where it is the same beside all of them.
    """
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for number, run in enumerate(runs):
        for result in run["results"]:
            asked = [result[key] for key in ("task", "split", "protocol", "normalisation", "limit")]
            for metric in result["metrics"]:
                # Runs whose F1 is of another class stand in lines of their own.
                name, title = metric["name"], metric["title"]
                line = {"result": result, "metric": name, "title": title}
                line["cells"] = [None] * len(runs)
                lines.setdefault((*asked, title), line)["cells"][number] = metric
    for line in lines.values():
        bases = {cell["base"] for cell in line["cells"] if cell is not None}
        line["base"] = bases.pop() if len(bases) == 1 else None
    return list(lines.values())


def require_ours(path: Path) -> None:
    """Refuse to write where there is something else, or nowhere.

    Raises:
        UsageError: there is no such folder, it cannot be written, or what is there is no report.
    """
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--output: there is no folder {path.absolute().parent}")
    if path.is_dir():
        raise UsageError(f"--output: {path} is a folder")
    require_writable(path.parent, "--output")
    if not path.exists():
        return
    with path.open("rb") as file:
        begin = file.read(2000)
    if f'content="{GENERATOR}"'.encode() not in begin:
        raise UsageError(f"{path} exists and is no report; choose another --output")


def write(facts: Mapping[str, Any], plots: Sequence[Plot], path: Path) -> None:
    """Write the page, in the place of an older report.

    Raises:
        UsageError: see `require_ours`.
    """
    require_ours(path)
    try:
        write_text(path, render(facts, plots))
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from None


def write_plots(plots: Sequence[Plot], folder: Path) -> None:
    """Write the plots as PNG files, and the folder where there is none.

    Raises:
        UsageError: matplotlib is not installed, or the folder cannot be written to.
    """
    if not can_be_drawn():
        raise UsageError(
            "--plots: matplotlib is not installed; get it with: pip install matplotlib"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for plot in plots:
            plot.write_png(folder)
    except OSError as error:
        raise UsageError(f"--plots: {folder} cannot be written to: {error.strerror}") from None
