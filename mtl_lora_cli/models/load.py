"""Loading a base model and its tokenizer for packed rows."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from mtl_lora_cli.adapters.inject import Adapter, inject
from mtl_lora_cli.adapters.methods.base import Settings
from mtl_lora_cli.engine.plan import text_body
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.machine import collector, heap
from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.models.four_bit_experts import quantise_experts, quantising_stacks
from mtl_lora_cli.models.left_out import left_out_lines, note_left_out
from mtl_lora_cli.models.prequantised import expanding, method_of
from mtl_lora_cli.models.quiet import quiet_loading
from mtl_lora_cli.models.straight import straight_to
from mtl_lora_cli.models.unread import unread_line

BUILDING = threading.RLock()
"""Held while transformers builds a model: it sets torch's default dtype meanwhile, which is every thread's."""


def load_config(base: BaseModel) -> Any:
    """The base model's configuration, as transformers reads it, with all dropout off.

    The base model is frozen: what it drops would only be noise around what the adapter learns, and another
    function than the one that is evaluated and merged. The adapter's own dropout is `adapter.dropout`.

    Raises:
        UsageError: transformers does not know the kind of model, or knows it by code in the model's own
            folder, which is never run.
    """
    from transformers import AutoConfig

    try:
        return _without_dropout(AutoConfig.from_pretrained(base.folder, trust_remote_code=False))
    except (OSError, ValueError, KeyError, TypeError) as error:
        if "trust_remote_code" in str(error):
            raise UsageError(
                f"base_model: '{base.name}': its folder brings Python code of its own, which is never "
                "run; use a model that transformers knows itself"
            ) from None
        raise UsageError(
            f"base_model: '{base.name}' cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from None


def _without_dropout(config: Any) -> Any:
    """Set every probability of dropping something to 0: `attention_dropout`, `resid_pdrop`, `layerdrop`, …"""
    parts = [config, *(part for part in vars(config).values() if hasattr(part, "to_dict"))]
    for part in parts:
        for name, value in list(vars(part).items()):
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)
    return config


def _first_attention(kind: Any, config: Any) -> str | None:
    """None where attention can be chosen later; otherwise the way that transformers tests against."""
    found = kind._model_mapping[type(config)]
    classes = found if isinstance(found, list | tuple) else [found]
    return None if all(one._can_set_attn_implementation() for one in classes) else "eager"


def text_config(config: Any) -> Any:
    """The part of a configuration that describes the language model: its own, or of a wrapper's part."""
    return config.get_text_config()


