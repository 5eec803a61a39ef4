"""The kernels of a command's passes, and of the self-test before them, compiled before its model is there.

A model of the same widths with one layer of each kind, whose weights are whatever the memory holds, goes through
a pass in which kernels are compiled and not run (`kernels/ahead.py`). It shares nothing with the run's own model
but the compiled kernels, which Triton finds again. That is done once on a machine: its cache keeps them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mtl_lora_cli.adapters.methods.base import Settings
from mtl_lora_cli.kernels.ahead import compiled_beside
from mtl_lora_cli.machine.cards import free_memory
from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.models.files import weight_files
from mtl_lora_cli.models.load import BUILDING, adapt, load_config, model_class
from mtl_lora_cli.models.noise import draw
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.models.rehearsal_start import is_kept
from mtl_lora_cli.models.side_by_side import LIKELIEST, MOST_ASKED, Asked, together
from mtl_lora_cli.models.small import small_of
from mtl_lora_cli.models.stand_in import LONG, critical_lengths
from mtl_lora_cli.models.trust import SHORT
from mtl_lora_cli.runs.atomic import write_json

_ROOM = 3  # times a model's files


def rehearse(
    base: BaseModel,
    settings: Settings,
    tasks: Sequence[str],
    work: Callable[[PackedModel], object],
    *,
    dtype: torch.dtype,
    device: torch.device,
    kept: Path,
) -> bool:
    """Have the kernels of passes compiled; where that cannot be done, the pass itself will have it done.

    It takes memory of the card, which `cards.release` gives back.

    Args:
        base: the run's base model; of its files only the configuration is read.
        settings, tasks: of its adapter.
        work: has a model of the same widths do what the command will do.
        dtype, device: in what and where it computes.
        kept: the file that is there once that is done (`rehearsal_start.kept_file`).

    Returns:
        Whether there was something to do.
    """
    if device.type != "cuda" or is_kept(kept):
        return False
    with suppress(Exception), torch.random.fork_rng(devices=[device]):
        config = _shallow(load_config(base))
        with compiled_beside():
            _pass(base, config, settings, tasks, work, dtype, device)
            with suppress(Exception):  # there may be no small model
                _small(load_config(base), device)
    with suppress(OSError):  # what failed here would fail again
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, {})
    return True


def has_room(base: BaseModel, device: torch.device) -> bool:
    """Whether a card holds a model beside another process that compiles its kernels, which takes a few GiB."""
    size = sum(path.stat().st_size for path in weight_files(base.folder))
    return device.type != "cuda" or free_memory(device)[0] > _ROOM * size


def _pass(
    base: BaseModel,
    config: Any,
    settings: Settings,
    tasks: Sequence[str],
    work: Callable[[PackedModel], object],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    with BUILDING, torch.device("meta"):
        model = model_class(base, config).from_config(config, dtype=dtype)
    model = model.to_empty(device=device).requires_grad_(False).eval()
    packed = PackedModel(model, adapt(model, settings, tasks))
    if packed.decoder is None or not packed.decoder.fixed_shapes():
        return
    work(packed)
    _asked(packed.eval(), draw(SHORT, config))


def _small(config: Any, device: torch.device) -> None:
    """The small model of the self-test, in 32 bits."""
    packed = PackedModel(small_of(config, None, device, torch.float32).model).eval()
    if packed.decoder is not None:
        critical = critical_lengths(packed.model.config.get_text_config())
        _asked(packed, draw([LONG, *critical, *SHORT], packed.model.config))


@torch.no_grad()
def _asked(packed: PackedModel, examples: Sequence[torch.Tensor]) -> None:
    """The self-test's questions; what they say means nothing here."""
    counts = [min(len(example) - 1, MOST_ASKED) for example in examples]
    nothing = [torch.zeros(count, LIKELIEST, dtype=torch.long) for count in counts]
    together(packed, examples, [Asked(tokens, tokens.float()) for tokens in nothing])


def _shallow(config: Any) -> Any:
    """The configuration with one layer of each kind."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    few = 1 + max(kinds.index(kind) for kind in set(kinds)) if kinds else 1
    text.num_hidden_layers = few
    if kinds:
        text.layer_types = list(kinds[:few])
    return config
