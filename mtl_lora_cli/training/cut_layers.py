"""ZeRO's third stage: the frozen weights of each layer, cut over the processes and gathered when it is run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mtl_lora_cli.adapters.layer import MultiTaskLinear, TaskLayer
from mtl_lora_cli.engine.memory import LIVE_LAYERS
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.machine.processes import Processes
from mtl_lora_cli.models.host import Cuttable
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.models.plain import Way
from mtl_lora_cli.training.cut_embedding import CutEmbedding, is_ours_to_cut
from mtl_lora_cli.training.zero_config import of_the_base

_ALIGNMENT = 64  # values: a flat parameter's parts begin where a matrix product wants its operands


def cut_weights(
    deepspeed: Any, host: PackedModel | Cuttable, config: Mapping[str, Any]
) -> _CutModel | _CutHost:
    """Cut the frozen weights; what is called with a batch from then on."""
    offloaded = "offload_param" in config["zero_optimization"]
    model = _CutModel(host, offloaded) if isinstance(host, PackedModel) else _CutHost(host)
    engine, *_ = deepspeed.initialize(
        model=model, config=of_the_base(config, model.largest), dist_init_required=False
    )
    small = [p for p in model.parameters() if cast(Any, p).ds_persist]
    if small:  # what is not cut is not fetched by anybody: it has to be there
        cast(Any, small[0]).all_gather(small)
    model.engine = (engine,)
    if isinstance(model, _CutModel):
        for embedding in model.apart:
            own = cast(Any, next(model.layers.parameters()))
            CutEmbedding(embedding, own.ds_process_group).fetch_behind(model.layers[0])
    return model


class _CutLayer(nn.Module):
    """The frozen weights of one decoder layer, gathered together when the layer is run.

    They lie behind each other in one flat parameter for each dtype, which DeepSpeed cuts and gathers
    in one piece and without a copy; while the layer is run, its own parameters are views of it.

    Args:
        call: runs the layer.
        layer: of the transformers model; whatever else is asked for is its.
        pace: of the whole model.
        kept: ids of parameters that learn, beside those of adapted layers.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        layer: nn.Module,
        pace: _Pace,
        kept: frozenset[int] = frozenset(),
    ) -> None:
        from deepspeed.utils import set_z3_leaf_module

        super().__init__()
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        adapted = (module for module in layer.modules() if isinstance(module, TaskLayer))
        whole = {id(own) for module in adapted for own in module.parameters(recurse=False)} | kept
        for parameter in layer.parameters():
            if id(parameter) not in whole:  # the adapter is not cut
                by_dtype.setdefault(parameter.dtype, []).append(parameter)
        self.flats = nn.ParameterList(
            nn.Parameter(_laid_out(some), requires_grad=False) for some in by_dtype.values()
        )
        self._owners = list(by_dtype.values())
        self._shapes = [[parameter.shape for parameter in some] for some in self._owners]
        self._inner = (call, layer)  # not modules of this one's: the adapter must not be seen
        self._pace = pace
        self._take_away()
        set_z3_leaf_module(self, True)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        self._bring()
        found = self._inner[0](*arguments, **named)
        if torch.is_grad_enabled():
            # DeepSpeed gathers before the first of these gradients and lets go behind the last.
            for tensor in found if isinstance(found, tuple) else (found,):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(self._bring)
            for tensor in arguments:
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(self._take_away)
        self._take_away()
        return found

    def _bring(self, gradient: Tensor | None = None) -> None:
        self._pace.keep()
        for flat, owners, shapes in zip(self.flats, self._owners, self._shapes, strict=True):
            start = 0
            for parameter, shape in zip(owners, shapes, strict=True):
                parameter.data = flat.data[start : start + shape.numel()].view(shape)
                start += _aligned(shape.numel())

    def _take_away(self, gradient: Tensor | None = None) -> None:
        for owners in self._owners:
            for parameter in owners:
                parameter.data = parameter.data.new_empty(0)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_inner"][1], name)


