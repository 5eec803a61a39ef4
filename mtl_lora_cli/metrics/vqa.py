"""Metrics of short answers about pictures, as their benchmarks' own scripts have them: w [R, E] → [R].

Where people gave several answers to a question, `outcome.several` of a reference has them.
"""

from __future__ import annotations

import re
import string
from functools import lru_cache

import numpy as np

from mtl_lora_cli.metrics.declare import FREE, metric
from mtl_lora_cli.metrics.outcome import Array, Outcome, several
from mtl_lora_cli.metrics.texts import TEXTS, mean_of, mean_of_best

_REMEMBERED = 2**16
_AGREEING = 3  # people whose answer makes one right
_TOLERATED = 0.05  # of a number
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"(?!<=\d)\.(?!\d)")  # its lookbehind is none, there as here
_FEW_PERIODS = 32  # so many are taken out: `re.UNICODE` stands there in the place of a count
_COMMA = re.compile(r"\d,\d")
_NUMBERS = "zero one two three four five six seven eight nine ten"
_DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBERS.split())}}
_CONTRACTED = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've"""
# Each is known without one of its apostrophes.
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}


def _one_answer(o: Outcome) -> str | None:
    if o.references is None or all(len(several(one)) > 1 for one in o.references.tolist()):
        return None
    return "a row has one right answer; `answers` of a template gives those of several people"


@metric("vqa_accuracy", of=FREE, reads=TEXTS, undefined=_one_answer)
def vqa_accuracy(o: Outcome, w: Array) -> Array:
    """The mean over the people asked of min(1, n / 3), n of the others giving the same answer.

    Answers are compared by lower-case words without articles and punctuation, numbers up to ten as digits.
    Source: Antol et al. 2015, arXiv 1505.00468, and its script `vqaEval.py`, as OpenFlamingo has it: right answers are
    always changed likewise.
    """
    return mean_of(_vqa, o, w)


@lru_cache(_REMEMBERED)
def _vqa(reference: str, answer: str) -> float:
    given, people = plain_answer(answer), [plain_answer(one) for one in several(reference)]
    same = people.count(given)
    agreed = [min(1.0, (same - (one == given)) / _AGREEING) for one in people]
    return sum(agreed) / len(agreed)


@lru_cache(_REMEMBERED)
def plain_answer(text: str) -> str:
    """An answer as VQA's script compares it."""
    given = text.replace("\n", " ").replace("\t", " ").strip()
    words = [_DIGITS.get(word, word) for word in _unmarked(given).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


_ARTICLES = ("a", "an", "the")


def _unmarked(given: str) -> str:
    """Without punctuation: gone beside a space, and where a number has a comma; a space elsewhere."""
    found, comma = given, _COMMA.search(given) is not None
    for mark in _PUNCTUATION:
        beside = f"{mark} " in given or f" {mark}" in given
        found = found.replace(mark, "" if beside or comma else " ")
    return _PERIOD.sub("", found, count=_FEW_PERIODS)


@metric("gqa_accuracy", of=FREE, reads=TEXTS)
def gqa_accuracy(o: Outcome, w: Array) -> Array:
    """The share of answers that are the right one, case and punctuation aside.

    Source: Hudson and Manning 2019, arXiv 1902.09506; compared as `evaluate`'s `exact_match` with `ignore_case` and
    `ignore_punctuation`, which is what lmms-eval asks for GQA.
    """
    return mean_of_best(
        lambda reference, answer: float(_letters(reference) == _letters(answer)), o, w
    )


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _letters(text: str) -> str:
    return text.lower().translate(_NO_PUNCTUATION)


@metric("relaxed_accuracy", of=FREE, reads=TEXTS)
def relaxed_accuracy(o: Outcome, w: Array) -> Array:
    """The share of answers that are the right one; a number may be 5 % off, and texts are compared without case.

    `12%` is 0.12. Source: Masry et al. 2022, arXiv 2203.10244, as lmms-eval's `relaxed_correctness`.
    """
    return mean_of_best(_relaxed, o, w)


@lru_cache(_REMEMBERED)
def _relaxed(reference: str, answer: str) -> float:
    given, right = _amount(answer), _amount(reference)
    if given is None or not right:
        return float(answer.lower() == reference.lower())
    with np.errstate(invalid="ignore"):
        return float(abs(given - right) / abs(right) <= _TOLERATED)


def _amount(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
