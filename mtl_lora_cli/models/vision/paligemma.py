"""PaliGemma: every picture at one size before its prompt, all of whose tokens see each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.models.vision import Seen, vision
from mtl_lora_cli.models.vision.llava import Llava


@vision("paligemma")
class PaliGemma(Llava):
    """See the module and `Vision`.

    The token that begins a text stands before the pictures, where the tokenizer writes it; the model's own processor
    writes it behind them.
    """

    whole_prompt: ClassVar = True

    def __init__(
        self, base: BaseModel, config: Any, tokenizer: Any, size: tuple[int, int] | None = None
    ) -> None:
        super().__init__(base, config, tokenizer, size)
        self._window = getattr(config.text_config, "sliding_window", None)

    def resize(self, height: int, width: int) -> None:
        """See `Vision`: there is no other one.

        Raises:
            UsageError: always.
        """
        super(Llava, self).resize(height, width)

    @classmethod
    def alone(cls, many: Sequence[Seen], shown: Tensor, prompt: int) -> dict[str, Tensor]:
        """See `Vision`: type 0 is a prompt's, 1 an answer's."""
        answers = torch.ones_like(shown, dtype=torch.long)
        answers[:, :prompt] = 0
        return {**cls.join(many), "token_type_ids": answers}

    def blocks(
        self, ids: Tensor, bounds: Sequence[tuple[int, int]], prompts: Sequence[int]
    ) -> Tensor:
        """See `Vision`: each prompt is one.

        Raises:
            UsageError: it is longer than the model's window.
        """
        found = torch.full_like(ids, -1, dtype=torch.int32)
        for number, ((start, end), prompt) in enumerate(zip(bounds, prompts, strict=True)):
            if self._window is not None and prompt > self._window:
                raise UsageError(
                    f"a prompt of {prompt:,} tokens is longer than the window of a "
                    f"{self.config.model_type} ({self._window:,}), within which all of it sees itself"
                )
            found[start : min(end, start + prompt)] = number
        return found
