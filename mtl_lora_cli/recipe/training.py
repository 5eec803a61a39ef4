"""`training`: steps, rates, what is computed again, what is looked at on the way."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from mtl_lora_cli.adapters.methods.base import NonNegativeFloat, Positive, PositiveFloat
from mtl_lora_cli.recipe.names import Name
from mtl_lora_cli.recipe.yaml_file import StrictModel


class Recompute(StrictModel):
    """What the backward pass computes again instead of keeping it; see docs/recipes.md."""

    attended: bool = False  # outputs of attention
    qkv: Annotated[int, Field(ge=0)] = 0  # q, k and v, in so many layers from the first
    gate_up: Annotated[int, Field(ge=0)] = 0  # the MLP's gate and up, likewise


def _recompute_form(value: Any) -> str:
    return "in parts" if isinstance(value, dict | Recompute) else "as a whole"


Recomputation = Annotated[
    Annotated[bool, Tag("as a whole")] | Annotated[Recompute, Tag("in parts")],
    Discriminator(_recompute_form),
]

_PICKED = ("rows_per_pass", "gradient_checkpointing", "expanded_layers")
_MOST_EPOCHS = 100_000


class PartSettings(StrictModel):
    """How one part of the adapter learns; null: as the others."""

    learning_rate: NonNegativeFloat | None = None
    weight_decay: NonNegativeFloat | None = None


class Parts(StrictModel):
    """The adapter's parts; which of them it has depends on its method."""

    down: PartSettings = PartSettings()  # A
    up: PartSettings = PartSettings()  # B
    transform: PartSettings = PartSettings()  # Λ
    gate: PartSettings = PartSettings()  # w, or the projection G
    embedding: PartSettings = PartSettings()  # e
    whole: PartSettings = PartSettings()  # what `whole_modules` names
    decoder: PartSettings = PartSettings()  # of dense tasks


def _switch(value: Any) -> Any:
    """`true` is short for the defaults, `false` for null."""
    if isinstance(value, bool):
        return {} if value else None
    if value is None or isinstance(value, dict | StrictModel):
        return value
    raise ValueError(f"expected true, false or the keys below it, received {value!r}")


class Diagnose(StrictModel):
    """The cosine between tasks' gradients on shared parameters."""

    every: Positive = 50  # steps


class ValidationSettings(StrictModel):
    """The loss and the metric of each task on held-out examples."""

    every: Positive = 100  # steps, and at the end
    before: bool = False  # and before the first step
    examples: Positive = 200  # of each task, at most
    metric: bool = True  # beside the loss, where answers are choices
    best: Name | None = None  # `macro` or a task: the best look's checkpoint is the result
    patience: Positive | None = None  # so many looks without a better one end the run

    @model_validator(mode="after")
    def _better_than_what(self) -> ValidationSettings:
        if self.patience is not None and self.best is None:
            raise ValueError("'patience' needs 'best': macro, or the name of a task")
        return self


class Stage(StrictModel):
    """Some of the tasks, for so long."""

    tasks: Annotated[list[Name], Field(min_length=1)]
    epochs: PositiveFloat = 1.0  # over the stage's examples

    @field_validator("tasks")
    @classmethod
    def _once(cls, tasks: list[str]) -> list[str]:
        if len(set(tasks)) < len(tasks):
            raise ValueError("a task stands twice in one stage")
        return tasks


class Balance(StrictModel):
    """How the tasks' losses or gradients are held against each other; see docs/mixtures.md."""

    method: Literal["uncertainty", "gradnorm", "pcgrad"]
    rate: PositiveFloat | None = None  # of what is learned for it; null: 0.025
    alpha: NonNegativeFloat | None = None  # gradnorm: how strongly slow tasks are pulled; null: 1.5
    every: Positive | None = None  # gradnorm: steps between two looks at the gradients; null: 10

    @model_validator(mode="after")
    def _is_read(self) -> Balance:
        readers = {"rate": ("uncertainty", "gradnorm"), "alpha": ("gradnorm",)}
        readers["every"] = readers["alpha"]
        for name, methods in readers.items():
            if getattr(self, name) is not None and self.method not in methods:
                raise ValueError(f"'{name}' is read by {' and '.join(methods)} only")
        return self


