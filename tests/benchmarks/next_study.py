"""The next study (docs/study.md): 300 runs in five stages, a result file a run, going on where it stopped; by hand:

    python tests/benchmarks/next_study.py OUTPUT STAGE [--jobs 3] [--dry-run] [--runs N] [--base-model FILE]
                                                       STAGE 0 to 4, status or report

Arms, spaces, seeds and mixtures stand here and were committed before the first run. A stage is one comparison or
several in OUTPUT/STAGE…, each a queue of its own: what has a result is passed over. A later stage reads what the
one before chose: 0 the spike control, on LoRA alone; 1 the rates of each arm, by the mean validation score of
two seeds. All runs of a study are of one revision and one type of card: another one is refused, unless
`--mixed` says that it is known. `--runs` stops after so many more. `report` prints the tables of the page. `MTL_LORA_DATA` names the data; it, OUTPUT and the
file of `--base-model` stay where they are from session to session, for they stand in the plan.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from mtl_lora_cli.compare.grid import TEST, VALIDATION, Variant
from mtl_lora_cli.compare.results import average, is_done, read_result
from mtl_lora_cli.compare.run import run_study
from mtl_lora_cli.compare.study import Study, StudyOptions, checked_plan, plan_study, store_plan
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.machine.environment import describe
from mtl_lora_cli.recipe.load import LoadedRecipe, find_recipe, load_recipe

DRAWN_BY = 20261201  # of settings and mixtures
RATE = "training.learning_rate"
PARTS = {
    name: f"training.parts.{name}.learning_rate"
    for name in ("up", "transform", "gate", "embedding")
}
SIZE = {"adapter.rank": 16, "adapter.alpha": 32.0}
FINE = {**SIZE, "adapter.dropout": 0.0}
DIAGONAL = {
    **SIZE,
    "adapter.up_projections": 1,
    "adapter.transform": "diagonal",
    "adapter.transform_start": 0.5,
}
PAPER = {
    "adapter.rank": 8,
    "adapter.alpha": 16.0,
    "adapter.rank_pattern": {"down_proj": 6},
    "adapter.up_projections": 3,
    "adapter.transform": "full",
    "adapter.transform_start": 0.0,
}


@dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
        method, settings: what it is; 4.9 to 5.0 million values.
        parts: that have a rate of their own.
        like: the arm whose chosen rates it takes; None: it is searched itself.
    """

    method: str
    settings: Mapping[str, Any]
    parts: Sequence[str]
    like: str | None = None


FINE_PARTS = ("up", "transform", "gate", "embedding")
ARMS = {
    # Matched from above: C has 2.3 % more values than LoRA of rank 16.
    "A": Arm("lora", {**SIZE, "adapter.rank_pattern": {"gate_proj": 17, "up_proj": 17}}, ("up",)),
    "B": Arm("mtl-lora", DIAGONAL, ("up", "transform")),
    "C": Arm("mtl-lora-fine", FINE, FINE_PARTS),
    "C4": Arm("mtl-lora-fine", {**FINE, "adapter.up_rank": 4}, FINE_PARTS),
    "D": Arm("mtl-lora-fine", {**FINE, "adapter.tied": True}, FINE_PARTS, like="C"),
    "E": Arm("mtl-lora-fine", {**FINE, "training.shuffled_tasks": True}, FINE_PARTS, like="C"),
    "F": Arm("mtl-lora", PAPER, ("up", "transform", "gate")),
}
SEARCHED = ("A", "B", "C", "C4", "F")
SEARCHES = 8  # settings for each of them
SEEDS: dict[str, tuple[int, ...]] = {
    "0": (0,),
    "1": (0, 1),
    "2": tuple(range(101, 121)),
    "3": (201, 202, 203),
    "4": tuple(range(301, 311)),
}
RUNS = {"0": 12, "1": 80, "2": 100, "3": 18, "4": 90}
CONTROLS = {
    "clip03": {"training.max_gradient_norm": 0.3},
    "clip1": {"training.max_gradient_norm": 1.0},
    "history": {"training.clipping": {}},
}


def controls() -> dict[str, dict[str, Any]]:
    """Stage 0: spike control by name."""
    return {
        f"{name}-b{beta:g}": {**one, "training.adam_beta2": beta}
        for name, one in CONTROLS.items()
        for beta in (0.98, 0.999)
    }


def draws() -> list[dict[str, float]]:
    """Stage 1: the rate of A and the factors of the parts; an arm takes those of its own parts."""
    draw = random.Random(DRAWN_BY)
    found = []
    for _ in range(SEARCHES):
        rate = math.exp(draw.uniform(math.log(5e-4), math.log(2e-3)))
        factors = {"up": (1, 2, 4, 8), "transform": (1, 3, 10, 30)}
        factors |= {"gate": (1, 3, 10), "embedding": (1, 3, 10)}
        found.append({"rate": rate, **{part: draw.choice(own) for part, own in factors.items()}})
    return found


