"""A template: one YAML file that says how a task's rows become prompts, choices and answers.

    description: Is a movie review positive or negative?
    prompt: "Review: {{ sentence }}\\nSentiment (positive or negative):"
    label: label
    choices: {0: negative, 1: positive}

Texts (`prompt`, `answer`, each choice) are Jinja templates, and expressions (`label`, those of
`fields` and of `each`) are what stands between Jinja's braces. Both see the row's fields under
their names, what `fields` computed, and `row` for names like `row['a b']`.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from mtl_lora_cli.errors import did_you_mean
from mtl_lora_cli.metrics import METRICS
from mtl_lora_cli.metrics.declare import Of, fitting
from mtl_lora_cli.recipe.conversation import ConversationSettings
from mtl_lora_cli.recipe.names import Name
from mtl_lora_cli.recipe.source import Source
from mtl_lora_cli.recipe.yaml_file import StrictModel, read_model
from mtl_lora_cli.tasks.jinja import Expression, Text
from mtl_lora_cli.tasks.maps import MAPS, MapKeys, faults_of

# Not what Python's float() takes, too: 1_0 and other digits than ours are no numbers of a table.
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?")
Label = bool | int | float | str
Given = TypeVar("Given")
TEXTS = ("causal_lm", "conversation")  # objectives of texts; others are no text and have no prompt
Normalisation = Literal["sum", "token", "character"]


def _is_text(source: str) -> str:
    Text(source)
    return source


def _is_expression(source: str) -> str:
    Expression(source)
    return source


def _is_pattern(source: str) -> str:
    try:
        groups = re.compile(source).groups
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    if groups > 1:
        raise ValueError(f"has {groups} groups, expected one at most")
    return source


def _is_metric(name: str) -> str:
    if name not in METRICS:
        near = did_you_mean(name, METRICS) or f"; known: {', '.join(METRICS)}"
        raise ValueError(f"unknown metric '{name}'{near}")
    return name


JinjaText = Annotated[str, AfterValidator(_is_text)]
JinjaExpression = Annotated[str, AfterValidator(_is_expression)]
MetricName = Annotated[str, AfterValidator(_is_metric)]
FieldName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class Each(StrictModel):
    """Choices that a row brings along: their texts, and the label value of each."""

    each: JinjaExpression
    labels: JinjaExpression | None = None  # default: the texts themselves


def _form(value: Any) -> str | None:
    if isinstance(value, dict):
        return "each" if "each" in value else "by label"
    if isinstance(value, Each):
        return "each"
    return "by index" if isinstance(value, list) else None


Choices = Annotated[
    Annotated[Each, Tag("each")]
    | Annotated[dict[Label, JinjaText], Tag("by label")]
    | Annotated[list[JinjaText], Tag("by index")],
    Discriminator(
        _form,
        custom_error_type="choices",
        custom_error_message="Expected label: text pairs, a list of texts, or each and labels",
    ),
]


class Generation(StrictModel):
    """How answers are generated, and what is read in them, where a task is evaluated so."""

    # Default: one more than the right answer has, or the longest choice; of conversations twice and 32.
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    # Texts at which an answer ends. Default: the line's end for choices without `extract`.
    stop: list[Annotated[str, Field(min_length=1)]] | None = None
    # What counts in an answer: the group, or the whole match. Default: its beginning.
    extract: Annotated[str, AfterValidator(_is_pattern)] | None = None
    # Tokens are drawn with p ∝ exp(logit / temperature); 0: the likeliest.
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @property
    def identity(self) -> dict[str, Any]:
        """As results keep it; without what says nothing, since early versions did not draw."""
        whole = self.model_dump()
        if not self.temperature:
            del whole["temperature"], whole["seed"]
        return whole


class Template(MapKeys):
    """How one task's rows become examples, and how its answers are measured."""

    description: str
    version: Annotated[int, Field(ge=1)] = 1  # recorded beside every result
    tags: list[Name] = Field(default=[])
    source: Source | None = None  # where the rows come from unless the recipe says otherwise
    fields: dict[FieldName, JinjaExpression] = Field(default={})  # computed first, in order
    # `causal_lm`, `conversation`, or one that a Python file of the recipe's `extensions` declares.
    objective: Name = "causal_lm"
    # With `objective: conversation`: rows give a list of messages, and no prompt and answer.
    conversation: ConversationSettings | None = Field(default=None, validate_default=True)
    # Expressions that give the paths of a row's pictures; `<image>` in the prompt is where each stands.
    images: list[JinjaExpression] = Field(default=[])
    prompt: JinjaText = Field(default="", validate_default=True)
    choices: Choices | None = None  # none: a free answer
    # The value that picks the gold choice: a key of the mapping, or the index in the list.
    label: JinjaExpression | None = Field(default=None, validate_default=True)
    # What the model answers: each choice wrapped, or the free answer.
    answer: JinjaText = Field(default="", validate_default=True)
    # An expression that gives all free answers that count as right, a list of texts; `answer` is what is learned.
    answers: JinjaExpression | None = Field(default=None, validate_default=True)
    # `expectation`: labels are numbers, and the prediction is sum p_i * label_i.
    scoring: Literal["argmax", "expectation"] = "argmax"
    # What a choice's log-probability is divided by: 1, its tokens, or its characters.
    normalisation: Normalisation = "sum"
    generate: Generation = Field(default=Generation())
    metrics: list[MetricName] = Field(default=[], validate_default=True)
    # The class that metrics of two choices are about; default: 1, true or yes, else the second
    positive: Label | None = None

    @property
    def labels(self) -> list[Label] | None:
        """The label values in the order of the choices, or None where they vary by row."""
        return _labels(self.choices)

    @property
    def positive_index(self) -> int:
        """Which of two choices is the positive class: the label 1, true or yes unless it is said."""
        wanted = (1, "true", "yes") if self.positive is None else (self.positive,)
        found = [index_of(label, self.labels or []) for label in wanted]
        return next((index for index in found if index is not None), 1)

    def title(self, metric: str) -> str:
        """A metric as tables show it: `f1 (yes)` where it is about that class, `rmse ↓` where less is better."""
        declared = METRICS[metric]
        title = metric if declared.better == "higher" else f"{metric} ↓"
        if not declared.of_positive or not isinstance(self.choices, dict | list):
            return title
        return f"{title} ({self.choice_name(self.positive_index)})"

    def choice_name(self, index: int) -> str:
        """A choice as tables name it: its text or its label; by its place where each row has its own."""
        texts = list(self.choices.values()) if isinstance(self.choices, dict) else self.choices
        if not isinstance(texts, list):
            return f"choice {index + 1}"
        named = texts[index].strip()
        if "{" in named:
            named = str(self.labels[index]) if self.labels else f"choice {index + 1}"
        return named if len(named) <= 30 else named[:29] + "…"

    @field_validator("fields")
    @classmethod
    def _free_names(cls, fields: dict[str, str]) -> dict[str, str]:
        for name in {"row", "choice"} & set(fields):
            raise ValueError(f"'{name}' has a meaning of its own; choose another name")
        return fields

    @field_validator("conversation")
    @classmethod
    def _conversation_goes_with_its_objective(
        cls, conversation: ConversationSettings | None, info: ValidationInfo
    ) -> ConversationSettings | None:
        wanted = info.data.get("objective") == "conversation"
        if conversation is not None and not wanted:
            raise ValueError("goes with objective: conversation")
        if wanted:
            conversation = conversation or ConversationSettings()
            require_expressions(conversation)
        return conversation

    @field_validator("images")
    @classmethod
    def _pictures_go_with_prompts(cls, images: list[str], info: ValidationInfo) -> list[str]:
        if images and not _of_text(info):
            raise ValueError(
                f"goes with prompts and conversations, not with objective {info.data['objective']}"
            )
        return images

    @field_validator("prompt")
    @classmethod
    def _prompt_or_messages(cls, prompt: str, info: ValidationInfo) -> str:
        talks = info.data.get("objective") == "conversation"
        if talks and prompt:
            raise ValueError("a conversation has messages and no prompt")
        if not talks and not prompt and _of_text(info):
            raise ValueError("is required, unless objective is conversation")
        return _none_without_text(prompt, info)

    @field_validator("choices")
    @classmethod
    def _choices_differ(cls, choices: Choices | None, info: ValidationInfo) -> Choices | None:
        if choices is not None and info.data.get("objective") == "conversation":
            raise ValueError("a conversation has messages and no choices")
        _none_without_text(choices, info)
        if isinstance(choices, dict | list):
            texts = list(choices.values()) if isinstance(choices, dict) else choices
            if len(texts) < 2:
                raise ValueError(f"at least two choices are needed, received {len(texts)}")
            repeated = [text for text in texts if texts.count(text) > 1]
            if repeated:
                raise ValueError(f"two choices have the same text {repeated[0]!r}")
        return choices

    @field_validator("label")
    @classmethod
    def _label_goes_with_choices(cls, label: str | None, info: ValidationInfo) -> str | None:
        if "choices" in info.data and (label is None) != (info.data["choices"] is None):
            raise ValueError(
                "goes with choices; a free answer has no label"
                if label
                else "is required with choices: the expression that picks one of them"
            )
        return label

    @field_validator("answer", mode="before")
    @classmethod
    def _answer_or_choice(cls, answer: Any, info: ValidationInfo) -> Any:
        if info.data.get("objective") == "conversation":
            if answer != "":
                raise ValueError("a conversation has messages and no answer")
            return answer
        if "choices" not in info.data or (answer != "" and _of_text(info)):
            return answer
        if not _of_text(info):
            return _none_without_text(answer, info)
        if info.data["choices"] is None:
            raise ValueError("is required where there are no choices")
        return "{{ choice }}"

    @field_validator("answers")
    @classmethod
    def _answers_are_free(cls, answers: str | None, info: ValidationInfo) -> str | None:
        if answers is not None and info.data.get("objective", TEXTS[0]) != TEXTS[0]:
            raise ValueError(f"goes with prompts, not with objective {info.data['objective']}")
        if answers is not None and info.data.get("choices") is not None:
            raise ValueError("goes with free answers, not with choices")
        return answers

    @field_validator("scoring")
    @classmethod
    def _labels_are_numbers(cls, scoring: str, info: ValidationInfo) -> str:
        if scoring == "expectation" and "choices" in info.data:
            if info.data["choices"] is None:
                raise ValueError("expectation goes with choices")
            for label in _labels(info.data["choices"]) or []:
                if number(label) is None:
                    raise ValueError(f"expectation needs numbers as labels, received {label!r}")
        return scoring

    @field_validator("metrics")
    @classmethod
    def _metrics_fit(cls, metrics: list[str], info: ValidationInfo) -> list[str]:
        if not {"choices", "scoring"} <= info.data.keys():
            return metrics
        objective = info.data.get("objective")
        if not _of_text(info) and objective not in MAPS:
            return _none_without_text(metrics, info)
        named = "segmentation" if objective == "parts" else str(objective)
        kinds = {Of(named)} if objective in MAPS else _kinds(**_of_answers(info))
        possible = fitting(kinds)
        for metric in metrics:
            if metric not in possible:
                raise ValueError(f"'{metric}' does not fit; possible here: {', '.join(possible)}")
        return metrics or (possible if objective in MAPS else possible[:1])

    @model_validator(mode="after")
    def _maps_are_whole(self) -> Template:
        """Keys of maps stand where there are maps, and all of them that are needed."""
        faults = [
            InitErrorDetails(
                type=PydanticCustomError("value_error", "{error}", {"error": said}),
                loc=(key,),
                input=getattr(self, key),
            )
            for key, said in faults_of(self)
        ]
        if faults:
            raise ValidationError.from_exception_data("Template", faults)
        return self

    @field_validator("positive")
    @classmethod
    def _positive_is_a_label(cls, positive: Label | None, info: ValidationInfo) -> Label | None:
        if positive is not None and "choices" in info.data:
            labels = _labels(info.data["choices"]) or []
            if len(labels) != 2:
                raise ValueError("goes with exactly two choices")
            if index_of(positive, labels) is None:
                raise ValueError(f"expected one of {labels}, received {positive!r}")
        return positive


