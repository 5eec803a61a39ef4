"""A run that is ready to learn: what its recipe names, and what is built of that."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import set_seed

from mtl_lora_cli.adapters.extend import start_beside
from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.adapters.weight_start import start_from_weights
from mtl_lora_cli.data.collate import TextDataset, training_batch
from mtl_lora_cli.data.encoded import EncodedSplit
from mtl_lora_cli.data.kept_features import keep_features
from mtl_lora_cli.data.prepare import (
    TrainingData,
    read_examples,
)
from mtl_lora_cli.engine.decoder import obstacle
from mtl_lora_cli.engine.families import plan_of
from mtl_lora_cli.engine.memory import keep_of
from mtl_lora_cli.engine.plan import Plan
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.machine.cards import release
from mtl_lora_cli.machine.processes import ALONE, Processes
from mtl_lora_cli.memory.situation import Situation, longest_of, situation_of
from mtl_lora_cli.models import rehearsal_start
from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.models.host import (
    Dataset,
    Host,
    Objective,
    at_fault,
)
from mtl_lora_cli.models.load import (
    adapt,
    load_model,
    on_meta,
)
from mtl_lora_cli.models.packed import PackedModel, Rounding
from mtl_lora_cli.models.quiet import quiet_loading
from mtl_lora_cli.models.trusted import settled
from mtl_lora_cli.recipe.schema import Recipe
from mtl_lora_cli.runs.folder import RunFolder
from mtl_lora_cli.training.cut_layers import require_cuttable
from mtl_lora_cli.training.diagnose import Diagnosis
from mtl_lora_cli.training.gradient_start import require_gradients
from mtl_lora_cli.training.observers import Observer
from mtl_lora_cli.training.parts import require_parts
from mtl_lora_cli.training.rehearsed import compile_kernels
from mtl_lora_cli.training.validation import (
    HeldOut,
    Validation,
)
from mtl_lora_cli.training.word_start import require_projector
from mtl_lora_cli.training.zero_config import deepspeed_config, merged_config


@dataclass
class Prepared:
    """A run that is ready to learn.

    Attributes:
        recipe: resolved: absolute paths, no relative source.
        base: the base model's place on this disk.
        tokenizer: of the base model.
        data: encoded tasks.
        total_steps: optimiser steps.
        device, dtype: where and in what the base model computes.
        longest: positions that the base model knows.
        memory: what `training.memory: auto` picked and why, in one line; None for `manual`.
        validation: held-out examples of each task for `training.validation`; None without it.
        processes: this one among those of the run.
        deepspeed: the user's own DeepSpeed file, merged into what the recipe says; None without.
        extends: the run that these tasks are added to; None: all of the adapter learns.
        begins: the run at whose adapter this one begins; None: it begins afresh.
        objective: what learns the tasks where they are no text.
        held: then the examples that `training.validation` looks at.
    """

    recipe: Recipe
    base: BaseModel
    tokenizer: Any
    data: TrainingData
    total_steps: int
    device: torch.device
    dtype: torch.dtype
    longest: int = 2**31
    memory: str | None = None
    validation: list[HeldOut] | None = None
    processes: Processes = ALONE
    deepspeed: Path | None = None
    extends: RunFolder | None = None
    begins: RunFolder | None = None
    objective: Objective | None = None
    held: Dataset | None = None

    @property
    def unvalidated(self) -> list[str]:
        """The tasks that `training.validation` leaves out: they have no validation split."""
        if self.validation is None:
            return []
        return [one.task.name for one in self.validation if not len(one.split)]

    @property
    def starts_by_words(self) -> bool:
        """Whether the projector of this run begins at its rows' words; what begins at another run begins there."""
        images, afresh = self.recipe.images, self.extends is None and self.begins is None
        return afresh and images is not None and images.projector_start == "words"

    def require_start(self, model: Any, adapter: Adapter) -> None:
        """Refuse a start of the projector that this model cannot have.

        Raises:
            UsageError: as `require_projector`.
        """
        if self.starts_by_words and self.data.eyes is not None:
            require_projector(model, adapter, self.data.eyes, self.data.splits)

    def situation(self) -> Situation | None:
        """What the memory of the run's steps depends on; None where tasks are no text."""
        if self.objective is not None:
            return None
        return situation_of(
            self.recipe, self.base, self.data, self.device, self.dtype, self.processes.count
        )

    def build(self) -> tuple[Host, Adapter]:
        """The base model with a fresh adapter; the seed decides its start.

        Where tasks are added to a run's, it is an adapter of the new ones beside what that run learned.

        Raises:
            UsageError: the recipe names a layer or a part of the adapter that does not exist.
            MtlLoraError: the adapter of the run that is extended is damaged or another one by now.
        """
        self.rehearse()
        set_seed(self.recipe.training.seed)
        host: Host
        if self.objective is None:
            host, adapter = self._text()
        else:
            with at_fault(type(self.objective)):
                host = self.objective.host(self.device, self.dtype)
            assert host.adapter is not None, "a host has an adapter"
            adapter = self._learning(host.adapter)
        if self.processes.rank:  # the same start, and other features dropped than elsewhere
            torch.manual_seed(hash((self.recipe.training.seed, self.processes.rank)) % 2**63)
        return host, adapter

    def rehearse(self) -> None:
        """Have kernels compiled beside each other before the model is there, or wait until they are."""
        rehearsal_start.wait()
        if self.objective is None and self.data.eyes is None:
            names = [task.name for task in self.data.tasks]
            if compile_kernels(self.recipe, self.base, names, self.dtype, self.device):
                release(self.device)

    def _learning(self, adapter: Adapter) -> Adapter:
        """A fresh adapter, all of which learns, or what is added to a run's."""
        if self.extends is not None:
            start_beside(adapter, self.extends.adapter)
        else:
            start_from_weights(adapter)
        require_parts(adapter, self.recipe.training.parts)
        require_gradients(adapter)
        return adapter

    def _text(self) -> tuple[PackedModel, Adapter]:
        cut = self.recipe.distributed.zero_stage == 3
        model = load_model(
            self.base,
            dtype=self.dtype,
            device=self.device,
            quantization=self.recipe.quantization,
            storage=self.dtype if cut else torch.uint8,
            tower=self.recipe.images is not None and self.recipe.images.quantized,
        )
        names = [task.name for task in self.data.tasks]
        adapter = self._learning(adapt(model, self.recipe.adapter, names))
        self.require_start(model, adapter)
        recompute = self.recipe.training.gradient_checkpointing
        packed = PackedModel(
            model,
            adapter,
            engine=self.recipe.engine,
            keep=keep_of(
                recompute, getattr(model.config.get_text_config(), "num_hidden_layers", 0)
            ),
            base_compute=self.recipe.base_compute,
            resident=not cut,
            vision=None if self.data.eyes is None else self.data.eyes.vision,
        )
        settled(
            packed,
            self.base,
            quantization=self.recipe.quantization,
            base_compute=self.recipe.base_compute,
        )
        _leave_expanded(packed, self.recipe.training.expanded_layers)
        if self.data.shares:
            _require_shared(packed, longest_of(self.data))
        self._keep_features(packed, adapter)
        if cut:
            require_cuttable(packed, self.processes)
        if packed.decoder is None and recompute:  # transformers' layers know all or nothing
            model.gradient_checkpointing_enable(
                {"use_reentrant": False, "context_fn": adapter.routing.recomputed}
            )
        return packed, adapter

    def _keep_features(self, packed: PackedModel, adapter: Adapter) -> None:
        """A frozen tower sees each picture of the run once."""
        eyes, images = self.data.eyes, self.recipe.images
        if eyes is None or (packed.plain is not None and packed.plain.way.layout != "packed"):
            return
        held = [cast(EncodedSplit, one.split) for one in self.validation or ()]
        shown = [one.pictures for one in (*self.data.splits, *held) if one.pictures is not None]
        pictures = [picture for split in shown for some in split for picture in some]
        how = "auto" if images is None else images.features
        keep_features(packed.model, adapter, eyes, pictures, how, self.processes)

    def zero(self) -> dict[str, Any] | None:
        """DeepSpeed's configuration; None where nothing is cut into parts.

        Raises:
            ProblemsError: the user's own file contradicts the recipe.
        """
        distributed = self.recipe.distributed
        if distributed.zero_stage == 0:
            return None
        training = self.recipe.training
        derived = deepspeed_config(
            distributed,
            max_gradient_norm=None if training.clipping else training.max_gradient_norm,
            on_card=self.device.type == "cuda",
        )
        return derived if self.deepspeed is None else merged_config(derived, self.deepspeed)

    def where(self, task: int, number: int) -> str:
        """File and line of a training example, where no row was left out before it."""
        if self.objective is not None:
            where = getattr(self.data.others, "where", None)
            return f"example {number}" if where is None else str(where(task, number))
        bound, split = self.data.tasks[task], self.data.splits[task]
        if bound.source.stream:
            return f"example {number} of a window of its stream"
        if split.dropped:
            return f"example {number} (of those that were not too long)"
        found = read_examples(
            bound, "train", at_most=bound.max_examples, seed=self.recipe.training.seed
        )
        return f"example {number}" if found is None else found.wheres[number]

    def observers(self, host: Host, adapter: Adapter) -> list[Observer]:
        """Who looks at the run: `training.diagnose` and `training.validation`."""
        settings = self.recipe.training
        found: list[Observer] = []
        if settings.diagnose is not None:
            found.append(Diagnosis(host, adapter, self.data, settings))
        if self.validation is not None:
            found.append(
                Validation(
                    host,
                    adapter,
                    self.validation,
                    self.held_out(),
                    settings,
                    self.total_steps,
                    self.processes,
                    # Under stage 3 each pass gathers weights from all processes.
                    same_passes=self.recipe.distributed.zero_stage == 3,
                )
            )
        return found

    def held_out(self) -> Dataset:
        """The examples that `training.validation` looks at, ready to be collated."""
        assert self.validation is not None
        if self.objective is None:
            splits = [cast(EncodedSplit, one.split) for one in self.validation]
            return TextDataset(splits, self.recipe.training.loss_on, self.data.eyes)
        assert self.held is not None
        return self.held


