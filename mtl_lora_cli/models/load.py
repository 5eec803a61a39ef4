"""Loading a base model and its tokenizer for packed rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.models import attention
from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.models.quiet import quiet_loading


def pick_device() -> torch.device:
    """The CUDA device of this process, or the CPU."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that `dtype:` asks for; `auto` is bfloat16 on CUDA and float32 on a CPU.

    bfloat16 on a CPU without the instructions for it is about ten times slower than float32.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_config(base: BaseModel) -> Any:
    """The base model's configuration, as transformers reads it.

    Raises:
        UsageError: transformers does not know the kind of model, or knows it by code in the model's own
            folder, which is never run.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if "trust_remote_code" in str(error):
            raise UsageError(
                f"base_model: '{base.name}': its folder brings Python code of its own, which is never "
                "run; use a model that transformers knows itself"
            ) from None
        raise UsageError(
            f"base_model: '{base.name}' cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from None


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
    return tokenizer


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
) -> Any:
    """The frozen base model, ready for packed rows.

    Args:
        base: where it lies.
        dtype: of the weights, and of the computation where the weights are 4-bit.
        device: where it goes.
        quantization: `none`, `nf4` or `fp4` (bitsandbytes, double quantisation), or `int8`.
        storage: in what 4-bit values are kept, two a byte. ZeRO stage 3 wants `dtype`: it cuts and
            gathers weights as numbers of one kind.

    Raises:
        UsageError: the folder holds no causal language model that transformers knows.
    """
    from transformers import AutoModelForCausalLM

    attention.register()
    config = load_config(base)
    try:
        with quiet_loading():
            model, loading = AutoModelForCausalLM.from_pretrained(
                base.folder,
                config=config,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=dtype,
                device_map={"": device},
                attn_implementation=attention.NAME,
                output_loading_info=True,
                quantization_config=bits_and_bytes(quantization, dtype, storage),
            )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UsageError(
            f"base_model: '{base.name}' cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from None
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers would fill them with random numbers and go on
        raise UsageError(
            f"base_model: '{base.name}': {len(missing)} weights are missing, the first is {missing[0]}"
        )
    return model.requires_grad_(False).eval()


def load_for_float32(
    base: BaseModel, *, dtype: torch.dtype, device: torch.device, quantization: str = "none"
) -> Any:
    """The frozen base model computing in float32: its weights' own rounding stays, sums add none.

    Args:
        base: where it lies.
        dtype: from which weights are quantised to 4 bits, and that the others have beside those. Without
            quantisation all weights are what the files store.
        device: where it goes.
        quantization: `none`, `nf4` or `fp4`.

    Raises:
        UsageError: as `load_model`.
    """
    if quantization == "none":
        return load_model(base, dtype=torch.float32, device=device)
    model = load_model(base, dtype=dtype, device=device, quantization=quantization)
    compute_in_float32(model)
    return model


def compute_in_float32(model: Any) -> None:
    """Widen a model with 4-bit weights: those stay, and all that is computed with them is float32."""
    nn.Module.float(model)  # transformers' own refuses to, for weights that this leaves as they are
    for layer in model.modules():
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        if state is not None:
            layer.compute_dtype = state.dtype = torch.float32


def bits_and_bytes(
    quantization: str, dtype: torch.dtype, storage: torch.dtype = torch.uint8
) -> Any:
    """transformers' configuration of a `quantization`, as `load_model` takes it; None for `none`."""
    from transformers import BitsAndBytesConfig

    if quantization == "none":
        return None
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=storage,
    )
