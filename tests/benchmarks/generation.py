"""Generated answers of mixed tasks, beside transformers' `generate` on the same weights, in one run.

    python tests/benchmarks/generation.py --shape smollm2-135m llama3-8b --batch 1 16 64 --out generation

*Ours* answers rows of three tasks in one batch, adapters beside the weights, tried against transformers' own model
first; `late` is the same without early launches of kernels. transformers cannot mix tasks in one batch, so it gets
what is quickest for it: a model without adapters, as merging one task leaves it, for all rows. `dynamic` is its `generate`
as it comes, `static` with a static cache (made once) and its compiled step, `batching` its continuous batching as it
comes, `graphs` the same with CUDA graphs. Every way answers the same prompts, greedily, with as many tokens.

Every way is a process of its own, for compiling costs minutes and needs no card: all get ready at once, each by
running everything, and wait; then one after the other is timed, and ends, while the others sleep. Seconds are of a
whole call, prompts included, the median of some. A *step* is a further token of each row, the mean between the
16th and the last token of a call. At batch 1 the share of what reading the weights allows is
2 bytes × values of the layers and the head / bandwidth / step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mtl_lora_cli.adapters.inject import inject
from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.bench.random_model import random_model
from mtl_lora_cli.bench.shapes import find_config
from mtl_lora_cli.engine.plan import matrix_weights
from mtl_lora_cli.evaluation.generate import generate
from mtl_lora_cli.evaluation.requests import Request
from mtl_lora_cli.models.packed import PackedModel

TASKS = ("one", "two", "three")
SHORT = 16  # tokens before steps are timed
PROMPT = (64, 192)
NOMINAL = 4.8e12  # bytes a second that an H200 is said to read
Row = dict[str, Any]
Run = Callable[[], Row]


def prompts(batch: int, vocabulary: int) -> list[list[int]]:
    """Random prompts of different length."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(*PROMPT, (batch,), generator=generator).tolist()
    return [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], Any], device: torch.device, times: int = 3) -> float:
    """Median seconds of a few runs."""
    seconds = []
    for _ in range(times):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return median(seconds)


def made(shape: str, device: torch.device) -> Any:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return random_model(
        find_config(shape), dtype=dtype, device=device, quantization="none", attention="sdpa"
    )


def adapted(model: Any) -> Any:
    """An adapter of three tasks far from its start."""
    adapter = inject(model, configure(target_modules=("*_proj",)), TASKS)
    with torch.no_grad():
        for tensor in adapter.tensors().values():
            tensor.add_(0.01 * torch.randn_like(tensor))
    return adapter


def ours(packed: PackedModel, rows: list[list[int]], new: int, device: torch.device) -> Run:
    """Rows of three tasks in one batch."""
    requests = [Request(number % len(TASKS), row, [[]]) for number, row in enumerate(rows)]
    length = max(map(len, rows)) + new
    steps: list[float] = []

    def run() -> None:
        times: dict[int, float] = {}

        def told(answer: list[int]) -> bool:
            times.setdefault(len(answer), time.perf_counter())
            return False

        answers = generate(
            packed, requests, ends=[], new_tokens=[new] * len(rows), device=device,
            tokens_per_pass=len(rows) * length, stopped=told,
        )  # fmt: skip
        assert all(len(answer) == new for answer in answers)
        steps.append((times[new - 1] - times[SHORT]) / (new - 1 - SHORT))

    def measured() -> Row:
        packed.kept_rows = None  # of another batch
        run()
        steps.clear()
        seconds = timed(run, device, 5)
        on = packed.kept_rows is not None
        agrees = [*packed.rows_agree.values()]
        return {"seconds": seconds, "step_ms": 1000 * median(steps), "fused": on, "agrees": agrees}

    run()
    return measured


def our_runs(wanted: argparse.Namespace, device: torch.device) -> Iterator[tuple[Row, Run]]:
    for shape in wanted.shape:
        model = made(shape, device)
        values = sum(matrix_weights(model))
        packed = PackedModel(model, adapted(model)).eval()
        for batch in wanted.batch:
            rows = prompts(batch, model.config.vocab_size)
            what: Row = {"shape": shape, "batch": batch}
            if batch == 1:
                what["values"] = values
            yield what, ours(packed, rows, wanted.new, device)