def _leave_expanded(packed: PackedModel, count: int) -> None:
    """Keep quantised weights of the first layers dense, too.

    Raises:
        UsageError: the fused engine does not run.
    """
    if count and packed.decoder is None:
        raise UsageError(
            "training.expanded_layers: transformers' own layers expand their weights for each product "
            f"({packed.not_fused}); leave it out"
        )
    if count and packed.decoder is not None:
        packed.decoder.leave_expanded(count)


def _require_shared(packed: PackedModel, longest: int) -> None:
    """Refuse shared beginnings where the model's layers do not keep examples of one tree apart.

    Raises:
        UsageError: saying what the layers do.
    """
    if packed.shares(longest):
        return
    limit, name = packed.together, packed.model.config.model_type
    if packed.decoder is not None:
        _require_no_state(packed.decoder.plan, name)
    if limit is not None and longest > limit:
        raise _not_shared(
            f"the rotary embedding of {name} is another one beyond {limit} positions, and the longest "
            f"example has {longest}"
        )
    raise _not_shared(
        f"{name}'s own layers take examples one by one or side by side, not trees of them"
    )


def _require_no_state(plan: Plan, name: str) -> None:
    """The same of a type of model, by what the fused engine would compute."""
    if plan.recurrent:
        raise _not_shared(
            f"layers of {name} hand a state from token to token, which a tree of examples does not"
        )


