"""The decoder of a LLaMA-class model over packed rows, built of the blocks beside this file.

It reads the weights of the transformers model that it is made from, and leaves that model as it is:
the same parameters, the same adapted layers. What it saves is time and memory: one product for q, k
and v, one for gate and up, norms and additions in one kernel, nothing kept that nobody needs, and in
the last layer no work after attention where no answer is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.adapters.layer import mixing_of
from mtl_lora_cli.adapters.routing import Slots
from mtl_lora_cli.engine.attention import Packing, pick_way
from mtl_lora_cli.engine.attention_block import AttentionBlock
from mtl_lora_cli.engine.group import Group
from mtl_lora_cli.engine.mlp_block import MlpBlock
from mtl_lora_cli.engine.saved import Keep, Pass
from mtl_lora_cli.engine.segments import Segments
from mtl_lora_cli.kernels.norm import add_norm, norm_gradient

_MODEL_TYPES = ("llama", "mistral", "qwen2")  # same layer: norms, rotary halves, SwiGLU, no extras
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # fixed frequencies
_QKV, _O, _GATE_UP, _DOWN = range(4)
LayerCall = Callable[..., tuple[Tensor, Tensor]]  # of `Pass`, mixings, x and δ


@dataclass(frozen=True)
class _Layer:
    input_norm: tuple[Tensor, float]
    qkv: Group
    o: Group
    mlp_norm: tuple[Tensor, float]
    gate_up: Group
    down: Group

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.qkv, self.o, self.gate_up, self.down


def obstacle(model: Any, adapter: Adapter | None) -> str | None:
    """Why the blocks cannot stand for the model's own layers, or None where they can."""
    config = model.config
    if config.model_type not in _MODEL_TYPES:
        return f"model type {config.model_type}"
    if getattr(config, "hidden_act", None) != "silu":
        return f"activation {getattr(config, 'hidden_act', None)}"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return "sliding-window attention"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in _ROPE_TYPES:
        return f"rotary embedding of type {rope.get('rope_type')}"
    layers = getattr(model.base_model, "layers", None)
    if layers is None:
        return "no list of decoder layers"
    if adapter is not None:
        inside = {f"layers.{i}.{part}" for i in range(len(layers)) for part in _PARTS}
        for path in adapter.layers:
            tail = path[path.find("layers.") :]
            if tail not in inside and not path.endswith("lm_head"):
                return f"an adapter on {path}"
        for number in range(len(layers)):
            for parts in _TOGETHER:
                inside_group = [f"layers.{number}.{part}" for part in parts]
                kinds = {
                    layer.kind
                    for path, layer in adapter.layers.items()
                    if path[path.find("layers.") :] in inside_group
                }
                if len(kinds) > 1:
                    return f"ranks or own parts that differ within {', '.join(parts)} of one layer"
    return None


_TOGETHER = (
    tuple(f"self_attn.{name}_proj" for name in "qkv"),
    tuple(f"mlp.{name}_proj" for name in ("gate", "up")),
)
_PARTS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


