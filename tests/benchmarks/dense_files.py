"""Whether a card waits for files: steps over JPEG and PNG files with augmentation, beside steps over one batch that
lies on the card.

    python tests/benchmarks/dense_files.py --out OUT

Swin-T of random weights at 448 x 448, 32 pictures of 480 x 640 a step, four tasks with maps as PNGs, streams, bfloat16
(`dense_cost.py` has the same model). Files are decoded by threads, and by processes of their own as training on a card does.
All arms are timed by the wall clock over whole loops, in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
from dense_cost import CLASSES, OBJECTIVES, PICTURES, SIZE, Stepping, configuration, host_of

FILES, HEIGHT, WIDTH = 64, 480, 640
LEAD, TURNS = 5, 3  # the first turn is for warming up
CARD = "on the card"


def write_files(folder: Path, count: int) -> None:
    """Smooth pictures with some noise, as large as photos of the size are, and their maps."""
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(partial(_written, folder), range(count)))
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))


def _written(folder: Path, number: int) -> dict[str, str]:
    generator = np.random.default_rng(number)
    small = generator.integers(0, 256, (15, 20, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    noisy = smooth.astype(int) + generator.normal(0, 8, smooth.shape)
    blocks = (small[..., 0] % CLASSES).repeat(32, axis=0).repeat(32, axis=1)
    maps = {
        "segmentation": blocks,
        "depth": smooth[..., 0],
        "normals": smooth,
        "edges": (smooth[..., 1] > 200).astype(np.uint8) * 255,
    }
    row = {"image": f"{number}.jpg"}
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / row["image"], quality=90)
    for name, values in maps.items():
        row[name] = f"{number}-{name}.png"
        Image.fromarray(values).save(folder / row[name])
    return row


def dataset_of(folder: Path, size: int) -> Any:
    from mtl_lora_cli.data.map_batch import Normalisation
    from mtl_lora_cli.data.maps import MapDataset
    from mtl_lora_cli.recipe.pictures import Augment, Images
    from mtl_lora_cli.recipe.source import Source
    from mtl_lora_cli.tasks.maps import spec_of
    from mtl_lora_cli.tasks.task import Task
    from mtl_lora_cli.tasks.template import Template

    keys: dict[str, dict[str, Any]] = {
        "segmentation": {"classes": [f"class {n}" for n in range(CLASSES)]},
        "depth": {"range": [0.7, 10.0], "scale": "log"},
        "normals": {},
        "edges": {},
    }
    source = Source(path=str(folder))
    tasks = [
        Task(name, number, name, "", template, source, objective=name)
        for number, name in enumerate(OBJECTIVES)
        for template in [
            Template(description="x", objective=name, image="image", target=name, **keys[name])
        ]
    ]
    specs = [spec_of(task.template) for task in tasks]
    images = Images(size=[size, size], augment=Augment(flip=True, scale=[0.5, 2.0]))
    found = MapDataset.read(tasks, specs, "train", images, Normalisation())
    assert found is not None
    return found


def loop(stepping: Any, batches: Any, steps: int, device: torch.device) -> float:
    """Seconds a step, `LEAD` steps after the first: as many are decoded ahead in the end as in the beginning."""
    for number in range(LEAD + steps):
        if number == LEAD:
            settled(device)
            start = time.monotonic()
        stepping.batch = batches()
        stepping.step()
    settled(device)
    return (time.monotonic() - start) / steps


def settled(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class FromFiles:
    """Batches of files, asked for ahead of their steps as training asks for them.

    Args:
        dataset: of the files.
        pictures: a step.
        device: where batches go.
    """

    def __init__(self, dataset: Any, pictures: int, device: torch.device) -> None:
        self._dataset, self._pictures, self._device = dataset, pictures, device
        self._number = self._asked = 0
        self.waited: list[float] = []

    def rows(self, number: int) -> list[list[tuple[int, int]]]:
        count = len(self._dataset.lengths[0])
        return [[(0, (number * self._pictures + i) % count)] for i in range(self._pictures)]

    def __call__(self) -> Any:
        number = self._number
        self._number += 1
        for later in range(max(number, self._asked), number + self._dataset.steps_ahead):
            self._dataset.at(0, later).ahead(self.rows(later))
            self._asked = later + 1
        start = time.monotonic()
        seen = self._dataset.at(0, number).collate(self.rows(number))
        self.waited.append(time.monotonic() - start)
        return seen.to(self._device)

    def rest(self) -> None:
        """Nobody decodes in another arm's time."""
        for one in list(self._dataset._asked.values()):
            if one.filled is not None:
                one.filled.result()

    def decoded(self, seconds: float) -> float:
        """Pictures a second where nothing else is done."""
        start, count = time.monotonic(), 0
        while time.monotonic() - start < seconds:
            for step in range(4):
                self._dataset.at(1, count + step).ahead(self.rows(step))
            for step in range(4):
                self._dataset.at(1, count + step).collate(self.rows(step))
            count += 4
        return count * self._pictures / (time.monotonic() - start)


