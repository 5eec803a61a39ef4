"""`mtl-lora bench`: the yardstick."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtl_lora_cli.adapters.methods import BUILT_IN, DEFAULT, reads
from mtl_lora_cli.cli.frame import emit, emit_json, framed, say, status
from mtl_lora_cli.cli.options import JsonOption
from mtl_lora_cli.errors import MtlLoraError, UsageError

if TYPE_CHECKING:
    from mtl_lora_cli.bench.cases import Case


def register(app: typer.Typer) -> None:
    app.command("bench", epilog="Example: mtl-lora bench --shape tiny --row-length 512 --vs peft")(
        bench
    )


def bench(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to the recipe: key.path=value …")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            "--shape",
            help="llama3-8b (default), llama2-7b, smollm2-135m, tiny, …; or a folder with config.json.",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="Take model, adapter and rows from a recipe, no data."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", help=f"{DEFAULT} (default), {', '.join(BUILT_IN[1:])}."),
    ] = None,
    tasks: Annotated[int | None, typer.Option("--tasks", min=1, help="Default: 8.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Default: 8.")] = None,
    up_projections: Annotated[
        int | None,
        typer.Option("--up-projections", min=1, help="Default: the method's; mtl-lora: 3."),
    ] = None,
    modules: Annotated[
        str | None,
        typer.Option("--modules", help="qkvo (default), all, or names with commas between."),
    ] = None,
    quantization: Annotated[
        str | None, typer.Option("--quantization", help="Of the base: none (default) or nf4.")
    ] = None,
    base_compute: Annotated[
        str | None, typer.Option("--base-compute", help="Frozen products: bf16 (default) or fp8.")
    ] = None,
    row_length: Annotated[
        int | None, typer.Option("--row-length", help="Tokens in a packed row; default: 8192.")
    ] = None,
    rows_per_step: Annotated[
        int | None, typer.Option("--rows-per-step", min=1, help="Default: 1.")
    ] = None,
    rows_per_pass: Annotated[
        int | None,
        typer.Option("--rows-per-pass", min=1, help="Rows that go through together; default: 1."),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Timed steps.")] = 8,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Steps before them.")] = 3,
    engine: Annotated[
        str | None, typer.Option("--engine", help="auto (default), fused or plain.")
    ] = None,
    case: Annotated[
        str | None,
        typer.Option(
            "--case",
            help="yardstick: the whole table, PEFT's best in it; growth: more tasks and longer rows.",
        ),
    ] = None,
    versus: Annotated[
        list[str] | None,
        typer.Option("--vs", help="Also measure packed, peft, plain or lora."),
    ] = None,
    breakdown: Annotated[
        bool, typer.Option("--breakdown", help="Say where the time of a step goes.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of everything drawn.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Time whole training steps on random weights: real lengths, no download, no files."""
    with framed():
        from mtl_lora_cli.bench.cases import choose, plan
        from mtl_lora_cli.recipe.load import find_recipe, load_extensions_of

        if recipe is not None:  # they may declare methods
            load_extensions_of(find_recipe(recipe))

        given = {
            "--method": method,
            "--quantization": quantization,
            "--base-compute": base_compute,
            "--engine": engine,
            "--case": case,
        }
        for option, value in given.items():
            if value is not None:
                choose(option, value)
        wanted = [choose("--vs", name) for name in versus or ()]
        if recipe is None and overrides:
            raise UsageError(f"'{overrides[0]}': changes are to a recipe; name it with --recipe")
        base = (
            _plain_case(shape) if recipe is None else _from_recipe(recipe, overrides or (), shape)
        )
        base = _with_options(
            base,
            adapter={"method": method, "rank": rank, "up_projections": up_projections},
            modules=modules,
            fields={
                "tasks": tasks,
                "quantization": quantization,
                "base_compute": base_compute,
                "row_length": row_length,
                "rows_per_step": rows_per_step,
                "rows_per_pass": rows_per_pass,
                "engine": engine,
            },
        )
        own_shape = shape is not None or recipe is not None
        planned = plan(base, table=case, versus=wanted, own_shape=own_shape)
        status("loading libraries")
        from mtl_lora_cli.bench.case import Measuring
        from mtl_lora_cli.bench.measure import check, run_plan
        from mtl_lora_cli.machine.cards import pick_device
        from mtl_lora_cli.machine.rate import measure_rate

        device = pick_device()
        check(planned, device)
        status("measuring the device's own products")
        measuring = Measuring(device, measure_rate(device), steps, warmup, breakdown, seed)
        several = len(planned.cases) > 1 or bool(planned.peft or planned.packed)
        report = run_plan(planned, measuring, say if several else status)
        own = [one for one in report["cases"] if not one["baseline"]]
        nothing = all(one["status"] != "done" for one in own)
        if as_json:
            emit_json(report)
        elif several or not nothing:
            _show(report)
        if nothing:
            raise MtlLoraError(f"{own[0]['name']}: {own[0]['reason']}")


