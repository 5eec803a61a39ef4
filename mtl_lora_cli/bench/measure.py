"""All cases of a call, one after the other; one that fails takes no other with it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import torch

from mtl_lora_cli.bench import packed_baseline, peft_baseline
from mtl_lora_cli.bench.case import Measuring, model_sizes, run_case
from mtl_lora_cli.bench.cases import Case, CasePlan
from mtl_lora_cli.bench.yardstick import lengths
from mtl_lora_cli.errors import MtlLoraError, UsageError
from mtl_lora_cli.machine.cards import release
from mtl_lora_cli.machine.environment import describe
from mtl_lora_cli.machine.rate import Rate

FORMAT_VERSION = 1
DOES_NOT_FIT = "does not fit"


def check(plan: CasePlan, device: torch.device) -> None:
    """What can be known before anything is measured.

    Raises:
        UsageError: a model that is too large for a CPU, or, where it is the only case, arithmetic
            that this device does not have.
    """
    for case in plan.cases:
        model_sizes(case.shape, device)
    first = plan.cases[0]
    if device.type == "cpu" and first.base_compute == "fp8":
        raise UsageError("--base-compute fp8 needs a CUDA card; there is none here")


def run_plan(plan: CasePlan, measuring: Measuring, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure everything.

    Args:
        plan: what.
        measuring: how.
        say: told of each case that is done.

    Returns:
        The report, ready for JSON: what it was measured on, `cases` (baselines marked as such),
        and `ratios` of each case to each baseline of its shape.

    Raises:
        UsageError: a single case asks for something that does not exist here.
    """
    alone = len([case for case in plan.cases if case.baseline is None]) == 1
    cases: list[dict[str, Any]] = []
    for case in plan.cases:
        entry = _attempt(case, measuring, strict=alone and case.baseline is None)
        cases.append(entry)
        release(measuring.device)
        say(_line(entry))
    if plan.packed is not None:
        cases += packed_baseline.run_all(plan.packed, measuring, lambda entry: say(_line(entry)))
    if plan.peft is not None:
        cases += peft_baseline.run_all(plan.peft, measuring, lambda entry: say(_line(entry)))
    return {
        **describe_measuring(measuring),
        "cases": cases,
        "ratios": ratios(cases),
    }


def _attempt(case: Case, measuring: Measuring, *, strict: bool) -> dict[str, Any]:
    """The case's measurement, or why there is none."""
    entry: dict[str, Any] = {**case.to_json(), "status": "done", "reason": None}
    if measuring.device.type == "cpu" and case.base_compute == "fp8":
        return {**entry, "status": "failed", "reason": "FP8 needs a CUDA card"}
    try:
        return {**entry, **run_case(case, measuring)}
    except torch.OutOfMemoryError:
        reason = DOES_NOT_FIT
    except UsageError as error:
        if strict:
            raise
        reason = error.lines[0]
    except MtlLoraError as error:
        reason = error.lines[0]
    except Exception as error:
        # A kernel that does not compile here must not cost the measurements before and after it.
        if strict:
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return {**entry, "status": "failed", "reason": reason}


def ratios(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Speed and memory of each case over those of each baseline of the same shape.

    Of PEFT's settings, packed and padded, only the best is a baseline.
    """
    done = [case for case in cases if case["status"] == "done"]
    baselines = [case for case in done if case["baseline"] and case.get("best", True)]
    found = []
    for case in done:
        for other in baselines:
            if case["baseline"] or case["shape"] != other["shape"]:
                continue
            memory = None
            if case["peak_memory_gib"] and other["peak_memory_gib"]:
                memory = case["peak_memory_gib"] / other["peak_memory_gib"]
            found.append(
                {
                    "case": case["name"],
                    "baseline": other["baseline"],
                    "baseline_name": other["name"],
                    "tokens_per_second": case["tokens_per_second"] / other["tokens_per_second"],
                    "memory": memory,
                }
            )
    return found


def describe_measuring(measuring: Measuring) -> dict[str, Any]:
    """On what and how: date, versions, device, command line, the examples."""
    rate: Rate = measuring.rate
    environment = describe(measuring.device, torch.float32)
    del environment["dtype"]  # each case has its own
    for name in ("peft", "triton"):
        try:
            environment["versions"][name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            environment["versions"][name] = None
    return {
        "format_version": FORMAT_VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment,
        "steps": measuring.steps,
        "warmup": measuring.warmup,
        "seed": measuring.seed,
        "rate": {
            "product": rate.product,
            "measured_flop_per_second": rate.measured,
            "known_flop_per_second": rate.known,
        },
        "examples": {
            "count": len(lengths()),
            "tokens": sum(one.tokens for one in lengths()),
            "supervised": sum(one.answer for one in lengths()),
            "longest": max(one.tokens for one in lengths()),
        },
    }


def _line(entry: dict[str, Any]) -> str:
    if entry["status"] != "done":
        return f"{entry['name']}: {entry['reason']}"
    return f"{entry['name']}: {entry['tokens_per_second']:,.0f} tokens/s"
