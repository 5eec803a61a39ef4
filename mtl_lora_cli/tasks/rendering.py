"""From a row of data to an example: prompt, candidate answers, and which of them is right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.pictures.shown import Picture
from mtl_lora_cli.tasks.jinja import Expression, Text, explain, spelled, value_at
from mtl_lora_cli.tasks.messages import Dialogue, plain_text, texts_of
from mtl_lora_cli.tasks.noticed import LOST, odd_answer, oddity
from mtl_lora_cli.tasks.pictured import Shows, placed
from mtl_lora_cli.tasks.printing import NotPrintableError, printable
from mtl_lora_cli.tasks.talk import Talk, with_pictures
from mtl_lora_cli.tasks.template import Each, Template, index_in, index_of, number

Result = TypeVar("Result")
Variables = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Example:
    """What a model reads and should answer."""

    prompt: str
    answer: str  # the text to learn, without a leading space; "" where there is no label
    choices: tuple[str, ...]  # candidate answers in order; () for a free answer
    gold: int  # index into choices; -1 for a free answer or where there is no label
    value: float | None = None  # the label as a number, with `scoring: expectation`
    dialogue: Dialogue | None = None  # the whole conversation, where the task has such
    images: tuple[
        Picture, ...
    ] = ()  # in the order of their places in the prompt (`pictured.PLACE`)
    # All free answers that count as right, of which `answer` is learned; () where it alone does.
    answers: tuple[str, ...] = ()
    # What the audit looks at: the row's texts that the prompt may read, and what is odd about those that
    # it prints: what it is, and the field.
    texts: tuple[str, ...] = field(default=(), compare=False, repr=False)
    odd: tuple[tuple[str, str], ...] = field(default=(), compare=False, repr=False)


class LabelError(UsageError):
    """A row's right answer is missing, or none of the choices."""


