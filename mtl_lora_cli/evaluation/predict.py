"""Unlabelled rows in, labels and probabilities out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.data.examples import Examples
from mtl_lora_cli.errors import UsageError, did_you_mean
from mtl_lora_cli.evaluation.answers import Answers, requests_of
from mtl_lora_cli.evaluation.answers import answer as ask
from mtl_lora_cli.evaluation.asked import Sampling
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.evaluation.protocols import Setting
from mtl_lora_cli.evaluation.requests import Request
from mtl_lora_cli.evaluation.router import Router, load_router, readable
from mtl_lora_cli.evaluation.scored import expected_value, normalised, probabilities
from mtl_lora_cli.pictures.shown import Picture
from mtl_lora_cli.tasks.chosen import by_router, known_task, require_task, several_tasks
from mtl_lora_cli.tasks.messages import Message
from mtl_lora_cli.tasks.pictured import unplaced
from mtl_lora_cli.tasks.reading import reading_of
from mtl_lora_cli.tasks.rendering import Renderer
from mtl_lora_cli.tasks.task import Task

Row = Mapping[str, Any]
Prediction = dict[str, Any]

NEW_TOKENS = 64  # of a free answer, where the template does not say
ROWS = 256  # that are answered together


@dataclasses.dataclass(frozen=True)
class Questions:
    """Rows of tasks with choices, as they are asked.

    Attributes:
        tasks: whose they are, each once.
        held: the rows of each.
        requests: of each row of each.
        numbers: the place of each row among those that were given.
    """

    tasks: list[Task]
    held: list[Examples]
    requests: list[list[Request]]
    numbers: list[list[int]]

    @property
    def together(self) -> list[Request]:
        """All requests, one task after another."""
        return [request.with_open for some in self.requests for request in some]


@dataclasses.dataclass(frozen=True)
class Rendered:
    """Rows that their tasks' templates can read.

    Attributes:
        part: rows with their places.
        names: of each row's task.
        pictures: that they show; none of them has been looked at.
    """

    part: list[tuple[Row, str]]
    names: list[str]
    pictures: list[Picture]


class Predictor:
    """A finished run that answers; `mtl_lora_cli.load` makes one.

    Rows have the fields that the task's template reads; its label is not looked at. A prediction is
    a dictionary:

    - `task`;
    - `label`: the label value of the likeliest choice, and `answer`, its text; a free answer has no
      label;
    - `probabilities`: text of each choice → p ∝ exp(score), where the score is the choice's
      log-probability, divided as the template's `normalisation` says;
    - `truncated`: true where the row's text lost its beginning: the model reads no more;
    - `value`: Σ p · label, for a task with `scoring: expectation`;
    - `answers`: all answers that were drawn, where several were asked for; `answer` is the first;
    - `messages`: of a conversation, its messages with the answer behind them;
    - `ends_counted`: true where the end of each choice counts, for one of them begins another.

    Args:
        opened: the run with its model.
        root: the folder that paths of pictures in rows are relative to; None: the working directory.
        loaded: False: the model is loaded when it is first asked; `questions` and `told` need none.
    """

    def __init__(self, opened: Run, root: Path | None = None, *, loaded: bool = True) -> None:
        if loaded:
            opened.packed  # noqa: B018 - what cannot be loaded is told now, not at the first row
        self._opened = opened
        self._setting = Setting()
        self._root = root or Path()

    def at(self, root: Path) -> Predictor:
        """The same for rows whose pictures lie elsewhere.

        Args:
            root: see the class.
        """
        self._encoder  # noqa: B018 - one for both
        other = copy(self)
        other._root = root
        vars(other).pop("_tasks", None)
        return other

    @cached_property
    def _tasks(self) -> dict[str, tuple[Task, Renderer]]:
        return {
            task.name: (_with_room(task), Renderer(task.template, task.name, self._root))
            for task in self._opened.tasks
        }

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the run's tasks."""
        return tuple(self._tasks)

    def reads(self, field: str) -> bool:
        """Whether a task may ask about a field of its rows."""
        return any({field, "row"} & renderer.reads for _, renderer in self._tasks.values())

    def predict(
        self,
        rows: Iterable[Row],
        *,
        task: str | Sequence[str] | None = None,
        task_column: str | None = None,
        sampling: Sampling | None = None,
    ) -> list[Prediction]:
        """Answer rows of one task, or of several, mixed.

        Args:
            rows: in any number; tasks are answered together.
            task: whose rows they are; may be left out where the run has one task. A list of names, or
                "all": each row is answered by all of them. "auto": the run's router says which
                (`mtl-lora router`), in `task_probability` how likely it is; `task` is None where none is
                likely enough.
            task_column: the field of each row that names its task, in the place of `task`.
            sampling: draw free answers; None: as the template says.

        Returns:
            A prediction for each row, in order; of several tasks a dictionary: task → prediction.

        Raises:
            UsageError: an unknown task, or a row that its template cannot read.
        """
        placed = ((row, f"row {number}") for number, row in enumerate(rows, start=1))
        found: list[Prediction] = []
        while part := list(islice(placed, ROWS)):
            own = None if sampling is None else dataclasses.replace(sampling, first=len(found))
            found += self.answer(part, task=task, task_column=task_column, sampling=own)
        return found

    def chat(
        self,
        messages: Sequence[Message],
        *,
        task: str | None = None,
        tools: Sequence[Any] = (),
        sampling: Sampling | None = None,
    ) -> Prediction:
        """Answer a conversation.

        Args:
            messages: dictionaries with `role` and `content`, in the forms that `instruct/messages` reads.
            task: the task that answers; may be left out where the run has one.
            tools: descriptions of functions that may be called.
            sampling: draw answers; None: as the template says.

        Raises:
            UsageError: an unknown task, one that is no conversation, or a message that cannot be read.
        """
        name = require_task(self.tasks, task, None)
        own, renderer = self._tasks[name]
        if own.template.conversation is None:
            raise UsageError(f"task '{name}' is no conversation: use predict, with rows")
        example = renderer.talk(list(messages), list(tools), "messages")
        row = {"messages": list(messages)}
        held = Examples("", [example], ["messages"], [row], "")
        (said,) = ask(self._opened, [own], [held], self._setting, sampling=sampling)
        return next(self._predictions(own, held, said))

    def answer(
        self,
        part: Sequence[tuple[Row, str]],
        *,
        task: str | Sequence[str] | None = None,
        task_column: str | None = None,
        sampling: Sampling | None = None,
    ) -> list[Prediction]:
        """The same for rows with their places, as errors name them, all answered together."""
        if by_router(self.tasks, task, task_column):
            return self._routed(part, sampling)
        several = several_tasks(self.tasks, task, task_column)
        if several is not None:
            return self._of_several(part, several, sampling)
        assert task is None or isinstance(task, str)
        chosen = require_task(self.tasks, task, task_column)
        names = [
            chosen if task_column is None else self._named(row, task_column, where)
            for row, where in part
        ]
        return list(self._answer(part, names, sampling))

    def render(
        self, rows: Sequence[Row], *, task: str | None = None, task_column: str | None = None
    ) -> Rendered:
        """Rows as they are asked, without asking them.

        Raises:
            UsageError: as of `predict`.
        """
        part = [(row, f"rows[{number}]") for number, row in enumerate(rows)]
        chosen = require_task(self.tasks, task, task_column)
        names = [
            chosen if task_column is None else self._named(row, task_column, where)
            for row, where in part
        ]
        read = [self._rendered(name, [row]) for row, name in zip(part, names, strict=True)]
        pictures = [picture for one in read for picture in one.examples[0].images]
        return Rendered(part, names, list(dict.fromkeys(pictures)))

    def answer_all(self, many: Sequence[Rendered]) -> list[list[Prediction]]:
        """Predictions of each, all answered together."""
        part = [row for one in many for row in one.part]
        names = [name for one in many for name in one.names]
        found = self._answer(part, names, None)
        return [list(islice(found, len(one.part))) for one in many]

    def questions(
        self,
        part: Sequence[tuple[Row, str]],
        *,
        task: str | None = None,
        task_column: str | None = None,
    ) -> Questions:
        """What `answer` asks about rows with their places, without asking it; no model is needed.

        Raises:
            UsageError: as of `predict`.
        """
        chosen = require_task(self.tasks, task, task_column)
        names = [
            chosen if task_column is None else self._named(row, task_column, where)
            for row, where in part
        ]
        tasks, held, numbers = self._by_task(part, names)
        longest = self._opened.longest
        requests = requests_of(self._encoder, longest, tasks, held, self._setting)
        return Questions(tasks, held, requests, numbers)

    def told(self, asked: Questions, scores: Sequence[np.ndarray]) -> list[Prediction]:
        """Predictions, by the log-probabilities of all candidates of `asked.together`."""
        found: dict[int, Prediction] = {}
        rest = iter(scores)
        parts = zip(asked.tasks, asked.held, asked.requests, asked.numbers, strict=True)
        for task, examples, requests, numbers in parts:
            values = [next(rest)[: len(request.choices)] for request in requests]
            each = self._scored(task, examples, requests, values)
            found.update(zip(numbers, each, strict=True))
        return [found[number] for number in range(len(found))]

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder.of(self._opened.tokenizer, self._opened.recipe, lenient=True)

    def _named(self, row: Row, column: str, where: str) -> str:
        if column not in row:
            raise UsageError(
                f"{where}: has no field '{column}'{did_you_mean(column, list(row))}; "
                f"fields: {', '.join(row)}"
            )
        return known_task(str(row[column]), self.tasks, f"{where}: {column}: ")

    def _answer(
        self, part: Sequence[tuple[Row, str]], names: Sequence[str], sampling: Sampling | None
    ) -> Iterator[Prediction]:
        """One batch of all tasks."""
        tasks, held, numbers = self._by_task(part, names)
        found: dict[int, Prediction] = {}
        answers = ask(self._opened, tasks, held, self._setting, sampling=sampling)
        for task, examples, places, said in zip(tasks, held, numbers, answers, strict=True):
            found.update(zip(places, self._predictions(task, examples, said), strict=True))
        return (found[number] for number in range(len(part)))

    def _by_task(
        self, part: Sequence[tuple[Row, str]], names: Sequence[str]
    ) -> tuple[list[Task], list[Examples], list[list[int]]]:
        """Rows with their places by the tasks that they are of, and their numbers."""
        numbers: dict[str, list[int]] = {}
        for number, name in enumerate(names):
            numbers.setdefault(name, []).append(number)
        tasks = [self._tasks[name][0] for name in numbers]
        held = [
            self._rendered(name, [part[number] for number in own]) for name, own in numbers.items()
        ]
        return tasks, held, list(numbers.values())

    @cached_property
    def _router(self) -> Router:
        return load_router(self._opened.folder, self._opened.checkpoint)

    def _routed(
        self, part: Sequence[tuple[Row, str]], sampling: Sampling | None
    ) -> list[Prediction]:
        """Each row by the task that the router names; where it names none, none answers."""
        renderers = {name: renderer for name, (_, renderer) in self._tasks.items()}
        named = [self._router.route(readable(renderers, row)) for row, _ in part]
        known = [number for number, (name, _) in enumerate(named) if name is not None]
        names = [name for name, _ in named if name is not None]
        answers = self._answer([part[number] for number in known], names, sampling)
        found = dict(zip(known, answers, strict=True)) if known else {}
        return [
            {**found.get(number, {"task": None}), "task_probability": likely}
            for number, (_, likely) in enumerate(named)
        ]

    def _of_several(
        self, part: Sequence[tuple[Row, str]], names: Sequence[str], sampling: Sampling | None
    ) -> list[Prediction]:
        """Each row by each of these tasks."""
        tasks = [self._tasks[name][0] for name in names]
        held = [self._rendered(name, part) for name in names]
        answers = ask(self._opened, tasks, held, self._setting, sampling=sampling, one_row=True)
        each = [
            self._predictions(task, examples, said)
            for task, examples, said in zip(tasks, held, answers, strict=True)
        ]
        return [dict(zip(names, one, strict=True)) for one in zip(*each, strict=True)]

    def _rendered(self, name: str, part: Sequence[tuple[Row, str]]) -> Examples:
        """Rows with their places as a task asks them."""
        renderer = self._tasks[name][1]
        rows, wheres = [row for row, _ in part], [where for _, where in part]
        rendered = [renderer.render(row, where, labelled=False) for row, where in part]
        return Examples("", rendered, wheres, rows, "")

    def _predictions(self, task: Task, examples: Examples, said: Answers) -> Iterator[Prediction]:
        if said.scores is None:
            yield from _generated(task, examples, said)
        else:
            yield from self._scored(task, examples, said.requests, said.scores)

    def _scored(
        self,
        task: Task,
        examples: Examples,
        requests: Sequence[Request],
        values: Sequence[np.ndarray],
    ) -> Iterator[Prediction]:
        """Predictions of choices, by their log-probabilities."""
        renderer = self._tasks[task.name][1]
        scores = normalised(values, examples, requests, task.template.normalisation)
        for number, (own, example) in enumerate(zip(scores, examples.examples, strict=True)):
            likely = probabilities(own)
            best = int(own.argmax())
            labels = renderer.labels(examples.rows[number], examples.wheres[number])
            prediction: Prediction = {
                "task": task.name,
                "label": labels[best],
                "answer": example.choices[best],
                "probabilities": dict(zip(example.choices, likely.tolist(), strict=True)),
            }
            if task.template.scoring == "expectation":
                prediction["value"] = expected_value(task, likely)
            if requests[number].ends:
                prediction["ends_counted"] = True
            yield {**prediction, **_cut(requests[number])}


