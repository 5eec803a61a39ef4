"""The kernels run in Triton's interpreter here, on the CPU; on a card they are compiled."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture(autouse=True)
def repaired_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the interpreter of Triton 3.6 gets wrong; compiled kernels do neither.

    It calls int() on arrays of one element for loop bounds, which numpy 2.4 refuses, and multiplies
    the bits of bfloat16 numbers as if they were integers.
    """
    patch, builder = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder
    create_dot = builder.create_dot

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

    monkeypatch.setenv("MTL_LORA_KERNELS", "triton")
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
    monkeypatch.setattr(builder, "create_dot", dot)