class Renderer:
    """Renders the rows of one task; compiles the template once.

    Args:
        template: of the task.
        task: its name, for errors.
        root: the folder that paths of pictures are relative to.

    Attributes:
        reads: the variables that a question and its choices are made of; `row`: any field may be.
    """

    def __init__(self, template: Template, task: str, root: Path = Path()) -> None:
        self.template = template
        self.task = task
        self._fields = [(name, Expression(text)) for name, text in template.fields.items()]
        self._prompt = Text(template.prompt)
        self._conversation = (
            None
            if template.conversation is None
            else Talk(template.conversation, shows=bool(template.images))
        )
        self._label = Expression(template.label or "none")
        self._answer = Text(template.answer)
        self._answers = None if template.answers is None else Expression(template.answers)
        self._candidates = _candidates(template)
        self._shows = Shows(template.images, root) if template.images else None
        # Most rows wrap the same few choices, and Jinja is the slowest thing here.
        printed = set(self._prompt.printed)
        self._looked_at = [
            (
                str(path[0]) if len(path) == 1 else "",
                path,
                spelled(path) if path in printed else "",
                path in self._prompt.plain,
            )
            for path in self._prompt.paths
        ]
        free = self._answer.printed if template.choices is None else ()
        self._answer_of = [(path, spelled(path), path in self._answer.plain) for path in free]
        names = [one.names for _, one in self._fields]
        names += [self._prompt.names, self._label.names, self._answer.names]
        if self._conversation is not None:
            names.append(self._conversation.names)
        self._reads_row = any("row" in own for own in names)
        asked = [own for own in names if own is not self._label.names]
        self.reads = frozenset().union(*asked, _names_of_choices(template))
        self._golds: dict[Any, int] = {}  # right choice by label
        self._wrap_alone = lru_cache(maxsize=4096)(lambda text: self._answer({"choice": text}))

    def render(self, row: Mapping[str, Any], where: str, *, labelled: bool = True) -> Example:
        """One row as an example.

        Args:
            row: the fields of the row.
            where: its place, such as `train.jsonl:12`; errors begin with it.
            labelled: False for rows to predict, whose label is not even looked at.

        Raises:
            UsageError: one line; the row lacks a field that the template reads, its label is none
                of the choices, a text is empty, or fewer than two distinct choices are left.
        """
        variables = self._variables(row, where)
        if self._conversation is not None:
            told = self._told(self._conversation, variables, where, labelled)
            return self._talk(*told, labelled=labelled)
        prompt = self._get("prompt", self._prompt, variables, where).rstrip()
        if not prompt:
            raise self._error(where, "prompt", "is empty for this row")
        images: tuple[Picture, ...] = ()
        if self._shows is not None:
            images = self.pictures(row, where, variables)
            own = prompt
            prompt = self._get("prompt", lambda _: placed(own, len(images)), variables, where)
        answer, choices, gold, value = self._answered(variables, where, labelled)
        texts, odd = self._noticed(variables, labelled)
        several = self._several(variables, where) if labelled else ()
        return Example(prompt, answer, choices, gold, value, None, images, several, texts, odd)

    def pictures(
        self, row: Mapping[str, Any], where: str, variables: Variables | None = None
    ) -> tuple[Picture, ...]:
        """The pictures of a row; no file is looked at.

        Raises:
            UsageError: something else stands where they should, or a prompt shows none.
        """
        if self._shows is None:
            return ()
        shows, known = self._shows, self._variables(row, where) if variables is None else variables
        if self._conversation is not None:
            return self._told(self._conversation, known, where, labelled=False)[1]
        found = self._get("images", lambda own: shows.of(own, where), known, where)
        if not found:
            raise self._error(where, "images", "the row shows no picture")
        return found

    def _told(
        self, talk: Talk, variables: Variables, where: str, labelled: bool
    ) -> tuple[Dialogue, tuple[Picture, ...]]:
        """A row as a conversation, and the pictures in it."""
        told = self._get("conversation", lambda own: talk(own, labelled=labelled), variables, where)
        shows = self._shows
        if shows is None:
            return told.dialogue, ()
        own = self._get("images", lambda known: shows.of(known, where), variables, where)
        dialogue, shown = self._get("images", lambda _: with_pictures(told, own), variables, where)
        return dialogue, self._get(
            "images", lambda _: shows.pictures(shown, where), variables, where
        )

    def _talk(self, dialogue: Dialogue, images: tuple[Picture, ...], *, labelled: bool) -> Example:
        """A conversation as an example."""
        said = dialogue.before if labelled else dialogue.messages
        texts = tuple(text for text in texts_of([one["content"] for one in said]) if text)
        answer = dialogue.answer.strip() if labelled else ""
        prompt = dialogue.prompt if labelled else plain_text(dialogue.messages)
        lost = any("\ufffd" in text for text in (*texts, answer))
        odd = ((LOST, "messages"),) if lost else ()
        return Example(prompt, answer, (), -1, None, dialogue, images, texts=texts, odd=odd)

    def talk(self, messages: list[Any], tools: list[Any], where: str) -> Example:
        """Messages that stand in no row, to be answered.

        Raises:
            UsageError: one of them cannot be read.
        """
        read = self._conversation
        assert read is not None, "only of a task of conversations"
        given: Callable[[Variables], Dialogue] = lambda _: read.given(messages, tools)  # noqa: E731
        dialogue = self._get("conversation", given, {"row": {}}, where)
        return Example(plain_text(dialogue.messages), "", (), -1, None, dialogue)

    def _noticed(
        self, variables: Variables, labelled: bool
    ) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
        """The texts that the prompt may read, and what is odd about what it and a free answer print."""
        texts: list[str] = []
        odd: list[tuple[str, str]] = []
        for name, path, printed, plain in self._looked_at:
            value = variables.get(name) if name else value_at(variables, path)
            if type(value) is str:
                texts.append(value)
            elif value is not None:
                texts.extend(_texts(value))
            kind = oddity(value, plain=plain) if printed else None
            if kind is not None:
                odd.append((kind, printed))
        for path, printed, plain in self._answer_of if labelled else ():
            kind = odd_answer(value_at(variables, path), plain=plain)
            if kind is not None and (kind, printed) not in odd:
                odd.append((kind, printed))
        return tuple(texts), tuple(odd)

    def _answered(
        self, variables: Variables, where: str, labelled: bool
    ) -> tuple[str, tuple[str, ...], int, float | None]:
        """The right answer, the choices, which of them it is, and its number."""
        if self._candidates is None:
            return self._free(variables, where) if labelled else "", (), -1, None
        texts, labels = self._get("choices", self._candidates, variables, where)
        choices = self._wrapped([text.strip() for text in texts], variables, where)
        if not labelled:
            return "", choices, -1, None
        gold, value = self._gold(labels, texts, variables, where)
        return choices[gold], choices, gold, value

    def labels(self, row: Mapping[str, Any], where: str) -> list[Any]:
        """The label value of each of a row's choices; none for a free answer.

        Raises:
            UsageError: as `render`.
        """
        if self._candidates is None:
            return []
        if self.template.labels is not None:
            return list(self.template.labels)
        variables = self._variables(row, where)
        return list(self._get("choices", self._candidates, variables, where)[1])

    def _variables(self, row: Mapping[str, Any], where: str) -> Variables:
        """The row's fields, and what `fields` computes from them."""
        if "row" in row and self._reads_row:
            raise self._error(
                where,
                "row",
                "the template reads the whole row under this name, which a field of it has, too; "
                "call that another: columns: {row: …} in the source",
            )
        variables: Variables = {**row, "row": row}
        for name, expression in self._fields:
            variables[name] = self._get(f"fields.{name}", expression, variables, where)
        return variables

    def _free(self, variables: Variables, where: str) -> str:
        answer = self._label_of("answer", self._answer, variables, where).strip()
        if not answer:
            raise self._label_error(where, "answer", "is empty for this row")
        return answer

    def _several(self, variables: Variables, where: str) -> tuple[str, ...]:
        """All answers that count as right."""
        if self._answers is None:
            return ()
        found = self._label_of("answers", self._answers, variables, where)
        if not isinstance(found, list | tuple) or not all(isinstance(one, str) for one in found):
            raise self._label_error(
                where, "answers", f"expected a list of texts, received {_short(found)}"
            )
        told = tuple(one.strip() for one in found if one.strip())
        if not told:
            raise self._label_error(where, "answers", "has no text")
        return told

    def _wrapped(self, texts: list[str], variables: Variables, where: str) -> tuple[str, ...]:
        """The choices as answers, checked: two or more, none empty, no two alike."""

        def wrap(variables: Variables) -> tuple[str, ...]:
            if self._answer.names <= {"choice"}:
                return tuple(self._wrap_alone(text) for text in texts)
            return tuple(self._answer({**variables, "choice": text}) for text in texts)

        if len(texts) < 2:
            raise self._error(
                where, "choices", f"at least two are needed, received {_listed(texts)}"
            )
        if not all(texts):
            raise self._error(where, "choices", f"one of {_listed(texts)} is empty")
        choices = tuple(map(str.strip, self._get("answer", wrap, variables, where)))
        if len(set(choices)) < len(choices):
            repeated = next(choice for choice in choices if choices.count(choice) > 1)
            raise self._error(where, "choices", f"{_short(repeated)} stands twice")
        return choices

    def _gold(
        self, labels: Sequence[Any], texts: Sequence[str], variables: Variables, where: str
    ) -> tuple[int, float | None]:
        label = self._label_of("label", self._label, variables, where)
        if label is None:
            raise self._label_error(where, "label", f"is null, expected one of {_listed(labels)}")
        if self.template.scoring == "expectation":
            self._require_one_way(label, texts, where)
            return self._nearest(label, labels, where)
        known = (type(label), label) if isinstance(label, str | int | float) else None
        if known in self._golds:
            return self._golds[known], None
        gold = index_of(label, labels)
        if gold is None:
            received, expected = f"received {_spelt(label)}", f"expected one of {_listed(labels)}"
            raise self._label_error(where, "label", f"{received}, {expected}")
        later = labels[gold + 1 :]
        again = index_of(label, later)
        if again is not None and (labels[gold] == label) == (later[again] == label):
            raise self._error(where, "label", f"{_short(label)} fits two of {_listed(labels)}")
        self._require_one_way(label, texts, where)
        if known is not None and isinstance(self.template.choices, dict):  # the same for all rows
            self._golds[known] = gold
        return gold, None

    def _require_one_way(self, label: Any, texts: Sequence[str], where: str) -> None:
        """Refuse a label that picks one choice by its text and another one by its place.

        Raises:
            UsageError: naming both.
        """
        choices = self.template.choices
        if isinstance(choices, dict) or (isinstance(choices, Each) and choices.labels is not None):
            return
        place, option = index_in(label, texts), index_of(label, texts)
        if place is None or option is None or place == option:
            return
        cure = (
            "choices: {each: …, labels: …}"
            if isinstance(choices, Each)
            else "choices: {label: text, …}"
        )
        raise self._error(
            where,
            "label",
            f"{_short(label)} fits in two ways: as the option {_short(texts[option])} and as the index of "
            f"{_short(texts[place])}; say which with {cure}",
        )

    def _nearest(self, label: Any, labels: Sequence[Any], where: str) -> tuple[int, float]:
        """The choice nearest to a number (the earlier of two), and the number itself."""
        value = number(label)
        grid = [number(known) for known in labels]
        numbers = [known for known in grid if known is not None]
        if len(numbers) < len(grid):
            raise self._error(where, "choices", f"labels must be numbers, not {_listed(labels)}")
        if value is None or not min(numbers) <= value <= max(numbers):
            expected = f"expected a number from {min(numbers)} to {max(numbers)}"
            raise self._label_error(where, "label", f"received {_short(label)}, {expected}")
        return min(range(len(numbers)), key=lambda index: abs(numbers[index] - value)), value

    def _get(
        self, key: str, compiled: Callable[[Variables], Result], variables: Variables, where: str
    ) -> Result:
        try:
            return compiled(variables)
        except Exception as error:  # a template may raise whatever Python can
            raise self._error(where, key, explain(error, variables["row"])) from None

    def _label_of(
        self, key: str, compiled: Callable[[Variables], Result], variables: Variables, where: str
    ) -> Result:
        """What the row says is right; whatever is wrong with it is an error of the label."""
        try:
            return self._get(key, compiled, variables, where)
        except UsageError as error:
            raise LabelError(str(error)) from None

    def _label_error(self, where: str, key: str, message: str) -> LabelError:
        return LabelError(str(self._error(where, key, message)))

    def _error(self, where: str, key: str, message: str) -> UsageError:
        return UsageError(f"{where}: task '{self.task}': {key}: {message}")


