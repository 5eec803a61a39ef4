"""`images`: how pictures are seen."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from mtl_lora_cli.adapters.methods.base import PositiveFloat
from mtl_lora_cli.recipe.yaml_file import StrictModel


class Augment(StrictModel):
    """How a picture and all its maps are changed before they are learned."""

    flip: bool = True  # left to right, half of the times
    # Least and largest scale, 1 being the whole picture; what is larger than the size is cut, what is
    # smaller filled up.
    scale: Annotated[list[PositiveFloat], Field(min_length=2, max_length=2)] | None = None

    @field_validator("scale")
    @classmethod
    def _rises(cls, scale: list[float] | None) -> list[float] | None:
        if scale is not None and not 0.1 <= scale[0] <= scale[1] <= 10:
            raise ValueError(f"expected a least and a largest scale in 0.1 to 10, received {scale}")
        return scale


Side = Annotated[int, Field(ge=16, le=4096)]


class Images(StrictModel):
    """How pictures are seen."""

    # Height and width; each picture is resized to it, whatever its own sides are. Maps need it; in prompts
    # null is what the base model's image processor says.
    size: Annotated[list[Side], Field(min_length=2, max_length=2)] | None = None
    augment: Augment | None = None  # of maps
    blind: bool = False  # in prompts: a control that sees grey in the place of every picture
    # In prompts: a frozen tower runs once a picture, and what it gives is kept in the cache (keep), up to 10 GiB of it
    # (auto); or it runs in every pass (run).
    features: Literal["auto", "keep", "run"] = "auto"
    # In prompts: a projector that learns whole begins as the base model has it, or where pictures' parts say the words of
    # the training rows that show them (`training/word_start.py`).
    projector_start: Literal["base", "words"] = "base"
    quantized: bool = False  # in prompts: `quantization` is for tower and projector, too

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width; of maps, which have them."""
        assert self.size is not None, "a run of maps has a size"
        return self.size[0], self.size[1]
