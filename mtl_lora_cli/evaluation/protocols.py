"""The protocols by name, and which task can be scored by which.

- `choices`: the candidate answer with the highest log-probability, as it is or divided by a length.
- `generate`: the greedy answer, and what is read in it.
- `lm-eval`: lm-evaluation-harness asks its own questions (`lm_eval_bridge.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from mtl_lora_cli.data.examples import Examples
from mtl_lora_cli.errors import LeftOutError, UsageError
from mtl_lora_cli.evaluation.asked import Sampling
from mtl_lora_cli.tasks.maps import MAPS
from mtl_lora_cli.tasks.reading import reading_of
from mtl_lora_cli.tasks.task import Task
from mtl_lora_cli.tasks.template import Normalisation

CHOICES = "choices"
GENERATE = "generate"
LM_EVAL = "lm-eval"
PROTOCOLS = (CHOICES, GENERATE, LM_EVAL)
BLIND = ("grey", "swapped")
NORMALISATIONS = get_args(Normalisation)


@dataclass(frozen=True)
class Setting:
    """What is evaluated, besides the task: two results with one setting can be compared.

    Attributes:
        split: of the data; None: test, or validation where there is no test split.
        limit: the first rows only.
        base_only: the base model alone answers.
        protocol: None: choices, or generate for free answers.
        normalisation: of `choices`; None: as the template says.
        harness_task: of `lm-eval`; None: the harness's task of the same name.
        sampling: of `generate`: how answers are drawn; None: as the template says.
        source: other rows than the task's own, in words; None: its own.
        blind: `grey`: a control that sees grey in the place of pictures; `swapped`: those of other rows.
    """

    split: str | None = None
    limit: int | None = None
    base_only: bool = False
    protocol: str | None = None
    normalisation: str | None = None
    harness_task: str | None = None
    sampling: Sampling | None = None
    source: str | None = None
    blind: str | None = None

    def __post_init__(self) -> None:
        """Raises UsageError for what does not go together."""
        if self.protocol == LM_EVAL and self.split is not None:
            raise UsageError(
                f"--split: the protocol {LM_EVAL} takes the split of the harness's task"
            )
        if self.protocol != LM_EVAL and self.harness_task is not None:
            raise UsageError(f"--harness-task goes with --protocol {LM_EVAL}")
        if self.protocol not in (None, CHOICES) and self.normalisation is not None:
            raise UsageError(f"--normalisation goes with --protocol {CHOICES}")
        if self.blind is not None and self.protocol == LM_EVAL:
            raise UsageError(f"--blind goes without --protocol {LM_EVAL}, which shows no pictures")
        if self.sampling is not None and self.protocol not in (None, GENERATE):
            raise UsageError(f"--temperature goes with --protocol {GENERATE}")

    @property
    def answers(self) -> int:
        """How many answers each generated one is the mean of."""
        return 1 if self.sampling is None else self.sampling.answers

    def protocol_of(self, task: Task) -> str:
        """The protocol by which one task is scored."""
        if task.objective in MAPS:
            return "maps"
        return self.protocol or (GENERATE if task.template.choices is None else CHOICES)

    def normalisation_of(self, task: Task) -> str | None:
        """What one task's log-probabilities are divided by; None where none are compared."""
        if self.protocol_of(task) != CHOICES:
            return None
        return self.normalisation or task.template.normalisation


def require_generated(tasks: Sequence[Task], setting: Setting) -> None:
    """Refuse to draw answers where none is generated.

    Raises:
        UsageError: no task is asked so.
    """
    if not any(setting.protocol_of(task) == GENERATE for task in tasks):
        names = ", ".join(task.name for task in tasks)
        raise UsageError(
            f"--temperature: no answer of {names} is generated; use --protocol {GENERATE}"
        )


def require_fit(task: Task, examples: Examples, protocol: str) -> None:
    """Refuse a task that the protocol cannot score.

    Raises:
        LeftOutError: the protocol is not for such tasks; saying which one is.
        UsageError: choices of a row cannot be told apart.
    """
    template = task.template
    if protocol == CHOICES and template.choices is None:
        raise LeftOutError(
            task.name,
            f"its template '{task.template_name}' has free answers; "
            f"the protocol '{CHOICES}' scores choices: use --protocol {GENERATE}",
        )
    if protocol != GENERATE:
        return
    if any(one.dialogue is not None and not one.dialogue.before for one in examples.examples):
        raise LeftOutError(task.name, "its rows are texts without a prompt: nothing is asked")
    if template.scoring == "expectation":
        raise LeftOutError(
            task.name,
            "it is scored as an expectation over its choices, which answers "
            f"that are generated do not give: use --protocol {CHOICES}",
        )
    reading = reading_of(template)
    for example, where in zip(examples.examples, examples.wheres, strict=True):
        why = reading.conflict(example.choices) if example.choices else None
        if why is not None:
            raise UsageError(f"{where}: task '{task.name}': {why}: use --protocol {CHOICES}")
