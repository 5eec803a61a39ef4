"""A small model of the same kind, ready to be asked in the place of a large one, with pictures where that one sees some.

Its words are few, so what stands in a text for a picture is written in its own numbers; its pictures are those of
the real model's image processor.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from mtl_lora_cli.models.noise import SIDES
from mtl_lora_cli.models.stand_in import BEYOND, WINDOW, WORDS, NoStandIn, stand_in
from mtl_lora_cli.models.vision import Vision, image_token_id

_TEXT = 12  # words beside a picture
# What both ways take for one example, forward: a second or so.
_OPERATIONS = {"cpu": 2e11, "cuda": 1e15}


class Small(NamedTuple):
    """A small model of the same kind.

    Attributes:
        model: of random weights.
        vision: how it reads pictures; None: it is shown none.
        unshown: why not, where the real one is shown some.
    """

    model: Any
    vision: Vision | None = None
    unshown: str = ""


def small_of(config: Any, vision: Vision | None, device: torch.device, dtype: torch.dtype) -> Small:
    """With a tower of few layers where pictures are shown to it, else without.

    Args:
        config: the real model's.
        vision: how that one reads pictures; None: it is shown none.
        device, dtype: of the small one.

    Raises:
        NoStandIn: there is none, and why.
    """
    unshown = ""
    if vision is not None:
        try:
            return _seeing(config, vision, device, dtype)
        except NoStandIn as reason:
            unshown = str(reason)
    return Small(stand_in(config, device, dtype).model, unshown=unshown)


def _seeing(config: Any, vision: Vision, device: torch.device, dtype: torch.dtype) -> Small:
    counts = [vision.count(*sides) for sides in SIDES]
    blocks = (
        type(vision).blocks is not Vision.blocks
    )  # of tokens that see each other, within a window
    window = max(WINDOW, *counts) + BEYOND if blocks else WINDOW
    found = stand_in(config, device, dtype, whole=True, window=window)
    weights = sum(parameter.numel() for parameter in found.model.parameters())
    if 8.0 * weights * (sum(counts) + len(counts) * _TEXT) > _OPERATIONS[device.type]:
        raise NoStandIn(f"its {sum(counts):,} picture tokens would take long on a CPU")
    return Small(found.model, _in_its_words(vision, found.model.config, found.words))


def _in_its_words(vision: Vision, config: Any, words: Mapping[int, int]) -> Vision:
    """How the small model reads pictures: as the real one, in its own few words."""
    small, tokens = copy.copy(vision), vision.tokens
    small.config, small.token_id = config, image_token_id(config)

    def renamed(height: int, width: int) -> list[int]:
        return [words.get(token, WORDS - 1) for token in tokens(height, width)]

    small.tokens = renamed  # type: ignore[method-assign]
    return small