class FusedDecoder:
    """See the module.

    Args:
        model: a transformers causal language model for which `obstacle` is None.
        resident: the weights stay in memory; see `FrozenWeights.lay_together`.

    Attributes:
        layer_calls: run one layer each. Where weights do not stay, somebody else's callables around
            these bring them before and take them away behind.
    """

    def __init__(self, model: Any, *, resident: bool = True) -> None:
        self._base = model.base_model
        self.layers = [_layer(layer, resident) for layer in self._base.layers]
        self.layer_calls: list[LayerCall] = [partial(_run_layer, layer) for layer in self.layers]
        attention = self._base.layers[0].self_attn
        config = model.config
        self._heads = config.num_attention_heads
        self._key_heads = config.num_key_value_heads
        self._head_dim = attention.head_dim
        self._scaling = attention.scaling
        self._norm = _norm(self._base.norm)

    def fixed_shapes(self) -> bool:
        """Whether a pass launches the same kernels whatever the segments are."""
        return pick_way(self._norm[0], self._head_dim) == "triton"

    def round_to_fp8(self) -> None:
        """Multiply with all frozen weights in 8-bit floats from now on (`kernels/fp8.py`)."""
        for layer in self.layers:
            for group in layer.groups:
                group.frozen.round_to_fp8()

    @contextmanager
    def exactly(self) -> Iterator[None]:
        """Inside the block the products are not rounded to 8-bit floats."""
        frozen = [group.frozen for layer in self.layers for group in layer.groups]
        for weights in frozen:
            weights.exact = True
        try:
            yield
        finally:
            for weights in frozen:
                weights.exact = False

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        segments: Segments,
        positions: Tensor,
        slots: Slots,
        chosen_slots: Slots,
        *,
        training: bool,
        keep: Sequence[Keep],
    ) -> Tensor:
        """Normed hidden states at the positions asked for.

        Args:
            input_ids, position_ids: int64 [1, N].
            segments: of the N positions.
            positions: int64 [U].
            slots, chosen_slots: routing of all positions, and of those asked for.
            training: dropout is on.
            keep: what each layer keeps for the backward pass.

        Returns:
            [U, d].
        """
        x = self._base.embed_tokens(input_ids)[0]
        learn = torch.is_grad_enabled()
        packing = self._packing(x, position_ids, segments)
        delta = None
        mixings = self._mixings(slots, chosen_slots)
        for number in range(len(self.layers)):
            last = number + 1 == len(self.layers)
            own = Pass(
                slots=slots,
                packing=packing,
                positions=positions if last else None,
                chosen_slots=chosen_slots if last else slots,
                keep=keep[number],
                training=training,
                learn=learn,
            )
            x, delta = self.layer_calls[number](own, mixings[number], x, delta)
        return _FinalNorm.apply(x, delta, *self._norm)

    def _packing(self, x: Tensor, position_ids: Tensor, segments: Segments) -> Packing:
        wide = torch.empty(0, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        cos, sin = self._base.rotary_emb(wide, position_ids)
        half = self._head_dim // 2
        return Packing(
            heads=self._heads,
            key_heads=self._key_heads,
            head_dim=self._head_dim,
            scaling=self._scaling,
            cos=cos[0, :, :half].contiguous(),
            sin=sin[0, :, :half].contiguous(),
            segments=segments,
            way=pick_way(x, self._head_dim),
        )

    def _mixings(self, slots: Slots, chosen_slots: Slots) -> list[list[Tensor | None]]:
        """M [J, P, m, k] of every group of every layer, made together."""
        found: list[list[Tensor | None]] = [[None] * 4 for _ in self.layers]
        last = len(self.layers) - 1
        # The last layer's later groups see the chosen positions, where fewer tasks may be present.
        places: dict[tuple[Any, bool], list[tuple[int, int]]] = {}
        for number, layer in enumerate(self.layers):
            for kind, group in enumerate(layer.groups):
                if group.adapted:
                    key = (group.adapted[0].kind, number == last and kind != _QKV)
                    places.setdefault(key, []).append((number, kind))
        for (_, chosen), some in places.items():
            own = chosen_slots if chosen else slots
            if own.count == 0:
                continue
            groups = [self.layers[number].groups[kind] for number, kind in some]
            layers = [layer for group in groups for layer in group.adapted]
            together = mixing_of(layers, own.wanted, all_rows=groups[0].all_tasks)
            if together is None:
                continue
            parts = together.split([len(group.adapted) for group in groups])
            for (number, kind), part in zip(some, parts, strict=True):
                found[number][kind] = part
        return found


class _FinalNorm(torch.autograd.Function):
    """norm(x + δ), the last step of the stream: [U, d]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        total, normed, inverse = add_norm(x, delta, weight, eps)
        ctx.save_for_backward(total, inverse, weight)
        return normed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dnormed: Tensor) -> tuple[Tensor | None, ...]:
        total, inverse, weight = ctx.saved_tensors
        dx = norm_gradient(dnormed.contiguous(), None, total, inverse, weight)
        return dx, dx, None, None


def _run_layer(
    layer: _Layer, own: Pass, mixings: Sequence[Tensor | None], x: Tensor, delta: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The stream and what has yet to be added to it, behind one layer."""
    qkv, o, gate_up, down = mixings
    x, delta = AttentionBlock.apply(
        layer.input_norm, layer.qkv, layer.o, own, x, delta,
        *layer.qkv.tensors(qkv, own.slots), *layer.o.tensors(o, own.chosen_slots),
    )  # fmt: skip
    return MlpBlock.apply(
        layer.mlp_norm, layer.gate_up, layer.down, own, x, delta,
        *layer.gate_up.tensors(gate_up, own.chosen_slots),
        *layer.down.tensors(down, own.chosen_slots),
    )  # fmt: skip


def _layer(layer: Any, resident: bool) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    group = partial(Group, resident=resident)
    return _Layer(
        input_norm=_norm(layer.input_layernorm),
        qkv=group(attention.q_proj, attention.k_proj, attention.v_proj),
        o=group(attention.o_proj),
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate_up=group(mlp.gate_proj, mlp.up_proj),
        down=group(mlp.down_proj),
    )


def _norm(module: Any) -> tuple[Tensor, float]:
    return module.weight, module.variance_epsilon
