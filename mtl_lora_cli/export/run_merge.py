"""`merge`: one task of a run as an ordinary model, checked before it is trusted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mtl_lora_cli.errors import CheckError
from mtl_lora_cli.evaluation.open_run import OpenRun
from mtl_lora_cli.export.check import Comparison, compare_merged
from mtl_lora_cli.export.merge import require_empty, require_space, task_updates, write_merged
from mtl_lora_cli.runs.atomic import new_folder
from mtl_lora_cli.tasks.task import Task


@dataclass(frozen=True)
class Merged:
    """A written model and how it compared."""

    task: str
    folder: Path
    comparison: Comparison


def merge_task(
    opened: OpenRun,
    task: Task,
    folder: Path,
    *,
    limit: int,
    tolerance: float | None,
    say: Callable[[str], None],
) -> Merged:
    """Write one task's merged model, load it again, compare, and only then put it in its place.

    Args:
        opened: the run on its full-precision base model.
        task: which one.
        folder: where to; must not exist or be empty.
        limit: examples to compare on.
        tolerance: see `compare_merged`.
        say: called with progress lines.

    Raises:
        UsageError: the output folder is not empty, or the disk too small.
        CheckError: the written model differs; nothing is left in `folder`.
    """
    require_empty(folder)
    require_space(opened.base, folder)

    def check(written: Path) -> Comparison:
        say("loading it again and comparing")
        return compare_merged(opened, task, written, limit, tolerance)

    return write_checked(
        task,
        folder,
        what="the merged model differs from the adapted one",
        write=lambda path: write_merged(
            opened.base, task_updates(opened.adapter, task.id), path, say
        ),
        check=check,
        readme=lambda comparison: _readme(opened, task, comparison),
    )


def write_checked(
    task: Task,
    folder: Path,
    *,
    what: str,
    write: Callable[[Path], None],
    check: Callable[[Path], Comparison],
    readme: Callable[[Comparison], str],
) -> Merged:
    """Write beside the folder, check what was written, and only then put it in its place.

    Raises:
        CheckError: `what`, and by how much; nothing is left in `folder`.
    """
    with new_folder(folder) as temporary:
        write(temporary)
        comparison = check(temporary)
        if not comparison.holds:
            raise CheckError(
                f"{what} on task '{task.name}': largest difference of log-probabilities "
                f"{comparison.largest:.3g} (allowed {comparison.allowed[0]:.3g}), equal answers "
                f"{comparison.equal:.1%} (at least {comparison.allowed[1]:.0%}); nothing was left "
                f"in {folder}"
            )
        (temporary / "README.md").write_text(readme(comparison), encoding="utf-8")
    return Merged(task.name, folder, comparison)


def _readme(opened: OpenRun, task: Task, comparison: Comparison) -> str:
    recipe, base = opened.recipe, opened.base
    quantized = (
        ""
        if recipe.quantization == "none"
        else f"The adapter was trained on {recipe.quantization} weights; these are the "
        "full-precision ones, so answers may differ from the run's own evaluation.\n\n"
    )
    return (
        "---\n"
        "library_name: transformers\n"
        "pipeline_tag: text-generation\n"
        "---\n"
        f"# {base.name} merged for the task {task.name}\n\n"
        f"Base model: {base.name}"
        + (f", revision {base.revision}" if base.revision else "")
        + ".\n"
        f"Method: {recipe.adapter.method}, rank {recipe.adapter.rank}, run {opened.folder.name}; "
        "the task's update s · B' A was added to the base weights in float32 and cast once.\n\n"
        f"{quantized}"
        f"Checked after writing on {comparison.examples} held-out rows against the adapted model: "
        f"largest difference of log-probabilities {comparison.largest:.2e}, "
        f"equal answers {comparison.equal:.1%}.\n\n"
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")\n'
        "```\n\n"
        f"Prompt (Jinja, over the fields of a row):\n\n```\n{task.template.prompt.rstrip()}\n```\n"
    )
