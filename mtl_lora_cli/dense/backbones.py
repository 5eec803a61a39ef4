"""Hierarchical backbones of transformers: where their stages end, and how the outputs there are maps.

A family is a model type of transformers' own. Its stages' outputs are read at the last block of each stage, before
any norm or downsampling that follows: decoders have a norm of their own, so the files of a classifier will do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from mtl_lora_cli.errors import UsageError, did_you_mean
from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.models.load import bits_and_bytes, load_config
from mtl_lora_cli.models.quiet import quiet_loading

Size = tuple[int, int]  # height and width


@dataclass(frozen=True)
class Stages:
    """What is read of a backbone.

    Attributes:
        blocks: path of the last block of each stage, the finest stage first.
        channels: of their outputs.
    """

    blocks: tuple[str, ...]
    channels: tuple[int, ...]


class Family:
    """Backbones of one type of configuration.

    Attributes:
        unused: parts of the model's files that no stage reads; they may be missing.
        run_code: how the trunk runs over `pixels`, in plain code.
        map_code: how the output `x` of stage `i` is a map [N, C, h, w], in plain code, which knows `trunk` and
            the picture's `height` and `width`.
    """

    unused: tuple[str, ...] = ("layernorm", "pooler")
    run_code = "trunk(pixels)"
    map_code = "return x"

    def run(self, trunk: Any, pixels: Tensor) -> None:
        """Once through all blocks."""
        trunk(pixels)

    def stages(self, config: Any) -> Stages:
        """Where they end."""
        raise NotImplementedError

    def all_blocks(self, trunk: Any) -> list[str]:
        """Paths of the blocks of all stages: those that lie beside a stage's last one."""
        lists = {path.rpartition(".")[0] for path in self.stages(trunk.config).blocks}
        return [path for path, _ in trunk.named_modules() if path.rpartition(".")[0] in lists]

    def step(self, config: Any) -> int:
        """Height and width of a picture are multiples of it."""
        return 1

    def sized(self, config: Any, size: Size) -> Any:
        """The configuration for pictures of this size."""
        return config

    def fitted(self, model: Any, source: Any) -> None:
        """Copy what depends on the size of pictures from the model of the folder's own size."""

    def to_map(self, trunk: Any, x: Tensor, stage: int, size: Size) -> Tensor:
        """What the last block of a stage gives, of pictures of this size, as a map [N, h, w, C]."""
        raise NotImplementedError


