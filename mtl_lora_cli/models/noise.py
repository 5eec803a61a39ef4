"""What the self-test asks: examples of random tokens, and with pictures of noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mtl_lora_cli.models.batch import PackedBatch
from mtl_lora_cli.models.sight import tower_dtype, with_pictures
from mtl_lora_cli.models.stand_in import device_of
from mtl_lora_cli.models.vision import Seen, Vision

_ANSWER = 4  # words behind the prompt of an example with a picture
SIDES = ((90, 120), (64, 48))  # of the pictures that are shown


def draw(lengths: Sequence[int], config: Any) -> list[Tensor]:
    """Random tokens, int64 [length] each, none of them one that the model's code looks for."""
    words = config.get_text_config().vocab_size
    special = _special(config, words)
    usable = torch.tensor([token for token in range(words) if token not in special])
    generator = torch.Generator().manual_seed(0)
    return [
        usable[torch.randint(len(usable), (length,), generator=generator)] for length in lengths
    ]


def _special(config: Any, words: int) -> set[int]:
    found: set[int] = set()
    for one in (config, config.get_text_config()):
        for name, value in one.to_dict().items():
            if name.endswith(("_token_id", "_token_index", "_token_ids")):
                found.update(v for v in (value if isinstance(value, list) else [value]) if v)
    return {int(token) for token in found if 0 <= int(token) < words}


@dataclass(frozen=True)
class Shown:
    """Examples with a picture each, of noise.

    Attributes:
        vision: how the model reads pictures.
        examples: int64 [length] each: some words, the picture, some words.
        seen: the pictures, as the tower takes them.
        counts: tokens of each.
    """

    vision: Vision
    examples: list[Tensor]
    seen: list[Seen]
    counts: list[int]

    @property
    def prompts(self) -> list[int]:
        """Tokens of each example's prompt: all but the last words."""
        return [len(one) - _ANSWER for one in self.examples]

    def within(self, batch: PackedBatch) -> PackedBatch:
        """A row of all examples, with their pictures."""
        return with_pictures(batch, self.vision, self.seen, self.counts, self.prompts)

    def alone(self, number: int, model: Any) -> dict[str, Tensor]:
        """What transformers' own forward pass takes beside the tokens of one of them."""
        shown = (self.examples[number][None, :-1] == self.vision.token_id).to(device_of(model))
        given = self.vision.alone([self.seen[number]], shown, self.prompts[number]).items()
        wide = tower_dtype(model)
        on = {name: value.to(device_of(model)) for name, value in given}
        return {name: v.to(wide) if v.is_floating_point() else v for name, v in on.items()}

    def with_another_last(self) -> Shown:
        """The last picture is another one of the same size."""
        last = {n: v.flip(-1) if v.is_floating_point() else v for n, v in self.seen[-1].items()}
        return replace(self, seen=[*self.seen[:-1], last])


def drawn_pictures(vision: Vision) -> Shown:
    """Two pictures of different sizes between random words."""
    generator = torch.Generator().manual_seed(0)
    examples: list[Tensor] = []
    seen: list[Seen] = []
    counts: list[int] = []
    for number, sides in enumerate(SIDES):
        noise = torch.randint(0, 256, (*sides, 3), generator=generator, dtype=torch.uint8)
        own = vision.tokens(*sides)
        before, after = draw((5 + number, _ANSWER + 5), vision.config)
        examples.append(torch.cat([before, torch.tensor(own), after]))
        seen.append(vision.look(Image.fromarray(noise.numpy())))
        counts.append(vision.count(*sides))
    return Shown(vision, examples, seen, counts)
