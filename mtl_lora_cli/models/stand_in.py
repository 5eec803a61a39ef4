"""Where a model's layers see only so far, and a small model of the same kind that shows how they do it.

The self-test (`trust.py`) asks examples on both sides of every such limit. A window of thousands of
positions in a model of billions of weights would take minutes on a CPU, and in 16 bits rounding is
larger than what a few keys at its edge weigh. There a small model stands for it: the same configuration
with few layers, few words, narrow MLPs, random weights that matter, and small limits.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from mtl_lora_cli.models.load import BUILDING, auto_class

BEYOND = 5  # how much longer than a window or a limit an example is
WINDOW, LIMIT, WORDS, INNER = 16, 24, 256, 256  # of the small model
LONG = 3 * WINDOW  # tokens of an example of which most see less than all
MOST_WEIGHTS = 2_000_000_000
_REACHES = re.compile(r"window|attention_chunk_size|index(er)?_(topk|budget)|compress_rate")
_EXPERTS = re.compile(r"(moe_)?(num|n)_(local_|routed_)?experts")
_MOST_KINDS = 4  # different numbers or words in a list that says the kind of each layer
_TOKEN = re.compile(r"_token_(id|index)$")


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


class NoStandIn(Exception):
    """There is no small model of that kind; the text is why."""


class StandIn(NamedTuple):
    """A small model of the same kind.

    Attributes:
        model: of random weights.
        words: tokens that the configuration names: the real model's number → the small one's.
    """

    model: Any
    words: dict[int, int]


def stand_in(
    real: Any,
    device: torch.device,
    dtype: torch.dtype,
    *,
    whole: bool = False,
    window: int = WINDOW,
) -> StandIn:
    """A model of the same kind with few layers, few words, and window and limit scaled down.

    Args:
        real: the model's configuration.
        device, dtype: of the small one's random weights.
        whole: with what stands beside the language part; otherwise that part alone, where transformers has a
            class for it.
        window: the most that a layer with a window sees.

    Raises:
        NoStandIn: the configuration does not take that, or is wide beyond `MOST_WEIGHTS` all the same.
    """
    from transformers.initialization import no_init_weights

    text = real.get_text_config()
    taken = real if whole or auto_class(text) is None else text
    auto = auto_class(taken)
    if auto is None:
        raise NoStandIn(f"transformers has no class for '{taken.model_type}'")
    try:
        config, words = small_config(taken, window)
        with BUILDING, torch.device("meta"):
            empty = auto.from_config(config, dtype=dtype)
        count = sum(parameter.numel() for parameter in empty.parameters())
        if count > MOST_WEIGHTS:
            raise NoStandIn(f"with few layers, too, it has {count:,} weights")
        with (
            BUILDING,
            torch.random.fork_rng(),
            device,
            no_init_weights(),
        ):  # all of them are set here
            torch.manual_seed(0)
            model = auto.from_config(config, dtype=dtype)
            _fill(model)
    except (torch.OutOfMemoryError, NoStandIn):
        raise
    except (
        Exception
    ) as error:  # whatever a configuration's own checks say of numbers that nobody publishes
        said = " ".join(str(error).split())[:200]
        raise NoStandIn(f"{type(error).__name__}: {said}") from error
    return StandIn(model.requires_grad_(False).eval(), words)


def _fill(model: Any) -> None:
    """Weights so large that attention is far from even; norms, biases and single factors that are not all the same."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=1.5 / parameter.shape[-1] ** 0.5)
        else:
            parameter.data.uniform_(-0.2, 0.2).add_(0.0 if name.endswith("bias") else 1.0)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for (
        name,
        tensor,
    ) in model.state_dict().items():  # numbers of a layer that are saved and do not learn
        if name not in parameters and tensor.ndim <= 1 and tensor.is_floating_point():
            tensor.add_(torch.empty_like(tensor).uniform_(-0.2, 0.2))


def small_config(real: Any, window: int = WINDOW) -> tuple[Any, dict[int, int]]:
    """See `stand_in`: of a language model, or of one with something beside it; and its `words`."""
    config = copy.deepcopy(real)
    text = config.get_text_config()
    _shrink_text(text, window)
    beside = [
        part for part in vars(config).values() if hasattr(part, "to_dict") and part is not text
    ]
    for part in beside:
        _shrink_beside(part, getattr(config, "vision_feature_layer", None), text.num_hidden_layers)
    return config, _rename_words([text, config, *beside])


