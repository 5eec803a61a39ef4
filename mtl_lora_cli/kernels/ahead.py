"""Triton's kernels compiled beside each other, before the first pass needs them.

A kernel is compiled where it is first launched, one after another, and a first step waits for some thirty of them.
Most of that happens outside of Python's lock, in compilers of their own. So a pass is gone through in which every
launch only begins to compile. Nothing is run on the card by it: what such a pass computes means nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

_THREADS = 16


@contextmanager
def compiled_beside() -> Iterator[None]:
    """Inside, launches of Triton's kernels compile and launch nothing; at the end all could be launched.

    What launches a kernel is compiled, too, by older versions of Triton, and by a C compiler for each.

    Raises:
        ImportError: Triton is not installed, or cannot do that.
    """
    from triton.runtime import _async_compile as own
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run
    with ThreadPoolExecutor(_THREADS, "kernels") as pool:
        compiling: Any = own.AsyncCompileMode(pool)
        found: dict[int, Any] = {}

        def begin(kernel: Any, *arguments: Any, **named: Any) -> Any:
            with _active(own, compiling):
                one = launch(kernel, *arguments, **{**named, "warmup": True})
            found[id(one)] = one
            return one

        JITFunction.run = begin
        try:
            yield
        finally:
            JITFunction.run = launch
            compiling.__exit__(None, None, None)
        deque(pool.map(_made_ready, found.values()), maxlen=0)


def _made_ready(compiled: Any) -> None:
    """Have a kernel loaded onto the card, and what launches it compiled."""
    with suppress(Exception):  # whoever launches it is told
        kernel = compiled.result() if hasattr(compiled, "result") else compiled
        kernel.run  # noqa: B018 - it is made when it is first asked for


@contextmanager
def _active(own: Any, compiling: Any) -> Iterator[None]:
    """Triton's switch, which belongs to a thread in newer versions: gradients are computed in one of torch's own."""
    if not isinstance(own.active_mode, ContextVar):
        own.active_mode = compiling
        yield
        return
    before = own.active_mode.set(compiling)
    try:
        yield
    finally:
        own.active_mode.reset(before)
