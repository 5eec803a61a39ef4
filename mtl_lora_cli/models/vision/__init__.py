"""Models that read pictures, a family a file: how a picture is written in a text, and how it becomes numbers.

A processor of transformers does both at once, and some cannot be built without torchvision, since they read videos,
too. So tokenizer and image processor are taken apart here (the image processor works with Pillow alone),
and each family writes a picture's tokens as its processor would:

    @vision("llava")
    class Llava(Vision): ...

The language part reads embeddings: those of text, and in the places of picture tokens what the model's own
`get_image_features` (tower and projector) makes of the pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor

from mtl_lora_cli.errors import UsageError, did_you_mean
from mtl_lora_cli.models.base import BaseModel

Seen = Mapping[str, Tensor]  # what a model's tower takes, by the names of its arguments
KEPT = "kept"  # the beginning of names in its place, where a tower ran before
WHOLLY_KEPT = (
    f"{KEPT}.wholly"  # what takes the places of tokens; beside it deeper levels, `kept.0` and on
)


class Features(NamedTuple):
    """What a tower and its projector make of pictures.

    Attributes:
        tokens: [K, d], what takes the places of their tokens.
        deeper: [K, d] each, what is added to the stream behind each of the first layers.
    """

    tokens: Tensor
    deeper: tuple[Tensor, ...] = ()


class Vision:
    """How one base model reads pictures.

    Args:
        base: the base model.
        config: its configuration.
        tokenizer: its tokenizer.
        size: height and width that pictures get; None: what its image processor says.

    Attributes:
        whole_prompt: a prompt's tokens see each other, those behind them, too.
        in_windows: pictures' tokens see each other in layers with a window alone.
        connector: the module between tower and language part; None: it may not learn where a tower's features are
            kept, since it does not stand behind the whole tower.
        beside: what of a picture is kept beside its features.
        around: the configuration's names for the tokens before and behind a picture; None: there are none.
        token_id: of the token that stands for a part of a picture.
        behind: tokens that follow a picture's last one and belong to it.

    Raises:
        UsageError: the folder has no image processor, or the tokenizer no token for pictures.
    """

    whole_prompt: ClassVar[bool] = False
    in_windows: ClassVar[bool] = False
    connector: ClassVar[str | None] = "multi_modal_projector"
    beside: ClassVar[tuple[str, ...]] = ()
    around: ClassVar[tuple[str, str] | None] = None

    def __init__(
        self, base: BaseModel, config: Any, tokenizer: Any, size: tuple[int, int] | None = None
    ) -> None:
        self.base, self.config, self.tokenizer = base, config, tokenizer
        self.token_id = image_token_id(config)
        token = tokenizer.convert_ids_to_tokens(self.token_id)
        if token is None:
            raise UsageError(
                f"base_model: '{base.name}': its tokenizer has no token {self.token_id}, which stands for "
                "pictures in its config.json"
            )
        self.token = str(token)
        self.begin = self.end = ""
        if self.around is not None:
            numbers = [getattr(config, key) for key in self.around]
            self.begin, self.end = tokenizer.convert_ids_to_tokens(numbers)
        self.processor = _image_processor(base)
        if size is not None:
            self.resize(*size)

    def resize(self, height: int, width: int) -> None:
        """Give pictures another size than the image processor says.

        Raises:
            UsageError: the model's pictures have no size of their own.
        """
        raise UsageError(
            f"images.size: the pictures of a {self.config.model_type} have the size that its image processor says"
        )

    def text(self, height: int, width: int) -> str:
        """What stands in a text for a picture of this size, as the model's own processor writes it."""
        return f"{self.begin}{self.token * self.count(height, width)}{self.end}"

    def count(self, height: int, width: int) -> int:
        """Picture tokens of a picture of this size."""
        raise NotImplementedError

    def tokens(self, height: int, width: int) -> list[int]:
        """The same as the model reads it."""
        text = self.text(height, width)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @property
    def mark(self) -> str:
        """What the model's own chat template writes for a picture, which a processor makes `text` of."""
        return str(self.token)

    @cached_property
    def behind(self) -> int:
        """See the class."""
        end = self.text(64, 64).rpartition(self.token)[2]
        return len(self.tokenizer(end, add_special_tokens=False)["input_ids"]) if end else 0

    def look(self, picture: Image.Image) -> dict[str, Tensor]:
        """One picture as the tower takes it."""
        return dict(self.processor(images=[picture], return_tensors="pt"))

    @staticmethod
    def join(many: Sequence[Seen]) -> dict[str, Tensor]:
        """Several of them, one behind the other."""
        return {name: torch.cat([one[name] for one in many]) for name in many[0]}

    @classmethod
    def alone(cls, many: Sequence[Seen], shown: Tensor, prompt: int) -> dict[str, Tensor]:
        """What transformers' own forward pass takes beside the tokens of rows.

        Args:
            many: their pictures.
            shown: bool [B, L], which of their tokens are pictures'.
            prompt: how many tokens from the first on are a prompt.
        """
        return cls.join(many)

    def blocks(
        self, ids: Tensor, bounds: Sequence[tuple[int, int]], prompts: Sequence[int]
    ) -> Tensor | None:
        """Which tokens of a packed row see each other, as `engine.segments` has it; None: none do.

        Args:
            ids: int64 [N].
            bounds: of its examples.
            prompts: how many tokens of each example are its prompt.
        """
        return None

    def spread(self, seen: Seen) -> Tensor | None:
        """Places of a picture's tokens in several dimensions, from 0 on, int64 [G, K]; None: they stand in line."""
        return None

    @classmethod
    def towered(cls, body: Any, seen: Seen) -> list[Tensor]:
        """What the tower gives of pictures, before what may learn behind it; the first dimension is theirs.

        Args:
            body: the model around tower and language part.
            seen: of all of them, see `join`.
        """
        found: list[Tensor] = []
        assert cls.connector is not None, "it learns where that is known"
        module = body.get_submodule(cls.connector)
        hook = module.register_forward_pre_hook(
            lambda _, given, named: found.append((*given, *named.values())[0]), with_kwargs=True
        )
        try:
            body.get_image_features(**seen)
        finally:
            hook.remove()
        return found

    @classmethod
    def connected(cls, body: Any, levels: Sequence[Tensor], many: Sequence[Seen]) -> Features:
        """The inverse half of `towered`: what the language part reads.

        Args:
            body: likewise.
            levels: what `towered` gave.
            many: of each picture what else is known of it.
        """
        (level,) = levels
        assert cls.connector is not None, "as above"
        return Features(body.get_submodule(cls.connector)(level).flatten(0, -2))

    @property
    def settings(self) -> str:
        """All that decides how pictures become numbers, for fingerprints."""
        return f"{type(self).__name__} {self.processor.to_json_string()}"


