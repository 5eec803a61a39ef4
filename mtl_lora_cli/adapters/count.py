"""How many values an adapter trains, by formula."""

from __future__ import annotations

from collections.abc import Mapping

from mtl_lora_cli.adapters.config import AdapterConfig


def layer_count(config: AdapterConfig, out: int, width: int, tasks: int, rank: int) -> int:
    """Trained values of one layer [out, width] of rank r, with n up-projections and T tasks.

    lora        r (in + out)
    mtl-lora    r (in + n out) + T (r² or r) + T n, with `gate: embedding` n d instead of T n, with
                `transform: bases` K r² + T K instead of T r²
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
            bases = config.transform_bases
            transform = {
                "full": tasks * r * r,
                "diagonal": tasks * r,
                "bases": bases * (r * r + tasks),
            }[config.transform]
            gate = tasks * n if config.gate == "weights" else n * (config.embedding_size or 0)
            return r * (width + n * out) + transform + gate
        case "mtlora":
            return (r + tasks * config.task_rank) * (width + out)
        case "multilora":
            return n * r * (width + out) + n * out
        case "hydralora":
            return r * (width + n * out) + n * width


def parameter_count(
    config: AdapterConfig, shapes: Mapping[str, tuple[int, int]], tasks: int
) -> int:
    """Trained values of a whole adapter.

    Args:
        config: sizes and kinds.
        shapes: module path → (out, in) of each adapted layer.
        tasks: T.
    """
    total = sum(
        layer_count(config.at(path), out, width, tasks, config.rank_of(path))
        for path, (out, width) in shapes.items()
    )
    size = config.embedding_size or 0
    if config.embedded:
        total += tasks * size
    if config.method == "moelora":  # one gate for the whole model
        total += config.ups * size
    return total