def _plain_case(shape: str | None) -> Case:
    from mtl_lora_cli.bench.cases import Case
    from mtl_lora_cli.bench.shapes import projections, require_shape

    name = shape or "llama3-8b"
    require_shape(name)
    adapter = {
        "method": "mtl-lora",
        "rank": 8,
        "target_modules": projections(name)["qkvo"],
    }
    return Case(name=name, shape=name, adapter=adapter)


def _from_recipe(name: str, overrides: Sequence[str], shape: str | None) -> Case:
    """The recipe's model, adapter and rows; its tasks only by their number.

    Raises:
        UsageError: the recipe is wrong, or its model cannot be found here.
    """
    from mtl_lora_cli.bench.cases import Case
    from mtl_lora_cli.bench.shapes import SHAPES, require_shape
    from mtl_lora_cli.recipe.load import find_recipe, load_recipe

    loaded = load_recipe(find_recipe(name), overrides, with_data=False)
    recipe, training = loaded.recipe, loaded.recipe.training
    if shape is None and recipe.base_model in SHAPES:
        shape = recipe.base_model
    if shape is None:
        from mtl_lora_cli.models.base import find_base_model

        try:
            shape = str(
                find_base_model(recipe.base_model, beside=loaded.base, weights=False).folder
            )
        except UsageError as error:
            raise UsageError(
                f"{error.lines[0]}; --shape measures without it: {', '.join(SHAPES)}, or a folder"
            ) from None
    require_shape(shape)
    adapter = recipe.adapter.model_dump()
    adapter["target_modules"] = tuple(adapter["target_modules"])
    return Case(
        name=shape,
        shape=shape,
        adapter=adapter,
        tasks=len(recipe.tasks),
        quantization=recipe.quantization,
        engine=recipe.engine,
        base_compute="fp8" if recipe.base_compute == "fp8" else "bf16",
        row_length=training.row_length,
        rows_per_step=training.rows_per_step,
        rows_per_pass=training.rows_per_pass,
        dtype=recipe.dtype,
        gradient_checkpointing=training.gradient_checkpointing,
        memory=training.memory,
        memory_limit=training.memory_limit,
        expanded_layers=training.expanded_layers,
        max_gradient_norm=training.max_gradient_norm,
    )


def _with_options(
    case: Case, *, adapter: dict[str, Any], modules: str | None, fields: dict[str, Any]
) -> Case:
    """The case with what was asked for on the command line.

    Raises:
        UsageError: an example does not fit a row, or options contradict each other.
    """
    from dataclasses import replace

    from mtl_lora_cli.bench.cases import choose, target_modules, with_method
    from mtl_lora_cli.bench.yardstick import require_fitting

    mixed = with_method(case.adapter, adapter["method"] or case.adapter["method"])
    mixed |= {key: value for key, value in adapter.items() if value is not None}
    if not reads(mixed["method"], "up_projections") and mixed.pop("up_projections", 1) != 1:
        raise UsageError(f"--up-projections: {mixed['method']} has one, and no gates to mix more")
    if modules is not None:
        mixed["target_modules"] = target_modules(modules, case.shape)
    # The update keeps its scale alpha / rank = 2 where only the rank was asked for.
    if adapter["rank"] is not None or "alpha" not in mixed:
        mixed["alpha"] = 2.0 * mixed["rank"]
    changed = {key: value for key, value in fields.items() if value is not None}
    if "rows_per_pass" in changed:  # by hand, so nothing is left to pick
        changed |= {"memory": "manual", "memory_limit": None}
    case = replace(case, adapter=mixed, **changed)
    choose("--quantization", case.quantization)  # a recipe knows more kinds
    require_fitting(case.row_length)
    return case


