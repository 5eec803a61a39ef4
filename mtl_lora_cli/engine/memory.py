"""How much memory a training step takes, by arithmetic on the sizes of a model.

    peak = fixed + max over the moments of a step of (kept so far + working)

*Fixed* are weights, adapter, its gradients and AdamW's state. *Kept* is what the blocks of
`attention_block.py` and `mlp_block.py` leave for the backward pass. *Working* is what lives for one block only. The
moments are each block's forward pass, the head's, and each block's backward pass, when what the
later layers kept is free again. All memory is in bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from mtl_lora_cli.adapters.frozen import ALIGNMENT
from mtl_lora_cli.engine.saved import Keep
from mtl_lora_cli.kernels.backend import PITCH
from mtl_lora_cli.recipe.schema import Recompute

if TYPE_CHECKING:
    from mtl_lora_cli.adapters.inject import Adapter

GIB = 2**30
NF4_BITS = 4.127  # 4, 8 for each block of 64 weights, 32 for each 256 blocks
VALUE_BYTES = 4  # float32: what is trained, its gradient, and AdamW's two moments
CONTEXT = GIB  # kernels and libraries on the device, and what the allocator cannot use
FRAGMENTATION = 0.05  # of the tensors
LIVE_LAYERS = 4  # of a model that is cut into parts: what is whole at a time


@dataclass(frozen=True)
class GroupSizes:
    """Projections of one input.

    Attributes:
        inputs, outputs: of their weights together, [outputs, inputs].
        rows: of all A_j below each other; 0 where none is adapted.
        columns: of all B_j beside each other, up-projections times rank each.
    """

    inputs: int
    outputs: int
    rows: int = 0
    columns: int = 0

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs

    @property
    def aligned(self) -> bool:
        """Whether margins of the weights can hold its adapters; see `adapters/frozen.py`."""
        return self.rows > 0 and self.rows % ALIGNMENT == 0 and self.columns % ALIGNMENT == 0

    @property
    def pitch(self) -> int:
        """Values of one row of [x | room]."""
        return -(-(self.inputs + self.columns) // PITCH) * PITCH


@dataclass(frozen=True)
class LayerSizes:
    """One decoder layer."""

    qkv: GroupSizes
    o: GroupSizes
    gate_up: GroupSizes
    down: GroupSizes

    @property
    def groups(self) -> tuple[GroupSizes, ...]:
        return self.qkv, self.o, self.gate_up, self.down


@dataclass(frozen=True)
class ModelSizes:
    """Everything that memory depends on, but for the batch.

    Attributes:
        layers: of the decoder.
        heads: H, of the queries.
        vocabulary: V.
        other_weights: embedding, head, norms, biases; a tied weight once.
        trained: values of the adapter.
        value: bytes of a number in `dtype`.
        four_bit: the layers' weights are NF4 or FP4.
        eight_bit: they are int8.
        parts: of how many processes each holds one part of the weights, and gathers a layer at a
            time; 1 where each holds all.
        fp8: two 8-bit copies of the layers' weights are kept.
        kernels: our kernels run; otherwise plain torch, which keeps and copies more.
        dropout: whether features are dropped before A.
    """

    layers: tuple[LayerSizes, ...]
    heads: int
    vocabulary: int
    other_weights: int
    trained: int
    value: int
    four_bit: bool = False
    eight_bit: bool = False
    parts: int = 1
    fp8: bool = False
    kernels: bool = True
    dropout: bool = False

    @property
    def expanded(self) -> bool:
        """Whether weights are laid into a buffer for each product."""
        return self.four_bit or self.eight_bit or self.parts > 1

    @property
    def width(self) -> int:
        """d."""
        return self.layers[0].qkv.inputs

    def roomy(self, group: GroupSizes) -> bool:
        """Whether the group's inputs and weights have room for its adapters."""
        return self.kernels and self.value == 2 and not self.fp8 and group.aligned

    def input_width(self, group: GroupSizes) -> int:
        """Values of one row of the group's input, room included."""
        return group.pitch if self.roomy(group) else group.inputs

    def matrix(self, group: GroupSizes) -> int:
        """Values of the group's dense matrix, margins included."""
        rows = group.outputs + (group.rows if self.roomy(group) else 0)
        return rows * self.input_width(group)


class Load(NamedTuple):
    """One pass: N positions, of which U are asked for."""

    positions: int
    asked: int


