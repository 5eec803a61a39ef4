"""Where a model's layers see only so far, and a small model of the same kind that shows how they do it.

The self-test (`trust.py`) asks examples on both sides of every such limit. A window of thousands of
positions in a model of billions of weights would take minutes on a CPU, and in 16 bits rounding is
larger than what a few keys at its edge weigh. There a small model stands for it: the same configuration
with few layers, few words, narrow MLPs, random weights that matter, and small limits.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch

BEYOND = 5  # how much longer than a window or a limit an example is
WINDOW, LIMIT, WORDS, INNER = 16, 24, 256, 256  # of the small model
LONG = 3 * WINDOW  # tokens of an example of which most see less than all
MOST_WEIGHTS = 2_000_000_000
_REACHES = re.compile(r"window|attention_chunk_size|index(er)?_(topk|budget)|compress_rate")


def windows_of(config: Any) -> dict[str, int]:
    """What limits how far some layer's attention sees: key of the configuration → most positions."""
    if not getattr(config, "use_sliding_window", True):
        return {}
    found = {}
    for name, value in config.to_dict().items():
        sizes = value if isinstance(value, list) else [value]
        numbers = [one for one in sizes if isinstance(one, int) and not isinstance(one, bool)]
        if _REACHES.search(name) and numbers and max(numbers) > 1:
            found[name] = max(numbers)
    return found


def critical_lengths(config: Any) -> list[int]:
    """Tokens of examples on both sides of every window and of the rotary embedding's limit."""
    limit = length_limit(config)
    sizes = {*windows_of(config).values(), *(() if limit is None else (limit,))}
    return sorted((length for size in sizes for length in (size + BEYOND, size)), reverse=True)


def length_limit(config: Any) -> int | None:
    """Positions beyond which the rotary embedding is another one; None where it never changes."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(one for one in rope.values() if isinstance(one, dict))]
    limits = [
        kind.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or getattr(config, "max_position_embeddings", None)
        for kind in kinds
        if kind.get("rope_type") in ("dynamic", "longrope")
    ]
    return min((int(limit) for limit in limits if limit), default=None)


def stand_in(real: Any, device: torch.device, dtype: torch.dtype) -> Any | None:
    """A model of the same kind with few layers, few words, and window and limit scaled down.

    Args:
        real: configuration of a language model.
        device, dtype: of the small one's random weights.

    Returns:
        None where a configuration does not take that, or is wide beyond `MOST_WEIGHTS` all the same.
    """
    from transformers import AutoModelForCausalLM

    try:
        config = small_config(real)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if sum(parameter.numel() for parameter in empty.parameters()) > MOST_WEIGHTS:
            return None
        with torch.random.fork_rng(), device:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            for parameter in model.parameters():
                if parameter.ndim > 1:  # so large that attention is far from even
                    parameter.data.normal_(std=1.5 / parameter.shape[-1] ** 0.5)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a configuration's own checks say of numbers that nobody publishes
        return None
    return model.requires_grad_(False).eval()


def small_config(real: Any) -> Any:
    """See `stand_in`."""
    config = copy.deepcopy(real)
    kinds = getattr(config, "layer_types", None)
    layers = config.num_hidden_layers
    few = (
        1 + max((kinds.index(kind) for kind in set(kinds)), default=1) if kinds else min(2, layers)
    )
    config.num_hidden_layers = few
    if kinds:
        config.layer_types = list(kinds[:few])
    config.vocab_size = WORDS
    for number, name in enumerate(("pad_token_id", "bos_token_id", "eos_token_id")):
        if getattr(config, name, None) is not None:
            setattr(config, name, number)
    for name, size in real.to_dict().items():
        if name.endswith("intermediate_size") and isinstance(size, int):
            setattr(config, name, min(size, INNER))
    for name in windows_of(real):
        value = getattr(config, name)
        small = [min(one, WINDOW) for one in value] if isinstance(value, list) else WINDOW
        setattr(config, name, small)
    _scale_rotary(config)
    return config


def _scale_rotary(config: Any) -> None:
    """Set the limit of a length-dependent rotary embedding to a small one."""
    if length_limit(config) is None:
        return
    rope = copy.deepcopy(config.rope_parameters)
    for kind in (rope, *(one for one in rope.values() if isinstance(one, dict))):
        if kind.get("rope_type") in ("dynamic", "longrope"):
            kind["original_max_position_embeddings"] = LIMIT
    config.rope_parameters = rope
    if getattr(config, "original_max_position_embeddings", None):
        config.original_max_position_embeddings = LIMIT


def device_of(model: Any) -> torch.device:
    """Where the model's weights lie."""
    return next(model.parameters()).device


def dtype_of(model: Any) -> torch.dtype:
    """In what the model computes: its embeddings' dtype, for an adapter beside it is float32 in any run."""
    embeddings = model.get_input_embeddings()
    weights = [*embeddings.parameters(), *model.parameters()]
    return next(
        (p.dtype for p in weights if p.dtype.is_floating_point and p.numel()), torch.float32
    )
