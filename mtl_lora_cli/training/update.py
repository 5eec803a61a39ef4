"""One update of what is trained: gradients summed over processes, clipped, AdamW."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mtl_lora_cli.errors import MtlLoraError
from mtl_lora_cli.machine.processes import ALONE, Processes
from mtl_lora_cli.training.clipping import USUAL, RelativeClipping

PEAK = "peak"  # key of an optimiser's group: its learning rate before the schedule
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state of one parameter, besides the count of steps
_SCALARS = ("step", USUAL)
_BETA1 = 0.9
_WARM_UP = 2  # updates that run as they are: state gets its memory
_BESIDE = 6  # parts of a captured update that run beside each other


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are trained alike.

    Attributes:
        parameters: some of what is trained.
        learning_rate: at its peak; the schedule multiplies it.
        weight_decay: AdamW's.
        beta2: AdamW's β₂: it remembers squares of gradients for about 1 / (1 − β₂) steps.
    """

    parameters: Sequence[Tensor]
    learning_rate: float
    weight_decay: float
    beta2: float = 0.999


class Updating(Protocol):
    """What the loop asks of whoever updates the parameters.

    Attributes:
        loss_scale: factor of every loss: the number of processes where gradients are averaged over
            them, 1 where they are summed.
        same_passes: every process must run the same number of passes.
    """

    loss_scale: float
    same_passes: bool

    def __call__(self, factor: float) -> Tensor:
        """One update at so much of each group's peak learning rate; the gradients' norm."""

    def state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The optimiser's state, `{name}/{key}`, whole: a collective. It may be the tensors that the next
        update changes."""

    def restore(self, tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
        """Go back to such a state; the parameters themselves were set before."""


def make_optimizer(
    groups: Sequence[ParameterGroup], *, graphed: bool, offloaded: bool = False
) -> torch.optim.AdamW:
    """AdamW; on a card in one kernel a group, and such that a graph can hold it."""
    first = groups[0].parameters[0]
    return torch.optim.AdamW(
        [
            {
                "params": list(group.parameters),
                "lr": torch.tensor(group.learning_rate, device=first.device)
                if graphed
                else group.learning_rate,
                "weight_decay": group.weight_decay,
                "betas": (_BETA1, group.beta2),
                PEAK: group.learning_rate,
            }
            for group in groups
        ],
        fused=True if first.is_cuda and not offloaded else None,
        capturable=graphed,
    )


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Each group's peak rate times the schedule's factor."""
    for group in optimizer.param_groups:
        rate = group[PEAK] * factor
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def require_state(
    tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor], *, clipping: bool = False
) -> None:
    """Refuse a state that is not that of these parameters, with their usual norms where they clip by them.

    Raises:
        MtlLoraError: naming the first that is missing, unknown or misshapen.
    """
    for name, tensor in tensors.items():
        for key in (*MOMENTS, *_SCALARS[: 1 + clipping]):
            value = saved.get(f"{name}/{key}")
            if value is None:
                raise MtlLoraError(f"optimizer.safetensors: the {key} of '{name}' is missing")
            if key not in _SCALARS and value.shape != tensor.shape:
                raise MtlLoraError(
                    f"optimizer.safetensors: the {key} of '{name}' has shape {list(value.shape)}, "
                    f"expected {list(tensor.shape)}"
                )
    for name in saved:
        if name.rpartition("/")[0] not in tensors:
            raise MtlLoraError(f"optimizer.safetensors: unexpected tensor '{name}'")


