"""A decoder over packed rows by its family's plan, built of the blocks beside this file.

It reads the weights of the transformers model that it is made from, and leaves that model as it is:
the same parameters, the same adapted layers. What it saves is time and memory: one product for q, k
and v, one for gate and up, norms and additions in one kernel, nothing kept that nobody needs, and in
the last layer no work after attention where no answer is asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from mtl_lora_cli.adapters.frozen import FrozenWeights, is_plain
from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.adapters.layer import MultiTaskLinear, TaskLayer
from mtl_lora_cli.adapters.routing import Slots
from mtl_lora_cli.engine import aside
from mtl_lora_cli.engine.angles import Angles
from mtl_lora_cli.engine.attention import Packing, pick_way, table_keys
from mtl_lora_cli.engine.attention_block import AttentionBlock
from mtl_lora_cli.engine.experts_block import ExpertsBlock
from mtl_lora_cli.engine.families import plan_of
from mtl_lora_cli.engine.halves import Begin, ExpertsHalf, Layer, MixerHalf, norm_of
from mtl_lora_cli.engine.margins import Margins
from mtl_lora_cli.engine.mixer_block import MixerBlock
from mtl_lora_cli.engine.mixings import mixing_of_groups
from mtl_lora_cli.engine.mlp_block import MlpBlock
from mtl_lora_cli.engine.plan import (
    ExpertsPlan,
    NotPlanned,
    Plan,
    QueryScale,
    RotaryPlan,
    missing_modules,
    text_body,
    towers_of,
)
from mtl_lora_cli.engine.saved import Keep, Pass, Saved, both_gradients, entry_of, opened
from mtl_lora_cli.engine.segment_forms import Rule
from mtl_lora_cli.engine.segments import Segments

_QKV = 0


@dataclass(frozen=True)
class Deeper:
    """What is added to the stream behind the first layers, at some positions (DeepStack, arXiv 2406.04334).

    Attributes:
        places: int64 [K].
        levels: [K, d] for each of the first layers.
    """

    places: Tensor
    levels: Sequence[Tensor]

    def added(self, number: int, x: Tensor, positions: Tensor | None) -> Tensor:
        """The stream behind a layer with what belongs to it.

        Args:
            number: of the layer.
            x: [N, d], or, of the last layer, [U, d].
            positions: int64 [U], those that x has; None: all.
        """
        if number >= len(self.levels):
            return x
        level = self.levels[number].to(x.dtype)
        if positions is None:
            return x.index_add(0, self.places, level)
        here = (positions[:, None] == self.places).to(x.dtype)
        return x + here @ level


LayerCall = Callable[..., tuple[Tensor, Tensor]]  # of `Pass`, mixings, x and o


def obstacle(model: Any, adapter: Adapter | None) -> str | None:
    """Why the blocks cannot stand for the model's own layers, or None where they can."""
    try:
        plan = plan_of(model.config)
    except NotPlanned as reason:
        return str(reason)
    missing = next(missing_modules(plan, model), None)
    if missing is not None:
        return f"no module '{missing}', which its family's plan names"
    if adapter is not None and adapter.config.scales_rows:
        return (
            f"method {adapter.config.method} scales the rows of frozen and trained weights together"
        )
    return None if adapter is None else _misplaced(plan, model, adapter)


def _misplaced(plan: Plan, model: Any, adapter: Adapter) -> str | None:
    """What of an adapter the blocks cannot compute."""
    towers = towers_of(model)
    layers = adapter.layers.items()
    paths = {id(layer): path for path, layer in layers if not path.startswith(towers)}
    paths.pop(id(model.get_output_embeddings()), None)
    mixed = None
    for module, layer in zip(plan.modules(model), plan.layers, strict=True):
        if isinstance(layer.mlp, ExpertsPlan):
            stack = module.get_submodule(layer.mlp.stack)
            for one in stack.children():
                path = paths.pop(id(one), None)
                # The block weighs an expert's activation before its down-projection, which a gate would see.
                if path is not None and cast(TaskLayer, one).config.spread == "token":
                    mixed = f"an adapter on experts whose gate reads the token ({path})"
        for group in layer.groups:
            projections = [module.get_submodule(path) for path in group]
            adapted = [one for one in projections if paths.pop(id(one), None) is not None]
            if len({_way_of(cast(MultiTaskLinear, one)) for one in adapted}) > 1:
                mixed = f"ways of mixing that differ within {', '.join(group)} of one layer"
    outside = next(iter(paths.values()), None)
    return mixed if outside is None else f"an adapter on {outside}"


