"""Multi-task LoRA for language models; the command is `mtl-lora`, and this is its Python side.

import mtl_lora_cli
run = mtl_lora_cli.load("runs/NAME")
run.predict([{"sentence": "A film to remember."}], task="sst2")
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtl_lora_cli.evaluation.map_predictor import MapPredictor
    from mtl_lora_cli.evaluation.predict import Predictor

__all__ = ["load"]


def load(
    run: str | Path | None = None, *, runs: str | Path = "runs", force: bool = False
) -> Predictor | MapPredictor:
    """Load a finished run, to predict with it: a `MapPredictor` where its answers are maps of pictures.

    Args:
        run: its name or path; None: the newest one.
        runs: the folder in which runs lie.
        force: go on where the base model is not the one that the adapter was trained on.

    Raises:
        mtl_lora_cli.errors.UsageError: there is no such run, it is unfinished, or its base model is
            gone or another one by now.
    """
    from mtl_lora_cli.evaluation.map_predictor import MapPredictor
    from mtl_lora_cli.evaluation.opened import open_run
    from mtl_lora_cli.evaluation.predict import Predictor
    from mtl_lora_cli.runs.folder import find_run

    folder = find_run(None if run is None else str(run), Path(runs))
    opened = open_run(folder, force=force)
    return MapPredictor(opened) if opened.of_maps else Predictor(opened)
