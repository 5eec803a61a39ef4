"""Tokens, grids and pixels of pictures beside each model type's own AutoProcessor, where torchvision is.

    python tests/benchmarks/picture_processors.py --out docs/benchmarks/picture-processors.json

Small folders of each type are written with their own processor's files, and `AutoProcessor.from_pretrained` reads them
as it would a published model's: with its own choice of image processor. Where that one computes with torchvision,
pixels differ by what its resizing rounds; the same processor with Pillow's image processor is compared, too.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import load_tokenizer
from tests.processors import compared, processor_of
from tests.sights import TOKENS, tiny_llava, tiny_model

LANGUAGE = Path(__file__).parent.parent / "fixtures" / "model"
SIDES = ((90, 120), (33, 29), (64, 200), (200, 64), (31, 31), (480, 640), (224, 224), (100, 37))


def pictures() -> Iterator[Image.Image]:
    """Of each size one of noise and one that changes slowly, as photos do."""
    draw = np.random.default_rng(0)
    for height, width in SIDES:
        yield Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
        rows, columns = np.mgrid[0:height, 0:width]
        waves = [np.sin(rows / (9 + n) + n) * np.cos(columns / (13 - n)) for n in range(3)]
        yield Image.fromarray((127.5 + 127 * np.stack(waves, axis=-1)).astype(np.uint8))


def own_processor(kind: str, tokenizer: Any) -> Any:
    """The type's own, with our image processor."""
    if kind != "llava":
        return processor_of(kind, tokenizer)
    from transformers import LlavaProcessor

    return LlavaProcessor(
        image_processor=tokenizer.vision().processor,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def name_tokens(folder: Path, tokenizer: Any) -> None:
    """Write into a folder which tokens the processor asks its tokenizer for, as published folders have it."""
    own = {n: v for n, v in vars(tokenizer).items() if n.endswith("_token") and isinstance(v, str)}
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "model_specific_special_tokens": own})
    )


def beside(kind: str, folder: Path) -> dict[str, Any]:
    """All pictures of a type, by both processors."""
    from transformers import AutoProcessor

    make = tiny_llava if kind == "llava" else tiny_model
    make(*(() if kind == "llava" else (kind,)), LANGUAGE, folder)  # type: ignore[operator]
    base = find_base_model(str(folder))
    tokenizer = load_tokenizer(base)
    own = own_processor(kind, tokenizer)
    found: dict[str, Any] = {"pictures": 0}
    own.save_pretrained(folder)
    name_tokens(folder, tokenizer)
    auto = AutoProcessor.from_pretrained(folder)
    found["processor"] = type(auto).__name__
    fresh = load_tokenizer(base)
    for name, processor in (("auto", auto), ("pillow", own_processor(kind, fresh))):
        results = [asdict(compared(kind, fresh, processor, one)) for one in pictures()]
        found["pictures"] = len(results)
        found[name] = {
            "image_processor": type(processor.image_processor).__name__,
            "tokens_equal": sum(one["tokens_equal"] for one in results),
            "grids_equal": sum(one["grids_equal"] for one in results),
            "pixels_apart_noise": max(one["pixels_apart"] for one in results[::2]),
            "pixels_apart_smooth": max(one["pixels_apart"] for one in results[1::2]),
            "tokens": sum(one["tokens"] for one in results),
        }
    return found


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in ("transformers", "torch", "torchvision", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--kind", action="append")
    wanted = parser.parse_args()
    said: dict[str, Any] = {
        "versions": versions(),
        "sizes": [list(one) for one in SIDES],
        "types": {},
    }
    for kind in wanted.kind or ("llava", *TOKENS):
        with tempfile.TemporaryDirectory() as folder:
            try:
                said["types"][kind] = beside(kind, Path(folder) / kind)
                print(kind, json.dumps(said["types"][kind]), flush=True)
            except Exception as error:
                traceback.print_exc()
                said["types"][kind] = {
                    "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                }
                print(kind, "failed", said["types"][kind]["failed"], flush=True)
        if wanted.out:
            wanted.out.write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()
