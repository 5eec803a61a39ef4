"""The self-test: our path beside transformers' own, before anything is learned or answered.

A few short examples of random tokens go through our path together, and each of them alone through
transformers' own forward pass, with its eager attention, on the same weights. What differs by more
than rounding computes another model. The plain engine has three layouts (`plain.py`); the first
one that agrees is taken, so no list says which model wants which. Where none agrees, the model is
refused.

Examples are longer than the model's window, and lie on both sides of a rotary embedding's limit. Where
that would take long, a small model of the same kind stands for the long ones: few layers, random
weights, window and limit scaled down.

Two more things are asked of our path alone. Causality: other later tokens change no earlier
log-probability. Isolation: one example's tokens change nothing in another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtl_lora_cli.engine.plan import text_body
from mtl_lora_cli.engine.segments import Segments
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.models.batch import PackedBatch
from mtl_lora_cli.models.noise import Shown, draw, drawn_pictures
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.models.plain import Way, forget_lengths, use_attention
from mtl_lora_cli.models.stand_in import (
    LONG,
    critical_lengths,
    device_of,
    dtype_of,
    length_limit,
    stand_in,
)

SHORT = (19, 11, 14)  # tokens of the examples that every model is asked
FILLED_UP = (71, 66)  # and those that are asked where one example a row is to be right
MOST_ASKED = 48  # positions of an example that are compared
_OPERATIONS = {"cpu": 3e11, "cuda": 1e15}  # a few seconds
_SCORES = {"cpu": 2**28, "cuda": 2**31}  # values of one layer's attention, eager

LIKELIEST = 8  # tokens a position that are compared: those that transformers finds likeliest


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
        if dtype in (torch.bfloat16, torch.float16):
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


@dataclass(frozen=True)
class Trust:
    """What the self-test found.

    Attributes:
        way: of the plain engine; None: the fused engine runs.
        difference: from each example alone in transformers.
        lengths: tokens of the examples.
        tried: ways that were not taken, and why.
        stand_in: lengths that a small model of the same kind was asked instead; empty: none.
    """

    way: Way | None
    difference: Difference
    lengths: tuple[int, ...]
    tried: tuple[str, ...] = ()
    stand_in: tuple[int, ...] = ()

    def __str__(self) -> str:
        small = (
            "; longer ones by a small model of the same kind (few layers, random weights)"
            if self.stand_in
            else ""
        )
        return (
            f"{len(self.lengths)} examples of {min(self.lengths)} to {max(self.lengths)} tokens "
            f"beside each alone in transformers: {self.difference}{small}"
        )


def settle(packed: PackedModel) -> Trust:
    """Find the engine and the way that compute the model, and leave `packed` with them.

    Args:
        packed: the model, with an adapter or without; the adapter takes no part.

    Raises:
        UsageError: no way agrees with transformers; or the adapter is on a layer that the model
            never calls.
    """
    training, asked_fused = packed.training, packed.decoder is not None
    packed.eval()
    written = [parameter._version for parameter in packed.model.parameters()]
    try:
        with torch.no_grad():
            found = _settled(packed)
            if found.way is not None:
                _require_called(packed)
        if written != [parameter._version for parameter in packed.model.parameters()]:
            raise UsageError(
                f"base_model: a model of type '{packed.model.config.model_type}' changes its own "
                "weights while it computes: an adapter beside them would not follow"
            )
    finally:
        packed.train(training)
    if asked_fused and found.way is not None:
        packed.not_fused = found.tried[0].partition(": ")[2]
    return found


def _settled(packed: PackedModel) -> Trust:
    model = packed.model
    config = model.config.get_text_config()
    lengths, small = affordable(model)
    examples = draw(lengths, model.config)
    expected = alone(packed, examples)
    limit = length_limit(config)
    ways: list[Way | None] = [None] if packed.decoder is not None else []
    bare = head_is_bare(packed, examples[-1])
    if not packed.must_fuse:
        ways += [Way(layout, bare, limit) for layout in packed.ways]
    tried: list[str] = []
    for way in ways:
        name = "the fused engine" if way is None else str(way)
        try:
            if way is not None:
                packed.go(way)
            difference = _measured(packed, examples, expected)
            stood = _beyond(packed, small)
            if way is not None and way.layout == "rows":
                filled = draw(FILLED_UP, model.config)
                _measured(packed, filled, alone(packed, filled))
            return Trust(way, difference, tuple(lengths), tuple(tried), stood)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model's code does with what it was not made for
            tried.append(f"{name}: {_in_a_line(error)}")
    last = tried[-1] if tried else "the fused engine was asked for, and does not know it"
    others = f", and {len(tried) - 1} other ways" if len(tried) > 1 else ""
    raise UsageError(
        f"base_model: a model of type '{model.config.model_type}' cannot be computed here as "
        f"transformers computes it ({last}{others}); take another base model"
    )


def _beyond(packed: PackedModel, lengths: Sequence[int]) -> tuple[int, ...]:
    """What the model itself was not asked: by a small one, or, where there is none, by itself.

    Returns:
        The lengths that the small one stood for.

    Raises:
        UsageError: it differs.
    """
    if not lengths or _require_stand_in(packed, lengths):
        return tuple(lengths)
    if max(lengths) <= max(SHORT):
        return ()
    examples = draw([*sorted(lengths, reverse=True), *SHORT], packed.model.config)
    _measured(packed, examples, alone(packed, examples))
    return ()


def _in_a_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, UsageError) else f"{type(error).__name__}: {text}"


def _measured(
    packed: PackedModel,
    examples: Sequence[Tensor],
    expected: Sequence[Asked],
) -> Difference:
    """The difference from what transformers says.

    Raises:
        UsageError: it is no rounding, or our path sees what it must not see.
    """
    dtype = dtype_of(packed.model)
    ours = together(packed, examples, expected)
    difference = _between([one.logprobs for one in expected], ours)
    if not difference.within(dtype, ROUNDING):
        raise UsageError(f"log-probabilities differ by {difference}")
    changed, kept = _with_another_end(examples)
    again = together(packed, changed, expected)
    unseen = _between([ours[0][:kept], *ours[1:]], [again[0][:kept], *again[1:]])
    if not unseen.within(dtype, UNSEEN):
        raise UsageError(f"tokens that must not be seen change log-probabilities by {unseen}")
    if packed.vision is not None:
        _require_seen(packed)
    return difference


def _require_seen(packed: PackedModel) -> None:
    """Refuse a path on which pictures come out otherwise than in transformers, or reach another example.

    Raises:
        UsageError: by how much.
    """
    assert packed.vision is not None
    dtype, shown = dtype_of(packed.model), drawn_pictures(packed.vision)
    examples = shown.examples
    expected = alone(packed, examples, shown)
    right = [one.logprobs for one in expected]
    ours = together(packed, examples, expected, shown)
    difference = _between(right, ours)
    if not difference.within(dtype, ROUNDING):
        raise UsageError(f"with pictures, log-probabilities differ by {difference}")
    again = together(packed, examples, expected, shown.with_another_last())
    unseen = _between(ours[:1], again[:1])
    if not unseen.within(dtype, UNSEEN):
        raise UsageError(f"another example's picture changes log-probabilities by {unseen}")


def _with_another_end(examples: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """The first example with other tokens at its end, and how many answers that leaves alone."""
    first = examples[0].clone()
    half = len(first) // 2
    first[half:] = first[half:].flip(0).roll(1)
    asked = min(len(first) - 1, MOST_ASKED)
    before = half - (len(first) - 1 - asked)  # positions before the change, of those compared
    return [first, *examples[1:]], max(0, before)


def _between(theirs: Sequence[Tensor], ours: Sequence[Tensor]) -> Difference:
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
    with _untouched(packed):
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
            raise UsageError(
                f"base_model: transformers itself cannot run this model of type "
                f"'{model.config.model_type}': {_in_a_line(error)}"
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
def _untouched(packed: PackedModel) -> Iterator[None]:
    """Inside the block the model is transformers' own."""
    use_attention(packed.model, "eager")
    try:
        with nullcontext() if packed.adapter is None else packed.adapter.bypassed():
            yield
    finally:
        if packed.plain is not None:
            packed.plain.take_attention()


