"""What stands between the two products of an expert: its activation, times what the expert counts.

    a_s = v_s · f(g_s) ⊙ u_s        v_s of a pair of a position and an expert

v is multiplied here and not behind the second product, where rows are longer. Its gradient, times v, is
⟨da_s, a_s⟩.
"""

from __future__ import annotations

from torch import Tensor

from mtl_lora_cli.kernels.backend import in_triton
from mtl_lora_cli.kernels.clamped import Clamped, clamped, clamped_gradient
from mtl_lora_cli.kernels.gated import Activation, gated, gated_gradient

ExpertActivation = Activation | Clamped


def expert_gated(both: Tensor, values: Tensor, activation: ExpertActivation) -> Tensor:
    """a [S, f].

    Args:
        both: gates and ups [S, 2f]; beside each other, or, of `Clamped`, neighbours.
        values: v [S], float32 or better.
        activation: f.
    """
    if in_triton(both):
        from mtl_lora_cli.kernels import triton_expert_gate

        return triton_expert_gate.expert_gated(both, values, activation)
    if isinstance(activation, Clamped):
        active = clamped(both, activation)
    else:
        active = gated(both, activation)
    return active.mul_(values.to(active.dtype)[:, None])


def expert_gated_gradient(
    da: Tensor,
    both: Tensor,
    values: Tensor,
    activation: ExpertActivation,
    *,
    again: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradient of gates and ups, that of v times v, and a once more.

    Args:
        da: [S, f]; it may be written over.
        both, values, activation: as of `expert_gated`.
        again: compute a, too.

    Returns:
        [S, 2f], perhaps written over `both`; [S] in the dtype of v; [S, f] or None.
    """
    if in_triton(both):
        from mtl_lora_cli.kernels import triton_expert_gate

        return triton_expert_gate.expert_gated_gradient(da, both, values, activation, again=again)
    da.mul_(values.to(da.dtype)[:, None])
    active: Tensor | None
    if isinstance(activation, Clamped):
        dboth, active = clamped_gradient(da, both, activation)
    else:
        dboth, active = gated_gradient(da, both, activation, again=True)
    assert active is not None
    through = (da.to(values.dtype) * active.to(values.dtype)).sum(-1)
    return dboth, through, active.mul_(values.to(active.dtype)[:, None]) if again else None
