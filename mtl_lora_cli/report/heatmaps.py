"""The picture of `inspect`: gates, norms of the updates, and how alike the tasks are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.runs.paths import require_writable

_LABELS = 60  # more rows or columns than this are not all named
_TALLEST, _WIDEST = 12, 60  # inches of a heat map, and of the whole picture


@dataclass(frozen=True)
class Panel:
    """One heat map.

    Attributes:
        title: above it.
        values: None is left white.
        rows, columns: their names.
        limits: values of the first and the last colour; None for the largest value.
    """

    title: str
    values: Sequence[Sequence[float | None]]
    rows: Sequence[str]
    columns: Sequence[str]
    limits: tuple[float, float | None]


def require_plots(path: Path) -> None:
    """Refuse a picture that cannot be drawn.

    Raises:
        UsageError: matplotlib is not installed, or does not write files of this kind.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError(
            "--output: matplotlib is not installed; get it with: pip install matplotlib"
        ) from None
    kinds = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".") not in kinds:
        raise UsageError(
            f"--output: expected a file ending in .{', .'.join(kinds)}, received '{path}'"
        )
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--output: there is no folder {path.absolute().parent}")
    require_writable(path.parent, "--output")


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Draw what `inspect_run` found: above a row for each layer, below one for each task."""
    from matplotlib.figure import Figure

    above, below = _of_layers(content), similarity_panels(content)
    heights = [1.2 + min(_TALLEST, 0.16 * len(content["layers"]))]
    heights += [2 + min(_TALLEST, 0.25 * len(content["tasks"]))] if below else []
    widths = [sum(2.5 + 0.15 * len(panel.columns) for panel in row) for row in (above, below)]
    size = (min(_WIDEST, max(widths)), sum(heights))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(f"{content['run']}: {content['method']}, rank {content['rank']}", fontsize=11)
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)
    for (part,), panels in zip(parts, (above, below), strict=False):
        ratios = [2 + 0.15 * len(panel.columns) for panel in panels]
        axes = part.subplots(1, len(panels), width_ratios=ratios, squeeze=False)
        for axis, panel in zip(axes[0], panels, strict=True):
            fill(part, axis, panel)
    figure.savefig(path, dpi=130)


def _of_layers(content: Mapping[str, Any]) -> list[Panel]:
    """Gates and updates of each task, where the method has them, and the norms of all factors."""
    panels = [panel for panel in (gate_panel(content), update_panel(content)) if panel is not None]
    rows = layer_names(content)
    for factor in "AB":
        norms = [layer["norms"][factor] for layer in content["layers"].values()]
        columns = [f"{factor} {number}" for number in range(1, len(norms[0]) + 1)]
        panels.append(Panel(f"norm of {factor}", norms, rows, columns, (0, None)))
    return panels


def gate_panel(content: Mapping[str, Any]) -> Panel | None:
    """A row for each layer, a column for each task and up-projection; None without gates."""
    tasks = content["tasks"]
    if not content["layers"] or not content["similarity"]["gates"]:
        return None
    ups = range(1, content["up_projections"] + 1)
    layers = content["layers"].values()
    gates = [[g for task in tasks for g in layer["gates"][task]] for layer in layers]
    columns = [f"{task} {number}" for task in tasks for number in ups]
    return Panel("gate of each up-projection", gates, layer_names(content), columns, (0, 1))


def update_panel(content: Mapping[str, Any]) -> Panel | None:
    """A row for each layer, a column for each task; None where no task has an update."""
    tasks = content["tasks"]
    if not content["layers"] or not content["update_norm"]:
        return None
    layers = content["layers"].values()
    norms = [[layer["norms"]["update"][task] for task in tasks] for layer in layers]
    return Panel("norm of the update", norms, layer_names(content), tasks, (0, None))


def similarity_panels(content: Mapping[str, Any]) -> list[Panel]:
    """How alike the tasks are, where the method tells them apart."""
    tasks = content["tasks"]
    return [
        Panel(f"cosine of {kind}", values, tasks, tasks, (-1, 1))
        for kind, values in content["similarity"].items()
        if values
    ]


def fill(figure: Any, axis: Any, panel: Panel) -> None:
    """Draw one heat map with its names and its scale; `figure` is the axis's own."""
    low, high = panel.limits
    shown = [[float("nan") if value is None else value for value in row] for row in panel.values]
    image = axis.imshow(
        shown,
        vmin=low,
        vmax=high,
        cmap="RdBu_r" if low < 0 else "viridis",
        aspect="auto",
        interpolation="nearest",
    )
    axis.set_title(panel.title, fontsize=10)
    for axes, names in ((axis.yaxis, panel.rows), (axis.xaxis, panel.columns)):
        step = -(-len(names) // _LABELS)
        axes.set_ticks(range(0, len(names), step), names[::step], fontsize=7)
    axis.tick_params("x", rotation=90)
    figure.colorbar(image, ax=axis, shrink=0.8)


def layer_names(content: Mapping[str, Any]) -> list[str]:
    """`3 q_proj` for `model.layers.3.self_attn.q_proj`, and so on."""
    return [_short(path) for path in content["layers"]]


def _short(path: str) -> str:
    """`3 q_proj` of `model.layers.3.self_attn.q_proj`."""
    parts = path.split(".")
    return " ".join([*[part for part in parts if part.isdigit()][:1], parts[-1]])
