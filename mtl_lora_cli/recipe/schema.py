"""What a recipe may say: every key, its type, its default and its bounds."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from mtl_lora_cli.recipe.yaml_file import StrictModel

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=80)]
Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]

SPLITS = ("train", "validation", "test")


class Source(StrictModel):
    """Where a task's rows come from: exactly one of `sample`, `path` and `hub`."""

    sample: Name | None = None  # a bundled sample
    path: str | None = None  # a file, or a folder with train.*, validation.*, test.*
    hub: str | None = None  # a data set on the hub, `owner/name`
    config: str | None = None  # the hub data set's configuration
    revision: str | None = None  # the hub data set's revision
    # split of ours -> file below `path`, or name of the hub's split
    splits: dict[Literal["train", "validation", "test"], str] | None = None
    # One file for many tasks: the column that says which task a row belongs to. A recipe's entry
    # with such a source stands for all of its tasks, or for the one that `task` names.
    task_column: str | None = None
    task_names: dict[int | str, Name] | None = None  # value in the column -> task name
    task: Name | None = None

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        """`source: some/path` and `source: sample:NAME` are short for the long forms."""
        if isinstance(value, str):
            return {"sample": value[7:]} if value.startswith("sample:") else {"path": value}
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> Source:
        given = [name for name in ("sample", "path", "hub") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"expected exactly one of sample, path and hub, received {', '.join(given) or 'none'}"
            )
        for name in ("config", "revision"):
            if getattr(self, name) is not None and self.hub is None:
                raise ValueError(f"'{name}' goes with a hub source only")
        for name in ("task_names", "task"):
            if getattr(self, name) is not None and self.task_column is None:
                raise ValueError(f"'{name}' goes with a task_column only")
        return self


_MTL_LORA_ONLY = (
    "up_projections",
    "temperature",
    "transform",
    "gate",
    "gate_start",
    "embedding_size",
)


class Adapter(StrictModel):
    """The adapter's mathematics; see docs/method.md."""

    method: Literal["mtl-lora", "lora"] = "mtl-lora"
    rank: Positive = 8
    alpha: PositiveFloat = 16.0  # the update is scaled by alpha / rank
    up_projections: Positive = 3
    temperature: PositiveFloat = 0.5  # the gate is softmax(w / temperature)
    transform: Literal["full", "diagonal"] = "full"
    gate: Literal["weights", "embedding"] = "weights"
    gate_start: NonNegativeFloat = 2.0  # standard deviation of the gate's logits w / temperature
    embedding_size: Positive = 16  # of the task embedding, where gate is `embedding`
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[list[str], Field(min_length=1)] = [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    ]

    @model_validator(mode="after")
    def _keys_of_the_method(self) -> Adapter:
        """A key that the method does not read must not be changed: it would do nothing."""
        if self.method == "lora":
            for name in _MTL_LORA_ONLY:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"'{name}' goes with method: mtl-lora only")
        return self


class Task(StrictModel):
    """One task of the mixture."""

    name: Name
    template: str  # a bundled template's name, or a YAML file beside the recipe
    source: Source | None = None  # default: the template's own
    objective: Literal["causal_lm"] = "causal_lm"
    tags: list[Name] = []
    sampling_weight: NonNegativeFloat = 1.0  # read by mixing: weights
    loss_weight: PositiveFloat = 1.0
    max_examples: Positive | None = None  # of the train split, drawn with the run's seed
    repeat: PositiveFloat = 1.0  # an epoch goes over the task so many times


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

_PICKED = ("rows_per_pass", "gradient_checkpointing")


class Training(StrictModel):
    """How the adapter learns."""

    epochs: PositiveFloat = 1.0
    max_steps: Positive | None = None  # ends the run earlier than `epochs` would
    learning_rate: PositiveFloat = 3e-4
    weight_decay: NonNegativeFloat = 0.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03  # share of all steps
    max_gradient_norm: PositiveFloat = 1.0
    row_length: Annotated[int, Field(ge=8)] = 1024  # tokens in a packed row
    rows_per_step: Positive = 8  # global: accumulation follows from it and the number of processes
    rows_per_pass: Positive = 1  # rows that go through the model together on one device
    on_overflow: Literal["error", "drop", "truncate_prompt"] = "error"
    loss_on: Literal["answer", "all"] = "answer"
    gradient_checkpointing: Recomputation = False  # computed again in the backward pass
    memory: Literal["manual", "auto"] = "manual"  # who picks rows_per_pass and what is recomputed
    checkpoint_every: Positive | None = 200  # steps; null: only at the end
    keep_checkpoints: Positive = 2
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @model_validator(mode="after")
    def _picked_once(self) -> Training:
        """What `memory: auto` picks must not be given, too."""
        if self.memory == "auto":
            for name in _PICKED:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"'{name}' is picked by memory: auto; leave it out")
        return self


class TemperatureMixing(StrictModel):
    """Tasks are drawn in proportion to n^(1/temperature): 1 is proportional, large is uniform."""

    temperature: PositiveFloat


def _mixing_form(value: Any) -> str:
    return "by temperature" if isinstance(value, dict | TemperatureMixing) else "by name"


# A discriminator, so that a fault is told for the form that was meant and not for both.
Mixing = Annotated[
    Annotated[Literal["proportional", "uniform", "weights"], Tag("by name")]
    | Annotated[TemperatureMixing, Tag("by temperature")],
    Discriminator(_mixing_form),
]


class Run(StrictModel):
    """Where the result goes."""

    name: Name | None = None  # default: the recipe's stem and the time
    directory: str | None = None  # default: what --runs or MTL_LORA_RUNS says, else `runs`


class Recipe(StrictModel):
    """A whole recipe."""

    base_model: str = "smollm2-135m"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantization: Literal["none", "nf4"] = "none"
    engine: Literal["auto", "fused", "plain"] = "auto"  # who runs the base model's layers
    base_compute: Literal["dtype", "fp8"] = "dtype"  # arithmetic of the frozen products
    prompt_format: Literal["plain", "chat"] = "plain"
    adapter: Adapter = Adapter()
    tasks: Annotated[list[Task], Field(min_length=1)]
    mixing: Mixing = "proportional"
    training: Training = Training()
    run: Run = Run()

    @field_validator("tasks")
    @classmethod
    def _names_differ(cls, tasks: list[Task]) -> list[Task]:
        seen: set[str] = set()
        for task in tasks:
            if task.name in seen:
                raise ValueError(f"the task '{task.name}' stands twice; names must differ")
            seen.add(task.name)
        return tasks

    @model_validator(mode="after")
    def _something_to_draw(self) -> Recipe:
        if self.mixing == "weights" and not any(task.sampling_weight for task in self.tasks):
            raise ValueError("mixing: weights needs a sampling_weight above 0")
        return self


ENVIRONMENT = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