class Clock:
    """A stopping criterion that notes when it is asked."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def theirs(
    model: Any, rows: list[list[int]], new: int, device: torch.device, *, static: bool
) -> Run:
    """transformers' `generate` over rows filled up on the left."""
    from transformers import StaticCache

    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor(
        [[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device
    )
    clocks: list[Clock] = []
    kept: dict[str, Any] = {}
    if static:
        kept["past_key_values"] = StaticCache(config=model.config, max_cache_len=longest + new)

    def run() -> None:
        if kept and clocks:
            kept["past_key_values"].reset()
        clocks.append(Clock())
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new,
            do_sample=False, pad_token_id=0, eos_token_id=None, stopping_criteria=[clocks[-1]],
            **kept,
        )  # fmt: skip
        assert out.shape[1] == longest + new

    def measured() -> Row:
        clocks.clear()
        if kept:
            kept["past_key_values"].reset()
        seconds = timed(run, device, 3 if static else 2)
        steps = [(one.times[-1] - one.times[SHORT - 1]) / (new - SHORT) for one in clocks]
        return {"seconds": seconds, "step_ms": 1000 * median(steps)}

    for _ in range(3 if static else 1):
        run()
    return measured


def batching(
    model: Any, rows: list[list[int]], new: int, device: torch.device, *, graphs: bool
) -> Run:
    """transformers' continuous batching, its manager running."""
    from transformers import GenerationConfig
    from transformers.generation import ContinuousBatchingConfig
    from transformers.generation.continuous_batching.utils import WorkloadHints

    longest = max(map(len, rows))
    settings: dict[str, Any] = {}
    if graphs:
        settings = {
            "use_cuda_graph": True, "q_padding_interval_size": min(64, len(rows)),
            "kv_padding_interval_size": 1024,
        }  # fmt: skip
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(
            max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=(2 + (longest + new) // 256) * len(rows) + 8, max_batch_tokens=4096,
            allow_block_sharing=False, **settings,
        ),
        workload_hints=WorkloadHints(longest, new, len(rows)),
    )  # fmt: skip
    attention = model.config._attn_implementation
    manager.warmup()
    manager.start()

    def run() -> None:
        manager.add_requests(inputs=rows, max_new_tokens=new)
        done = 0
        while done < len(rows):
            found = manager.get_result(timeout=60)
            if found is None:
                raise RuntimeError(f"no answer: {manager.background_thread_status.fatal_error}")
            if found.is_finished():
                assert len(found.generated_tokens) == new, f"{found.error}"
                done += 1

    def measured() -> Row:
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)
        return {"seconds": timed(run, device, 2), "attention": attention}

    run()
    return measured


def their_runs(wanted: argparse.Namespace, device: torch.device) -> Iterator[tuple[Row, Run]]:
    models = {shape: made(shape, device) for shape in wanted.shape}
    for way in ("dynamic", "batching", "graphs") if wanted.way == "dynamic" else ("static",):
        for shape, model in models.items():
            for batch in wanted.batch:
                rows = prompts(batch, model.config.vocab_size)
                what = {"shape": shape, "batch": batch, "way": way}
                try:
                    if way in ("dynamic", "static"):
                        run = theirs(model, rows, wanted.new, device, static=way == "static")
                    else:
                        run = batching(model, rows, wanted.new, device, graphs=way == "graphs")
                except Exception as error:  # the others go on
                    run = _failed(error)
                if way == "dynamic":
                    run = _with_plain_attention(model, run)
                yield what, run


def _with_plain_attention(model: Any, run: Run) -> Run:
    def measured() -> Row:
        model.set_attn_implementation("sdpa")
        return run()

    return measured


def _failed(error: Exception) -> Run:
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return lambda: {"error": text}


def read_rate(device: torch.device) -> float:
    """Bytes a second that summing four gigabytes reads."""
    if device.type != "cuda":
        return float("nan")
    data = torch.ones(2**30, dtype=torch.float32, device=device)
    data.sum()
    seconds = timed(lambda: data.sum(), device, 5)
    return data.numel() * 4 / seconds


