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

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.machine.processes import Processes, require_group
from mtl_lora_cli.models.host import Cuttable, Host
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.models.quiet import quiet_deepspeed
from mtl_lora_cli.training.clipping import RelativeClipping
from mtl_lora_cli.training.cut_layers import cut_weights
from mtl_lora_cli.training.update import (
    MOMENTS,
    ParameterGroup,
    make_optimizer,
    require_state,
    set_learning_rates,
)
from mtl_lora_cli.training.zero_config import of_the_trained


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
            self.losses = cut_weights(deepspeed, host, config)
        self._flats = [_Flat(group.parameters) for group in groups]
        own = [
            replace(group, parameters=[flat.parameter])
            for group, flat in zip(groups, self._flats, strict=True)
        ]
        trained = of_the_trained(config)
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


def _quiet_deepspeed() -> Any:
    """DeepSpeed, without its remarks, and without a minute of compiling C++.

    On a CPU it builds sums in shared memory, which only its inference asks for; ours are torch's.
    """
    quiet_deepspeed()
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
