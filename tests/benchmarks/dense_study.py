"""Several dense tasks from one encoder on NYU Depth V2: what streams, sharing and adapters are worth.

    python tests/benchmarks/dense_study.py --files FILES --out OUT --seconds 330

FILES holds what `pack` makes of a folder of NYU Depth V2 (`image`, `seg`, `depth` as in train.jsonl and test.jsonl) and of
the encoder's folder, small enough to be carried:

    python tests/benchmarks/dense_study.py pack NYU_FOLDER ENCODER_FOLDER FILES

Tasks: segmentation (39 classes), depth, and normals derived from depth. Arms, all with the same decoders, batches and
steps; r is the rank, and equal values are exact:

| arm | encoder | runs |
| --- | --- | --- |
| frozen | as it is | 1 |
| single full | tuned whole, one a task: the reference of Δm | 3 |
| multi full | tuned whole, one for all | 1 |
| single LoRA | r 20, each as large as ours | 3 |
| single LoRA, split | r 7, 7 and 6: together as large as ours | 3 |
| shared LoRA | r 20 | 1 |
| task only | r' 20 in the last blocks of stages | 1 |
| both | r 16 everywhere and r' 4 in the last blocks: MTLoRA with streams that merge | 1 |
| authors' form | r 16 and r' 6 in o, fc1, fc2: y_t = W x + s' B_t A_t x_t, W seeing the common stream | 1 |

Each arm's rate is chosen from three on 100 training images held out by a fixed seed, by runs of half the length on the
others. Then three seeds of each on all training images. Intervals are over resampled test images and seeds, the
same for all arms. No test image is seen before the last evaluation.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEIGHT, WIDTH, CLASSES = 168, 224, 39
CAMERA = (518.86 / 561, 519.47 / 427, 285.58 / 561, 209.74 / 427)  # fx, fy, cx, cy as shares
TASKS = ("segmentation", "depth", "normals")
WEIGHTS = {"segmentation": 1.0, "depth": 1.0, "normals": 2.0}
UP = {"segmentation": True, "depth": False, "normals": False}  # better when larger
ADAPTER_RATES, FULL_RATES, FROZEN_RATES = (
    (3e-4, 6e-4, 1.2e-3),
    (1e-5, 3e-5, 1e-4),
    (1e-3, 2e-3, 4e-3),
)
DECODER_RATE, HELD_OUT, DRAWS = 2e-3, 100, 1000
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        arm: see the module.
        tasks: that it learns.
        rate: peak learning rate of what it tunes; of decoders with `frozen`.
        steps, batch: of images.
        seed: of starts and order.
        held_out: learn without the held-out training images, and evaluate on those.
        rank: of the arm's LoRA, where it differs by task.
    """

    arm: str
    tasks: tuple[str, ...]
    rate: float
    steps: int
    batch: int = 16
    seed: int = 0
    held_out: bool = False
    rank: int = 20


# What is carried.


def pack(nyu: Path, encoder: Path, files: Path) -> None:
    """Pictures, labels and depth in two small files, the encoder rounded to bfloat16 in one."""
    from PIL import Image
    from safetensors.torch import load_file

    rows = [
        (split, json.loads(line))
        for split in ("train", "test")
        for line in (nyu / f"{split}.jsonl").read_text().splitlines()
    ]
    pictures = [(nyu / row["image"]).read_bytes() for _, row in rows]
    np.savez(
        files / "pictures.npz",
        bytes=np.frombuffer(b"".join(pictures), np.uint8),
        lengths=np.array([len(one) for one in pictures]),
        train=np.array([split == "train" for split, _ in rows]),
    )
    for name in ("seg", "depth"):
        maps = np.stack([np.asarray(Image.open(nyu / row[name])) for _, row in rows])
        if name == "depth":  # neighbours differ little
            maps = np.diff(maps.astype(np.int16), axis=2, prepend=0).astype(np.uint8)
        (files / f"{name}.xz").write_bytes(lzma.compress(maps.tobytes(), preset=6))
    weights = {name: w.bfloat16() for name, w in load_file(encoder / "model.safetensors").items()}
    raw = b"".join(weights[name].view(torch.uint8).numpy().tobytes() for name in weights)
    halves = np.frombuffer(raw, np.uint8).reshape(-1, 2)  # the upper bytes repeat themselves
    packed = lzma.compress(halves[:, 1].tobytes(), preset=6), halves[:, 0].tobytes()
    shapes = {name: list(w.shape) for name, w in weights.items()}
    config = json.loads((encoder / "config.json").read_text())
    head = {"shapes": shapes, "config": config, "upper": len(packed[0])}
    text = json.dumps(head).encode()
    (files / "encoder.bin").write_bytes(len(text).to_bytes(8, "little") + text + b"".join(packed))


