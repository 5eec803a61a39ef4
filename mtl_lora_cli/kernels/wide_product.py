"""Products of bfloat16 matrices on a CPU whose sums are not rounded to it.

torch has no such product there, but oneDNN has one of float32 matrices that may take their values as bfloat16:
of values that are bfloat16 already nothing is lost, and it is two to three times as fast as the usual one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, of matrices or of stacks of them [N, p, q] and [N, q, s].

    Args:
        a, b: bfloat16 on a CPU, or float32 whose values are.
    """
    with _as_bfloat16():
        return a.float() @ b.float()


@contextmanager
def _as_bfloat16() -> Iterator[None]:
    """Inside the block a product of float32 on a CPU may round what it is given."""
    backend: Any = torch.backends.mkldnn
    settings = backend.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
