"""The base weights as a run with `quantization` saw them, one matrix at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtl_lora_cli.adapters.experts import STACKS, expert_modules
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.export.shards import FLOATS, read_shard
from mtl_lora_cli.export.weight_names import weight_names
from mtl_lora_cli.kernels import int8, nf4
from mtl_lora_cli.machine.cards import pick_device
from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.models.files import weight_files
from mtl_lora_cli.models.load import BUILDING, load_model


@dataclass(frozen=True)
class Quantised:
    """How a run rounds its base model's weights.

    Attributes:
        kind: `nf4`, `fp4` or `int8`, as in the recipe.
        names: in the files, of the weights that are quantised.
        dtype: that the run computes in, and to which all other weights are cast.
        device: where weights are quantised; another kind of device may round ties otherwise.
    """

    kind: str
    names: frozenset[str]
    dtype: torch.dtype
    device: torch.device

    def rounded(self, weight: Tensor) -> Tensor:
        """Ŵ: the weight quantised as `models/load.py` has it done, and expanded again.

        It waits while a model is loaded: bitsandbytes makes numbers in torch's default dtype, which that sets for all threads.

        Args:
            weight: [out, in], or a stack [E, out, in], as the file stores it.

        Returns:
            [out, in], a stack's matrices below each other, in the run's dtype, on the CPU.
        """
        import bitsandbytes.functional as bnb

        with BUILDING:
            return self._rounded(weight, bnb)

    def _rounded(self, weight: Tensor, bnb: Any) -> Tensor:
        weight = weight.to(self.device, self.dtype)
        out = torch.empty_like(weight.flatten(0, -2))
        if self.kind == "int8":
            values, scale, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
            return int8.expand(values, scale, out).cpu()
        packed, state = bnb.quantize_4bit(
            weight, blocksize=64, quant_type=self.kind, compress_statistics=True
        )
        return nf4.expand(packed, state, out).cpu()


@dataclass(frozen=True)
class WeightRounding:
    """How far quantised weights are from the original ones: ‖W − Ŵ‖ / ‖W‖ (Frobenius) by matrix.

    Attributes:
        matrices: number of them.
        mean, largest: of the ratio.
        where: the weight of the largest.
    """

    matrices: int
    mean: float
    largest: float
    where: str


def quantised(base: BaseModel, kind: str, dtype: torch.dtype) -> Quantised:
    """Which weights a run quantises: those that transformers and bitsandbytes pick.

    Args:
        base: the full-precision base model; none of its weights are read.
        kind: as in the recipe.
        dtype: that the run computes in.
    """
    from bitsandbytes.nn import Linear4bit

    # Every kind picks the same layers; of 8 bits, transformers makes none without the weights.
    model = load_model(base, dtype=dtype, device=torch.device("meta"), quantization="nf4")
    place = weight_names(base)
    names = {
        place.tensor(f"{path}.weight")
        for path, part in model.named_modules()
        if isinstance(part, Linear4bit)
    }
    if kind != "int8":  # which leaves experts as they are
        names |= {
            place.tensor(f"{path}.{name}")
            for path, _ in expert_modules(dict(model.named_modules()))
            for name in STACKS
            if f"{path}.{name}" not in place.pieces
        }
    return Quantised(kind, frozenset(names), dtype, pick_device())


def require_whole_stacks(base: BaseModel, kind: str) -> None:
    """Refuse a base model whose files hold pieces of what a run quantised as one.

    Raises:
        UsageError: naming one.
    """
    pieces = weight_names(base).pieces
    if kind != "int8" and pieces:
        raise UsageError(
            f"--base dequantized: '{min(pieces)}' was quantised as one stack of experts, and the base "
            "model's files hold it in pieces; leave the option out: the original weights are merged into"
        )


def measure_rounding(base: BaseModel, how: Quantised) -> WeightRounding:
    """Quantise every matrix once and compare; norms are summed in float64."""
    found = sorted(_ratios(base, how))
    largest, where = found[-1]
    return WeightRounding(len(found), sum(ratio for ratio, _ in found) / len(found), largest, where)


def _ratios(base: BaseModel, how: Quantised) -> Iterator[tuple[float, str]]:
    for path in weight_files(base.folder):
        for stored in read_shard(path)[0]:
            if stored.name in how.names and stored.dtype in FLOATS:
                weight = stored.whole()
                error = _norm(weight.float().flatten(0, -2) - how.rounded(weight).float())
                yield error / _norm(weight), stored.name


def _norm(weight: Tensor) -> float:
    return float(torch.linalg.vector_norm(weight, dtype=torch.float64))