def unpack_encoder(path: Path, folder: Path) -> None:
    """The transformers folder again, in float32."""
    from safetensors.torch import save_file

    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    head, rest = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    upper = np.frombuffer(lzma.decompress(rest[: head["upper"]]), np.uint8)
    lower = np.frombuffer(rest[head["upper"] :], np.uint8)
    values = torch.from_numpy(np.stack([lower, upper], axis=1).reshape(-1)).view(torch.bfloat16)
    found, start = {}, 0
    for name, shape in head["shapes"].items():
        count = math.prod(shape)
        found[name] = values[start : start + count].view(shape).float().clone()
        start += count
    folder.mkdir(parents=True, exist_ok=True)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(head["config"]))


def unpack_maps(files: Path, folder: Path, device: torch.device) -> None:
    """Arrays that every process maps into its memory; normals are derived from depth."""
    import io
    from concurrent.futures import ThreadPoolExecutor

    from PIL import Image

    stored = np.load(files / "pictures.npz")
    ends = stored["lengths"].cumsum()
    raw = stored["bytes"].tobytes()
    bounds = list(zip([0, *ends[:-1]], ends, strict=True))

    def decoded(place: tuple[int, int]) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(raw[place[0] : place[1]])).convert("RGB"))

    with ThreadPoolExecutor(8) as pool:
        pixels = np.stack(list(pool.map(decoded, bounds)))
    shape = (len(pixels), HEIGHT, WIDTH)
    seg, codes = (
        np.frombuffer(lzma.decompress((files / f"{name}.xz").read_bytes()), np.uint8).reshape(shape)
        for name in ("seg", "depth")
    )
    codes = codes.cumsum(2, dtype=np.uint8)
    depth = 0.7 * (10 / 0.7) ** (codes / 255.0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in (("pixels", pixels), ("seg", seg), ("depth", depth.astype(np.float32))):
        np.save(folder / f"{name}.npy", values)
    parts = [
        normals(torch.from_numpy(some).to(device)).half().cpu()
        for some in np.array_split(depth, 24)
    ]
    np.save(folder / "normals.npy", torch.cat(parts).numpy())
    np.save(folder / "train.npy", stored["train"])


def normals(depth: Tensor, side: int = 13, fit: float = 0.02) -> Tensor:
    """Normals of planes fitted to inverse depth in windows: [N, H, W] → [N, 3, H, W], NaN where none fits."""
    depth = depth.double()
    n, h, w = depth.shape
    fx, fy, cx, cy = CAMERA
    y = (((torch.arange(h, device=depth.device) + 0.5) / h - cy) / fy).double()
    x = (((torch.arange(w, device=depth.device) + 0.5) / w - cx) / fx).double()
    x, y, q = x.view(1, 1, w).expand(n, h, w), y.view(1, h, 1).expand(n, h, w), 1 / depth

    def mean(values: Tensor) -> Tensor:
        pooled = F.avg_pool2d(values[:, None], side, 1, side // 2, count_include_pad=False)
        return pooled[:, 0]

    mx, my, mq = mean(x), mean(y), mean(q)
    xx, yy, xy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    xq, yq, qq = mean(x * q) - mx * mq, mean(y * q) - my * mq, mean(q * q) - mq * mq
    determinant = xx * yy - xy * xy
    a, b = (xq * yy - yq * xy) / determinant, (yq * xx - xq * xy) / determinant
    c = mq - a * mx - b * my
    found = -F.normalize(torch.stack([a, b, c], 1), dim=1)
    good = (qq - a * xq - b * yq).clamp(min=0).sqrt() / mq < fit
    return torch.where(good[:, None], found, float("nan"))


# What a process has.


class Data:
    """Pictures and maps on the card.

    Args:
        folder: of `unpack_maps`.
        device: where they go.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.device = device
        read = {
            n: torch.from_numpy(np.load(folder / f"{n}.npy")).to(device)
            for n in ("pixels", "seg", "depth", "normals")
        }
        self.pixels, self.depth, self.normals = read["pixels"], read["depth"], read["normals"]
        self.seg = read["seg"].long()
        self.seg[self.seg >= CLASSES] = -100
        train = np.load(folder / "train.npy")
        self.test = np.flatnonzero(~train)
        every = np.random.default_rng(2026).permutation(np.flatnonzero(train))
        held = min(HELD_OUT, len(every) // 4)
        self.held, self.kept, self.train = every[:held], every[held:], np.sort(every)
        mean, std = (torch.tensor(one, device=device).view(1, 3, 1, 1) for one in (MEAN, STD))
        self.mean, self.std = mean, std

    def batch(
        self, numbers: np.ndarray, tasks: Sequence[str], flips: np.ndarray | None = None
    ) -> Any:
        """Some pictures and their maps; `flips` says which are mirrored."""
        from mtl_lora_cli.data.map_batch import MapBatch

        at = torch.from_numpy(numbers).to(self.device)
        pixels = (self.pixels[at].permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        maps = {
            "segmentation": self.seg[at],
            "depth": self.depth[at],
            "normals": self.normals[at].float(),
        }
        if flips is not None:
            turned = torch.from_numpy(flips).to(self.device)
            pixels = torch.where(turned.view(-1, 1, 1, 1), pixels.flip(3), pixels)
            for name, values in maps.items():
                other = values.flip(-1)
                if name == "normals":
                    other = other * torch.tensor([-1.0, 1, 1], device=self.device).view(1, 3, 1, 1)
                mask = turned.view(-1, *[1] * (values.ndim - 1))
                maps[name] = torch.where(mask, other, values)
        count = len(numbers)
        return MapBatch(
            pixels,
            {number: maps[task] for number, task in enumerate(tasks)},
            torch.ones(count, len(tasks), dtype=torch.bool),
            torch.arange(len(tasks)).repeat(count),
            torch.arange(len(tasks)),
        )


class AuthorsFork(nn.Module):
    """The last block of a stage as MTLoRA's own code has it: y_t = W x + s' B_t A_t x_t, on a task's own residual.

    Args:
        fork: ours, whose place it takes.
    """

    def __init__(self, fork: Any) -> None:
        super().__init__()
        self.block, self._routing, self.tasks, self.streams = fork.block, fork._routing, (), None
        named = dict(self.block.named_modules())
        self._o = next(m for n, m in named.items() if n.endswith(("o_proj", "output.dense")))
        self._mlp = self.block.mlp
        self._act = getattr(self._mlp, "activation_fn", None) or self._mlp.activation

    def forward(self, x: Tensor, *arguments: Any, **named: Any) -> Any:
        block, seen = self.block, {}

        def see(name: str) -> Callable[..., None]:
            return lambda module, inputs: seen.__setitem__(name, inputs[0])

        places = {"o": self._o, "norm": block.norm2, "fc1": self._mlp.fc1, "fc2": self._mlp.fc2}
        hooks = [m.register_forward_pre_hook(see(n)) for n, m in places.items()]
        shared = torch.full((len(x),), self._routing.shared)
        with self._routing.assign(shared, windows=True):
            found = block(x, *arguments, **named)
        for hook in hooks:
            hook.remove()
        common = {name: frozen(places[name], seen[name]) for name in ("o", "fc1", "fc2")}
        streams = []
        for task in self.tasks:
            own = x + block.layer_scale1(common["o"] + part(places["o"], seen["o"], task))
            inner = common["fc1"] + part(places["fc1"], block.norm2(own), task)
            outer = common["fc2"] + part(places["fc2"], self._act(inner), task)
            streams.append(own + block.layer_scale2(outer))
        self.streams = torch.cat(streams)
        return found

    def taken(self) -> Tensor:
        streams, self.streams = self.streams, None
        assert streams is not None
        return streams


def frozen(layer: Any, x: Tensor) -> Tensor:
    """W x + b without any adapter."""
    return F.linear(x, layer.base_layer.weight, layer.base_layer.bias)


def part(layer: Any, x: Tensor, task: int) -> Tensor:
    """s' B_t A_t x."""
    down, up = layer.task_lora_A[task].to(x.dtype), layer.task_lora_B[task].to(x.dtype)
    return layer.config.scale(layer.config.task_rank) * F.linear(F.linear(x, down), up)


def build(job: Job, encoder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The host of an arm; what learns is what has a gradient."""
    from mtl_lora_cli.adapters.inject import inject
    from mtl_lora_cli.adapters.methods import configure
    from mtl_lora_cli.dense.backbones import family_of, load_backbone
    from mtl_lora_cli.dense.host import DenseHost
    from mtl_lora_cli.models.base import find_base_model
    from mtl_lora_cli.tasks.maps import MapSpec

    base = find_base_model(str(encoder))
    trunk = load_backbone(base, size=(HEIGHT, WIDTH), dtype=dtype, device=device)
    stages = family_of(base, trunk.config).stages(trunk.config)
    linear = {
        name.rpartition(".")[2] for name, m in trunk.named_modules() if isinstance(m, nn.Linear)
    }
    settings: dict[str, Any] = {"target_modules": sorted(linear)}
    if job.arm in ("both", "task only", "authors' form"):
        ranks = {"both": (16, 4), "task only": (16, 20), "authors' form": (16, 6)}[job.arm]
        own = (
            None
            if job.arm != "authors' form"
            else sorted(linear & {"o_proj", "dense", "fc1", "fc2"})
        )
        settings |= {
            "method": "mtlora",
            "rank": ranks[0],
            "task_rank": ranks[1],
            "streams": "stages",
        }
        settings |= {
            "alpha": 2.0 * (ranks[1] if job.arm == "task only" else ranks[0]),
            "task_modules": own,
        }
    else:
        full = job.arm.endswith("full")
        settings |= {"method": "lora", "rank": job.rank, "alpha": 2.0 * job.rank}
        settings |= {"whole_modules": ["*"] if full else []}
    config = configure(**settings)
    torch.manual_seed(job.seed)
    own_in = stages.blocks if config.streams else None
    adapter = inject(trunk, config, job.tasks, within=("embeddings", "encoder"), own_in=own_in)
    specs = {
        "segmentation": MapSpec("segmentation", CLASSES, tuple(map(str, range(CLASSES)))),
        "depth": MapSpec("depth", 1, low=0.7, high=10.0, scale="log"),
        "normals": MapSpec("normals", 3),
    }
    host = DenseHost(
        trunk, family_of(base, trunk.config), adapter, [specs[t] for t in job.tasks], dtype
    )
    if job.arm == "authors' form":
        for number, path in enumerate(stages.blocks):
            parent, _, name = path.rpartition(".")
            other = AuthorsFork(host.taps[number])
            setattr(trunk.get_submodule(parent), name, other)
            host.taps[number] = other
    for name, tensor in adapter.tensors().items():
        role = name.rpartition(".")[2]
        if job.arm == "frozen" and not name.startswith("decoder:"):
            tensor.requires_grad_(False)
        if job.arm == "task only" and role in ("lora_A", "lora_B"):
            tensor.requires_grad_(False)
        if name == "whole:embeddings.mask_token":  # nothing reads it
            tensor.requires_grad_(False)
    return host


def learn(job: Job, data: Data, encoder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Train an arm and evaluate it: statistics of each picture, and how many values learned."""
    host = build(job, encoder, data.device, dtype)
    trained = host.adapter.trained()
    decoders = [t for name, t in trained.items() if name.startswith("decoder:")]
    others = [t for name, t in trained.items() if not name.startswith("decoder:")]
    rates = [job.rate if job.arm == "frozen" else DECODER_RATE, job.rate]
    groups = [
        {"params": p, "lr": r, "peak": r}
        for p, r in zip((decoders, others), rates, strict=True)
        if p
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, fused=data.device.type == "cuda")
    weights = torch.tensor([WEIGHTS[task] for task in job.tasks], device=data.device)
    numbers = data.kept if job.held_out else data.train
    generator = np.random.default_rng([job.seed, 5])
    order = np.zeros(0, dtype=np.int64)
    host.train(True)
    for step in range(job.steps):
        if len(order) < job.batch:
            order = np.concatenate([order, generator.permutation(numbers)])
        chosen, order = order[: job.batch], order[job.batch :]
        batch = data.batch(chosen, job.tasks, generator.random(len(chosen)) < 0.5)
        losses = host.losses(batch)
        (losses * weights[batch.owners.to(data.device)]).mean().backward()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor(step, job.steps)
        torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    host.train(False)
    stats = evaluate(host, job, data)
    values = {
        "encoder": sum(t.numel() for t in others),
        "decoders": sum(t.numel() for t in decoders),
    }
    return {"job": asdict(job), "values": values, "stats": stats}


def factor(step: int, steps: int) -> float:
    """Of the peak rate: up for a twentieth of all steps, then down as a cosine."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@torch.no_grad()
def evaluate(host: Any, job: Job, data: Data) -> dict[str, np.ndarray]:
    """Task → sums of each picture: of classes those met, answered and there [N, 3, classes]; of depth squares
    and pixels; of normals angles and pixels [N, 2]."""
    numbers = data.held if job.held_out else data.test
    found: dict[str, list[np.ndarray]] = {task: [] for task in job.tasks}
    for start in range(0, len(numbers), 32):
        batch = data.batch(numbers[start : start + 32], job.tasks)
        answers = host.answers(batch, list(range(len(job.tasks))))
        for number, task in enumerate(job.tasks):
            found[task].append(sums(task, answers[number], batch.targets[number]).cpu().numpy())
    return {task: np.concatenate(parts) for task, parts in found.items()}


def sums(task: str, answer: Tensor, target: Tensor) -> Tensor:
    """See `evaluate`."""
    if task == "segmentation":
        known = target >= 0
        best = answer.argmax(1)
        rows = torch.arange(len(target), device=target.device).view(-1, 1, 1) * CLASSES
        kinds = ((best, known & (best == target)), (best, known), (target, known))
        counts = [
            torch.bincount((rows + values)[mask], minlength=len(target) * CLASSES).view(-1, CLASSES)
            for values, mask in kinds
        ]
        return torch.stack(counts, 1).float()
    if task == "depth":
        square = (answer[:, 0] - target).square().flatten(1)
        return torch.stack([square.sum(1), torch.full_like(square[:, 0], square.shape[1])], 1)
    known = ~target.isnan().any(1)
    cosine = (answer * torch.where(known[:, None], target, 0.0)).sum(1).clamp(-1, 1)
    angle = torch.where(known, torch.rad2deg(torch.acos(cosine)), 0.0)
    return torch.stack([angle.flatten(1).sum(1), known.flatten(1).float().sum(1)], 1)


# What they say.


def metric(task: str, stats: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """mIoU in percent, RMSE over all pixels in metres, or the mean angle over all pixels in degrees.

    Args:
        task: which.
        stats: of `evaluate`, [N, …].
        weights: [draws, N], how often each picture counts.
    """
    total = (weights @ stats.reshape(len(stats), -1).astype(np.float64)).reshape(
        len(weights), *stats.shape[1:]
    )
    if task == "segmentation":
        met, answered, there = total[:, 0], total[:, 1], total[:, 2]
        with np.errstate(divide="ignore", invalid="ignore"):
            iou = np.where(there > 0, met / (answered + there - met), np.nan)
        return 100 * np.nanmean(iou, axis=1)
    mean = total[:, 0] / total[:, 1]
    return np.sqrt(mean) if task == "depth" else mean


def better(task: str, value: Any, reference: Any) -> Any:
    """Relative improvement in percent, as Δm sums it."""
    return (1 if UP[task] else -1) * 100 * (value - reference) / reference


class Arms:
    """Runs and rates of the arms."""

    MULTI = ("frozen", "multi full", "shared LoRA", "task only", "both", "authors' form")
    SINGLE = ("single full", "single LoRA", "single LoRA, split")
    SPLIT = {"segmentation": 7, "depth": 7, "normals": 6}

    def __init__(self, left_out: Sequence[str] = ()) -> None:
        self.tasks, self._left_out = TASKS, left_out

    def jobs(self, steps: int, batch: int) -> list[Job]:
        """One of each kind, rates to be filled in."""
        found = [Job(arm, self.tasks, 0.0, steps, batch) for arm in self.MULTI]
        for arm in self.SINGLE:
            for task in self.tasks:
                rank = self.SPLIT[task] if "split" in arm else 20
                found.append(Job(arm, (task,), 0.0, steps, batch, rank=rank))
        return [job for job in found if job.arm not in self._left_out]

    @staticmethod
    def rates(arm: str) -> tuple[float, ...]:
        if arm == "frozen":  # there only decoders learn
            return FROZEN_RATES
        return FULL_RATES if arm.endswith("full") else ADAPTER_RATES


_DATA: Data | None = None


def begin(folder: str, device: str) -> None:
    """Of a process: read everything once."""
    global _DATA
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    _DATA = Data(Path(folder), torch.device(device))


def work(request: tuple[Job, str, str]) -> dict[str, Any]:
    """A run in a process of the pool; a failure is an answer, too."""
    job, encoder, dtype = request
    assert _DATA is not None
    try:
        return learn(job, _DATA, Path(encoder), getattr(torch, dtype))
    except Exception:
        return {"job": asdict(job), "error": traceback.format_exc()[-1500:]}


def score(answer: dict[str, Any], references: dict[str, float]) -> float:
    """Mean relative improvement over the references on the held-out training images."""
    found = []
    for task, stats in answer["stats"].items():
        value = metric(task, stats, np.ones((1, len(stats))))[0]
        found.append(better(task, value, references[task]))
    return float(np.mean(found))


def chosen_rates(answers: Sequence[dict[str, Any]]) -> dict[tuple[str, tuple[str, ...]], float]:
    """Arm and tasks → the best of its rates; references cancel out of the choice."""
    frozen_run = next(a for a in answers if a["job"]["arm"] == "frozen")
    references = {t: metric(t, s, np.ones((1, len(s))))[0] for t, s in frozen_run["stats"].items()}
    best: dict[tuple[str, tuple[str, ...]], tuple[float, float]] = {}
    for answer in answers:
        key = (answer["job"]["arm"], tuple(answer["job"]["tasks"]))
        value = score(answer, references)
        if key not in best or value > best[key][0]:
            best[key] = (value, answer["job"]["rate"])
    return {key: rate for key, (_, rate) in best.items()}


def summary(answers: Sequence[dict[str, Any]], seeds: int) -> list[dict[str, Any]]:
    """Each arm's metrics, and Δm against single-task full tuning, with 95 % intervals over images and seeds."""
    generator = np.random.default_rng(7)
    count = len(next(iter(answers[0]["stats"].values())))
    draws = generator.multinomial(count, np.ones(count) / count, size=DRAWS).astype(np.float64)
    weights = np.concatenate([np.ones((1, count)), draws])
    drawn = np.concatenate([np.arange(seeds)[None], generator.integers(0, seeds, (DRAWS, seeds))])
    values: dict[tuple[str, str], np.ndarray] = {}
    sizes: dict[str, dict[int, list[dict[str, int]]]] = {}
    for arm in {a["job"]["arm"] for a in answers}:
        for task in TASKS:
            of = [a for a in answers if a["job"]["arm"] == arm and task in a["stats"]]
            of.sort(key=lambda a: a["job"]["seed"])
            if len(of) == seeds:
                table = np.stack([metric(task, a["stats"][task], weights) for a in of], 1)
                values[arm, task] = np.take_along_axis(table, drawn, 1).mean(1)
        sizes[arm] = {}
        for a in answers:
            if a["job"]["arm"] == arm and a["job"]["seed"] == 0:
                sizes[arm].setdefault(0, []).append(a["values"])
    found = []
    for arm in (*Arms.MULTI, *Arms.SINGLE):
        if (arm, TASKS[0]) not in values:
            continue
        row: dict[str, Any] = {"arm": arm}
        row["encoder_values"] = sum(one["encoder"] for one in sizes[arm][0])
        row["decoder_values"] = sum(one["decoders"] for one in sizes[arm][0])
        for task in TASKS:
            if (arm, task) in values:
                row[task] = interval(values[arm, task])
        for name, other in (
            ("delta_m", "single full"),
            ("over_frozen", "frozen"),
            ("over_shared", "shared LoRA"),
        ):
            if all((one, task) in values for one in (arm, other) for task in TASKS):
                own = [better(task, values[arm, task], values[other, task]) for task in TASKS]
                row[name] = interval(np.mean(own, axis=0))
                row[f"{name}_by_task"] = {t: interval(o) for t, o in zip(TASKS, own, strict=True)}
        if ("frozen", TASKS[0]) in values:
            row["minus_frozen"] = {
                t: interval(values[arm, t] - values["frozen", t])
                for t in TASKS
                if (arm, t) in values
            }
        found.append(row)
    return found


def interval(values: np.ndarray) -> list[float]:
    """The value itself, which stands first, and the bounds of 95 % of the draws."""
    low, high = np.percentile(values[1:], (2.5, 97.5))
    return [float(values[0]), float(low), float(high)]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """For a person."""

    def shown(cell: list[float] | None, digits: int) -> str:
        return (
            "–"
            if cell is None
            else f"{cell[0]:.{digits}f} ({cell[1]:.{digits}f} – {cell[2]:.{digits}f})"
        )

    lines = [
        "| arm | encoder values, M | mIoU | RMSE, m | angle, ° | Δm, % | over frozen, % |",
        "|" + " --- |" * 7,
    ]
    for row in rows:
        cells = [
            row["arm"],
            f"{row['encoder_values'] / 1e6:.2f}",
            shown(row.get("segmentation"), 2),
            shown(row.get("depth"), 4),
            shown(row.get("normals"), 2),
            shown(row.get("delta_m"), 2),
            shown(row.get("over_frozen"), 2),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["pack"]:
        pack(*map(Path, sys.argv[2:5]))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=330)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--steps", type=int, help="of the last runs; by default what the seconds allow"
    )
    parser.add_argument("--without", nargs="*", default=[], help="arms that are left out")
    parser.add_argument("--encoder", type=Path, help="a folder, instead of the packed one")
    parser.add_argument("--maps", type=Path, help="a folder of arrays, instead of the packed ones")
    arguments = parser.parse_args()
    study(arguments)


def study(a: argparse.Namespace) -> None:
    began = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device == "cuda" else "float32"
    scratch = Path(os.environ.get("TMPDIR", "/tmp")) / "dense-study"
    encoder, maps = a.encoder or scratch / "encoder", a.maps or scratch / "maps"
    if a.encoder is None:
        unpack_encoder(a.files / "encoder.bin", encoder)
    if a.maps is None:
        unpack_maps(a.files, maps, torch.device(device))
    a.out.mkdir(parents=True, exist_ok=True)
    print(f"unpacked after {time.monotonic() - began:.0f} s", flush=True)
    context = multiprocessing.get_context("spawn")
    arms = Arms(a.without)
    with context.Pool(a.workers, begin, (str(maps), device)) as pool:

        def run(jobs: Sequence[Job]) -> list[dict[str, Any]]:
            requests = [(job, str(encoder), dtype) for job in jobs]
            found = []
            for answer in pool.imap_unordered(work, requests):
                if "error" in answer:
                    print("FAILED", answer["job"], answer["error"], flush=True)
                else:
                    found.append(answer)
            return found

        def multi(steps: int) -> Job:
            return Job("both", TASKS, 1e-3, steps, a.batch, held_out=True)

        run([multi(2)] * a.workers)  # imports, and kernels' first calls
        steps = a.steps
        if steps is None:
            start = time.monotonic()
            run([multi(12)] * (2 * a.workers))
            rate = 24 * a.workers / (time.monotonic() - start)  # steps a second, of all processes
            left = a.seconds - (time.monotonic() - began)
            # Of half the length 3 rates each, 3 seeds of the whole: in steps of all tasks, a single one being half.
            units = 0.5 * 3 * (6 + 0.5 * 6) + a.seeds * (6 + 0.5 * 9)
            asked = 20 * a.seeds * (6 + 0.5 * 9) + 4 * 3 * (6 + 0.5 * 6)  # evaluations, in steps
            steps = max(20, int((0.8 * left * rate - asked) / units))
            print(f"{rate:.1f} steps a second; {left:.0f} s left: {steps} steps a run", flush=True)
        half = max(1, steps // 2)
        trials = [
            replace(job, rate=rate, held_out=True)
            for job in arms.jobs(half, a.batch)
            if "split" not in job.arm
            for rate in arms.rates(job.arm)
        ]
        rates = chosen_rates(run(sorted(trials, key=lambda job: len(job.tasks) == 1)))
        rates |= {
            ("single LoRA, split", key[1]): r for key, r in rates.items() if key[0] == "single LoRA"
        }
        print(
            "rates",
            {f"{arm} {'+'.join(tasks)}": r for (arm, tasks), r in rates.items()},
            flush=True,
        )
        print(f"rates after {time.monotonic() - began:.0f} s", flush=True)
        jobs = [
            replace(job, rate=rates[job.arm, job.tasks], seed=seed)
            for seed in range(a.seeds)
            for job in arms.jobs(steps, a.batch)
        ]
        answers = run(jobs)
    rows = summary(answers, a.seeds)
    settings = {
        "steps": steps,
        "batch": a.batch,
        "seeds": a.seeds,
        "seconds": time.monotonic() - began,
    }
    settings["rates"] = {f"{arm}: {'+'.join(tasks)}": r for (arm, tasks), r in rates.items()}
    (a.out / "dense_study.json").write_text(
        json.dumps({"settings": settings, "arms": rows}, indent=1)
    )
    (a.out / "dense_study.md").write_text(table(rows) + "\n")
    print(table(rows))
    print(
        f"done after {time.monotonic() - began:.0f} s, {steps} steps of {a.batch} a run", flush=True
    )


if __name__ == "__main__":
    main()
