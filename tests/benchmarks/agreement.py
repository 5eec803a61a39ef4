"""How far merged models and PEFT's are from the adapted one on real rows, in float32 and bfloat16.

    python tests/benchmarks/agreement.py --data FOLDER [--base smollm2-135m] [--forms mtl-lora,mtlora]

Each form trains on sst2 and home_depot; then all three models answer the same
held-out rows in each dtype. One line each: the score, the largest difference of a candidate's
log-probability (a sum over its tokens), and the share of equal predictions. Two more lines say what
of it is rounding's: `stored` is the merged model with its weights rounded to bfloat16 and float32
arithmetic, beside the adapted one in float32; `float32` is the adapted model in float32 beside itself in
bfloat16.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from mtl_lora_cli.evaluation.opened import Run, open_run
from mtl_lora_cli.evaluation.protocols import Setting
from mtl_lora_cli.export.check import answers_of
from mtl_lora_cli.export.comparison import compared
from mtl_lora_cli.export.formats import Reference, find_format
from mtl_lora_cli.export.order import Options
from mtl_lora_cli.export.questions import Questions, Scored
from mtl_lora_cli.export.write import write_tasks
from mtl_lora_cli.machine.cards import pick_device
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import load_model
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.runs.folder import RunFolder
from mtl_lora_cli.training.prepare import prepare
from mtl_lora_cli.training.run import start

SOURCES = {"sst2": "glue/sst2", "home_depot": "ads/home_depot"}
# A method, or a form of mtl-lora, under the name by which it is asked for: what its adapter says.
FORMS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "mtl-lora": {"method": "mtl-lora"},
    "diagonal": {"method": "mtl-lora", "up_projections": 1, "transform": "diagonal"},
    "bases": {"method": "mtl-lora", "up_projections": 1, "transform": "bases"},
    "embedding": {"method": "mtl-lora", "gate": "embedding"},
    "mtlora": {"method": "mtlora", "task_rank": 2},
    "moelora": {"method": "moelora", "up_projections": 2},
    "multilora": {"method": "multilora"},
}
Reader = Callable[[Questions, Path], Scored]
READERS: dict[str, Reader] = {kind: find_format(kind).read for kind in ("merged", "peft")}


def stored(questions: Questions, folder: Path) -> Scored:
    """The merged weights as 16 bits hold them, in float32 arithmetic."""
    model = load_model(find_base_model(str(folder)), dtype=torch.bfloat16, device=pick_device())
    return questions.ask(PackedModel(model.float()))


def _known(answers: Scored, questions: Questions, folder: Path) -> Scored:
    """Answers that were given before."""
    return answers


def train(asked: argparse.Namespace, form: str, folder: Path) -> RunFolder:
    recipe = {
        "base_model": asked.base,
        "dtype": asked.train_dtype,
        "adapter": {
            "target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
            **FORMS[form],
        },
        "tasks": [
            {
                "name": name,
                "template": name,
                "source": str(asked.data.resolve() / source),
                "max_examples": asked.examples,
            }
            for name, source in SOURCES.items()
        ],
        "training": {
            "epochs": asked.epochs,
            "max_steps": asked.steps,
            "learning_rate": 2e-3,
            "row_length": 512,
            "rows_per_step": asked.rows_per_step,
            "on_overflow": "truncate_prompt",
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return start(prepare(load_recipe(path)), folder / "run")


def in_dtype(run: RunFolder, dtype: str) -> Run:
    """The run, from now on computing in another dtype."""
    recipe = yaml.safe_load(run.recipe.read_text(encoding="utf-8"))
    run.recipe.write_text(yaml.safe_dump({**recipe, "dtype": dtype}), encoding="utf-8")
    return open_run(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--data", type=Path, required=True, help="with glue/sst2 and ads/home_depot"
    )
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--train-dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--examples", type=int, default=600, help="to learn from, of each task")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--rows-per-step", type=int, default=1)
    parser.add_argument("--steps", type=int, default=80, help="at most")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument(
        "--exact", action="store_true", help="only what float32 arithmetic says, PEFT left out"
    )
    arguments = parser.parse_args()
    readers_of = {"float32": {**READERS, "stored": stored}, "bfloat16": READERS}
    if arguments.exact:
        readers_of = {"float32": {"merged": READERS["merged"], "stored": stored}}
    for form in arguments.forms.split(","):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            trained = train(arguments, form, folder)
            run = open_run(trained)
            unchecked = Options(checked=False)
            for task in run.tasks:
                write_tasks("merged", run, [(task, folder / "merged" / task.name)], unchecked)
                if not arguments.exact:
                    write_tasks("peft", run, [(task, folder / "peft" / task.name)], unchecked)
            exact: dict[str, Scored] = {}  # the adapted model's in float32
            for dtype, asked in readers_of.items():
                run = in_dtype(trained, dtype)
                for task in run.tasks:
                    questions = Questions(run, task, Setting(limit=arguments.rows))
                    own = answers_of(Reference("the run"), questions)
                    readers: dict[str, Reader] = dict(asked)
                    if dtype == "float32":
                        exact[task.name] = own
                    else:
                        readers["float32"] = partial(_known, exact[task.name])
                    for kind, reader in readers.items():
                        place = "peft" if kind == "peft" else "merged"
                        theirs = reader(questions, folder / place / task.name)
                        found = compared(questions, theirs, {"the run": own}, 1.0)
                        ours, theirs = (
                            metrics["accuracy"].value
                            for metrics in (found.reference.metrics, found.metrics)
                        )
                        print(
                            f"{form:10}{task.name:12}{dtype:10}{kind:8}{found.examples:5} rows  "
                            f"accuracy {ours:.3f} and {theirs:.3f}  "
                            f"difference {found.largest:.1e}  equal {found.equal:.2%}",
                            flush=True,
                        )


if __name__ == "__main__":
    main()
