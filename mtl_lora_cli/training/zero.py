"""ZeRO: the optimiser, the gradients and the base model, each cut into a part for every process.

| stage | cut into parts (Rajbhandari et al., arXiv 1910.02054) |
| --- | --- |
| 1 | AdamW's moments and its own copy of what is trained |
| 2 | the summed gradients, too |
| 3 | the base model's weights, too: a decoder layer is gathered when it is run |

An adapter is small and a base model is frozen, so DeepSpeed is asked for two things apart. One engine
updates the adapter: all of its values as one flat parameter for each learning rate, so that a step
costs one reduction and not one for each of a thousand small tensors. Gradients of a step's passes are
added up here, as in a run without ZeRO; passes can be CUDA graphs. For stage 3 another engine, without
an optimiser, cuts the frozen weights.

The state is saved whole, as in a run without ZeRO: so a checkpoint fits any stage and any number of
processes, and holds no pickle.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.adapters.layer import MultiTaskLinear, TaskLayer
from mtl_lora_cli.engine.memory import LIVE_LAYERS
from mtl_lora_cli.errors import Problem, ProblemsError, UsageError, file_problem
from mtl_lora_cli.machine.processes import Processes, require_group
from mtl_lora_cli.models.host import Cuttable, Host
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.models.plain import Way
from mtl_lora_cli.models.quiet import quiet_deepspeed
from mtl_lora_cli.recipe.schema import Distributed
from mtl_lora_cli.training.clipping import RelativeClipping
from mtl_lora_cli.training.cut_embedding import CutEmbedding, is_ours_to_cut
from mtl_lora_cli.training.update import (
    MOMENTS,
    ParameterGroup,
    make_optimizer,
    require_state,
    set_learning_rates,
)

_ALIGNMENT = 64  # values: a flat parameter's parts begin where a matrix product wants its operands
_STAYS_WHOLE = 100_000  # values of a frozen tensor that is not worth cutting: norms and biases

# Keys of a user's own file that say what the recipe says already, or what this engine does not do.
_OF_THE_RECIPE = {
    "optimizer": "training.learning_rate, training.weight_decay and training.parts",
    "scheduler": "training.schedule and training.warmup",
    "train_batch_size": "training.rows_per_step",
    "fp16": "dtype: bfloat16 or float32",
    "bf16": "dtype",
    "amp": "dtype",
    "activation_checkpointing": "training.gradient_checkpointing",
    "tensorboard": "run.trackers",
    "wandb": "run.trackers",
}
# What would write elsewhere than into the run folder.
_WRITES = ("csv_monitor", "comet", "nebula", "autotuning")
_PLACES = ("output_path", "output_file", "results_dir", "exps_dir", "nvme_path")


def deepspeed_config(
    distributed: Distributed, *, max_gradient_norm: float | None, on_card: bool
) -> dict[str, Any]:
    """DeepSpeed's configuration as it follows from a recipe.

    Args:
        distributed: the recipe's.
        max_gradient_norm: the recipe's; None: DeepSpeed does not clip, `training.clipping` does.
        on_card: whether there is a card.
    """
    stage, offload = distributed.zero_stage, distributed.offload
    zero: dict[str, Any] = {"stage": stage, "contiguous_gradients": True}
    if offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_card}
    if offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": on_card}
    if stage == 3:
        # A layer is let go however soon it comes again; the head, next in the backward pass, is not.
        zero["stage3_max_reuse_distance"] = 1
        zero["stage3_param_persistence_threshold"] = _STAYS_WHOLE
    return {
        # Rows are dealt out by ourselves; DeepSpeed sees one pass after the other.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_gradient_norm or 0.0,
        "zero_allow_untested_optimizer": True,  # torch's AdamW, which ZeRO's tests do not name
        "zero_force_ds_cpu_optimizer": False,  # no C++ has to be compiled for so few parameters
        "zero_optimization": zero,
    }


def merged_config(own: dict[str, Any], path: Path) -> dict[str, Any]:
    """A user's DeepSpeed file over the derived configuration; `auto` is ours.

    Raises:
        ProblemsError: it cannot be read, or contradicts the recipe: every key that does.
    """
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise file_problem(path, f"cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise file_problem(path, f"not valid JSON: {error.msg}", line=error.lineno) from None
    if not isinstance(given, dict):
        raise file_problem(path, f"expected an object, received {type(given).__name__}")
    problems = [
        Problem(str(path), None, key, f"not here: the recipe says it in {where}")
        for key, where in _OF_THE_RECIPE.items()
        if given.get(key, "auto") != "auto"
    ]
    problems += [
        Problem(str(path), None, key, "is not done: it writes outside of the run folder")
        for key in _writing(given)
    ]
    result = _over(own, given, (), problems, str(path))
    if problems:
        raise ProblemsError(problems)
    return result


def _writing(given: Mapping[str, Any], place: tuple[str, ...] = ()) -> Iterator[str]:
    """Keys of a user's file by which something would be written to a place of its own."""
    for key, value in given.items():
        if key in _PLACES or (not place and key in _WRITES):
            yield ".".join((*place, key))
        elif isinstance(value, dict) and not (not place and key in _OF_THE_RECIPE):
            yield from _writing(value, (*place, key))


