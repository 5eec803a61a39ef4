"""The self-test: our path beside transformers' own, before anything is learned or answered.

A few short examples of random tokens go through our path together, and each of them alone through
transformers' own forward pass, with its eager attention, on the same weights. What differs by more
than rounding computes another model. The plain engine has three layouts (`plain.py`); the first
one that agrees is taken, so no list says which model wants which. Where none agrees, the model is
refused.

Examples are longer than the model's window, and lie on both sides of a rotary embedding's limit. Where
that would take long, a small model of the same kind stands for the long ones: few layers, random
weights, window and limit scaled down. In 16 bits, where rounding hides much, it is asked in 32, with pictures
where there are some. What could not be asked in 32 bits is said, and where nothing could, the fused engine does not run.

Two more things are asked of our path alone. Causality: other later tokens change no earlier
log-probability. Isolation: one example's tokens change nothing in another.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mtl_lora_cli.engine.plan import text_body
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.models.noise import draw, drawn_pictures
from mtl_lora_cli.models.packed import Engine, PackedModel
from mtl_lora_cli.models.plain import Way
from mtl_lora_cli.models.side_by_side import (
    HALVES,
    MOST_ASKED,
    ROUNDING,
    UNSEEN,
    Asked,
    Difference,
    NotRun,
    alone,
    between,
    in_a_line,
    together,
    untouched,
)
from mtl_lora_cli.models.small import Small, small_of
from mtl_lora_cli.models.stand_in import (
    LONG,
    NoStandIn,
    critical_lengths,
    device_of,
    dtype_of,
    length_limit,
)

SHORT = (19, 11, 14)  # tokens of the examples that every model is asked
FILLED_UP = (71, 66)  # and those that are asked where one example a row is to be right
_OPERATIONS = {"cpu": 3e11, "cuda": 1e15}  # a few seconds
_SCORES = {"cpu": 2**28, "cuda": 2**31}  # values of one layer's attention, eager


@dataclass(frozen=True)
class Trust:
    """What the self-test found.

    Attributes:
        way: of the plain engine; None: the fused engine runs.
        difference: from each example alone in transformers.
        lengths: tokens of the examples.
        tried: ways that were not taken, and why.
        stand_in: lengths that a small model of the same kind was asked instead; empty: none.
        unasked: what of a run in 16 bits nobody was asked in 32, and why; empty: nothing.
    """

    way: Way | None
    difference: Difference
    lengths: tuple[int, ...]
    tried: tuple[str, ...] = ()
    stand_in: tuple[int, ...] = ()
    unasked: str = ""

    def __str__(self) -> str:
        small = (
            "; for longer ones, and in 32 bits, a small model of the same kind (few layers, random weights)"
            if self.stand_in
            else ""
        )
        small += f"; {self.unasked}" if self.unasked else ""
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
    _require_finite(model, expected)
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
            stood, unasked = _beyond(packed, small)
            if unasked and not stood and way is None and not packed.must_fuse:
                raise UsageError(unasked)
            if way is not None and way.layout == "rows":
                filled = draw(FILLED_UP, model.config)
                _measured(packed, filled, alone(packed, filled))
            return Trust(way, difference, tuple(lengths), tuple(tried), stood, unasked)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model's code does with what it was not made for
            tried.append(f"{name}: {in_a_line(error)}")
    last = tried[-1] if tried else "the fused engine was asked for, and does not know it"
    others = f", and {len(tried) - 1} other ways" if len(tried) > 1 else ""
    raise UsageError(
        f"base_model: a model of type '{model.config.model_type}' cannot be computed here as "
        f"transformers computes it ({last}{others}); take another base model"
    )


def _require_finite(model: Any, expected: Sequence[Asked]) -> None:
    """Refuse a model that transformers itself finds no numbers with.

    Raises:
        UsageError: what that may be.
    """
    if all(torch.isfinite(one.logprobs).all() for one in expected):
        return
    wrong = [name for name, one in model.named_parameters() if not torch.isfinite(one).all()]
    why = (
        f"{len(wrong)} of its weights hold NaN or infinity, the first is {wrong[0].replace('.base_layer', '')}"
        if wrong
        else f"its sums leave {str(dtype_of(model)).removeprefix('torch.')}; another dtype may hold them"
    )
    raise UsageError(f"base_model: transformers itself finds no log-probabilities with it: {why}")


def _beyond(packed: PackedModel, lengths: Sequence[int]) -> tuple[tuple[int, ...], str]:
    """What the model itself was not asked: by a small one, or, where there is none, by itself.

    Returns:
        The lengths that the small one stood for, and what nobody was asked in 32 bits.

    Raises:
        UsageError: it differs.
    """
    if not lengths:
        return (), ""
    try:
        return tuple(lengths), _require_stand_in(packed, lengths)
    except NoStandIn as reason:
        unasked = f"nothing was asked in 32 bits, where rounding hides less ({reason})"
    if max(lengths) > max(SHORT):
        examples = draw([*sorted(lengths, reverse=True), *SHORT], packed.model.config)
        _measured(packed, examples, alone(packed, examples))
    return (), unasked if _in_16_bits(packed.model) else ""


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
    difference = between([one.logprobs for one in expected], ours)
    if not difference.within(dtype, ROUNDING):
        raise UsageError(f"log-probabilities differ by {difference}")
    changed, kept = _with_another_end(examples)
    again = together(packed, changed, expected)
    unseen = between([ours[0][:kept], *ours[1:]], [again[0][:kept], *again[1:]])
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
    difference = between(right, ours)
    if not difference.within(dtype, ROUNDING):
        raise UsageError(f"with pictures, log-probabilities differ by {difference}")
    again = together(packed, examples, expected, shown.with_another_last())
    unseen = between(ours[:1], again[:1])
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
    with untouched(packed):
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


def _in_16_bits(model: Any) -> bool:
    return dtype_of(model) in HALVES


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
    if _in_16_bits(model):
        return [*fits, *SHORT], sorted(set(wanted)) or [max(SHORT)]
    return [*fits, *SHORT], sorted(set(wanted) - set(fits))


def _require_stand_in(packed: PackedModel, lengths: Sequence[int]) -> str:
    """Measure a small model of the same kind, with lengths beyond its own window and limit.

    In 32 bits, and in the run's own dtype: 16 bits have kernels of their own, but there rounding hides
    what is left out at a window's edge.

    Returns:
        What it was not asked in 32 bits, and why; empty: nothing.

    Raises:
        NoStandIn: there is no such model.
        UsageError: it differs.
    """
    device, config = device_of(packed.model), packed.model.config
    small = small_of(config, packed.vision, device, torch.float32)
    try:
        unshown = _require_right(packed, small)
        if critical_lengths(config.get_text_config()) and _in_16_bits(packed.model):
            _require_right(packed, small_of(config, None, device, dtype_of(packed.model)))
    except NotRun as error:
        raise NoStandIn(f"a small one does not run: {in_a_line(error)}") from error
    except UsageError as error:
        raise UsageError(
            f"a small model of the same kind, asked for lengths beyond {min(lengths)}: {error}"
        ) from error
    return f"pictures were not asked in 32 bits ({unshown})" if unshown else ""


def _require_right(packed: PackedModel, small: Small) -> str:
    """Measure a small model, on the engine and in the way of a large one.

    Returns:
        Why it was shown no pictures; empty where it was, or the large one sees none.

    Raises:
        NoStandIn: the engine does not know the small one.
        NotRun: transformers does not run it.
        UsageError: it differs.
    """
    way = None if packed.plain is None else packed.plain.way
    engine: Engine = "auto" if way is None else "plain"
    model, config = PackedModel(small.model, engine=engine).eval(), small.model.config
    if way is None and model.decoder is None:
        raise NoStandIn(f"the fused engine does not know a small one: {model.not_fused}")
    text = config.get_text_config()
    examples = draw([LONG, *critical_lengths(text), *SHORT], config)
    expected = alone(model, examples)
    if way is not None:
        model.go(replace(way, together=length_limit(text)))
    _measured(model, examples, expected)
    if small.vision is None:
        return small.unshown
    model.vision = small.vision
    try:
        _require_seen(model)
    except NotRun as error:
        return in_a_line(error)
    return ""
