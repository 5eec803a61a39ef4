"""CIDEr-D of captions beside several references: w [R, E] → [R], between 0 and 10.

Vedantam et al. 2015, arXiv 1411.5726, as pycocoevalcap's `Cider`: n-grams of 1 to 4 words, weighted by how few of the
pictures have them in a reference, clipped counts, and a penalty for another length. Words are parted at white space,
in lower case and without punctuation; PTB's tokeniser, which COCO's server runs in Java, is not needed for that.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from mtl_lora_cli.metrics.declare import FREE, metric
from mtl_lora_cli.metrics.outcome import Array, Outcome, several
from mtl_lora_cli.metrics.texts import TEXTS

_LONGEST, _SIGMA, _SCALE = 4, 6.0, 10.0
_PUNCTUATION = re.compile(r"[^\w\s']|_")
Grams = Counter[tuple[str, ...]]


@metric("cider", of=FREE, reads=TEXTS, range=(0, _SCALE))
def cider(o: Outcome, w: Array) -> Array:
    """10 / E Σ_i mean over references j and n of cos(g_n(answer_i), g_n(reference_ij)) exp(−Δ² / 72).

    g_n has an n-gram's count times log(E / pictures that have it). In a resample the pictures are those drawn.
    """
    assert o.references is not None
    assert o.answers is not None
    counted = _counted(o.references.tolist(), o.answers.tolist())
    return np.asarray([_score(counted, own) for own in w])


@dataclass(frozen=True)
class _Sparse:
    """Values [K] in rows and columns of a matrix; rows are 4 texts' lengths of n-grams."""

    row: Array
    column: Array
    value: Array
    rows: int

    def times(self, weight: Array) -> Array:
        """Σ over a row of value · weight of its column."""
        summed = np.bincount(self.row, self.value * weight[self.column], self.rows)
        return summed.astype(np.float64)  # of no entries at all they would be integers


@dataclass(frozen=True)
class _Counted:
    """What does not depend on the resample.

    Attributes:
        present: of each n-gram [V] the pictures whose references have it, as a matrix [V, E].
        answers, references, both: squared counts of answers [4 E, V] and references [4 J, V], and
            min(count, count) · count of a reference beside its answer [4 J, V].
        owner: [J], the picture of each reference.
        penalty: [J].
        share: [J], 1 / references of its picture.
    """

    present: _Sparse
    answers: _Sparse
    references: _Sparse
    both: _Sparse
    owner: Array
    penalty: Array
    share: Array


def _score(c: _Counted, w: Array) -> float:
    total = w.sum()
    drawn = c.present.times(w)
    rarity = np.log(total) - np.log(np.maximum(1.0, drawn))
    squared = rarity**2
    of_answers = np.sqrt(c.answers.times(squared)).reshape(-1, _LONGEST)[c.owner]
    norms = of_answers * np.sqrt(c.references.times(squared)).reshape(-1, _LONGEST)
    products = c.both.times(squared).reshape(-1, _LONGEST)
    cosines = np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)
    scores = cosines.mean(1) * c.penalty * c.share
    return float(np.clip(_SCALE * (scores @ w[c.owner]) / total, 0, _SCALE))


def _counted(references: list[str], answers: list[str]) -> _Counted:
    every = [[_grams(one) for one in several(some)] for some in references]
    given = [_grams(one) for one in answers]
    names: dict[tuple[str, ...], int] = {}
    for some, own in zip(every, given, strict=True):
        for grams in (*some, own):
            for gram in grams:
                names.setdefault(gram, len(names))
    owner = [picture for picture, some in enumerate(every) for _ in some]
    flat = [grams for some in every for grams in some]
    present = [
        (names[gram], picture, 1.0)
        for picture, some in enumerate(every)
        for gram in {gram for grams in some for gram in grams}
    ]
    both = [
        (_LONGEST * number + len(gram) - 1, names[gram], float(min(own[gram], count) * count))
        for number, (grams, own) in enumerate(zip(flat, (given[n] for n in owner), strict=True))
        for gram, count in grams.items()
        if gram in own
    ]
    more = [_length(given[n]) - _length(one) for n, one in zip(owner, flat, strict=True)]
    return _Counted(
        _sparse(present, len(names)),
        _squares(given, names),
        _squares(flat, names),
        _sparse(both, _LONGEST * len(flat)),
        np.asarray(owner),
        np.exp(-(np.asarray(more, np.float64) ** 2) / (2 * _SIGMA**2)),
        1 / np.asarray([len(every[picture]) for picture in owner], np.float64),
    )


def _squares(texts: list[Grams], names: dict[tuple[str, ...], int]) -> _Sparse:
    entries = [
        (_LONGEST * number + len(gram) - 1, names[gram], float(count**2))
        for number, grams in enumerate(texts)
        for gram, count in grams.items()
    ]
    return _sparse(entries, _LONGEST * len(texts))


def _sparse(entries: list[tuple[int, int, float]], rows: int) -> _Sparse:
    row, column, value = (
        (list(some) for some in zip(*entries, strict=True)) if entries else ([], [], [])
    )
    return _Sparse(
        np.asarray(row, np.int64), np.asarray(column, np.int64), np.asarray(value, np.float64), rows
    )


def _length(grams: Grams) -> int:
    """Of a text as it counts for the penalty: its pairs of words."""
    return sum(count for gram, count in grams.items() if len(gram) == 2)


def _grams(text: str) -> Grams:
    words = caption_words(text)
    return Counter(
        tuple(words[begin : begin + size])
        for size in range(1, _LONGEST + 1)
        for begin in range(len(words) - size + 1)
    )


def caption_words(text: str) -> list[str]:
    """The words of a caption."""
    return _PUNCTUATION.sub(" ", text.lower()).split()
