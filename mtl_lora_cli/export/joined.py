"""Several tasks' adapters as one: ΔW = Σ_t w_t ΔW_t, or what TIES and DARE make of them by PEFT's own functions.

`linear` stays of low rank and is exact: where the tasks share A it is s Σ w_t B'_t A, else the factors stand beside
each other. The others work on the whole matrices ΔW_t [out, in], as PEFT's `ties_svd` and `dare_linear_svd`
do; what they come to has no low rank, and is kept by its singular values, all of them or the first R.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mtl_lora_cli.adapters.files import frame_of, save_adapter
from mtl_lora_cli.adapters.inject import inject
from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.errors import UsageError, did_you_mean
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.export.derived import path_of, require_tasks, write_run
from mtl_lora_cli.export.low_rank import truncate
from mtl_lora_cli.runs.folder import RunFolder
from mtl_lora_cli.tasks.task import require_text

How = Literal["linear", "ties", "dare_linear", "dare_ties"]
WAYS: tuple[How, ...] = ("linear", "ties", "dare_linear", "dare_ties")
Factors = tuple[Tensor, Tensor]  # A' [k, in] and B' [out, k] of ΔW = B' A', float64


def parse_weights(text: str | None, count: int) -> list[float]:
    """`0.5,0.5`: a weight for each task; without them equal ones.

    Raises:
        UsageError: they are no numbers, or not as many as there are tasks.
    """
    if text is None:
        return [1 / count] * count
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(
            f"--weights: expected numbers with commas between, received '{text}'"
        ) from None
    if len(found) != count or not all(map(torch.isfinite, torch.tensor(found))):
        raise UsageError(
            f"--weights: expected {count} finite numbers, one a task, received '{text}'"
        )
    return found


def require_way(how: str, density: float) -> How:
    """One of `WAYS`.

    Raises:
        UsageError: it is none, or PEFT, whose functions do it, is not installed.
    """
    for known in WAYS:
        if how == known:
            break
    else:
        raise UsageError(
            f"--join: expected one of {', '.join(WAYS)}, received '{how}'{did_you_mean(how, WAYS)}"
        )
    if known != "linear":
        if not 0 < density <= 1:
            raise UsageError(f"--density: expected above 0 and at most 1, received {density:g}")
        try:
            import peft  # noqa: F401
        except ImportError:
            raise UsageError(f"--join {how} needs PEFT; get it with: pip install peft") from None
    return known


def join_tasks(
    run: Run,
    names: Sequence[str],
    weights: Sequence[float],
    *,
    how: How = "linear",
    density: float = 0.5,
    seed: int = 0,
    rank: int | None = None,
    name: str | None = None,
) -> RunFolder:
    """A run in which all tasks have one LoRA: the joined one of some of them.

    Args:
        run: a finished run of text.
        names, weights: of the tasks that are joined.
        how: `linear`, or PEFT's `ties`, `dare_linear` or `dare_ties`.
        density: for these, the part of each matrix that is kept.
        seed: of what DARE drops.
        rank: at most this rank, see `low_rank.truncate`; None: what it takes.
        name: of the new run; None: RUN-TASKS.

    Raises:
        UsageError: a task is unknown, the method is no LoRA for any task, or the new run's folder exists.
    """
    chosen = require_tasks(run, names)
    for task in chosen:
        require_text(task.name, task.objective, "joined")
    path = path_of(run, name, names)
    factors = joined(
        [_factors(run, task.id) for task in chosen], weights, how=how, density=density, seed=seed
    )
    if rank is not None:
        factors = {layer: truncate(down, up, rank)[:2] for layer, (down, up) in factors.items()}
    ranks = {layer: len(down) for layer, (down, _) in factors.items()}
    most = max(ranks.values())
    config = configure(
        "lora",
        rank=most,
        alpha=float(most),
        rank_pattern={layer: own for layer, own in ranks.items() if own != most},
        target_modules=list(run.file.config.target_modules),
    )

    def save(folder: Path) -> None:
        adapter = inject(frame_of(run.file), config, [task.name for task in run.tasks])
        with torch.no_grad():
            for layer, (down, up) in factors.items():
                own = adapter.layers[layer]
                own.lora_A[0].copy_(down)
                own.lora_B[0].copy_(up / config.scale(own.rank))
        save_adapter(adapter, folder, run.file.base_model)

    said: dict[str, Any] = {"joined": dict(zip(names, weights, strict=True)), "how": how}
    if how != "linear":
        said |= {"density": density, "seed": seed}
    recipe = run.recipe.model_copy(update={"adapter": config})
    return write_run(run, path, recipe, run.tasks, said, save)


def _factors(run: Run, task: int) -> dict[str, Factors]:
    """Of each adapted layer A'_t and s B'_t."""
    found = {}
    for path, layer in run.adapter.layers.items():
        down, up = layer.task_update(task)
        found[path] = (down, up * run.adapter.config.scale(layer.rank))
    return found


def joined(
    tasks: Sequence[Mapping[str, Factors]],
    weights: Sequence[float],
    *,
    how: How,
    density: float = 0.5,
    seed: int = 0,
) -> dict[str, Factors]:
    """The joined update of each layer; see `join_tasks`."""
    found = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in tasks[0]:
            own = [task[layer] for task in tasks]
            found[layer] = (
                _linear(own, weights) if how == "linear" else _by_peft(own, weights, how, density)
            )
    return found


def _linear(own: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Σ w_t B'_t A'_t, exactly."""
    first = own[0][0]
    ups = [weight * up for weight, (_, up) in zip(weights, own, strict=True)]
    if all(torch.equal(down, first) for down, _ in own):
        return first, torch.stack(ups).sum(0)
    return torch.cat([down for down, _ in own]), torch.cat(ups, dim=1)


def _by_peft(own: Sequence[Factors], weights: Sequence[float], how: How, density: float) -> Factors:
    """What PEFT's function makes of the whole matrices, as factors of all its rank."""
    from peft.utils import merge_utils

    deltas = [(up @ down).float() for down, up in own]
    made = getattr(merge_utils, how)(deltas, torch.tensor(weights), density=density)
    left, values, right = torch.linalg.svd(made.double(), full_matrices=False)
    rank = max(1, int((values > 1e-9 * values[0]).sum()))
    root = values[:rank].sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root
