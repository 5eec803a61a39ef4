"""Texts that begin alike are tokenised once: the tokens, and their places, are those of each text read as a whole."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as cutters

from mtl_lora_cli.data.endings import _CASED, Endings, Joined, alternatives_of, shared_cut

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}"
QWEN = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{REST}"
O200K = "|".join([*sorted(_CASED), r"\p{N}{1,3}", REST.replace("[\\r\\n]*", "[\\r\\n/]*", 1)])
PIECES = (
    "a", "Red", "dogs", "DON'T", "we'll", "x1", "2024", "3.5", "é", "e\u0301", "日本", "naïve", "don’t", "<s>", "</s>", "<x>",
    " ", "  ", "\n", "\n\n", " \n ", "\t", ".", "?!", "(", "/", "▁", "yes", "no", "\u00a0", "\u0301", "🙂", "'s", "'",
)  # fmt: skip
CORPUS = [
    "The dogs don't say yes or no.\n\nWe'll see 2024 of them; naïve é 日本 3.5",
    "answer: yes no",
]


def byte_pairs(*steps: Any, normalizer: Any = None, **processor: Any) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = cutters.Sequence(list(steps))
    if normalizer is not None:
        made.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=cutters.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = processors.ByteLevel(trim_offsets=False, **processor)
    return made


def whole_text(*, first: bool) -> Tokenizer:
    """As Llama 2's: merges of letters, spaces as ▁, unknown ones as bytes."""
    words = [
        "▁yes",
        "▁no",
        "▁dogs",
        "▁a",
        "ye",
        "yes",
        "do",
        "gs",
        "dogs",
        "▁ye",
        "▁▁",
        "no",
        "▁do",
    ]
    letters = sorted({letter for word in words for letter in word} | set("abcdefghijklmnopqrst."))
    known = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *letters]
    known += [word for word in words if word not in known]
    merges = [
        ("y", "e"), ("▁", "ye"), ("d", "o"), ("▁", "do"), ("g", "s"), ("do", "gs"), ("▁do", "gs"), ("n", "o"), ("▁", "no"),
        ("▁", "▁"), ("▁", "a"),
    ]  # fmt: skip
    vocabulary = {word: number for number, word in enumerate(known)}
    made = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    if first:
        made.pre_tokenizer = cutters.Metaspace(prepend_scheme="first", split=False)
    else:
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    return made


def split(pattern: str) -> Any:
    return cutters.Split(Regex(pattern), "isolated")


BYTES = cutters.ByteLevel(add_prefix_space=False, use_regex=False)
CUT = {
    "gpt2": lambda: byte_pairs(cutters.ByteLevel(add_prefix_space=False)),
    "smollm2": lambda: byte_pairs(cutters.Digits(True), cutters.ByteLevel(add_prefix_space=False)),
    "llama3": lambda: byte_pairs(split(LLAMA3), BYTES),
    "qwen": lambda: byte_pairs(split(QWEN), BYTES, normalizer=normalizers.NFC()),
    "o200k": lambda: byte_pairs(split(O200K), BYTES),
    "whole": lambda: whole_text(first=False),
    "metaspace": lambda: whole_text(first=True),
}


def texts(seed: int) -> list[str]:
    """Questions with some answers each."""
    draw = random.Random(seed)
    found = []
    for _ in range(12):
        prompt = "".join(draw.choice(PIECES) + draw.choice(["", "", " "]) for _ in range(30))
        ending = draw.choice(["", " Answer:", " Answer (yes or no):\n", " is it\n"])
        for _ in range(draw.randint(1, 4)):
            answer = "".join(draw.choice(PIECES) for _ in range(draw.randint(0, 3)))
            found.append(f"{prompt}{ending} {answer}{draw.choice(['', '</s>', '</s>' + chr(10)])}")
    return found


def told(one: Any, text: str) -> Any:
    """All that is asked of what a tokenizer says."""
    tokens = [one.char_to_token(place) for place in range(len(text) + 1)]
    return list(one.ids), len(one), tokens, [one.token_to_chars(n) for n in range(len(one.ids))]


@pytest.mark.parametrize("kind", CUT)
def test_tokens_and_places_are_those_of_the_whole_text(kind: str) -> None:
    made = CUT[kind]()
    own = Endings(made)
    joined = 0
    for seed in range(25):
        some = texts(seed)
        for text, found in zip(some, own.encode(some), strict=True):
            assert told(found, text) == told(made.encode(text, add_special_tokens=False), text)
            joined += isinstance(found, Joined)
    assert joined > 100


def cut_none(made: Tokenizer) -> bool:
    own = Endings(made)
    return not any(isinstance(one, Joined) for one in own.encode(texts(0)))


def test_what_may_reach_over_a_place_is_read_whole() -> None:
    assert not cut_none(CUT["gpt2"]())
    assert cut_none(byte_pairs(BYTES))  # no pieces
    assert cut_none(byte_pairs(split(r"\p{L}+ ?|\s+"), BYTES))
    assert cut_none(byte_pairs(split(LLAMA3 + r"|\b"), BYTES))
    assert cut_none(byte_pairs(cutters.ByteLevel(add_prefix_space=True)))
    assert cut_none(
        byte_pairs(cutters.ByteLevel(add_prefix_space=False), normalizer=normalizers.NFKC())
    )
    for token in (
        AddedToken("<y>", rstrip=True),
        AddedToken("<y>", single_word=True),
        AddedToken("a b"),
    ):
        made = CUT["gpt2"]()
        made.add_tokens([token])
        assert cut_none(made)
    trimming = CUT["gpt2"]()
    trimming.post_processor = processors.ByteLevel(trim_offsets=True)
    assert cut_none(trimming)
    across = whole_text(first=False)
    across.add_tokens(["s▁"])
    assert cut_none(across)


@pytest.mark.parametrize(
    ("one", "other", "cut"),
    [
        ("is it so: yes", "is it so: no", 5),
        ("is it\nyes", "is it\nno", 5),
        ("is it", "is it", 2),
        ("is 1 2 yes", "is 1 2 no", 2),
        ("1 2 yes", "1 2 no", 0),
        ("it yes", "at yes", 0),
        ("", "a", 0),
    ],
)
def test_a_place_stands_behind_a_letter(one: str, other: str, cut: int) -> None:
    assert shared_cut(one, other) == shared_cut(other, one) == cut


def test_bars_in_brackets_part_nothing() -> None:
    assert alternatives_of(r"(?i:a|b)|[|(]+|\||c\\|d") == [
        r"(?i:a|b)",
        r"[|(]+",
        r"\|",
        r"c\\",
        "d",
    ]


def test_endings_are_kept_in_some_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtl_lora_cli.data.endings._KEPT", 8)
    made = CUT["gpt2"]()
    own, asked = Endings(made), 0

    class Counted:
        def encode_batch(self, some: Sequence[str], **given: Any) -> list[Any]:
            nonlocal asked
            asked += len(some)
            return list(made.encode_batch(some, **given))

    vars(own)["_reader"] = Counted()
    vars(own)["_added"] = Regex  # never asked: the test's reader is no backend
    monkeypatch.setattr(Endings, "_may_end", lambda self, ending: True)
    for _ in range(3):
        own.encode([f"A question that is long: {answer}" for answer in ("yes", "no", "maybe")])
    assert asked == 2
    own.encode([f"A question that is long: {n}" for n in range(20)])
    assert len(own._known) <= 8
