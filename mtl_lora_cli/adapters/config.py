"""What an adapter is made of, apart from its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Method = Literal["mtl-lora", "lora"]
Transform = Literal["full", "diagonal"]
Gate = Literal["weights", "embedding"]
KINDS = {"method": get_args(Method), "transform": get_args(Transform), "gate": get_args(Gate)}


@dataclass(frozen=True)
class AdapterConfig:
    """The numbers and kinds of an adapter: MTL-LoRA (arXiv 2410.09437) or LoRA (arXiv 2106.09685).

    LoRA is one A and one B for all tasks: it has one up-projection and no transform and no gate.

    Attributes:
        rank: r, rows of the shared down-projection A [r, in].
        alpha: the update is scaled by s = alpha / rank.
        up_projections: n, number of shared up-projections B_i [out, r].
        temperature: τ of the gate softmax(w_t / τ).
        transform: Λ_t is a full [r, r] matrix or a diagonal [r].
        gate: w_t is learned as it stands (`weights`), or is G e_t with one task embedding e_t [d]
            for the whole model and a projection G [n, d] in each layer (`embedding`).
        embedding_size: d.
        dropout: probability of dropping an input feature before A, while training.
        gate_start: standard deviation of the gate's logits w_t / τ at the start. It must not be 0:
            equal gates give every B_i the same gradient, and the B_i stay copies of each other.
        target_modules: names (or last parts of names, or patterns with `*`) of the layers to adapt.
        method: name of the method, as the adapter file spells it.
    """

    rank: int = 8
    alpha: float = 16.0
    up_projections: int = 3
    temperature: float = 0.5
    transform: Transform = "full"
    gate: Gate = "weights"
    embedding_size: int = 16
    dropout: float = 0.0
    gate_start: float = 2.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    method: Method = "mtl-lora"

    def __post_init__(self) -> None:
        if self.method == "lora" and self.up_projections != 1:
            raise ValueError(f"lora has one up-projection, received {self.up_projections}")

    @property
    def routed(self) -> bool:
        """Whether tasks differ: whether there are transforms and gates."""
        return self.method != "lora"

    @property
    def scale(self) -> float:
        """s = alpha / rank."""
        return self.alpha / self.rank