def _ceiled(size: Size, by: int) -> Size:
    return -(-size[0] // by), -(-size[1] // by)


class _Swin(Family):
    """Patches, then halves of them, rounded up. Windows are shifted and filled up with zeros at every size, as
    transformers' backbone class has it; the model class shrinks windows and then fails at some sizes."""

    run_code = "trunk.encoder(*trunk.embeddings(pixels), always_partition=True)"
    map_code = (
        "h, w = -(-height // {patch}), -(-width // {patch})\n"
        "    for _ in range(i): h, w = -(-h // 2), -(-w // 2)\n"
        "    return x.unflatten(1, (h, w)).permute(0, 3, 1, 2)"
    )

    def run(self, trunk: Any, pixels: Tensor) -> None:
        trunk.get_submodule("encoder")(
            *trunk.get_submodule("embeddings")(pixels), always_partition=True
        )

    def stages(self, config: Any) -> Stages:
        ends = enumerate(config.depths)
        return Stages(
            tuple(f"encoder.layers.{stage}.blocks.{depth - 1}" for stage, depth in ends),
            tuple(config.embed_dim * 2**stage for stage in range(len(config.depths))),
        )

    def to_map(self, trunk: Any, x: Tensor, stage: int, size: Size) -> Tensor:
        grid = _ceiled(size, _patch(trunk.config))
        for _ in range(stage):
            grid = _ceiled(grid, 2)
        return x.unflatten(1, grid)


def _patch(config: Any) -> int:
    patch = config.patch_size
    return int(patch[0] if isinstance(patch, list | tuple) else patch)


class _Dinov2(Family):
    """A plain transformer, read after each quarter of its blocks."""

    unused = ("layernorm", "pooler", "embeddings.mask_token")
    map_code = (
        "h, w = height // {patch}, width // {patch}\n"
        "    return x[:, {first}:].unflatten(1, (h, w)).permute(0, 3, 1, 2)"
    )

    def stages(self, config: Any) -> Stages:
        layers = config.num_hidden_layers
        if layers < 4:
            raise UsageError(f"base_model: four stages need four blocks, received {layers}")
        ends = [round(layers * quarter / 4) - 1 for quarter in (1, 2, 3, 4)]
        return Stages(tuple(f"encoder.layer.{end}" for end in ends), (config.hidden_size,) * 4)

    def step(self, config: Any) -> int:
        return _patch(config)

    def to_map(self, trunk: Any, x: Tensor, stage: int, size: Size) -> Tensor:
        patch = _patch(trunk.config)
        return x[:, first_patch(trunk.config) :].unflatten(1, (size[0] // patch, size[1] // patch))


def first_patch(config: Any) -> int:
    """Tokens before those of patches: the class token and registers."""
    return 1 + int(getattr(config, "num_register_tokens", 0))


class _Hiera(Family):
    """Its units of windows are laid out by the configured size, so that is the pictures'."""

    map_code = "return trunk.encoder.reroll(x, i).permute(0, 3, 1, 2)"

    def stages(self, config: Any) -> Stages:
        widths = [
            int(config.embed_dim * config.embed_dim_multiplier**stage)
            for stage in range(len(config.depths))
        ]
        return Stages(
            tuple(
                f"encoder.stages.{s}.layers.{depth - 1}" for s, depth in enumerate(config.depths)
            ),
            tuple(widths),
        )

    def step(self, config: Any) -> int:
        units = config.patch_stride[0] * config.query_stride[0] ** config.num_query_pool
        return int(max(units, config.patch_stride[0] * config.masked_unit_size[0]))

    def sized(self, config: Any, size: Size) -> Any:
        config.image_size = list(size)
        return config

    def fitted(self, model: Any, source: Any) -> None:
        here, there = (m.get_submodule("embeddings").position_embeddings for m in (model, source))
        stride = source.config.patch_stride[0]
        before = [side // stride for side in source.config.image_size]
        after = [side // stride for side in model.config.image_size]
        grid = there.detach().float().unflatten(1, before).permute(0, 3, 1, 2)
        if before != after:
            grid = F.interpolate(grid, size=after, mode="bicubic", align_corners=False)
        here.data.copy_(grid.permute(0, 2, 3, 1).flatten(1, 2))

    def to_map(self, trunk: Any, x: Tensor, stage: int, size: Size) -> Tensor:
        reroll: Callable[[Tensor, int], Tensor] = trunk.get_submodule("encoder").reroll
        return reroll(x, stage)


class _ConvNext(Family):
    """Its pointwise layers are linear; the others stay as they are, or learn whole."""

    def stages(self, config: Any) -> Stages:
        return Stages(
            tuple(
                f"encoder.stages.{s}.layers.{depth - 1}" for s, depth in enumerate(config.depths)
            ),
            tuple(config.hidden_sizes),
        )

    def to_map(self, trunk: Any, x: Tensor, stage: int, size: Size) -> Tensor:
        return x.permute(0, 2, 3, 1)


class _Swinv2(_Swin):
    """Its windows are laid out by the configured size, and filled up at every other."""

    run_code = "trunk(pixels)"

    def run(self, trunk: Any, pixels: Tensor) -> None:
        trunk(pixels)


FAMILIES: dict[str, Family] = {
    "swin": _Swin(),
    "swinv2": _Swinv2(),
    "hiera": _Hiera(),
    "convnext": _ConvNext(),
    "convnextv2": _ConvNext(),
    "dinov2": _Dinov2(),
    "dinov2_with_registers": _Dinov2(),
}


def family_of(base: BaseModel, config: Any) -> Family:
    """The family of a configuration.

    Raises:
        UsageError: it is no backbone that is known.
    """
    kind = config.model_type
    if kind not in FAMILIES:
        raise UsageError(
            f"base_model: '{base.name}' is of type '{kind}'; maps are learned on {', '.join(FAMILIES)}"
            f"{did_you_mean(kind, FAMILIES)}"
        )
    return FAMILIES[kind]


def require_size(base: BaseModel, config: Any, size: Size) -> None:
    """Refuse pictures whose sides the backbone would cut.

    Raises:
        UsageError: naming the nearest sides that fit.
    """
    step = family_of(base, config).step(config)
    if size[0] % step or size[1] % step:
        near = [max(step, round(side / step) * step) for side in size]
        raise UsageError(
            f"images.size: received {list(size)}; sides of a {config.model_type} are multiples of {step}, "
            f"such as {near}"
        )


def backbone_skeleton(base: BaseModel, size: Size | None = None) -> Any:
    """A backbone without its weights: modules and shapes, for pictures of a size or of its own.

    Raises:
        UsageError: as `load_config` and `family_of`.
    """
    from transformers import AutoModel

    config = load_config(base)
    family = family_of(base, config)
    if size is not None:
        config = family.sized(config, size)
    with torch.device("meta"), quiet_loading():
        return AutoModel.from_config(config)


def load_backbone(
    base: BaseModel,
    *,
    size: Size,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str = "none",
    storage: torch.dtype = torch.uint8,
    unquantised: Sequence[str] = (),
) -> Any:
    """The frozen backbone for pictures of a size, as transformers' `AutoModel`.

    Args:
        base: where it lies; a folder of the model alone, of a classifier or of a `…Backbone` class.
        size: height and width of pictures.
        dtype: of the weights, and of the computation where the weights are 4-bit.
        device: where it goes.
        quantization: `none`, `nf4` or `fp4`.
        storage: in what 4-bit values are kept.
        unquantised: paths of linear layers that stay as they are.

    Raises:
        UsageError: it cannot be loaded, a weight is missing, or the size does not fit.
    """
    config = load_config(base)
    family = family_of(base, config)
    require_size(base, config, size)
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}}
    how = bits_and_bytes(quantization, dtype, storage)
    if how is not None:
        how.llm_int8_skip_modules = list(unquantised) or None
        options["quantization_config"] = how
    model = _loaded(base, config, family, options)
    if family.sized(load_config(base), size).to_dict() != config.to_dict():
        model = _resized(base, model, family, size, dtype, device)
    return model.requires_grad_(False).eval()


def _loaded(base: BaseModel, config: Any, family: Family, options: dict[str, Any]) -> Any:
    from transformers import AutoModel

    try:
        with quiet_loading():
            model, loading = AutoModel.from_pretrained(
                base.folder,
                config=config,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise UsageError(
            f"base_model: '{base.name}' cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from None
    missing = sorted(
        name
        for name in loading["missing_keys"]
        if not any(name == part or name.startswith(f"{part}.") for part in family.unused)
    )
    if missing:  # transformers would fill them with random numbers and go on
        raise UsageError(
            f"base_model: '{base.name}': {len(missing)} weights are missing, the first is {missing[0]}"
        )
    return model


def _resized(
    base: BaseModel,
    model: Any,
    family: Family,
    size: Size,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """The model with the shapes that it has for another size of pictures."""
    from transformers import AutoModel

    if any(getattr(p, "quant_state", None) is not None for p in model.parameters()):
        raise UsageError(
            f"quantization: a {model.config.model_type} in 4 bits keeps its own size of pictures, "
            f"images.size: {list(model.config.image_size)}"
        )
    with quiet_loading():
        other = AutoModel.from_config(family.sized(load_config(base), size)).to(device, dtype)
    own, there = other.state_dict(), model.state_dict()
    same = {name: value for name, value in there.items() if own[name].shape == value.shape}
    other.load_state_dict(same, strict=False)
    family.fitted(other, model)
    return other
