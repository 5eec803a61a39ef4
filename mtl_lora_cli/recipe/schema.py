"""What a recipe may say: every key, its type, its default and its bounds.

The larger blocks have a file each beside this one: `source`, `adapter` (method.py), `images` (pictures.py),
`training`, `mixing`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.adapters.methods.base import NonNegativeFloat, Positive, PositiveFloat
from mtl_lora_cli.recipe.conversation import ConversationSettings
from mtl_lora_cli.recipe.method import Adapter
from mtl_lora_cli.recipe.mixing import DynamicMixing, Mixing
from mtl_lora_cli.recipe.names import Name
from mtl_lora_cli.recipe.pictures import Images
from mtl_lora_cli.recipe.source import Source
from mtl_lora_cli.recipe.training import Training
from mtl_lora_cli.recipe.yaml_file import StrictModel


class TaskSettings(StrictModel):
    """One task of the mixture."""

    name: Name
    template: str  # a bundled template's name, or a YAML file beside the recipe
    source: Source | None = None  # default: the template's own
    objective: Name | None = None  # default: the template's
    conversation: ConversationSettings | None = None  # keys that differ from the template's
    metrics: Annotated[list[Name], Field(min_length=1)] | None = None  # default: the template's
    tags: list[Name] = []
    sampling_weight: NonNegativeFloat = 1.0  # read by mixing: weights
    loss_weight: PositiveFloat = 1.0
    max_examples: Positive | None = None  # of the train split, drawn with the run's seed
    repeat: PositiveFloat = 1.0  # an epoch goes over the task so many times


class Distributed(StrictModel):
    """How a run shares its work and its memory among processes."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] = (
        0  # what is cut into parts; see docs/distributed.md
    )
    offload: Literal["none", "optimizer", "all"] = "none"  # to the CPU's memory
    deepspeed: str | None = None  # a JSON file of DeepSpeed's, merged into the derived one

    @model_validator(mode="after")
    def _fits_the_stage(self) -> Distributed:
        """Nothing that would be ignored."""
        for name, least in (("deepspeed", 1), ("offload", 3 if self.offload == "all" else 1)):
            value = getattr(self, name)
            if value not in (None, "none") and self.zero_stage < least:
                raise ValueError(
                    f"'{name}: {value}' needs zero_stage {least} or higher, received {self.zero_stage}"
                )
        return self


# accelerate's, by its names.
Tracker = Literal[
    "tensorboard",
    "wandb",
    "mlflow",
    "comet_ml",
    "aim",
    "clearml",
    "dvclive",
    "swanlab",
    "trackio",
]


class RunSettings(StrictModel):
    """Where the result goes."""

    name: Name | None = None  # default: the recipe's stem and the time
    directory: str | None = None  # default: what --runs or MTL_LORA_RUNS says, else `runs`
    trackers: list[Tracker] = []  # who else is told of every step
    router: bool = False  # learn at the end which task a row is of
    project: Name = "mtl-lora"  # under which they file the run


_NOT_TO_GIVE = ("messages", "add_generation_prompt", "chat_template", "tokenize", "tools")


class Chat(StrictModel):
    """How the tokenizer's chat template is used, with `prompt_format: chat`."""

    template_kwargs: dict[str, Any] = {}  # variables that the template reads: enable_thinking, …
    # Where an answer stands, if the template's generation prompt does not begin its conversation.
    answers: Literal["conversation", "generation_prompt"] | None = None
    date: str | None = None  # for a template that prints it; default: when the run begins

    @field_validator("template_kwargs")
    @classmethod
    def _only_variables(cls, given: dict[str, Any]) -> dict[str, Any]:
        for name in given:
            if name in _NOT_TO_GIVE or not name.isidentifier():
                raise ValueError(f"'{name}' is no variable of a chat template that can be given")
        return given

    @field_validator("date")
    @classmethod
    def _is_a_date(cls, given: str | None) -> str | None:
        if given is not None:
            try:
                datetime.fromisoformat(given)
            except ValueError:
                raise ValueError(
                    f"expected a date such as 2026-11-30 or 2026-11-30T12:00:00, received '{given}'"
                ) from None
        return given


