"""An image encoder and a language model, joined to an ordinary LLaVA folder, once.

The projector between them is fresh, from a fixed seed: it has to be learned (`adapter.whole_modules`) before the language
model makes anything of a picture. It is given features of three of the encoder's layers. A picture is resized to 224 x 224, whatever its sides: 256 tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mtl_lora_cli.models.quiet import quiet_loading
from mtl_lora_cli.runs.atomic import new_folder
from mtl_lora_cli.runs.paths import cache_folder, require_cache
from mtl_lora_cli.visible import tell

CONVERSION = 2  # raise it when a folder comes out otherwise than before
_SIDE = 224
_TOKEN = "<filename>"  # of SmolLM2's control tokens one that text for reading pictures never has
_MEAN, _DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of the encoder's training


def joined_folder(alias: str, language: Path, encoder: Path) -> Path:
    """The folder of both, joining them if that was not done before.

    Args:
        alias: its name.
        language: a folder of a causal language model with its tokenizer.
        encoder: a folder of a DINOv2.

    Raises:
        UsageError: the cache cannot be written.
    """
    key = f"{language.name[-19:]}-{encoder.name[-19:]}"
    folder = cache_folder() / "models" / f"{alias}-{key}-v{CONVERSION}"
    if not folder.is_dir():
        require_cache(folder.parent)
        tell(f"joining {language.name} and {encoder.name} (once; seconds)")
        _join(language, encoder, folder)
    return folder


def _join(language: Path, encoder: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(language)
    with quiet_loading():
        text = AutoModelForCausalLM.from_pretrained(language, dtype=torch.float32)
        tower = AutoModel.from_pretrained(encoder, dtype=torch.float32)
        model = _joined(text, tower, tokenizer.convert_tokens_to_ids(_TOKEN))
    try:
        with new_folder(folder) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            _processor().save_pretrained(temporary)
    except OSError:
        if not folder.is_dir():  # another process may have been faster
            raise


def _joined(text: Any, tower: Any, token: int) -> Any:
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text.config,
        image_token_index=token,
        vision_feature_layer=levels_of(tower.config.num_hidden_layers),
        image_seq_length=(_SIDE // tower.config.patch_size) ** 2,
        tie_word_embeddings=text.config.tie_word_embeddings,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    torch.random.set_rng_state(state)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    model.tie_weights()
    return model


def levels_of(layers: int) -> list[int]:
    """Of which of an encoder's layers the projector is given the features, side by side.

    A quarter up, half-way and the last but one: early layers know colours, late ones kinds of things.
    """
    return [layers // 4, 7 * layers // 12, layers - 1]


def _processor() -> Any:
    import transformers

    pillow = hasattr(transformers, "CLIPImageProcessorPil")
    made = transformers.CLIPImageProcessorPil if pillow else transformers.CLIPImageProcessor
    return made(
        size={"height": _SIDE, "width": _SIDE},
        do_center_crop=False,
        image_mean=_MEAN,
        image_std=_DEVIATION,
    )
