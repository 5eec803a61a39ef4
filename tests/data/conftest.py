"""Tokenizers: the tiny real model's, and one made here whose merges cross word boundaries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def stories_tokenizer(stories_folder: Path) -> Any:
    """SentencePiece style, sets a start token."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(stories_folder)


@pytest.fixture(scope="session")
def small_tokenizer() -> Any:
    """Bytes, with the merges `: `, ` y`, `: y` and `es`; a chat template; no start token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("e", "s"), (":", "Ġ"), (":Ġ", "y"), ("Ġ", "y")]
    words = [*alphabet, "es", ":Ġ", ":Ġy", "Ġy", "<end>", "<user>", "<model>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<model>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<model>' }}{{ m.content }}<end>"
        "{% endfor %}"
        "{% if add_generation_prompt %}<model>{% endif %}"
    )
    return tokenizer
