"""The same run on the fused and on the plain engine: does the loss go the same way?

    python tests/benchmarks/loss_curves.py OUT RECIPE [key=value …]

Trains RECIPE three times: with the plain engine, with the plain engine and half as many rows a pass
(the same sums in another order, which shows what rounding alone does), and with the fused engine.
Writes OUT.json and OUT.png, and prints the mean distances of the curves.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from mtl_lora_cli.recipe.load import find_recipe, load_recipe
from mtl_lora_cli.training.prepare import prepare
from mtl_lora_cli.training.run import start

WINDOW = 10  # steps that the plotted curves average


def train(folder: Path, name: str, recipe: str, overrides: list[str]) -> list[dict[str, Any]]:
    loaded = load_recipe(find_recipe(recipe), [*overrides, f"run.name={name}"])
    prepared = prepare(loaded)
    run = start(prepared, folder / name)
    return [event for event in run.events() if event["event"] == "step"]


def main() -> None:
    out, recipe, *overrides = sys.argv[1:]
    half = load_recipe(find_recipe(recipe), overrides).recipe.training.rows_per_pass // 2
    cases = {
        "plain": ["engine=plain"],
        "plain, half the rows a pass": ["engine=plain", f"training.rows_per_pass={max(1, half)}"],
        "fused": ["engine=fused"],
    }
    events = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, extra) in enumerate(cases.items()):
            events[name] = train(Path(folder), f"run{number}", recipe, [*overrides, *extra])
    losses = {name: [event["loss"] for event in own] for name, own in events.items()}
    speed = {
        name: sorted(event["tokens_per_second"] for event in own)[len(own) // 2]
        for name, own in events.items()
    }
    Path(f"{out}.json").write_text(
        json.dumps({"overrides": overrides, "loss": losses, "tokens_per_second": speed}) + "\n"
    )
    plain = losses["plain"]
    for name, own in losses.items():
        apart = sum(abs(a - b) for a, b in zip(own, plain, strict=True)) / len(plain)
        print(
            f"{name}: mean |loss − plain| {apart:.4f}, last {WINDOW} steps "
            f"{sum(own[-WINDOW:]) / WINDOW:.4f}, {speed[name]:,.0f} tokens/s"
        )
    plot(losses, Path(f"{out}.png"))


def plot(losses: dict[str, list[float]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for (name, own), style in zip(losses.items(), ("-", ":", "--"), strict=True):
        smooth = [
            sum(own[max(0, i - WINDOW + 1) : i + 1]) / min(i + 1, WINDOW) for i in range(len(own))
        ]
        axes.plot(range(1, len(own) + 1), smooth, style, label=name, linewidth=1.3)
    axes.set(xlabel="optimiser step", ylabel=f"loss, mean of {WINDOW} steps", yscale="log")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
