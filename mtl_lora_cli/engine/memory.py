"""How much memory a training step takes, by arithmetic on the sizes of a model.

    peak = fixed + max over the moments of a step of (kept so far + working)

*Fixed* are weights, adapter, its gradients and AdamW's state. *Kept* is what the blocks leave for the
backward pass, *working* what lives for one block only: `attention_block.py` and `mlp_block.py` say
both, beside what they do. The moments are each block's forward pass, the head's, and each block's
backward pass, when what the later layers kept is free again. All memory is in bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mtl_lora_cli.adapters.experts import STACKS, frozen_stacks
from mtl_lora_cli.adapters.frozen import ALIGNMENT
from mtl_lora_cli.adapters.frozen_stack import FrozenStack
from mtl_lora_cli.adapters.function import Widths
from mtl_lora_cli.engine import attention_block, experts_block, mixer_block, mlp_block
from mtl_lora_cli.engine.families import plan_of
from mtl_lora_cli.engine.plan import AttentionPlan, ExpertsPlan, LayerPlan, MixerPlan
from mtl_lora_cli.engine.saved import Keep
from mtl_lora_cli.engine.sizes import GroupSizes, LayerSizes, Load, ModelSizes, StackSizes
from mtl_lora_cli.recipe.training import Recompute

if TYPE_CHECKING:
    from mtl_lora_cli.adapters.inject import Adapter

GIB = 2**30
NF4_BITS = 4.127  # 4, 8 for each block of 64 weights, 32 for each 256 blocks
VALUE_BYTES = 4  # float32: what is trained, its gradient, and AdamW's two moments
CONTEXT = GIB  # kernels and libraries on the device, and what the allocator cannot use
FRAGMENTATION = 0.05  # of the tensors
LIVE_LAYERS = 4  # of a model that is cut into parts: what is whole at a time


def weight_bytes(sizes: ModelSizes) -> int:
    """The frozen weights: those of the layers in `dtype` or quantised, all others in `dtype`. With fp8 those of
    the layers are let go of before the first step; their 8-bit copies are not among these.

    Cut into parts there are, besides one part, the head and some layers whole: one that works and
    those that are fetched ahead.
    """
    each = NF4_BITS / 8 if sizes.four_bit else 1.0 if sizes.eight_bit else sizes.value
    layers = [
        (not sizes.let_go) * each * sum(group.weights for group in layer.groups)
        + (each if sizes.four_bit else sizes.value) * layer.experts
        for layer in sizes.layers
    ]
    whole = 0 if sizes.sight is None else sizes.sight.frozen * sizes.value
    found = math.ceil(sum(layers)) + sizes.other_weights * sizes.value - whole
    if sizes.parts == 1:
        return found + whole
    head = sizes.vocabulary * sizes.width * sizes.value
    gathered = min(LIVE_LAYERS, len(layers)) * max(layers) + head
    return whole + min(found, math.ceil(found / sizes.parts + gathered))


def fixed_bytes(sizes: ModelSizes) -> int:
    """What lives for the whole run: weights, adapter, gradients, AdamW, what weights are expanded in."""
    groups = [group for layer in sizes.layers for group in layer.groups]
    found = weight_bytes(sizes) + 4 * sizes.trained * VALUE_BYTES
    if sizes.expanded:
        found += sizes.matrix_values * sizes.value
        left = sizes.layers[: sizes.left_expanded]
        found += sum(dense_bytes(sizes, layer) for layer in left)
    else:
        found += sum(sizes.matrix(group) - group.weights for group in groups) * sizes.value
    if sizes.fp8:
        found += 2 * sum(group.weights for group in groups)
    return found


def dense_bytes(sizes: ModelSizes, layer: LayerSizes) -> int:
    """One layer's weights, left expanded, margins included; not those of experts."""
    return sum(sizes.matrix(group) for group in layer.groups) * sizes.value


def kept_bytes(sizes: ModelSizes, layer: LayerSizes, keep: Keep, load: Load, *, last: bool) -> int:
    """What one layer leaves for its backward pass; all after attention has U positions in the last."""
    return sum(block.kept_bytes(sizes, layer, keep, load, last=last) for block in _blocks(layer))


def forward_bytes(
    sizes: ModelSizes, layer: LayerSizes, keep: Keep, load: Load, *, last: bool
) -> int:
    """The most that lives beside what is kept, in one layer's forward pass."""
    most = max(block.forward_bytes(sizes, layer, keep, load, last=last) for block in _blocks(layer))
    return most + _dropped(sizes, layer, load)


