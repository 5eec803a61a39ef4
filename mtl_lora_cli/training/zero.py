"""ZeRO: the optimiser, the gradients and the base model, each cut into a part for every process.

| stage | cut into parts | DeepSpeed is given |
| --- | --- | --- |
| 1 | AdamW's moments and float32 copies | the adapter's parameters |
| 2 | gradients, too | the adapter's parameters |
| 3 | the base model's weights, too | the whole model; a decoder layer is gathered at a time |

(Rajbhandari et al., arXiv 1910.02054.) The adapter itself is small and stays whole everywhere. Its
state is saved whole, too, as in a run without ZeRO: so a checkpoint fits any stage and any number of
processes, and holds no pickle.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.errors import Problem, ProblemsError, file_problem
from mtl_lora_cli.models.decoder import LayerCall
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.recipe.schema import Distributed
from mtl_lora_cli.training.processes import Processes, require_group
from mtl_lora_cli.training.update import (
    MOMENTS,
    ParameterGroup,
    make_optimizer,
    require_state,
    set_learning_rates,
)

# Keys of a user's own file that say what the recipe says already, or what this engine does not do.
_OF_THE_RECIPE = {
    "optimizer": "training.learning_rate, training.weight_decay and training.parts",
    "scheduler": "training.schedule and training.warmup",
    "train_batch_size": "training.rows_per_step",
    "fp16": "dtype: bfloat16 or float32",
    "bf16": "dtype",
    "amp": "dtype",
    "activation_checkpointing": "training.gradient_checkpointing",
}


def deepspeed_config(
    distributed: Distributed, *, max_gradient_norm: float, largest_trained: int, on_card: bool
) -> dict[str, Any]:
    """DeepSpeed's configuration as it follows from a recipe.

    Args:
        distributed: the recipe's.
        max_gradient_norm: the recipe's.
        largest_trained: values of the adapter's largest tensor: what is no larger stays whole.
        on_card: whether there is a card.
    """
    stage, offload = distributed.zero_stage, distributed.offload
    zero: dict[str, Any] = {"stage": stage, "contiguous_gradients": True}
    if offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_card}
    if offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": on_card}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = largest_trained
    return {
        # Rows are dealt out by ourselves; DeepSpeed sees one pass after the other.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_gradient_norm,
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
    result = _over(own, given, (), problems, str(path))
    if problems:
        raise ProblemsError(problems)
    return result


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
        elif key in own and own[key] != value:
            name = ".".join((*place, key))
            message = (
                f"received {json.dumps(value)}, from the recipe follows {json.dumps(own[key])}"
            )
            problems.append(Problem(file, None, name, message))
        else:
            result[key] = value
    return result


class ZeroUpdate:
    """Backward pass and update by DeepSpeed's engine; see the module and `Updating`.

    Args:
        packed: base model with the adapter injected; for stage 3 built with `resident=False`.
        adapter: what is trained.
        groups: its parameters.
        config: from `deepspeed_config`, with or without `merged_config`.
        processes: over which is cut.
    """

    same_passes = True

    def __init__(
        self,
        packed: PackedModel,
        adapter: Adapter,
        groups: Sequence[ParameterGroup],
        config: Mapping[str, Any],
        processes: Processes,
    ) -> None:
        deepspeed = _quiet_deepspeed()
        require_group(processes)
        zero = config["zero_optimization"]
        self._stage: int = zero["stage"]
        self._tensors = list(adapter.tensors().values())
        self._packed, self._processes = packed, processes
        self.loss_scale = float(processes.count)
        device = self._tensors[0].device
        module: nn.Module = packed
        if self._stage < 3:
            module = _Trained(self._tensors)
        elif packed.decoder is not None:
            module = _CutModel(packed, self._tensors)
        optimizer = make_optimizer(groups, graphed=False, offloaded="offload_optimizer" in zero)
        set_learning_rates(optimizer, 0.0)  # DeepSpeed may take a step to make the state
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config={**config, "steps_per_print": 2**31},
            dist_init_required=False,
        )
        self.optimizer = self._engine.optimizer.optimizer
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()
        if self._stage == 3:  # what stays whole: the adapter, norms, biases
            _gather([p for p in module.parameters() if cast(Any, p).ds_persist])
        self._norm = torch.zeros((), device=device)

    @property
    def model(self) -> Any:
        """What is called with a batch."""
        return self._engine if self._stage == 3 else self._packed

    def expect(self, last: bool) -> None:
        """See `Updating`."""
        self._engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        """See `Updating`."""
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the pass, and updates nothing

    def __call__(self, factor: float) -> Tensor:
        """See `Updating`."""
        set_learning_rates(self.optimizer, factor)
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return self._norm.copy_(torch.as_tensor(norm))

    def state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Updating`."""
        from deepspeed.utils import safe_get_full_optimizer_state

        step = next(iter(self.optimizer.state.values()))["step"]
        found = {}
        for name, tensor in tensors.items():
            for key in MOMENTS:
                found[f"{name}/{key}"] = safe_get_full_optimizer_state(tensor, key).cpu()
            found[f"{name}/step"] = torch.tensor(float(step))
        return found

    def restore(self, tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
        """See `Updating`.

        Raises:
            MtlLoraError: it is the state of other parameters.
        """
        require_state(tensors, saved)
        step = float(next(value for name, value in saved.items() if name.endswith("/step")))
        if self._stage == 3:
            _scatter(self._tensors)
        self._make_state()
        for name, tensor in tensors.items():
            moments = {key: saved[f"{name}/{key}"] for key in MOMENTS}
            if self._stage == 3:
                self._set_gathered(tensor, moments)
            else:
                self._set_fragment(tensor, moments)
        for state in self.optimizer.state.values():
            state["step"].fill_(step)

    def _make_state(self) -> None:
        """AdamW makes its state at the first step; here it has to be there before."""
        flats = [flat for group in self.optimizer.param_groups for flat in group["params"]]
        for flat in flats:
            state = self.optimizer.state[flat]
            for key in MOMENTS:
                state.setdefault(key, torch.zeros_like(flat))
            fused = flat.is_cuda and bool(self.optimizer.param_groups[0].get("fused"))
            device = flat.device if fused else torch.device("cpu")
            state.setdefault("step", torch.zeros((), device=device))

    def _set_gathered(self, tensor: Tensor, moments: Mapping[str, Tensor]) -> None:
        """This process's part of one parameter that all processes share evenly."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        safe_set_local_fp32_param(tensor, self._part(tensor.detach()))
        for key, value in moments.items():
            safe_set_local_optimizer_state(tensor, self._part(value), key)

    def _part(self, value: Tensor) -> Tensor:
        """Flat, filled up with zeros so that it can be cut evenly, and cut."""
        flat = value.reshape(-1)
        size = -(-flat.numel() // self._processes.count)
        missing = size * self._processes.count - flat.numel()
        filled = torch.cat([flat, flat.new_zeros(missing)])
        return filled.narrow(0, size * self._processes.rank, size)

    def _set_fragment(self, tensor: Tensor, moments: Mapping[str, Tensor]) -> None:
        """This process's part of one parameter in the flat copy of its group."""
        mapping = getattr(tensor, "_hp_mapping", None)
        if mapping is None:  # all of it is another process's
            return
        flat = self.optimizer.param_groups[mapping.param_group_index]["params"][0]
        there, here = mapping.hp_fragment_address, mapping.lp_fragment_address
        values: list[tuple[str | None, Tensor]] = [(None, tensor.detach()), *moments.items()]
        for key, value in values:
            target = flat.data if key is None else self.optimizer.state[flat][key]
            part = value.reshape(-1).narrow(0, here.start, here.numel)
            target.narrow(0, there.start, there.numel).copy_(part)


def _quiet_deepspeed() -> Any:
    """DeepSpeed, without its remarks: it looks for cards, compilers and launchers aloud."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    return deepspeed


class _Trained(nn.Module):
    """The adapter's parameters alone: the frozen model is none of DeepSpeed's business then."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(tensors)


class _CutLayer(nn.Module):
    """The frozen weights of one decoder layer, gathered together when the layer is run.

    Args:
        call: runs the layer.
        frozen: its frozen parameters; the adapter's are not among them, and stay whole.
    """

    def __init__(self, call: LayerCall, frozen: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.frozen = nn.ParameterList(frozen)
        self._call = call

    def forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        return self._call(*arguments)


class _CutModel(nn.Module):
    """The model of the fused engine as DeepSpeed shall see it: what is gathered when.

    Takes the place of the decoder's calls. The embedding and the head are modules of their own; norms
    are too small to be cut.
    """

    def __init__(self, packed: PackedModel, tensors: Iterable[Tensor]) -> None:
        from deepspeed.utils import set_z3_leaf_module

        super().__init__()
        assert packed.decoder is not None
        base = packed.model.base_model
        calls = zip(packed.decoder.layer_calls, base.layers, strict=True)
        self.layers = nn.ModuleList(
            _CutLayer(call, [p for p in layer.parameters() if not p.requires_grad])
            for call, layer in calls
        )
        for layer in self.layers:
            set_z3_leaf_module(layer, True)
        packed.decoder.layer_calls = list(self.layers)
        self.embedding = packed.model.get_input_embeddings()
        self.head = packed.model.get_output_embeddings()
        self.norm = base.norm
        self.tensors = nn.ParameterList(tensors)
        self._packed = (packed,)  # not a module of this one's

    def forward(self, *arguments: Any) -> Tensor:
        return cast(Tensor, self._packed[0](*arguments))


def _gather(tensors: Sequence[Any]) -> None:
    tensors[0].all_gather(tensors)


def _scatter(tensors: Sequence[Any]) -> None:
    """Write what stands in the whole tensors into the parts of all processes."""
    tensors[0].partition(tensors, has_been_updated=True)
    _gather(tensors)


@contextmanager
def whole(packed: PackedModel) -> Iterator[None]:
    """All parameters at once, whatever the stage: for looking at the model as it is."""
    cut = [p for p in packed.parameters() if hasattr(p, "ds_id")]
    if not cut:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(cut):
        yield
