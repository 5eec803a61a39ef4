"""A good recipe with its template and rows, and what a mistake in them is: the files beside this one list them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

RECIPE = """\
base_model: STORIES
tasks:
  - name: color
    template: color.yaml
    source: color.jsonl
run:
  name: new
"""
TEMPLATE = """\
description: Does a word name a color?
prompt: "{{ word }} is a color?"
label: label
choices: {yes: "yes", no: "no"}
"""
ROWS = '{"word": "red", "label": "yes"}\n{"word": "dog", "label": "no"}\n'
POINTER = """\
version https://git-lfs.github.com/spec/v1
oid sha256:4665a5ea423c2713d436b5ee50593a9640e0018c1550b5a0002f74190d6caea8
size 1048576
"""
FILES = {"recipe.yaml": RECIPE, "color.yaml": TEMPLATE, "color.jsonl": ROWS}

TRAIN = ("train", "recipe.yaml")


@dataclass(frozen=True)
class Bad:
    """One mistake.

    Attributes:
        name: what it is.
        errors: the expected lines after `error: `; one that ends in `…` names only a beginning.
            STORIES, TMP and RUNS stand for folders, here as in the arguments and files.
        arguments: of the command.
        files: beside or instead of the good ones; None takes one away.
        early: it is found before any heavy library is loaded, which a cold process shows.
    """

    name: str
    errors: tuple[str, ...]
    arguments: tuple[str, ...] = TRAIN
    files: Mapping[str, str | None] = field(default_factory=dict)
    early: bool = True


def recipe(before: str, after: str) -> dict[str, str | None]:
    """The good recipe with one change."""
    assert before in RECIPE
    return {"recipe.yaml": RECIPE.replace(before, after)}


def more(text: str) -> dict[str, str | None]:
    """The good recipe with lines behind it; they begin at line 8."""
    return {"recipe.yaml": RECIPE + text}