def backward_bytes(
    sizes: ModelSizes, layer: LayerSizes, keep: Keep, load: Load, *, last: bool
) -> int:
    """The most that lives beside what is kept, in one layer's backward pass.

    When the first block's turn comes, the second has let go of what it kept.
    """
    first, second = _blocks(layer)
    early = second.backward_bytes(sizes, layer, keep, load, last=last)
    late = first.backward_bytes(sizes, layer, keep, load, last=last)
    late -= second.kept_bytes(sizes, layer, keep, load, last=last)
    return max(early, late) + _dropped(sizes, layer, load)


def _blocks(layer: LayerSizes) -> tuple[Any, Any]:
    """The modules of its two blocks."""
    mixer = isinstance(layer.plan.attention, MixerPlan)
    experts = isinstance(layer.plan.mlp, ExpertsPlan)
    return mixer_block if mixer else attention_block, experts_block if experts else mlp_block


def _dropped(sizes: ModelSizes, layer: LayerSizes, load: Load) -> int:
    """Dropout draws a float32 for each feature, and copies the input without what was dropped."""
    if not sizes.dropout:
        return 0
    inputs = max((group.inputs for group in layer.groups if group.rows), default=0)
    return inputs * 4 * load.positions


def head_bytes(sizes: ModelSizes, load: Load) -> int:
    """Logits [U, V] in `dtype`, over which our kernel writes their gradient; torch takes copies.

    A soft cap keeps tanh, and makes capped logits of it.
    """
    each = sizes.value if sizes.kernels else sizes.value + 8
    each += 2 * sizes.value if sizes.capped else 0
    return load.asked * (sizes.vocabulary * each + 4 * sizes.width * sizes.value)


def batch_bytes(sizes: ModelSizes, load: Load) -> int:
    """Ids, positions, routing, the rotations' cos and sin, float32 D/2 each, and torch's masks of windows
    and trees."""
    halves = {layer.plan.attention for layer in sizes.layers}
    plans = [plan for plan in halves if isinstance(plan, AttentionPlan)]
    turned = {plan.rotary: plan.head_dim for plan in plans if plan.rotary is not None}
    windows = {plan.window for plan in plans if plan.window and plan.window < load.segment}
    masks = len(windows) + load.trees
    seen = 0 if sizes.kernels else masks * load.segment * sizes.value
    held = 0 if sizes.sight is None else sizes.sight.held * load.shown
    return load.positions * (4 * sum(turned.values()) + 64 + seen) + held


def peak_bytes(sizes: ModelSizes, recompute: Recompute, load: Load) -> int:
    """The most that the tensors of one pass take together, or what is there before the first step."""
    return sum(peak_parts(sizes, recompute, load).values())


def peak_parts(sizes: ModelSizes, recompute: Recompute, load: Load) -> dict[str, int]:
    """What the tensors of one pass take at its fullest moment, by what they are.

    Returns:
        `weights`, `adapter`, `gradients`, `moments` (AdamW's two), `buffers` (margins, expanded and
        8-bit weights), `batch`, `activations` (kept so far for the backward pass), and of `logits`
        and `workspace` (of one block) the one that is there at that moment; the other is 0.
    """
    keeps = keep_of(recompute, len(sizes.layers))
    tower = 0 if sizes.sight is None else sizes.sight.working * load.shown
    kept, most = 0, (0, tower)  # kept so far, working
    last = len(sizes.layers) - 1
    for number, (layer, keep) in enumerate(zip(sizes.layers, keeps, strict=True)):
        is_last = number == last
        kept += kept_bytes(sizes, layer, keep, load, last=is_last)
        for one in (forward_bytes, backward_bytes):
            most = max(most, (kept, one(sizes, layer, keep, load, last=is_last)), key=sum)
    logits = head_bytes(sizes, load)
    in_head = kept + logits > sum(most)
    weights, value = weight_bytes(sizes), sizes.trained * VALUE_BYTES
    found = {
        "weights": weights,
        "adapter": value,
        "gradients": value,
        "moments": 2 * value,
        "buffers": fixed_bytes(sizes) - weights - 4 * value,
        "batch": batch_bytes(sizes, load),
        "activations": kept if in_head else most[0],
        "logits": logits if in_head else 0,
        "workspace": 0 if in_head else most[1],
    }
    return max(found, _look_parts(sizes, found, load), key=lambda parts: sum(parts.values()))


def _look_parts(sizes: ModelSizes, found: dict[str, int], load: Load) -> dict[str, int]:
    """The same when `rounding` asks both kinds of weights before the first step, and nothing is kept."""
    if not sizes.let_go:
        return found
    layers = [forward_bytes(sizes, layer, Keep(), load, last=False) for layer in sizes.layers]
    exact = sum(group.weights for layer in sizes.layers for group in layer.groups) * sizes.value
    return found | {
        "weights": found["weights"] + exact,
        "gradients": 0,
        "moments": 0,
        "activations": 0,
        "logits": head_bytes(sizes, load),
        "workspace": max(layers),
    }


