"""NYU Depth V2 small enough to be carried, and laid on a card: what `dense_study.py` reads.

    python tests/benchmarks/dense_data.py pack NYU_FOLDER ENCODER_FOLDER FILES

makes FILES of a folder of NYU Depth V2 (`image`, `seg`, `depth` as in train.jsonl and test.jsonl) and of a backbone's folder.
"""

from __future__ import annotations

import json
import lzma
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

HEIGHT, WIDTH, CLASSES = 168, 224, 39
CAMERA = (518.86 / 561, 519.47 / 427, 285.58 / 561, 209.74 / 427)  # fx, fy, cx, cy as shares
HELD_OUT = 100
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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


class Data:
    """Pictures and maps on the card; batches of them are made there, without a word from the host.

    Args:
        folder: of `unpack_maps`.
        device: where they go.

    Attributes:
        test, train: numbers of pictures; `held` are those of training by which rates are chosen, `kept` the others.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.device = device
        read = {
            n: torch.from_numpy(np.load(folder / f"{n}.npy")).to(device)
            for n in ("pixels", "seg", "depth", "normals")
        }
        self._pixels = read["pixels"]
        classes = read["seg"].long()
        classes[classes >= CLASSES] = -100
        self._maps = {
            "segmentation": classes,
            "depth": read["depth"],
            "normals": read["normals"],
            "edges": edges(classes),
        }
        train = np.load(folder / "train.npy")
        self.test = np.flatnonzero(~train)
        every = np.random.default_rng(2026).permutation(np.flatnonzero(train))
        held = min(HELD_OUT, len(every) // 4)
        self.held, self.kept, self.train = every[:held], every[held:], np.sort(every)
        mean, std = (torch.tensor(one, device=device).view(1, 3, 1, 1) for one in (MEAN, STD))
        self._mean, self._std = mean, std
        self._mirror = torch.tensor([-1.0, 1, 1], device=device).view(1, 3, 1, 1)

    def batch(self, numbers: Tensor, tasks: Sequence[str], flips: Tensor | None = None) -> Any:
        """Some pictures and their maps, both said by tensors on the card; `flips` says which are mirrored."""
        from mtl_lora_cli.data.map_batch import MapBatch

        pixels = self._pixels[numbers].permute(0, 3, 1, 2).float()
        pixels = (pixels / 255 - self._mean) / self._std
        maps = {task: self._maps[task][numbers] for task in tasks}
        if "normals" in maps:
            maps["normals"] = maps["normals"].float()
        if flips is not None:
            pixels = torch.where(flips.view(-1, 1, 1, 1), pixels.flip(3), pixels)
            for name, values in maps.items():
                other = values.flip(-1)
                if name == "normals":
                    other = other * self._mirror
                maps[name] = torch.where(flips.view(-1, *[1] * (values.ndim - 1)), other, values)
        count = len(numbers)
        return MapBatch(
            pixels,
            {number: maps[task] for number, task in enumerate(tasks)},
            torch.ones(count, len(tasks), dtype=torch.bool),
            torch.arange(len(tasks)).repeat(count),
            torch.arange(len(tasks)),
        )


def edges(classes: Tensor) -> Tensor:
    """1 where a pixel's class differs from that to its left or above it, NaN where it has none: [N, H, W]."""
    unknown = classes < 0
    found = torch.zeros_like(unknown)
    found[:, :, 1:] |= (classes[:, :, 1:] != classes[:, :, :-1]) & ~unknown[:, :, :-1]
    found[:, 1:] |= (classes[:, 1:] != classes[:, :-1]) & ~unknown[:, :-1]
    return torch.where(unknown, float("nan"), found.float())


if __name__ == "__main__":
    if sys.argv[1:2] != ["pack"]:
        raise SystemExit(__doc__)
    pack(*map(Path, sys.argv[2:5]))
