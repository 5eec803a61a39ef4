"""Pictures and maps of many kinds, read; what they hold is what was put into them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from mtl_lora_cli.pictures.decode import (
    Site,
    decoded,
    decoded_size,
    picture_size,
    read_map,
    read_picture,
)
from mtl_lora_cli.pictures.values import as_classes, as_depth, as_normals, as_share
from mtl_lora_cli.pictures.written import depth_codes, normal_bytes

SITE = Site("rows.jsonl:1", "image")
H, W = 6, 9


def picture(folder: Path, name: str) -> np.ndarray:
    found = read_picture(folder, name, SITE)
    assert found.mode == "RGB"
    assert picture_size(folder, name, SITE) == (found.height, found.width)
    if "#" not in name and not name.endswith(".npy"):
        content = (folder / name).read_bytes()
        assert decoded(io.BytesIO(content), name, SITE) == found
        assert decoded_size(io.BytesIO(content), name, SITE) == (found.height, found.width)
    return np.asarray(found)


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (H, W, 3), dtype=np.uint8)


def test_kinds_of_pictures(tmp_path: Path, pixels: np.ndarray) -> None:
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    assert (picture(tmp_path, "a.png") == pixels).all()
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    assert (picture(tmp_path, "grey.png") == pixels[..., :1]).all()
    deep = pixels[..., 0].astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert (picture(tmp_path, "deep.png") == pixels[..., :1]).all()
    image.quantize(8).save(tmp_path / "palette.png")
    assert (picture(tmp_path, "palette.png") == np.asarray(image.quantize(8).convert("RGB"))).all()
    Image.new("CMYK", (W, H), (0, 255, 255, 0)).save(tmp_path / "red.jpg")
    assert np.abs(picture(tmp_path, "red.jpg").astype(int) - (255, 0, 0)).max() < 12
    clear = np.dstack([pixels, np.zeros((H, W), np.uint8)])
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert picture(tmp_path, "clear.png").max() == 0
    np.save(tmp_path / "a.npy", pixels)
    assert (picture(tmp_path, "a.npy") == pixels).all()


def test_exif_turns_a_picture(tmp_path: Path) -> None:
    upright = np.zeros((H, W, 3), np.uint8)
    upright[0] = 255  # a line on top
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    Image.fromarray(np.rot90(upright, 1).copy()).save(tmp_path / "turned.png", exif=exif)
    assert (picture(tmp_path, "turned.png") == upright).all()


def read(folder: Path, name: str, *, exact: bool = True, colours: bool = False) -> np.ndarray:
    return read_map(folder, name, SITE, exact=exact, colours=colours)


def test_kinds_of_maps(tmp_path: Path) -> None:
    values = np.arange(H * W, dtype=np.uint8).reshape(H, W) % 5
    palette = Image.fromarray(values).convert("P")
    palette.putdata(values.ravel())
    palette.save(tmp_path / "palette.png")
    Image.fromarray(values > 2).save(tmp_path / "bits.png")
    np.save(tmp_path / "many.npy", np.stack([values, values + 1]))
    savemat(tmp_path / "old.mat", {"LabelMap": values.astype(np.uint16), "other": 1})
    savemat(tmp_path / "stack.mat", {"maps": np.dstack([values, values + 2])})
    assert (read(tmp_path, "palette.png") == values).all()
    assert (read(tmp_path, "bits.png") == (values > 2)).all()
    assert (read(tmp_path, "bits.png", exact=False) == (values > 2) * 255).all()
    assert (read(tmp_path, "many.npy#1") == values + 1).all()
    assert (read(tmp_path, "old.mat#LabelMap") == values).all()
    assert (read(tmp_path, "stack.mat#maps/1") == values + 2).all()


def test_an_hdf5_file_is_read_as_matlab_counts(tmp_path: Path) -> None:
    """MATLAB's [H, W, N] is [N, W, H] in the file."""
    h5py = pytest.importorskip("h5py")
    depths = np.random.default_rng(2).random((3, H, W)).astype(np.float32)
    with h5py.File(tmp_path / "new.mat", "w") as file:
        file["depths"] = depths.transpose(0, 2, 1)
    assert (read(tmp_path, "new.mat#depths/2", exact=False) == depths[2]).all()


def fault(said: str) -> Exception:
    return AssertionError(said)


def test_what_values_mean() -> None:
    raw = np.array([[0, 1, 40, 0]], dtype=np.uint8)
    assert as_classes(raw, 1, 40, 0, fault).tolist() == [[-100, 0, 39, -100]]
    wide = np.array([[0, 254, 255]], dtype=np.uint8)
    assert as_classes(wide, 0, 255, 255, fault).tolist() == [[0, 254, -100]]
    for scale, bits in (("linear", 8), ("log", 8), ("log", 16)):
        codes = np.arange(0, 2**bits, 2**bits // 9).reshape(1, -1)
        codes = codes.astype(np.uint8 if bits == 8 else np.uint16)
        found = as_depth(codes, 0.7, 10, scale, bits, None, fault)
        for code, depth in zip(codes[0].tolist(), found[0], strict=True):
            share = code / (2**bits - 1)
            right = 0.7 * (10 / 0.7) ** share if scale == "log" else 0.7 + 9.3 * share
            assert depth == pytest.approx(right, rel=1e-6)
    metres = np.array([[1.5, 0.0]], dtype=np.float32)
    assert as_depth(metres, 0, 1, "linear", 8, 0, fault).tolist()[0][0] == 1.5
    assert np.isnan(as_depth(metres, 0, 1, "linear", 8, 0, fault)[0, 1])
    assert as_share(np.array([[0, 51, 255]], np.uint8), 0, 255, None, fault).tolist() == [
        pytest.approx([0, 0.2, 1])
    ]
    unit = as_normals(np.array([[[255, 128, 128], [128, 128, 128]]], np.uint8), None, fault)
    assert unit[0, 0] == pytest.approx([1, 0, 0], abs=0.01) and np.isnan(unit[0, 1]).all()


def test_what_is_written_is_read_back() -> None:
    generator = np.random.default_rng(3)
    depth = generator.uniform(0.7, 10, (H, W)).astype(np.float32)
    for scale in ("linear", "log"):
        codes = depth_codes(depth, 0.7, 10, scale)
        again = as_depth(codes, 0.7, 10, scale, 16, None, fault)
        assert again == pytest.approx(depth, rel=1e-3)
    normals = generator.normal(size=(H, W, 3))
    normals /= np.linalg.norm(normals, axis=2, keepdims=True)
    assert as_normals(normal_bytes(normals), None, fault) == pytest.approx(normals, abs=0.02)
