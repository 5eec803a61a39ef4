"""Real instruction files, read as they are: those that LLaMA-Factory's source archive ships.

pip download --no-deps --no-binary :all: llamafactory==0.9.5   (llamafactory-0.9.5/data of the archive)
MTL_LORA_INSTRUCT=FOLDER pytest tests/data/test_instruct_files.py
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from mtl_lora_cli.data.encoded import encode_split
from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.data.prepare import read_examples
from mtl_lora_cli.recipe.conversation import ConversationSettings
from mtl_lora_cli.recipe.schema import Chat
from mtl_lora_cli.recipe.source import Source
from mtl_lora_cli.tasks.registry import find_template
from mtl_lora_cli.tasks.task import Task, overlaid

pytest.importorskip("trl", reason="trl is not installed: pip install --no-deps trl")
from .test_chat_templates import TEMPLATES, tokenizer_of

FOLDER = Path(os.environ.get("MTL_LORA_INSTRUCT", "instruct"))
FILES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "alpaca_en_demo.json": ("alpaca", 999, {}),
    "identity.json": ("alpaca", 91, {"system": "Be brief."}),
    "glaive_toolcall_en_demo.json": ("sharegpt", 300, {}),
    "glaive_toolcall_zh_demo.json": ("sharegpt", 300, {"learn": "last"}),
    "c4_demo.jsonl": ("completion", 300, {}),
    "v1_sft_demo.jsonl": ("messages", 500, {"learn": {"field": "loss_weight"}}),
    "reason_tool_use_demo_50.jsonl": ("messages", 50, {}),
}

if not FOLDER.is_dir():
    pytest.skip(f"no folder {FOLDER}: MTL_LORA_INSTRUCT names it", allow_module_level=True)


@pytest.mark.parametrize("name", FILES)
def test_every_row_is_read_and_encoded(name: str) -> None:
    """Tokens are the template's own rendering, and what is learned of each row is its answers' words."""
    form, count, keys = FILES[name]
    full, path, template = find_template(f"instruct/{form}", None)
    given = ConversationSettings.model_validate(keys) if keys else None
    source = Source(path=str((FOLDER / name).resolve()))
    task = Task(
        "t", 0, full, path.read_text(), overlaid(template, given), source, "conversation", given
    )
    found = read_examples(task, "train")
    assert found is not None and len(found.examples) == count
    tokenizer = tokenizer_of("qwen3", TEMPLATES["qwen3"])
    encoder = Encoder(tokenizer, "chat", Chat(date="2026-11-30"))
    split = encode_split(
        found.examples, found.wheres, encoder, task="t", limit=10**6, on_overflow="error"
    )
    for number, example in enumerate(found.examples):
        talk = example.dialogue
        assert talk is not None
        tokens = split.example(number).tolist()
        said = tokenizer.decode(split.example(number)[split.learned(number)])
        wanted = [
            m["content"] for m, counted in zip(talk.messages, talk.counts, strict=True) if counted
        ]
        others = [m["content"] for m in talk.messages if m["role"] in ("user", "tool")]
        if talk.is_text:
            assert tokenizer.decode(tokens).startswith(talk.messages[0]["content"])
            continue
        assert all(text.rpartition("</think>")[2].strip() in said for text in wanted)
        assert not any(len(text) > 40 and text in said for text in others)
        whole = tokenizer.apply_chat_template(
            [dict(m) for m in talk.messages], tools=list(talk.tools) or None, tokenize=True
        )["input_ids"]
        assert tokens == whole[: len(tokens)]