def _is_tuning(key: str) -> bool:
    """Whether a key changes speed and memory alone, so that a user's value goes before ours."""
    return key.startswith("stage3_") or key in ("contiguous_gradients", "pin_memory")


def _over(
    own: Mapping[str, Any],
    given: Mapping[str, Any],
    place: tuple[str, ...],
    problems: list[Problem],
    file: str,
) -> dict[str, Any]:
    result = dict(own)
    for key, value in given.items():
        if value == "auto" or (not place and key in _OF_THE_RECIPE):
            continue
        if isinstance(value, dict) and isinstance(own.get(key, {}), dict):
            result[key] = _over(own.get(key, {}), value, (*place, key), problems, file)
        elif key in own and own[key] != value and not _is_tuning(key):
            name = ".".join((*place, key))
            message = (
                f"received {json.dumps(value)}, from the recipe follows {json.dumps(own[key])}"
            )
            problems.append(Problem(file, None, name, message))
        else:
            result[key] = value
    return result


class _Flat:
    """Parameters that are trained alike, laid behind each other.

    Attributes:
        tensors: views of `values`, their gradients views of `gradient`.
        values, gradient: float32 [n].
        parameter: what DeepSpeed updates; `values` is copied from it.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        self._sizes = [tensor.numel() for tensor in self.tensors]
        self.values = torch.cat([tensor.detach().reshape(-1) for tensor in self.tensors])
        self.gradient = torch.zeros_like(self.values)
        for tensor, value, gradient in zip(
            self.tensors, self.split(self.values), self.split(self.gradient), strict=True
        ):
            tensor.data = value
            tensor.grad = gradient
        self.parameter = nn.Parameter(self.values.clone())

    def split(self, flat: Tensor) -> list[Tensor]:
        """[n] in the shapes of the tensors."""
        parts = flat.split(self._sizes)
        return [part.view_as(tensor) for part, tensor in zip(parts, self.tensors, strict=True)]


class _Trained(nn.Module):
    """Σ P · G, whose gradient of P is G: how DeepSpeed is given gradients that lie ready."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.flats = nn.ParameterList(parameters)

    def forward(self, *gradients: Tensor) -> Tensor:
        pairs = zip(self.flats, gradients, strict=True)
        return torch.stack([(values * gradient).sum() for values, gradient in pairs]).sum()


