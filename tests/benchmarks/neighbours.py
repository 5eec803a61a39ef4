"""Training steps on a CPU alone and beside a busy process on each core: all threads, threads that yield, one thread.

    python tests/benchmarks/neighbours.py [--shape smollm2-135m] [--cores 2] [--steps 5]

Each way is a process of its own on the same cores, with a model of random weights, rows of 512 positions and one row a
step. `overall` counts the first step, too, in which threads are given back.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

BUSY = "while True: pass"
WAYS = {  # OMP_NUM_THREADS is set below
    "all threads, fixed": {"MTL_LORA_THREADS": "fixed"},
    "threads that yield": {},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")


def main() -> None:
    """See the module."""
    options = parsed()
    cores = sorted(os.sched_getaffinity(0))[-options.cores :]
    os.sched_setaffinity(0, cores)
    found: dict[str, dict[str, float]] = {}
    for company in (False, True):
        busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in cores if company]
        for process, core in zip(busy, cores, strict=False):
            os.sched_setaffinity(process.pid, {core})
        try:
            # The slowest comes last, so that the others are told whatever becomes of it.
            for way in sorted(WAYS, key=lambda one: company and one.startswith("all")):
                found[f"{'beside' if company else 'alone'}, {way}"] = one = of_a_process(
                    way, options
                )
                print(f"{'beside others' if company else 'alone'}, {way}: {told(one)}", flush=True)
        finally:
            for process in busy:
                process.kill()
    yields, one_thread = (found[f"beside, {way}"]["median"] for way in list(WAYS)[1:])
    print(f"beside others, threads that yield over one thread: {yields / one_thread:.2f}")
    kept, fixed = (found[f"alone, {way}"]["median"] for way in reversed(list(WAYS)[:2]))
    print(f"alone, threads that yield over all threads: {kept / fixed:.2f}")
    print(json.dumps(found))


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="smollm2-135m")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--measure", action="store_true", help="what the processes are called with")
    options = parser.parse_args()
    if options.measure:
        measure(options)
        sys.exit()
    return options


def of_a_process(way: str, options: argparse.Namespace) -> dict[str, float]:
    """What one way gives."""
    around = {**os.environ, "OMP_NUM_THREADS": str(options.cores), "CUDA_VISIBLE_DEVICES": ""}
    call = [
        sys.executable,
        __file__,
        "--measure",
        "--shape",
        options.shape,
        "--steps",
        str(options.steps),
    ]
    done = subprocess.run(
        call, env=around | WAYS[way], stdout=subprocess.PIPE, text=True, check=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def told(one: dict[str, float]) -> str:
    """A line."""
    return f"{one['median']:,.0f} tokens/s, overall {one['overall']:,.0f}; {one['threads']:.0f} threads in the end"


def measure(options: argparse.Namespace) -> None:
    """Steps in this process."""
    import torch

    from mtl_lora_cli.bench.case import Measuring, run_case
    from mtl_lora_cli.bench.cases import Case
    from mtl_lora_cli.machine.rate import Rate

    adapter = {"method": "mtl-lora", "rank": 8, "target_modules": QKVO}
    case = Case(options.shape, options.shape, adapter, row_length=512)
    slow = os.environ.get("MTL_LORA_THREADS") == "fixed"
    measuring = Measuring(
        device=torch.device("cpu"),
        rate=Rate("none", 1e11, None),  # of a floor that is not asked for
        steps=min(3, options.steps) if slow else options.steps,
        warmup=0,
        breakdown=False,
        seed=0,
    )
    result = run_case(case, measuring)
    found = {
        name: result[f"tokens_per_second{end}"]
        for name, end in (("median", ""), ("overall", "_overall"))
    }
    print(json.dumps({**found, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