def _laid_out(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Their values behind each other, each at an aligned place."""
    sizes = [_aligned(parameter.numel()) for parameter in parameters]
    flat = parameters[0].data.new_zeros(sum(sizes))
    for parameter, place in zip(parameters, flat.split(sizes), strict=True):
        place[: parameter.numel()].copy_(parameter.data.reshape(-1))
    return flat


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT


class _Pace:
    """Keeps the CPU from running more than a few layers ahead of the card.

    What was gathered for a layer becomes free when the card is done with it, not when the CPU is: a
    CPU that asks for all layers at once finds none of their memory free again.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_card = device.type == "cuda"
        self._events: deque[torch.cuda.Event] = deque()

    def keep(self) -> None:
        """A layer begins."""
        if not self._on_card:
            return
        event = torch.cuda.Event()
        event.record()
        self._events.append(event)
        if len(self._events) >= LIVE_LAYERS:
            self._events.popleft().synchronize()


def require_cuttable(packed: PackedModel, processes: Processes) -> None:
    """Refuse to cut the weights of a model whose layers are not known, or not called alike everywhere.

    All processes gather a layer together, so each must call it as often as the others: one call a pass.

    Raises:
        UsageError: naming what would do.
    """
    if packed.plain is None:
        return
    why = None
    if not isinstance(getattr(packed.model.base_model, "layers", None), nn.ModuleList):
        why = f"where the layers of a model of type '{packed.model.config.model_type}' are is not known"
    elif processes.count > 1 and packed.plain.way != Way(bare_head=packed.plain.way.bare_head):
        why = f"it wants packed rows, and this model is asked {packed.plain.way}"
    if why is not None:
        raise UsageError(f"distributed.zero_stage: 3 cannot cut this model: {why}; use stage 2")


class _CutModel(nn.Module):
    """The model as DeepSpeed shall see it: frozen weights alone, and what is gathered when.

    Its layers take the place of the decoder's calls, or of transformers' own layers. The head is a
    module as it is, and so is an embedding that is offloaded or shares its weight; any other is cut apart
    (`CutEmbedding`). An adapted head stays whole, and so does the last norm.
    """

    def __init__(self, packed: PackedModel, offloaded: bool) -> None:
        super().__init__()
        base, decoder = packed.model.base_model, packed.decoder
        layers = list(base.layers) if decoder is None else decoder.modules
        calls = layers if decoder is None else decoder.layer_calls
        pairs = zip(calls, layers, strict=True)
        pace = _Pace(next(packed.model.parameters()).device)
        self.layers = nn.ModuleList(_CutLayer(call, layer, pace) for call, layer in pairs)
        self.largest = max(p.numel() for p in self.layers.parameters())
        if decoder is None:
            base.layers = self.layers
        else:
            decoder.layer_calls = list(self.layers)
        embedding, head = packed.model.get_input_embeddings(), packed.model.get_output_embeddings()
        self.head = None if isinstance(head, MultiTaskLinear) else head
        ours = not offloaded and is_ours_to_cut(embedding, head)
        self.embedding = None if ours else embedding
        self.apart = (embedding,) if ours else ()  # not a module of DeepSpeed's
        self.engine: tuple[Any, ...] = ()
        self._packed = (packed,)

    def forward(self, *arguments: Any) -> Tensor:
        return self._packed[0].losses(*arguments)


class _CutHost(nn.Module):
    """Any other host that says which layers it has, as DeepSpeed shall see it: those alone."""

    def __init__(self, host: Cuttable) -> None:
        super().__init__()
        assert host.adapter is not None, "a host has an adapter"
        kept = frozenset(id(tensor) for tensor in host.adapter.tensors().values())
        pace = _Pace(host.adapter.device)
        cut: list[nn.Module] = []

        def wrapped(layer: nn.Module) -> nn.Module:
            cut.append(_CutLayer(layer, layer, pace, kept))
            return cut[-1]

        host.wrap_layers(wrapped)
        self.layers = nn.ModuleList(cut)
        self.largest = max(p.numel() for p in self.layers.parameters())
        self.engine: tuple[Any, ...] = ()
        self._host = (host,)

    def forward(self, *arguments: Any) -> Tensor:
        return self._host[0].losses(*arguments)
