"""Time and memory of writing a merged model, beside a plain copy of the same files.

    python tests/benchmarks/merge.py [--layers 20] [--shards 4] [--repeat 5] [--folder .]

The base model has random bfloat16 weights (1.2 GB by default) and an update of rank 8 on all seven
projections of every layer, so that every file changes. Merge and copy take turns on the same disk, and
each ends with everything synced; what is in the page cache, the base model after the first turn, stays
there for both. `--cold` drops it before each (as root). The peak is that of a process that does nothing
but write, above what it had after loading the libraries.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from large import existing
from safetensors.torch import save_file

from mtl_lora_cli.export.merge import Update, plan_merge, write_merged
from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.runs.atomic import new_folder

WIDTH, INNER, VOCABULARY, RANK = 1536, 4096, 32000, 8
SHAPES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH // 4, WIDTH),
    "self_attn.v_proj": (WIDTH // 4, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}


def make_base(folder: Path, layers: int, shards: int) -> BaseModel:
    """Random weights under LLaMA's names, layers one after the other, in files of about one size."""
    shapes = {f"model.layers.{n}.{k}.weight": v for n in range(layers) for k, v in SHAPES.items()}
    shapes["model.embed_tokens.weight"] = (VOCABULARY, WIDTH)
    names = list(shapes)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        tensors = {name: torch.randn(shapes[name]).mul_(0.02).bfloat16() for name in part}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    config = {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "vocab_size": VOCABULARY,
        "num_hidden_layers": layers,
        "num_attention_heads": 12,
        "num_key_value_heads": 3,
    }
    (folder / "config.json").write_text(json.dumps(config))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return BaseModel("random", folder, None, "", "", None)


def make_updates(layers: int) -> dict[str, Update]:
    return {
        f"model.layers.{number}.{name}.weight": (
            torch.randn(RANK, width) / width**0.5,
            torch.randn(out, RANK) * 0.02,
            2.0,
        )
        for number in range(layers)
        for name, (out, width) in SHAPES.items()
    }


def merge(base: BaseModel, updates: dict[str, Update], out: Path) -> None:
    """As `mtl-lora merge --no-check` writes it: synced, and renamed into its place."""
    with new_folder(out) as folder:
        write_merged(plan_merge(base, updates), folder)


def copy(base: BaseModel, out: Path) -> None:
    """`cp` and `sync` of the same files."""
    subprocess.run(["cp", "-r", base.folder, out], check=True)
    subprocess.run(["sync", *out.iterdir(), out], check=True)


def in_process(what: str, base: BaseModel, layers: int, out: Path, answer: Connection) -> None:
    """Seconds of writing, and the MiB that it adds to what this process has after its imports."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here
    before = _peak()
    updates = make_updates(layers)
    started = time.perf_counter()
    if what == "merge":
        merge(base, updates, out)
    else:
        copy(base, out)
    answer.send((time.perf_counter() - started, _peak() - before))


def _peak() -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=23)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument(
        "--cold", action="store_true", help="drop the page cache before each (root)"
    )
    parser.add_argument(
        "--folder", type=existing, default=Path(), help="on the disk to be measured"
    )
    arguments = parser.parse_args()
    context = multiprocessing.get_context("forkserver")
    preload = ["mtl_lora_cli.export.write", "transformers.models.llama.modeling_llama"]
    context.set_forkserver_preload(preload)
    seconds: dict[str, list[float]] = {"copy": [], "merge": []}
    peaks = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        (folder / "base").mkdir()
        base = make_base(folder / "base", arguments.layers, arguments.shards)
        subprocess.run(["sync", *base.folder.iterdir()], check=True)
        sizes = [path.stat().st_size / 2**20 for path in base.folder.glob("*.safetensors")]
        for turn in range(arguments.repeat + 1):
            for what in seconds:
                if arguments.cold:
                    os.sync()
                    Path("/proc/sys/vm/drop_caches").write_text("3")
                here, there = context.Pipe()
                call = (what, base, arguments.layers, folder / what, there)
                process = context.Process(target=in_process, args=call)
                process.start()
                took, peak = here.recv()
                process.join()
                shutil.rmtree(folder / what)
                if turn:  # the first one warms up
                    seconds[what].append(took)
                    peaks += [peak] if what == "merge" else []
    ratios = [m / c for m, c in zip(seconds["merge"], seconds["copy"], strict=True)]
    print(f"base: {sum(sizes):,.0f} MiB in {len(sizes)} files, the largest {max(sizes):,.0f} MiB")
    for what, values in {**seconds, "ratio": ratios}.items():
        spread = f"{min(values):.2f} – {max(values):.2f}"
        print(f"{what}: median {statistics.median(values):.2f}, {spread}, of {len(values)}")
    allowed = 2 * max(sizes) + 300
    print(f"peak of merging: {max(peaks):,.0f} MiB (two files and 300 MiB would be {allowed:,.0f})")


if __name__ == "__main__":
    main()
