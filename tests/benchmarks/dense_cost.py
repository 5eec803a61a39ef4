"""What streams cost: a Swin-T of random weights at 448 x 448, 32 pictures, four tasks, bfloat16, AdamW.

    python tests/benchmarks/dense_cost.py --out OUT

Every arm has the same decoders. Steps are timed one by one on the card's own clock, and the median is told.
`plain LoRA` is one stream with four decoders; `single` is the sum of four steps of one task each. The memory of each
step stands beside what `memory/maps.py` says of it beforehand.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

SIZE, PICTURES, CLASSES = 448, 32, 40
OBJECTIVES = ("segmentation", "depth", "normals", "edges")


def configuration(tiny: bool) -> Any:
    from transformers import SwinConfig

    if tiny:
        return SwinConfig(
            image_size=64, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4
        )
    return SwinConfig(
        image_size=224, embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=7
    )


def host_of(
    folder: Path, names: tuple[str, ...], size: int, *, streams: bool, device: torch.device
) -> Any:
    from mtl_lora_cli.adapters.inject import inject
    from mtl_lora_cli.adapters.methods import configure
    from mtl_lora_cli.dense.backbones import backbone_skeleton, family_of, load_backbone
    from mtl_lora_cli.dense.host import DenseHost
    from mtl_lora_cli.models.base import find_base_model

    base = find_base_model(str(folder))
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if device.type == "meta":
        trunk = backbone_skeleton(base, (size, size)).to(dtype).requires_grad_(False).eval()
    else:
        trunk = load_backbone(base, size=(size, size), dtype=dtype, device=device)
    known = {
        name.rpartition(".")[2]
        for name, m in trunk.named_modules()
        if isinstance(m, torch.nn.Linear)
    }
    targets = sorted(known - {"reduction"})
    stages = family_of(base, trunk.config).stages(trunk.config)
    common = {"rank": 64, "alpha": 256.0, "target_modules": targets}
    common["whole_modules"] = ["*norm*", "*downsample.reduction", "*patch_embeddings*"]
    own = (
        {"method": "mtlora", "task_rank": 4, "streams": "stages"} if streams else {"method": "lora"}
    )
    config = configure(**common, **own)
    adapter = inject(
        trunk,
        config,
        names,
        within=("embeddings", "encoder"),
        own_in=stages.blocks if streams else None,
    )
    return DenseHost(trunk, family_of(base, trunk.config), adapter, specs_of(names), dtype).train(
        True
    )


def specs_of(names: tuple[str, ...]) -> list[Any]:
    from mtl_lora_cli.tasks.maps import MapSpec

    specs = {
        "segmentation": MapSpec("segmentation", CLASSES, tuple(map(str, range(CLASSES)))),
        "depth": MapSpec("depth", 1, low=0.7, high=10.0, scale="log"),
        "normals": MapSpec("normals", 3),
        "edges": MapSpec("edges", 1),
    }
    return [specs[name] for name in names]


def estimated(
    folder: Path, names: tuple[str, ...], streams: bool, size: int, pictures: int
) -> float:
    """GiB of a step's tensors, as they are said before anything is learned."""
    from mtl_lora_cli.memory import maps

    host = host_of(folder, names, size, streams=streams, device=torch.device("meta"))
    fixed, passing = (
        maps._fixed(host, "none"),
        maps._passing(host, specs_of(names), (size, size), pictures),
    )
    return maps.MapsMemory(fixed, passing).peak / 2**30


def batch_of(names: tuple[str, ...], pictures: int, size: int, device: torch.device) -> Any:
    from mtl_lora_cli.data.map_batch import MapBatch

    torch.manual_seed(0)
    shape = (pictures, size, size)
    normals = torch.nn.functional.normalize(
        torch.randn(pictures, 3, size, size, device=device), dim=1
    )
    maps = {
        "segmentation": torch.randint(0, CLASSES, shape, device=device),
        "depth": torch.rand(shape, device=device) * 9 + 0.8,
        "normals": normals,
        "edges": (torch.rand(shape, device=device) > 0.9).float(),
    }
    return MapBatch(
        torch.randn(pictures, 3, size, size, device=device),
        {number: maps[name] for number, name in enumerate(names)},
        torch.ones(pictures, len(names), dtype=torch.bool),
        torch.arange(len(names)).repeat(pictures),
        torch.arange(len(names)),
    )


class Clock:
    """Seconds of a function, by the card's own clock where there is one."""

    def __init__(self, device: torch.device) -> None:
        self.card = device.type == "cuda"

    def __call__(self, run: Any) -> float:
        if not self.card:
            start = time.monotonic()
            run()
            return time.monotonic() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000


