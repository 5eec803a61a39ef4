"""Sizes of a model with its adapters: what the bytes of its blocks are reckoned from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from mtl_lora_cli.adapters.frozen import ALIGNMENT
from mtl_lora_cli.engine.plan import ExpertsPlan, LayerPlan
from mtl_lora_cli.kernels.backend import PITCH


@dataclass(frozen=True)
class GroupSizes:
    """Projections of one input.

    Attributes:
        inputs, outputs: of their weights together, [outputs, inputs].
        rows: of all A_j below each other, filled up; 0 where none is adapted.
        columns: of all B_j beside each other, up-projections times rank each, filled up.
    """

    inputs: int
    outputs: int
    rows: int = 0
    columns: int = 0

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs

    @property
    def aligned(self) -> bool:
        """Whether margins of the weights can hold its adapters; see `adapters/frozen.py`."""
        return self.rows > 0 and self.rows % ALIGNMENT == 0 and self.columns % ALIGNMENT == 0

    @property
    def pitch(self) -> int:
        """Values of one row of [x | room]."""
        return -(-(self.inputs + self.columns) // PITCH) * PITCH


@dataclass(frozen=True)
class StackSizes:
    """One projection of all experts.

    Attributes:
        inputs, outputs: of one expert's matrix.
        experts: E.
        rows, columns: of one adapter's A and of its B; 0 where there is none.
        units: adapters, one or as many as experts.
    """

    inputs: int
    outputs: int
    experts: int
    rows: int = 0
    columns: int = 0
    units: int = 1

    @property
    def values(self) -> int:
        """Numbers in the stack."""
        return self.inputs * self.outputs * self.experts

    def tape(self, sizes: ModelSizes, pairs: int) -> int:
        """Bytes that an adapter keeps for so many pairs: z, dropout's mask, and its factors in `dtype`."""
        if not self.rows:
            return 0
        factors = (self.rows * self.inputs + self.outputs * self.columns) * self.units
        return (
            self.rows * sizes.value + sizes.dropout * self.inputs
        ) * pairs + factors * sizes.value


@dataclass(frozen=True)
class LayerSizes:
    """One decoder layer: its plan and its groups.

    Attributes:
        gate_up, down: of its MLP, in a mixture of experts of the one that every position asks; None: there
            is none.
        inner: F of one expert.
        experts: weights of all experts together.
        gate: of the shared MLP.
        stacks: gate_up and down of the experts.
        norms_before: the output of the layer before is normed when this one adds it.
    """

    plan: LayerPlan
    qkv: GroupSizes
    o: GroupSizes
    gate_up: GroupSizes | None = None
    down: GroupSizes | None = None
    inner: int = 0
    experts: int = 0
    gate: GroupSizes | None = None
    stacks: tuple[StackSizes, ...] = ()
    norms_before: bool = False

    @property
    def mlp(self) -> tuple[GroupSizes, GroupSizes]:
        """gate_up and down, where there is an MLP."""
        assert self.gate_up is not None and self.down is not None
        return self.gate_up, self.down

    @property
    def gated(self) -> int:
        """Values of gate and up for one position, of all experts that it asks."""
        mlp = self.plan.mlp
        if isinstance(mlp, ExpertsPlan):
            shared = 0 if self.gate_up is None else self.gate_up.outputs
            return 2 * self.inner * mlp.top + shared
        return self.mlp[0].outputs

    @property
    def groups(self) -> tuple[GroupSizes, ...]:
        mlp = () if self.gate_up is None else self.mlp
        return (self.qkv, self.o, *mlp, *([] if self.gate is None else [self.gate]))


@dataclass(frozen=True)
class SightSizes:
    """What a token of a picture takes, in bytes; see `memory/pictures.py`.

    Attributes:
        held: as long as the pass lasts.
        working: while the tower runs, before the first layer.
        frozen: weights of the tower and what stands behind it, of all tokens; no process has but a part of them.
    """

    held: int
    working: int
    frozen: int


