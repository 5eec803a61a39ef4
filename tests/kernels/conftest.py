"""The kernels run in Triton's interpreter here, on the CPU; on a card they are compiled."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture(autouse=True)
def repaired_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the interpreter of Triton 3.6 gets wrong; compiled kernels do neither.

    It calls int() on arrays of one element for loop bounds, which numpy 2.4 refuses, multiplies
    the bits of bfloat16 numbers as if they were integers, and halves what it rounds up to a power of two in e4m3.
    """
    patch, builder = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder
    create_dot, convert = builder.create_dot, builder.create_fp_to_fp

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, widened(a), widened(b), *rest)

    def rounded(self: Any, source: Any, to: Any, mode: Any) -> Any:
        if (source.dtype.scalar, to.scalar) != (tl.float32, tl.float8e4nv):
            return convert(self, source, to, mode)
        found = torch.from_numpy(source.data).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return interpreter.TensorHandle(found, tl.float8e4nv)

    monkeypatch.setenv("MTL_LORA_KERNELS", "triton")
    monkeypatch.setattr(builder, "create_fp_to_fp", rounded)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
    monkeypatch.setattr(builder, "create_dot", dot)
