"""Answers that could never be right, or never be told apart: refused before the first step."""

from __future__ import annotations

from collections.abc import Sequence

from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.tasks.reading import reading_of
from mtl_lora_cli.tasks.rendering import Example
from mtl_lora_cli.tasks.task import Task

_BEFORE = 16  # characters of a prompt that decide how what follows them becomes tokens


def require_answers(
    task: Task, examples: Sequence[Example], wheres: Sequence[str], encoder: Encoder
) -> None:
    """Refuse choices that have the same tokens, and right answers that the task's reader cannot read.

    Choices are read where the template says how; without `generate` they are scored.

    Raises:
        UsageError: naming the row, and what stands in the way.
    """
    own = task.template.generate
    if task.template.choices is None or own.stop is not None or own.extract is not None:
        reading = reading_of(task.template)
        for example, where in zip(examples, wheres, strict=True):
            for answer in example.choices or (example.answer,):
                why = reading.unreadable(answer)
                if why is not None:
                    raise UsageError(f"{where}: task '{task.name}': {why}: it could never be right")
    first: dict[tuple[str, ...], int] = {}
    for number, example in enumerate(examples):
        first.setdefault(example.choices, number)
    first.pop((), None)  # a free answer has no other beside it
    _, tokens = encoder.continuations(
        [examples[number].prompt[-_BEFORE:] for number in first.values()], list(first)
    )
    for (choices, number), several in zip(first.items(), tokens, strict=True):
        require_apart(task.name, wheres[number], choices, several)


def require_apart(
    task: str, where: str, choices: Sequence[str], tokens: Sequence[list[int]]
) -> None:
    """Refuse choices that are nothing to the model, or the same.

    Args:
        task, where: for the error.
        choices: their texts; none for a free answer.
        tokens: of each.

    Raises:
        UsageError: naming two of them.
    """
    known: dict[tuple[int, ...], str] = {}
    for choice, own in zip(choices, tokens, strict=False):
        if not own:
            raise UsageError(
                f"{where}: task '{task}': choices: '{choice}' has no token: the base model's tokenizer "
                "leaves it out; give it another text"
            )
        other = known.setdefault(tuple(own), choice)
        if other != choice:
            raise UsageError(
                f"{where}: task '{task}': choices: '{other}' and '{choice}' have the same tokens, so "
                "the model cannot tell them apart; give them texts that its tokenizer keeps apart"
            )
