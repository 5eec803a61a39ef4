"""What of a run gets no gradient: it is trained by name and learns nothing.

A module's gradient may never have been another than zero: what it gives is read by nobody, or no row of the mixture
goes that way. AdamW's moments tell: they are zero as long as every gradient was.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.training.observers import Seen
from mtl_lora_cli.training.signs import unreached_line
from mtl_lora_cli.training.update import MOMENTS, Updating

FIRST = 10  # steps, after which it is looked; later, where some task was in none of them
_NEVER = 2**62


class Unreached:
    """Looks once, as soon as all tasks were learned from, and at the end.

    Args:
        adapter: what is trained.
        update: who updates it.
        tasks: of the run.
        total: steps of the run.
        known: modules of which it was said before the first step.
    """

    at_start = False
    at_end = True
    before_update = False

    def __init__(
        self,
        adapter: Adapter,
        update: Updating,
        tasks: Sequence[str],
        total: int,
        known: Collection[str] = (),
    ) -> None:
        self._adapter, self._update, self._tasks = adapter, update, tasks
        self._total, self._known = total, known
        self._drawn: set[str] = set()
        self._found: list[str] = []
        self.every = FIRST

    def hear(self, event: Mapping[str, Any]) -> None:
        """What the run's log says so far: whose rows a step had, and what was seen before the run was stopped."""
        if event.get("event") == "step":
            self._drawn.update(event["examples"])
        elif event.get("event") == "unreached":
            self._found = event["modules"]
            self.every = _NEVER

    def look(self, step: int) -> Seen | None:
        """See `Observer`."""
        waiting = [name for name in self._tasks if name not in self._drawn]
        if waiting and step < self._total:
            self.every *= 2
            return None
        self.every = _NEVER
        trained = self._adapter.trained()
        modules = still_at_zero(trained, self._update.state(trained), waiting)
        before, self._found = self._found, modules
        if modules == before:
            return None
        event = {"event": "unreached", "step": step, "modules": modules}
        new = [one for one in modules if one not in before and one not in self._known]
        line = f"note: {unreached_line({**event, 'modules': new})}" if new else None
        return Seen(event, line)


def still_at_zero(
    trained: Mapping[str, Tensor], state: Mapping[str, Tensor], waiting: Collection[str]
) -> list[str]:
    """Modules, and parameters that learn whole, none of whose values ever had a gradient.

    Args:
        trained: name → what learns.
        state: AdamW's, `{name}/{key}`.
        waiting: tasks that no step had: what is theirs alone is left out.
    """
    reached: dict[str, bool] = {}
    for name in trained:
        module = module_of(name)
        if module is None or _owner(name) in waiting:
            continue
        moved = any(bool(state[f"{name}/{key}"].any()) for key in MOMENTS)
        reached[module] = reached.get(module, False) or moved
    return [module for module, moved in reached.items() if not moved]


def module_of(name: str) -> str | None:
    """What a tensor belongs to: a module's path, or, of what learns whole, its own name; None: the whole model."""
    if ":" in name:
        return name
    return name.rpartition(".")[0] or None


def _owner(name: str) -> str | None:
    """The task whose alone a tensor is."""
    parts = name.split(":")
    return parts[1] if len(parts) == 3 else None
