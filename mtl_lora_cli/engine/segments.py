"""Segments: which positions of a packed sequence belong together, and which of them see which.

A *segment* is a run of positions that attend to what stands before them in it: to all of that, or,
in a *tree*, to their ancestors: a prompt is computed once for many candidate answers, and so is what
some of them begin with. A tree lies in depth-first order, each subtree in one piece. So one number a
position says everything, its *reach*, the end of its subtree:

    query i sees key j  ⇔  j ≤ i < reach_j

In a *block*, such as a picture or a whole prompt of some models, positions see each other, those behind them, too:

    query i sees key j  ⇔  j ≤ i < reach_j  or  block_i = block_j ≥ 0

A `Rule` narrows that, as models with local attention do: by depth, the number of a position's
ancestors, so that a window is as long in a tree as it is in each of its answers alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtl_lora_cli.engine.segment_forms import (
    EVERYTHING,
    Chains,
    Rule,
    SegmentPart,
    Stacks,
    chains_of,
    depths_of,
    parts_of,
    stacks_of,
)
from mtl_lora_cli.kernels.backend import moved
from mtl_lora_cli.kernels.tiles import tile_table
from mtl_lora_cli.kernels.trees import KeyParts, Trees, above_of, key_parts


@dataclass(frozen=True)
class Segments:
    """Where the segments of one packed sequence of N positions lie.

    Attributes:
        bounds: (start, end) of each segment, in order, without gaps.
        reach: int32 [N], where segments are trees: the first position that no longer sees this one.
            None where every position sees all before it in its segment.
        device: where tensors made from these lie.
        blocks: int32 [N] on the CPU, the number of each position's block, −1 where it is in none; None: there are
            none.
        in_windows: there are blocks in layers with a window alone.
    """

    bounds: tuple[tuple[int, int], ...]
    reach: Tensor | None = None
    device: torch.device | str = "cpu"
    blocks: Tensor | None = None
    in_windows: bool = False
    _made: dict[Any, Any] = field(default_factory=dict, compare=False)

    def tiles(self, block: int, *, of_keys: bool = False) -> Tensor:
        """The tile table of our kernels (`kernels/tiles.py`), on the segments' device."""
        key = (block, of_keys)
        if key not in self._made:
            table = self.tile_table(block, of_keys=of_keys)
            self._made[key] = moved(table, self.device)
        return self._made[key]

    def tile_table(
        self, block: int, *, of_keys: bool = False, capacity: int | None = None
    ) -> Tensor:
        """The same anew on the CPU, filled up to `capacity` rows."""
        lengths = [end - start for start, end in self.bounds]
        return tile_table(lengths, block, capacity, of_keys=of_keys)

    @property
    def trees(self) -> Trees | None:
        """What our kernels are told of trees, on the segments' device; None: there are none."""
        if self.reach is None:
            return None
        if "trees" not in self._made:
            above = torch.from_numpy(above_of(self._reach.numpy(), self.bounds))
            depth = self.depth
            assert depth is not None
            self._made["trees"] = Trees(self.reach, moved(above, self.device), depth)
        return self._made["trees"]

    def key_tiles(self, block: int) -> Tensor | KeyParts:
        """What the kernel for the gradients of keys and values goes by, on the segments' device."""
        if self.reach is None:
            return self.tiles(block, of_keys=True)
        key = ("parts of keys", block)
        if key not in self._made:
            parts, joins, slots = self.key_parts(block)
            parts, joins = (moved(one, self.device) for one in (parts, joins))
            self._made[key] = KeyParts(parts, joins, slots)
        return self._made[key]

    def key_parts(self, block: int, segments: int | None = None) -> KeyParts:
        """The same of trees anew on the CPU; see `kernels.trees.key_parts`."""
        return key_parts(self.bounds, self._reach.numpy(), block, segments=segments)

    @property
    def _reach(self) -> Tensor:
        """`reach` on the CPU, where looking costs no wait if the segments came from there."""
        assert self.reach is not None
        if "reach" not in self._made:
            self._made["reach"] = self.reach.cpu()
        return self._made["reach"]

    def ready(
        self,
        tables: dict[tuple[int, bool], Tensor],
        trees: Trees | None = None,
        parts: dict[int, KeyParts] | None = None,
    ) -> Segments:
        """The same segments with tables that lie ready on their device.

        Args:
            tables: by the arguments of `tiles`.
            trees, parts: of trees, the latter by the arguments of `key_tiles`.
        """
        made: dict[Any, Any] = dict(tables)
        if trees is None:
            return replace(self, _made=made)
        made |= {("parts of keys", block): one for block, one in (parts or {}).items()}
        made |= {"trees": trees, "depth": trees.depth}
        return replace(self, reach=trees.reach, _made=made)

    def and_more(self, lengths: Sequence[int]) -> Segments:
        """With further segments behind these, none of them a tree; on the CPU."""
        own = [end - start for start, end in self.bounds]
        if self.reach is None:
            return Segments.build([*own, *lengths])
        more = torch.tensor(lengths, dtype=torch.long)
        ends = (more.cumsum(0) + len(self.reach)).repeat_interleave(more)
        return Segments.build([*own, *lengths], torch.cat([self.reach, ends.to(self.reach.dtype)]))

    def to(self, device: torch.device) -> Segments:
        """The same segments for tensors on a device."""
        if self.reach is None:
            return replace(self, device=device, _made={})
        reach = moved(self.reach, device)
        return replace(self, reach=reach, device=device, _made={"reach": self._reach})

    def blocks_of(self, rule: Rule) -> Tensor | None:
        """The blocks of a layer."""
        return None if self.in_windows and rule.window is None else self.blocks

    def parts(self, rule: Rule = EVERYTHING, dtype: torch.dtype = torch.bool) -> list[SegmentPart]:
        """Each segment as one call of torch's attention, a tree as two.

        Args:
            rule: what a query sees.
            dtype: of the masks; of a float 0 stands for seen and −∞ for not, as torch would make it of
                a bool anew for each layer.
        """
        key = ("parts", rule, dtype)
        if key not in self._made:
            reach = None if self.reach is None else self._reach
            self._made[key] = [
                part if part.seen is None else part._replace(seen=self._mask(part.seen, dtype))
                for bound in self.bounds
                for part in parts_of(*bound, reach, rule, self.blocks_of(rule))
            ]
        return self._made[key]

    def _mask(self, seen: Tensor, dtype: torch.dtype) -> Tensor:
        seen = seen.to(self.device)
        if dtype == torch.bool:
            return seen
        return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, float("-inf"))

    @property
    def chains(self) -> Chains:
        """The segments for torch's variable-length attention."""
        if "chains" not in self._made:
            self._made["chains"] = chains_of(self.bounds, self.reach, self.device)
        return self._made["chains"]

    def stacks(self, rule: Rule = EVERYTHING) -> Stacks:
        """The segments for torch's attention over batches."""
        key = ("stacks", rule)
        if key not in self._made:
            self._made[key] = stacks_of(
                self.bounds, self.reach, self.device, rule, self.blocks_of(rule)
            )
        return self._made[key]

    @property
    def depth(self) -> Tensor | None:
        """The number of each position's ancestors in its tree, int32 [N]; None without trees."""
        if self.reach is None:
            return None
        if "depth" not in self._made:
            self._made["depth"] = depths_of(self.reach).to(torch.int32)
        return self._made["depth"]

    @property
    def longest(self) -> int:
        """Positions of the longest segment; in a tree no answer alone has more."""
        return max(end - start for start, end in self.bounds)

    def longer_than(self, limit: int) -> Tensor:
        """Whether each position's segment, or the longest way through its tree, is longer than that.

        Returns:
            bool [N] on the segments' device.
        """
        lengths = torch.tensor([end - start for start, end in self.bounds])
        depths = lengths
        if self.depth is not None:
            own = self.depth.cpu().split(lengths.tolist())
            depths = torch.stack([depth.max() + 1 for depth in own])
        return (depths > limit).repeat_interleave(lengths).to(self.device)

    def paths(self) -> list[Tensor]:
        """The positions of every sequence that a segment holds: of a tree, from its root to each leaf.

        Returns:
            int64 [L] each, ascending; on the CPU.
        """
        if self.reach is None:
            return [torch.arange(start, end) for start, end in self.bounds]
        reach = self.reach.cpu()
        found = []
        for start, end in self.bounds:
            own = reach[start:end]
            ends_here = own == torch.arange(start + 1, end + 1)
            for leaf in torch.nonzero(ends_here)[:, 0].tolist():
                before = torch.nonzero(own[: leaf + 1] > start + leaf)[:, 0]
                found.append(before + start)
        return found

    @classmethod
    def build(
        cls,
        lengths: Sequence[int],
        reach: Tensor | None = None,
        blocks: Tensor | None = None,
        *,
        in_windows: bool = False,
    ) -> Segments:
        """Segments of the given lengths, behind each other.

        Args:
            lengths: positions of each.
            reach: int32 [N], where they are trees; see the module.
            blocks: int32 [N], where some positions see each other; likewise.
            in_windows: they do in layers with a window alone.

        Raises:
            ValueError: a length below 1, or a reach for another number of positions.
        """
        if not lengths or min(lengths) < 1:
            raise ValueError(f"segments must hold at least one position, received {list(lengths)}")
        ends = np.cumsum([0, *lengths]).tolist()
        if reach is not None and reach.shape != (ends[-1],):
            raise ValueError(f"{ends[-1]} positions need as many reaches, not {list(reach.shape)}")
        return cls(tuple(pairwise(ends)), reach, blocks=blocks, in_windows=in_windows)