def one_way(wanted: argparse.Namespace) -> None:
    """A process: get ready, wait, be timed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted.way == "late":
        from mtl_lora_cli.kernels import triton_one_token

        triton_one_token.EARLY = False
    runs = our_runs if wanted.way in ("ours", "late") else their_runs
    ready = list(runs(wanted, device))
    synchronize(device)
    place = wanted.out / name_of(wanted.way, wanted.shape, wanted.batch)
    place.with_suffix(".ready").touch()
    while not place.with_suffix(".go").exists():
        time.sleep(0.1)
    rate = read_rate(device) if wanted.way == "ours" else None
    for what, run in ready:
        row: Row = {"way": wanted.way, **what}
        try:
            row |= run()
        except Exception as error:  # the others go on
            row |= _failed(error)()
        if "seconds" in row:
            row["tokens_s"] = row["batch"] * wanted.new / row["seconds"]
        if rate is not None and "values" in row:
            row["share_nominal"] = 2000 * row["values"] / NOMINAL / row["step_ms"]
            row["share_read"], row["reads"] = 2000 * row["values"] / rate / row["step_ms"], rate
        with place.with_suffix(".jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    os._exit(0)  # threads of continuous batching would go on


def name_of(way: str, shapes: list[str], batches: list[int]) -> str:
    return "-".join([way, *(map(str, batches) if len(batches) == 1 else ()), *shapes[:1]])


def conduct(wanted: argparse.Namespace) -> list[Row]:
    """Start every way, wait until all are ready, time one after the other."""
    wanted.out.mkdir(parents=True, exist_ok=True)
    shapes, sizes = wanted.shape, wanted.batch
    arms = [(way, shapes, sizes) for way in ("ours", "late", "dynamic") if way in wanted.ways]
    if "static" in wanted.ways:
        arms += [("static", [shape], [size]) for shape in shapes for size in sizes]
    started, found = time.monotonic(), []
    processes = {}
    for way, some, few in arms:
        name = name_of(way, some, few)
        command = [sys.executable, __file__, "--way", way, "--new", str(wanted.new)]
        command += ["--out", str(wanted.out), "--shape", *some, "--batch", *map(str, few)]
        with (wanted.out / f"{name}.log").open("w", encoding="utf-8") as log:
            processes[name] = subprocess.Popen(command, stdout=log, stderr=log)
    while time.monotonic() - started < wanted.ready_in:
        waiting = [name for name, process in processes.items() if process.poll() is None
                   and not (wanted.out / f"{name}.ready").exists()]  # fmt: skip
        if not waiting and time.monotonic() - started > wanted.not_before:
            break
        time.sleep(0.2)
    print(f"ready after {time.monotonic() - started:.0f} s", flush=True)
    for name, process in processes.items():  # who is not ready would disturb the others
        if not (wanted.out / f"{name}.ready").exists():
            process.kill()
            tail = (wanted.out / f"{name}.log").read_text(encoding="utf-8")[-1500:]
            print(f"{name}: not ready\n{tail}", flush=True)
    for name, process in processes.items():
        (wanted.out / f"{name}.go").touch()
        try:
            code = process.wait(timeout=max(1.0, wanted.until - (time.monotonic() - started)))
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        rows = wanted.out / f"{name}.jsonl"
        if rows.exists():
            found += [*map(json.loads, rows.read_text(encoding="utf-8").splitlines())]
        print(f"{name}: {code} at {time.monotonic() - started:.0f} s", flush=True)
        (wanted.out / "generation.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
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
    ways = ["ours", "late", "dynamic", "static"]
    parser.add_argument("--ways", nargs="+", choices=ways, default=ways)
    parser.add_argument("--way", choices=ways, help="be the process of one way")
    parser.add_argument("--ready-in", type=float, default=600, help="seconds")
    parser.add_argument("--not-before", type=float, default=0, help="seconds, then all are timed")
    parser.add_argument("--until", type=float, default=3600, help="seconds")
    parser.add_argument("--out", type=Path, default=Path("generation"))
    wanted = parser.parse_args()
    if wanted.way:
        one_way(wanted)
    else:
        print(table(conduct(wanted)))


if __name__ == "__main__":
    main()