def _by_method(value: Any) -> Any:
    """`balance: pcgrad` is short for `balance: {method: pcgrad}`; `none` is null."""
    if value == "none":
        return None
    return {"method": value} if isinstance(value, str) else value


class Clipping(StrictModel):
    """Clipping relative to each tensor's own history, AdaGC (arXiv 2502.11034)."""

    relative: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.05  # times its usual norm
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.98  # of the mean that says what is usual
    after: Annotated[int, Field(ge=0)] = 100  # steps; until then max_gradient_norm holds


class Training(StrictModel):
    """How the adapter learns."""

    epochs: PositiveFloat = 1.0
    stages: list[Stage] = []  # one after another, in the place of `epochs`
    max_steps: Positive | None = None  # ends the run earlier than `epochs` would
    learning_rate: PositiveFloat = 3e-4
    weight_decay: NonNegativeFloat = 0.0
    parts: Parts = Parts()
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03  # share of all steps
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999  # AdamW's β₂
    max_gradient_norm: PositiveFloat = 1.0
    clipping: Annotated[Clipping | None, BeforeValidator(_switch)] = None
    row_length: Annotated[int, Field(ge=8)] = 1024  # tokens in a packed row
    rows_per_step: Positive = 8  # global: accumulation follows from it and the number of processes
    rows_per_pass: Positive = 1  # rows that go through the model together on one device
    rows: Literal["mixed", "one_task"] = "mixed"  # which examples may stand in one row
    share_beginnings: bool = (
        False  # what examples of a task begin with alike is computed once a row
    )
    on_overflow: Literal["error", "drop", "truncate_prompt"] = "error"
    loss_on: Literal["answer", "all"] = "answer"
    gradient_checkpointing: Recomputation = False  # computed again in the backward pass
    balance: Annotated[Balance | None, BeforeValidator(_by_method)] = None
    memory: Literal["manual", "auto"] = "manual"  # who picks rows_per_pass and what is recomputed
    memory_limit: PositiveFloat | None = None  # GiB of a device that auto plans with; null: all
    expanded_layers: Annotated[int, Field(ge=0)] = 0  # first ones, also dense beside 4 or 8 bits
    checkpoint_every: Positive | None = 200  # steps; null: only at the end
    keep_checkpoints: Positive = 2
    shuffled_tasks: bool = False  # a control: the adapter gets the task ids of other examples
    diagnose: Annotated[Diagnose | None, BeforeValidator(_switch)] = None
    # Not `validate`: pydantic's models have a method of that name.
    validation: Annotated[ValidationSettings | None, BeforeValidator(_switch)] = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @model_validator(mode="after")
    def _ends(self) -> Training:
        """The steps of all epochs are counted before the first one."""
        if self.epochs > _MOST_EPOCHS and self.max_steps is None:
            raise ValueError(
                f"'epochs' above {_MOST_EPOCHS:,} need 'max_steps', received {self.epochs:g}"
            )
        return self

    @model_validator(mode="after")
    def _stages_have_epochs(self) -> Training:
        if self.stages and self.epochs != 1.0:
            raise ValueError("'epochs' is not read with 'stages': each of them has its own")
        return self

    @model_validator(mode="after")
    def _picked_once(self) -> Training:
        """What `memory: auto` picks must not be given, too."""
        if self.memory == "auto":
            for name in _PICKED:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"'{name}' is picked by memory: auto; leave it out")
        elif self.memory_limit is not None:
            raise ValueError("'memory_limit' is read with memory: auto only")
        return self