def _way_of(layer: TaskLayer) -> tuple[Any, ...]:
    """What layers of one input have in common where they are multiplied together; ranks may differ."""
    config = layer.config
    gate = (config.ups, config.tau) if config.spread == "token" else ()
    return "own" if config.spread == "same" else config.spread, config.dropout, *gate


class FusedDecoder:
    """See the module.

    Args:
        model: a transformers causal language model for which `obstacle` is None.
        resident: the weights stay in memory; see `FrozenWeights.lay_together`.

    Attributes:
        plan: what it computes.
        modules: the transformers model's own layers, in whose place it stands.
        resident: as given.
        layer_calls: run one layer each. Where weights do not stay, somebody else's callables around
            these bring them before and take them away behind.
        angles: of each rotary embedding.
        last: the end of the stream: what is still to be added, and the last norm.
    """

    def __init__(self, model: Any, *, resident: bool = True) -> None:
        self.plan = plan_of(model.config)
        self.resident = resident
        self._base: Any = text_body(model)
        self.modules = self.plan.modules(model)
        self.layers: list[Layer] = []
        end = None
        for module, plan in zip(self.modules, self.plan.layers, strict=True):
            self.layers.append(Layer.of(module, plan, end, resident=resident))
            end = self.layers[-1].mlp.end
        self.layer_calls: list[LayerCall] = [partial(_run_layer, layer) for layer in self.layers]
        self._margins = Margins([group for layer in self.layers for group in layer.groups])
        self._kinds = list(self.plan.attentions)
        self.angles = {plan: Angles(self._base, plan) for plan in self.plan.rotaries}
        last = norm_of(self._base.get_submodule(self.plan.norm.path), self.plan.norm)
        self.last = Begin(last, end)

    def leave_expanded(self, count: int) -> None:
        """Keep the first layers' quantised weights as dense matrices, too, from now on; bits stay the same.

        Args:
            count: of layers.
        """
        for layer in self.layers[:count]:
            for group in layer.groups:
                group.frozen.leave_expanded()

    def fixed_shapes(self) -> bool:
        """Whether a pass launches the same kernels whatever the segments are, up to `Plan.limit`.

        And whether it waits for none of them, as experts do where torch has no grouped product of their sizes.
        """
        mixtures = [layer.mlp for layer in self.layers if isinstance(layer.mlp, ExpertsHalf)]
        waits = any(one.gate_up.asks_back or one.down.asks_back for one in mixtures)
        if self.plan.recurrent or waits:
            return False
        embedding = self._base.get_input_embeddings().weight  # in the dtype of the stream
        return all(pick_way(embedding, plan) == "triton" for plan in self._kinds)

    @property
    def width(self) -> int:
        """d."""
        return int(self._base.get_input_embeddings().weight.shape[1])

    def tables(self) -> list[tuple[int, bool]]:
        """The tile tables that a pass on our kernels reads; see `Segments.tiles`."""
        return table_keys({plan.head_dim for plan in self._kinds})

    def round_to_fp8(self) -> None:
        """Multiply with all frozen weights in 8-bit floats from now on (`kernels/fp8.py`)."""
        for weights in self._frozen:
            weights.round_to_fp8()

    def let_go(self, model: nn.Module) -> list[str]:
        """After `round_to_fp8`, free the layers' weights in their own dtype; see `FrozenWeights.let_go`.

        Those stay that are quantised, that learn, or that another module reads, too.

        Args:
            model: the whole model.

        Returns:
            The names of those that stay.
        """
        named = list(model.named_parameters(remove_duplicate=False))
        uses = Counter(id(parameter) for _, parameter in named)
        stay = set()
        for weights in self._frozen:
            if all(is_plain(layer) and uses[id(layer.weight)] == 1 for layer in weights.layers):
                weights.let_go()
            else:
                stay |= {id(layer.weight) for layer in weights.layers}
        return [name for name, parameter in named if id(parameter) in stay]

    @property
    def _frozen(self) -> list[FrozenWeights]:
        return [group.frozen for layer in self.layers for group in layer.groups]

    @contextmanager
    def exactly(self) -> Iterator[None]:
        """Inside the block the products are not rounded to 8-bit floats."""
        for weights in self._frozen:
            weights.exact = True
        try:
            yield
        finally:
            for weights in self._frozen:
                weights.exact = False

    def embed(self, input_ids: Tensor) -> Tensor:
        """What the layers begin with where nothing else is put in its place: int64 [1, N] → [N, d]."""
        return self.scaled(self.looked_up(input_ids))

    def looked_up(self, input_ids: Tensor) -> Tensor:
        """Rows of the embedding, int64 [1, N] → [N, d]."""
        return cast(Tensor, self._base.get_input_embeddings()(input_ids)[0])

    def scaled(self, x: Tensor) -> Tensor:
        """What the layers begin with, of embeddings [N, d] of text and of whatever else."""
        scale = self.plan.embedding_multiplier
        return x if scale == 1.0 else x * scale

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor,
        segments: Segments,
        positions: Tensor,
        slots: Slots,
        chosen_slots: Slots,
        *,
        training: bool,
        keep: Sequence[Keep],
        told: Callable[[int, Tensor], None] | None = None,
        grid: Tensor | None = None,
        deeper: Deeper | None = None,
    ) -> Tensor:
        """Normed hidden states at the positions asked for.

        Args:
            x: embeddings [N, d], see `embed`; of pictures, too.
            position_ids: int64 [1, N].
            segments: of the N positions.
            positions: int64 [U].
            slots, chosen_slots: routing of all positions, and of those asked for.
            training: dropout is on.
            keep: what each layer keeps for the backward pass.
            told: is told each layer's number and its [q | k | v], normed and turned.
            grid: int64 [G, 1, N], where positions have several dimensions; None: all are those of `position_ids`.
            deeper: what is added to the stream behind the first layers.

        Returns:
            [U, d].
        """
        learn = torch.is_grad_enabled()
        packings = self._packings(x, position_ids, segments, grid)
        out = None
        self._margins.write()
        mixings = self.mixings(slots, chosen_slots)
        for number in range(len(self.layers)):
            last = number + 1 == len(self.layers)
            own = Pass(
                slots=slots,
                segments=segments,
                packing=packings.get(self.plan.layers[number].attention),
                positions=positions if last else None,
                chosen_slots=chosen_slots if last else slots,
                keep=keep[number],
                training=training,
                learn=learn,
                told=None if told is None else partial(told, number),
            )
            x, out = self.layer_calls[number](own, mixings[number], x, out)
            if deeper is not None:
                x = deeper.added(number, x, positions if last else None)
        normed = _FinalNorm.apply(self.last, learn, x, out)
        scale = self.plan.logit_multiplier
        return normed if scale == 1.0 else normed * scale

    def capped(self, logits: Tensor) -> Tensor:
        """c tanh(z / c), where the family has a soft cap over logits."""
        cap = self.plan.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _packings(
        self, x: Tensor, position_ids: Tensor, segments: Segments, grid: Tensor | None
    ) -> dict[Any, Packing]:
        """Attention's view of the positions, for each kind of layer."""
        wide = torch.empty(0, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        angles: dict[RotaryPlan | None, tuple[Tensor | None, Tensor | None]] = {None: (None, None)}
        for rotary in self.plan.rotaries:
            places = position_ids if grid is None or rotary.grids == 1 else grid
            angles[rotary] = self.angles[rotary](wide, places, segments)
        found: dict[Any, Packing] = {}
        for plan in self._kinds:
            cos, sin = angles[plan.rotary]
            found[plan] = Packing(
                heads=plan.heads,
                key_heads=plan.key_heads,
                head_dim=plan.head_dim,
                scaling=plan.scaling,
                cos=cos,
                sin=sin,
                segments=segments,
                way="torch"
                if segments.blocks_of(Rule(plan.window)) is not None
                else pick_way(x, plan),
                window=plan.window,
                softcap=plan.softcap,
                pairs=plan.rotary is not None and plan.rotary.pairs,
                query_scale=_query_scale(plan.query_scale, position_ids[0]),
            )
        return found

    def mixings(self, slots: Slots, chosen_slots: Slots) -> list[list[Tensor | None]]:
        """M [J, P, m, k] of every group of every layer, made together."""
        found: list[list[Tensor | None]] = [[None] * len(layer.carriers) for layer in self.layers]
        last = len(self.layers) - 1
        # The last layer's later groups see the chosen positions, where fewer tasks may be present.
        places: dict[tuple[Any, bool], list[tuple[int, int]]] = {}
        for number, layer in enumerate(self.layers):
            for place, group in enumerate(layer.carriers):
                if group.adapted:
                    kinds = tuple(dict.fromkeys(one.kind for one in group.adapted))
                    if len(kinds) > 1:  # which of them has which
                        kinds = tuple(one.kind for one in group.adapted)
                    key = (kinds, number == last and place != _QKV)
                    places.setdefault(key, []).append((number, place))
        for (_, chosen), some in places.items():
            own = chosen_slots if chosen else slots
            if own.count == 0:
                continue
            groups = [self.layers[number].carriers[place] for number, place in some]
            parts = aside.joined(mixing_of_groups(groups, own))
            for (number, place), part in zip(some, parts, strict=True):
                found[number][place] = part
        return found


def _query_scale(plan: QueryScale | None, positions: Tensor) -> Tensor | None:
    """1 + β log(1 + ⌊p / limit⌋) of each position, float32 [N]; None where all are 1."""
    if plan is None or len(positions) <= plan.limit:
        return None
    return 1 + plan.beta * torch.log1p(torch.floor(positions / plan.limit))


class _FinalNorm(torch.autograd.Function):
    """norm(x + δ(o)), the last step of the stream: [U, d]."""

    @staticmethod
    def forward(ctx: Any, begin: Begin, learn: bool, x: Tensor, out: Tensor) -> Tensor:
        entry, normed = begin.forward(x, out, 0)
        if learn:
            saved = Saved(ctx)
            saved.add_entry(entry)
            saved.close()
            ctx.begin = begin
        return normed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dnormed: Tensor) -> tuple[Tensor | None, ...]:
        both = ctx.begin.gradient(dnormed.contiguous(), None, entry_of(opened(ctx)))
        return None, None, *both_gradients(ctx, both, 2)


def _run_layer(
    layer: Layer, own: Pass, mixings: Sequence[Tensor | None], x: Tensor, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The stream, and the layer's output that has yet to be added to it."""
    qkv, o, *others = mixings
    first, second = layer.attention, layer.mlp
    first_block = MixerBlock if isinstance(first, MixerHalf) else AttentionBlock
    x, out = first_block.apply(
        first, own, x, out,
        *first.qkv.tensors(qkv, own.slots), *first.o.tensors(o, own.chosen_slots),
    )  # fmt: skip
    block = ExpertsBlock if isinstance(second, ExpertsHalf) else MlpBlock
    each = zip(second.carriers, others, strict=True)
    tensors = [one for group, mixing in each for one in group.tensors(mixing, own.chosen_slots)]
    x, out = block.apply(second, own, x, out, *tensors)
    # The output has its share from the end of its block.
    return x if layer.scale == 1.0 else x * layer.scale, out