class Recipe(StrictModel):
    """A whole recipe."""

    elsewhere: ClassVar[Mapping[str, str]] = {
        "device": "models run on the CUDA cards that CUDA_VISIBLE_DEVICES shows, or on the CPU; Apple's mps is "
        "not supported, for losses are summed in float64, which it has not"
    }

    # Python files that add methods, metrics, …: `recipe.load` runs them before all else is checked
    extensions: list[str] = []
    base_model: str = "smollm2-135m"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantization: Literal["none", "nf4", "fp4", "int8"] = "none"
    engine: Literal["auto", "fused", "plain"] = "auto"  # who runs the base model's layers
    base_compute: Literal["dtype", "fp8"] = "dtype"  # arithmetic of the frozen products
    prompt_format: Literal["plain", "chat"] = "plain"
    chat: Chat = Chat()
    control_tokens: Literal["text", "token", "error"] = "text"  # what those in rows' text become
    blank_fields: Literal["note", "error"] = "note"  # a row whose prompt prints an empty field
    adapter: Adapter = Field(default_factory=configure)
    images: Images | None = None  # of tasks with pictures; size is required where answers are maps
    tasks: Annotated[list[TaskSettings], Field(min_length=1)]
    mixing: Mixing = "proportional"
    training: Training = Training()
    distributed: Distributed = Distributed()
    run: RunSettings = RunSettings()

    @field_validator("tasks")
    @classmethod
    def _names_differ(cls, tasks: list[TaskSettings]) -> list[TaskSettings]:
        seen: set[str] = set()
        for task in tasks:
            if task.name in seen:
                raise ValueError(f"the task '{task.name}' stands twice; names must differ")
            seen.add(task.name)
        return tasks

    @field_validator("chat")
    @classmethod
    def _is_read(cls, chat: Chat, others: ValidationInfo) -> Chat:
        if others.data.get("prompt_format") == "plain" and chat != Chat():
            raise ValueError("is read with prompt_format: chat only")
        return chat

    @model_validator(mode="after")
    def _what_stage_3_can_cut(self) -> Recipe:
        if self.distributed.zero_stage == 3:
            if self.quantization == "int8":
                raise ValueError(
                    "quantization: int8 does not go with zero_stage: 3: the scales of 8-bit weights "
                    "are not gathered with them, and they train wrongly; use nf4, or stage 2"
                )
            if self.base_compute == "fp8":
                raise ValueError(
                    "base_compute: fp8 does not go with zero_stage: 3: it keeps two copies of all "
                    "weights on each card; use stage 2"
                )
            if self.adapter.down_start == "gradient":
                raise ValueError(
                    "adapter.down_start: gradient does not go with zero_stage: 3: it differentiates outside "
                    "of DeepSpeed; use stage 2"
                )
            if self.images is not None and self.images.projector_start == "words":
                raise ValueError(
                    "images.projector_start: words does not go with zero_stage: 3: it reads the whole "
                    "embedding on each card; use stage 2"
                )
            if self.training.diagnose is not None:
                raise ValueError(
                    "training.diagnose does not go with zero_stage: 3: it differentiates outside of "
                    "DeepSpeed; use stage 2"
                )
        return self

    @model_validator(mode="after")
    def _what_goes_together(self) -> Recipe:
        balance, stage = self.training.balance, self.distributed.zero_stage
        if self.adapter.scales_rows and stage == 3:
            raise ValueError(
                f"adapter.method: {self.adapter.method} does not go with zero_stage: 3: it reads whole weights "
                "in every pass, which are cut into parts there; use stage 2"
            )
        if self.adapter.from_weight and self.quantization != "none":
            raise ValueError(
                f"adapter.method: {self.adapter.method} starts from the weights as they are, received "
                f"quantization: {self.quantization}; use none, or another method"
            )
        if self.training.shuffled_tasks and not self.adapter.per_task:
            tied = " with tied: true" if getattr(self.adapter, "tied", False) else ""
            raise ValueError(
                f"training.shuffled_tasks: adapter.method: {self.adapter.method}{tied} has no part of a task's "
                "own, so shuffled ids change nothing; leave it out"
            )
        if self.training.share_beginnings:
            self._shares_exactly()
        if self.training.expanded_layers:
            self._expands()
        if balance is not None and balance.method == "pcgrad" and stage:
            raise ValueError(
                f"training.balance: pcgrad does not go with zero_stage: {stage}: DeepSpeed sums gradients "
                "before they can be projected; use stage 0"
            )
        if balance is not None and balance.method == "gradnorm" and stage == 3:
            raise ValueError(
                "training.balance: gradnorm does not go with zero_stage: 3: it differentiates outside of "
                "DeepSpeed; use stage 2"
            )
        if isinstance(self.mixing, DynamicMixing):
            names = [task.name for task in self.tasks]
            for name in self.mixing.reference:
                if name not in names:
                    raise ValueError(
                        f"mixing.reference: '{name}' is no task; tasks: {', '.join(names)}"
                    )
        if isinstance(self.mixing, DynamicMixing) and self.training.stages:
            raise ValueError(
                "mixing.dynamic does not go with training.stages: both say when which task is drawn"
            )
        return self

    def _expands(self) -> None:
        """Refuse to leave layers expanded where none are, or where no process has a whole one."""
        if self.quantization == "none":
            raise ValueError(
                "training.expanded_layers is read with quantization: nf4, fp4 or int8 only; leave it out"
            )
        if self.distributed.zero_stage == 3:
            raise ValueError(
                "training.expanded_layers does not go with zero_stage: 3: weights are gathered for each "
                "pass; leave it out"
            )

    def _shares_exactly(self) -> None:
        """Refuse what would make an example with a shared beginning another one than alone."""
        if self.adapter.dropout:
            raise ValueError(
                "training.share_beginnings does not go with adapter.dropout: examples would share what is "
                f"dropped, received {self.adapter.dropout:g}; use 0"
            )
        if self.training.shuffled_tasks:
            raise ValueError(
                "training.share_beginnings does not go with training.shuffled_tasks: examples that begin alike "
                "would have different task ids"
            )

    @model_validator(mode="after")
    def _something_to_draw(self) -> Recipe:
        start = self.mixing.start if isinstance(self.mixing, DynamicMixing) else self.mixing
        if start == "weights" and not any(task.sampling_weight for task in self.tasks):
            raise ValueError("mixing: weights needs a sampling_weight above 0")
        return self


ENVIRONMENT = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
