"""Generated answers of mixed tasks, beside transformers' `generate` on the same weights in the same process.

    python tests/benchmarks/generation.py --shape smollm2-135m llama3-8b --batch 1 16 64 --out generation.json

*Ours* answers rows of three tasks in one batch, adapters beside the weights. transformers gets what is quickest
for it: one task, merged, so that there is no adapter at all; `dynamic` is its `generate` as it comes, `static` with
a static cache and `torch.compile`, `batching` its continuous batching. Every way answers the same prompts, greedily, with as
many tokens. A *step* is a further token of each row, without the prompts: in ours the difference of two runs, in
transformers' the mean of what lies between its steps. At batch 1 the share of what reading the weights allows is
2 bytes × values of the layers and the head / bandwidth / step.

Numbers of one process only are compared. `--until` leaves out what has not begun after so many seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mtl_lora_cli.adapters.inject import inject
from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.bench.random_model import random_model
from mtl_lora_cli.bench.shapes import find_config
from mtl_lora_cli.engine.plan import matrix_weights
from mtl_lora_cli.evaluation.choices import Request
from mtl_lora_cli.evaluation.generate import generate
from mtl_lora_cli.kernels import one_token
from mtl_lora_cli.models.packed import PackedModel

TASKS = ("one", "two", "three")
SHORT = 16  # new tokens of the shorter of two runs
PROMPT = (64, 192)
NOMINAL = 4.8e12  # bytes a second that an H200 is said to read
Row = dict[str, Any]


def prompts(batch: int, vocabulary: int) -> list[list[int]]:
    """Random prompts of different length."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(*PROMPT, (batch,), generator=generator).tolist()
    return [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], Any], device: torch.device, times: int = 3) -> float:
    """Median seconds of a few runs, after one to warm up."""
    run()
    seconds = []
    for _ in range(times):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return median(seconds)


def ours(packed: PackedModel, rows: list[list[int]], new: int, device: torch.device) -> Row:
    """Rows of three tasks in one batch."""
    requests = [Request(number % len(TASKS), row, [[]]) for number, row in enumerate(rows)]

    def run(tokens: int) -> list[list[int]]:
        return generate(
            packed, requests, ends=[], new_tokens=[tokens] * len(rows), device=device,
            tokens_per_pass=2**17,
        )  # fmt: skip

    assert all(len(answer) == new for answer in run(new))
    whole, short = timed(lambda: run(new), device), timed(lambda: run(SHORT), device)
    row = {"seconds": whole, "step_ms": 1000 * (whole - short) / (new - SHORT)}
    return {
        **row,
        "fused": packed.kept_rows is not None,
        "agrees": list(packed.rows_agree.values()),
    }


def by_torch(packed: PackedModel, rows: list[list[int]], new: int, device: torch.device) -> Row:
    """Ours with torch's products of a single row."""
    packed.kept_rows = None
    before, one_token.MOST_ROWS = one_token.MOST_ROWS, 0
    try:
        return ours(packed, rows, new, device)
    finally:
        packed.kept_rows = None
        one_token.MOST_ROWS = before


class Clock:
    """A stopping criterion that notes when it is asked."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def theirs(
    model: Any, rows: list[list[int]], new: int, device: torch.device, times: int, **how: Any
) -> Row:
    """transformers' `generate` over rows filled up on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor(
        [[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device
    )
    clocks: list[Clock] = []

    def run() -> None:
        clocks.append(Clock())
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new,
            do_sample=False, pad_token_id=0, eos_token_id=None, stopping_criteria=[clocks[-1]], **how,
        )  # fmt: skip
        assert out.shape[1] == longest + new

    seconds = timed(run, device, times)
    steps = [(one.times[-1] - one.times[SHORT - 1]) / (new - SHORT) for one in clocks[1:]]
    return {"seconds": seconds, "step_ms": 1000 * median(steps)}


def batching(model: Any, rows: list[list[int]], new: int, device: torch.device) -> Row:
    """transformers' continuous batching."""
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    before = model.config._attn_implementation

    def run() -> None:
        found = model.generate_batch(inputs=rows, generation_config=config)
        assert all(len(one.generated_tokens) == new for one in found.values()), "too few tokens"

    try:
        return {"seconds": timed(run, device, 2)}
    finally:
        model.set_attn_implementation(before)


def read_rate(device: torch.device) -> float:
    """Bytes a second that summing eight gigabytes reads."""
    if device.type != "cuda":
        return float("nan")
    data = torch.ones(2**31, dtype=torch.float32, device=device)
    seconds = timed(lambda: data.sum(), device, 5)
    return data.numel() * 4 / seconds


