"""How fast choices are scored, beside lm-evaluation-harness's own HFLM; run by hand:

    python tests/benchmarks/harness_speed.py MODEL DATA [--tasks arc_challenge,hellaswag,boolq]

MODEL is a transformers folder (or an alias of `base_model`), DATA the folder that holds `commonsense/`,
`glue/` and `ads/`. Both sides get the same tokens of the same requests and the same weights on the same
device, in turns; HFLM at each of several batch sizes, of which the fastest counts. On a card both
compute in bfloat16 and ours runs the fused engine; elsewhere float32, and seconds are processor time.

The token counts are those that go through the model without padding: HFLM's of its distinct requests
(it computes requests that differ in their last token only once), ours of the prefix trees. Beside equal
predictions stands how often HFLM agrees with itself at another batch size: in half precision no two
ways to compute agree on near ties.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from harness_tasks import hflm, read_examples

from mtl_lora_cli.cli.table import table
from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.evaluation.choices import score
from mtl_lora_cli.evaluation.requests import Request, build_requests
from mtl_lora_cli.machine.cards import pick_device
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import load_model, load_tokenizer
from mtl_lora_cli.models.packed import PackedModel

DEFAULT_TASKS = "arc_challenge,hellaswag,boolq"
HEADER = (
    "task",
    "rows",
    "tokens ours",
    "HFLM",
    "ratio",
    "s ours",
    "HFLM",
    "at batch",
    "speed",
    "of ratio",
    "equal",
    "HFLM itself",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--tasks", default=DEFAULT_TASKS)
    parser.add_argument("--rows", type=int, help="of each task; default: all")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--batch-sizes", help="of HFLM, such as 16,64,256")
    parser.add_argument("--tokens", help="of our passes, such as 2048,8192; the fastest counts")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    device = pick_device()
    cuda = device.type == "cuda"
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if cuda else "float32"))
    batch_sizes = _numbers(arguments.batch_sizes or ("32,128,512,1024" if cuda else "1,4,16,64"))
    sizes = _numbers(arguments.tokens or ("32768" if cuda else "2048"))

    base = find_base_model(arguments.model)
    encoder = Encoder(load_tokenizer(base), "plain")
    packed = PackedModel(load_model(base, dtype=dtype, device=device), engine="fused").eval()
    longest = packed.model.config.max_position_embeddings
    harness = hflm(base.folder, device, dtype)
    rows = []
    for name in arguments.tasks.split(","):
        examples = read_examples(name, arguments.data, arguments.rows)
        requests = [r for r in build_requests(examples, -1, encoder, longest) if not r.truncated]
        row = _compare(
            name, requests, packed, harness, device, batch_sizes, sizes, arguments.rounds
        )
        rows.append(row)
        print("  ".join(row), file=sys.stderr)
    what = torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{arguments.model}, {dtype}, {what}; best of {arguments.rounds} rounds by the median")
    print(table(HEADER, rows))


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _compare(
    name: str,
    requests: Sequence[Request],
    packed: PackedModel,
    harness: Any,
    device: torch.device,
    batch_sizes: Sequence[int],
    sizes: Sequence[int],
    rounds: int,
) -> list[str]:
    """One row of the table."""
    triples = [
        ((f"{number}", f"{place}"), request.prompt, choice)
        for number, request in enumerate(requests)
        for place, choice in enumerate(request.choices)
    ]

    def theirs(batch_size: int) -> list[int]:
        harness.batch_size_per_gpu = batch_size
        found = harness._loglikelihood_tokens(triples, disable_tqdm=True)
        values = iter([value for value, _ in found])
        return [int(np.argmax([next(values) for _ in r.choices])) for r in requests]

    def ours(tokens: int) -> list[int]:
        found = score(packed, requests, device=device, tokens_per_pass=tokens)
        return [int(values.argmax()) for values in found]

    sides: list[tuple[str, int, Callable[[int], list[int]]]] = [
        *(("ours", size, ours) for size in sizes),
        *(("HFLM", size, theirs) for size in batch_sizes),
    ]
    seconds: dict[tuple[str, int], list[float]] = {}
    predicted: dict[tuple[str, int], list[int]] = {}
    for number in range(rounds + 1):  # the first one warms up
        for side, size, run in sides:
            try:
                found, taken = _timed(run, size, device)
            except torch.OutOfMemoryError:
                print(f"{name}: {side} at {size}: out of memory", file=sys.stderr)
                continue
            predicted[side, size] = found
            if number:
                seconds.setdefault((side, size), []).append(taken)
    middle = {key: median(values) for key, values in seconds.items()}
    for (side, size), value in middle.items():
        print(f"{name}: {side} at {size}: {value:.3f} s", file=sys.stderr)
    best = {
        side: min((key for key in middle if key[0] == side), key=lambda key: middle[key])
        for side in ("ours", "HFLM")
    }
    counts = (
        sum(request.cost for request in requests),
        sum(len(k) for k in {tuple(r.prompt + c[:-1]) for r in requests for c in r.choices}),
    )
    ratio = counts[1] / counts[0]
    speed = middle[best["HFLM"]] / middle[best["ours"]]
    reference = predicted[best["HFLM"]]
    others = [value for key, value in predicted.items() if key[0] == "HFLM" and key != best["HFLM"]]
    itself = min((_agreement(reference, other) for other in others), default=1.0)
    return [
        name,
        f"{len(requests):,}",
        f"{counts[0]:,}",
        f"{counts[1]:,}",
        f"{ratio:.2f}",
        f"{middle[best['ours']]:.3f}",
        f"{middle[best['HFLM']]:.3f}",
        f"{best['HFLM'][1]}",
        f"{speed:.2f}",
        f"{speed / ratio:.0%}",
        f"{_agreement(reference, predicted[best['ours']]):.4f}",
        f"{itself:.4f}",
    ]


def _timed(
    run: Callable[[int], list[int]], size: int, device: torch.device
) -> tuple[list[int], float]:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.synchronize(device)
    # What else the machine does lengthens the time on the clock, not that of the processor.
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    started = clock()
    found = run(size)  # what it returns has left the device: nothing is still running
    return found, clock() - started


def _agreement(one: Sequence[int], two: Sequence[int]) -> float:
    return float(np.mean(np.asarray(one) == np.asarray(two)))


if __name__ == "__main__":
    main()
