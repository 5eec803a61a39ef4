"""Features that a frozen tower gave once, in the place of its passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mtl_lora_cli.data.kept_features import KeptFeatures, Tower, keep_features
from mtl_lora_cli.data.pictured import Eyes
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.machine.processes import ALONE
from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.models.trust import settle
from mtl_lora_cli.models.vision import around
from mtl_lora_cli.pictures.shown import Picture
from mtl_lora_cli.runs.kept import entries

from ..sights import TOKENS
from .conftest import packed_of, some_at_once
from .test_packed import SIDES, batch_of, picture

KINDS = ["llava", *TOKENS]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def files(tmp_path: Path) -> list[Picture]:
    found = []
    for number in range(len(SIDES)):
        picture(number).save(tmp_path / f"{number}.png")
        found.append(Picture(tmp_path, f"{number}.png"))
    return found


def base_of(kind: str, llava: BaseModel, models: Callable[[str], BaseModel]) -> BaseModel:
    return llava if kind == "llava" else models(kind)


@pytest.mark.parametrize("kind", some_at_once(KINDS, "llava", "llava_next", "qwen3_vl", "gemma4"))
@pytest.mark.parametrize("learns", [True, False])
def test_what_is_kept_says_what_the_tower_says_and_it_runs_no_more(
    kind: str,
    learns: bool,
    llava: BaseModel,
    models: Callable[[str], BaseModel],
    files: list[Picture],
) -> None:
    packed = packed_of(base_of(kind, llava, models), kind=kind if learns else None)
    if packed.plain is not None:
        settle(packed)
    eyes = Eyes(packed.vision)  # type: ignore[arg-type]
    refused = learns and packed.vision.connector is None  # type: ignore[union-attr]
    if refused:
        with pytest.raises(UsageError, match="stands within the tower"):
            keep_features(packed.model, packed.adapter, eyes, files, "keep", ALONE)
    keep_features(packed.model, packed.adapter, eyes, files, "auto", ALONE)
    assert (eyes.store is None) == refused
    if refused:
        return
    batch = batch_of(packed, [picture(number) for number in range(3)])
    kept = replace(batch, pictures=replace(batch.pictures, seen=eyes.seen(files)))
    learning: Any = packed.adapter.trained()  # type: ignore[union-attr]
    found = []
    for one in (batch, kept):
        for tensor in learning.values():
            tensor.grad = None
        if one is kept:
            body = around(packed.model)
            body.get_image_features = None  # whoever asks the tower falls over
        with packed.routed(one):
            answers = packed(one)
            answers.sum().backward()
        found.append([answers.detach(), *(t.grad.clone() for t in learning.values())])
    del body.get_image_features
    for first, second in zip(*found, strict=True):
        assert (first - second).abs().max() <= 2e-5 * max(1.0, float(first.abs().max()))


def test_a_tower_runs_once_a_picture_and_another_tower_has_an_entry_of_its_own(
    llava: BaseModel, files: list[Picture], cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = packed_of(llava)
    eyes = Eyes(packed.vision)  # type: ignore[arg-type]
    keep_features(packed.model, packed.adapter, eyes, files[:2], "keep", ALONE)
    assert "keeping features of 2 pictures in float32: 0.0 MiB" in capsys.readouterr().err
    seen: list[int] = []
    tower: Any = around(packed.model).vision_tower
    hook = tower.register_forward_hook(lambda *_: seen.append(1))
    keep_features(packed.model, packed.adapter, Eyes(eyes.vision), files[:2], "keep", ALONE)
    assert not seen
    keep_features(packed.model, packed.adapter, Eyes(eyes.vision), files, "keep", ALONE)
    assert len(seen) == 2  # once to say the size, once to keep it
    (one,) = entries()
    assert (one.kind, one.finished) == ("features", True)
    hook.remove()
    with torch.no_grad():
        next(tower.parameters()).add_(0.1)
    keep_features(packed.model, packed.adapter, Eyes(eyes.vision), files, "keep", ALONE)
    assert len(entries()) == 2


def test_another_level_of_the_same_tower_has_an_entry_of_its_own(
    llava: BaseModel, files: list[Picture]
) -> None:
    """Both are as wide: of one entry, one model would learn from what the other one sees."""
    packed = packed_of(llava)
    held = []
    for level in (-2, -3):
        around(packed.model).config.vision_feature_layer = level
        eyes = Eyes(packed.vision)  # type: ignore[arg-type]
        keep_features(packed.model, packed.adapter, eyes, files, "keep", ALONE)
        held.append(eyes.seen(files)[0])
    assert len(entries()) == 2
    assert any(not torch.equal(held[0][name], held[1][name]) for name in held[0])


def test_a_cache_that_cannot_be_written_ends_nothing_that_did_not_ask_for_it(
    llava: BaseModel, files: list[Picture], cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = packed_of(llava)
    cache.mkdir()
    (cache / "features").write_text("a file in the place of the folder")
    eyes = Eyes(packed.vision)  # type: ignore[arg-type]
    keep_features(packed.model, packed.adapter, eyes, files, "auto", ALONE)
    assert eyes.store is None
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("note: features are not kept: ") and "cannot be written" in said
    with pytest.raises(UsageError, match="cannot be written"):
        keep_features(packed.model, packed.adapter, eyes, files, "keep", ALONE)


def test_a_file_that_is_cut_off_is_made_again(llava: BaseModel, files: list[Picture]) -> None:
    packed = packed_of(llava)
    eyes = Eyes(packed.vision)  # type: ignore[arg-type]
    keep_features(packed.model, packed.adapter, eyes, files, "keep", ALONE)
    before = [{name: value.clone() for name, value in one.items()} for one in eyes.seen(files)]
    folder = Tower(packed.model, eyes.vision, True).folder
    (path,) = folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-40])
    assert KeptFeatures(folder).bytes != 0 and eyes.key(files[0]) not in KeptFeatures(folder)
    again = Eyes(eyes.vision)
    keep_features(packed.model, packed.adapter, again, files, "keep", ALONE)
    for first, second in zip(before, again.seen(files), strict=True):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_blind_control_has_one_for_each_size(llava: BaseModel, files: list[Picture]) -> None:
    packed = packed_of(llava)
    eyes = Eyes(packed.vision, blind=True)  # type: ignore[arg-type]
    Image.new("RGB", (60, 40)).save(files[0].root / "other.png")
    other = Picture(files[0].root, "other.png")
    keep_features(packed.model, packed.adapter, eyes, [*files, other], "keep", ALONE)
    assert eyes.store is not None
    first, last = (eyes.seen([one])[0]["kept.0"] for one in (files[0], other))
    assert torch.equal(first, last)
    assert len(list(eyes.store.folder.glob("*"))) == 1 and first.std(dim=1).max() > 0


def test_a_tower_is_hashed_once_while_it_stays_as_it_is(
    llava: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, hashed = packed_of(llava), []
    digest = Tower._digest
    counted = staticmethod(lambda *given: hashed.append(1) or digest(*given))
    monkeypatch.setattr(Tower, "_digest", counted)

    def folder() -> Path:
        assert packed.vision is not None
        return Tower(packed.model, packed.vision, True).folder

    first = folder()
    assert (folder(), len(hashed)) == (first, 1)
    weight = next(around(packed.model).vision_tower.parameters())
    with torch.no_grad():
        weight.add_(1.0)
    assert (folder() != first, len(hashed)) == (True, 2)
