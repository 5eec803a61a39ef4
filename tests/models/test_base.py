"""Finding a base model: what is found, and one line for what is not."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import load_model, load_tokenizer


def fault(name: str, beside: Path | None = None) -> str:
    with pytest.raises(UsageError) as caught:
        find_base_model(name, beside)
    (line,) = caught.value.lines
    assert line.startswith("base_model: ") or name in line
    return line


def load(folder: Path) -> Any:
    base = find_base_model(str(folder))
    return load_model(base, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture
def copied(stories_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stories_folder, tmp_path / "copied"))


def test_a_folder(stories_folder: Path) -> None:
    found = find_base_model(str(stories_folder))
    assert found.folder == stories_folder.resolve()
    assert found.revision is None
    assert found.identity() == {
        "name": str(stories_folder),
        "revision": None,
        "fingerprint": found.fingerprint,
        "tokenizer": found.tokenizer,
        "chat_template": None,
    }
    assert found.changes_since(found.identity()) == ""


def test_a_folder_beside_the_recipe(copied: Path) -> None:
    assert find_base_model("copied", beside=copied.parent).folder == copied.resolve()


def test_a_copy_has_the_same_fingerprint(stories_folder: Path, copied: Path) -> None:
    one, two = find_base_model(str(stories_folder)), find_base_model(str(copied))
    assert one.fingerprint == two.fingerprint


def test_other_weights_have_another_fingerprint(copied: Path) -> None:
    before = find_base_model(str(copied)).fingerprint
    tensors = load_file(copied / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    assert find_base_model(str(copied)).fingerprint != before


def test_another_configuration_has_another_fingerprint(copied: Path) -> None:
    before = find_base_model(str(copied)).fingerprint
    content = json.loads((copied / "config.json").read_text())
    content["rms_norm_eps"] = 1e-6
    (copied / "config.json").write_text(json.dumps(content))
    assert find_base_model(str(copied)).fingerprint != before


@pytest.mark.parametrize(
    "name", ["./missing", "/missing/folder", "missing.gguf", "~/missing-model"]
)
def test_a_path_that_is_not_there(name: str) -> None:
    assert fault(name) == f"base_model: '{name}' does not exist"


def test_a_name_that_is_nothing() -> None:
    line = fault("smolm2-135m")
    assert "did you mean 'smollm2-135m'?" in line
    assert "is no alias, folder, .gguf file or hub id" in line


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(b"x")
    assert "is neither a folder nor a .gguf file" in fault(str(file))


def test_a_folder_without_configuration(tmp_path: Path) -> None:
    assert "holds no config.json" in fault(str(tmp_path))


def test_a_folder_without_weights(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    assert "holds no safetensors weights" in fault(str(copied))


@pytest.mark.parametrize("content", [b"", b"GG", b"not a model at all"])
def test_a_gguf_file_that_is_none(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    assert "not a GGUF file" in fault(str(file))


def test_a_gguf_file_that_is_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF\x03\x00\x00\x00\x05\x00\x00")
    assert "model.gguf" in fault(str(file))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "name", ["nobody-at-all/no-such-model", "owner/two--hyphens", "owner/.dot"]
)
def test_a_hub_model_that_cannot_be_had(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    started = time.monotonic()
    line = fault(name)
    assert time.monotonic() - started < 5
    assert f"'{name}' is no folder here and cannot be had from the hub" in line


def test_a_folder_without_a_tokenizer(copied: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (copied / file).unlink()
    with pytest.raises(UsageError, match="tokenizer"):
        load_tokenizer(find_base_model(str(copied)))


def test_a_folder_with_a_model_of_an_unknown_kind(copied: Path) -> None:
    content = json.loads((copied / "config.json").read_text())
    content |= {"model_type": "no-such-model", "architectures": ["NoSuchModel"]}
    (copied / "config.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="cannot be loaded") as caught:
        load(copied)
    assert len(caught.value.lines) == 1


def test_a_folder_with_damaged_weights(copied: Path) -> None:
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UsageError, match="cannot be loaded") as caught:
        load(copied)
    assert len(caught.value.lines) == 1


def test_a_folder_that_lacks_a_weight(copied: Path) -> None:
    """transformers fills a missing weight with random numbers and only warns."""
    tensors = load_file(copied / "model.safetensors")
    del tensors["model.layers.2.self_attn.q_proj.weight"]
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"layers\.2\.self_attn\.q_proj"):
        load(copied)


def test_everything_loaded_is_frozen(stories_folder: Path) -> None:
    model = load(stories_folder)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_a_conversion_parses_its_file_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often transformers asks; a vocabulary of 262 thousand takes seconds each time."""
    import gguf

    from mtl_lora_cli.models.gguf import _read_once

    parsed: list[str] = []
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: parsed.append(path) or object())
    usual = gguf.GGUFReader
    with pytest.raises(ZeroDivisionError), _read_once():
        assert gguf.GGUFReader("a") is gguf.GGUFReader("a")
        raise ZeroDivisionError
    assert parsed == ["a"]
    assert gguf.GGUFReader is usual
