"""A small Swin that has learned from a DINOv2: for machines that no pretrained hierarchical backbone reaches.

    python tests/benchmarks/distil_backbone.py --teacher dinov2-small --pictures FOLDER [FOLDER …] --out swin-distilled

The student's third and fourth stage, each by a linear layer that is thrown away afterwards, say what the teacher's patches
say in the middle and at the end: ℓ = Σ (1 − cos), after the teacher's means over pictures are taken off, on its grid of
patches. Pictures are all JPEG and PNG files below the folders, without those whose path has a word of `--without`;
leave out the pictures that a study tests on. Each is seen as a random crop, half of them mirrored.

What comes out is an ordinary folder of transformers' `SwinModel` of about 8 million values. It has seen some
thousand pictures and is no ImageNet model. The study beside this file (`dense_study.py --encoder`) says what it is worth.
"""

from __future__ import annotations

import argparse
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STAGES = {2: 2, 3: 3}  # the student's stage → the teacher's quarter


def student_configuration() -> Any:
    from transformers import SwinConfig

    return SwinConfig(
        image_size=224,
        embed_dim=56,
        depths=[2, 2, 4, 2],
        num_heads=[2, 4, 8, 16],
        window_size=7,
        drop_path_rate=0.0,
    )


def files_below(folders: list[Path], without: list[str]) -> list[Path]:
    """Pictures, in one order on every machine."""
    found = [
        p
        for f in folders
        for p in sorted(f.rglob("*"))
        if p.suffix.lower() in (".jpg", ".jpeg", ".png")
    ]
    return [path for path in found if not any(word in path.as_posix() for word in without)]


def decoded(paths: list[Path], side: int) -> Tensor:
    """uint8 [N, 3, side, side], the whole picture squeezed into a square."""

    def one(path: Path) -> np.ndarray:
        with Image.open(path) as picture:
            return np.asarray(
                picture.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
            )

    with ThreadPoolExecutor(8) as pool:
        return (
            torch.from_numpy(np.stack(list(pool.map(one, paths)))).permute(0, 3, 1, 2).contiguous()
        )


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


def seen(pictures: Tensor, numbers: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Random crops [N, 3, side, side] of some pictures, normalised; half of them mirrored."""
    found = pictures[numbers].float() / 255
    most, angle = found.shape[-1], torch.rand(len(found), 4, generator=generator).to(found.device)
    scale = 0.5 + 0.5 * angle[:, 0]
    flip = torch.where(angle[:, 1] < 0.5, -1.0, 1.0)
    theta = torch.zeros(len(found), 2, 3, device=found.device)
    theta[:, 0, 0], theta[:, 1, 1] = scale * flip, scale
    theta[:, :, 2] = (angle[:, 2:] * 2 - 1) * (1 - scale)[:, None]
    grid = F.affine_grid(theta, [len(found), 3, side, side], align_corners=False)
    assert most >= side
    crops = F.grid_sample(found, grid, align_corners=False)
    mean, std = (torch.tensor(one, device=found.device).view(1, 3, 1, 1) for one in (MEAN, STD))
    return (crops - mean) / std


def teacher_maps(teacher: Reader, pixels: Tensor) -> dict[int, Tensor]:
    with torch.no_grad():
        maps = teacher(pixels.to(next(teacher.model.parameters()).dtype))
    return {stage: maps[stage].float() for stage in set(STAGES.values())}


def apart(student: Tensor, target: Tensor) -> Tensor:
    """1 − cos, the student's map [N, h, w, C] brought to the teacher's grid."""
    grid = target.shape[1:3]
    student = F.interpolate(student.permute(0, 3, 1, 2), size=grid, mode="bilinear").permute(
        0, 2, 3, 1
    )
    return 1 - F.cosine_similarity(student, target, dim=-1).mean()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--teacher", default="dinov2-small")
    parser.add_argument("--pictures", type=Path, nargs="+", required=True)
    parser.add_argument(
        "--without", nargs="*", default=["test"], help="words in the paths of pictures to leave out"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seconds", type=float, help="end earlier than all steps would")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    distil(parser.parse_args())


def distil(a: argparse.Namespace) -> None:
    from transformers import AutoModel

    from mtl_lora_cli.models.base import find_base_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    paths = files_below(a.pictures, a.without)
    if not paths:
        raise SystemExit(f"no pictures below {', '.join(map(str, a.pictures))}")
    pictures = decoded(paths, round(a.side * 8 / 7)).to(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    teacher = Reader(find_base_model(a.teacher).folder, a.side, device, dtype)
    torch.manual_seed(a.seed)
    a.out.mkdir(parents=True, exist_ok=True)
    AutoModel.from_config(student_configuration()).save_pretrained(a.out)
    student = Reader(a.out, a.side, device, torch.float32)
    student.model.requires_grad_(True)
    width = teacher.stages.channels[-1]
    heads = nn.ModuleList(nn.Linear(student.stages.channels[stage], width) for stage in STAGES).to(
        device
    )
    learned = [*student.model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(learned, a.rate, weight_decay=0.05)
    generator = torch.Generator().manual_seed(a.seed)
    first = teacher_maps(
        teacher,
        seen(pictures, torch.randperm(len(pictures), generator=generator)[:256], a.side, generator),
    )
    centres = {stage: maps.mean((0, 1, 2)) for stage, maps in first.items()}
    began = time.monotonic()
    for step in range(a.steps):
        share = (
            step / a.steps
            if a.seconds is None
            else max(step / a.steps, (time.monotonic() - began) / a.seconds)
        )
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = a.rate * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * share))
        numbers = torch.randint(len(pictures), (a.batch,), generator=generator)
        pixels = seen(pictures, numbers, a.side, generator)
        targets = teacher_maps(teacher, pixels)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            maps = student(pixels)
            guesses = [head(maps[stage]) for head, stage in zip(heads, STAGES, strict=True)]
        pairs = zip(guesses, STAGES.values(), strict=True)
        loss = sum(apart(guess.float(), targets[stage] - centres[stage]) for guess, stage in pairs)
        assert isinstance(loss, Tensor)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(
                f"step {step}: {float(loss.detach()) / len(STAGES):.4f} of {len(paths)} pictures",
                flush=True,
            )
    student.model.save_pretrained(a.out)
    count = sum(p.numel() for p in student.model.parameters())
    print(f"{a.out}: {count:,} values, after {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
