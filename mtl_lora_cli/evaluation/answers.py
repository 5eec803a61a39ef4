"""Putting examples to a model by our own protocols: what was asked, what was said, what it means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.data.examples import Examples
from mtl_lora_cli.data.pictured import blinded
from mtl_lora_cli.evaluation.asked import Sampling, Stopped, asks_of
from mtl_lora_cli.evaluation.choices import Advance, score
from mtl_lora_cli.evaluation.conversing import Said
from mtl_lora_cli.evaluation.generate import answer_all
from mtl_lora_cli.evaluation.one_row import as_they_are, of_one_row, same_to
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.evaluation.protocols import CHOICES, GENERATE, Setting
from mtl_lora_cli.evaluation.requests import Request, build_requests, require_different, room_for
from mtl_lora_cli.evaluation.scored import count_ties, normalised, outcome_of
from mtl_lora_cli.machine.processes import Processes
from mtl_lora_cli.metrics import Outcome
from mtl_lora_cli.metrics.declare import read_by
from mtl_lora_cli.metrics.outcome import joined
from mtl_lora_cli.tasks.reading import Reading, reading_of
from mtl_lora_cli.tasks.task import Task

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Questions:
    """What a model will be asked; it need not be there yet.

    Attributes:
        encoder: of the run.
        held: the rows of each task, as they are asked.
        requests: of each task.
        scored: the numbers of the tasks whose choices are scored.
        together: requests of these, one task's behind the other's, each choice also without its end.
    """

    encoder: Encoder
    held: Sequence[Examples]
    requests: list[list[Request]]
    scored: list[int]
    together: list[Request]

    @classmethod
    def of(
        cls, opened: Run, tasks: Sequence[Task], held: Sequence[Examples], setting: Setting
    ) -> Questions:
        """Of the run's tokenizer and configuration; no weight is read.

        Raises:
            UsageError: as `requests_of`.
        """
        encoder = Encoder.of(opened.tokenizer, opened.recipe, lenient=True)
        if setting.blind is not None:
            held = [blinded(examples, encoder.eyes, setting.blind) for examples in held]
        requests = requests_of(encoder, opened.longest, tasks, held, setting)
        scored = [
            number for number, task in enumerate(tasks) if setting.protocol_of(task) == CHOICES
        ]
        together = [request.with_open for number in scored for request in requests[number]]
        return cls(encoder, held, requests, scored, together)


@dataclass(frozen=True)
class Answers:
    """What a model said to the examples of one task.

    Attributes:
        requests: how they were asked.
        outcome: predicted and right.
        scores: log-probabilities of each example's choices, float64 [choices], not divided by any
            length; None where answers were generated.
        open_scores: the same without the end where it counts: as lm-evaluation-harness asks.
        texts: the generated answers; None where choices were scored.
        several: of each example all that were drawn, where that are more than one; the first is in `texts`.
        outcomes: of the first answers, the second ones, and so on; `outcome` is the first. None as above.
        unparsable: how many of them named no choice, or held nothing of what counts.
        unreadable: how many right answers could not be read, were they generated word for word: a text
            that ends answers stands in them, the tokenizer does not give them back, or they are too long.
        ties: how many examples have the highest score twice or more often.
    """

    requests: list[Request]
    outcome: Outcome
    scores: list[np.ndarray] | None = None
    open_scores: list[np.ndarray] | None = None
    texts: list[str] | None = None
    several: list[list[str]] | None = None
    outcomes: list[Outcome] | None = None
    unparsable: int = 0
    unreadable: int = 0
    ties: int = 0


def predict(
    opened: Run,
    tasks: Sequence[Task],
    held: Sequence[Examples],
    setting: Setting,
    advance: Progress = lambda done, total: None,
) -> list[tuple[list[Request], Outcome]]:
    """What was asked, and the outcome, for each task; see `answer`."""
    answers = answer(opened, tasks, held, setting, advance)
    return [(own.requests, own.outcome) for own in answers]


def answer(
    opened: Run,
    tasks: Sequence[Task],
    held: Sequence[Examples],
    setting: Setting,
    advance: Progress = lambda done, total: None,
    sampling: Sampling | None = None,
    *,
    one_row: bool = False,
    keep: bool = False,
    questions: Questions | None = None,
) -> list[Answers]:
    """Ask the model; write nothing but features of pictures.

    Where torch.distributed is running, its processes share the examples, and each gets all answers.

    Args:
        opened: the run with its model.
        tasks: some of its tasks.
        held: the rows of each.
        setting: protocol, and whether the base model alone is asked.
        advance: called with (this process's answers done, in all).
        sampling: how free answers are drawn; None: as the setting says, or else each template.
        one_row: each task's examples are of the same rows, in the same order: what their prompts share is
            computed once, where the adapter does the same for the tasks.
        keep: a frozen tower's features are kept for who asks again.
        questions: of the same tasks, rows and setting, where they have been made already.
    """
    if questions is None:
        questions = Questions.of(opened, tasks, held, setting)
    with opened.packed.untouched() if setting.base_only else nullcontext():
        return _answer(opened, tasks, questions, setting, advance, sampling, one_row, keep)


def _answer(
    opened: Run,
    tasks: Sequence[Task],
    questions: Questions,
    setting: Setting,
    advance: Progress,
    sampling: Sampling | None,
    one_row: bool,
    keep: bool,
) -> list[Answers]:
    if sampling is None:
        sampling = setting.sampling
    encoder, held, requests = questions.encoder, questions.held, questions.requests
    scored, together = questions.scored, questions.together
    processes = Processes.of_group()
    parts = [together, *(part for i, part in enumerate(requests) if i not in scored)]
    drawn = 1 if sampling is None or not sampling.temperature else sampling.answers
    total = sum(
        len(range(processes.rank, len(part) * times, processes.count))
        for part, times in zip(parts, [1] + [drawn] * len(parts), strict=False)
    )
    done = 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        advance(done, total)

    if keep:
        _keep_features(opened, encoder, together)
    asked = as_they_are(together)
    if one_row and len(scored) > 1:
        rows = [row for index in scored for row in range(len(requests[index]))]
        asked = of_one_row(together, rows, same_to(opened.packed.adapter))
    scores = iter(
        asked.apart(
            score(
                opened.packed,
                asked.requests,
                device=opened.device,
                tokens_per_pass=opened.tokens_per_pass,
                advance=step,
                processes=processes,
            )
        )
    )
    free = [index for index in range(len(tasks)) if index not in scored]
    said = _generated(
        opened,
        [(tasks[index], held[index], requests[index]) for index in free],
        encoder,
        step,
        processes,
        sampling,
    )
    free_ones = dict(zip(free, said, strict=True))
    answers = []
    for index, (task, examples, own) in enumerate(zip(tasks, held, requests, strict=True)):
        if index in free_ones:
            answers.append(free_ones[index])
            continue
        found = [next(scores) for _ in own]
        counts = [len(request.choices) for request in own]
        values = [one[:count] for one, count in zip(found, counts, strict=True)]
        open_ = [one[-count:] for one, count in zip(found, counts, strict=True)]
        how = setting.normalisation_of(task)
        outcome = outcome_of(task, examples, values, own, how)
        likeliest = task.template.scoring == "argmax"
        ties = count_ties(normalised(values, examples, own, how or "sum")) if likeliest else 0
        answers.append(Answers(own, outcome, values, open_, ties=ties))
    return answers


def _keep_features(opened: Run, encoder: Encoder, asked: Sequence[Request]) -> None:
    """A frozen tower sees each picture once, in this evaluation and in those behind it."""
    pictures = [picture for request in asked for picture in request.pictures]
    packed, images = opened.packed, opened.recipe.images
    if not pictures or (packed.plain is not None and packed.plain.way.layout != "packed"):
        return
    from mtl_lora_cli.data.kept_features import keep_features

    how = "auto" if images is None else images.features
    processes = Processes.of_group()
    keep_features(packed.model, packed.adapter, encoder.eyes, pictures, how, processes)


def requests_of(
    encoder: Encoder,
    longest: int,
    tasks: Sequence[Task],
    held: Sequence[Examples],
    setting: Setting,
) -> list[list[Request]]:
    """Examples of each task as they are asked; no model is needed for it.

    Args:
        encoder: of the run.
        longest: positions that its base model knows.
        tasks: some of its tasks.
        held: the rows of each.
        setting: protocol, and whether the base model alone is asked.

    Raises:
        UsageError: an example leaves no room for its answers, or two of its choices have the same tokens.
    """
    requests: list[list[Request]] = []
    for task, examples in zip(tasks, held, strict=True):
        number = -1 if setting.base_only else task.id
        generated = setting.protocol_of(task) == GENERATE
        room = task.template.generate.max_new_tokens if generated else None
        marked = encoder.control_tokens.mark(task, examples).examples
        requests.append(
            build_requests(
                marked,
                number,
                encoder,
                longest,
                new_tokens=room or 0,
                generated=generated,
                wheres=examples.wheres,
            )
        )
        require_different(task, examples, requests[-1])
    return requests


def _generated(
    opened: Run,
    parts: Sequence[tuple[Task, Examples, list[Request]]],
    encoder: Encoder,
    advance: Advance,
    processes: Processes,
    sampling: Sampling | None,
) -> list[Answers]:
    """Generated answers of all tasks together; the first of each example is the one that is read."""
    how = [sampling_of(task) if sampling is None else sampling for task, _, _ in parts]
    asks = [
        asks_of(
            requests,
            answer_limits(task, requests),
            stop_of(task, encoder, opened.tokenizer),
            drawn,
        )
        for (task, _, requests), drawn in zip(parts, how, strict=True)
    ]
    found = iter(
        answer_all(
            opened.packed,
            [ask for some in asks for ask in some],
            ends=encoder.stops,
            device=opened.device,
            tokens_per_pass=opened.tokens_per_pass,
            advance=advance,
            processes=processes,
        )
    )
    return [
        _all_read(opened, *part, encoder, [next(found) for _ in some])
        for part, some in zip(parts, asks, strict=True)
    ]


def _all_read(
    opened: Run,
    task: Task,
    examples: Examples,
    requests: list[Request],
    encoder: Encoder,
    answers: Sequence[list[int]],
) -> Answers:
    """What answers say, of each example one or several, one after another."""
    count = len(answers) // max(1, len(requests))
    read = partial(read_generated, opened.tokenizer, encoder, task, examples, requests)
    first = read(answers[::count] if count else answers)
    if count <= 1:
        return first
    others = [read(answers[number::count]) for number in range(1, count)]
    texts = zip(first.texts or [], *(one.texts or [] for one in others), strict=True)
    return replace(
        first,
        several=[list(some) for some in texts],
        outcomes=[first.outcome, *(one.outcome for one in others)],
    )


def sampling_of(task: Task) -> Sampling | None:
    """How a template says that answers are drawn; None: it does not."""
    own = task.template.generate
    return Sampling(own.temperature, own.seed) if own.temperature else None


def answer_limits(task: Task, requests: Sequence[Request]) -> list[int]:
    """The most tokens that each generated answer may have."""
    most = task.template.generate.max_new_tokens
    if task.template.conversation is not None:
        return [one.room or most or room_for(one.choices[0]) for one in requests]
    return [most or max(map(len, one.choices)) - one.ends + 1 for one in requests]


def stop_of(task: Task, encoder: Encoder, tokenizer: Any) -> Stopped:
    """Whether the tokens of a generated answer have come to a text that ends it."""
    reading = reading_of(task.template)
    turn_end = encoder.stop_text

    def stopped(tokens: list[int]) -> bool:
        if not reading.stop and not turn_end:
            return False
        text = tokenizer.decode(tokens)
        return reading.complete(text) or (bool(turn_end) and turn_end in text)

    return stopped


def read_generated(
    tokenizer: Any,
    encoder: Encoder,
    task: Task,
    examples: Examples,
    requests: list[Request],
    answers: Sequence[list[int]],
) -> Answers:
    """What the tokens of generated answers name; what names no choice is wrong, and predicted as -1."""
    reading = reading_of(task.template)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    if encoder.stop_text:
        texts = [text.split(encoder.stop_text)[0] for text in texts]
    talks = any(example.dialogue is not None for example in examples.examples)
    said = Said(tokenizer, encoder) if talks else None
    if said is not None:
        texts = [said.text(tokens) for tokens in answers]

    def own(answer: str) -> str:
        """Without an end token that the task's template writes itself: it is no part of what is said."""
        return answer.removesuffix(tokenizer.eos_token).rstrip()

    right_texts = [
        own(example.answer) if said is None else said.expected(example, request)
        for example, request in zip(examples.examples, requests, strict=True)
    ]
    predicted, gold, unparsable = [], [], 0
    for text, right_text, example in zip(texts, right_texts, examples.examples, strict=True):
        if example.choices:
            named = reading.choice(text, [own(choice) for choice in example.choices])
            gold.append(example.gold)
        else:
            right = _right(reading, text, [right_text, *map(own, example.answers)])
            named = 0 if right else -1
            gold.append(0)
        predicted.append(named)
        unparsable += named < 0 if example.choices else right is None
    outcome = Outcome(
        np.asarray(gold),
        np.asarray(predicted),
        positive=task.template.positive_index,
        **_texts(
            task,
            [
                joined(list(map(own, example.answers)) or [right_text])
                for right_text, example in zip(right_texts, examples.examples, strict=True)
            ],
            [reading.answer(text) for text in texts],
        ),
    )
    limits = answer_limits(task, requests)
    right_ones = [one.choices[0][:limit] for one, limit in zip(requests, limits, strict=True)]
    if said is None:
        given = tokenizer.batch_decode(right_ones, skip_special_tokens=True)
    else:
        given = [said.text(tokens) for tokens in right_ones]
    unreadable = sum(
        not example.choices and not reading.equal(text, right_text)
        for text, right_text, example in zip(given, right_texts, examples.examples, strict=True)
    )
    return Answers(requests, outcome, texts=texts, unparsable=unparsable, unreadable=unreadable)


def _right(reading: Reading, text: str, expected: Sequence[str]) -> bool | None:
    """Whether a generated text is one of the answers that are right; None where nothing is found in it."""
    found = [reading.equal(text, one) for one in expected]
    return None if found[0] is None else any(found)


def _texts(
    task: Task, references: Sequence[str], answers: Sequence[str]
) -> dict[str, np.ndarray | None]:
    """Right and given texts, where one of the task's metrics reads them."""
    read = read_by(task.template.metrics)
    texts = {"references": references, "answers": answers}
    return {name: np.asarray(own, np.str_) if name in read else None for name, own in texts.items()}