def longest_of(config: Any) -> int:
    """Positions that a model knows; 2³¹ where its configuration sets no limit."""
    found = getattr(text_config(config), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else 2**31


def model_class(base: BaseModel, config: Any) -> Any:
    """transformers' class for the language model of a configuration, in its wrapper if it has one.

    Raises:
        UsageError: there is none.
    """
    found = auto_class(config)
    if found is None:
        raise UsageError(
            f"base_model: '{base.name}': transformers knows no causal language model of type "
            f"'{config.model_type}'"
        )
    return found


def auto_class(config: Any) -> Any | None:
    """transformers' class for a configuration of a language model or of a wrapper's; None: there is none."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    classes = (AutoModelForCausalLM, AutoModelForImageTextToText)
    return next((auto for auto in classes if type(config) in auto._model_mapping), None)


def skeleton(base: BaseModel, kind: Any = None) -> Any:
    """A base model on the meta device: its modules and shapes, and no weight.

    Args:
        base: of which the configuration is read.
        kind: transformers' class; None: the one that loads it.

    Raises:
        UsageError: as `load_config` and `model_class`.
    """
    config = load_config(base)
    with BUILDING, torch.device("meta"):
        return model_class(base, config).from_config(config) if kind is None else kind(config)


def on_meta(base: BaseModel, config: Settings, tasks: Sequence[str]) -> tuple[Any, Adapter]:
    """A base model and its adapter without a weight, from the model's configuration alone.

    Raises:
        UsageError: the configuration is of no known model, or the adapter fits nothing in it.
    """
    model = skeleton(base)
    with torch.device("meta"):
        return model, adapt(model, config, tasks)


def load_tokenizer(base: BaseModel) -> Any:
    """The base model's tokenizer.

    Raises:
        UsageError: there is none, or none that knows the places of its tokens in the text.
    """
    from transformers import AutoTokenizer

    config = load_config(base)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            base.folder, config=config, trust_remote_code=False
        )
    except (
        Exception
    ) as error:  # whatever a damaged file makes tokenizers raise, a bare Exception too
        raise UsageError(
            f"base_model: '{base.name}': no tokenizer: {' '.join(str(error).split())[:200]}"
        ) from None
    if not tokenizer.is_fast:
        raise UsageError(
            f"base_model: '{base.name}': its tokenizer has no fast version (tokenizer.json)"
        )
    # What does not fit is counted and handled where it shows, not warned of in passing.
    tokenizer.model_max_length = 10**9
    tokenizer.beyond = Beyond(tokenizer.get_vocab(), config)
    tokenizer.vision = cache(partial(_vision, base, config, tokenizer))
    return tokenizer


def _vision(
    base: BaseModel, config: Any, tokenizer: Any, size: tuple[int, int] | None = None
) -> Any:
    from mtl_lora_cli.models.vision import find_vision

    return find_vision(base, config, tokenizer, size)


class Beyond:
    """The tokens of a tokenizer for which its model has no row in the embedding.

    Some are there and never used, such as a token for padding; where a text has one, it is an error.

    Args:
        vocabulary: token → id.
        config: of the model.
    """

    def __init__(self, vocabulary: Mapping[str, int], config: Any) -> None:
        self.rows = getattr(config.get_text_config(), "vocab_size", None) or 2**31
        self.tokens = {number: token for token, number in vocabulary.items() if number >= self.rows}

    def require_known(self, ids: Iterable[int | None]) -> None:
        """Refuse ids that the model does not have.

        Raises:
            UsageError: naming the first one.
        """
        if not self.tokens:
            return
        for number in ids:
            if number in self.tokens:
                raise UsageError(
                    f"base_model: the tokenizer gives token {number} ('{self.tokens[number]}'), the "
                    f"model has {self.rows} (0 to {self.rows - 1})"
                )


def load_model(
    base: BaseModel,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str = "none",
    storage: torch.dtype = torch.uint8,
    tower: bool = False,
) -> Any:
    """The frozen base model, for `PackedModel`.

    Args:
        base: where it lies.
        dtype: of the weights, and of the computation where the weights are 4-bit.
        device: where it goes.
        quantization: `none`, `nf4` or `fp4` (bitsandbytes, double quantisation; experts, too), or `int8`.
        storage: in what 4-bit values are kept, two a byte. ZeRO stage 3 wants `dtype`: it cuts and
            gathers weights as numbers of one kind.
        tower: of a model that reads pictures, tower and projector are quantised, too.

    Raises:
        UsageError: the folder holds no causal language model that transformers knows, or one that is
            quantised in a way that cannot be trained around.
    """
    config = load_config(base)
    kept = None if quantization == "none" or tower else _sixteen_bit(base, config)
    how = expanding(base, quantization) or bits_and_bytes(quantization, dtype, storage, kept)
    try:
        with BUILDING, quiet_loading(), quantising_stacks(quantization), straight_to(device):
            kind = model_class(base, config)
            model, loading = kind.from_pretrained(
                base.folder,
                config=config,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=dtype,
                device_map={"": device},
                output_loading_info=True,
                attn_implementation=_first_attention(kind, config),
                **({} if how is None else {"quantization_config": how}),
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise UsageError(
            f"base_model: '{base.name}' cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from None
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers would fill them with random numbers and go on
        raise UsageError(
            f"base_model: '{base.name}': {len(missing)} weights are missing, the first is {missing[0]}"
        )
    note_left_out(model, loading["unexpected_keys"])
    quantise_experts(model, quantization, storage)
    if method_of(base) is not None:
        compute_in(model, dtype)
    collector.loaded()
    heap.keep_freed(device)
    return model.requires_grad_(False).eval()


def load_for_float32(
    base: BaseModel,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str = "none",
    tower: bool = False,
) -> Any:
    """The frozen base model computing in float32: its weights' own rounding stays, sums add none.

    Args:
        base: where it lies.
        dtype: from which weights are quantised to 4 bits, and that the others have beside those. Without
            quantisation all weights are what the files store.
        device: where it goes.
        quantization: `none`, `nf4` or `fp4`.
        tower: as of `load_model`.

    Raises:
        UsageError: as `load_model`.
    """
    if quantization == "none":
        return load_model(base, dtype=torch.float32, device=device)
    model = load_model(base, dtype=dtype, device=device, quantization=quantization, tower=tower)
    compute_in(model, torch.float32)
    return model


def compute_in(model: Any, dtype: torch.dtype) -> None:
    """Let a model with quantised weights compute in a dtype: those stay, what they are expanded to changes.

    transformers itself refuses to, and where files are quantised already it leaves all else as they have it.
    """
    halves = (torch.float16, torch.bfloat16)
    for layer in model.modules():
        for name, value in (*layer._parameters.items(), *layer._buffers.items()):
            state = getattr(value, "quant_state", None)
            if state is not None:
                layer.compute_dtype = state.dtype = dtype
            elif isinstance(value, nn.Parameter) and value.is_floating_point():
                value.data = value.data.to(dtype)
            elif value is not None and value.dtype in halves:
                layer._buffers[name] = value.to(dtype)


def bits_and_bytes(
    quantization: str,
    dtype: torch.dtype,
    storage: torch.dtype = torch.uint8,
    kept: list[str] | None = None,
) -> Any:
    """transformers' configuration of a `quantization`, as `load_model` takes it; None for `none`.

    Args:
        quantization, dtype, storage: as there.
        kept: paths of modules that are not quantised; None: what transformers keeps of its own accord.
    """
    from transformers import BitsAndBytesConfig

    if quantization == "none":
        return None
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=storage,
        llm_int8_skip_modules=kept,
    )


def _sixteen_bit(base: BaseModel, config: Any) -> list[str] | None:
    """What is not quantised of a model that reads pictures: the head, and all beside the language part."""
    from mtl_lora_cli.models.vision import vision_class

    if vision_class(config) is None:
        return None
    model = skeleton(base)
    head = model.get_output_embeddings()
    return [name for name, one in model.named_modules() if one is head] + list(beside_of(model))


def language_part(model: Any) -> tuple[str, ...]:
    """Paths of the modules that read text: the body, and what stands behind it; no tower beside it."""
    body = text_body(model)
    names = {id(module): name for name, module in model.named_modules()}
    path = names.get(id(body), "")
    around = path.split(".")[0] if path else ""
    behind = [name for name, _ in model.named_children() if name != around]
    return (path, *behind)


def adapt(model: Any, config: Settings, tasks: Sequence[str]) -> Adapter:
    """Put an adapter into the part of a model that reads text; what learns whole lies beside it.

    A target that names a tower (`vision_tower.*.q_proj`, `*.visual.blocks.*.qkv`) is for that tower's layers.

    Raises:
        UsageError: as `inject`.
    """
    within = language_part(model)
    named = in_tower(model, config.target_modules)
    if not config.whole_modules and not named:
        adapter = inject(model, config, tasks, within=within)
    else:
        beside = beside_of(model)
        places = dict.fromkeys(named, beside)
        adapter = inject(model, config, tasks, within=within, whole_in=beside, places=places)
        unread = unread_line(model, adapter.layers)
        adapter.remarks += [] if unread is None else [unread]
    adapter.remarks += left_out_lines(model)
    return adapter


def in_tower(model: Any, targets: Sequence[str]) -> list[str]:
    """Those of `adapter.target_modules` that name a tower or its projector by its own path."""
    names = {path.rpartition(".")[2] for path in beside_of(model)}
    parts = {target: {part.strip("*?") for part in target.split(".")} for target in targets}
    return [target for target, own in parts.items() if names & own]


def beside_of(model: Any) -> tuple[str, ...]:
    """Paths of the modules beside the part that reads text: a tower and its projector."""
    within = language_part(model)
    body = within[0].rpartition(".")[0]
    around = model.get_submodule(body)
    paths = [f"{body}.{name}" if body else name for name, _ in around.named_children()]
    return tuple(path for path in paths if path not in within)
