"""A transformers folder as one GGUF file for llama.cpp.

For LLaMA's own kind llama.cpp turns neighbours 2i and 2i + 1 of a head by one angle, transformers turns
i and i + d/2. Its files make up for that: the rows of q and of k are interleaved within each head,
[2, d/2] → [d/2, 2] (`LlamaModel.permute` in llama.cpp's converter). Whoever reads such a file back and
undoes it never notices a row in the wrong place; only running it does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from gguf import (
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFType,
    GGUFWriter,
    TensorNameMap,
    get_tensor_name_map,
)
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig

from mtl_lora_cli.engine.families import plan_of
from mtl_lora_cli.engine.plan import NotPlanned, Plan
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.export.gguf_tokenizer import add_tokenizer, rule_of
from mtl_lora_cli.export.shards import Stored, matrix_dtypes, read_shard
from mtl_lora_cli.models.files import weight_files

# transformers' model type → llama.cpp's architecture, and whether it interleaves the rows of q and k
_ARCHITECTURES = {
    "llama": (MODEL_ARCH.LLAMA, True),
    "mistral": (MODEL_ARCH.LLAMA, True),
    "qwen2": (MODEL_ARCH.QWEN2, False),
    "qwen3": (MODEL_ARCH.QWEN3, False),
}
_SUFFIXES = (".weight", ".bias")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_TYPES = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
}


@dataclass(frozen=True)
class Dialect:
    """How llama.cpp's files name a model's weights and order their rows.

    Attributes:
        architecture: `general.architecture`.
        names: module path → its name there.
        heads: parts of the path of a module whose rows are interleaved → its number of heads.
    """

    architecture: str
    names: TensorNameMap
    heads: dict[str, int]

    def name(self, weight: str) -> str:
        """llama.cpp's name of a weight or bias.

        Raises:
            UsageError: it has none.
        """
        name = self.names.get_name(weight, try_suffixes=_SUFFIXES)
        if name is None:
            raise UsageError(
                f"llama.cpp's {self.architecture} has no weight that is '{weight}'; "
                "it cannot be exported to GGUF"
            )
        return name

    def rows(self, weight: str, tensor: Tensor) -> Tensor:
        """A weight [out, in], B [out, r] or bias [out] of that name, its rows in llama.cpp's order."""
        heads = self.heads.get(weight.rpartition(".")[0].rpartition(".")[2])
        if heads is None:
            return tensor
        parts = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
        return parts.swapaxes(1, 2).reshape(tensor.shape)


def is_known(config: Any) -> bool:
    """Whether llama.cpp's form of this type of model is known here; else its own converter knows it, or nobody."""
    return config.model_type in _ARCHITECTURES


def dialect_of(config: Any) -> Dialect:
    """The dialect for a transformers configuration.

    Raises:
        UsageError: llama.cpp's form of this model is not known here.
    """
    kind = config.model_type
    if kind not in _ARCHITECTURES:
        raise UsageError(
            f"a model of type '{kind}' cannot be exported to GGUF; "
            f"types known here: {', '.join(_ARCHITECTURES)}"
        )
    architecture, interleaved = _ARCHITECTURES[kind]
    attention = _plan(config).attentions[0]
    q, k = (path.rpartition(".")[2] for path in attention.qkv[:2])
    heads = {q: attention.heads, k: attention.key_heads}
    return Dialect(
        MODEL_ARCH_NAMES[architecture],
        get_tensor_name_map(architecture, config.num_hidden_layers),
        heads if interleaved else {},
    )


def _plan(config: Any) -> Plan:
    try:
        return plan_of(config)
    except NotPlanned as reason:
        raise UsageError(f"this model cannot be exported to GGUF: {reason}") from None


@contextmanager
def writing(path: Path, dialect: Dialect) -> Iterator[GGUFWriter]:
    """A writer for one file, closed at the end."""
    writer = GGUFWriter(path, dialect.architecture)
    try:
        yield writer
    finally:
        writer.close()


def require_writable(config: Any, tokenizer: Any = None) -> None:
    """Refuse a model that `write_model` cannot write, before anything else is done.

    Raises:
        UsageError: llama.cpp's form of this model, its positions or its tokenizer is not known here.
    """
    dialect_of(config)
    _frequency_factors(config)
    plan = _plan(config)
    other = next((one.mlp.activation for one in plan.layers if one.mlp.activation != "silu"), None)
    if other is not None:
        raise UsageError(f"llama.cpp runs this kind of model with silu, not {other}")
    windows = [one.window for one in plan.attentions if one.window is not None]
    if windows and min(windows) < config.max_position_embeddings:
        raise UsageError("attention in a sliding window cannot be exported to GGUF here")
    if tokenizer is not None:
        rule_of(tokenizer)


