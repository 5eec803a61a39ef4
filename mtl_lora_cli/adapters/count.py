"""How many values an adapter trains, by formula."""

from __future__ import annotations

from collections.abc import Sequence

from mtl_lora_cli.adapters.config import AdapterConfig


def layer_count(config: AdapterConfig, out: int, width: int, tasks: int, rank: int) -> int:
    """Trained values of one layer [out, width] of rank r, with n up-projections and T tasks.

    lora        r (in + out)
    mtl-lora    r (in + n out) + T (r² or r) + T n, with `gate: embedding` n d instead of T n
    mtlora      (r + T r') (in + out)
    moelora     r (in + out)
    multilora   n r (in + out) + n out
    hydralora   r (in + n out) + n in
    """
    n, r = config.ups, rank
    match config.method:
        case "lora" | "moelora":
            return r * (width + out)
        case "mtl-lora":
            transform = r * r if config.transform == "full" else r
            gate = tasks * n if config.gate == "weights" else n * (config.embedding_size or 0)
            return r * (width + n * out) + tasks * transform + gate
        case "mtlora":
            return (r + tasks * config.task_rank) * (width + out)
        case "multilora":
            return n * r * (width + out) + n * out
        case "hydralora":
            return r * (width + n * out) + n * width


def parameter_count(
    config: AdapterConfig,
    shapes: Sequence[tuple[int, int]],
    tasks: int,
    ranks: Sequence[int] | None = None,
) -> int:
    """Trained values of a whole adapter.

    Args:
        config: sizes and kinds.
        shapes: (out, in) of each adapted layer.
        tasks: T.
        ranks: of each layer; by default `config.rank` for all.
    """
    each = ranks or [config.rank] * len(shapes)
    total = sum(
        layer_count(config, out, width, tasks, rank)
        for (out, width), rank in zip(shapes, each, strict=True)
    )
    size = config.embedding_size or 0
    if config.embedded:
        total += tasks * size
    if config.method == "moelora":  # one gate for the whole model
        total += config.ups * size
    return total