def weight_bytes(sizes: ModelSizes) -> int:
    """The frozen weights: those of the layers in `dtype` or quantised, all others in `dtype`.

    Cut into parts there are, besides one part, the head and some layers whole: one that works and
    those that are fetched ahead.
    """
    each = NF4_BITS / 8 if sizes.four_bit else 1.0 if sizes.eight_bit else sizes.value
    layers = [each * sum(group.weights for group in layer.groups) for layer in sizes.layers]
    found = math.ceil(sum(layers)) + sizes.other_weights * sizes.value
    if sizes.parts == 1:
        return found
    head = sizes.vocabulary * sizes.width * sizes.value
    gathered = min(LIVE_LAYERS, len(layers)) * max(layers) + head
    return min(found, math.ceil(found / sizes.parts + gathered))


def fixed_bytes(sizes: ModelSizes) -> int:
    """What lives for the whole run: weights, adapter, gradients, AdamW, the expansion's buffer."""
    groups = [group for layer in sizes.layers for group in layer.groups]
    found = weight_bytes(sizes) + 4 * sizes.trained * VALUE_BYTES
    if sizes.expanded:  # one buffer, as large as the largest group, for all layers
        found += max(sizes.matrix(group) for group in groups) * sizes.value
    else:
        found += sum(sizes.matrix(group) - group.weights for group in groups) * sizes.value
    if sizes.fp8:
        found += 2 * sum(group.weights for group in groups)
    return found


def kept_bytes(sizes: ModelSizes, layer: LayerSizes, keep: Keep, load: Load, *, last: bool) -> int:
    """What one layer leaves for its backward pass.

    A position of the attention block: total d, qkv (H + 2G) D, attended H D in `dtype`, 1/rms in
    float32, and, with qkv, attention's log-sum-exp, H float32. One of the MLP block: total d,
    gate_up 2F, 1/rms. Of an adapter z, dropout's mask, and, where they do not stand in margins of a
    dense matrix, its factors in `dtype`. In the last layer all after attention has U positions
    instead of N.
    """
    value, width = sizes.value, layer.qkv.inputs
    qkv, o, gate_up, down = layer.groups
    first = width * value + 4
    if keep.qkv:
        first += qkv.outputs * value + 4 * sizes.heads
        if keep.attended or not sizes.kernels:
            first += sizes.input_width(o) * value
        if not sizes.kernels:
            # torch's graph: q, k and v of each segment are views, its result and log-sum-exp not.
            first += o.inputs * value
    second = width * value + 4
    if keep.gate_up:
        second += gate_up.outputs * value
    factors = 0
    counts = [load.positions] * 4
    if last:
        counts[1:] = [load.asked] * 3
    found = first * counts[0] + second * counts[2]
    for group, count in zip((qkv, o, gate_up, down), counts, strict=True):
        if group.rows:
            found += (group.rows * value + sizes.dropout * group.inputs) * count
            if sizes.expanded or not sizes.roomy(group):
                factors += (group.rows * group.inputs + group.outputs * group.columns) * value
    return found + factors


def forward_bytes(
    sizes: ModelSizes, layer: LayerSizes, keep: Keep, load: Load, *, last: bool
) -> int:
    """The most that lives beside what is kept, in one layer's forward pass."""
    width = layer.qkv.inputs
    attention = 2 * width + sizes.input_width(layer.qkv)
    if not keep.qkv:
        attention += layer.qkv.outputs + layer.o.inputs
    elif not keep.attended:
        attention += layer.o.inputs
    mlp = 2 * width + sizes.input_width(layer.gate_up) + sizes.input_width(layer.down)
    if not keep.gate_up:
        mlp += layer.gate_up.outputs
    if not sizes.kernels:
        mlp += layer.down.inputs  # silu(g) before it is multiplied
    asked = load.asked if last else load.positions
    found = sizes.value * max(attention * load.positions, mlp * asked)
    return found + _dropped(sizes, layer, load)


def backward_bytes(
    sizes: ModelSizes, layer: LayerSizes, keep: Keep, load: Load, *, last: bool
) -> int:
    """The most that lives beside what is kept, in one layer's backward pass.

    MLP: the gradients of x and δ, da F, d[g | u] 2F and a F where D is adapted; what is computed
    again. Attention: the gradients of x and δ, of attended H D, of [q | k | v], of normed, of x;
    what is computed again.
    """
    value, width, inner = sizes.value, layer.qkv.inputs, layer.down.inputs
    qkv, o, gate_up, down = layer.groups
    again = 0 if keep.gate_up else gate_up.outputs + width
    early = inner + gate_up.outputs + (inner if down.rows else 0)
    if not sizes.kernels:
        early += 4 * inner  # σ(g), silu(g) and the terms of dg, one by one
    mlp = 2 * width + again + max(early, gate_up.outputs + 2 * width)
    again = 0 if keep.qkv else width + qkv.outputs
    again += 0 if keep.qkv and keep.attended else o.inputs
    attention = 4 * width + again + 2 * o.inputs + qkv.outputs
    if not sizes.kernels:
        attention += 2 * qkv.outputs + o.inputs  # the graph's gradients, part by part
    asked = load.asked if last else load.positions
    attention_bytes = (attention * value + 4 * sizes.heads) * load.positions
    if not sizes.kernels:  # the norms' gradient is made in float32, term by term
        attention_bytes = max(attention_bytes, (4 * width * value + 20 * width) * load.positions)
    return max(mlp * value * asked, attention_bytes) + _dropped(sizes, layer, load)


