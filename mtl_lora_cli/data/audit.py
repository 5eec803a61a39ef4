"""What is wrong with a task's rows without being an error: counted, and said before the first step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mtl_lora_cli.tasks.rendering import Example


@dataclass(frozen=True)
class Audit:
    """Counts over one task's training rows.

    Attributes:
        rows: training rows, after `max_examples`.
        repeated: rows whose prompt and answer stood before.
        contradictory: rows whose prompt also stands with another answer.
        leaked: held-out rows whose prompt also stands in train.
        held_out: rows of the split that evaluation will use.
        held_out_split: its name, or None where there is none.
        cut_prompts: prompts that lost their beginning for want of room.
        dropped: rows left out for want of room.
    """

    rows: int
    repeated: int = 0
    contradictory: int = 0
    leaked: int = 0
    held_out: int = 0
    held_out_split: str | None = None
    cut_prompts: int = 0
    dropped: int = 0

    def findings(self, task: str) -> list[str]:
        """A line for each count that is not zero, the gravest first."""
        of = f"of {self.rows:,} training rows"
        texts = (
            (self.leaked, f"of {self.held_out:,} {self.held_out_split} rows also stand in train"),
            (self.contradictory, f"{of} have a prompt that also stands with another answer"),
            (self.dropped, f"{of} are left out: longer than a row"),
            (self.cut_prompts, f"{of} lose the beginning of their prompt: longer than a row"),
            (self.repeated, f"{of} repeat an earlier one"),
        )
        lines = [f"{task}: {count:,} {text}" for count, text in texts if count]
        if self.held_out_split is None:
            lines.append(f"{task}: there is no test or validation split to evaluate it on")
        return lines

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Audit:
        return cls(**content)


def audit(
    train: Sequence[Example],
    held_out: Sequence[Example],
    held_out_split: str | None,
    *,
    cut_prompts: int,
    dropped: int,
) -> Audit:
    """Compare a task's training rows with each other and with the held-out ones."""
    pairs = Counter((example.prompt, example.answer) for example in train)
    answers = Counter(prompt for prompt, _ in pairs)
    return Audit(
        rows=len(train),
        repeated=len(train) - len(pairs),
        contradictory=sum(answers[example.prompt] > 1 for example in train),
        leaked=sum(example.prompt in answers for example in held_out),
        held_out=len(held_out),
        held_out_split=held_out_split,
        cut_prompts=cut_prompts,
        dropped=dropped,
    )
