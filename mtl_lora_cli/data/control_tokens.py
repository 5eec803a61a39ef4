"""Control tokens in the text of rows: text like any other, unless the recipe says otherwise.

A tokenizer takes `</s>` in a review for its end token. Where a row holds one it is rendered again with a mark
in it, and what is rendered goes through a tokenizer that knows its control tokens by secret names only:
those of the templates are spelled so, and those of rows are text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mtl_lora_cli.data.examples import Examples
from mtl_lora_cli.data.written import Turn, Written
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.tasks.pictured import MARK
from mtl_lora_cli.tasks.rendering import Example, Renderer
from mtl_lora_cli.tasks.task import Task

# Characters for private use, together: no text has them.
_MARK = "\U000f0a57\U000ffb31"
_NAME = "\U000f0a58{}\U000ffb32"


@dataclass(frozen=True)
class Marked:
    """Examples as they are to be encoded.

    Attributes:
        examples: with marks in the control tokens that rows brought.
        places: of the rows that brought some.
        first: a control token of the first of them.
    """

    examples: list[Example]
    places: list[str]
    first: str = ""


@dataclass(frozen=True)
class Brought:
    """What is good to know of rows that are encoded; of pieces of them it can be added up.

    Attributes:
        rows: how many.
        tokens: those that hold a control token.
        first, where: that of the first of them, and its place.
        drops_reasoning: the chat template leaves out the reasoning of earlier answers.
    """

    rows: int = 0
    tokens: int = 0
    first: str = ""
    where: str = ""
    drops_reasoning: bool = False

    def __add__(self, other: Brought) -> Brought:
        early = self if self.tokens else other
        return Brought(
            self.rows + other.rows,
            self.tokens + other.tokens,
            early.first,
            early.where,
            self.drops_reasoning or other.drops_reasoning,
        )


class ControlTokens:
    """The control tokens of a tokenizer.

    Args:
        tokenizer: a fast transformers tokenizer.
        how: `text`, `token` (as the tokenizer takes them) or `error`; the recipe's `control_tokens`.
    """

    def __init__(self, tokenizer: Any, how: str = "text") -> None:
        self.how = how
        self._backend = tokenizer.backend_tokenizer
        added = tokenizer.added_tokens_decoder.items()
        known = {token.content: number for number, token in added if token.special}
        self._names = {text: _NAME.format(n) for text, n in known.items() if text.strip()}
        longest = sorted(self._names, key=len, reverse=True)
        self._any = "|".join(map(re.escape, longest)) or "(?!)"
        self._found = re.compile(self._any)

    def mark(self, task: Task, held: Examples) -> Marked:
        """Examples of a task with marks in the control tokens that came with their rows.

        They are to be encoded and for nothing else: whoever compares or prints texts takes those of `held`.

        Raises:
            UsageError: there is one, and `control_tokens` is `error`.
        """
        examples, first = list(held.examples), ""
        places: list[str] = []
        if self.how == "token":
            return Marked(examples, places)
        renderer = None
        for number, example in enumerate(held.examples):
            if not any(map(self._found.search, (example.prompt, example.answer, *example.choices))):
                continue
            renderer = renderer or Renderer(task.template, task.name)
            examples[number] = self._again(
                renderer, example, held.rows[number], held.wheres[number]
            )
            brought = self._brought(examples[number])
            if not brought:
                continue
            if self.how == "error":
                raise UsageError(
                    f"{held.wheres[number]}: task '{task.name}': the row holds {brought}, a control token of "
                    "the tokenizer, and control_tokens is error; text and token go on"
                )
            places.append(held.wheres[number])
            first = first or brought
        return Marked(examples, places, first)

    def written_by(self, task: Task) -> dict[str, str]:
        """The control tokens that a task's template writes itself, and where each stands first."""
        template, lines = task.template, task.template_text.splitlines()
        choices = template.choices
        texts = [template.prompt, template.answer]
        if isinstance(choices, dict | list):
            texts += choices.values() if isinstance(choices, dict) else choices
        found = dict.fromkeys(match[0] for match in self._found.finditer("\n".join(texts)))
        file = Path(task.template_name).name
        places = {
            token: next((n for n, line in enumerate(lines, start=1) if token in line), None)
            for token in found
        }
        if template.images:
            places.pop(MARK, None)  # where a picture stands
        return {token: file if line is None else f"{file}:{line}" for token, line in places.items()}

    def _again(self, renderer: Renderer, example: Example, row: Any, where: str) -> Example:
        """The same example from a row with marks; its label is known already."""
        labelled = not example.choices and bool(example.answer)
        own = renderer.template.images and MARK  # in such rows it stands for a picture
        marked = renderer.render(self.marked(row, own or ""), where, labelled=labelled)
        answer = (
            marked.choices[example.gold] if example.choices and example.gold >= 0 else marked.answer
        )
        return replace(
            example,
            prompt=marked.prompt,
            answer=answer,
            choices=marked.choices,
            dialogue=marked.dialogue,
        )

    def marked(self, value: Any, but: str = "") -> Any:
        """A field of a row, marks in every control token in it but one."""
        if isinstance(value, str):
            return self._found.sub(
                lambda match: match[0] if match[0] == but else _MARK.join(match[0]), value
            )
        if isinstance(value, Mapping):
            return {key: self.marked(one, but) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [self.marked(one, but) for one in value]
        return value

    def _brought(self, example: Example) -> str:
        """The first control token with marks in an example."""
        text = "\n".join([example.prompt, example.answer, *example.choices])
        marked = "|".join(_MARK.join(map(re.escape, one)) for one in self._names)
        found = re.search(marked, text) if _MARK in text else None
        return found[0].replace(_MARK, "") if found else ""

    def spelled(self, written: Written) -> Written:
        """A text with marks as `encode` takes it: no marks, and control tokens by their secret names."""
        if _MARK not in written.text:
            return written
        parts, changes, at = [], [], 0
        for match in re.finditer(f"{_MARK}|{self._any}", written.text):
            new = self._names.get(match[0], "")
            parts += [written.text[at : match.start()], new]
            at = match.end()
            changes.append((at, len(new) - len(match[0])))

        def moved(place: int) -> int:
            return place + sum(change for end, change in changes if end <= place)

        turns = tuple(
            Turn(moved(one.begin), moved(one.text), moved(one.close), moved(one.end))
            for one in written.turns
        )
        own = moved(written.own[0]), moved(written.own[1])
        text = "".join([*parts, written.text[at:]])
        return replace(written, text=text, turns=turns, own=own, spelled=True)

    @cached_property
    def by_name(self) -> Any:
        """The tokenizer that knows control tokens by their secret names.

        Raises:
            UsageError: its tokens would have other numbers.
        """
        from tokenizers import Tokenizer

        described = json.loads(self._backend.to_str())
        described["post_processor"] = None
        for token in described["added_tokens"]:
            token["content"] = self._names.get(token["content"], token["content"])
        model = described["model"]
        vocabulary = model["vocab"]
        model["vocab"] = (
            {self._names.get(word, word): number for word, number in vocabulary.items()}
            if isinstance(vocabulary, dict)
            else [[self._names.get(word, word), *score] for word, *score in vocabulary]
        )
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = self._names.get(model["unk_token"], model["unk_token"])
        made = Tokenizer.from_str(json.dumps(described))
        for text, name in self._names.items():
            if made.token_to_id(name) != self._backend.token_to_id(text):
                raise UsageError(
                    f"the row's control tokens cannot be made text: the tokenizer has no place for {text} "
                    "under another name; set control_tokens to token or error"
                )
        return made
