"""Our scores of choices beside lm-evaluation-harness's HFLM on the same rendered requests; by hand:

    python tests/benchmarks/harness_parity.py MODEL DATA [--rows 200] [--tasks sst2,rte,…]

HFLM gets each prompt and each of its choices as text, ours tokenises the same text in its own way: equal
figures say that both tokenise alike, too. On the CPU in float32, one request a batch of HFLM, so that
nothing is filled up. Examples whose prompt does not fit the model's positions are left out and counted:
the harness cuts their beginning for each choice by itself, ours for all choices alike.

HFLM's softmax and sum are in float64 (its option `softmax_dtype`), all the rest in float32. Its default adds
up a vocabulary's exponentials in float32: with SmolLM2's 49,152 that alone is 1.3e-4 off, measured against
float64, where ours is 3e-5 off. `--softmax float32` shows it.

Prints a row for each task, and ends with code 3 where a log-probability is further off than 1e-4 or a
prediction differs. The distance of neighbouring float32 numbers is allowed on top (3e-5 at 300 nats, 1.2e-4
at 1,200), and what needs it is counted under "beyond".
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness_tasks import KINDS, hflm, read_examples

from mtl_lora_cli.cli.table import table
from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.evaluation.choices import score
from mtl_lora_cli.evaluation.requests import build_requests
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import load_model, load_tokenizer
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.tasks.rendering import Example

LARGEST = 1e-4
HEADER = (
    "task",
    "rows",
    "choices",
    "left out",
    "largest difference",
    "beyond",
    "equal predictions",
    "acc",
    "acc_norm",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--tasks", default=",".join(KINDS))
    parser.add_argument("--rows", type=int, help="of each task; default: all")
    parser.add_argument("--softmax", choices=("float32", "float64"), default="float64")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)

    base = find_base_model(arguments.model)
    device = torch.device("cpu")
    packed = PackedModel(load_model(base, dtype=torch.float32, device=device)).eval()
    encoder = Encoder(load_tokenizer(base), "plain")
    longest = packed.model.config.max_position_embeddings
    harness = hflm(base.folder, device, torch.float32, softmax_dtype=arguments.softmax)
    rows, holds = [], True
    for name in arguments.tasks.split(","):
        examples = read_examples(name, arguments.data, arguments.rows)
        requests = build_requests(examples, -1, encoder, longest)
        fitting = [number for number, request in enumerate(requests) if not request.truncated]
        ours = score(packed, [requests[n] for n in fitting], device=device, tokens_per_pass=2048)
        chosen = [examples[number] for number in fitting]
        theirs = _by_harness(harness, chosen)
        row, same = _compared(name, chosen, ours, theirs, len(examples) - len(chosen))
        print("  ".join(row), file=sys.stderr, flush=True)
        rows.append(row)
        holds = holds and same
    print(f"{arguments.model}, float32, CPU")
    print(table(HEADER, rows))
    sys.exit(0 if holds else 3)


def _by_harness(harness: Any, examples: Sequence[Example]) -> list[np.ndarray]:
    from lm_eval.api.instance import Instance

    instances = [
        Instance("loglikelihood", {}, (example.prompt, f" {choice}"), number)
        for number, example in enumerate(examples)
        for choice in example.choices
    ]
    found = iter(harness.loglikelihood(instances, disable_tqdm=True))
    return [np.asarray([next(found)[0] for _ in example.choices]) for example in examples]


def _compared(
    name: str,
    examples: Sequence[Example],
    ours: Sequence[np.ndarray],
    theirs: Sequence[np.ndarray],
    left_out: int,
) -> tuple[list[str], bool]:
    lengths = [np.asarray([len(choice) for choice in example.choices]) for example in examples]
    gold = np.asarray([example.gold for example in examples])

    def predicted(scores: Sequence[np.ndarray], *, by_length: bool) -> np.ndarray:
        divided = (v / n if by_length else v for v, n in zip(scores, lengths, strict=True))
        return np.asarray([int(values.argmax()) for values in divided])

    expected = np.concatenate(theirs)
    difference = np.abs(np.concatenate(ours) - expected)
    spacing = np.spacing(np.abs(expected).astype(np.float32))
    answers = [
        (predicted(ours, by_length=by_length), predicted(theirs, by_length=by_length))
        for by_length in (False, True)
    ]
    equal = sum(int((a == b).sum()) for a, b in answers)
    row = [
        name,
        f"{len(examples):,}",
        f"{sum(len(example.choices) for example in examples):,}",
        f"{left_out}",
        f"{difference.max():.1e}",
        f"{(difference > LARGEST).sum()}",
        f"{equal:,} of {2 * len(examples):,}",
        *(f"{(theirs == gold).mean():.4f}" for _, theirs in answers),
    ]
    near = bool((difference <= LARGEST + spacing).all())
    return row, near and equal == 2 * len(examples)


if __name__ == "__main__":
    main()