class Update:
    """Sum the gradients over all processes, clip them, step, and set them to zero.

    Every process holds all parameters and does the same with them. As a CUDA graph where the passes
    are graphs; the sum stands before it.

    Args:
        parameters: what is trained.
        optimizer: from `make_optimizer`, as `graphed` says.
        max_norm: of all gradients together.
        graphed: replay from the third step on.
        processes: over whom gradients are summed.
        clipping: by each tensor's own history, in the order of `parameters`; None: by `max_norm` alone.
    """

    loss_scale = 1.0
    same_passes = False

    def __init__(
        self,
        parameters: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        max_norm: float,
        *,
        graphed: bool,
        processes: Processes = ALONE,
        clipping: RelativeClipping | None = None,
    ) -> None:
        self._clipping = clipping
        self._parameters = list(parameters)
        self.optimizer = optimizer
        self._max_norm = max_norm
        self._graphed = graphed
        self._processes = processes
        self._steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._norm: Tensor | None = None

    def __call__(self, factor: float) -> Tensor:
        """One update at so much of each group's peak learning rate.

        Returns:
            The norm of the gradients before clipping. Where it is no finite number, neither are
            the parameters any more.
        """
        set_learning_rates(self.optimizer, factor)
        self._steps += 1
        gradients_of(self._parameters)  # AdamW would keep no moments of what has none
        if self._processes.count > 1:
            self._sum_gradients()
        if not self._graphed or self._steps <= _WARM_UP:
            return self._run()
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(self._graph, capture_error_mode="relaxed"):
                self._norm = self._run()
        self._graph.replay()
        assert self._norm is not None
        return self._norm

    def _sum_gradients(self) -> None:
        """One collective for all of them: they are few beside the base model."""
        gradients = gradients_of(self._parameters)
        flat = self._processes.sum_(torch.cat([gradient.view(-1) for gradient in gradients]))
        sizes = [gradient.numel() for gradient in gradients]
        parts = [part.view_as(g) for part, g in zip(flat.split(sizes), gradients, strict=True)]
        torch._foreach_copy_(gradients, parts)

    def _run(self) -> Tensor:
        if self._clipping is None:
            norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._max_norm)
        else:
            norm = self._clipping.clip(gradients_of(self._parameters))
        if self._graphed and torch.cuda.is_current_stream_capturing():
            _step_beside(self.optimizer)
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self._graphed)
        return norm

    def state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Updating`."""
        usual = {} if self._clipping is None else self._clipping.state(tensors)
        return {
            f"{name}/{key}": value.detach()
            for name, tensor in tensors.items()
            for key, value in self.optimizer.state[tensor].items()
        } | usual

    def restore(self, tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
        """See `Updating`.

        Raises:
            MtlLoraError: it is the state of other parameters.
        """
        require_state(tensors, saved, clipping=self._clipping is not None)
        if self._clipping is not None:
            self._clipping.restore(tensors, saved)
        groups = self.optimizer.param_groups
        on_card = any(group.get("fused") or group.get("capturable") for group in groups)
        for name, tensor in tensors.items():
            for key in (*MOMENTS, "step"):
                value = saved[f"{name}/{key}"]
                # `step` is a scalar that torch's AdamW keeps on the CPU, unless it is one kernel.
                device = value.device if key == "step" and not on_card else tensor.device
                self.optimizer.state[tensor][key] = value.to(device, copy=True)


@contextmanager
def part_of(optimizer: torch.optim.Optimizer, number: int, count: int) -> Iterator[None]:
    """Inside the block the optimiser knows every `count`-th parameter of each group, from `number` on, and no others."""
    whole = optimizer.param_groups
    some = [{**group, "params": group["params"][number::count]} for group in whole]
    optimizer.param_groups = [group for group in some if group["params"]]
    try:
        yield
    finally:
        optimizer.param_groups = whole


def _step_beside(optimizer: torch.optim.Optimizer) -> None:
    """One step, of which parts run beside each other: torch's kernel takes some thirty tensors a launch, and as many
    blocks of a card if they are as small as adapters are."""
    main = torch.cuda.current_stream()
    streams = [torch.cuda.Stream() for _ in range(_BESIDE)]
    for number, stream in enumerate(streams):
        stream.wait_stream(main)
        with torch.cuda.stream(stream), part_of(optimizer, number, len(streams)):
            optimizer.step()
    for stream in streams:
        main.wait_stream(stream)


def gradients_of(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Of all of them; of one that no row of this process reached zeros."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [p.grad for p in parameters if p.grad is not None]
