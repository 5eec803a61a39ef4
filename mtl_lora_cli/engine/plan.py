"""What a decoder-only model computes, layer by layer: all that the fused engine knows of a family.

    x ← m_e · embedding
    x ← x + m · after(O(attention(QKV(before x))))        for each layer
    x ← x + m · after(D(f(G before x) ⊙ (U before x)))
    log p = log softmax(cap(m_l · head(last x)))

A family (`families/NAME.py`) makes a plan of a configuration. The blocks compute what it says; memory,
ZeRO, GGUF files and `bench` read sizes and names from it. Paths are those of modules inside a layer,
of the last norm and of rotary embeddings those inside the body.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import nn

from mtl_lora_cli.adapters.frozen_stack import is_stack, stack_shape
from mtl_lora_cli.kernels.clamped import Clamped
from mtl_lora_cli.kernels.gated import Activation


class NotPlanned(Exception):
    """A configuration asks for something that no plan can say; the text is what it is."""


@dataclass(frozen=True)
class NormPlan:
    """w ⊙ x / rms(x), or (1 + w) ⊙ x / rms(x).

    Attributes:
        path: of the module that has w as its `weight`.
        eps: ε, added to the mean of squares.
        plus_one: the second form.
    """

    path: str
    eps: float
    plus_one: bool = False


@dataclass(frozen=True)
class RotaryPlan:
    """Which module turns positions into angles.

    Attributes:
        path: of the module, whose forward pass takes x and position ids.
        layer_type: what it takes besides, where one module serves several kinds of layers.
        pairs: neighbours turn together, not the halves of a head; see `kernels/rotary.py`.
        limit: positions of an example beyond which the module takes other frequencies for all of it, as
            `longrope` does.
        halved: the module gives each angle once, not once for each half of a head.
        grids: how many positions the module takes for each token: 3 in models whose pictures have a time, a
            row and a column. In text all are the same.
    """

    path: str = "rotary_emb"
    layer_type: str | None = None
    pairs: bool = False
    limit: int | None = None
    halved: bool = False
    grids: int = 1


@dataclass(frozen=True)
class QueryScale:
    """q of position p is multiplied by 1 + β log(1 + ⌊p / limit⌋), as Llama 4 does it."""

    beta: float
    limit: int


@dataclass(frozen=True)
class AttentionPlan:
    """The first half of a layer.

    Attributes:
        heads, key_heads, head_dim: H, G and D.
        scaling: of the scores.
        qkv: projections whose outputs side by side are [q | k | v]: three, or one that has all; or two, [q | k].
        o: of the projection behind attention.
        before, after: norms of the block's input, and of what it adds to the stream.
        q_norm, k_norm: of queries and keys before they are turned; both or none. Their weights say by
            their length whether each head is normed alone or all heads together.
        rotary: what turns q and k; None: nothing does.
        window: keys that a query sees, its own among them; None: all before it.
        softcap: c, where scores are c tanh(s / c).
        sinks: of the module whose `sinks` [H] are logits that take their share of the softmax and give nothing.
        gates: the first projection gives for each head a query and a gate g beside it; attention's result is
            multiplied by σ(g).
        keys_are_values: v is what the projection gave for k, before the norm of k.
        value_eps: ε of v / rms(v) over each head; None: values are not normed.
        multiplier: m, of what the block adds to the stream.
        query_scale: of queries that stand far behind; None: all are as they are.
    """

    heads: int
    key_heads: int
    head_dim: int
    scaling: float
    qkv: tuple[str, ...]
    o: str
    before: NormPlan | None
    after: NormPlan | None = None
    q_norm: NormPlan | None = None
    k_norm: NormPlan | None = None
    rotary: RotaryPlan | None = RotaryPlan()
    window: int | None = None
    softcap: float | None = None
    sinks: str | None = None
    gates: bool = False
    keys_are_values: bool = False
    value_eps: float | None = None
    multiplier: float = 1.0
    query_scale: QueryScale | None = None

    @property
    def width(self) -> int:
        """(H + 2G) D, of [q | k | v]."""
        return (self.heads + 2 * self.key_heads) * self.head_dim

    @property
    def groups(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Paths of the projections that read one input."""
        return self.qkv, (self.o,)