def rates(arm: Arm, drawn: Mapping[str, float], times: float = 1.0) -> dict[str, float]:
    """Key → learning rate of an arm."""
    rate = float(f"{times * drawn['rate']:.3g}")
    return {RATE: rate, **{PARTS[part]: float(f"{rate * drawn[part]:.3g}") for part in arm.parts}}


def mixtures() -> list[tuple[str, ...]]:
    """Stage 4: two draws of three of the seventeen tasks."""
    names = sorted(task.name for task in _recipe("real-17").recipe.tasks)
    draw = random.Random(DRAWN_BY)
    return [tuple(sorted(draw.sample(names, 3))) for _ in range(2)]


def _recipe(name: str, *changes: str) -> LoadedRecipe:
    return load_recipe(find_recipe(name), ["training.parts={}", *changes])


def _of_three(tasks: Sequence[str], *changes: str) -> LoadedRecipe:
    """Three of the seventeen, a thousand steps."""
    small = ("training.epochs=50", "training.max_steps=1000", "training.rows_per_step=1")
    loaded = _recipe("real-17", *small, *changes)
    kept = [task for task in loaded.recipe.tasks if task.name in tasks]
    return replace(loaded, recipe=loaded.recipe.model_copy(update={"tasks": kept}))


def planned(
    loaded: LoadedRecipe,
    folder: Path,
    variants: Mapping[str, Variant],
    seeds: Sequence[int],
    score: str,
) -> Study:
    """One comparison, its ranks as the arms say."""
    first = next(iter(variants))
    options = StudyOptions(
        list(variants), None, list(seeds), {}, first, None, dict(variants), score
    )
    return plan_study(loaded, folder, options)


def studies(stage: str, output: Path, *changes: str) -> Iterator[Study]:
    """The comparisons of a stage, with these changes of all recipes."""
    whole, seeds = _recipe("real-17", *changes), SEEDS[stage]
    if stage == "0":
        arm = ARMS["A"]
        variants = {
            f"{name}-up{up}": Variant(
                "lora", {**arm.settings, **own, RATE: 1e-3, PARTS["up"]: float(up)}
            )
            for name, own in controls().items()
            for up in ("4e-3", "8e-3")
        }
        yield planned(whole, output / "0", variants, seeds, VALIDATION)
        return
    control = chosen_control(output)
    if stage == "1":
        variants = {
            f"{name}-{number}": _variant(ARMS[name], rates(ARMS[name], drawn), control)
            for name in SEARCHED
            for number, drawn in enumerate(draws())
        }
        yield planned(whole, output / "1", variants, seeds, VALIDATION)
        return
    best = chosen_draws(output)

    def arms(names: Sequence[str], *factors: float) -> dict[str, Variant]:
        return {
            name if times == 1 else f"{name}-x{times:g}": _variant(
                ARMS[name],
                rates(ARMS[name], draws()[best[ARMS[name].like or name]], times),
                control,
            )
            for name in names
            for times in factors
        }

    if stage == "2":
        yield planned(whole, output / "2", arms("ABCDE", 1), seeds, TEST)
    elif stage == "3":
        yield planned(whole, output / "3", arms("ABC", 0.5, 2), seeds, TEST)
    else:
        loaded = [_recipe("unbalanced-3", "training.clipping=null", *changes)]
        loaded += [_of_three(tasks, *changes) for tasks in mixtures()]
        for number, one in enumerate(loaded):
            yield planned(one, output / f"4-{number}", arms("ABC", 1), seeds, TEST)


def _variant(arm: Arm, own: Mapping[str, float], control: Mapping[str, Any]) -> Variant:
    return Variant(arm.method, {**arm.settings, **control, **own})


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """Finished runs of one comparison by id."""
    found = {}
    for path in sorted((folder / "results").glob("*-seed*.json")):
        result = read_result(folder, path.stem)
        if result is not None and is_done(result):
            found[path.stem] = result
    return found


def _means(folder: Path, count: int) -> dict[str, float]:
    """Method → mean validation score; refuses a stage that is not whole."""
    every = results(folder)
    if len(every) < count:
        raise UsageError(f"stage {folder.name} has {len(every)} of {count} runs; finish it first")
    by_method: dict[str, list[float]] = {}
    for result in every.values():
        by_method.setdefault(result["method"], []).append(average(result[VALIDATION]))
    return {method: fmean(scores) for method, scores in by_method.items()}


