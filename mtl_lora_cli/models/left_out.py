"""What a base model's folder holds and nobody uses: tensors that are no weight of its model, and code."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModel")


def note_left_out(model: Any, unexpected: Iterable[str]) -> None:
    """Keep with a model what of its files is not in it, for `left_out_lines`.

    Args:
        model: as it was loaded.
        unexpected: tensors that transformers has found no place for, but for those that its classes leave out
            by rule, such as heads that draft tokens.
    """
    model.left_out = sorted(unexpected)


def left_out_lines(model: Any) -> list[str]:
    """What a user may not expect of such a folder, a line each: the run computes without it, as transformers does."""
    lines, kind = [], type(model).__name__
    tensors = getattr(model, "left_out", [])
    if tensors:
        lines.append(
            f"base_model: {len(tensors)} of its files' tensors {'is' if len(tensors) == 1 else 'are'} no weight of "
            f"{kind} by its config.json, and left out: {', '.join(tensors[:2])}{', …' * (len(tensors) > 2)}"
        )
    named = getattr(model.config, "auto_map", None) or {}
    own = next((named[name] for name in _CLASSES if name in named), None)
    if own is not None:
        lines.append(
            f"base_model: its folder names code of its own for the model ({own}), which is never run: transformers' "
            f"{kind} computes"
        )
    return lines
