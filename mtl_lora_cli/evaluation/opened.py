"""A finished run, opened by degrees: what its files say, its adapter's tensors, its model.

Everything comes from the run's folder and the base model; nothing is read before it is asked for, and
nothing twice.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from mtl_lora_cli.adapters.files import AdapterFile, load_tensors, read_adapter_file
from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.dense.opened import open_host
from mtl_lora_cli.errors import MtlLoraError, UsageError
from mtl_lora_cli.machine.cards import pick_device, pick_dtype
from mtl_lora_cli.models import rehearsal_start
from mtl_lora_cli.models.base import BaseModel, find_base_model, is_complete
from mtl_lora_cli.models.host import Host
from mtl_lora_cli.models.load import (
    adapt,
    load_config,
    load_for_float32,
    load_model,
    load_tokenizer,
    longest_of,
    text_config,
)
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.models.read_ahead import read_ahead
from mtl_lora_cli.models.rehearsal import has_room
from mtl_lora_cli.models.trusted import settled
from mtl_lora_cli.recipe.load import load_extensions_of, load_recipe
from mtl_lora_cli.recipe.schema import Recipe
from mtl_lora_cli.runs.folder import RunFolder
from mtl_lora_cli.tasks.chosen import read_tasks
from mtl_lora_cli.tasks.maps import MAPS
from mtl_lora_cli.tasks.task import Task, require_text
from mtl_lora_cli.visible import tell

_READ = ("recipe", "tasks", "file", "adapter", "base", "tokenizer", "longest")

_PASS, _WIDE, _LONGER = 2**15, 2048, 4  # tokens; values a token; times as many


@dataclass(frozen=True)
class Run:
    """A finished run. Its attributes are read when they are first asked for.

    Whoever needs the adapter alone asks for `file` and `adapter`: the base model may be gone.

    Attributes:
        folder: of the run.
        quantization: of the base model's weights in memory; None: the recipe's.
        in_float32: compute in float32, whatever the recipe says; see `load_for_float32`.
        force: go on where the base model is not the one that the adapter was trained on; None where
            nobody offers to.
        instead: another model that is asked in the place of the run's own.
    """

    folder: RunFolder
    quantization: str | None = None
    in_float32: bool = False
    force: bool | None = None
    instead: PackedModel | None = None

    def but(self, **changes: Any) -> Run:
        """The same run, computed otherwise; what was read is not read again.

        Args:
            changes: of its fields, or of what it has read (`base`, `tasks`, …).
        """
        own = {name: value for name, value in changes.items() if name not in _READ}
        other = replace(self, **own)
        vars(other).update({name: vars(self)[name] for name in _READ if name in vars(self)})
        vars(other).update({name: value for name, value in changes.items() if name in _READ})
        return other

    @cached_property
    def recipe(self) -> Recipe:
        """As it stands in the folder, defaults filled in."""
        return load_recipe(self.folder.recipe).recipe

    @cached_property
    def tasks(self) -> list[Task]:
        """In the order of their ids."""
        with _as_usage():
            return read_tasks(self.folder)

    @cached_property
    def file(self) -> AdapterFile:
        """The adapter's configuration, and its tensors as they were written.

        Raises:
            UsageError: the run is unfinished, or the file is damaged.
        """
        path = self.folder.require_adapter()
        with _as_usage():
            if "recipe" not in vars(self) and self.folder.recipe.is_file():
                load_extensions_of(self.folder.recipe)  # they may declare its method
            return read_adapter_file(path)

    @property
    def checkpoint(self) -> str:
        """Hash of the adapter's configuration, its tensors' checksums included."""
        return self.file.digest

    @cached_property
    def adapter(self) -> Adapter:
        """The adapter on the CPU; its layers have sizes and no weights of the base model.

        Raises:
            UsageError: a tensor is missing, unexpected, misshapen or damaged.
        """
        with _as_usage():
            return self.file.alone()

    @cached_property
    def base(self) -> BaseModel:
        """The base model's place on this disk.

        Raises:
            UsageError: it is gone, or another one by now.
        """
        base = find_base_model(self.recipe.base_model)
        changed = base.changes_since(self.file.base_model)
        if changed and not self.force:
            raise other_base(
                self.folder, base, changed, "" if self.force is None else "; --force goes on"
            )
        return base

    @cached_property
    def trained_on(self) -> Mapping[str, str | None] | None:
        """Identity of the base model that the adapter was trained on, where that is not this one."""
        recorded = self.file.base_model
        return recorded if self.base.changes_since(recorded) else None

    @cached_property
    def tokenizer(self) -> Any:
        """Of the base model."""
        return load_tokenizer(self.base)

    @cached_property
    def longest(self) -> int:
        """Positions that the base model knows."""
        return longest_of(load_config(self.base))

    @property
    def device(self) -> torch.device:
        """Where its model computes."""
        return pick_device()

    @property
    def weight_dtype(self) -> torch.dtype:
        """That the recipe asks for: what weights are loaded in, or quantised from."""
        return pick_dtype(self.recipe.dtype, self.device)

    @property
    def dtype(self) -> torch.dtype:
        """In which its model computes."""
        return torch.float32 if self.in_float32 else self.weight_dtype

    @property
    def tokens_per_pass(self) -> int:
        """Tokens that are scored together: enough to keep the device busy, little memory.

        A card is done with a narrow model's pass before the next one is put together: such passes are longer.
        """
        if self.device.type != "cuda":
            return 2048
        if self.packed.decoder is None:
            return _PASS
        width = getattr(text_config(self.packed.model.config), "hidden_size", None) or _WIDE
        return _PASS * min(_LONGER, max(1, _WIDE // width))

    def load(self, quantization: str | None = None) -> Any:
        """The base model as our own code takes it, without an adapter.

        Args:
            quantization: of its weights; None: as the run's.
        """
        load = load_for_float32 if self.in_float32 else load_model
        kind = quantization or self.quantization or self.recipe.quantization
        images = self.recipe.images
        return load(
            self.base,
            dtype=self.weight_dtype,
            device=self.device,
            quantization=kind,
            tower=images is not None and images.quantized,
        )

    @cached_property
    def host(self) -> Host:
        """Whatever answers: the packed model of texts, or what learns maps.

        Raises:
            UsageError: the adapter does not fit, or its file is damaged.
        """
        if not self.of_maps:
            return self.packed
        with _as_usage():
            return open_host(
                self.base, self.recipe, self.tasks, self.file, device=self.device, dtype=self.dtype
            )

    @property
    def of_maps(self) -> bool:
        """Whether its tasks answer with maps of pictures."""
        return any(task.objective in MAPS for task in self.tasks)

    @property
    def vision(self) -> Any:
        """How its base model reads pictures; None: its tasks show none.

        Raises:
            UsageError: the base model reads none.
        """
        shows = any(task.template.images for task in self.tasks)
        images = self.recipe.images
        size = None if images is None or images.size is None else images.shape
        return self.tokenizer.vision(size) if shows else None

    @cached_property
    def packed(self) -> PackedModel:
        """The base model with the adapter, ready to be asked; of texts alone."""
        for task in self.tasks:
            require_text(task.name, task.objective)
        if self.instead is not None:
            return self.instead
        with _as_usage():
            tensors = self.file.tensors
        if not has_room(self.base, self.device):
            rehearsal_start.wait()
        model = self.load()
        rehearsal_start.wait()
        adapter = adapt(model, self.file.config, self.file.tasks)
        first = {name: tensor.detach().clone() for name, tensor in adapter.whole.items()}
        with _as_usage():
            load_tensors(adapter, tensors, self.file.folder)
        packed = PackedModel(model, adapter, vision=self.vision).eval()
        packed.base_whole = first
        settled(packed, self.base, quantization=self.quantization or self.recipe.quantization)
        return packed


def open_run(folder: RunFolder, *, force: bool | None = None) -> Run:
    """Read a finished run's files and look whether all is what it was; its model is loaded later.

    Args:
        folder: of a finished run.
        force: see `Run`.

    Raises:
        UsageError: the run is unfinished, its adapter is damaged, or its base model is gone or
            another one by now.
    """
    run = Run(folder, force=force)
    folder.require_adapter()
    run.recipe  # noqa: B018 - its extensions come first
    with _as_usage():
        run.file.tensors  # noqa: B018 - damaged ones are refused before anything is done
    for task in run.tasks:
        if task.objective not in MAPS:
            require_text(task.name, task.objective)
    read_ahead(run.base.folder)  # one that is gone, or another one, is refused likewise
    if (
        not run.of_maps
        and not is_complete(run.file.base_model)
        and os.environ.get("RANK", "0") == "0"
    ):
        tell(
            f"note: run '{folder.name}' was trained by an early version, which did not record its tokenizer "
            "and chat template: whether they are the same is not known"
        )
    return run


def other_base(folder: RunFolder, base: BaseModel, changed: str, how: str = "") -> UsageError:
    """What is said of a run whose base model is another one by now."""
    return UsageError(
        f"run '{folder.name}': the base model at {base.folder} is not the one that the adapter was "
        f"trained on ({changed}){how}"
    )


@contextmanager
def _as_usage() -> Iterator[None]:
    """A damaged run is what the user gave, not what failed here."""
    try:
        yield
    except UsageError:
        raise
    except MtlLoraError as error:
        raise UsageError(str(error)) from None
