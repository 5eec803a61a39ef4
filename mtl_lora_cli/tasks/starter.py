"""A first recipe: a base model, tasks, settings that suit both (`defaults`), and a comment above every key."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.recipe.schema import Recipe
from mtl_lora_cli.recipe.source import Source
from mtl_lora_cli.recipe.yaml_file import parse_document, parse_scalar, validate_document
from mtl_lora_cli.resources import expanded
from mtl_lora_cli.tasks.defaults import Choice
from mtl_lora_cli.tasks.registry import find_template

_ALL = "[q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]"
_MIB_OF_80 = 70_000  # from here on a card counts as a large one


@dataclass(frozen=True)
class Hardware:
    """What depends on the machine alone: the weights' form, and who picks the rows of a pass.

    Attributes:
        what: in words.
        base_model: where none is asked for.
        small: there is no card.
        four_bit: the base weights are NF4.
        several: cards.
    """

    what: str
    base_model: str
    small: bool = False
    four_bit: bool = False
    several: bool = False


HARDWARE = {
    "cpu": Hardware("no card", "smollm2-135m", small=True),
    "gpu-24": Hardware("one card of about 24 GB", "meta-llama/Llama-2-7b-hf", four_bit=True),
    "gpu-80": Hardware("one card of about 80 GB", "meta-llama/Llama-2-7b-hf"),
    "multi": Hardware("several cards", "meta-llama/Llama-2-7b-hf", several=True),
}


@dataclass(frozen=True)
class StarterTask:
    """A task as it is asked for, found.

    Attributes:
        name: of the task.
        template: as the recipe will name it: in full, or an absolute path.
        source: a path, `sample:NAME`, or None: the template's own.
        description: the template's.
        talks: its rows are conversations.
    """

    name: str
    template: str
    source: str | None
    description: str
    talks: bool = False

    def rows(self) -> Source:
        """Where its rows are: its own source, or its template's."""
        if self.source is not None:
            return Source.model_validate(self.source)
        own = find_template(self.template, Path())[2].source
        assert own is not None, "read_task refuses a task without a source"
        return own


def read_task(text: str) -> StarterTask:
    """`NAME[=TEMPLATE][:FILE]`: `boolq`, `reviews=sst2:data/reviews.csv`.

    Raises:
        UsageError: there is no such template or file, or a template without a source gets none.
    """
    name, _, rest = text.partition("=") if "=" in text.partition(":")[0] else ("", "", text)
    template, _, source = rest.partition(":")
    where = f"--task {text}"
    if not template:
        raise UsageError(f"{where}: expected NAME[=TEMPLATE][:FILE]")
    try:
        full, path, found = find_template(template, Path())
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    if not source and found.source is None:
        raise UsageError(
            f"{where}: the template '{full}' has no source of its own; add a file or folder: "
            f"--task {text}:FILE"
        )
    if source and not source.startswith("sample:"):
        if not expanded(source).exists():
            raise UsageError(f"{where}: no such file or folder: {source}")
        source = str(expanded(source).resolve())
    return StarterTask(
        name=name or Path(full).stem,
        template=str(path.resolve()) if full.endswith((".yaml", ".yml")) else full,
        source=source or None,
        description=found.description,
        talks=found.objective == "conversation" and full != "instruct/completion",
    )


def starter_recipe(
    base_model: str,
    tasks: Sequence[StarterTask],
    hardware: str,
    choice: Choice,
    output: Path,
) -> str:
    """The recipe's text; what it says is checked against the schema.

    Args:
        base_model: an alias, a folder, a `.gguf` file, or a hub id.
        tasks: at least one.
        hardware: a key of HARDWARE.
        choice: from `defaults.choose`.
        output: the file that it is for: paths below its folder are written relative to it.

    Raises:
        UsageError: a name that stands twice, or that no task may have.
    """
    names = [task.name for task in tasks]
    for task in tasks:
        if names.count(task.name) > 1:
            raise UsageError(
                f"--task: the name '{task.name}' stands twice; name one of them otherwise: "
                f"--task OTHER={task.template}"
            )
    folder = output.resolve().parent
    path = expanded(base_model)
    model = _near(path.resolve(), folder) if path.exists() else base_model
    text = "\n".join(_lines(model, tasks, HARDWARE[hardware], choice, folder)) + "\n"
    validate_document(parse_document(text, str(output)), Recipe)
    return text


