"""The arms of `dense_study.py`: what of a backbone learns, and how tasks share it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from dense_data import CLASSES, HEIGHT, WIDTH
from torch import Tensor, nn

TASKS = ("segmentation", "depth", "normals")
WITH_EDGES = (*TASKS, "edges")
# Of these loss weights an arm of several tasks takes those that are best on the held-out pictures.
WEIGHTS = (
    {"segmentation": 1.0, "depth": 1.0, "normals": 2.0, "edges": 4.0},
    {"segmentation": 1.0, "depth": 2.0, "normals": 8.0, "edges": 4.0},
    {"segmentation": 1.0, "depth": 4.0, "normals": 20.0, "edges": 4.0},
)
# The first rates that are tried; where an outer one is best, one beyond it is tried, too.
ADAPTER_RATES, FULL_RATES, FROZEN_RATES = (
    (5e-4, 1e-3, 2e-3),
    (3e-5, 6e-5, 1.2e-4),
    (2e-3, 4e-3, 8e-3),
)
MULTI = ("frozen", "multi full", "shared LoRA", "task only", "both", "authors' form")
SINGLE = ("single full", "single LoRA", "single LoRA, split")
PROBE = "linear probe"
SPLIT = {"segmentation": 7, "depth": 7, "normals": 6}


@dataclass(frozen=True)
class Kind:
    """What a lane learns again and again.

    Attributes:
        arm: see `dense_study`.
        tasks: that it learns.
        rank: of the arm's LoRA, where it differs by task.
        like: the kind whose rate and weights it takes; None: its own are looked for.
        backbone: another one than the study's, by its name.
    """

    arm: str
    tasks: tuple[str, ...]
    rank: int = 20
    like: Kind | None = None
    backbone: str = ""

    @property
    def name(self) -> str:
        return f"{self.arm}: {'+'.join(self.tasks)}"

    @property
    def learns_decoders_alone(self) -> bool:
        return self.arm.startswith(("frozen", PROBE))

    @property
    def rates(self) -> tuple[float, ...]:
        if self.learns_decoders_alone:
            return FROZEN_RATES
        return FULL_RATES if self.arm.endswith("full") else ADAPTER_RATES


def kinds(left_out: Sequence[str] = (), probed: Sequence[str] = ()) -> list[Kind]:
    """All but those left out, the largest first; `probed` are other backbones."""
    found = [Kind(arm, TASKS) for arm in reversed(MULTI)]
    found += [
        Kind(arm, WITH_EDGES, like=Kind(arm, TASKS))
        for arm in ("both", "shared LoRA", "multi full", "frozen")
    ]
    for arm in SINGLE:
        for task in TASKS if "split" in arm else WITH_EDGES:
            found.append(Kind(arm, (task,), SPLIT[task] if "split" in arm else 20))
    found.append(Kind(PROBE, TASKS))
    found += [Kind(f"{PROBE}, {name}", TASKS, backbone=name) for name in probed]
    return [
        kind
        for kind in found
        if kind.arm not in left_out and not ("edges" in left_out and "edges" in kind.tasks)
    ]


class Probe(nn.Module):
    """A linear probe in a decoder's place: answer = form(up(Σ_i up(W_i norm(x_i)))), norm without values of its own.

    Args:
        channels: C_i of each stage.
        spec: what the task's map holds.
    """

    def __init__(self, channels: Sequence[int], spec: Any) -> None:
        super().__init__()
        self.spec = spec
        self.projections = nn.ModuleList(nn.Linear(count, spec.channels) for count in channels)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        from mtl_lora_cli.dense.decoders import formed
        from mtl_lora_cli.dense.resize import resized

        quarter = (-(-size[0] // 4), -(-size[1] // 4))
        parts = [
            resized(own(F.layer_norm(x, x.shape[-1:])).permute(0, 3, 1, 2), quarter)
            for x, own in zip(maps, self.projections, strict=True)
        ]
        return formed(resized(torch.stack(parts).sum(0), size).float(), self.spec)


def as_the_authors_have_it(fork: Any) -> None:
    """Make a fork MTLoRA's own: y_t = W x + s' B_t A_t x_t, where x is the stream of all tasks and x_t the task's.

    A layer without parts of tasks' own gives every task what it gives the stream of all.
    """
    fork._last = False  # the stream of all is always needed
    for layer in fork.block.modules():
        if hasattr(layer, "base_layer"):
            layer.forward = _authors_layer(layer, fork)


def _authors_layer(layer: Any, fork: Any) -> Callable[[Tensor], Tensor]:
    plain = layer.forward

    def forward(x: Tensor) -> Tensor:
        *pieces, common = x.chunk(len(fork.tasks) + 1)
        ids = torch.full((len(common),), fork._routing.shared)
        with fork._routing.assign(ids, windows=True):
            shared = plain(common)
        if not hasattr(layer, "task_lora_A"):
            return shared.repeat(len(pieces) + 1, *[1] * (x.ndim - 1))
        frozen = F.linear(common, layer.base_layer.weight, layer.base_layer.bias)
        own = [frozen + _part(layer, x_t, t) for x_t, t in zip(pieces, fork.tasks, strict=True)]
        return torch.cat([*own, shared])

    return forward


def _part(layer: Any, x: Tensor, task: int) -> Tensor:
    """s' B_t A_t x."""
    down, up = layer.task_lora_A[task].to(x.dtype), layer.task_lora_B[task].to(x.dtype)
    return layer.config.scale(layer.config.task_rank) * F.linear(F.linear(x, down), up)


