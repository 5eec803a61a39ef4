"""Weights read by our reader are safetensors' own, however transformers asks for them; files are read ahead."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.models import read_ahead, straight
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import load_model

CPU = torch.device("cpu")
on_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def several(stories_folder: Path, tmp_path: Path) -> Path:
    """A model in two files: matrices in bfloat16, and norms in float32."""
    folder = Path(shutil.copytree(stories_folder, tmp_path / "several"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = {n: t.bfloat16() if t.ndim > 1 else t for n, t in tensors.items()}
    names, weight_map = sorted(halves), {}
    for number in range(2):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        part = {name: halves[name] for name in names[number::2]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("piece", [1000, straight._PIECE])
def test_every_tensor_is_the_files(
    several: Path, dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces that end within a number, too."""
    monkeypatch.setattr(straight, "_PIECE", piece)
    reads: list[str] = []
    read = straight._Reader.read

    def noted(self: straight._Reader, place: straight._Place, *form: object) -> torch.Tensor:
        reads.append(place.path)
        return read(self, place, *form)  # type: ignore[arg-type]

    monkeypatch.setattr(straight._Reader, "read", noted)
    with straight.reading_to(CPU):
        model = load_model(find_base_model(str(several)), dtype=dtype, device=CPU)
    files = [load_file(path) for path in sorted(several.glob("*.safetensors"))]
    stored = files[0] | files[1]
    assert len(reads) == len(stored)
    own = model.state_dict()
    for name, tensor in stored.items():
        assert torch.equal(own[name], tensor.to(dtype)), name


def test_a_file_that_is_cut_short_is_refused(several: Path) -> None:
    path = max(several.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UsageError, match="cannot be loaded"), straight.reading_to(CPU):
        load_model(find_base_model(str(several)), dtype=torch.float32, device=CPU)


def in_memory(path: Path) -> bool:
    """Whether the system has a file's last page at hand; asking does not fetch it, as reading without waiting does."""
    size = path.stat().st_size
    found = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None).mincore(
            ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), found
        )
        del first  # a mapping that is referred to is not closed
    if failed:
        pytest.skip("this system does not say what it has at hand")
    return bool(found[-1] & 1)


def test_a_models_files_are_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "base" / "model.safetensors"
    file.parent.mkdir()
    file.write_bytes(os.urandom(2**23))

    def forget() -> None:
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    forget()
    if in_memory(file):
        pytest.skip("this file system lies in memory")
    read_ahead.read_ahead("base", beside=tmp_path)
    deadline = time.monotonic() + 10
    while not in_memory(file):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    while in_memory(file):  # pages may be on their way in
        forget()
        assert time.monotonic() < deadline
    monkeypatch.setattr(read_ahead, "_free", lambda: 2**23)  # it would take most of it
    read_ahead.read_ahead(file.parent)
    time.sleep(0.1)
    assert not in_memory(file)
    read_ahead.read_ahead("no-such/model")


def test_afterwards_transformers_reads_as_ever(stories_folder: Path) -> None:
    from transformers import modeling_utils

    before = modeling_utils.safe_open
    with pytest.raises(ZeroDivisionError), straight.reading_to(CPU):
        assert modeling_utils.safe_open is not before
        1 / 0  # noqa: B018
    assert modeling_utils.safe_open is before


@pytest.mark.cuda
@on_card
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_on_a_card_it_is_what_transformers_reads(several: Path, quantization: str) -> None:
    base, card = find_base_model(str(several)), torch.device("cuda", 0)
    how = {"dtype": torch.bfloat16, "device": card, "quantization": quantization}
    ours = load_model(base, **how).state_dict()  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "mtl_lora_cli.models.load.straight_to", lambda device: straight.straight_to(CPU)
        )
        theirs = load_model(base, **how).state_dict()  # type: ignore[arg-type]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