_KINDS: dict[str, type[Vision]] = {}
Declared = TypeVar("Declared", bound=type[Vision])


def vision(*model_types: str) -> Callable[[Declared], Declared]:
    """Declare how models of these types read pictures."""

    def declare(kind: Declared) -> Declared:
        _KINDS.update(dict.fromkeys(model_types, kind))
        return kind

    return declare


@cache
def _load() -> None:
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")


def vision_class(config: Any) -> type[Vision] | None:
    """The family of a model; None: it reads no pictures, or none as they are read here."""
    _load()
    return _KINDS.get(config.model_type)


def find_vision(
    base: BaseModel, config: Any, tokenizer: Any, size: tuple[int, int] | None = None
) -> Vision:
    """How a base model reads pictures; the arguments are those of `Vision`.

    Raises:
        UsageError: it does not, or its type is not known.
    """
    kind = vision_class(config)
    if kind is None:
        raise UsageError(
            f"base_model: '{base.name}': pictures in prompts are not supported for models of type "
            f"'{config.model_type}'{did_you_mean(config.model_type, _KINDS)}; known: {', '.join(sorted(_KINDS))}"
        )
    return kind(base, config, tokenizer, size)


def image_token_id(config: Any) -> int:
    """The token that stands for a part of a picture."""
    names = ("image_token_id", "image_token_index")
    return int(next(getattr(config, name) for name in names if hasattr(config, name)))


def features(model: Any, seen: Seen, dtype: torch.dtype) -> Features:
    """What takes the places of picture tokens, in the order of the pictures.

    A tower that learns nothing leaves nothing for the backward pass: autograd records from the first parameter on
    that learns.

    Args:
        model: transformers' own.
        seen: of all pictures, on the model's device.
        dtype: of the pixels.
    """
    found = around(model).get_image_features(**_wide(seen, dtype))
    deeper = tuple(_together(one) for one in getattr(found, "deepstack_features", None) or ())
    return Features(_together(getattr(found, "pooler_output", found)), deeper)


def around(model: Any) -> Any:
    """The module around tower and language part."""
    return model.model if hasattr(getattr(model, "model", None), "get_image_features") else model


def _wide(seen: Seen, dtype: torch.dtype) -> dict[str, Tensor]:
    return {n: v.to(dtype) if v.is_floating_point() else v for n, v in seen.items()}


def _together(found: Any) -> Tensor:
    """[K, d] of all pictures, however they are laid out."""
    if not isinstance(found, Tensor):
        found = torch.cat([one.flatten(0, -2) for one in found])
    return found.flatten(0, -2)


def runs_of(shown: Tensor) -> Tensor:
    """The number of each run of True, −1 elsewhere: bool [N] → int32 [N]."""
    before = shown.roll(1)
    before[0] = False
    number = (shown & ~before).cumsum(0) - 1
    return torch.where(shown, number, -1).to(torch.int32)


def _image_processor(base: BaseModel) -> Any:
    from transformers import AutoImageProcessor

    from mtl_lora_cli.models.quiet import quiet_loading

    try:
        with quiet_loading():
            return AutoImageProcessor.from_pretrained(
                base.folder, backend="pil", trust_remote_code=False
            )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        said = " ".join(str(error).split())[:200]
        raise UsageError(f"base_model: '{base.name}': no image processor: {said}") from None