def write_model(
    folder: Path,
    path: Path,
    *,
    title: str,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a transformers folder as one GGUF file, holding one weight in memory at a time.

    Args:
        folder: with safetensors.
        path: the file.
        title: `general.name`.
        tokenizer: the folder's; without one the file has no vocabulary and reads token ids alone.
        dtype: of the matrices; None: as they are stored. Vectors are float32, as llama.cpp wants them.

    Raises:
        UsageError: see `require_writable`; or a weight is stored in a format that is no float.
    """
    config = AutoConfig.from_pretrained(folder)
    require_writable(config, tokenizer)
    dialect, frequencies = dialect_of(config), _frequency_factors(config)

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in _stored(folder, config):
            yield dialect.name(name), _as_written(dialect.rows(name, tensor), dtype)
        if frequencies is not None:
            yield "rope_freqs.weight", frequencies

    with writing(path, dialect) as writer:
        _add_sizes(writer, config, title)
        if tokenizer is None:
            writer.add_tokenizer_model("none")
        else:
            add_tokenizer(writer, folder, tokenizer, config.vocab_size)
        for name, tensor in weights():
            data = _bytes(tensor)
            kind = _TYPES[tensor.dtype]
            writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor in weights():
            writer.write_tensor_data(_bytes(tensor))


def stored_dtypes(folder: Path) -> set[torch.dtype]:
    """The dtypes of a folder's matrices, as far as they can be written."""
    return matrix_dtypes(weight_files(folder)) & set(_TYPES)


def model_size(folder: Path, dtype: torch.dtype | None = None) -> int:
    """About the bytes that `write_model` writes."""
    return sum(
        tensor.size if dtype is None else math.prod(tensor.shape) * dtype.itemsize
        for tensor in _headers(folder)
    )


def _headers(folder: Path) -> list[Stored]:
    return [tensor for path in weight_files(folder) for tensor in read_shard(path)[0]]


def _stored(folder: Path, config: Any) -> Iterator[tuple[str, Tensor]]:
    """The weights in the order of their files, without those that follow from something else.

    transformers ties an output layer to the embedding only where files do not hold two different ones.
    """
    for shard in weight_files(folder):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                if name.endswith(".rotary_emb.inv_freq"):
                    continue
                tensor = file.get_tensor(name)
                tied = name == _HEAD and config.tie_word_embeddings
                if not (tied and torch.equal(tensor, _tensor(folder, _EMBEDDING))):
                    yield name, tensor


def _tensor(folder: Path, name: str) -> Tensor:
    for shard in weight_files(folder):
        with safe_open(shard, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                return cast(Tensor, file.get_tensor(name))
    raise UsageError(f"{folder} holds no weight '{name}'")


def _as_written(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if tensor.dtype not in _TYPES:
        kind = str(tensor.dtype).removeprefix("torch.")
        known = ", ".join(str(one).removeprefix("torch.") for one in _TYPES)
        raise UsageError(f"weights stored as {kind} cannot be exported to GGUF; expected {known}")
    return tensor.float() if tensor.dim() == 1 else tensor.to(dtype or tensor.dtype)


def _bytes(tensor: Tensor) -> Any:
    """The tensor's bytes as an array [..., bytes of a row]: numpy knows no bfloat16."""
    return tensor.contiguous().view(torch.uint8).numpy()


def _add_sizes(writer: GGUFWriter, config: Any, title: str) -> None:
    width = config.hidden_size // config.num_attention_heads
    head = getattr(config, "head_dim", None) or width
    writer.add_type(GGUFType.MODEL)
    writer.add_name(title)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


def _frequency_factors(config: Any) -> Tensor | None:
    """What each rotary frequency is divided by [d / 2], for LLaMA 3.1 and later; None for plain ones.

    Raises:
        UsageError: positions are scaled in another way.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        return None
    if kind != "llama3":
        raise UsageError(f"rotary positions of type '{kind}' cannot be exported to GGUF here")
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    steps = torch.arange(len(scaled), dtype=torch.float64) / len(scaled)
    return (config.rope_parameters["rope_theta"] ** -steps / scaled).float()
