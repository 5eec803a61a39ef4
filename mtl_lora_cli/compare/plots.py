"""The report's pictures. matplotlib is loaded here alone, and a report without it has none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtl_lora_cli.compare.grid import TEST, UNTRAINED
from mtl_lora_cli.report.heatmaps import Panel, fill
from mtl_lora_cli.report.plots import COLORS

SCORES, GRADIENTS, LOSSES = "scores.png", "gradients.png", "validation.png"


def write_plots(report: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Draw what the report has.

    Returns:
        file name → what it shows; nothing where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        return {}
    matplotlib.use("Agg")
    colors = {
        method: COLORS[number % len(COLORS)] for number, method in enumerate(report["average"])
    }
    drawn = {}
    if report.get("gains_over") is None:  # metrics of maps have units of their own
        drawn[SCORES] = f"scores, and differences to {report['baseline']}"
        _scores(report, colors, folder / SCORES)
    if report["gradients"]:
        drawn[GRADIENTS] = "cosine of the tasks' gradients on the shared parameters"
        _gradients(report, folder / GRADIENTS)
    if report["validation_loss"]:
        drawn[LOSSES] = "validation loss of each task"
        _losses(report, colors, folder / LOSSES)
    return drawn


def _scores(report: Mapping[str, Any], colors: Mapping[str, str], path: Path) -> None:
    """Left the scores, right the differences, a row for the average and one for each task.

    The untrained model stands on the left alone: it is so far from the others that beside it their
    differences could not be read.
    """
    from matplotlib import pyplot as plt

    names = ["average", *report["tasks"]]
    word = "" if report["score"] == TEST else f"{report['score']} "
    figure, axes = plt.subplots(
        1, 2, figsize=(11, 1.4 + 0.14 * len(names) * (len(colors) + 1)), sharey=True
    )
    sides = (
        (report["average"], report["scores"], f"{word}score"),
        (
            report["average_differences"],
            report["differences"],
            f"{word}difference to {report['baseline']}",
        ),
    )
    shifts = {
        method: 0.8 * (number + 0.5) / len(colors) - 0.4 for number, method in enumerate(colors)
    }
    for axis, (average, scores, title) in zip(axes, sides, strict=True):
        for method, one in average.items():
            if axis is axes[1] and method == UNTRAINED:
                continue
            entries = [one, *(scores[method][name] for name in report["tasks"])]
            places = [row + shifts[method] for row in range(len(names))]
            axis.hlines(
                places,
                [entry["low"] for entry in entries],
                [entry["high"] for entry in entries],
                color=colors[method],
            )
            values = [entry["value"] for entry in entries]
            axis.plot(values, places, "o", color=colors[method], markersize=4, label=method)
        axis.set_title(f"{title}, 95 % interval", fontsize=10)
        axis.grid(axis="x", alpha=0.3)
        axis.axhline(0.5, color="black", linewidth=0.5)
    axes[1].axvline(0, color="black", linewidth=0.8)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=8)
    _save(figure, path)


def _gradients(report: Mapping[str, Any], path: Path) -> None:
    from matplotlib import pyplot as plt

    found = report["gradients"]
    size = max(len(one["tasks"]) for one in found.values())
    side = 2.2 + 0.3 * size
    figure, axes = plt.subplots(1, len(found), figsize=(side * len(found), side), squeeze=False)
    for axis, (method, one) in zip(axes[0], found.items(), strict=True):
        fill(figure, axis, Panel(method, one["cosine"], one["tasks"], one["tasks"], (-1, 1)))
    _save(figure, path)


def _losses(report: Mapping[str, Any], colors: Mapping[str, str], path: Path) -> None:
    from matplotlib import pyplot as plt

    found = report["validation_loss"]
    names = list(dict.fromkeys(name for one in found.values() for name in one))
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3 * columns, 2.3 * rows), squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        for method, one in found.items():
            if name in one:
                steps, losses = zip(*one[name], strict=True)
                axis.plot(steps, losses, ".-", color=colors[method], label=method)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    axes[0][0].legend(fontsize=7)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
