"""Metrics of free answers, beside `exact_match`: w [R, E] → [R], from the right and the given texts.

ROUGE-L is rouge-score's, BLEU and chrF are sacrebleu's, all as shares: a BLEU of 27.3 is 0.273.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal, InvalidOperation
from functools import cache, lru_cache
from itertools import zip_longest
from typing import Any

import numpy as np

from mtl_lora_cli.metrics.declare import FREE, metric
from mtl_lora_cli.metrics.outcome import Array, Outcome, several

TEXTS = ("references", "answers")
_REMEMBERED = 2**16
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_MARKED_NUMBER = re.compile(r"####\s*(-?\$?[0-9.,]+)")  # GSM8K's own line
_NUMBER = re.compile(r"-?\$?\.?[0-9][0-9.,]*")
_NOTHING = object()


def mean_of(of: Callable[[str, str], float], o: Outcome, w: Array) -> Array:
    """Σ_i w_i of(reference_i, answer_i) / Σ_i w_i."""
    values = [of(reference, answer) for reference, answer in _pairs(o)]
    return w @ np.asarray(values, np.float64) / w.sum(1)


def mean_of_best(of: Callable[[str, str], float], o: Outcome, w: Array) -> Array:
    """The same beside the right answer that gives most, where a row has several."""
    return mean_of(lambda some, answer: max(of(one, answer) for one in several(some)), o, w)


def _pairs(o: Outcome) -> list[tuple[str, str]]:
    assert o.references is not None
    assert o.answers is not None
    return list(zip(o.references.tolist(), o.answers.tolist(), strict=True))


@metric("token_f1", of=FREE, reads=TEXTS)
def token_f1(o: Outcome, w: Array) -> Array:
    """The mean of 2 |both| / (|right| + |given|) over words, without case, punctuation and articles.

    Source: SQuAD's evaluation script, Rajpurkar et al. 2016, arXiv 1606.05250.
    """
    return mean_of_best(_overlap, o, w)


@lru_cache(_REMEMBERED)
def _overlap(reference: str, answer: str) -> float:
    right, given = Counter(_words(reference)), Counter(_words(answer))
    if not right or not given:
        return float(right == given)
    return 2 * (right & given).total() / (right.total() + given.total())


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


@metric("rouge_l", of=FREE, reads=TEXTS)
def rouge_l(o: Outcome, w: Array) -> Array:
    """The mean F measure of the longest common subsequence of words, without stemming.

    Source: Lin 2004, aclanthology.org/W04-1013; rouge-score's `rougeL`.
    """
    return mean_of_best(_rouge, o, w)


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


@lru_cache(_REMEMBERED)
def _rouge(reference: str, answer: str) -> float:
    return float(_rouge_scorer().score(reference, answer)["rougeL"].fmeasure)


@metric("bleu", of=FREE, reads=TEXTS)
def bleu(o: Outcome, w: Array) -> Array:
    """BLEU-4 of all answers together, / 100.

    Source: Papineni et al. 2002, aclanthology.org/P02-1040; sacrebleu's defaults (13a, exp smoothing).
    """
    from sacrebleu.metrics.bleu import BLEU

    return _of_corpus(BLEU(), o, w)


@metric("chrf", of=FREE, reads=TEXTS)
def chrf(o: Outcome, w: Array) -> Array:
    """chrF2 of all answers together, / 100: F with β = 2 over n-grams of up to six characters.

    Source: Popović 2015, aclanthology.org/W15-3049; sacrebleu's defaults.
    """
    from sacrebleu.metrics.chrf import CHRF

    return _of_corpus(CHRF(), o, w)


def _of_corpus(scorer: Any, o: Outcome, w: Array) -> Array:
    """The score of each resample: what is counted in its answers is added up first."""
    references, answers = zip(*_pairs(o), strict=True)
    streams = [list(some) for some in zip_longest(*map(several, references))]
    counted = np.asarray(scorer._extract_corpus_statistics(list(answers), streams))
    sums = np.rint(w @ counted).astype(int)
    return np.asarray([scorer._compute_score_from_stats(one.tolist()).score / 100 for one in sums])


@metric("number", of=FREE, reads=TEXTS)
def number(o: Outcome, w: Array) -> Array:
    """The share of answers with the right number: the one behind ####, else the last one.

    Commas, dollar signs and a point at the end do not count; 42.0 is 42. Source: GSM8K, Cobbe et al. 2021,
    arXiv 2110.14168.
    """
    return mean_of_best(_same_number, o, w)


def _same_number(reference: str, answer: str) -> float:
    right = number_in(reference)
    return float(right is not None and right == number_in(answer))


def number_in(text: str) -> Decimal | None:
    """The number that a text comes to; None: it has none."""
    marked = _MARKED_NUMBER.findall(text)
    for found in reversed(marked or _NUMBER.findall(text)):
        try:
            return Decimal(found.replace(",", "").replace("$", "").rstrip("."))
        except InvalidOperation:
            continue
    return None


@metric("valid_json", of=FREE, reads=TEXTS)
def valid_json(o: Outcome, w: Array) -> Array:
    """The share of answers that are JSON, from their first character to their last."""
    return mean_of_best(lambda reference, answer: float(_json(answer) is not _NOTHING), o, w)


def _no_json(o: Outcome) -> str | None:
    texts = [] if o.references is None else [t for some in o.references for t in several(str(some))]
    if all(_json(text) is not _NOTHING for text in texts):
        return None
    return "a right answer is no JSON"


@metric("json_fields", of=FREE, reads=TEXTS, undefined=_no_json)
def json_fields(o: Outcome, w: Array) -> Array:
    """The mean share of fields that are equal, of those that the right or the given answer has.

    A field is a path to a value that is no object and no list; an answer that is no JSON has none.
    """
    return mean_of_best(_equal_fields, o, w)


def _equal_fields(reference: str, answer: str) -> float:
    right, given = (dict(_fields(_json(text))) for text in (reference, answer))
    names = {*right, *given}
    same = sum(_alike(right.get(name, _NOTHING), given.get(name, _NOTHING)) for name in names)
    return same / len(names) if names else float(_json(answer) is not _NOTHING)


def _alike(one: Any, other: Any) -> bool:
    return isinstance(one, bool) == isinstance(other, bool) and one == other


@lru_cache(_REMEMBERED)
def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _NOTHING


def _fields(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[Any, Any]]:
    """Paths and values; of an empty object or list its kind."""
    if isinstance(value, dict | list):
        if not value:
            yield path, type(value)
        for name, below in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _fields(below, (*path, name))
    elif value is not _NOTHING:
        yield path, value
