"""The kernels run in Triton's interpreter here, on the CPU; on a card `pytest -m cuda` compiles them."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by Triton when it is imported

pytest.importorskip("triton", reason="Triton is not installed")
