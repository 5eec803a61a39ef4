"""A LoRA as an adapter's GGUF file, and what llama.cpp is held against when it reads one.

llama.cpp adds (alpha / r) B A x of each pair `NAME.lora_a` [r, in], `NAME.lora_b` [out, r], with one
alpha for all and the r of each. The method's own factor s goes into B, and so does r / alpha where a
layer's rank is not the largest. The rows of B for q and k are in llama.cpp's order, see `gguf_model`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gguf import GGUFType, Keys

from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.errors import CheckError
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.export.gguf_model import Dialect, is_known, write_model, writing
from mtl_lora_cli.export.llama_converter import convert_model
from mtl_lora_cli.export.merge import Update
from mtl_lora_cli.export.questions import Questions
from mtl_lora_cli.models.load import load_config


def write_adapter(
    updates: Mapping[str, Update], dialect: Dialect, path: Path, *, title: str
) -> None:
    """Write an adapter's GGUF file, float32.

    Args:
        updates: weight → A' [k, in], B' [out, k], s.
        dialect: of the base model.
        path: the file.
        title: `general.name`.

    Raises:
        UsageError: llama.cpp has no name for a weight.
    """
    alpha = max(len(down) for down, _, _ in updates.values())
    with writing(path, dialect) as writer:
        writer.add_type(GGUFType.ADAPTER)
        writer.add_name(title)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, float(alpha))
        for weight, (down, up, scale) in updates.items():
            name = dialect.name(weight)
            scaled = dialect.rows(weight, up * (scale * len(down) / alpha))
            writer.add_tensor(f"{name}.lora_a", down.contiguous().numpy())
            writer.add_tensor(f"{name}.lora_b", scaled.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


@contextmanager
def base_file(run: Run, folder: Path) -> Iterator[Path]:
    """The base model as a GGUF file that lies in the folder for a while."""
    with TemporaryDirectory(dir=folder) as scratch:
        path = Path(scratch) / "base.gguf"
        if is_known(load_config(run.base)):
            write_model(run.base.folder, path, title=run.base.name, dtype=run.dtype)
        else:
            convert_model(run.base.folder, path, title=run.base.name, dtype=run.dtype)
        yield path


def require_same_tokens(questions: Questions, opened: Any) -> None:
    tokenizer = questions.run.tokenizer
    encoder = Encoder.of(tokenizer, questions.run.recipe, lenient=True)
    examples = questions.examples.examples
    starts = tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    for text in encoder.prompts([f"{one.prompt} {one.answer}" for one in examples]):
        ours = tokenizer(text)["input_ids"]
        theirs = opened.tokenize(text.encode(), add_bos=starts, special=True)
        if ours != theirs:
            raise CheckError(
                f"llama.cpp makes other tokens of a prompt of task '{questions.task.name}': "
                f"{theirs[:12]} instead of {ours[:12]} of {text[:40]!r}"
            )
