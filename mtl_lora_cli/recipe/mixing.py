"""`mixing`: how often each task is drawn."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from mtl_lora_cli.adapters.methods.base import NonNegativeFloat, PositiveFloat
from mtl_lora_cli.recipe.names import Name
from mtl_lora_cli.recipe.yaml_file import StrictModel


class TemperatureMixing(StrictModel):
    """Tasks are drawn in proportion to n^(1/temperature): 1 is proportional, large is uniform."""

    temperature: PositiveFloat


class DynamicMixing(StrictModel):
    """Shares that follow what the tasks' losses do; see docs/mixtures.md."""

    dynamic: Literal["excess_loss", "progress"]
    start: Literal["proportional", "uniform", "weights"] = "proportional"
    every: Annotated[int, Field(ge=4)] = 50  # steps that are drawn by the same shares
    rate: PositiveFloat | None = None  # η; null: 1 for excess_loss, 10 for progress
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1  # part of the shares that stays the start's
    keep: Annotated[float, Field(ge=0, lt=1)] = 0.5  # progress: how much of the last ones' counts
    # excess_loss: task → the loss that it is held against; or a finished run that has them
    reference: dict[Name, NonNegativeFloat] = {}
    reference_run: str | None = None

    @model_validator(mode="after")
    def _is_read(self) -> DynamicMixing:
        if self.dynamic == "excess_loss" and self.keep != 0.5:
            raise ValueError("'keep' is read with dynamic: progress only")
        for name in ("reference", "reference_run"):
            if self.dynamic == "progress" and getattr(self, name):
                raise ValueError(f"'{name}' is read with dynamic: excess_loss only")
        if self.reference and self.reference_run is not None:
            raise ValueError("expected 'reference' or 'reference_run', received both")
        return self


def _mixing_form(value: Any) -> str:
    if isinstance(value, DynamicMixing) or (isinstance(value, dict) and "dynamic" in value):
        return "dynamic"
    return "by temperature" if isinstance(value, dict | TemperatureMixing) else "by name"


# A discriminator, so that a fault is told for the form that was meant and not for both.
Mixing = Annotated[
    Annotated[Literal["proportional", "uniform", "weights"], Tag("by name")]
    | Annotated[TemperatureMixing, Tag("by temperature")]
    | Annotated[DynamicMixing, Tag("dynamic")],
    Discriminator(_mixing_form),
]