class ZeroUpdate:
    """Update by DeepSpeed's engine; see the module and `Updating`.

    Args:
        host: the model with the adapter injected; for stage 3 a `PackedModel` built with
            `resident=False`.
        adapter: what is trained.
        groups: its parameters.
        config: from `deepspeed_config`, with or without `merged_config`.
        processes: over which is cut.
        clipping: by each tensor's own history. It needs whole tensors, so gradients are summed before
            DeepSpeed gets them: the mean that it takes of equal ones is what they are.

    Attributes:
        losses: gives ℓ [S] of a batch.
        optimizer: AdamW over this process's parts.
    """

    def __init__(
        self,
        host: Host,
        adapter: Adapter,
        groups: Sequence[ParameterGroup],
        config: Mapping[str, Any],
        processes: Processes,
        clipping: RelativeClipping | None = None,
    ) -> None:
        deepspeed = _quiet_deepspeed()
        require_group(processes)
        self._processes, self._clipping = processes, clipping
        self._trained = list(adapter.trained().values())
        # DeepSpeed averages over the processes.
        self.loss_scale = float(processes.count) if clipping is None else 1.0
        self.same_passes = config["zero_optimization"]["stage"] == 3  # all gather together
        self.losses: Callable[[Any], Tensor] = host.losses
        if self.same_passes:
            assert isinstance(host, PackedModel | Cuttable), "it says which layers there are"
            self.losses = _cut(deepspeed, host, config)
        self._flats = [_Flat(group.parameters) for group in groups]
        own = [
            replace(group, parameters=[flat.parameter])
            for group, flat in zip(groups, self._flats, strict=True)
        ]
        trained = _of_the_trained(config)
        offloaded = "offload_optimizer" in trained["zero_optimization"]
        self._engine, *_ = deepspeed.initialize(
            model=_Trained(flat.parameter for flat in self._flats),
            optimizer=make_optimizer(own, graphed=False, offloaded=offloaded),
            config=trained,
            dist_init_required=False,
        )
        self.optimizer = self._engine.optimizer.optimizer
        self._norm = torch.zeros((), device=self._flats[0].values.device)

    def __call__(self, factor: float) -> Tensor:
        """See `Updating`."""
        set_learning_rates(self.optimizer, factor)
        before = None if self._clipping is None else self._clipped(self._clipping)
        self._engine.backward(self._engine(*(flat.gradient for flat in self._flats)))
        self._engine.step()
        with torch.no_grad():
            for flat in self._flats:
                flat.values.copy_(flat.parameter)
                flat.gradient.zero_()
        if before is not None:
            return self._norm.copy_(before)
        norm = torch.as_tensor(self._engine.get_global_grad_norm())
        # DeepSpeed says −1 where it is no finite number.
        return self._norm.copy_(norm.masked_fill(norm < 0, float("nan")))

    def _clipped(self, clipping: RelativeClipping) -> Tensor:
        """Sum the gradients over the processes and clip them; their norm before."""
        for flat in self._flats:
            self._processes.sum_(flat.gradient)
        return clipping.clip([cast(Tensor, tensor.grad) for tensor in self._trained])

    def state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Updating`."""
        usual = {} if self._clipping is None else self._clipping.state(tensors)
        step = torch.tensor(float(next(iter(self.optimizer.state.values()))["step"]))
        found: dict[int, dict[str, Tensor]] = {id(tensor): {} for tensor in tensors.values()}
        for number, flat in enumerate(self._flats):
            for key in MOMENTS:
                whole = self._whole(number, flat, key).cpu()
                for tensor, value in zip(flat.tensors, flat.split(whole), strict=True):
                    found[id(tensor)][key] = value.contiguous()
        return {
            f"{name}/{key}": value
            for name, tensor in tensors.items()
            for key, value in {**found[id(tensor)], "step": step.clone()}.items()
        } | usual

    def _whole(self, number: int, flat: _Flat, key: str) -> Tensor:
        """One moment of one group, of whose values each process has some.

        DeepSpeed's own reader remembers the state of all groups when the first one has been updated:
        of the others there is none by then.
        """
        whole = torch.zeros_like(flat.values)
        mapping = getattr(flat.parameter, "_hp_mapping", None)
        if mapping is not None:  # otherwise all of it is other processes'
            there, here = mapping.hp_fragment_address, mapping.lp_fragment_address
            part = self.optimizer.param_groups[number]["params"][0]
            own = self.optimizer.state[part][key].narrow(0, there.start, there.numel)
            whole.narrow(0, here.start, here.numel).copy_(own)
        return self._processes.sum_(whole)

    def restore(self, tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
        """See `Updating`.

        Raises:
            MtlLoraError: it is the state of other parameters.
        """
        require_state(tensors, saved, clipping=self._clipping is not None)
        if self._clipping is not None:
            self._clipping.restore(tensors, saved)
        names = {id(tensor): name for name, tensor in tensors.items()}
        for number, flat in enumerate(self._flats):
            flat.parameter.data.copy_(flat.values)
            own = [names[id(tensor)] for tensor in flat.tensors]
            whole = {
                key: torch.cat([saved[f"{name}/{key}"].reshape(-1) for name in own])
                for key in MOMENTS
            }
            self._set_part(number, flat, whole, saved[f"{own[0]}/step"])

    def _set_part(
        self, number: int, flat: _Flat, moments: Mapping[str, Tensor], step: Tensor
    ) -> None:
        """This process's part of one group; AdamW makes its state at the first step, here before."""
        group = self.optimizer.param_groups[number]
        part = group["params"][0]
        state = self.optimizer.state[part]
        for key in MOMENTS:
            state.setdefault(key, torch.zeros_like(part))
        on_card = part.is_cuda and bool(group["fused"])
        state.setdefault("step", torch.zeros((), device=part.device if on_card else "cpu"))
        state["step"].copy_(step)
        mapping = getattr(flat.parameter, "_hp_mapping", None)
        if mapping is None:  # all of it is other processes'
            return
        there, here = mapping.hp_fragment_address, mapping.lp_fragment_address
        for target, whole in [
            (part.data, flat.values),
            *((state[key], moments[key]) for key in MOMENTS),
        ]:
            values = whole.narrow(0, here.start, here.numel)
            target.narrow(0, there.start, there.numel).copy_(values)


def _of_the_trained(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration concerns the engine of the adapter: stage 2 at most."""
    zero = {
        key: value
        for key, value in config["zero_optimization"].items()
        if not key.startswith("stage3_") and key != "offload_param"
    }
    zero["stage"] = min(zero["stage"], 2)
    return {**config, "zero_optimization": zero, "steps_per_print": 2**31}


def _of_the_base(config: Mapping[str, Any], largest: int) -> dict[str, Any]:
    """What concerns the engine that cuts frozen weights: it has no optimiser.

    Args:
        config: the whole configuration.
        largest: values of the largest layer. So many layers are there at once that in the end one is
            fetched for each that is done: of several together DeepSpeed would make copies.
    """
    zero = {k: v for k, v in config["zero_optimization"].items() if k != "offload_optimizer"}
    zero.setdefault("stage3_prefetch_bucket_size", 2 * largest)
    zero.setdefault("stage3_max_live_parameters", LIVE_LAYERS * largest)
    kept = {key: value for key, value in config.items() if key != "gradient_clipping"}
    return {**kept, "zero_optimization": zero, "steps_per_print": 2**31}


def _cut(
    deepspeed: Any, host: PackedModel | Cuttable, config: Mapping[str, Any]
) -> _CutModel | _CutHost:
    """Cut the frozen weights; what is called with a batch from then on."""
    offloaded = "offload_param" in config["zero_optimization"]
    model = _CutModel(host, offloaded) if isinstance(host, PackedModel) else _CutHost(host)
    engine, *_ = deepspeed.initialize(
        model=model, config=_of_the_base(config, model.largest), dist_init_required=False
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


def _quiet_deepspeed() -> Any:
    """DeepSpeed, without its remarks, and without a minute of compiling C++.

    On a CPU it builds sums in shared memory, which only its inference asks for; ours are torch's.
    """
    quiet_deepspeed()
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


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
