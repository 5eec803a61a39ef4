"""A small Swin that has learned from a DINOv2: for machines that no pretrained hierarchical backbone reaches.

    python tests/benchmarks/distil_backbone.py --teacher dinov2-small --pictures FOLDER [ROWS.jsonl …] --out swin-distilled

The student's third and fourth stage, each by a linear layer that is thrown away afterwards, say what the teacher's patches
say in the middle and at the end: ℓ = Σ (1 − cos), after the teacher's means over pictures are taken off, on its grid of
patches. Pictures are the JPEG and PNG files below a folder, those that rows of JSON name under `image`, or the training
pictures of what `dense_data.py` packed (pictures.npz). Leave out the pictures that a study tests on. Each is seen as a
random crop, half of them mirrored.

What comes out is an ordinary folder of transformers' `SwinModel` of about 7 million values, with blocks 2, 2, 6, 2 and
windows of 7 as a Swin-T has them. It has seen some thousand pictures and is no ImageNet model. The study beside this
file (`dense_study.py --encoder`) says what it is worth.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

SUFFIXES = (".jpg", ".jpeg", ".png")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STAGES = {2: 2, 3: 3}  # the student's stage → the teacher's quarter


def student_configuration() -> Any:
    from transformers import SwinConfig

    return SwinConfig(
        image_size=224,
        embed_dim=48,
        depths=[2, 2, 6, 2],
        num_heads=[2, 4, 8, 16],
        window_size=7,
        drop_path_rate=0.0,
    )


def pictures_of(sources: list[Path], side: int) -> Tensor:
    """uint8 [N, 3, side, side] of all sources, in one order on every machine; whole pictures squeezed into a square.

    Raises:
        SystemExit: there are none.
    """
    found: list[Callable[[], Image.Image]] = []
    for source in sources:
        if source.suffix == ".npz":
            stored = np.load(source)
            parts = np.split(stored["bytes"], stored["lengths"].cumsum()[:-1])
            chosen = (part for part, train in zip(parts, stored["train"], strict=True) if train)
            found += [partial(Image.open, io.BytesIO(part.tobytes())) for part in chosen]
        elif source.suffix == ".jsonl":
            rows = map(json.loads, source.read_text().splitlines())
            found += [partial(Image.open, source.parent / row["image"]) for row in rows]
        else:
            below = (p for p in sorted(source.rglob("*")) if p.suffix.lower() in SUFFIXES)
            found += [partial(Image.open, path) for path in below]
    if not found:
        raise SystemExit(f"no pictures in {', '.join(map(str, sources))}")

    def squeezed(opened: Callable[[], Image.Image]) -> np.ndarray:
        with opened() as picture:
            return np.asarray(
                picture.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
            )

    with ThreadPoolExecutor(8) as pool:
        stacked = np.stack(list(pool.map(squeezed, found)))
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()


class Reader:
    """The four maps of a backbone.

    Args:
        folder: of transformers.
        size: height and width of pictures.
        device, dtype: where and in what it computes.
    """

    def __init__(self, folder: Path, size: int, device: torch.device, dtype: torch.dtype) -> None:
        from mtl_lora_cli.dense.backbones import family_of, load_backbone
        from mtl_lora_cli.models.base import find_base_model

        base = find_base_model(str(folder))
        self.model = load_backbone(base, size=(size, size), dtype=dtype, device=device)
        self.family, self._size, self._found = family_of(base, self.model.config), size, []
        self.stages = self.family.stages(self.model.config)
        for path in self.stages.blocks:
            self.model.get_submodule(path).register_forward_hook(
                lambda m, a, x: self._found.append(x)
            )

    def __call__(self, pixels: Tensor) -> list[Tensor]:
        """[N, h, w, C] of each stage."""
        self._found.clear()
        self.family.run(self.model, pixels)
        plain = [x[0] if isinstance(x, tuple) else x for x in self._found]
        return [
            self.family.to_map(self.model, x, i, (self._size, self._size))
            for i, x in enumerate(plain)
        ]


class Views:
    """Random crops of random pictures, half of them mirrored; everything that is drawn lies on the device.

    Args:
        pictures: uint8 [N, 3, s, s].
        side: of a crop.
        batch: crops of one call.
        most: calls that are drawn beforehand; then they come again.
        seed: of the draws.
    """

    def __init__(self, pictures: Tensor, side: int, batch: int, most: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        device = pictures.device
        count = len(pictures)
        order = [
            torch.randperm(count, generator=generator) for _ in range(-(-most * batch // count))
        ]
        self._numbers = torch.cat(order)[: most * batch].view(most, batch).to(device)
        draws = torch.rand(most, batch, 4, generator=generator).to(device)
        scale = 0.4 + 0.6 * draws[..., 0]
        flip = torch.where(draws[..., 1] < 0.5, -1.0, 1.0)
        self._theta = torch.zeros(most, batch, 2, 3, device=device)
        self._theta[..., 0, 0], self._theta[..., 1, 1] = scale * flip, scale
        self._theta[..., 2] = (draws[..., 2:] * 2 - 1) * (1 - scale)[..., None]
        self._pictures, self._side, self._most = pictures, side, most
        mean, std = (torch.tensor(one, device=device).view(1, 3, 1, 1) for one in (MEAN, STD))
        self._mean, self._std = mean, std

    def at(self, step: Tensor) -> Tensor:
        """Those of a step [1]: float32 [batch, 3, side, side], normalised."""
        place = step % self._most
        found = self._pictures[self._numbers[place].flatten()].float() / 255
        shape = [len(found), 3, self._side, self._side]
        grid = F.affine_grid(self._theta[place].squeeze(0), shape, align_corners=False)
        return (F.grid_sample(found, grid, align_corners=False) - self._mean) / self._std


def apart(student: Tensor, target: Tensor) -> Tensor:
    """1 − cos, the student's map [N, h, w, C] brought to the teacher's grid."""
    grid = target.shape[1:3]
    student = F.interpolate(student.permute(0, 3, 1, 2), size=grid, mode="bilinear").permute(
        0, 2, 3, 1
    )
    return 1 - F.cosine_similarity(student, target, dim=-1).mean()


class Distillation:
    """A step of learning: the views, the teacher, the student, the optimizer.

    Args:
        teacher: whose maps are learned.
        student: that learns.
        views: of pictures.
        rate: that the optimizer begins with.
    """

    def __init__(self, teacher: Reader, student: Reader, views: Views, rate: float) -> None:
        self.teacher, self.student, self.views = teacher, student, views
        device = next(student.model.parameters()).device
        self._card = device.type == "cuda"
        width, channels = teacher.stages.channels[-1], student.stages.channels
        self.heads = nn.ModuleList(nn.Linear(channels[s], width) for s in STAGES).to(device)
        self.learned = [*student.model.parameters(), *self.heads.parameters()]
        how: dict[str, Any] = (
            {"fused": True, "capturable": True} if self._card else {"foreach": False}
        )
        self.optimizer = torch.optim.AdamW(
            self.learned, torch.tensor(rate, device=device), weight_decay=0.05, **how
        )
        self.rate = self.optimizer.param_groups[0]["lr"]
        self.count = torch.zeros(1, dtype=torch.long, device=device)
        self.loss = torch.zeros((), device=device)
        self._centres = {
            s: m.mean((0, 1, 2)) for s, m in self._targets(views.at(self.count)).items()
        }

    @torch.no_grad()
    def _targets(self, pixels: Tensor) -> dict[int, Tensor]:
        maps = self.teacher(pixels.to(next(self.teacher.model.parameters()).dtype))
        return {stage: maps[stage].float() for stage in set(STAGES.values())}

    def step(self) -> None:
        """Once; nothing in it waits for the device."""
        self.optimizer.zero_grad(set_to_none=True)
        pixels = self.views.at(self.count)
        targets = self._targets(pixels)
        kind = self.count.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self._card, cache_enabled=False):
            maps = self.student(pixels)
            guesses = [head(maps[stage]) for head, stage in zip(self.heads, STAGES, strict=True)]
        loss = torch.zeros_like(self.loss)
        for guess, stage in zip(guesses, STAGES.values(), strict=True):
            loss = loss + apart(guess.float(), targets[stage] - self._centres[stage])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learned, 1.0)
        self.optimizer.step()
        self.loss.copy_(loss.detach() / len(STAGES))
        self.count.add_(1)

    def repeatable(self) -> Callable[[], None]:
        """The step as a CUDA graph, where there is a card."""
        if not self._card:
            return self.step
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.step()
        return graph.replay


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--teacher", default="dinov2-small")
    parser.add_argument("--pictures", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="a folder for the student before it has learned")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seconds", type=float, help="of learning: fewer steps where these end")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    distil(parser.parse_args())


def distil(a: argparse.Namespace) -> None:
    from transformers import AutoModel

    from mtl_lora_cli.models.base import find_base_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pictures = pictures_of(a.pictures, round(a.side * 8 / 7)).to(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    teacher = Reader(find_base_model(a.teacher).folder, a.side, device, dtype)
    torch.manual_seed(a.seed)
    made = AutoModel.from_config(student_configuration())
    for folder in (a.out, a.start):
        if folder is not None:
            made.save_pretrained(folder)
    student = Reader(a.out, a.side, device, torch.float32)
    student.model.requires_grad_(True)
    views = Views(pictures, a.side, a.batch, min(a.steps, 2000), a.seed)
    learning = Distillation(teacher, student, views, a.rate)
    learning.rate.fill_(a.rate / 100)  # of the steps by which the graph is made and timed
    again = learning.repeatable()
    steps = a.steps if a.seconds is None else min(a.steps, steps_in(a.seconds, again))
    began = time.monotonic()
    for step in range(steps):
        share = 0.5 * (1 + math.cos(math.pi * step / steps))
        learning.rate.fill_(a.rate * min(1, (step + 1) / 200) * share)
        again()
        if step % 200 == 0 or step == steps - 1:
            print(f"step {step} of {steps}: 1 − cos {float(learning.loss):.4f}", flush=True)
    student.model.save_pretrained(a.out)
    count = sum(p.numel() for p in student.model.parameters())
    seconds = time.monotonic() - began
    print(
        f"{a.out}: {count:,} values, {steps * a.batch:,} views of {len(pictures):,} pictures, {seconds:.0f} s"
    )


def steps_in(seconds: float, again: Callable[[], None], tried: int = 20) -> int:
    """How many a time allows."""
    for part in (1, tried):
        began = time.monotonic()
        for _ in range(part):
            again()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return max(1, int(seconds * tried / (time.monotonic() - began)))


if __name__ == "__main__":
    main()
