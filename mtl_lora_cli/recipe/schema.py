"""What a recipe may say: every key, its type, its default and its bounds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    PlainValidator,
    SerializeAsAny,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from mtl_lora_cli.adapters.methods import DEFAULT, METHODS, configure, reads, unknown_method
from mtl_lora_cli.adapters.methods.base import NonNegativeFloat, Positive, PositiveFloat, Settings
from mtl_lora_cli.recipe.conversation import ConversationSettings
from mtl_lora_cli.recipe.yaml_file import StrictModel

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,79}")
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=80)]

SPLITS = ("train", "validation", "test")


def _texts(names: Any) -> Any:
    """`1` and `"1"` in a column are one value."""
    if not isinstance(names, dict):
        return names
    return {str(key) if type(key) is int else key: value for key, value in names.items()}


def _one_character(delimiter: Any) -> Any:
    """`tab` is a word for the one that is hard to write."""
    if delimiter == "tab":
        return "\t"
    if isinstance(delimiter, str) and (len(delimiter) != 1 or delimiter in '"\r\n'):
        raise ValueError(f"expected one character, or tab, received {delimiter!r:.60}")
    return delimiter


def _columns_form(value: Any) -> str:
    return "renamed" if isinstance(value, dict) else "named"


ColumnNames = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
Columns = Annotated[
    Annotated[ColumnNames, Tag("named")] | Annotated[dict[str, str], Tag("renamed")],
    Discriminator(_columns_form),
]


LayoutName = Literal[
    "folders", "nyud-mt", "nyu-mat", "pascal-context", "vqa-v2", "gqa", "nlvr2", "coco-captions"
]


class Source(StrictModel):
    """Where a task's rows come from: exactly one of `sample`, `path` and `hub`."""

    sample: Name | None = None  # a bundled sample
    path: str | None = None  # a file, or a folder with train.*, validation.*, test.*
    hub: str | None = None  # a data set on the hub, `owner/name`
    config: str | None = None  # the hub data set's configuration
    revision: str | None = None  # the hub data set's revision
    # split of ours -> file below `path`, or name of the hub's split
    splits: dict[Literal["train", "validation", "test"], str] | None = None
    # A folder as others lay it out: pictures and maps (docs/dense.md), or questions about pictures (docs/pictures.md).
    layout: LayoutName | None = None
    # How tables as text are written, where their ending does not say it; see docs/tasks.md.
    delimiter: Annotated[str | None, BeforeValidator(_one_character)] = None
    quoting: Literal["csv", "none"] | None = None
    columns: Columns | None = None  # of files without a header; or a name -> another one
    broken_rows: Literal["error", "drop"] | None = None  # with another number of fields
    # Training rows are taken `buffer` by `buffer` from the files, which are never all on this disk; see docs/tasks.md.
    stream: bool | None = None
    buffer: Annotated[int, Field(ge=1)] | None = None  # rows that are shuffled together; 100,000
    # One file for many tasks: the column that says which task a row belongs to. A recipe's entry
    # with such a source stands for all of its tasks, or for the one that `task` names.
    task_column: str | None = None
    # value in the column -> task name
    task_names: Annotated[dict[str, Name] | None, BeforeValidator(_texts)] = None
    task: Name | None = None

    @property
    def window(self) -> int:
        """Rows of a stream that are shuffled together."""
        return self.buffer or 100_000

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
        for name in ("delimiter", "quoting", "broken_rows", "layout"):
            if getattr(self, name) is not None and self.path is None:
                raise ValueError(f"'{name}' goes with a path only")
        if self.stream and self.path is None:
            raise ValueError(
                "'stream' goes with a path only; of the hub: path: hf://datasets/owner/name"
            )
        if self.stream and self.task_column is not None:
            raise ValueError("'stream' does not go with a task_column")
        if not self.stream and self.buffer is not None:
            raise ValueError("'buffer' goes with stream: true")
        for name in (
            "splits",
            "delimiter",
            "quoting",
            "columns",
            "broken_rows",
            "task_column",
            "stream",
        ):
            if self.layout is not None and getattr(self, name) is not None:
                raise ValueError(f"'{name}' does not go with a layout: its rows are files")
        if isinstance(self.columns, list):
            if self.path is None:
                raise ValueError("'columns' as a list goes with a path only")
            if len(set(self.columns)) < len(self.columns):
                raise ValueError("two of the 'columns' have the same name")
        for name in ("task_names", "task"):
            if getattr(self, name) is not None and self.task_column is None:
                raise ValueError(f"'{name}' goes with a task_column only")
        return self


def _settings(value: Any) -> Settings:
    """The settings of the method that a recipe's `adapter` names.

    A key that only other methods read must say nothing: it may be null or its default, as it is where
    an older run wrote every key.
    """
    if isinstance(value, Settings):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"expected keys and values, received {value!r:.60}")
    name = value.get("method", DEFAULT)
    if not isinstance(name, str) or name not in METHODS:
        raise _faults([_fault("method", unknown_method(name), name)])
    kind, faults, given = METHODS[name], [], {}
    for key, one in value.items():
        readers = [other for other in METHODS if reads(other, key)]
        if not reads(name, key) and readers:
            if not _says_nothing(key, one, name, readers):
                said = f"'{key}' is not read by method: {name}, only by {', '.join(readers)}"
                faults.append(_fault(key, said, one))
        elif one is not None or key not in kind.model_fields or key in Settings.model_fields:
            given[key] = one  # null is the method's own default
    try:
        settings = kind.model_validate(given)
    except ValidationError as error:
        faults += [_known_fault(detail) for detail in error.errors()]
    if faults:
        raise _faults(faults)
    return settings


def _says_nothing(key: str, value: Any, method: str, readers: Sequence[str]) -> bool:
    """Whether the value is what goes without saying: null, the one default, a single B."""
    if value is None or (key == "up_projections" and value == 1):
        return True
    default = METHODS[readers[0]].start_of(key)
    same = all(METHODS[other].start_of(key) == default for other in readers)
    return same and isinstance(value, bool) == isinstance(default, bool) and value == default


def _fault(key: str, said: str, value: Any) -> InitErrorDetails:
    error = PydanticCustomError("value_error", "{error}", {"error": said})
    return InitErrorDetails(type=error, loc=(key,), input=value)


def _known_fault(detail: ErrorDetails) -> InitErrorDetails:
    return InitErrorDetails(
        type=detail["type"], loc=detail["loc"], input=detail["input"], ctx=detail.get("ctx", {})
    )


def _faults(faults: list[InitErrorDetails]) -> ValidationError:
    return ValidationError.from_exception_data("Adapter", faults)


# The method's own settings: each method declares its keys, in adapters/methods.
Adapter = Annotated[SerializeAsAny[Settings], PlainValidator(_settings)]


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
    quantized: bool = False  # in prompts: `quantization` is for tower and projector, too

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width; of maps, which have them."""
        assert self.size is not None, "a run of maps has a size"
        return self.size[0], self.size[1]


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
        return self


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