@dataclass(frozen=True)
class MixerPlan:
    """The first half of a layer whose state runs on from position to position; see `mixer_block.py`.

    Attributes:
        module: of the module whose forward pass is all that lies between the projections.
        qkv: projections of its input, the only ones that read it.
        o: of the projection whose output is the module's.
        working, graph: numbers in float32 that what lies between takes for a position, in a forward pass alone
            and with its backward pass.
        chunk: positions that it takes at a time; an example is filled up to whole multiples.
        before, after, multiplier: as in `AttentionPlan`.
    """

    module: str
    qkv: tuple[str, ...]
    o: str
    working: int
    graph: int
    chunk: int
    before: NormPlan | None
    after: NormPlan | None = None
    multiplier: float = 1.0

    @property
    def groups(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Paths of the projections that read one input."""
        return self.qkv, (self.o,)


@dataclass(frozen=True)
class MlpPlan:
    """The second half of a layer.

    Attributes:
        gate_up: projections whose outputs side by side are [g | u]: two, or one that has both.
        down: of the projection behind the activation.
        activation: f.
        before, after, multiplier: as in `AttentionPlan`.
    """

    gate_up: tuple[str, ...]
    down: str
    activation: Activation
    before: NormPlan | None
    after: NormPlan | None = None
    multiplier: float = 1.0

    @property
    def groups(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Paths of the projections that read one input."""
        return self.gate_up, (self.down,)


@dataclass(frozen=True)
class RouterPlan:
    """Which experts a position asks, and how much each of them counts.

        p = softmax(R h + b) or σ(R h + b),   T = the k experts with the largest p + c
        v_e = f p_e   or   f p_e / (ε + Σ_T p)

    Attributes:
        path: of the module whose `weight` is R [E, d], and whose `bias`, where it has one, is b [E].
        experts: E.
        top: k.
        renormalised: the second form of v.
        scores: softmax or sigmoid.
        correction: name of c [E] in that module, which chooses and does not count; None: 0.
        factor: f.
        epsilon: ε.
        groups, top_groups: the experts stand in groups of equal size; those of the best groups alone are
            asked. A group is as good as its two best experts together.
        wide: R h is computed in float32 whatever h is.
    """

    path: str
    experts: int
    top: int
    renormalised: bool
    scores: Literal["softmax", "sigmoid"] = "softmax"
    correction: str | None = None
    factor: float = 1.0
    epsilon: float = 0.0
    groups: int = 1
    top_groups: int = 1
    wide: bool = False


@dataclass(frozen=True)
class SharedPlan:
    """The MLP of a mixture that every position asks: σ(g h) D(f(G h) ⊙ (U h)), or without σ(g h).

    Attributes:
        gate_up, down, activation: as in `MlpPlan`.
        gate: path of g [1, d]; None: there is none.
    """

    gate_up: tuple[str, ...]
    down: str
    activation: Activation
    gate: str | None = None

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Paths of the projections that read one input."""
        return self.gate_up, (self.down,), *(((self.gate,),) if self.gate else ())


@dataclass(frozen=True)
class ExpertsPlan:
    """The second half of a layer as a mixture of experts; see `experts_block.py`.

    Attributes:
        router: who asks whom.
        stack: of the module with all experts: `gate_up_proj` [E, 2F, d] and `down_proj` [E, d, F], and,
            where they have biases, `gate_up_proj_bias` [E, 2F] and `down_proj_bias` [E, d].
        activation: f; or gpt-oss's, whose gates and ups are neighbours.
        before, after, multiplier: as in `MlpPlan`.
        transposed: the stacks are [E, d, 2F] and [E, F, d].
        shared: what every position asks besides.
    """

    router: RouterPlan
    stack: str
    activation: Activation | Clamped
    before: NormPlan | None
    after: NormPlan | None = None
    multiplier: float = 1.0
    transposed: bool = False
    shared: SharedPlan | None = None

    @property
    def top(self) -> int:
        """Experts that a position asks."""
        return self.router.top

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Projections of one input that are linear layers: those of the shared MLP."""
        return self.shared.groups if self.shared else ()


@dataclass(frozen=True)
class LayerPlan:
    """One decoder layer.

    Attributes:
        attention, mlp: its two halves.
        scale: name of the layer's own number by which the whole stream is multiplied behind it; None: 1.
    """

    attention: AttentionPlan | MixerPlan
    mlp: MlpPlan | ExpertsPlan
    scale: str | None = None

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Projections of one input each, by path: qkv, o, gate and up, down, as far as linear layers."""
        return (*self.attention.groups, *self.mlp.groups)


@dataclass(frozen=True)
class Plan:
    """A whole decoder.

    Attributes:
        layers: in their order.
        norm: the last one.
        layers_path: of the list of layers in the body.
        embedding_multiplier: m_e, where the embedding's own module does not apply it.
        logit_multiplier: m_l.
        logit_softcap: c of c tanh(z / c) over the logits.
    """

    layers: tuple[LayerPlan, ...]
    norm: NormPlan
    layers_path: str = "layers"
    embedding_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    logit_softcap: float | None = None

    @property
    def projections(self) -> tuple[str, ...]:
        """Last parts of the projections' paths, each once, attention's before the MLP's."""
        paths = [path for layer in self.layers for group in layer.groups for path in group]
        return tuple(dict.fromkeys(path.rpartition(".")[2] for path in paths))

    @property
    def limit(self) -> int | None:
        """Positions beyond which some rotary embedding is another one; None where none ever is."""
        return min((one.limit for one in self.rotaries if one.limit is not None), default=None)

    @property
    def rotaries(self) -> tuple[RotaryPlan, ...]:
        """All that turn queries and keys of some layer."""
        some = [plan.rotary for plan in self.attentions]
        return tuple(dict.fromkeys(rotary for rotary in some if rotary is not None))

    @property
    def attentions(self) -> tuple[AttentionPlan, ...]:
        """The first halves that are attention, each kind once."""
        halves = [layer.attention for layer in self.layers]
        return tuple(dict.fromkeys(half for half in halves if isinstance(half, AttentionPlan)))

    @property
    def recurrent(self) -> bool:
        """Whether some layer's state runs on from position to position."""
        return any(isinstance(layer.attention, MixerPlan) for layer in self.layers)

    def modules(self, model: Any) -> list[nn.Module]:
        """The model's own layers that the plan describes."""
        return list(cast(Any, text_body(model).get_submodule(self.layers_path)))


def text_body(model: Any) -> nn.Module:
    """The part of a causal language model, or of a wrapper around one, whose output its head reads."""
    config = model.config
    if config.get_text_config() is not config and hasattr(model, "get_decoder"):
        return cast(nn.Module, model.get_decoder())
    return cast(nn.Module, model.base_model)


def towers_of(model: Any) -> tuple[str, ...]:
    """How paths begin of what stands beside the part that reads text, within what is around both."""
    body, names = text_body(model), {id(module): name for name, module in model.named_modules()}
    around = names.get(id(body), "").rpartition(".")[0]
    if not around:
        return ()
    beside = model.get_submodule(around).named_children()
    return tuple(f"{around}.{name}." for name, module in beside if module is not body)


def matrix_weights(model: Any) -> tuple[int, int]:
    """Weights that take part in matrix products of the text part: those of its layers, and of the head.

    A model with or without adapters, quantised or not.
    """
    head = model.get_output_embeddings()
    head = getattr(head, "base_layer", head)
    layers = [
        module.in_features * module.out_features
        for module in text_body(model).modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    # Of stacked experts a position meets some alone.
    for module in text_body(model).modules():
        stack = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
        if all(isinstance(one, nn.Parameter) and is_stack(one) for one in stack):
            config = model.config.get_text_config()
            each = sum(math.prod(stack_shape(one)[1:]) for one in cast(Any, stack))
            layers.append(each * int(getattr(config, "num_experts_per_tok", 1)))
    return sum(layers), head.in_features * head.out_features if isinstance(head, nn.Linear) else 0


def missing_modules(plan: Plan, model: Any) -> Iterator[str]:
    """Paths of the plan at which the model has no module, or no such number of layers."""
    body = text_body(model)
    named = {name for name, _ in body.named_modules()}
    if plan.layers_path not in named:
        yield plan.layers_path
        return
    layers = plan.modules(model)
    if len(layers) != len(plan.layers):
        yield f"{plan.layers_path}.{min(len(layers), len(plan.layers))}"
        return
    yield from (r.path for r in plan.rotaries if r.path not in named)
    yield from (p for p in (plan.norm.path,) if p not in named)
    for number, layer in enumerate(plan.layers):
        for path in _paths(layer):
            if f"{plan.layers_path}.{number}.{path}" not in named:
                yield f"{plan.layers_path}.{number}.{path}"


def _paths(layer: LayerPlan) -> Iterator[str]:
    first, mlp = layer.attention, layer.mlp
    for group in layer.groups:
        yield from group
    if isinstance(mlp, ExpertsPlan):
        yield from (mlp.router.path, mlp.stack)
    norms = [first.before, first.after, mlp.before, mlp.after]
    if isinstance(first, MixerPlan):
        yield first.module
    else:
        yield from (path for path in (first.sinks,) if path is not None)
        norms += [first.q_norm, first.k_norm]
    yield from (norm.path for norm in norms if norm is not None)
