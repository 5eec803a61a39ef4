"""What generated answers say: whole words, and nothing that cannot be told for sure."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_lora_cli.tasks.reading import Reading, begins, prefix_conflict

LINE = Reading(("\n",))
ABCD = ("A", "B", "C", "D")


@pytest.mark.parametrize(
    ("text", "choices", "expected"),
    [
        ("Nothing in it", ("no", "yes"), -1),
        ("Because it is", ABCD, -1),
        ("10", ("1", "2"), -1),
        ("yes, because", ("no", "yes"), 1),
        ("A: first", ABCD, 0),
        ("B.", ABCD, 1),
        ("b) the second", ABCD, 1),
        ("B—for it is", ABCD, 1),
        ("No-one knows", ("no", "yes"), -1),
        ("can't say", ("can", "must"), -1),
        ("can’t say", ("can", "must"), -1),
        ("yes/no", ("no", "yes"), -1),
        ("1.5", ("1", "2"), -1),
        ("1,000", ("1", "2"), -1),
        ("1. It is", ("1", "2"), 0),
        ("1, as I said", ("1", "2"), 0),
        ("C++", ("C", "Java"), -1),
        ("C++ it is", ("C++", "Java"), 0),
        ("no_op", ("no", "yes"), -1),
        ("не́т", ("не", "да"), -1),  # a letter with a mark of its own goes on
        ("no\u0301", ("no", "yes"), -1),
        ("ना", ("न", "ह"), -1),
        ("CAFÉ au lait", ("cafe\u0301", "tea"), 0),
        ("STRASSE", ("straße", "weg"), 0),
        ("是的", ("是", "否"), -1),
        ("是，因为", ("是", "否"), 0),
    ],
)
def test_a_choice_is_read_as_whole_words(text: str, choices: Sequence[str], expected: int) -> None:
    assert LINE.choice(text, choices) == expected


WORDS = st.text(st.characters(categories=("Ll", "Lu", "Nd", "Lo", "Mn")), min_size=1, max_size=5)


@given(
    st.lists(WORDS, min_size=2, max_size=5, unique=True), st.sampled_from(["", ".", ", so", " a"])
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_choices_without_a_conflict_are_read_as_themselves(choices: list[str], behind: str) -> None:
    if Reading().conflict(choices) is not None:
        pair = prefix_conflict(choices)
        assert pair is not None
        short, long = (unicodedata.normalize("NFC", one).casefold() for one in pair)
        assert unicodedata.normalize("NFC", long).startswith(unicodedata.normalize("NFC", short))
        return
    for number, choice in enumerate(choices):
        for said in (choice, choice.upper(), unicodedata.normalize("NFD", choice)):
            if (
                unicodedata.normalize("NFC", said).casefold()
                == unicodedata.normalize("NFC", choice).casefold()
            ):
                assert LINE.choice(f" {said}{behind}", choices) == number
        assert LINE.choice(f"{choice}x{behind}", choices) != number


def test_conflicts_are_looked_for_without_regard_to_case() -> None:
    assert prefix_conflict(["maybe", "not sure", "yes", "not"]) == ("not", "not sure")
    assert prefix_conflict(["No", "not sure"]) == ("No", "not sure")
    assert prefix_conflict(["not sure", "NO"]) == ("NO", "not sure")
    assert prefix_conflict(["yes", "Yes"]) is not None
    assert prefix_conflict(["cafe\u0301", "CAFÉ noir"]) is not None
    assert prefix_conflict(["relevant", "irrelevant"]) is None


def test_nothing_begins_with_a_longer_text() -> None:
    assert begins("", "x") and begins("no", "no") and not begins("no", "n")


@pytest.mark.parametrize(
    ("reading", "answer", "why"),
    [
        (LINE, "yes\nsir", "generate.stop '\\n' stands in the answer 'yes\\nsir' and ends it"),
        (Reading(("Q:", ",")), "red, blue", "generate.stop ',' stands in the answer 'red, blue'"),
        (
            Reading(extract=r"\d+"),
            "none",
            "generate.extract '\\d+' finds nothing in the answer 'no",
        ),
        (Reading(("Q:",), r"#### (\d+)"), "Q: 3 #### 7", "generate.stop 'Q:' stands in the answer"),
        (Reading(("Q:",), r"#### (\d+)"), "3 + 4 #### 7 Q: 8", None),
        (LINE, "yes", None),
        (Reading(), "two\nlines", None),
    ],
)
def test_an_answer_that_cannot_be_read_says_why(
    reading: Reading, answer: str, why: str | None
) -> None:
    found = reading.unreadable(answer)
    assert found == why if why is None else (found or "").startswith(why)
