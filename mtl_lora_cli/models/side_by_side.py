"""What our path and transformers' own forward pass say of the same tokens, and how far apart that is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtl_lora_cli.engine.segments import Segments
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.models.batch import PackedBatch
from mtl_lora_cli.models.noise import Shown
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.models.plain import forget_lengths, use_attention
from mtl_lora_cli.models.stand_in import device_of

MOST_ASKED = 48  # positions of an example that are compared
HALVES = (torch.bfloat16, torch.float16)
LIKELIEST = 8  # tokens a position that are compared: those that transformers finds likeliest


class NotRun(UsageError):
    """transformers itself does not compute what it is asked."""


class Allowed(NamedTuple):
    """What rounding may do, in nats: to a log-probability in 32 bits, on average in 16."""

    largest: float
    divergence: float


# In 32 bits the largest |Δ log p|. In 16 bits the divergence, in the mean over an example: rounding
# moves single log-probabilities far there, and a router that falls the other way further still.
# On real weights (SmolLM2-135M, one H200) up to 0.02 was seen, which some wrong models stay below: so in 16
# bits a small model of the same kind is asked in 32 bits, too, where right and wrong lie far apart.
ROUNDING = Allowed(largest=1e-3, divergence=0.1)
# The same path twice, with other tokens where nothing may look: nothing but rounding in a mixture.
UNSEEN = Allowed(largest=1e-4, divergence=0.01)


@dataclass(frozen=True)
class Difference:
    """Between two ways to the same log-probabilities, in nats.

    Attributes:
        largest: of all |Δ log p|.
        divergence: Σ p log(p / q) over the likeliest tokens and all others as one, in the mean over
            the positions of an example; of the example where it is largest.
    """

    largest: float
    divergence: float

    def within(self, dtype: torch.dtype, allowed: Allowed) -> bool:
        """Whether rounding in `dtype` explains it; NaN never does."""
        if dtype in HALVES:
            return self.divergence <= allowed.divergence
        return self.largest <= allowed.largest

    def __str__(self) -> str:
        return f"{self.largest:.2g} nats at most (divergence {self.divergence:.2g})"


@dataclass(frozen=True)
class Asked:
    """What transformers says behind the last tokens of an example.

    Attributes:
        tokens: int64 [asked, LIKELIEST], the likeliest.
        logprobs: float32, the same shape.
    """

    tokens: Tensor
    logprobs: Tensor


def between(theirs: Sequence[Tensor], ours: Sequence[Tensor]) -> Difference:
    """From log-probabilities [asked, LIKELIEST] of each example."""
    pairs = [(p, q.to(p.device)) for p, q in zip(theirs, ours, strict=True) if len(p)]
    largest = torch.stack([(p - q).abs().max() for p, q in pairs]).max()
    mean = torch.stack([_divergence(p, q).mean() for p, q in pairs]).max()
    return Difference(float(largest), float(mean))


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Σ p log(p / q) over the tokens asked and the rest as one more, from logarithms: [asked]."""
    rest_p, rest_q = ((1 - x.exp().sum(dim=-1)).clamp(min=1e-6) for x in (p, q))
    return (p.exp() * (p - q)).sum(dim=-1) + rest_p * (rest_p / rest_q).log()


def together(
    packed: PackedModel,
    examples: Sequence[Tensor],
    questions: Sequence[Asked],
    shown: Shown | None = None,
) -> list[Tensor]:
    """log p of the same tokens by our path, float32 [asked, LIKELIEST] each; with a picture in each."""
    lengths = [len(example) - 1 for example in examples]
    asked = [len(question.tokens) for question in questions]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    positions = torch.cat(
        [torch.arange(end - count, end) for end, count in zip(ends, asked, strict=True)]
    )
    targets = torch.cat([question.tokens for question in questions]).cpu()
    ids = torch.cat([example[:-1] for example in examples])[None]
    batch = PackedBatch(
        input_ids=ids,
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        task_ids=torch.full((1, ends[-1]), -1),
        segments=Segments.build(lengths),
        positions=positions,
        owner=torch.arange(len(positions)).repeat_interleave(targets.shape[1]),
        targets=targets.flatten(),
    )
    if shown is not None:
        batch = shown.within(batch)
    batch = batch.to(device_of(packed.model))
    exactly = nullcontext() if packed.decoder is None else packed.decoder.exactly()
    with packed.routed(batch), exactly:  # what 8-bit floats cost is told elsewhere (`rounding`)
        return list(packed(batch).float().view(targets.shape).split(asked))


def alone(
    packed: PackedModel, examples: Sequence[Tensor], shown: Shown | None = None
) -> list[Asked]:
    """What transformers says: each example by itself, eager attention, no layer of ours.

    Args:
        packed: the model.
        examples: int64 [length] each.
        shown: a picture in each; None: there are none.

    Raises:
        UsageError: transformers cannot do that.
    """
    model = packed.model
    with untouched(packed):
        try:
            found = []
            for number, example in enumerate(examples):
                forget_lengths(model)
                others = {} if shown is None else shown.alone(number, model)
                found.append(_alone(model, example.to(device_of(model)), others))
            return found
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise NotRun(
                f"base_model: transformers itself cannot run this model of type "
                f"'{model.config.model_type}': {in_a_line(error)}"
            ) from error


def _alone(model: Any, example: Tensor, others: Mapping[str, Tensor]) -> Asked:
    asked = min(len(example) - 1, MOST_ASKED)
    few = "logits_to_keep" in signature(model.forward).parameters
    keep = {"logits_to_keep": asked} if few else {}
    out = model(input_ids=example[None, :-1], use_cache=False, **keep, **others)
    logits = out.logits[0, -asked:]
    logprobs, tokens = torch.log_softmax(logits.float(), dim=-1).topk(LIKELIEST, dim=-1)
    return Asked(tokens, logprobs)


@contextmanager
def untouched(packed: PackedModel) -> Iterator[None]:
    """Inside the block the model is transformers' own."""
    use_attention(packed.model, "eager")
    try:
        with nullcontext() if packed.adapter is None else packed.adapter.bypassed():
            yield
    finally:
        if packed.plain is not None:
            packed.plain.take_attention()


def in_a_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, UsageError) else f"{type(error).__name__}: {text}"