def _of_answers(info: ValidationInfo) -> dict[str, Any]:
    return {name: info.data[name] for name in ("choices", "scoring")}


def _of_text(info: ValidationInfo) -> bool:
    """Whether rows become texts; so it is, too, where the objective has a fault of its own."""
    return info.data.get("objective", TEXTS[0]) in TEXTS


def _none_without_text(value: Given, info: ValidationInfo) -> Given:
    """Refuse a key of texts where there are none.

    Raises:
        ValueError: it has a value.
    """
    if value and not _of_text(info):
        raise ValueError(f"is for texts; with objective {info.data['objective']} there are none")
    return value


def read_template(path: str | Path) -> Template:
    """Read one template file.

    Raises:
        ProblemsError: a line for each fault, with file, line and key; Jinja's faults included.
    """
    return read_model(path, Template, what="template")


def index_of(label: Any, labels: Sequence[Any]) -> int | None:
    """The place of a label among `labels`, or None.

    The same label is 0 in one file, "0" in the next, false in a third, and "0.0" where pandas met an
    empty cell. Values match by equality first (0 == 0.0 == False), then by their text without regard
    to case, then also without regard to white space and to the Unicode form of the same letters, then
    as numbers.
    """
    for index, known in enumerate(labels):
        if known == label:
            return index
    forms: tuple[Callable[[Any], Any], ...] = (_folded, _plain, _amount)
    for form in forms:
        wanted = form(label)
        for index, known in enumerate(labels if wanted is not None else ()):
            if form(known) == wanted:
                return index
    return None


