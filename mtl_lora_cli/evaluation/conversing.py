"""Answers to conversations as texts: what was said to the user, without the reasoning before it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.evaluation.requests import Request
from mtl_lora_cli.tasks.rendering import Example

_REASONED = "</think>"


class Said:
    """Reads what is said in tokens of an answer.

    Args:
        tokenizer: of the base model.
        encoder: of the run.
    """

    def __init__(self, tokenizer: Any, encoder: Encoder) -> None:
        self._tokenizer = tokenizer
        self._lead = encoder.lead.strip()
        special = sorted(map(re.escape, tokenizer.all_special_tokens), key=len, reverse=True)
        self._special = re.compile("|".join(special) or "(?!)")

    def text(self, tokens: Sequence[int]) -> str:
        """An answer: what stands behind reasoning, and behind what the chat template writes before it."""
        text = str(self._tokenizer.decode(tokens, skip_special_tokens=False))
        if self._lead and self._lead in text:
            text = text.rpartition(self._lead)[2]
        return self._special.sub("", text.rpartition(_REASONED)[2])

    def expected(self, example: Example, request: Request) -> str:
        """The right answer; of a tool call as the chat template writes it."""
        dialogue = example.dialogue
        assert dialogue is not None
        if any(dialogue.counts) and dialogue.messages[dialogue.last].get("tool_calls"):
            return self.text(request.choices[0]).strip()
        return example.answer.rpartition(_REASONED)[2].strip()
