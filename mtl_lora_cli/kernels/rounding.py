"""Operations whose result a product takes in 8-bit floats: rounded where it is made, not in another pass over it.

Each gives what the operation of its name gives, up to the order of float32's operations, and then `fp8.to_rows` of
that, bit for bit; in the `eight` form the numbers in their own dtype are never written.
"""

from __future__ import annotations

from torch import Tensor

from mtl_lora_cli.kernels import gated as plain_gated
from mtl_lora_cli.kernels import norm as plain_norm
from mtl_lora_cli.kernels import stream
from mtl_lora_cli.kernels.backend import in_triton
from mtl_lora_cli.kernels.fp8 import Form, Rounded, ScaledRows, rounded, to_rows
from mtl_lora_cli.kernels.gated import Activation
from mtl_lora_cli.kernels.rotary import Turn, rotate_
from mtl_lora_cli.kernels.stream import After, Entry, Norm

Made = Tensor | Rounded


def enter(
    x: Tensor, out: Tensor | None, after: After, norm: Norm | None, form: Form, *, room: int = 0
) -> tuple[Entry, Made]:
    """`stream.enter`."""
    if form == "exact":
        return stream.enter(x, out, after, norm, room=room)
    if not in_triton(x) or (norm is None and (out is None or after.nothing)):
        entry, h = stream.enter(x, out, after, norm)
        return entry, rounded(h, form)
    if out is not None and not after.nothing:
        from mtl_lora_cli.kernels import triton_stream

        entry, made = triton_stream.enter(x, out, after, norm, 0, form)
        return entry, made.rounded()
    from mtl_lora_cli.kernels import triton_norm

    assert norm is not None
    total, made, inverse = triton_norm.add_norm(x, out, *norm, 0, form)
    return Entry(total, inverse), made.rounded()


def apply_norm(x: Tensor, inverse: Tensor, weight: Tensor, form: Form, *, room: int = 0) -> Made:
    """`norm.apply_norm`."""
    if form == "exact":
        return plain_norm.apply_norm(x, inverse, weight, room=room)
    if in_triton(x):
        from mtl_lora_cli.kernels import triton_norm

        return triton_norm.apply_norm(x, inverse, weight, 0, form).rounded()
    return rounded(plain_norm.apply_norm(x, inverse, weight), form)


def enter_gradient(
    dh: Tensor,
    dresidual: Tensor | None,
    entry: Entry,
    after: After,
    norm: Norm | None,
    form: Form,
    *,
    room: int = 0,
) -> tuple[Tensor, Tensor, ScaledRows | None]:
    """`stream.enter_gradient`, and the gradient of o in 8-bit rows."""
    if form == "exact":
        return *stream.enter_gradient(dh, dresidual, entry, after, norm, room=room), None
    if not in_triton(entry.total) or (after.nothing and entry.inverse is None):
        dx, dout = stream.enter_gradient(dh, dresidual, entry, after, norm)
        return dx, dout, to_rows(dout)
    if not after.nothing:
        from mtl_lora_cli.kernels import triton_stream

        dx, made = triton_stream.enter_gradient(dh, dresidual, entry, after, norm, 0, form)
        return dx, made.whole(), made.rows
    from mtl_lora_cli.kernels import triton_norm

    assert norm is not None and entry.inverse is not None
    made = triton_norm.norm_gradient(
        dh, dresidual, entry.total, entry.inverse, norm.weight, 0, form
    )
    return made.whole(), made.whole(), made.rows


def gated(both: Tensor, activation: Activation, form: Form, *, room: int = 0) -> Made:
    """`gated.gated`."""
    if form == "exact":
        return plain_gated.gated(both, activation, room=room)
    if _held(both):
        from mtl_lora_cli.kernels import triton_rounding

        return triton_rounding.gated(both, activation, form)
    return rounded(plain_gated.gated(both, activation), form)


def gated_gradient(
    da: Tensor,
    both: Tensor,
    activation: Activation,
    form: Form,
    *,
    again: bool = False,
    room: int = 0,
) -> tuple[Made, Tensor | None]:
    """`gated.gated_gradient`."""
    if form != "exact" and _held(both):
        from mtl_lora_cli.kernels import triton_rounding

        return triton_rounding.gated_gradient(da, both, activation, form, again=again)
    gradient, active = plain_gated.gated_gradient(da, both, activation, again=again, room=room)
    return gradient if form == "exact" else rounded(gradient, form), active


def rotate_back(dqkv: Tensor, turn: Turn, form: Form, *, heads: int, key_heads: int) -> Made:
    """`rotary.rotate_` by −θ."""
    width = dqkv.shape[1] // (heads + 2 * key_heads)
    whole = not turn.pairs and 2 * turn.cos.shape[1] == width
    if form != "exact" and in_triton(dqkv) and whole:
        from mtl_lora_cli.kernels import triton_rounding

        return triton_rounding.rotate_back(dqkv, turn, form, heads=heads, key_heads=key_heads)
    rotate_(dqkv, turn, heads=heads, key_heads=key_heads, back=True)
    return dqkv if form == "exact" else rounded(dqkv, form)


def _held(both: Tensor) -> bool:
    """Whether a program can hold a row of the activation."""
    if not in_triton(both):
        return False
    from mtl_lora_cli.kernels import triton_rounding

    return both.shape[1] // 2 <= triton_rounding.WIDEST
