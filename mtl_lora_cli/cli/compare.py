"""`mtl-lora compare`: several methods on one recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtl_lora_cli.cli.frame import emit, emit_json, framed, say, status
from mtl_lora_cli.cli.options import JsonOption

if TYPE_CHECKING:
    from mtl_lora_cli.compare.study import Study


def register(app: typer.Typer) -> None:
    app.command(
        "compare", epilog="Example: mtl-lora compare quickstart --methods lora,mtl-lora --seeds 3"
    )(compare)


def compare(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe file, or the name of a bundled recipe.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it: key.path=value …")
    ] = None,
    methods: Annotated[
        str, typer.Option("--methods", help="Methods with commas between them.")
    ] = "lora,mtl-lora",
    variant: Annotated[
        list[str] | None,
        typer.Option(
            "--variant",
            metavar="NAME=METHOD,key=value…",
            help="A method under a name of its own, for --methods. Repeatable.",
        ),
    ] = None,
    match: Annotated[
        str,
        typer.Option(
            "--match",
            help="params: ranks for as many trained values as the recipe's own adapter has; "
            "params:N: for N of them; none: the recipe's rank.",
        ),
    ] = "params",
    seeds: Annotated[
        str, typer.Option("--seeds", help="A number of seeds, or a list such as 0,7.")
    ] = "3",
    sweep: Annotated[
        list[str] | None,
        typer.Option("--sweep", help="key=v1,v2: try each, choose by validation. Repeatable."),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", help="What the others are compared with; default: lora."),
    ] = None,
    references: Annotated[
        str | None,
        typer.Option(
            "--references",
            metavar="RUN,RUN",
            help="Of maps: the runs over which Δm is, such as one a task; default: the baseline.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Default: comparisons/RECIPE.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Score at most so many rows of a task.")
    ] = None,
    score: Annotated[
        str,
        typer.Option(
            "--score",
            help="What the report is about: test, or validation, which reads no test file.",
        ),
    ] = "test",
    jobs: Annotated[
        int, typer.Option("--jobs", min=1, help="So many runs at a time, dealt out to the cards.")
    ] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the runs and their sizes, and stop.")
    ] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Make the report again from stored results.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train the same tasks with several methods, and say how sure the differences are."""
    with framed():
        from mtl_lora_cli.compare import grid
        from mtl_lora_cli.errors import MtlLoraError, UsageError
        from mtl_lora_cli.recipe.load import find_recipe, load_extensions_of, load_recipe

        if recipe is None and not (report_only and output):
            raise UsageError("a recipe is missing: mtl-lora compare RECIPE")
        if recipe is not None:  # they may declare methods
            load_extensions_of(find_recipe(recipe))
        variants = grid.parse_variants(variant or ())
        names = grid.parse_methods(methods, variants)
        against = grid.parse_baseline(baseline, names)
        matched = grid.parse_match(match)
        sweeps = grid.parse_sweeps(sweep or ())
        scored = grid.parse_score(score)
        folder = output or Path("comparisons") / find_recipe(recipe or "").stem
        if report_only:
            if not (folder / "plan.json").is_file():
                raise UsageError(f"{folder} holds no comparison; start one without --report-only")
            _report(folder, as_json)
            return
        loaded = load_recipe(find_recipe(recipe or ""), overrides or ())
        numbers = grid.parse_seeds(seeds, loaded.recipe.training.seed)
        grid.require_known(sweeps, loaded.recipe)
        status("loading libraries")
        from mtl_lora_cli.compare.run import run_study
        from mtl_lora_cli.compare.study import StudyOptions, plan_study
        from mtl_lora_cli.runs.folder import find_run

        beside = [find_run(name, Path("runs")) for name in (references or "").split(",") if name]
        options = StudyOptions(
            names, matched, numbers, sweeps, against, limit, variants, scored,
            [str(one.path.absolute()) for one in beside],
        )  # fmt: skip
        study = plan_study(loaded, folder, options)
        if dry_run:
            _show_plan(study, as_json)
            return
        say("\n".join(study.to_json()["budget"]))
        run_study(study, say, jobs)
        unfinished = _report(folder, as_json)["unfinished"]
        if unfinished:
            raise MtlLoraError(
                f"{len(unfinished)} of {len(study.runs)} runs are not finished, the first is "
                f"{unfinished[0]['id']}: {unfinished[0]['reason']}; the same command tries again"
            )


def _show_plan(study: Study, as_json: bool) -> None:
    """The runs with their sizes, and the budget."""
    from mtl_lora_cli.cli.table import table

    plan = study.to_json()
    if as_json:
        emit_json(plan)
        return
    target = plan["target"]
    rows = []
    for run in plan["runs"]:
        off = "" if target is None else f"{run['parameters'] / target - 1:+.1%}"
        rows.append(
            [
                run["id"],
                str(run["rank"]),
                f"{run['alpha']:g}",
                f"{run['parameters']:,}",
                off,
            ]
        )
    emit(table(("run", "rank", "alpha", "trained", "off"), rows))
    if target is not None:
        emit(f"to match: {target:,} trained values")
    for name, text in plan["variants"].items():
        emit(f"{name}: {text}")
    for line in plan["budget"]:
        emit(line)
    chosen = "settings are chosen by" if study.options.sweeps else "scored on"
    for kind in dict.fromkeys(plan["validation"].values()):
        named = [name for name, other in plan["validation"].items() if other == kind]
        emit(f"{chosen} the {kind}: {', '.join(named)}")
    emit(f"results go to {study.folder}")


def _report(folder: Path, as_json: bool) -> dict[str, Any]:
    """Make the report and show its averages."""
    from mtl_lora_cli.cli.table import table
    from mtl_lora_cli.compare.markdown import notes, summary_rows
    from mtl_lora_cli.compare.report import MARKDOWN_FILE, write_report

    report = write_report(folder)
    if as_json:
        emit_json(report)
    else:
        emit(table(*summary_rows(report)))
        for line in notes(report):
            emit(line)
        emit(f"{folder / MARKDOWN_FILE}")
    if not report["plots"] and report["gains_over"] is None:
        say("no plots: matplotlib is not installed; get it with: pip install matplotlib")
    return report
