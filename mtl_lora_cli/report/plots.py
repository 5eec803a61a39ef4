"""The report's pictures, drawn from its facts: one panel each, so that a page can lay them out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Any

from mtl_lora_cli.report.heatmaps import (
    Panel,
    fill,
    gate_panel,
    similarity_panels,
    update_panel,
)

COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#888888")
_INK = "#24292f"  # in SVG the page's own text colour takes its place, light or dark
_STYLE: Any = {
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "legend.fontsize": 7,
    "legend.framealpha": 0,
    "text.color": _INK,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "xtick.color": _INK,
    "ytick.color": _INK,
    "svg.fonttype": "none",  # letters stay letters, in the page's own font
}
MEASURES = {
    "loss": "training loss",
    "learning_rate": "learning rate",
    "gradient_norm": "gradient norm, highest",
    "tokens_per_second": "tokens/s",
    "floor_share": "share of the floor",
    "memory_gib": "most memory so far, GiB",
}
_PANELS = 60  # tasks with a panel of their own
_WIDTH = 4.2  # inches of an ordinary panel


@dataclass(frozen=True)
class Plot:
    """One picture.

    Attributes:
        name: of its file, without ending.
        section: of the page that it belongs to.
        title: what it shows.
        run: the number of the run that it is about; None: all of them.
        wide: it is not to be made narrow.
        figure: matplotlib's.
    """

    name: str
    section: str
    title: str
    run: int | None
    wide: bool
    figure: Any

    @property
    def svg(self) -> str:
        """For a page: no background, the page's colour of text, names that no other plot has."""
        file = StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with _style(svg_hashsalt=self.name):
            self.figure.savefig(file, format="svg", transparent=True, metadata=nothing)
        text = file.getvalue()
        box = re.search(r'viewBox="[^"]*"', text)
        assert box is not None
        inside = text[text.index("<defs>") :].replace(_INK, "currentColor")
        inside = re.sub(r"<style.*?</style>", "", inside, flags=re.DOTALL)
        inside = re.sub(r'<g id="[^"]*"', "<g", inside)
        return f"<svg {box[0]}>{inside.strip()}"

    def write_png(self, folder: Path) -> None:
        """Write it to `folder`, on white."""
        with _style():
            self.figure.savefig(folder / f"{self.name}.png", dpi=130, facecolor="white")


def can_be_drawn() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def plots_of(facts: Mapping[str, Any]) -> list[Plot]:
    """Every picture that the facts allow; none where none `can_be_drawn`."""
    if not can_be_drawn():
        return []
    runs = facts["runs"]
    with _style():
        found = [*_curves(runs), *_tasks(runs)]
        for number, run in enumerate(runs):
            found += _of_run(run, number, "" if len(runs) == 1 else f"{number + 1}-")
    return found


@contextmanager
def _style(**more: str) -> Iterator[None]:
    from matplotlib import rc_context

    with rc_context(_STYLE | {name.replace("_", "."): value for name, value in more.items()}):
        yield


def _curves(runs: Sequence[Mapping[str, Any]]) -> Iterator[Plot]:
    for name, title in MEASURES.items():
        lines = [(run["curves"]["step"], run["curves"][name]) for run in runs]
        if any(values for _, values in lines):
            figure, axis = _panel(title)
            for number, (steps, values) in enumerate(lines):
                _line(axis, steps, values, number, smooth=name in ("loss", "tokens_per_second"))
            if name == "gradient_norm":
                axis.set_yscale("log")
            _legend(axis, runs)
            yield Plot(name, "curves", title, None, False, figure)


def _tasks(runs: Sequence[Mapping[str, Any]]) -> Iterator[Plot]:
    """A panel for each task's loss, and one for its metric on held-out examples if it was taken."""
    tasks = list(dict.fromkeys(task for run in runs for task in run["curves"]["task_loss"]))
    for place, task in enumerate(tasks[:_PANELS]):
        stem = f"{place + 1:02}-{_file_name(task)}"
        figure, axis = _panel(f"{task}: loss")
        for number, run in enumerate(runs):
            _line(axis, run["curves"]["step"], run["curves"]["task_loss"].get(task), number)
            _looks(axis, run["validation"], "loss", task, number)
        _legend(axis, runs)
        yield Plot(f"loss-{stem}", "task-loss", f"loss of {task}", None, False, figure)
        if any(task in look["metric"] for run in runs for look in run["validation"]):
            name = next(
                (r["metric_names"][task] for r in runs if task in r["metric_names"]), "metric"
            )
            figure, axis = _panel(f"{task}: {name}, held-out examples")
            for number, run in enumerate(runs):
                _looks(axis, run["validation"], "metric", task, number)
            _legend(axis, runs)
            yield Plot(f"metric-{stem}", "task-metric", f"metric of {task}", None, False, figure)


