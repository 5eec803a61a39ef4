"""Whether a card waits for files: steps over JPEG and PNG files with augmentation, beside steps over one batch that
lies on the card.

    python tests/benchmarks/dense_files.py --out OUT

Swin-T of random weights at 448 x 448, 32 pictures of 480 x 640 a step, four tasks with maps as PNGs, streams, bfloat16
(`dense_cost.py` has the same model). Both arms are timed by the wall clock over whole loops, in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
from dense_cost import CLASSES, OBJECTIVES, PICTURES, SIZE, Stepping, configuration, host_of

FILES, HEIGHT, WIDTH = 64, 480, 640
LEAD, TURNS = 5, 3


def write_files(folder: Path, count: int) -> None:
    """Smooth pictures with some noise, as large as photos of the size are, and their maps."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(count):
        small = generator.integers(0, 256, (15, 20, 3), dtype=np.uint8)
        smooth = np.asarray(
            Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        )
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
        rows.append(json.dumps(row))
    (folder / "train.jsonl").write_text("\n".join(rows))


def dataset_of(folder: Path, size: int) -> Any:
    from mtl_lora_cli.data.map_batch import Normalisation
    from mtl_lora_cli.data.maps import MapDataset
    from mtl_lora_cli.recipe.schema import Augment, Images, Source
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    from transformers import AutoModel

    size, pictures, files = (64, 2, 8) if arguments.tiny else (SIZE, PICTURES, FILES)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        torch.manual_seed(0)
        AutoModel.from_config(configuration(arguments.tiny)).save_pretrained(folder / "swin")
        (folder / "rows").mkdir()
        write_files(folder / "rows", files)
        dataset = dataset_of(folder / "rows", size)
        host = host_of(folder / "swin", OBJECTIVES, size, streams=True, device=device)

        def rows(number: int) -> list[list[tuple[int, int]]]:
            return [[(0, (number * pictures + i) % files)] for i in range(pictures)]

        waited: list[float] = []
        numbers = count()

        def from_files() -> Any:
            number = next(numbers)
            for later in range(number, number + dataset.steps_ahead):
                dataset.at(0, later).ahead(rows(later))
            start = time.monotonic()
            seen = dataset.at(0, number).collate(rows(number))
            waited.append(time.monotonic() - start)
            return seen.to(device)

        fixed = dataset.at(0, 0).collate(rows(0)).to(device)
        stepping = Stepping(host, fixed)
        found: dict[str, list[float]] = {"on the card": [], "from files": []}
        for turn in range(TURNS):
            for name in found:
                batches = from_files if name == "from files" else lambda: fixed
                seconds = loop(stepping, batches, arguments.steps if turn else 2, device)
                if turn:  # the first is for warming up
                    found[name].append(seconds)
                for one in list(dataset._asked.values()):  # nobody decodes in the other arm's time
                    if one.filled is not None:
                        one.filled.result()
    told = {name: pictures / statistics.median(values) for name, values in found.items()}
    told["share"] = told["from files"] / told["on the card"]
    print(
        f"waited for decoding: {statistics.median(waited) * 1e3:.0f} ms a step, {max(waited) * 1e3:.0f} at most"
    )
    for name, value in told.items():
        print(f"{name:12} {value:8.3f}" + ("" if name == "share" else " pictures/s"), flush=True)
    (arguments.out / "dense_files.json").write_text(
        json.dumps({**told, "seconds": found}, indent=1)
    )


if __name__ == "__main__":
    main()