def _generated(task: Task, examples: Examples, said: Answers) -> Iterator[Prediction]:
    """Predictions of free answers; of a conversation with the answer behind its messages."""
    assert said.texts is not None
    reading = reading_of(task.template)

    def read(text: str) -> str | None:
        return next(iter(reading.found(reading.answer(text))), None)

    for number, (text, example) in enumerate(zip(said.texts, examples.examples, strict=True)):
        prediction: Prediction = {"task": task.name, "answer": read(text)}
        if said.several is not None:
            prediction["answers"] = [read(one) for one in said.several[number]]
        if example.dialogue is not None:
            answer = {"role": "assistant", "content": prediction["answer"] or ""}
            before = [
                {**one, "content": unplaced(one["content"])} for one in example.dialogue.messages
            ]
            prediction["messages"] = [*before, answer]
        yield {**prediction, **_cut(said.requests[number])}


def _cut(request: Request) -> Prediction:
    return {"truncated": True} if request.truncated else {}


def _with_room(task: Task) -> Task:
    """A free answer's length is not known from a label here."""
    template = task.template
    if template.choices is not None or template.generate.max_new_tokens is not None:
        return task
    generate = template.generate.model_copy(update={"max_new_tokens": NEW_TOKENS})
    return dataclasses.replace(task, template=template.model_copy(update={"generate": generate}))