def merged(adapter: Any, model: Any) -> None:
    """W + ΔW of the first task into another model of the same weights."""
    for path, layer in adapter.layers.items():
        down, up = layer.task_update(0)
        weight = model.get_submodule(path).weight
        scale = layer.config.scale(layer.rank)
        weight.data += (scale * up.float() @ down.float()).to(weight.dtype)


def measure(wanted: argparse.Namespace) -> list[Row]:
    started = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rate, found = read_rate(device), []
    print(f"reads {rate / 1e12:.2f} TB/s", flush=True)

    def add(shape: str, batch: int, way: str, run: Callable[[], Row]) -> None:
        if time.perf_counter() - started > wanted.until or way not in wanted.ways:
            return
        row: Row = {"shape": shape, "batch": batch, "way": way}
        try:
            row |= run()
            row["tokens_s"] = batch * wanted.new / row["seconds"]
        except Exception as error:  # the others go on
            if way == "ours":
                raise
            row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        row["at_s"] = time.perf_counter() - started
        found.append(row)
        print(json.dumps(row), flush=True)
        wanted.out.write_text(json.dumps({"reads": rate, "rows": found}), encoding="utf-8")

    kept: dict[str, Any] = {}
    for shape in wanted.shape:
        config = find_config(shape)
        made = {"dtype": dtype, "device": device, "quantization": "none", "attention": "sdpa"}
        torch.manual_seed(0)
        plain = random_model(config, **made)
        torch.manual_seed(0)
        model = random_model(config, **made)
        values = sum(matrix_weights(model))
        adapter = inject(model, configure(target_modules=("*_proj",)), TASKS)
        with torch.no_grad():
            for tensor in adapter.tensors().values():
                tensor.add_(0.01 * torch.randn_like(tensor))
        merged(adapter, plain)
        packed = PackedModel(model, adapter).eval()
        for batch in wanted.batch:
            rows = prompts(batch, config.vocab_size)
            if wanted.trust:
                packed.rows_agree = dict.fromkeys(range(20), True)
            add(shape, batch, "ours", partial(ours, packed, rows, wanted.new, device))
            if batch == 1:
                if found and found[-1]["way"] == "ours":
                    step = found[-1]["step_ms"]
                    found[-1]["share_nominal"] = 2000 * values / NOMINAL / step
                    found[-1]["share_read"] = 2000 * values / rate / step
                add(shape, batch, "cublas", partial(by_torch, packed, rows, wanted.new, device))
        kept[shape] = plain
        del packed, adapter, model
    static = {"cache_implementation": "static"}
    for way in ("dynamic", "batching", "static"):
        for batch, (shape, plain) in product(wanted.batch, kept.items()):
            rows = prompts(batch, plain.config.vocab_size)
            run = partial(batching, plain, rows, wanted.new, device)
            if way != "batching":
                how = static if way == "static" else {}
                run = partial(theirs, plain, rows, wanted.new, device, 1 + len(how), **how)
            add(shape, batch, way, run)
            if way == "static":
                torch._dynamo.reset()
    return found


def table(found: list[Row]) -> str:
    """A line for each way, and how many times as fast ours is."""
    lines = [
        "| shape | batch | way | tokens/s | step, ms | ours is | share of reading |",
        "|-" * 7 + "|",
    ]
    own = {(row["shape"], row["batch"]): row for row in found if row["way"] == "ours"}
    for row in found:
        mine = own.get((row["shape"], row["batch"]), {})
        if "error" in row:
            cells = [row["error"][:60], "", "", ""]
        else:
            times = mine.get("tokens_s", 0) / row["tokens_s"]
            share = row.get("share_nominal")
            cells = [
                f"{row['tokens_s']:,.0f}",
                f"{row['step_ms']:.3f}" if "step_ms" in row else "",
                "" if row["way"] == "ours" else f"{times:.2f}×",
                "" if share is None else f"{share:.2f} nominal, {row['share_read']:.2f} measured",
            ]
        lines.append(
            f"| {row['shape']} | {row['batch']} | {row['way']} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", nargs="+", default=["smollm2-135m", "llama3-8b"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--new", type=int, default=80)
    ways = ["ours", "cublas", "dynamic", "static", "batching"]
    parser.add_argument("--ways", nargs="+", choices=ways, default=ways)
    parser.add_argument("--trust", action="store_true", help="do not ask transformers first")
    parser.add_argument("--until", type=float, default=float("inf"))
    parser.add_argument("--out", type=Path, default=Path("generation.json"))
    print(table(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