class Stepping:
    """A host with its optimiser and a batch."""

    def __init__(self, host: Any, batch: Any) -> None:
        self.host, self.batch = host, batch
        self.trained = list(host.adapter.trained().values())
        self.optimizer = torch.optim.AdamW(self.trained, 1e-4, fused=self.trained[0].is_cuda)

    def step(self) -> None:
        self.host.losses(self.batch).mean().backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def answer(self) -> None:
        self.host.answers(self.batch, self.batch.task_ids.tolist())

    @torch.no_grad()
    def forked(self) -> None:
        """The trunk and its forks alone."""
        self.host._features(self.batch.pixels, self.batch.task_ids.tolist())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--arms", nargs="*", help="some of them alone")
    parser.add_argument(
        "--profile", action="store_true", help="where a step of streams goes, and nothing else"
    )
    arguments = parser.parse_args()
    from transformers import AutoModel

    size, pictures = (64, 2) if arguments.tiny else (SIZE, PICTURES)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = arguments.out / "swin"
    torch.manual_seed(0)
    AutoModel.from_config(configuration(arguments.tiny)).save_pretrained(folder)
    if arguments.profile:
        profiled(folder, size, pictures, device)
        return
    clock, found = Clock(device), {}
    arms = {"plain LoRA": (OBJECTIVES, False), "streams": (OBJECTIVES, True)}
    arms |= {f"single {name}": ((name,), False) for name in OBJECTIVES}
    for name, (tasks, streams) in arms.items():
        if arguments.arms and name not in arguments.arms:
            continue
        try:
            found[name] = measured(
                folder, tasks, streams, size, pictures, device, clock, arguments.steps
            )
        except torch.OutOfMemoryError as error:
            found[name] = {"error": str(error)[:200]}
        print(name, found[name], flush=True)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    print(told(found))
    (arguments.out / "dense_cost.json").write_text(json.dumps(found, indent=1))


def measured(
    folder: Path, tasks: tuple[str, ...], streams: bool, size: int, pictures: int,
    device: torch.device, clock: Clock, steps: int,
) -> dict[str, float]:  # fmt: skip
    """Seconds of a step, of answers to all pictures, and of the trunk alone; the most memory of a step."""
    gc.collect()  # what a host is made of points at itself
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    stepping = Stepping(
        host_of(folder, tasks, size, streams=streams, device=device),
        batch_of(tasks, pictures, size, device),
    )
    for _ in range(2):
        stepping.step()
    found = {"step": statistics.median(clock(stepping.step) for _ in range(steps))}
    if device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    found["said_gib"] = estimated(folder, tasks, streams, size, pictures)
    stepping.host.train(False)
    stepping.answer()
    found["answers"] = statistics.median(clock(stepping.answer) for _ in range(steps))
    found["trunk"] = statistics.median(clock(stepping.forked) for _ in range(steps))
    return found


def profiled(folder: Path, size: int, pictures: int, device: torch.device) -> None:
    """The kernels of one step that take longest, and how long the CPU took to ask for it."""
    from torch.profiler import ProfilerActivity, profile

    host = host_of(folder, OBJECTIVES, size, streams=True, device=device)
    stepping = Stepping(host, batch_of(OBJECTIVES, pictures, size, device))
    for _ in range(2):
        stepping.step()
    start = time.monotonic()
    stepping.step()
    asked = time.monotonic() - start
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(
        f"asked for in {asked * 1e3:.0f} ms, done after {(time.monotonic() - start) * 1e3:.0f} ms"
    )
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=kinds) as profiler:
        stepping.step()
    by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    rows = sorted(
        profiler.key_averages(), key=lambda one: -getattr(one, by.replace("cuda", "device"))
    )
    for one in rows[:28]:
        took = getattr(one, by.replace("cuda", "device"))
        print(f"{took / 1e3:9.2f} ms {one.count:6d} {one.key[:100]}")


def told(found: dict[str, dict[str, float]]) -> str:
    """The figures that the issue asks for."""
    lines = []
    if all("step" in one for one in found.values()) and len(found) > len(OBJECTIVES):
        streams, plain = found["streams"]["step"], found["plain LoRA"]["step"]
        lines.append(
            f"streams / plain LoRA step: {streams / plain:.2f} ({streams * 1e3:.1f} / {plain * 1e3:.1f} ms)"
        )
        single = [found[f"single {name}"].get("step", float("nan")) for name in OBJECTIVES]
        lines.append(f"four single-task steps / streams: {sum(single) / streams:.2f}")
        lines.append(
            f"all answers / trunk and forks: {found['streams']['answers'] / found['streams']['trunk']:.2f}"
        )
    for name, one in found.items():
        if "peak_gib" in one:
            share = one["said_gib"] / one["peak_gib"] - 1
            lines.append(f"memory of {name}: {one['peak_gib']:.2f} GiB, said {share:+.1%}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