@dataclass(frozen=True)
class ModelSizes:
    """Everything that memory depends on, but for the batch.

    Attributes:
        layers: of the decoder.
        vocabulary: V.
        other_weights: embedding, head, norms, biases; a tied weight once.
        trained: values of the adapter.
        value: bytes of a number in `dtype`.
        four_bit: the layers' weights are NF4 or FP4.
        eight_bit: they are int8.
        parts: of how many processes each holds one part of the weights, and gathers a layer at a
            time; 1 where each holds all.
        fp8: of the layers' weights two 8-bit copies are kept, and, where they are not quantised, nothing else.
        kernels: our kernels run; otherwise plain torch, which keeps and copies more.
        dropout: whether features are dropped before A.
        capped: the logits have a soft cap.
        left_expanded: of so many layers 4-bit or 8-bit weights stay there as dense matrices, too.
        sight: of pictures; None: none are shown.
    """

    layers: tuple[LayerSizes, ...]
    vocabulary: int
    other_weights: int
    trained: int
    value: int
    four_bit: bool = False
    eight_bit: bool = False
    parts: int = 1
    fp8: bool = False
    kernels: bool = True
    dropout: bool = False
    capped: bool = False
    sight: SightSizes | None = None
    left_expanded: int = 0

    @property
    def expanded(self) -> bool:
        """Whether weights are laid into a buffer for each product."""
        return self.four_bit or self.eight_bit or self.parts > 1

    @property
    def matrix_values(self) -> int:
        """Values of the memory in which weights are expanded, one matrix after the other."""
        groups = [self.matrix(group) for layer in self.layers for group in layer.groups]
        stacks = [stack.values for layer in self.layers for stack in layer.stacks]
        return max(groups + (stacks if self.four_bit else []))

    @property
    def let_go(self) -> bool:
        """Whether the layers' weights are there in `dtype` until the first step alone."""
        return self.fp8 and not self.expanded

    @property
    def width(self) -> int:
        """d."""
        return self.layers[0].qkv.inputs

    def roomy(self, group: GroupSizes) -> bool:
        """Whether the group's inputs and weights have room for its adapters."""
        return self.kernels and self.value == 2 and not self.fp8 and group.aligned

    def input_width(self, group: GroupSizes) -> int:
        """Values of one row of the group's input, room included."""
        return group.pitch if self.roomy(group) else group.inputs

    def matrix(self, group: GroupSizes) -> int:
        """Values of the group's dense matrix, margins included."""
        rows = group.outputs + (group.rows if self.roomy(group) else 0)
        return rows * self.input_width(group)

    def tape(self, group: GroupSizes, count: int) -> int:
        """Bytes that a group's adapters keep for so many positions: z, dropout's mask, and, where they do
        not stand in margins of a dense matrix, their factors in `dtype`."""
        if not group.rows:
            return 0
        found = (group.rows * self.value + self.dropout * group.inputs) * count
        if self.expanded or not self.roomy(group):
            factors = group.rows * group.inputs + group.outputs * group.columns
            found += factors * self.value
        return found


ROOM = 256  # questions and segments of a pass on a card are filled up to whole multiples of this


def room_for(count: int, unit: int = ROOM) -> int:
    """The least whole multiple of a unit that holds so many."""
    return -(-max(1, count) // unit) * unit


def with_slack(most: int, at_most: int | None = None) -> int:
    """A sixteenth more than the fullest row of one epoch has, as later ones pack other rows; never more than
    `at_most`, unless that row has."""
    found = most + most // 16
    return found if at_most is None else min(found, max(most, at_most))


class Load(NamedTuple):
    """One pass.

    Attributes:
        positions, asked: N, and U of them that are asked for.
        longest: positions of the longest segment; 0: not known, it may be all of them.
        trees: examples share what they begin with.
        shown: how many of the positions are pictures'.
    """

    positions: int
    asked: int
    longest: int = 0
    trees: bool = False
    shown: int = 0

    @property
    def segment(self) -> int:
        """Positions of the longest segment, at most."""
        return min(self.positions, self.longest or self.positions)