def _candidates(
    template: Template,
) -> Callable[[Variables], tuple[list[str], Sequence[Any]]] | None:
    """A function from a row's variables to the texts and label values of its choices."""
    choices = template.choices
    if choices is None:
        return None
    if isinstance(choices, Each):
        each = Expression(choices.each)
        labels_of = Expression(choices.labels) if choices.labels is not None else None

        def from_row(variables: Variables) -> tuple[list[str], Sequence[Any]]:
            texts = _as_list(each(variables))
            labels = texts if labels_of is None else _as_list(labels_of(variables))
            if len(texts) != len(labels):
                raise ValueError(f"{len(texts)} texts but {len(labels)} labels")
            try:
                return [str(printable(text)) for text in texts], labels
            except NotPrintableError as error:
                raise ValueError(f"{error}, one of {_listed(texts)}") from None

        return from_row
    labels = template.labels or []
    texts = [Text(text) for text in (choices.values() if isinstance(choices, dict) else choices)]
    return lambda variables: ([text(variables) for text in texts], labels)


def same_choices(template: Template) -> bool:
    """Whether all rows are answered by the same few texts."""
    if template.choices is None or _names_of_choices(template):
        return False
    return Text(template.answer).names <= {"choice"}


def _names_of_choices(template: Template) -> frozenset[str]:
    """The variables that a row's choices are made of."""
    choices = template.choices
    if choices is None:
        return frozenset()
    if isinstance(choices, Each):
        given = [choices.each] if choices.labels is None else [choices.each, choices.labels]
        return frozenset().union(*(Expression(text).names for text in given))
    texts = choices.values() if isinstance(choices, dict) else choices
    return frozenset().union(*(Text(text).names for text in texts))


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise ValueError(f"expected a list, received {_short(value)}")
    return list(value)


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value of a row."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from chain.from_iterable(map(_texts, value.values()))
    elif isinstance(value, list | tuple):
        yield from chain.from_iterable(map(_texts, value))


def _spelt(label: Any) -> str:
    """A label as an error shows it, and how it is written where it may only look like another one."""
    shown = _short(label)
    looks_alike = isinstance(label, str) and label.isprintable() and not label.isascii()
    return f"{shown} (written {label!a:.60})" if looks_alike else shown


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(_short(value) for value in values) or "none"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