def arms_of(
    names: list[str], folder: Path, size: int, pictures: int, device: torch.device
) -> dict[str, FromFiles]:
    """Decoding by threads of this process, and by processes of their own."""
    found = {}
    for name in names:
        dataset = dataset_of(folder, size)
        decoding = dataset.at(0, 0)._decoding
        if name == "by threads":
            dataset._decoding = None
        elif decoding is None:
            continue
        else:
            for one in decoding._begun:
                one.result(90)
        found[name] = FromFiles(dataset, pictures, device)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--arms", nargs="+", default=["by threads", "by processes"])
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    clock = Clock()
    from transformers import AutoModel

    from mtl_lora_cli.data import maps
    from mtl_lora_cli.machine.cores import cores

    clock(f"libraries; {cores()} cores")
    size, pictures, files = (64, 2, 8) if arguments.tiny else (SIZE, PICTURES, FILES)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.tiny:
        maps.possible = lambda: True
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        torch.manual_seed(0)
        AutoModel.from_config(configuration(arguments.tiny)).save_pretrained(folder / "swin")
        clock("a model")
        (folder / "rows").mkdir()
        write_files(folder / "rows", files)
        clock("files")
        host = host_of(folder / "swin", OBJECTIVES, size, streams=True, device=device)
        clock("the model where it steps")
        arms = arms_of(arguments.arms, folder / "rows", size, pictures, device)
        clock("datasets; the processes have begun")
        found: dict[str, Any] = {"decoded": {}, "seconds": {name: [] for name in (CARD, *arms)}}
        for name, arm in arms.items():
            found["decoded"][name] = arm.decoded(0.2)  # memory that a card reads is made
            found["decoded"][name] = arm.decoded(1.5)
            clock(f"{name}: {found['decoded'][name]:.0f} pictures/s where nothing else is done")
        first = next(iter(arms.values()))
        fixed = first._dataset.at(2, 0).collate(first.rows(0)).to(device)
        stepping = Stepping(host, fixed)
        for turn in range(TURNS):
            for name in found["seconds"]:
                batches: Any = arms.get(name, lambda: fixed)
                seconds = loop(stepping, batches, arguments.steps if turn else 2, device)
                clock(f"{name}: {pictures / seconds:.1f} pictures/s")
                if turn:
                    found["seconds"][name].append(seconds)
                if name in arms:
                    arms[name].rest()
            found |= told(found["seconds"], pictures)
            (arguments.out / "dense_files.json").write_text(json.dumps(found, indent=1))
    for name, arm in arms.items():
        times = sorted(arm.waited)
        print(
            f"{name}: waited {times[len(times) // 2] * 1e3:.0f} ms a step, {times[-1] * 1e3:.0f} at most"
        )
    for name, share in found["share"].items():
        print(f"{name:14} {share:.3f} of the rate with batches on the card", flush=True)


def told(seconds: dict[str, list[float]], pictures: int) -> dict[str, Any]:
    """Pictures a second, and shares of the rate with a batch that lies on the card; the median of all turns."""
    rates = {name: pictures / statistics.median(own) for name, own in seconds.items() if own}
    shares = {name: rate / rates[CARD] for name, rate in rates.items() if name != CARD}
    return {"pictures_per_second": rates, "share": shares}


class Clock:
    """Says what has been done, and when."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __call__(self, what: str) -> None:
        print(f"{time.monotonic() - self._began:6.1f} s: {what}", flush=True)


if __name__ == "__main__":
    main()
