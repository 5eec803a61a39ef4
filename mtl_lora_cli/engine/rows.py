"""Rows that grow by one token a step on the fused engine, each by its own task.

What a row's tokens leave, keys and values of every layer, is kept at fixed places. A prompt goes through the
decoder's blocks packed, as in training (`decoder.py`), and its keys and values are put by; from then on a step
takes one token of each row. The layers of a step are those of the blocks without what learning needs, with
the adapters' matrices made once (`kernels/one_token.py`).

On a card a step is a CUDA graph, one for each power of two of rows: nothing in it depends on lengths or tasks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor, nn

from mtl_lora_cli.adapters.routing import slots_of
from mtl_lora_cli.engine.attention import kernels_know
from mtl_lora_cli.engine.decoder import FusedDecoder
from mtl_lora_cli.engine.halves import AttentionHalf, Begin, Layer, MlpHalf
from mtl_lora_cli.engine.plan import (
    AttentionPlan,
    LayerPlan,
    MlpPlan,
    NormPlan,
    Plan,
    RotaryPlan,
)
from mtl_lora_cli.engine.saved import Keep
from mtl_lora_cli.engine.segments import Segments
from mtl_lora_cli.engine.step_group import StepGroup
from mtl_lora_cli.kernels.backend import in_triton
from mtl_lora_cli.kernels.one_token import (
    Added,
    activated,
    attend,
    normed,
    product,
    put_by,
    whole,
)
from mtl_lora_cli.kernels.rotary import Turn
from mtl_lora_cli.kernels.stream import After, enter

_WARM_UP = 2  # steps before one is recorded: kernels are compiled
# Whatever else a plan says is not computed here.
_KNOWN: dict[type, set[str]] = {
    AttentionPlan: {
        "heads", "key_heads", "head_dim", "scaling", "qkv", "o", "before", "after", "q_norm", "k_norm",
        "rotary", "window", "softcap", "multiplier",
    },
    NormPlan: {"path", "eps", "plus_one"},
    RotaryPlan: {"path", "layer_type", "pairs", "limit", "halved"},
    LayerPlan: {"attention", "mlp"},
    MlpPlan: {"gate_up", "down", "activation", "before", "after", "multiplier"},
    Plan: {
        "layers", "norm", "layers_path", "embedding_multiplier", "logit_multiplier", "logit_softcap",
    },
}  # fmt: skip


def obstacle_to_rows(decoder: FusedDecoder, head: nn.Module) -> str | None:
    """Why rows cannot be continued here, or None where they can."""
    layers = decoder.plan.layers
    parts = [part for layer in layers for part in (layer, layer.attention, layer.mlp)]
    unknown = next((what for part in (decoder.plan, *parts) for what in _unknown(part)), None)
    if unknown is not None:
        return unknown
    if type(head) is not nn.Linear:
        return f"an output layer of type {type(head).__name__}"
    if not decoder.resident:
        return "weights that do not stay in memory"
    for group in (group for layer in decoder.layers for group in layer.groups):
        if group.products is not None and group.products.spread_by == "token":
            return "up-projections that are mixed by the token"
    return None


def _unknown(part: Any) -> Iterator[str]:
    known = _KNOWN.get(type(part))
    if known is None:
        yield type(part).__name__
        return
    for field in fields(part):
        if field.name not in known and (
            field.default is MISSING or getattr(part, field.name) != field.default
        ):
            yield f"{type(part).__name__}.{field.name}"
        elif type(getattr(part, field.name)) in (NormPlan, RotaryPlan):
            yield from _unknown(getattr(part, field.name))


@dataclass(frozen=True)
class _StepLayer:
    """A layer's halves with its groups' products."""

    layer: Layer
    groups: tuple[StepGroup, ...]
    turned: Turn | None


class KeptRows:
    """See the module. Everything is done under `torch.inference_mode`.

    Args:
        decoder: of the model.
        head: its output layer.
        tasks: ids of the tasks that rows may have; −1, the base model alone, always may.
        rows: how many there may be at once.
        length: the most tokens of each.

    Attributes:
        rows, length: as given.
    """

    def __init__(
        self, decoder: FusedDecoder, head: nn.Module, tasks: Sequence[int], rows: int, length: int
    ) -> None:
        self._decoder, self._head = decoder, head
        self.tasks = tuple(sorted({task for task in tasks if task >= 0}))
        self.rows, self.length = rows, length
        weight = cast(Tensor, head.weight)
        self._dtype = decoder.embed(torch.zeros(1, 1, dtype=torch.long, device=weight.device)).dtype
        self.device = device = weight.device
        self._slot_of = {task: number for number, task in enumerate(self.tasks)}
        self._slots = slots_of(torch.tensor(self.tasks, dtype=torch.long), device)
        self._places = torch.zeros(rows, dtype=torch.int32, device=device)
        self._slot = torch.full((rows,), -1, dtype=torch.int32, device=device)
        self._tokens = torch.zeros(rows, dtype=torch.long, device=device)
        self._plans = plans = [
            cast(AttentionPlan, layer.attention) for layer in decoder.plan.layers
        ]
        self._blocks: list[Tensor] = []  # [2, layers, rows, G, L, D] of layers of one shape
        self._keys, self._values = self._memory()
        angles = self._angles()
        self._layers = [
            _StepLayer(layer, tuple(map(StepGroup, layer.groups)), angles[plan.rotary])
            for layer, plan in zip(decoder.layers, plans, strict=True)
        ]
        self._learned: list[tuple[int, int]] | None = None
        self._lengths = [0] * rows
        self._graphs: dict[int, tuple[Any, Tensor]] = {}
        probe = torch.empty(0, dtype=self._dtype, device=device)
        self.graphed = probe.is_cuda and in_triton(probe) and _half(self._dtype)
        if not all(map(kernels_know_step, plans)):
            self.graphed = False
        self.learn()

    def _memory(self) -> tuple[list[Tensor], list[Tensor]]:
        """Room for keys and values of each layer, [rows, G, L, D]."""
        shapes = [(plan.key_heads, self.length, plan.head_dim) for plan in self._plans]
        layers = {}
        for shape in dict.fromkeys(shapes):
            size = (2, shapes.count(shape), self.rows, *shape)
            self._blocks.append(torch.zeros(size, dtype=self._dtype, device=self.device))
            layers[shape] = iter(self._blocks[-1].unbind(1))
        found = [next(layers[shape]).unbind(0) for shape in shapes]
        return [keys for keys, _ in found], [values for _, values in found]

    def fits(self, tasks: Collection[int], rows: int, length: int) -> bool:
        """Whether these rows can serve so many of these tasks and lengths, and are not far too many."""
        own = {task for task in tasks if task >= 0}
        return (
            own == set(self.tasks)
            and rows <= self.rows
            and length <= self.length
            and self.rows * self.length <= 8 * max(rows * length, 4096)
        )

    def learn(self) -> None:
        """Take the adapters' tensors as they are now; nothing is done where they are those of the last time."""
        versions = self._versions()
        if versions is not None and versions == self._learned:
            return
        self._learned = versions
        mixings = self._decoder.mixings(self._slots, self._slots)
        for layer, own in zip(self._layers, mixings, strict=True):
            for group, mixing in zip(layer.groups, own, strict=True):
                group.learn(mixing, self._slots, self._dtype)

    def _versions(self) -> list[tuple[int, int]] | None:
        """What changes where an adapter's tensor does; None where nothing says so."""
        groups = (group for layer in self._decoder.layers for group in layer.groups)
        layers = (layer for group in groups for layer in group.adapted)
        tensors = [tensor for layer in layers for tensor in layer.own_tensors()]
        if any(tensor.is_inference() for tensor in tensors):
            return None
        return [(tensor.data_ptr(), tensor._version) for tensor in tensors]

    def begin(
        self, prompts: Sequence[list[int]], tasks: Sequence[int], rows: Sequence[int]
    ) -> Tensor:
        """Logits [len(rows), V] behind prompts that are put at these rows.

        Args:
            prompts: tokens of each. Equal ones of one task are read once.
            tasks: of each.
            rows: the numbers of the rows, in the order of the prompts.
        """
        first: dict[tuple[int, tuple[int, ...]], int] = {}
        number_of = [
            first.setdefault((task, tuple(prompt)), len(first))
            for prompt, task in zip(prompts, tasks, strict=True)
        ]
        distinct = list(first)
        lengths = [len(prompt) for _, prompt in distinct]
        starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
        source, target, place = [], [], []
        for number, row in zip(number_of, rows, strict=True):
            count = lengths[number]
            source.append(torch.arange(starts[number], starts[number] + count))
            target.append(torch.full((count,), row))
            place.append(torch.arange(count))
        moved = [torch.cat(some).to(self.device) for some in (source, target, place)]
        hidden = self._packed(distinct, lengths, starts, *moved)
        self._set(rows, [lengths[number] for number in number_of], tasks)
        logits = self._logits(hidden)
        return logits[torch.tensor(number_of, device=self.device)]

    def _packed(
        self,
        distinct: Sequence[tuple[int, tuple[int, ...]]],
        lengths: Sequence[int],
        starts: Sequence[int],
        source: Tensor,
        target: Tensor,
        place: Tensor,
    ) -> Tensor:
        """Hidden states behind packed prompts, whose keys and values are put by."""
        device = self.device
        ids = [torch.full((len(prompt),), task) for task, prompt in distinct]
        tokens = [token for _, prompt in distinct for token in prompt]
        positions = torch.cat([torch.arange(count) for count in lengths])
        ends = torch.tensor(starts[1:]) - 1

        def told(number: int, qkv: Tensor) -> None:
            plan = self._plans[number]
            heads, groups, dim = plan.heads, plan.key_heads, plan.head_dim
            each = qkv[source, heads * dim : (heads + 2 * groups) * dim]
            keys, values = each.unflatten(1, (2, groups, dim)).unbind(1)
            self._keys[number][target, :, place] = keys
            self._values[number][target, :, place] = values

        whole_ids = torch.cat(ids)
        return self._decoder.forward(
            self._decoder.embed(torch.tensor([tokens], device=device)),
            positions[None].to(device),
            Segments.build(list(lengths)).to(device),
            ends.to(device),
            slots_of(whole_ids, device),
            slots_of(whole_ids[ends], device),
            training=False,
            keep=[Keep()] * len(self._layers),
            told=told,
        )

    def _set(self, rows: Sequence[int], lengths: Sequence[int], tasks: Sequence[int]) -> None:
        """Where the next token of these rows goes, and whose they are."""
        slots = [self._slot_of.get(task, -1) for task in tasks]
        at = torch.tensor(list(rows), device=self.device)
        self._places[at] = torch.tensor(list(lengths), dtype=torch.int32, device=self.device)
        self._slot[at] = torch.tensor(slots, dtype=torch.int32, device=self.device)
        for row, length in zip(rows, lengths, strict=True):
            self._lengths[row] = length

    def feed(self, rows: Sequence[int], tokens: Tensor) -> None:
        """The tokens, int64 [len(rows)] on the device, that these rows go on with."""
        if isinstance(rows, range):
            self._tokens[rows.start : rows.stop] = tokens
        else:
            self._tokens[torch.tensor(rows, device=self.device)] = tokens

    def move(self, source: int, target: int) -> None:
        """Put one row in the place of another one."""
        length = self._lengths[source]
        for block in self._blocks:
            block[:, :, target, :, :length] = block[:, :, source, :, :length]
        for state in (self._places, self._slot, self._tokens):
            state[target] = state[source]
        self._lengths[target] = length

    def step(self, count: int, *, often: bool = True) -> Tensor:
        """Logits [count, V] behind the tokens that the first rows were fed; valid until the next step.

        Args:
            count: of rows.
            often: many steps will follow: recording one is worth its time.
        """
        padded = min(self.rows, 1 << (count - 1).bit_length())
        graph = self._graphs.get(padded)
        if graph is None and often and self.graphed:
            graph = self._graphs[padded] = self._recorded(padded)
        if graph is not None:
            graph[0].replay()
            logits = graph[1]
        else:
            logits = self._step(count)
        for row in range(count):
            self._lengths[row] += 1
        return logits[:count]

    def _recorded(self, count: int) -> tuple[Any, Tensor]:
        """A step of so many rows as a graph; rows come out of it as they were."""
        places = self._places.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._step(count)
                self._places.copy_(places)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._step(count)
        self._places.copy_(places)
        return graph, logits

    def _step(self, count: int) -> Tensor:
        places, slot = self._places[:count], self._slot[:count]
        longest = max(self._lengths[:count])
        x, pending = self._decoder.embed(self._tokens[None, :count]), None
        for number, own in enumerate(self._layers):
            first = cast(AttentionHalf, own.layer.attention)
            second = cast(MlpHalf, own.layer.mlp)
            qkv, o, gate_up, down = own.groups
            x, h = _begin(first.begin, x, pending)
            q = put_by(
                qkv(h, slot), first.heads, own.turned, places,
                self._keys[number], self._values[number], heads=first.plan.heads,
            )  # fmt: skip
            attended = attend(
                q, self._keys[number], self._values[number], places, longest=longest,
                scaling=first.plan.scaling, window=first.plan.window, softcap=first.plan.softcap,
            )  # fmt: skip
            x, h = _begin(second.begin, x, o(attended, slot))
            inner = activated(gate_up(h, slot), second.plan.activation)
            pending = down(inner, slot)
        _, hidden = _begin(self._decoder.last, x, pending)
        scale = self._decoder.plan.logit_multiplier
        logits = self._logits(hidden if scale == 1.0 else hidden * scale)
        # A row that nobody asks any more stays inside its memory.
        self._places[:count] = (places + 1).clamp(max=self.length - 1)
        return logits

    def _logits(self, hidden: Tensor) -> Tensor:
        weight, bias = cast(Tensor, self._head.weight), cast(Tensor | None, self._head.bias)
        return self._decoder.capped(product(hidden, weight, bias))

    def _angles(self) -> dict[Any, Turn | None]:
        """cos and sin of all places, for each rotary embedding."""
        wide = torch.empty(
            0, dtype=torch.promote_types(self._dtype, torch.float32), device=self.device
        )
        every = torch.arange(self.length, device=self.device)[None]
        segments = Segments.build([self.length]).to(self.device)
        found: dict[Any, Turn | None] = {None: None}
        for rotary in self._decoder.plan.rotaries:
            cos, sin = self._decoder.angles[rotary](wide, every, segments)
            found[rotary] = Turn(cos, sin, rotary.pairs)
        return found


def kernels_know_step(plan: AttentionPlan) -> bool:
    """Whether the kernels of a step compute a layer's attention; soft caps they know, too."""
    return kernels_know(plan) or plan.softcap is not None


def _half(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16)


def _begin(begin: Begin, x: Tensor, pending: Added | None) -> tuple[Tensor, Tensor]:
    """x' and a block's input h; see `halves.Begin`."""
    after = After() if begin.end is None else begin.end.after
    if begin.norm is not None and after.nothing:
        return normed(x, pending, *begin.norm)
    entry, h = enter(x, None if pending is None else whole(pending), after, begin.norm)
    return entry.total, h