def _not_shared(why: str) -> UsageError:
    return UsageError(f"training.share_beginnings: {why}; leave it out")


@dataclass(frozen=True)
class ReadyRun:
    """A run whose model is built: what the loop is given.

    Attributes:
        prepared: everything that its recipe names.
        run: where checkpoints and metrics go.
        host: the model with the adapter injected.
        adapter: what is trained.
        zero: DeepSpeed's configuration; None where nothing is cut into parts.
    """

    prepared: Prepared
    run: RunFolder
    host: Host
    adapter: Adapter
    zero: dict[str, Any] | None = None

    def rounded(self, *, told: bool) -> list[str]:
        """What is to say of `base_compute: fp8`; then the weights stay in 8 bits alone, as far as they can.

        Args:
            told: whether somebody is told what rounding costs: otherwise nobody looks.
        """
        if self.prepared.recipe.base_compute != "fp8":
            return []
        assert isinstance(self.host, PackedModel), "text alone is computed in 8 bits"
        lines = [str(self._rounding())] if told else []
        kept = self.host.let_go()
        return lines if kept is None else [*lines, f"note: {kept}"]

    def _rounding(self) -> Rounding:
        """What rounding costs, on the first row of the run."""
        data, training = self.prepared.data, self.prepared.recipe.training
        row = data.mixture.step(0)[1][:1]
        assert isinstance(self.host, PackedModel), "text alone is computed in 8 bits"
        batch = training_batch(
            row, data.splits, loss_on=training.loss_on, eyes=data.eyes, share=data.shares
        )
        return self.host.rounding(batch)


def require_fit(prepared: Prepared) -> None:
    """Refuse what the base model cannot do, by its configuration alone: no weight is read.

    The checks are those of `Prepared.build`, on a model without memory.

    Raises:
        UsageError: a target names no layer, or a tied weight, or the recipe a part or an engine that the
            model does not have.
    """
    recipe = prepared.recipe
    if prepared.objective is not None:
        return  # its own class looks
    names = [task.name for task in prepared.data.tasks]
    with quiet_loading():
        model, adapter = on_meta(prepared.base, prepared.recipe.adapter, names)
    if prepared.extends is None:  # otherwise what learns is known when the run's adapter is read
        require_parts(adapter, recipe.training.parts)
    require_gradients(adapter)
    prepared.require_start(model, adapter)
    reason = obstacle(model, adapter)
    if recipe.engine == "fused" and reason is not None:
        raise UsageError(f"engine: fused does not know this model: {reason}")
    if recipe.training.share_beginnings and reason is None:
        _require_no_state(plan_of(model.config), model.config.model_type)
