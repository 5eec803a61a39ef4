"""Learning rate and weight decay of each part of an adapter."""

from __future__ import annotations

from torch import Tensor

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.recipe.training import Parts, PartSettings, Training
from mtl_lora_cli.training.update import ParameterGroup


def require_parts(adapter: Adapter, parts: Parts) -> None:
    """Refuse settings of parts that the adapter does not have: they would do nothing.

    Raises:
        UsageError: naming the parts that there are.
    """
    there = {adapter.role(name).part for name in adapter.trained()}
    missing = [name for name in Parts.model_fields if _is_set(parts, name) and name not in there]
    if missing:
        known = ", ".join(name for name in Parts.model_fields if name in there)
        frozen = len(adapter.trained()) < len(adapter.tensors())
        raise UsageError(
            f"training.parts: this adapter (method {adapter.config.method}) has no "
            f"{', '.join(missing)}{' that learns' if frozen else ''}; its parts: {known}"
        )


def parameter_groups(adapter: Adapter, settings: Training) -> list[ParameterGroup]:
    """What learns of the adapter, by learning rate and weight decay.

    What a part leaves unset is the training's own. Parts with the same values share a group: each
    group is one more kernel on a card.
    """
    tensors: dict[tuple[float, float], list[Tensor]] = {}
    for name, tensor in adapter.trained().items():
        own: PartSettings = getattr(settings.parts, adapter.role(name).part)
        rate, decay = own.learning_rate, own.weight_decay
        values = (
            settings.learning_rate if rate is None else rate,
            settings.weight_decay if decay is None else decay,
        )
        tensors.setdefault(values, []).append(tensor)
    beta2 = settings.adam_beta2
    return [ParameterGroup(found, *values, beta2) for values, found in tensors.items()]


def _is_set(parts: Parts, name: str) -> bool:
    # By value, not by what was written: a run's own recipe spells out every default.
    return getattr(parts, name) != PartSettings()