def _dropped(sizes: ModelSizes, layer: LayerSizes, load: Load) -> int:
    """Dropout draws a float32 for each feature, and copies the input without what was dropped."""
    if not sizes.dropout:
        return 0
    inputs = max((group.inputs for group in layer.groups if group.rows), default=0)
    return inputs * 4 * load.positions


def head_bytes(sizes: ModelSizes, load: Load) -> int:
    """Logits [U, V] in `dtype`, over which our kernel writes their gradient; torch takes copies."""
    each = sizes.value if sizes.kernels else sizes.value + 8
    return load.asked * (sizes.vocabulary * each + 4 * sizes.width * sizes.value)


def batch_bytes(sizes: ModelSizes, load: Load) -> int:
    """Ids, positions, routing, and the rotations' cos and sin, float32 D/2 each."""
    head_dim = sizes.layers[0].o.inputs // sizes.heads
    return load.positions * (4 * head_dim + 64)


def peak_bytes(sizes: ModelSizes, recompute: Recompute, load: Load) -> int:
    """The most that the tensors of one pass take together."""
    return sum(peak_parts(sizes, recompute, load).values())


def peak_parts(sizes: ModelSizes, recompute: Recompute, load: Load) -> dict[str, int]:
    """What the tensors of one pass take at its fullest moment, by what they are.

    Returns:
        `weights`, `adapter`, `gradients`, `moments` (AdamW's two), `buffers` (margins, expanded and
        8-bit weights), `batch`, `activations` (kept so far for the backward pass), and of `logits`
        and `workspace` (of one block) the one that is there at that moment; the other is 0.
    """
    keeps = keep_of(recompute, len(sizes.layers))
    kept, most = 0, (0, 0)  # kept so far, working
    last = len(sizes.layers) - 1
    for number, (layer, keep) in enumerate(zip(sizes.layers, keeps, strict=True)):
        is_last = number == last
        kept += kept_bytes(sizes, layer, keep, load, last=is_last)
        for one in (forward_bytes, backward_bytes):
            most = max(most, (kept, one(sizes, layer, keep, load, last=is_last)), key=sum)
    logits = head_bytes(sizes, load)
    in_head = kept + logits > sum(most)
    weights, value = weight_bytes(sizes), sizes.trained * VALUE_BYTES
    return {
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
    from mtl_lora_cli.kernels.tiles import LARGEST_DIM

    layers = tuple(
        LayerSizes(
            qkv=_group(attention.q_proj, attention.k_proj, attention.v_proj),
            o=_group(attention.o_proj),
            gate_up=_group(mlp.gate_proj, mlp.up_proj),
            down=_group(mlp.down_proj),
        )
        for attention, mlp in ((one.self_attn, one.mlp) for one in model.base_model.layers)
    )
    inside = sum(group.weights for layer in layers for group in layer.groups)
    trained = adapter.parameter_count()
    head_dim = model.base_model.layers[0].self_attn.head_dim
    return ModelSizes(
        layers=layers,
        heads=model.config.num_attention_heads,
        vocabulary=model.config.get_text_config().vocab_size,
        other_weights=sum(p.numel() for p in model.parameters()) - trained - inside,
        trained=trained,
        value=value,
        four_bit=quantization in ("nf4", "fp4"),
        eight_bit=quantization == "int8",
        parts=parts,
        fp8=base_compute == "fp8",
        kernels=on_card and value == 2 and head_dim <= LARGEST_DIM,
        dropout=adapter.config.dropout > 0,
    )


def _group(*layers: Any) -> GroupSizes:
    bases = [getattr(layer, "base_layer", layer) for layer in layers]
    factors = [layer.factors(None) for layer in layers if layer not in bases]
    return GroupSizes(
        inputs=bases[0].in_features,
        outputs=sum(base.out_features for base in bases),
        rows=sum(down.shape[0] * down.shape[1] for down, _ in factors),
        columns=sum(up.shape[0] * up.shape[2] for _, up in factors),
    )
