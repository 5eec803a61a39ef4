r"""Texts that begin alike: the tokenizer reads what they share once, and of each what it ends with.

A question is written once for each of its choices, and these texts differ in their last words alone. A text is cut
before a space or a line's end that stands after a letter a–z, where no token lies across:

    tokens(text) = tokens(text[:cut]) + tokens(text[cut:])

and the first half is the same for all texts that have the same `cut + 1` characters. That holds for BPE without
dropout of two kinds, whose added tokens have no such place and take no white space beside them:

- of bytes, in pieces that patterns cut: no match of theirs has a letter and the space behind it, and none looks
  further than one character behind itself. `_SAFE` are what GPT-2's, Llama 3's, Qwen's and o200k's patterns are made of;
- of a whole text, in which a space is `▁`, with no token that has a letter and `▁` behind it.

Both normalise in no way that reaches over such a place. Any other tokenizer reads each text as a whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CASED = frozenset(
    {
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+(?i:{_CONTRACTIONS})?",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*(?i:{_CONTRACTIONS})?",
    }
)
_LETTERS = (
    {r" ?\p{L}+"},
    {r"[^\r\n\p{L}\p{N}]?\p{L}+"},
    {r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"},
    _CASED,
)
_SAFE = frozenset().union(
    *_LETTERS,
    _CONTRACTIONS.split("|"),
    {f"(?i:{_CONTRACTIONS})", r"\p{N}", r"\p{N}+", r" ?\p{N}+", r"\p{N}{1,3}", r"[\r\n]"},
    {r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"},
    {r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s*[\r\n]", r"\s+(?!\S)", r"\s+"},
)
_ACROSS = re.compile(r"[A-Za-z][ \n▁]")
_SPACE = "▁"
_PREPEND = {"type": "Prepend", "prepend": _SPACE}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_KEPT = 4096  # endings, most of which are a template's own words

Described = dict[str, Any]


class Joined:
    """What a tokenizer says of a text, put together from those of its beginning and of its ending.

    Args:
        whole: of a text that begins in the same way.
        ids: its tokens.
        tokens: how many of them are the beginning's.
        cut: characters of the beginning.
        ending: of the characters from there on.
    """

    __slots__ = ("_cut", "_ending", "_tokens", "_whole", "ids")

    def __init__(self, whole: Any, ids: list[int], tokens: int, cut: int, ending: Any) -> None:
        self._whole, self._cut, self._tokens, self._ending = whole, cut, tokens, ending
        self.ids: list[int] = ids[:tokens] + ending.ids

    def __len__(self) -> int:
        return len(self.ids)

    def char_to_token(self, place: int) -> int | None:
        """The token of a character; None: it has none."""
        if place < self._cut:
            found: int | None = self._whole.char_to_token(place)
            return found
        token = self._ending.char_to_token(place - self._cut)
        return None if token is None else int(token) + self._tokens

    def token_to_chars(self, token: int) -> tuple[int, int]:
        """From which character to which a token goes."""
        if token < self._tokens:
            begin, end = self._whole.token_to_chars(token)
            return begin, end
        begin, end = self._ending.token_to_chars(token - self._tokens)
        return begin + self._cut, end + self._cut


class Endings:
    """A tokenizer that reads once what texts share that stand one after another.

    Args:
        backend: a `tokenizers.Tokenizer` that neither cuts nor pads.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._known: dict[str, Any] = {}

    def encode(self, texts: Sequence[str]) -> list[Any]:
        """What the tokenizer says of texts, special tokens not set.

        Returns:
            For each an `Encoding`, or a `Joined`.
        """
        plan = list(self._plan(texts))
        wholes = [number for number, (owner, _) in enumerate(plan) if owner == number]
        read = self._backend.encode_batch([texts[n] for n in wholes], add_special_tokens=False)
        found = dict(zip(wholes, read, strict=True))
        ids = {number: one.ids for number, one in found.items()}
        endings = self._read([texts[n][cut:] for n, (_, cut) in enumerate(plan) if cut])

        def joined(text: str, owner: int, cut: int) -> Any:
            whole = found[owner]
            if not cut:
                return whole
            tokens = whole.char_to_token(cut - 1) + 1
            return Joined(whole, ids[owner], tokens, cut, endings[text[cut:]])

        return [joined(text, *own) for text, own in zip(texts, plan, strict=True)]

    def _plan(self, texts: Sequence[str]) -> Iterator[tuple[int, int]]:
        """Of each text the one whose beginning it has, and where that ends; itself, and 0: it is read whole."""
        owner = 0
        for number, text in enumerate(texts):
            cut = shared_cut(texts[owner], text) if number else 0
            if 2 * cut <= len(text) or not self._may_end(text[cut:]):
                owner, cut = number, 0
            yield owner, cut

    def _may_end(self, ending: str) -> bool:
        """Whether it may be read alone."""
        if self._reader is None:
            return False
        # Behind an added token a text begins anew, with what the tokenizer of endings does not set.
        return self._reader is self._backend or self._added.search(ending) is None

    def _read(self, endings: Sequence[str]) -> Mapping[str, Any]:
        new = [one for one in dict.fromkeys(endings) if one not in self._known]
        found = {one: self._known[one] for one in endings if one in self._known}
        if new:
            assert self._reader is not None
            read = self._reader.encode_batch(new, add_special_tokens=False)
            found |= zip(new, read, strict=True)
            room = len(self._known) + len(new) <= _KEPT
            self._known = {**self._known, **found} if room else dict(list(found.items())[:_KEPT])
        return found

    @cached_property
    def _reader(self) -> Any:
        """The tokenizer of endings; None: texts are not cut."""
        return tokenizer_of_endings(self._backend)

    @cached_property
    def _added(self) -> re.Pattern[str]:
        added = [one.content for one in self._backend.get_added_tokens_decoder().values()]
        return re.compile("|".join(map(re.escape, added)) or "(?!)")