def chosen_control(output: Path) -> dict[str, Any]:
    """Of stage 0 the spike control with the best mean over both rates of B."""
    means = _means(output / "0", RUNS["0"])
    scores = {
        name: fmean(means[f"{name}-up{up}"] for up in ("4e-3", "8e-3")) for name in controls()
    }
    return controls()[max(scores, key=lambda name: scores[name])]


def chosen_draws(output: Path) -> dict[str, int]:
    """Of stage 1 arm → the number of its best draw."""
    means = _means(output / "1", RUNS["1"])
    return {
        arm: max(range(SEARCHES), key=lambda number: means[f"{arm}-{number}"]) for arm in SEARCHED
    }


def require_one_kind(output: Path, here: Mapping[str, Any]) -> None:
    """Refuse a revision or a card that other runs of the study do not have."""
    for folder in sorted(path for path in output.glob("*") if path.is_dir()):
        for name, result in results(folder).items():
            for key in ("git_revision", "device"):
                before = result["environment"].get(key)
                if before != here.get(key):
                    raise UsageError(
                        f"{folder.name}/{name} is of {key} {before}, here it is {here.get(key)}; all arms are "
                        "compared at one: --mixed goes on all the same"
                    )


def status(output: Path) -> dict[str, int]:
    """Stage → finished runs."""
    return {
        stage: sum(len(results(folder)) for folder in output.glob(f"{stage}*") if folder.is_dir())
        for stage in RUNS
    }


def report(output: Path) -> Iterator[str]:
    """The tables of the stages that choose, of the runs that are there; the others have `compare --report-only`."""
    yield from _controls_table(results(output / "0"))
    yield ""
    yield from _search_table(results(output / "1"))


def _controls_table(every: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Stage 0: mean validation score, in brackets the steps that were spikes."""
    yield "| spike control, β₂ | η_B 4e-3 | η_B 8e-3 | mean |"
    yield "| --- | --- | --- | --- |"
    for name in controls():
        own = [every.get(f"{name}-up{up}-seed0") for up in ("4e-3", "8e-3")]
        cells = [f"{_percent(one)} ({one['spikes']})" if one else "" for one in own]
        both = [100 * average(one[VALIDATION]) for one in own if one]
        cells.append(f"{fmean(both):.2f}" if len(both) == 2 else "")
        yield f"| {name.replace('-b', ', ')} | {' | '.join(cells)} |"


def _search_table(every: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Stage 1: mean validation score of the seeds that are there; with one alone a star."""
    yield f"| η; factors of B, Λ, G, e | {' | '.join(SEARCHED)} |"
    yield "| --- |" + " --- |" * len(SEARCHED)
    for number, drawn in enumerate(draws()):
        cells = []
        for arm in SEARCHED:
            ids = [f"{arm}-{number}-seed{seed}" for seed in SEEDS["1"]]
            own = [100 * average(every[one][VALIDATION]) for one in ids if one in every]
            star = "" if len(own) == len(ids) else "*"
            cells.append(f"{fmean(own):.2f}{star}" if own else "")
        factors = ", ".join(f"{drawn[part]:g}" for part in FINE_PARTS)
        yield f"| {drawn['rate']:.3g}; {factors} | {' | '.join(cells)} |"


def _percent(result: Mapping[str, Any]) -> str:
    return f"{100 * average(result[VALIDATION]):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("stage", choices=[*RUNS, "status", "report"])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--mixed", action="store_true")
    parser.add_argument("--runs", type=int)
    parser.add_argument("--base-model", help="where the recipes' alias is not installed: its file")
    options = parser.parse_args()
    if options.stage == "status":
        there = status(options.output)
        print(
            "\n".join(f"stage {stage}: {there[stage]} of {count}" for stage, count in RUNS.items())
        )
        print(f"{sum(there.values())} of {sum(RUNS.values())} runs are in")
        return
    if options.stage == "report":
        print("\n".join(report(options.output)))
        return
    changes = [f"base_model={options.base_model}"] if options.base_model else []
    for study in studies(options.stage, options.output, *changes):
        if options.dry_run:
            for run in study.runs:
                print(json.dumps(run.to_json()))
            continue
        if not options.mixed:
            from mtl_lora_cli.machine.cards import pick_device, pick_dtype
            from mtl_lora_cli.machine.processes import ALONE

            device = pick_device()
            dtype = pick_dtype(study.loaded.recipe.dtype, device)
            require_one_kind(options.output, describe(device, dtype, ALONE))
        missing = [run for run in study.runs if run.id not in results(study.folder)]
        part = replace(study, runs=missing[: options.runs])
        run_study(part, lambda text: print(text, file=sys.stderr), options.jobs)
        store_plan(study.folder, checked_plan(study))  # of all runs


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        sys.exit("\n".join(error.lines))
