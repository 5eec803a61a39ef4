"""Packed beside alone: log-probabilities, the adapter's gradients, candidates, and who sees whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.engine.segments import Segments
from mtl_lora_cli.evaluation.choices import score
from mtl_lora_cli.evaluation.generate import generate
from mtl_lora_cli.evaluation.requests import Request
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.batch import PackedBatch
from mtl_lora_cli.models.load import adapt, load_model
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.models.trust import settle

from .alone import Alone, elsewhere
from .models import WINDOW, Tiny

CPU = torch.device("cpu")
TASKS = ("one", "two", "three")
# Tokens of each example, the last one only asked for, and its task; −1 is the base model alone. Shorter
# and longer than the window, just as long, one more; on both sides of where longrope changes (64).
EXAMPLES = ((21, 0), (10, 1), (151, 2), (WINDOW + 1, 0), (WINDOW + 2, -1), (26, 2), (101, 1))
NEW_TOKENS = 5
RANK, SCALE, TEMPERATURE, UPS = 4, 4.0, 0.5, 2


@dataclass(frozen=True)
class Verdict:
    """How far packed is from alone.

    Attributes:
        engine: which one ran.
        forward: largest |Δ log p| of a token, in nats, in rows of several examples.
        candidates: largest |Δ log p| of a candidate answer, as evaluation scores them.
        gradient: largest |Δg| of the adapter, of the largest |g| of a tensor of the same role.
        later: largest |Δ log p| of a token when only what comes later in its example, and the second
            half of all other examples, changes.
        continued: whether prompts of two lengths are continued by the same likeliest tokens.
    """

    engine: str
    forward: float
    candidates: float
    gradient: float
    later: float
    continued: bool

    @property
    def worst(self) -> float:
        """The largest of them."""
        largest = max(self.forward, self.candidates, self.gradient, self.later)
        return largest if self.continued else float("inf")


class Packed:
    """A model as a user gets it, with an adapter of three tasks that is far from its start.

    Args:
        folder: the model's.
        targets: last names of the layers to adapt.

    Raises:
        UsageError: the model, or a target, is refused.
    """

    def __init__(self, folder: Path, targets: Sequence[str]) -> None:
        torch.manual_seed(0)
        model = load_model(find_base_model(str(folder)), dtype=torch.float32, device=CPU)
        config = configure(
            rank=RANK,
            alpha=SCALE * RANK,
            up_projections=UPS,
            temperature=TEMPERATURE,
            target_modules=tuple(targets),
        )
        self.adapter: Adapter = adapt(model, config, TASKS)
        with torch.no_grad():
            for tensor in self.adapter.tensors().values():
                tensor.add_(0.05 * torch.randn_like(tensor))
        self.model = PackedModel(model, self.adapter).eval()
        settle(self.model)

    @property
    def engine(self) -> str:
        """Which engine runs, and how."""
        return "fused" if self.model.plain is None else f"plain, {self.model.plain.way}"

    def logprobs(self, examples: Sequence[Tensor], tasks: Sequence[int]) -> Tensor:
        """Of every token but the first, all examples in one pass, one behind the other."""
        batch = row_of(examples, tasks)
        with self.model.routed(batch):
            return self.model(batch)

    def gradients(self, examples: Sequence[Tensor], tasks: Sequence[int]) -> dict[str, Tensor]:
        """Of `weighted`, for every tensor of the adapter."""
        batch = row_of(examples, tasks)
        tensors = self.adapter.tensors()
        with self.model.routed(batch):
            weighted(self.model(batch)).backward()
        return {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}


def row_of(examples: Sequence[Tensor], tasks: Sequence[int]) -> PackedBatch:
    """All examples in one row; of each the last token is a target only."""
    lengths = [len(example) - 1 for example in examples]
    total = sum(lengths)
    return PackedBatch(
        input_ids=torch.cat([example[:-1] for example in examples])[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        task_ids=torch.repeat_interleave(torch.tensor(tasks), torch.tensor(lengths))[None],
        segments=Segments.build(lengths),
        positions=torch.arange(total),
        owner=torch.arange(total),
        targets=torch.cat([example[1:] for example in examples]),
    )


def weighted(logprobs: Tensor) -> Tensor:
    """A loss in which every token counts another share."""
    return -(logprobs * torch.linspace(1, 2, len(logprobs))).mean()


def draw(lengths: Sequence[int]) -> list[Tensor]:
    """Random examples, always the same; the last tokens of the vocabulary are kept for images."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 500, (length,), generator=generator) for length in lengths]


