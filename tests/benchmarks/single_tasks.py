"""Each task of a recipe alone: what a method reaches without interference, and without help; by hand:

    python tests/benchmarks/single_tasks.py real-17 OUTPUT [--method lora] [--seeds 0] [--tasks sst2,rte]
        [--sweep training.learning_rate=1e-3,2e-3] [key.path=value …]

Makes a comparison of one method in OUTPUT/TASK for each task, of the recipe's own trained values or as
`--match` says, and writes OUTPUT.json: task → mean of its metric over the seeds. What `--sweep` names is
chosen for each task on its validation rows. A call that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from mtl_lora_cli.compare.grid import TEST, parse_match, parse_methods, parse_seeds, parse_sweeps
from mtl_lora_cli.compare.results import read_result
from mtl_lora_cli.compare.run import run_study
from mtl_lora_cli.compare.study import StudyOptions, plan_study
from mtl_lora_cli.recipe.load import find_recipe, load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("output", type=Path)
    parser.add_argument("changes", nargs="*", metavar="key.path=value")
    parser.add_argument("--method", default="lora")
    parser.add_argument("--match", default="params")
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--sweep", action="append", default=[], metavar="key=v1,v2")
    parser.add_argument("--tasks", help="only these, with commas between")
    arguments = parser.parse_intermixed_args()
    loaded = load_recipe(find_recipe(arguments.recipe), arguments.changes)
    (method,) = parse_methods(arguments.method)
    options = StudyOptions(
        methods=[method],
        match=parse_match(arguments.match),
        seeds=parse_seeds(arguments.seeds, loaded.recipe.training.seed),
        sweeps=parse_sweeps(arguments.sweep),
        baseline=method,
    )
    found = {}
    wanted = arguments.tasks.split(",") if arguments.tasks else None
    for task in loaded.recipe.tasks:
        if wanted is not None and task.name not in wanted:
            continue
        alone = replace(loaded, recipe=loaded.recipe.model_copy(update={"tasks": [task]}))
        study = plan_study(alone, arguments.output / task.name, options)
        run_study(study, lambda text: print(text, file=sys.stderr))
        results = [read_result(study.folder, run.id) for run in study.runs]
        # Where settings were swept, the chosen one alone was scored on the test rows.
        scored = [result for result in results if result and result.get(TEST)]
        entries = [result[TEST][task.name] for result in scored]
        found[task.name] = {
            "metric": entries[0]["metric"],
            "value": fmean(entry["metrics"][entry["metric"]] for entry in entries),
            "setting": scored[0]["point"],
            "parameters": study.runs[0].parameters,
            "seeds": list(options.seeds),
        }
    text = json.dumps(found, indent=1) + "\n"
    arguments.output.with_suffix(".json").write_text(text, encoding="utf-8")
    for name, one in found.items():
        print(f"{name:16}{one['metric']:10}{one['value']:.3f}")
    print(f"{'mean':26}{fmean(one['value'] for one in found.values()):.3f}")


if __name__ == "__main__":
    main()