def _show(report: dict[str, Any]) -> None:
    """The report as tables."""
    from mtl_lora_cli.cli.table import table

    done = [case for case in report["cases"] if case["status"] == "done"]
    baselines = list(dict.fromkeys(ratio["baseline"] for ratio in report["ratios"]))
    known = report["rate"]["known_flop_per_second"]
    header = ["case", "tokens/s", "min – max", "of floor"]
    header += [f"of {known / 1e12:.0f} TFLOP/s"] if known else []
    header += ["GiB", "trained", "loss", *(f"× {name}" for name in baselines)]
    emit(table(header, [_row(case, report, baselines, bool(known)) for case in done]))
    for case in report["cases"]:
        if case["status"] != "done":
            emit(f"{case['name']}: {case['reason']}")
    rate, environment = report["rate"], report["environment"]
    for shape, floor in {case["shape"]: case["floor"] for case in done}.items():
        exact = floor["known_tokens_per_second"]
        emit(
            f"floor of {shape}: {floor['tokens_per_second']:,.0f} tokens/s at the "
            f"{rate['measured_flop_per_second'] / 1e12:,.3g} TFLOP/s of a {rate['product']} product"
            + (f"; {exact:,.0f} at {known / 1e12:.0f}" if exact else "")
        )
    emit(
        f"timed steps: {report['steps']}, after {report['warmup']}; real tokens of the median one, on "
        f"{environment['device']}, PyTorch {environment['versions']['torch']}"
    )
    for case in done:
        if case.get("picked"):
            emit(f"{case['name']}: {case['picked']}")
        if any(case.get("captures", ())):
            emit(f"{case['name']}: CUDA graphs captured {_captured(case['captures'])}")
        if case.get("breakdown"):
            _show_breakdown(case)


def _row(case: dict[str, Any], report: dict[str, Any], baselines: list[str], known: bool) -> list:
    memory = case["peak_memory_gib"]
    row = [
        case["name"] + (" (best)" if case.get("best") else ""),
        f"{case['tokens_per_second']:,.0f}",
        f"{case['tokens_per_second_min']:,.0f} – {case['tokens_per_second_max']:,.0f}",
        f"{case['share_of_floor']:.1%}",
    ]
    row += [f"{case['share_of_known_floor']:.1%}"] if known else []
    row += [
        "–" if memory is None else f"{memory:.1f}",
        f"{case['trained_parameters']:,}",
        f"{case['loss']:.3f}",
    ]
    mine = {
        ratio["baseline"]: f"{ratio['tokens_per_second']:.2f}"
        for ratio in report["ratios"]
        if ratio["case"] == case["name"]
    }
    return row + [mine.get(name, "") for name in baselines]


def _captured(captures: Sequence[int]) -> str:
    """How many in which steps, counted from 1, the warm-up among them."""
    each = [f"{count} in step {number}" for number, count in enumerate(captures, 1) if count]
    return ", ".join(each)


def _show_breakdown(case: dict[str, Any]) -> None:
    from mtl_lora_cli.cli.table import table

    found = case["breakdown"]
    rows = [
        (one["group"], f"{one['ms']:,.2f}", f"{one['share']:.1%}")
        for one in [
            *found["groups"],
            {"group": "idle", "ms": found["idle_ms"], "share": found["idle_ms"] / found["step_ms"]},
        ]
    ]
    emit(f"\n{case['name']}: a step of {found['step_ms']:,.1f} ms")
    emit(table(("group", "ms", "share"), rows))
    kernels = [
        (_short(one["name"]), one["group"], f"{one['ms']:,.2f}", f"{one['count']:,.0f}")
        for one in found["kernels"]
    ]
    emit("")
    emit(table(("kernel", "group", "ms", "launches"), kernels))


def _short(name: str, width: int = 70) -> str:
    return name if len(name) <= width else name[: width - 1] + "…"