def judge(model: Tiny, folder: Path) -> Verdict:
    """Packed beside alone, in float32.

    Raises:
        UsageError: the model is refused.
    """
    alone = Alone(folder, sees=model.vision is not None)
    targets = model.targets or alone.targets()
    packed = Packed(folder, targets)
    ends = tuple(f".{target}" for target in targets)
    wanted = {
        path
        for path, layer in alone.model.named_modules()
        if path.endswith(ends) and isinstance(layer, nn.Linear) and not elsewhere(path)
    }
    names = {path: within(path, wanted) for path in packed.adapter.layers}
    assert set(names.values()) == wanted, f"adapted {sorted(names)}, expected {sorted(wanted)}"
    tensors = {
        f"{names[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": tensor.detach().clone()
        for name, tensor in packed.adapter.tensors().items()
    }
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    weights = {
        task: alone.adapted(leaves, SCALE, TEMPERATURE, task) for task in (-1, *range(len(TASKS)))
    }
    examples, tasks = draw([length for length, _ in EXAMPLES]), [task for _, task in EXAMPLES]
    right = torch.cat(
        [alone.logprobs(one, weights[task]) for one, task in zip(examples, tasks, strict=True)]
    )
    weighted(right).backward()
    with torch.no_grad():
        right = right.detach()
        found = packed.logprobs(examples, tasks)
        moved = packed.logprobs([changed(one) for one in examples], tasks)
        earlier = torch.cat([torch.arange(len(one) - 1) < len(one) // 2 - 1 for one in examples])
        candidates = _candidates(packed, alone, weights)
        continued = _continued(packed, alone, weights)
    gradients = packed.gradients(examples, tasks)
    return Verdict(
        engine=packed.engine,
        forward=float((found - right).abs().max()),
        candidates=candidates,
        gradient=_furthest(
            {
                name: leaves[f"{names[path]}.{role}"].grad
                for name in gradients
                for path, _, role in [name.rpartition(".")]
            },
            gradients,
        ),
        later=float((found - moved)[earlier].abs().max()),
        continued=continued,
    )


def _furthest(right: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> float:
    """Largest |Δg| of a tensor, of the largest |g| of all tensors of its role."""
    largest: dict[str, float] = {}
    furthest: dict[str, float] = {}
    for name, gradient in right.items():
        role = name.rpartition(".")[2]
        largest[role] = max(largest.get(role, 0.0), float(gradient.abs().max()))
        apart = float((gradient - found[name]).abs().max())
        furthest[role] = max(furthest.get(role, 0.0), apart)
    return max(furthest[role] / largest[role] for role in largest)


def changed(example: Tensor) -> Tensor:
    """Other tokens in the second half."""
    half = len(example) // 2
    return torch.cat([example[:half], (example[half:] - 3 + 7) % 497 + 3])


def within(path: str, wanted: set[str]) -> str:
    """The layer as transformers calls it: a wrapper's text part may have been loaded by itself."""
    if path in wanted:
        return path
    tail = path[path.find("layers.") :]
    (name,) = [one for one in wanted if one.endswith(f".{tail}")]
    return name


def _candidates(packed: Packed, alone: Alone, weights: dict[int, dict[str, Tensor]]) -> float:
    """Prompts with several candidate answers, some of which begin alike, as evaluation asks them."""
    prompts = draw([12, WINDOW - 2, 60])
    answers = draw([1, 3, 5, 4])
    answers.append(torch.cat([answers[2][:3], answers[1]]))
    requests = [
        Request(task, prompt.tolist(), [answer.tolist() for answer in answers])
        for task, prompt in enumerate(prompts)
    ]
    scores = score(packed.model, requests, device=CPU, tokens_per_pass=1000)
    worst = 0.0
    for task, prompt in enumerate(prompts):
        for number, answer in enumerate(answers):
            whole = alone.logprobs(torch.cat([prompt, answer]), weights[task])
            right = float(whole[-len(answer) :].sum())
            worst = max(worst, abs(right - float(scores[task][number])))
    return worst


def _continued(packed: Packed, alone: Alone, weights: dict[int, dict[str, Tensor]]) -> bool:
    """Whether greedy answers are the likeliest tokens of each row by itself, without a cache."""
    prompts = draw([WINDOW + 8, 17, 62, 17])  # the third grows beyond where longrope changes
    tasks = [0, 0, 1, 2]
    requests = [
        Request(task, prompt.tolist(), [[]]) for task, prompt in zip(tasks, prompts, strict=True)
    ]
    answers = generate(
        packed.model,
        requests,
        ends=(),
        new_tokens=[NEW_TOKENS] * len(requests),
        device=CPU,
        tokens_per_pass=1000,
    )
    for task, prompt, answer in zip(tasks, prompts, answers, strict=True):
        tokens = prompt
        for token in answer:
            if alone.likeliest(tokens, weights[task]) != token:
                return False
            tokens = torch.cat([tokens, torch.tensor([token])])
    return True