def head_is_bare(packed: PackedModel, example: Tensor) -> bool:
    """Whether logits are the output layer's product with the last hidden state, bit for bit."""
    model = packed.model
    head = model.get_output_embeddings()
    if head is None:
        return False
    ids = example[None, :-1].to(device_of(model))
    asked: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if packed.vision is not None and packed.vision.whole_prompt:  # it counts positions from 1 on
        asked["position_ids"] = torch.arange(ids.shape[1], device=ids.device)[None]
    with _untouched(packed):
        try:
            hidden = text_body(model)(**asked).last_hidden_state
            return torch.equal(head(hidden), model(**asked).logits)
        except (AttributeError, TypeError, ValueError, RuntimeError, KeyError):
            return False


def _require_called(packed: PackedModel) -> None:
    """Refuse an adapter on a layer whose weight the model reads past the layer.

    Experts that no token went to are not called either; one of a kind is enough.
    """
    adapter = packed.adapter
    if adapter is None:
        return
    called: set[str] = set()

    def kind(path: str) -> str:
        return re.sub(r"\.\d+", "", path)

    hooks = [
        layer.register_forward_hook(lambda *_, path=path: called.add(kind(path)))
        for path, layer in adapter.layers.items()
    ]
    try:
        examples = draw(SHORT, packed.model.config)
        none = Asked(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1))
        together(packed, examples, [none] * len(examples))
        if packed.vision is not None:
            shown = drawn_pictures(packed.vision)
            together(packed, shown.examples, [none] * len(shown.examples), shown)
    finally:
        for hook in hooks:
            hook.remove()
    never = sorted({path for path in adapter.layers if kind(path) not in called})
    if never:
        raise UsageError(
            f"adapter.target_modules: '{never[0]}' is never called as a layer in a model of type "
            f"'{packed.model.config.model_type}': an adapter there would do nothing"
        )


