"""A tokenizer as llama.cpp's files describe it.

Two kinds are known: byte-level BPE (`gpt2`) with a rule for cutting text that `models.gguf` knows, and
BPE with byte fallback as converted from sentencepiece (`llama`). The second kind has no list of merges
in these files: llama.cpp joins the two neighbours whose union has the highest score. So a token's score
is minus the place of the first merge that makes it.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.models.gguf import pre_tokenizer

_RULES = ("smollm", "llama-bpe", "gpt-2")
_WHOLE_WORDS = ("llama-bpe",)  # words are looked up as a whole before any merge: ignore_merges
_SPACES = [
    {"type": "Prepend", "prepend": "▁"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
]


def rule_of(tokenizer: Any) -> str:
    """`tokenizer.ggml.pre` of a byte-level BPE; the empty string for one converted from sentencepiece.

    Raises:
        UsageError: it is of neither kind.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model, cuts, normalizer = state["model"], state["pre_tokenizer"], state["normalizer"]
    if model["type"] == "BPE":
        if model["byte_fallback"] and cuts is None:
            if (normalizer or {}).get("normalizers") == _SPACES:
                return ""
        elif not model["byte_fallback"] and cuts is not None and normalizer is None:
            for rule in _RULES:
                known = json.loads(pre_tokenizer(rule).__getstate__())
                whole_words = rule in _WHOLE_WORDS
                if _cutting(known) == _cutting(cuts) and model["ignore_merges"] == whole_words:
                    return rule
    raise UsageError(
        "the base model's tokenizer is neither byte-level BPE with a rule that is known here "
        f"({', '.join(_RULES)}) nor BPE converted from sentencepiece, so it cannot be written to a "
        "GGUF file here; llama.cpp's own converter may know it: git clone --depth 1 "
        "https://github.com/ggml-org/llama.cpp && export MTL_LORA_LLAMA_CPP=$PWD/llama.cpp"
    )


def add_tokenizer(writer: GGUFWriter, folder: Path, tokenizer: Any, size: int) -> None:
    """Write a tokenizer's part of a GGUF file.

    Args:
        writer: the file's.
        folder: the transformers folder that the tokenizer was read from.
        tokenizer: a fast transformers tokenizer.
        size: rows of the model's embedding; ids without a token get an unused one.

    Raises:
        UsageError: see `rule_of`.
    """
    rule = rule_of(tokenizer)
    sentencepiece = not rule
    tokens, types = _tokens(tokenizer, size, sentencepiece)
    writer.add_tokenizer_model("llama" if sentencepiece else "gpt2")
    writer.add_tokenizer_pre(rule or "default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if sentencepiece:
        merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(True)
    logging.getLogger("gguf.vocab").setLevel(
        logging.ERROR
    )  # it warns of templates for pairs of texts
    special = SpecialVocab(folder, load_merges=not sentencepiece, n_vocab=size)
    ids = tokenizer("x")["input_ids"]
    special.add_special_token["bos"] = ids[0] == tokenizer.bos_token_id
    special.add_special_token["eos"] = ids[-1] == tokenizer.eos_token_id
    special.add_to_gguf(writer, quiet=True)


def _cutting(cuts: Any) -> Any:
    """A pre-tokenizer's description without what only concerns offsets."""
    if isinstance(cuts, dict):
        return {key: _cutting(value) for key, value in cuts.items() if key != "trim_offsets"}
    return [_cutting(one) for one in cuts] if isinstance(cuts, list) else cuts


def _tokens(tokenizer: Any, size: int, sentencepiece: bool) -> tuple[list[str], list[TokenType]]:
    """The text of each id, and what llama.cpp takes it for."""
    names = {number: text for text, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder

    def kind(number: int) -> TokenType:
        text = names.get(number)
        if text is None:
            return TokenType.UNUSED
        if sentencepiece and text == tokenizer.unk_token:
            return TokenType.UNKNOWN
        if sentencepiece and re.fullmatch("<0x[0-9A-F]{2}>", text):
            return TokenType.BYTE
        if number in added:
            return TokenType.CONTROL if added[number].special else TokenType.USER_DEFINED
        return TokenType.NORMAL

    numbers = range(size)
    return [names.get(n, f"[PAD{n}]") for n in numbers], [kind(n) for n in numbers]


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """Minus the place of the first merge that makes a token; the lowest of all where none does."""
    places: dict[str, int] = {}
    for place, merge in enumerate(merges):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        places.setdefault("".join(parts), place)
    return [-float(places.get(token, len(merges))) for token in tokens]
