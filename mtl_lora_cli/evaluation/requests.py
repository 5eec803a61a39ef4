"""Examples as requests to a model: tokens of a prompt that fits, and of its candidates.

Where a candidate's tokens begin another's, log p could never be greater for the longer one: `10` is never
likelier than `1`. There every candidate of the row ends with the end token, as training taught it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, pairwise

from mtl_lora_cli.data.answers import require_apart
from mtl_lora_cli.data.conversation import Prompt
from mtl_lora_cli.data.encoded import latest, shown_by
from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.data.examples import Examples
from mtl_lora_cli.data.pictured import Eyes
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.evaluation.trees import Tree, branches_of
from mtl_lora_cli.pictures.shown import Picture
from mtl_lora_cli.tasks.rendering import Example
from mtl_lora_cli.tasks.task import Task


@dataclass(frozen=True)
class Request:
    """One example to score.

    Attributes:
        task: task id, or -1 for the base model alone.
        prompt: tokens.
        choices: tokens of each candidate as it follows the prompt, its end included where that counts.
        truncated: the prompt was cut to fit the model's positions.
        ends: how many tokens at the end of each candidate are its end; 0 where the end does not count.
        passed: how many tokens at the beginning of each candidate are no part of it, but of the prompt that
            it alone has behind the common one; None: none of any.
        room: of a conversation, the most tokens that an answer to it may have; 0: it is none.
        pictures: that stand in the prompt, in the order of their tokens.
        eyes: what the model sees of them.
    """

    task: int
    prompt: list[int]
    choices: list[list[int]]
    truncated: bool = False
    ends: int = 0
    passed: list[int] | None = None
    room: int = 0
    pictures: tuple[Picture, ...] = ()
    eyes: Eyes | None = field(default=None, compare=False, repr=False)

    @property
    def with_open(self) -> Request:
        """The same with each candidate without its end behind those with it, where ends count.

        It sends no further token through the model.
        """
        if not self.ends:
            return self
        open_ = [choice[: -self.ends] for choice in self.choices]
        return replace(self, choices=[*self.choices, *open_])

    @cached_property
    def tree(self) -> Tree:
        """How it goes through the model."""
        return Tree.build(self.prompt, self.choices, self.passed)

    @cached_property
    def cost(self) -> int:
        """Tokens that go through the model: of the tree, which need not be there yet."""
        return len(self.prompt) + len(branches_of(self.choices, self.passed).tokens)


def build_requests(
    examples: Sequence[Example],
    task: int,
    encoder: Encoder,
    limit: int,
    *,
    new_tokens: int = 0,
    generated: bool = False,
    wheres: Sequence[str] | None = None,
) -> list[Request]:
    """Tokenise examples for scoring; a free answer is its example's only candidate.

    A prompt that leaves no room for its longest candidate within `limit` positions is cut at its
    beginning, as lm-evaluation-harness does, and marked. Where one candidate begins another, the end
    counts for each of them.

    Args:
        examples: rendered.
        task: task id, or -1 for the base model alone.
        encoder: tokenises.
        limit: positions that the model knows.
        new_tokens: how many more tokens will be generated, where it is more than the candidates have.
        generated: answers will be: then a free one is not known when its prompt is cut.
        wheres: where each example came from, for errors.

    Raises:
        UsageError: there is no room even without the row's own text.
    """
    if any(example.dialogue is not None for example in examples):
        return _of_dialogues(
            examples, task, encoder, limit, new_tokens, generated=generated, wheres=wheres
        )
    eyes = encoder.eyes if any(example.images for example in examples) else None
    places = _places(wheres, len(examples))
    texts = [example.prompt for example in examples]
    shown = None if eyes is None else [example.images for example in examples]
    prompts, answers = encoder.continuations(
        texts,
        [example.choices or (example.answer,) for example in examples],
        wheres=wheres,
        shown=shown,
    )
    if generated and not all(example.choices for example in examples):
        prompts, _ = encoder.continuations(
            texts, [example.choices or ("",) for example in examples], wheres=wheres, shown=shown
        )
    end = list(encoder.answer_end)
    requests = []
    for prompt, choices, where, example in zip(prompts, answers, places, examples, strict=True):
        if eyes is not None:
            prompt = _with_pictures(prompt, choices, example.images, eyes, where)
        counts = one_begins_another(choices)
        asked = [[*choice, *end] for choice in choices] if counts else choices
        room = limit - max(new_tokens, *(len(choice) for choice in asked))
        short = _shortened(prompt, room, limit, where)
        cut = len(short) < len(prompt)
        own = Request(task, short, asked, cut, len(end) if counts else 0)
        requests.append(replace(own, pictures=example.images, eyes=eyes))
    return requests


def _with_pictures(
    prompt: Prompt,
    choices: Sequence[list[int]],
    shown: Sequence[Picture],
    eyes: Eyes,
    where: str,
) -> Prompt:
    """A prompt of which nothing is cut up to its last picture's end.

    Raises:
        UsageError: other picture tokens stand in it or in an answer than those of its pictures.
    """
    every = [*prompt.tokens, *chain.from_iterable(choices)]
    eyes.require_all(every, shown, where.removesuffix(": "))
    return replace(prompt, own=eyes.behind(prompt.tokens, prompt.own))


def _places(wheres: Sequence[str] | None, count: int) -> list[str]:
    """What an error about each example begins with."""
    return [""] * count if wheres is None else [f"{where}: " for where in wheres]


def _shortened(prompt: Prompt, room: int, limit: int, where: str) -> list[int]:
    """A prompt in the room that there is.

    Raises:
        UsageError: there is no room even without the row's own text.
    """
    if prompt.fixed > max(1, room):
        raise UsageError(
            f"{where}the longest answer and what stands around it have {limit - room + prompt.fixed} "
            f"tokens; the model reads {limit}"
        )
    return prompt.shortened(max(1, room))


def room_for(answer: Sequence[int]) -> int:
    """Tokens that an answer to a conversation may have, where there is room: twice the right one's, and 32."""
    return 2 * len(answer) + 32