def index_in(label: Any, choices: Sequence[Any]) -> int | None:
    """A label as a place among the choices, or None: a whole number from 0 to their last."""
    value = None if isinstance(label, bool) else number(label)
    if value is None or not value.is_integer() or not 0 <= value < len(choices):
        return None
    return int(value)


def number(label: Any) -> float | None:
    """A label as a finite number, or None."""
    amount = None if _is_truth(label) and not isinstance(label, bool) else _amount(label)
    value = math.nan if amount is None else float(amount)
    return value if math.isfinite(value) else None


def _folded(label: Any) -> str:
    return str(label).casefold()


def _plain(label: Any) -> str:
    """`é` is one character or two, and a space may be one that breaks no line."""
    text = unicodedata.normalize("NFC", str(label)).casefold()
    return " ".join(unicodedata.normalize("NFC", text).split())


def _amount(label: Any) -> Decimal | None:
    """The number that a label is, or is written as; a truth value is 1 or 0."""
    text = str(label).strip()
    if _is_truth(text):
        return Decimal(text.casefold() == "true")
    return Decimal(text) if _NUMBER.fullmatch(text) else None


def _is_truth(label: Any) -> bool:
    return str(label).strip().casefold() in ("true", "false")


def require_expressions(conversation: ConversationSettings) -> None:
    """Check what a conversation's keys read of a row.

    Raises:
        ValueError: naming the key.
    """
    for key, check in (("messages", Expression), ("tools", Expression), ("system", Text)):
        given = getattr(conversation, key)
        if isinstance(given, str):
            try:
                check(given)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None


def _labels(choices: Choices | None) -> list[Label] | None:
    if isinstance(choices, dict):
        return list(choices)
    return list(range(len(choices))) if isinstance(choices, list) else None


def _kinds(choices: Choices | None, scoring: str) -> set[Of]:
    """What kinds of task it is, for the metrics that mean something."""
    if choices is None:
        return {Of.FREE}
    if scoring == "expectation":
        return {Of.VALUES}
    if isinstance(choices, Each):  # the second choice of one row has no kin in the next
        return {Of.CHOICES}
    return {Of.CHOICES, Of.LABELS} | ({Of.TWO} if len(choices) == 2 else set())