def shared_cut(one: str, other: str) -> int:
    """The last place to cut at among the characters that two texts begin with; 0: there is none."""
    end = _shared(one, other)
    while (cut := max(one.rfind(" ", 0, end), one.rfind("\n", 0, end))) > 0:
        before = one[cut - 1]
        if before.isascii() and before.isalpha():
            return cut
        end = cut
    return 0


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while low + 1 < high:  # the first `low` are the same, the first `high` are not
        middle = (low + high) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle)
    return low


def tokenizer_of_endings(backend: Any) -> Any:
    """A tokenizer that reads the endings of texts alone as another one reads them in the texts.

    Args:
        backend: a `tokenizers.Tokenizer`.

    Returns:
        That one itself where it sets nothing before a text, or one that does not; None: its texts are not to be cut.
    """
    model, added = backend.model, backend.get_added_tokens_decoder().values()
    if type(model).__name__ != "BPE" or model.dropout or not all(map(_is_plain, added)):
        return None
    if not all(map(_keeps_offsets, _steps(backend.post_processor, "processors"))):
        return None
    before = _steps(backend.normalizer, "normalizers")
    cutters = _steps(backend.pre_tokenizer, "pretokenizers")
    if all(one["type"] == "NFC" for one in before) and _cut_by_patterns(cutters):
        return backend
    return _of_whole_texts(backend, before, cutters)


def _steps(part: Any, name: str) -> list[Described]:
    """What a normaliser, a pre-tokenizer or a post-processor does, one after another."""
    if part is None:
        return []
    own = json.loads(part.__getstate__())
    return list(own[name]) if own["type"] == "Sequence" else [own]


def _is_plain(added: Any) -> bool:
    """Whether an added token changes nothing beside it, and has no place to cut at in it."""
    takes = added.lstrip or added.rstrip or added.single_word
    return not takes and _ACROSS.search(added.content) is None


def _keeps_offsets(step: Described) -> bool:
    return step["type"] == "TemplateProcessing" or (
        step["type"] == "ByteLevel" and not step["trim_offsets"]
    )


def _cut_by_patterns(cutters: Sequence[Described]) -> bool:
    """Whether a piece of a text ends at each place to cut at, as bytes that are merged."""
    alternatives: set[str] = set()
    of_bytes = False
    for one in cutters:
        if one["type"] == "ByteLevel" and not one["add_prefix_space"]:
            of_bytes = True
            alternatives |= {r" ?\p{L}+"} if one["use_regex"] else set()
        elif one["type"] == "Split" and one["behavior"] == "Isolated" and not one["invert"]:
            alternatives |= set(alternatives_of(one["pattern"].get("Regex", "?")))
        elif one["type"] != "Digits":
            return False
    return of_bytes and alternatives <= _SAFE and any(own <= alternatives for own in _LETTERS)


def alternatives_of(pattern: str) -> list[str]:
    """What stands between the bars of a pattern that stand in no bracket."""
    found, depth, escaped, listed = [""], 0, False, False
    for letter in pattern:
        if not escaped:
            listed = letter == "[" or (listed and letter != "]")
            depth += 0 if listed else (letter == "(") - (letter == ")")
        if letter == "|" and not (depth or escaped or listed):
            found.append("")
        else:
            found[-1] += letter
        escaped = letter == "\\" and not escaped
    return found


def _of_whole_texts(backend: Any, before: Sequence[Described], cutters: Sequence[Described]) -> Any:
    """The same of a tokenizer that merges a whole text, or such pieces of it as begin with a space."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers

    if before not in ([_PREPEND, _REPLACE], [_REPLACE]) and before:
        return None
    meta = [one for one in cutters if one["type"] == "Metaspace" and one["replacement"] == _SPACE]
    no_space_left = {"type": "Split", "pattern": {"String": " "}}
    for one in cutters:
        if one not in meta and not (before and no_space_left.items() <= one.items()):
            return None
    if not (before or meta) or any(map(_ACROSS.search, backend.get_vocab())):
        return None
    made = Tokenizer.from_str(backend.to_str())
    if before:
        made.normalizer = normalizers.Replace(" ", _SPACE)
    if meta:
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(_SPACE, prepend_scheme="never", split=one["split"])
                for one in meta
            ]
        )
    return made
