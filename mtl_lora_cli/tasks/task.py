"""A task as the rest of the program knows it, and as a run folder keeps it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.recipe.conversation import ConversationSettings
from mtl_lora_cli.recipe.names import NAME
from mtl_lora_cli.recipe.schema import TaskSettings
from mtl_lora_cli.recipe.source import Source
from mtl_lora_cli.recipe.yaml_file import parse_document, validate_document
from mtl_lora_cli.tasks.template import TEXTS, Template, require_expressions


def overlaid(template: Template, conversation: ConversationSettings | None) -> Template:
    """A template with the keys of its `conversation` that a recipe sets.

    Raises:
        ValueError: the template has no conversation, or a key is wrong.
    """
    if conversation is None:
        return template
    if template.conversation is None:
        raise ValueError("goes with a template whose objective is conversation")
    whole = template.conversation.overlaid(conversation)
    require_expressions(whole)
    return template.model_copy(update={"conversation": whole})


def measured_by(template: Template, metrics: Sequence[str] | None) -> Template:
    """A template with the metrics that a recipe asks for; None: with its own.

    Raises:
        ValueError: one of them does not exist, or does not fit the template's answers.
    """
    if metrics is None:
        return template
    document = {**template.model_dump(exclude_unset=True), "metrics": list(metrics)}
    try:
        checked = Template.model_validate(document)
    except ValidationError as error:
        said = next(one["msg"] for one in error.errors() if one["loc"][:1] == ("metrics",))
        raise ValueError(said.removeprefix("Value error, ")) from None
    return template.model_copy(update={"metrics": checked.metrics})


def require_text(
    task: str, objective: str, done: str = "evaluated, predicted, compared, merged and exported"
) -> None:
    """Refuse what is done with text alone.

    Args:
        task, objective: which, and how it is learned.
        done: what is done with text alone, in words.

    Raises:
        UsageError: the task is another host's.
    """
    if objective not in TEXTS:
        raise UsageError(
            f"task '{task}': is learned by objective {objective}; only text can be {done}"
        )


@dataclass(frozen=True)
class Task:
    """A named unit with a template, a source, choices or a free answer, and metrics.

    Attributes:
        name: unique in the recipe; files name tasks by it.
        id: its index in the recipe's order.
        template_name, template_text, template: what it is rendered by.
        source: with absolute paths.
        objective: how it is learned.
        conversation: keys of the template's `conversation` that the recipe sets.
        metrics: those that the recipe asks for; None: the template's.
        tags: free words to select tasks by.
        loss_weight, sampling_weight, max_examples, repeat: as in the recipe.
        fingerprints: split → hash of the rows that were read.
    """

    name: str
    id: int
    template_name: str
    template_text: str
    template: Template
    source: Source
    objective: str = "causal_lm"
    conversation: ConversationSettings | None = None
    metrics: tuple[str, ...] | None = None
    tags: tuple[str, ...] = ()
    loss_weight: float = 1.0
    sampling_weight: float = 1.0
    max_examples: int | None = None
    repeat: float = 1.0
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Enough to evaluate and predict without the recipe and the template file."""
        return {
            "name": self.name,
            "id": self.id,
            "template": {
                "name": self.template_name,
                "version": self.template.version,
                "text": self.template_text,
            },
            "labels": self.template.labels,
            "metrics": list(self.template.metrics),
            "source": self.source.model_dump(exclude_none=True),
            "objective": self.objective,
            **({} if self.overlay is None else {"conversation": self.overlay}),
            **({} if self.metrics is None else {"metrics_of_recipe": list(self.metrics)}),
            "tags": list(self.tags),
            "loss_weight": self.loss_weight,
            "sampling_weight": self.sampling_weight,
            "max_examples": self.max_examples,
            "repeat": self.repeat,
            "fingerprints": dict(self.fingerprints),
        }

    @property
    def overlay(self) -> dict[str, Any] | None:
        """The keys of the template's `conversation` that the recipe sets; None: none."""
        own = self.conversation
        return None if own is None else own.model_dump(exclude_unset=True)

    @property
    def wording(self) -> str:
        """All that decides how its rows become texts."""
        if self.overlay is None:
            return self.template_text
        return f"{self.template_text}\nconversation: {self.overlay}\n"

    def entry(self, source: Source | None = None) -> TaskSettings:
        """What a recipe says of it; another source in the place of its own."""
        return TaskSettings(
            name=self.name,
            template=self.template_name,
            source=self.source if source is None else source,
            objective=self.objective,
            conversation=self.conversation,
            metrics=None if self.metrics is None else list(self.metrics),
            tags=list(self.tags),
            sampling_weight=self.sampling_weight,
            loss_weight=self.loss_weight,
            max_examples=self.max_examples,
            repeat=self.repeat,
        )

    @classmethod
    def from_json(
        cls, content: Mapping[str, Any], known: dict[tuple[str, str], Template] | None = None
    ) -> Task:
        """The inverse of `to_json`.

        Args:
            content: what it gave.
            known: templates by name and text that need not be read again; what is read is added.

        Raises:
            KeyError, TypeError, ValidationError: something is missing, or what it cannot be.
        """
        if not NAME.fullmatch(content["name"]):  # it names folders, when it is merged
            raise TypeError(f"'{content['name']}' cannot be a task's name")
        template = content["template"]
        read = {} if known is None else known
        key = (template["name"], template["text"])
        if key not in read:
            document = parse_document(template["text"], f"template {template['name']}")
            read[key] = validate_document(document, Template)
        given = content.get("conversation")
        conversation = None if given is None else ConversationSettings.model_validate(given)
        metrics = content.get("metrics_of_recipe")
        whole = measured_by(read[key], metrics)
        return cls(
            name=content["name"],
            id=content["id"],
            template_name=template["name"],
            template_text=template["text"],
            template=overlaid(whole, conversation),
            source=Source.model_validate(content["source"]),
            objective=content["objective"],
            conversation=conversation,
            metrics=None if metrics is None else tuple(metrics),
            tags=tuple(content["tags"]),
            loss_weight=content["loss_weight"],
            sampling_weight=content["sampling_weight"],
            max_examples=content["max_examples"],
            repeat=content["repeat"],
            fingerprints=content["fingerprints"],
        )