def _lines(
    base_model: str,
    tasks: Sequence[StarterTask],
    hardware: Hardware,
    choice: Choice,
    folder: Path,
) -> Iterator[str]:
    yield f"# A first recipe for {hardware.what}, to be changed: docs/recipes.md has all keys."
    yield "# `mtl-lora validate` reads all of its data and trains nothing; `mtl-lora doctor` says"
    yield "# whether it fits; `mtl-lora train FILE --find-rate` tries other rates in short runs."
    yield ""
    yield "# A hub id, a folder, a .gguf file, or an alias."
    yield f"base_model: {_word(base_model)}"
    if hardware.four_bit:
        yield "# nf4 holds the base weights in a quarter of the memory of bfloat16; none leaves them as they are."
        yield "quantization: nf4"
    if choice.dtype is not None:
        yield "# This CPU multiplies bfloat16 several times as fast as float32, which auto would be here."
        yield f"dtype: {choice.dtype}"
    if any(task.talks for task in tasks):
        yield "# Conversations, and the other tasks' questions, as the tokenizer's chat template writes them."
        yield "prompt_format: chat"
    yield ""
    yield from _adapter(choice)
    yield ""
    yield "tasks:"
    for number, task in enumerate(tasks):
        yield from _task(task, folder, first=number == 0)
    yield ""
    yield "# Each example once an epoch; uniform, weights and {temperature: 2} help small tasks."
    yield "mixing: proportional"
    yield ""
    yield from _training(choice, hardware)
    if hardware.several:
        yield ""
        yield "# mtl-lora train FILE --num-processes N starts one process for each of N cards."
        yield "distributed:"
        yield "  # 0 is the fastest; 3 cuts the base weights, too, where they do not fit one card."
        yield "  zero_stage: 0"


def _adapter(choice: Choice) -> Iterator[str]:
    yield "adapter:"
    yield "  # arXiv 2410.09437; docs/method.md has its relatives."
    yield "  method: mtl-lora"
    yield "  # Rows of the shared down-projection A."
    yield f"  rank: {choice.rank}"
    yield "  # The update is scaled by alpha / rank."
    yield f"  alpha: {choice.alpha}"
    yield "  # One shared up-projection B: every further one costs rank (docs/study.md)."
    yield "  up_projections: 1"
    yield "  # Each task weighs the directions of A and B by factors of its own."
    yield "  transform: diagonal"
    yield "  # All seven projections of a LLaMA layer."
    yield f"  target_modules: {_ALL}"


def _training(choice: Choice, hardware: Hardware) -> Iterator[str]:
    yield "training:"
    yield f"  # {choice.why}"
    yield f"  epochs: {choice.epochs}"
    if choice.max_steps is not None:
        yield "  # So many steps end the run."
        yield f"  max_steps: {choice.max_steps}"
    yield "  # Adam's peak rate, reached after the warm-up and lowered to zero along a cosine."
    yield f"  learning_rate: {choice.rate:.2g}"
    yield "  # B learns faster than A, and the factors of the tasks faster still."
    yield "  parts:"
    yield "    # Of B."
    yield f"    up: {{learning_rate: {choice.up_rate:.2g}}}"
    yield "    # Of the factors."
    yield f"    transform: {{learning_rate: {choice.transform_rate:.2g}}}"
    if choice.clipping:
        yield "  # A step whose gradient is many times the usual is made smaller, each tensor by its own history."
        yield "  clipping: true"
    yield "  # Share of the steps in which the rate rises."
    yield "  warmup: 0.05"
    yield "  # Tokens in a packed row."
    yield f"  row_length: {choice.row_length}"
    yield "  # Rows in an optimiser step, over all processes."
    yield f"  rows_per_step: {choice.rows_per_step}"
    yield "  # An example longer than a row loses the beginning of its prompt, never its answer."
    yield "  on_overflow: truncate_prompt"
    if not hardware.small:
        yield "  # Rows a pass, and what is computed again in the backward pass, by the memory that is free."
        yield "  memory: auto"
    if choice.looked_at is not None:
        yield "  # Looks at held-out rows: what is not learned is told."
        yield "  validation:"
        yield "    # Steps between two looks."
        yield "    every: 200"
        yield "    # Rows of each task, at most."
        yield f"    examples: {choice.looked_at}"
    yield "  # Steps between two checkpoints."
    yield "  checkpoint_every: 200"
    yield "  # Of every draw and every random start."
    yield "  seed: 0"


def _task(task: StarterTask, folder: Path, *, first: bool) -> Iterator[str]:
    yield f"  # {' '.join(task.description.split())}"
    yield f"  - name: {_word(task.name)}"
    if first:
        yield "    # Prompt, choices, metrics and data; `mtl-lora tasks` lists them."
    yield f"    template: {_word(_near(Path(task.template), folder))}"
    if task.source is not None:
        yield "    # A file, or a folder with train.* and test.* or validation.*."
        yield f"    source: {_word(_near(Path(task.source), folder))}"


def _near(path: Path, folder: Path) -> str:
    """A path below the recipe's folder relative to it; whatever else it is as it is."""
    return os.path.relpath(path, folder) if path.is_relative_to(folder) else str(path)


def _word(value: str) -> str:
    """As YAML, on one line, in quotes where it needs them: YAML reads JSON's strings."""
    plain = re.fullmatch(r"[\w./~:-]+", value) is not None and parse_scalar(value) == value
    return value if plain else json.dumps(value, ensure_ascii=False)


def hardware_here() -> str:
    """A key of HARDWARE for this machine, by what nvidia-smi says."""
    if shutil.which("nvidia-smi") is None:
        return "cpu"
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "cpu"
    cards = [int(line) for line in said.stdout.split() if line.isdecimal()]
    if said.returncode or not cards:
        return "cpu"
    if len(cards) > 1:
        return "multi"
    return "gpu-80" if cards[0] >= _MIB_OF_80 else "gpu-24"