class Builder:
    """Makes hosts of one backbone, which is read once.

    Args:
        encoder: folder of transformers.
        device, dtype: where and in what it computes.
    """

    def __init__(self, encoder: Path, device: torch.device, dtype: torch.dtype) -> None:
        from mtl_lora_cli.dense.backbones import family_of, load_backbone
        from mtl_lora_cli.models.base import find_base_model

        base = find_base_model(str(encoder))
        self.device, self.dtype = device, dtype
        self._trunk = load_backbone(base, size=(HEIGHT, WIDTH), dtype=dtype, device=device)
        self._family = family_of(base, self._trunk.config)

    def host(self, kind: Kind) -> Any:
        """Of a kind; what learns is what has a gradient."""
        from mtl_lora_cli.adapters.inject import inject
        from mtl_lora_cli.dense.host import DenseHost

        trunk = copy.deepcopy(self._trunk)
        stages = self._family.stages(trunk.config)
        config = self._settings(kind, trunk)
        adapter = inject(
            trunk,
            config,
            kind.tasks,
            within=("embeddings", "encoder"),
            own_in=stages.blocks if config.streams else None,
        )
        specs = [_spec(task) for task in kind.tasks]
        host = DenseHost(trunk, self._family, adapter, specs, self.dtype)
        if kind.arm.startswith(PROBE):
            made = [Probe(stages.channels, spec).to(self.device) for spec in specs]
            host.decoders = nn.ModuleList(made)
            adapter.decoders = dict(zip(kind.tasks, made, strict=True))
        if kind.arm == "authors' form":
            for fork in host.taps:
                as_the_authors_have_it(fork)
        _freeze(adapter, kind)
        return host

    @staticmethod
    def _settings(kind: Kind, trunk: Any) -> Any:
        from mtl_lora_cli.adapters.methods import configure

        named = trunk.named_modules()
        linear = {n.rpartition(".")[2] for n, m in named if isinstance(m, nn.Linear)}
        linear -= {"reduction"}
        settings: dict[str, Any] = {"target_modules": sorted(linear)}
        ranks = {"both": (16, 4), "task only": (16, 20), "authors' form": (16, 6)}.get(kind.arm)
        if kind.learns_decoders_alone:  # an adapter has to be somewhere, and stays at zero
            settings["target_modules"] = sorted(linear)[:1]
        if ranks is None:
            whole = ["*"] if kind.arm.endswith("full") else []
            settings |= {"method": "lora", "rank": kind.rank, "alpha": 2.0 * kind.rank}
            return configure(**settings, whole_modules=whole)
        own = sorted(linear & {"o_proj", "dense", "fc1", "fc2"})
        settings |= {
            "method": "mtlora",
            "rank": ranks[0],
            "task_rank": ranks[1],
            "streams": "stages",
            "alpha": 2.0 * (ranks[1] if kind.arm == "task only" else ranks[0]),
            "task_modules": own if kind.arm == "authors' form" else None,
        }
        return configure(**settings)


def _spec(task: str) -> Any:
    from mtl_lora_cli.tasks.maps import MapSpec

    if task == "segmentation":
        return MapSpec("segmentation", CLASSES, tuple(map(str, range(CLASSES))))
    if task == "depth":
        return MapSpec("depth", 1, low=0.7, high=10.0, scale="log")
    return MapSpec(task, 3 if task == "normals" else 1)


def _freeze(adapter: Any, kind: Kind) -> None:
    for name, tensor in adapter.tensors().items():
        role = name.rpartition(".")[2]
        only_decoders = kind.learns_decoders_alone and not name.startswith("decoder:")
        not_own = kind.arm == "task only" and role in ("lora_A", "lora_B")
        unread = name == "whole:embeddings.mask_token"
        if only_decoders or not_own or unread:
            tensor.requires_grad_(False)


def start(host: Any, seed: int) -> None:
    """Give what learns by adapters and decoders the values that a seed begins with."""
    from mtl_lora_cli.adapters.layer import TaskLayer, fresh, like

    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in host.model.modules():
            if isinstance(layer, TaskLayer):
                for name, role in layer.roles.items():
                    value = fresh(layer.config, role, **like(layer.base_layer.weight))
                    getattr(layer, name).copy_(value)
        for module in host.decoders.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
