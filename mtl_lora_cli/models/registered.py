"""Our attention inside transformers: what its layers call over packed rows.

Layers of some models want more of their attention than which positions see which, and tell it by
keyword: a window, soft caps, sinks. Each is honoured (`engine/torch_attention.py`), and every keyword
that is not is refused: attention that drops one computes another model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtl_lora_cli.engine.segment_forms import Rule
from mtl_lora_cli.engine.segments import Segments
from mtl_lora_cli.engine.torch_attention import Scores, attend_segments
from mtl_lora_cli.errors import UsageError

NAME = "mtl_lora_packed"

# Keywords that say nothing about which numbers come out.
_WITHOUT_EFFECT = frozenset(
    ["cache_position", "output_attentions", "output_hidden_states", "position_ids", "use_cache"]
)


class NotHonoured(UsageError):
    """A layer asks its attention for something that packed attention does not do."""


@dataclass(frozen=True)
class Local:
    """What stands for a mask where transformers would build one: how far its layers see.

    Of a mask a model may take the rows of some positions, as Gemma 4 does where layers share keys. This stays what
    it is; `packed_attention` asks that no position went.

    Attributes:
        window, chunk: as in `Rule`.
    """

    window: int | None
    chunk: int | None

    def __getitem__(self, _: Any) -> Local:
        return self


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each segment, in the form transformers' attention interface asks for.

    Args:
        query: [1, heads, N, d]; key and value: [1, key heads, N, d].
        attention_mask: None, or what `register` gives for one.
        scaling: of the scores; 1 / √d by default.
        dropout: of the probabilities.
        segments: of the N positions.
        sliding_window: keys that a query sees, its own among them.
        softcap: c; scores are c tanh(s / c).
        s_aux: [heads], the sinks' logits.
        is_causal: must not be False.

    Returns:
        [1, N, heads, d], and no weights.

    Raises:
        NotHonoured: a keyword or a mask whose value would matter, and which is not known here; or the
            model was called without segments.
    """
    _require_honoured(query, key, attention_mask, segments, is_causal, others)
    assert segments is not None
    local = attention_mask or Local(None, None)
    if sliding_window is None and local.chunk is None:
        sliding_window = local.window
    rule = Rule(sliding_window, local.chunk)
    scores = Scores(scaling, softcap, s_aux, dropout)
    found = attend_segments(query, key, value, scores, segments, rule)
    return found.contiguous(), None


def _require_honoured(
    query: Tensor,
    key: Tensor,
    mask: Any,
    segments: Segments | None,
    is_causal: bool | None,
    others: dict[str, Any],
) -> None:
    if segments is None:
        raise NotHonoured("its layers do not pass the bounds of examples on to attention")
    length = segments.bounds[-1][1]
    if query.shape[0] != 1 or not query.shape[2] == key.shape[2] == length:
        raise NotHonoured(
            f"its attention asks with {list(query.shape)} for {list(key.shape)}, not within one "
            f"packed sequence of {length}"
        )
    if mask is not None and not isinstance(mask, Local):
        raise NotHonoured("its attention brings a mask of its own")
    if is_causal is False:
        raise NotHonoured("its attention sees what comes later")
    for name, wanted in others.items():
        if name not in _WITHOUT_EFFECT and wanted is not None and wanted is not False:
            raise NotHonoured(f"its attention wants '{name}'")


def _mask(*_: Any, config: Any = None, local_size: int | None = None, **others: Any) -> Local:
    """What layers get for a mask: none is built, the segments say everything but how far one sees."""
    if local_size is None:
        return Local(None, None)
    text = config.get_text_config() if config is not None else None
    chunked = getattr(text, "attention_chunk_size", None) == local_size
    return Local(None, local_size) if chunked else Local(local_size, None)


def register() -> None:
    """Make the implementation known to transformers under `NAME`; doing it twice is harmless."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _mask)