def _of_run(run: Mapping[str, Any], number: int, prefix: str) -> Iterator[Plot]:
    mixture, adapter, gradients = run["mixture"], run["adapter"], run["gradients"]
    if any(one["planned_share"] is not None or one["drawn_share"] is not None for one in mixture):
        figure = _shares(mixture)
        yield Plot(f"{prefix}mixture", "mixture", "shares of the examples", number, False, figure)
    maps: list[tuple[str, str, Panel | None]] = []
    if adapter is not None:
        maps += [
            ("gates", "layers", gate_panel(adapter)),
            ("updates", "layers", update_panel(adapter)),
        ]
        kinds = [kind for kind, values in adapter["similarity"].items() if values]
        panels = similarity_panels(adapter)
        maps += [(f"similar-{k}", "similarity", p) for k, p in zip(kinds, panels, strict=True)]
    if gradients is not None:
        names = gradients["tasks"]
        panel = Panel("cosine of gradients", gradients["cosine"], names, names, (-1, 1))
        maps.append(("gradients", "gradients", panel))
    for name, section, one in maps:
        if one is not None:
            wide = len(one.columns) > 20
            yield Plot(f"{prefix}{name}", section, one.title, number, wide, _heat_map(one))


def _panel(title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, 2.4), layout="constrained")
    axis = figure.subplots()
    axis.set_title(title)
    axis.set_xlabel("step")
    axis.grid(alpha=0.15, color=_INK)
    return figure, axis


def _line(
    axis: Any, steps: Sequence[int], values: Sequence[float | None] | None, number: int,
    *, smooth: bool = True,
) -> None:  # fmt: skip
    """A run's curve; with `smooth` a pale one, and the same without its jumps in front of it."""
    points = [(step, v) for step, v in zip(steps, values or (), strict=False) if v is not None]
    if not points:
        return
    x, y = zip(*points, strict=True)
    if not smooth or len(points) < 5:
        axis.plot(x, y, marker="." if len(points) < 5 else None, **_stroke(number))
        return
    axis.plot(x, y, alpha=0.3, linewidth=0.8, **_stroke(number))
    axis.plot(x, smoothed(y), **_stroke(number))


def _stroke(number: int) -> dict[str, str]:
    """A colour for each run; from the eighth on they come again, dashed."""
    again, place = divmod(number, len(COLORS))
    return {"color": COLORS[place], "linestyle": ("-", "--", ":", "-.")[again % 4]}


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of each value and its neighbours: a tenth of the curve, at least five, fewer at its ends."""
    reach = max(2, len(values) // 20)
    near = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [fmean(some) for some in near]


def _looks(
    axis: Any, looks: Sequence[Mapping[str, Any]], kind: str, task: str, number: int
) -> None:
    """What was measured on held-out examples, as points."""
    points = [(look["step"], look[kind].get(task)) for look in looks]
    points = [(step, value) for step, value in points if value is not None]
    if points:
        x, y = zip(*points, strict=True)
        axis.plot(
            x, y, "o--", color=COLORS[number % len(COLORS)], markersize=4, linewidth=0.8, zorder=3
        )


def _legend(axis: Any, runs: Sequence[Mapping[str, Any]]) -> None:
    """Which colour is which run, where there are several."""
    if len(runs) < 2:
        return
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], **_stroke(number)) for number in range(len(runs))]  # type: ignore[arg-type]
    axis.legend(lines, [run["label"] for run in runs])


def _shares(mixture: Sequence[Mapping[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, 1.1 + 0.3 * min(len(mixture), _PANELS)), layout="constrained")
    axis = figure.subplots()
    shown = mixture[:_PANELS]
    for key, label, shift, color in (
        ("planned_share", "planned", -0.2, COLORS[6]),
        ("drawn_share", "drawn", 0.2, COLORS[0]),
    ):
        places = [place + shift for place, one in enumerate(shown) if one[key] is not None]
        values = [one[key] for one in shown if one[key] is not None]
        if values:
            axis.barh(places, values, height=0.36, color=color, label=label)
    axis.set_yticks(range(len(shown)), [one["task"] for one in shown])
    axis.invert_yaxis()
    axis.set_title("share of the examples")
    axis.legend()
    return figure


def _heat_map(panel: Panel) -> Any:
    """Large enough for the names; tasks against tasks are square."""
    from matplotlib.figure import Figure

    names = 0.06 * min(40, max(map(len, (*panel.rows, *panel.columns)), default=0))
    width = max(_WIDTH, 1.6 + names + 0.15 * min(len(panel.columns), 120))
    height = max(2.4, 0.8 + names + 0.13 * min(len(panel.rows), 90))
    if panel.rows == panel.columns:
        height = width - 0.6
    figure = Figure(figsize=(width, height), layout="constrained")
    fill(figure, figure.subplots(), panel)
    return figure


def _file_name(task: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", task)[:80]