def needed_bytes(peak: int) -> int:
    """What must be free for tensors of this peak: 5 % more for fragmentation, and 1 GiB."""
    return math.ceil(peak * (1 + FRAGMENTATION)) + CONTEXT


def recompute_of(setting: bool | Recompute, layers: int) -> Recompute:
    """`training.gradient_checkpointing` in its long form."""
    if isinstance(setting, Recompute):
        return setting
    return Recompute(attended=setting, qkv=setting * layers, gate_up=setting * layers)


def keep_of(setting: bool | Recompute, layers: int) -> list[Keep]:
    """What each layer keeps.

    The first layers compute again, not the last: their turn comes when the later ones have let go
    of what they kept, so that what is computed again finds room.
    """
    found = recompute_of(setting, layers)
    return [
        Keep(
            attended=not found.attended,
            qkv=number >= found.qkv,
            gate_up=number >= found.gate_up,
        )
        for number in range(layers)
    ]


def sizes_of(
    model: Any,
    adapter: Adapter,
    *,
    value: int,
    on_card: bool,
    quantization: str = "none",
    base_compute: str = "dtype",
    parts: int = 1,
) -> ModelSizes:
    """The sizes of a model with its adapter; both may be on the meta device.

    Args:
        model: a transformers model whose layers the fused engine knows, not quantised yet.
        adapter: injected into it.
        value: bytes of a number in the run's dtype.
        on_card: whether it will run on a card.
        quantization, base_compute: of the recipe.
        parts: see `ModelSizes`.
    """
    plan, kernels = plan_of(model.config), on_card and value == 2
    step = ALIGNMENT if kernels else 1
    norms = False, *(layer.mlp.after is not None for layer in plan.layers)
    layers = tuple(
        replace(_layer(module, one, step), norms_before=normed)
        for module, one, normed in zip(plan.modules(model), plan.layers, norms, strict=False)
    )
    inside = sum(group.weights for layer in layers for group in layer.groups)
    inside += sum(layer.experts for layer in layers)
    trained = adapter.parameter_count()
    return ModelSizes(
        layers=layers,
        vocabulary=model.config.get_text_config().vocab_size,
        other_weights=sum(p.numel() for p in model.parameters()) - trained - inside,
        trained=trained,
        value=value,
        four_bit=quantization in ("nf4", "fp4"),
        eight_bit=quantization == "int8",
        parts=parts,
        fp8=base_compute == "fp8",
        kernels=kernels,
        dropout=adapter.config.dropout > 0,
        capped=plan.logit_softcap is not None,
    )


def _layer(module: Any, plan: LayerPlan, step: int) -> LayerSizes:
    """By the plan; factors are filled up to multiples of `step`."""
    qkv, o = (_group(module, paths, step) for paths in plan.attention.groups)
    others = dict(enumerate(_group(module, paths, step) for paths in plan.mlp.groups))
    gate_up, down, gate = (others.get(number) for number in range(3))
    if not isinstance(plan.mlp, ExpertsPlan):
        return LayerSizes(plan, qkv, o, gate_up, down)
    experts = module.get_submodule(plan.mlp.stack)
    up_stack, down_stack = frozen_stacks(experts, transposed=plan.mlp.transposed).values()
    return LayerSizes(
        plan,
        qkv,
        o,
        gate_up,
        down,
        inner=down_stack.width,
        experts=up_stack.values + down_stack.values,
        gate=gate,
        stacks=tuple(
            _stack(frozen, experts._modules.get(name), step)
            for name, frozen in zip(STACKS, (up_stack, down_stack), strict=True)
        ),
    )


def _stack(frozen: FrozenStack, layer: Any, step: int) -> StackSizes:
    if layer is None:
        return StackSizes(frozen.width, frozen.out, frozen.experts)
    down, up = (one.shape[-3:] for one in layer.factors(None))
    widths = Widths.of([down], [up], step)
    return StackSizes(frozen.width, frozen.out, frozen.experts, *widths, layer.units)


def _group(layer: Any, paths: Sequence[str], step: int) -> GroupSizes:
    modules = [layer.get_submodule(path) for path in paths]
    bases = [getattr(module, "base_layer", module) for module in modules]
    found = GroupSizes(bases[0].in_features, sum(base.out_features for base in bases))
    factors = [module.factors(None) for module in modules if module not in bases]
    if not factors:
        return found
    downs, ups = ([one.shape for one in some] for some in zip(*factors, strict=True))
    widths, count = Widths.of(downs, ups, step), len(factors)
    return replace(found, rows=count * widths.down, columns=count * widths.up)
