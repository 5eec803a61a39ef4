"""Bad base models."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .mistakes import POINTER, TRAIN, Bad, recipe

CASES = [
    Bad(
        "no such folder",
        ("base_model: './nowhere' does not exist",),
        (*TRAIN, "base_model=./nowhere"),
        early=False,
    ),
    Bad(
        "a folder that holds no model",
        ("base_model: 'empty': TMP/empty holds no config.json",),
        (*TRAIN, "base_model=empty"),
        {"empty/x.txt": "x"},
        early=False,
    ),
    Bad(
        "no such GGUF file",
        ("base_model: 'models/nowhere.gguf' does not exist",),
        (*TRAIN, "base_model=models/nowhere.gguf"),
        early=False,
    ),
    Bad(
        "a GGUF file that is none",
        ("TMP/text.gguf: not a GGUF file (it starts with b'text', expected b'GGUF')",),
        (*TRAIN, "base_model=text.gguf"),
        {"text.gguf": "text"},
        early=False,
    ),
    Bad(
        "a hub id that cannot be had",
        (
            "base_model: 'nobody/nothing' is no folder here and cannot be had from the hub: …",
        ),
        (*TRAIN, "base_model=nobody/nothing"),
        early=False,
    ),
    Bad(
        "unknown alias",
        (
            "base_model: 'smollm2-135' is no alias, folder, .gguf file or hub id; "
            "did you mean 'smollm2-135m'?; aliases: smollm2-135m, dinov2-small, smollm2-135m-vision",
        ),
        (*TRAIN, "base_model=smollm2-135"),
        early=False,
    ),
    Bad(
        "a base model that is a Git LFS pointer",
        ("TMP/base/model.safetensors is a Git LFS pointer, not the file: git lfs pull",),
        files={
            **recipe("STORIES", "base"),
            "base/config.json": '{"model_type": "llama"}',
            "base/model.safetensors": POINTER,
        },
        early=False,
    ),
    Bad(
        "a GGUF file that is a Git LFS pointer",
        ("TMP/base.gguf is a Git LFS pointer, not the file: git lfs pull",),
        (*TRAIN, "base_model=base.gguf"),
        {"base.gguf": POINTER},
        early=False,
    ),
    Bad(
        "a base model that is a pickle",
        (
            "base_model: 'base': TMP/base holds no safetensors weights; pytorch_model.bin is a pickle, "
            "which can run any code when it is read: save the model as safetensors on a machine where "
            "you trust it",
        ),
        files={
            **recipe("STORIES", "base"),
            "base/config.json": '{"model_type": "llama"}',
            "base/pytorch_model.bin": "x",
        },
        early=False,
    ),
    Bad(
        "a base model with code of its own",
        (
            "base_model: 'base': its folder brings Python code of its own, which is never run; use a "
            "model that transformers knows itself",
        ),
        files={
            **recipe("STORIES", "base"),
            "base/config.json": '{"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}',
            "base/code.py": "raise SystemExit('it ran')",
            "base/model.safetensors": "x",
        },
        early=False,
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(case: Bad, refused: Callable[[Bad], None]) -> None:
    refused(case)