def _of_dialogues(
    examples: Sequence[Example],
    task: int,
    encoder: Encoder,
    limit: int,
    new_tokens: int,
    *,
    generated: bool,
    wheres: Sequence[str] | None,
) -> list[Request]:
    """Conversations to be answered; a longer one loses its earliest turns, whole, and then of its question."""
    dialogues = [example.dialogue for example in examples if example.dialogue is not None]
    labelled = all(any(one.counts) for one in dialogues)
    every = [shown_by(example) for example in examples]
    eyes = encoder.eyes if any(every) else None
    prompts, answers = encoder.asked(dialogues, known=labelled, shown=every)
    if generated and labelled:
        prompts, _ = encoder.asked(dialogues, known=False, shown=every)
    requests = []
    places = _places(wheres, len(dialogues))
    for dialogue, prompt, answer, shown, where in zip(
        dialogues, prompts, answers, every, places, strict=True
    ):
        wanted = max(new_tokens, len(answer))
        if generated:  # the right answer need not fit: it is only compared with what is said
            wanted = min(new_tokens or room_for(answer), max(limit // 2, limit - len(prompt)))
        room = limit - wanted
        whole, shorter = len(prompt), dialogue.without_earliest()
        while len(prompt) > room and shorter is not None:
            shown = latest(shorter, shown)
            ((prompt,), _) = encoder.asked(
                [shorter], known=labelled and not generated, shown=[shown]
            )
            shorter = shorter.without_earliest()
        if eyes is not None:
            prompt = _with_pictures(prompt, [answer], shown, eyes, where)
        if generated:
            wanted = max(1, min(wanted, limit - prompt.fixed))
        short = _shortened(prompt, limit - wanted, limit, where)
        own = Request(task, short, [answer], len(short) < whole, room=wanted)
        requests.append(replace(own, pictures=shown, eyes=eyes))
    return requests


def one_begins_another(choices: Sequence[list[int]]) -> bool:
    """Whether the tokens of one candidate begin those of another one."""
    return any(
        len(one) < len(other) and other[: len(one)] == one
        for one, other in pairwise(sorted(choices))
    )


def require_different(task: Task, examples: Examples, requests: Sequence[Request]) -> None:
    """Refuse examples of which two candidates have the same tokens.

    Raises:
        UsageError: naming the row and the two.
    """
    for example, where, request in zip(examples.examples, examples.wheres, requests, strict=True):
        require_apart(task.name, where, example.choices, request.choices)
