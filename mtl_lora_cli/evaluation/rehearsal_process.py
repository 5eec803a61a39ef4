"""The process that compiles what a run's questions need, while the command loads libraries and reads rows.

python -m mtl_lora_cli.evaluation.rehearsal_process
{"run": "runs/mine", "kept": "…"}
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtl_lora_cli.models.rehearsal_process import answer

if TYPE_CHECKING:
    from mtl_lora_cli.evaluation.opened import Run
    from mtl_lora_cli.models.packed import PackedModel

_PROMPT, _CHOICES, _REQUESTS = 150, 2, 8
_WORDS = 100  # of which made-up requests are: any tokenizer has so many


def _compile(request: Any) -> None:
    from mtl_lora_cli.evaluation.opened import Run
    from mtl_lora_cli.models.rehearsal import rehearse
    from mtl_lora_cli.runs.folder import RunFolder

    run = Run(RunFolder(Path(request["run"])))
    run.recipe  # noqa: B018 - its extensions come first
    rehearse(
        run.base,
        run.file.config,
        run.file.tasks,
        lambda packed: _ask(run, packed),
        dtype=run.dtype,
        device=run.device,
        kept=Path(request["kept"]),
    )


def _ask(run: Run, packed: PackedModel) -> None:
    """Requests of no meaning, of all tasks."""
    from mtl_lora_cli.evaluation.choices import score
    from mtl_lora_cli.evaluation.requests import Request

    words = [number % _WORDS for number in range(_PROMPT)]
    choices = [[number, _WORDS - 1] for number in range(_CHOICES)]
    tasks = range(min(len(run.file.tasks), _REQUESTS))
    requests = [Request(task, words, choices) for task in tasks]
    score(packed, requests, device=run.device, tokens_per_pass=2**15)


if __name__ == "__main__":
    answer(_compile)