def affordable(model: Any) -> tuple[list[int], list[int]]:
    """Lengths of examples for the model itself, and those that a small one stands for."""
    config = model.config.get_text_config()
    wanted = critical_lengths(config)
    device = device_of(model).type
    weights = sum(parameter.numel() for parameter in model.parameters())
    heads = getattr(config, "num_attention_heads", None) or 1
    fits = [
        length
        for length in wanted
        if 8.0 * weights * length <= _OPERATIONS[device] and heads * length**2 <= _SCORES[device]
    ]
    half = dtype_of(model) in (torch.bfloat16, torch.float16)
    if half:
        return [*fits, *SHORT], sorted(set(wanted)) or [max(SHORT)]
    return [*fits, *SHORT], sorted(set(wanted) - set(fits))


def _require_stand_in(packed: PackedModel, lengths: Sequence[int]) -> bool:
    """Measure a small model of the same kind, with lengths beyond its own window and limit.

    In 32 bits, and in the run's own dtype: 16 bits have kernels of their own, but there rounding hides
    what is left out at a window's edge.

    Returns:
        Whether there is such a model.

    Raises:
        UsageError: it differs.
    """
    way = None if packed.plain is None else packed.plain.way
    device = device_of(packed.model)
    long = critical_lengths(packed.model.config.get_text_config())
    for dtype in dict.fromkeys([torch.float32, *([dtype_of(packed.model)] if long else [])]):
        model = stand_in(packed.model.config.get_text_config(), device, dtype)
        if model is None:
            return False
        config = model.config.get_text_config()
        small = PackedModel(model, engine="auto" if way is None else "plain").eval()
        examples = draw([LONG, *critical_lengths(config), *SHORT], model.config)
        expected = alone(small, examples)
        try:
            if way is not None:
                small.go(replace(way, together=length_limit(config)))
            _measured(small, examples, expected)
        except UsageError as error:
            raise UsageError(
                f"a small model of the same kind, asked for lengths beyond {min(lengths)}: {error}"
            ) from error
    return True
