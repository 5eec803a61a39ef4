"""The adapters' factors of all layers, written into the margins of the frozen weights by one kernel.

Each group would write its own before its product: eight launches a layer of a few microseconds each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mtl_lora_cli.engine.group import Group
from mtl_lora_cli.kernels.backend import in_triton
from mtl_lora_cli.kernels.place import at_once

Key = tuple[Any, ...]


class Margins:
    """See the module.

    Args:
        groups: of all layers; those without margins, or whose factors are computed, go on writing theirs.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = [group for group in groups if group.adapted]
        # None of them is ever freed: a captured pass reads the addresses that it was captured with.
        self._known: dict[Key, tuple[Any, list[Group]]] = {}

    def write(self) -> None:
        """Write the factors as the parameters are now, and tell the groups so."""
        for group in self._groups:
            group.written = False  # the pass before may not have asked it
        key = self._key()
        if key not in self._known:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return  # a graph makes no table
            self._known[key] = self._table()
        table, chosen = self._known[key]
        if table is None:
            return
        table.write()
        for group in chosen:
            group.written = True

    def _key(self) -> Key:
        """Where everything lies."""
        return tuple(
            (group.room, *(x.data_ptr() for layer in group.adapted for x in layer.own_tensors()))
            for group in self._groups
        )

    def _table(self) -> tuple[Any, list[Group]]:
        found = [(group, group.margin_places()) for group in self._groups]
        places = [place for _, own in found for place in own]
        if not places or not in_triton(places[0].target) or not at_once(places):
            return None, []
        from mtl_lora_cli.kernels.triton_place import Table

        return Table(places), [group for group, own in found if own]