def _shrink_text(config: Any, window: int) -> None:
    layers = config.num_hidden_layers
    few = min(layers, _enough_layers(config))
    shared = getattr(config, "num_kv_shared_layers", None)
    _cut(config, "num_hidden_layers", min(layers, 2 * few) if shared else few)
    if shared:  # the first of each kind give their keys to the others
        config.num_kv_shared_layers = config.num_hidden_layers - few
        config.layer_types = (2 * config.layer_types[:few])[: config.num_hidden_layers]
    _fewer_experts(config)
    config.vocab_size = WORDS
    if getattr(config, "vocab_size_per_layer_input", None):
        config.vocab_size_per_layer_input = WORDS
    for name in windows_of(config):
        value = getattr(config, name)
        small = [min(one, window) for one in value] if isinstance(value, list) else window
        setattr(config, name, small)
    _scale_rotary(config)


def _enough_layers(config: Any) -> int:
    """So many of the first layers that each kind is among them, and two at least: the last one is a case of its own."""
    given, layers = config.to_dict(), config.num_hidden_layers
    lists = [one for one in given.values() if isinstance(one, list) and len(one) == layers]
    named = [one for one in lists if all(isinstance(kind, str | int) for kind in one)]
    kinds = list(zip(*(one for one in named if len(set(one)) <= _MOST_KINDS), strict=True))
    others = max(given.get(name) or 0 for name in ("first_k_dense_replace", "num_dense_layers"))
    return 1 + max(1, others, *(kinds.index(kind) for kind in kinds))


def _fewer_experts(config: Any) -> None:
    """Four times as many as a token is given to, in whole groups."""
    given = config.to_dict()
    asked = max(given.get(name) or 0 for name in ("num_experts_per_tok", "top_k_experts", "moe_k"))
    groups = given.get("n_group") or 1
    few = groups * -(-4 * max(2, asked) // groups)
    for name, value in given.items():
        if _EXPERTS.fullmatch(name) and isinstance(value, int) and value > few:
            setattr(config, name, few)


def _cut(config: Any, key: str, few: int) -> None:
    """Leave so many layers, narrow ones, and so many entries of what there is for each."""
    layers = getattr(config, key)
    for name, value in config.to_dict().items():
        of_layers = "layer" in name or layers > _MOST_KINDS  # else it may be the sides of a picture
        if isinstance(value, list) and len(value) == layers > few and of_layers:
            setattr(config, name, value[:few])
        if name.endswith("intermediate_size") and isinstance(value, int):
            setattr(config, name, min(value, INNER))
    setattr(config, key, few)


def _shrink_beside(config: Any, read: int | list[int] | None, layers: int) -> None:
    """A tower of few layers.

    Args:
        config: the tower's.
        read: whose outputs the language part is given, as `vision_feature_layer` has it.
        layers: of the language part; so many levels of features enter it.
    """
    given = config.to_dict()
    key = next((name for name in ("num_hidden_layers", "depth") if name in given), None)
    if key is None:
        return
    levels = (given.get("deepstack_visual_indexes") or ())[:layers]
    numbers = read if isinstance(read, list) else [] if read is None else [read]
    few = max(1, *(abs(number) for number in numbers), len(levels))
    if levels:
        config.deepstack_visual_indexes = list(range(len(levels)))
    _cut(config, key, min(few, given[key]))


def _rename_words(configs: Sequence[Any]) -> dict[int, int]:
    """Give the tokens that configurations name small numbers; returns the old number → the new one."""
    ends = {
        name: number for number, name in enumerate(("pad_token_id", "bos_token_id", "eos_token_id"))
    }
    words: dict[int, int] = {}
    for config in configs:
        for name, value in config.to_dict().items():
            if name in ends:
                if value is not None:
                    setattr(config, name, ends[name])
            elif _TOKEN.search(name) and isinstance(value, int) and value >= 0:
                words.setdefault(value, len(ends) + len(words))
                setattr(config, name, words[value])
    return words


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
