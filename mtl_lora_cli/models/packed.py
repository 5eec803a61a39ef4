"""A causal language model over packed rows, with logits only where something is asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from mtl_lora_cli.adapters.experts import multiply_stacks
from mtl_lora_cli.adapters.frozen import multiply_ourselves
from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.adapters.layer import MultiTaskLinear
from mtl_lora_cli.adapters.routing import BASE_ONLY, Slots, slots_of
from mtl_lora_cli.engine.decoder import Deeper, FusedDecoder, obstacle
from mtl_lora_cli.engine.plan import matrix_weights
from mtl_lora_cli.engine.saved import Keep
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.kernels import fp8
from mtl_lora_cli.kernels.backend import moved
from mtl_lora_cli.kernels.logprob import aligned_logits, exact_logprobs, token_logprobs
from mtl_lora_cli.machine.rate import Floor, floor_of
from mtl_lora_cli.models.batch import PackedBatch
from mtl_lora_cli.models.plain import (
    LAYOUTS,
    Layout,
    PlainEngine,
    Way,
    own_attention,
    use_attention,
)
from mtl_lora_cli.models.registered import NotHonoured
from mtl_lora_cli.models.sight import embeddings
from mtl_lora_cli.models.vision import Vision

Engine = Literal["auto", "fused", "plain"]
BaseCompute = Literal["dtype", "fp8"]


@dataclass(frozen=True)
class Rounding:
    """How far 8-bit products lead from exact ones.

    Attributes:
        mean, largest: of |Δ log p| over the questions, in nats.
        loss, exact_loss: mean −log p with rounded and with exact products.
    """

    mean: float
    largest: float
    loss: float
    exact_loss: float

    def __str__(self) -> str:
        return (
            f"base_compute: fp8: log-probabilities differ from exact products by {self.mean:.4f} "
            f"nats on average, {self.largest:.4f} at most; loss {self.loss:.4f}, "
            f"exact {self.exact_loss:.4f}"
        )


class PackedModel(nn.Module):
    """Base model and adapter as one module: a batch in, log-probabilities out.

    Args:
        model: a transformers causal language model loaded with our packed attention.
        adapter: the adapter that was injected into it, or None for the base model alone.
        engine: `fused` runs the layers as our blocks, `plain` as transformers wrote them; `auto` is
            fused where that is possible.
        keep: what the fused engine keeps for the backward pass, in all layers or in each; by
            default everything.
        base_compute: `dtype` multiplies with the frozen weights as they are; `fp8` in 8-bit floats,
            which the fused engine alone can do.
        resident: the base model's weights stay in memory; see `FusedDecoder`.
        vision: how it reads pictures, where it is shown some.

    Attributes:
        decoder: the fused engine; None where transformers' own layers run.
        plain: the plain engine; None where the fused one runs.
        not_fused: why the fused engine does not run.
        must_fuse: the recipe asks for what the fused engine alone does.
        trust: what the self-test found (`trusted.settled`).

    Raises:
        UsageError: `fused` or `fp8` was asked for and the model's layers are not of that kind, or
            the card has no 8-bit floats.
    """

    def __init__(
        self,
        model: Any,
        adapter: Adapter | None = None,
        *,
        engine: Engine = "auto",
        keep: Keep | Sequence[Keep] | None = None,
        base_compute: BaseCompute = "dtype",
        resident: bool = True,
        vision: Vision | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self._adapter = adapter
        self.decoder: FusedDecoder | None = None
        self.plain: PlainEngine | None = None
        self.keep: list[Keep] = []
        self.must_fuse = engine == "fused" or base_compute == "fp8"
        self.trust: Any = None  # a `trust.Trust`, once the self-test has run
        self.kept_rows: Any = None  # `engine.rows.KeptRows` of the last generated answers
        self.base_whole: dict[str, Tensor] = {}  # what stood where something learned whole
        self.rows_agree: dict[int, bool] = {}  # see `evaluation.continuing.fused_agrees`
        self.vision = vision
        self.not_fused = "engine: plain" if engine == "plain" else self._obstacle()
        if self.not_fused is None:
            self.decoder = FusedDecoder(model, resident=resident)
            one = Keep() if keep is None else keep
            layers = len(self.decoder.layers)
            self.keep = [one] * layers if isinstance(one, Keep) else list(one)
        elif engine == "fused":
            raise UsageError(f"engine: fused does not know this model: {self.not_fused}")
        else:
            self.plain = _first_way(model, adapter, self.ways[0])
        multiply_ourselves(model)
        multiply_stacks(model)
        _align(self.head)
        if base_compute == "fp8":
            if self.decoder is None:
                raise UsageError("base_compute: fp8 needs the fused engine")
            device = next(model.parameters()).device
            if not fp8.supported(device):
                raise UsageError(
                    "base_compute: fp8 needs a card of compute capability 9.0 or higher, found "
                    f"{torch.cuda.get_device_name(device)}"
                )
            self.decoder.round_to_fp8()

    def _obstacle(self) -> str | None:
        return obstacle(self.model, self._adapter)

    @property
    def ways(self) -> tuple[Layout, ...]:
        """Layouts that may be right, the fastest first."""
        return LAYOUTS if self.vision is None or not self.vision.whole_prompt else ("packed",)

    def go(self, way: Way) -> None:
        """Ask transformers' own layers from now on, in this way.

        Raises:
            UsageError: the model's attention cannot be replaced, and the way wants that.
        """
        self.decoder = None
        self.plain = None
        self.plain = PlainEngine(self.model, self._adapter, way)

    @property
    def adapter(self) -> Adapter | None:
        """The adapter in the model, if there is one."""
        return self._adapter

    def shares(self, length: int) -> bool:
        """Whether answers that begin alike, of up to so many positions, may share what they begin with."""
        if self.plain is not None:
            return self.plain.shares(length)
        if self.decoder is not None and self.decoder.plan.recurrent:
            return False
        return self.together is None or length <= self.together

    @property
    def together(self) -> int | None:
        """Positions beyond which a rotary embedding is another one for a whole sequence; None: never."""
        if self.plain is not None:
            return self.plain.way.together
        return None if self.decoder is None else self.decoder.plan.limit

    def engine_line(self) -> str:
        """Which engine runs, and why not the other one."""
        if self.plain is None:
            return "fused engine"
        way = self.plain.way
        slower = "" if way.layout == "packed" else " (slower)"
        packed = [one for one in getattr(self.trust, "tried", ()) if one.startswith("packed")]
        return (
            f"plain engine, {way}{slower}; the fused engine does not know it: {self.not_fused}"
            + "".join(f"; {one}" for one in packed)
        )

    def engine_report(self) -> dict[str, Any]:
        """The same as data: `engine`, `layout`, `why_not_fused`, `self_test`, `line`, `remarks`."""
        plain = self.plain
        return {
            "engine": "fused" if plain is None else "plain",
            "layout": "packed" if plain is None else plain.way.layout,
            "why_not_fused": self.not_fused,
            "self_test": None if self.trust is None else str(self.trust),
            "line": self.engine_line(),
            "remarks": [] if self._adapter is None else list(self._adapter.remarks),
        }

    def floor(self, cards: int) -> Floor | None:
        """See `host.Host`."""
        device = next(self.model.parameters()).device
        return floor_of(*matrix_weights(self.model), device, cards)

    def notes(self) -> list[str]:
        """See `host.Host`: that the fused engine does not run, and what the self-test did not see."""
        unasked = getattr(self.trust, "unasked", "")
        said = [] if self.plain is None else [self.engine_line()]
        if unasked and not any(unasked in line for line in said):
            said.append(f"self-test: {unasked}")
        return said

    @contextmanager
    def routed(self, batch: PackedBatch) -> Iterator[None]:
        """Route by the batch's task ids; keep forward and backward pass inside."""
        if self._adapter is None:
            yield
        else:
            with self._adapter.routing.assign(batch.task_ids):
                yield

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Inside the block what learned whole is as the base model has it."""
        learned = {} if self._adapter is None else self._adapter.whole
        kept = {name: learned[name].data for name in self.base_whole}
        try:
            for name, value in self.base_whole.items():
                learned[name].data = value
            yield
        finally:
            for name, value in kept.items():
                learned[name].data = value

    @contextmanager
    def over_rows(self, tasks: int | Tensor) -> Iterator[Any]:
        """transformers' own model, adapter included, with a key-value cache for who wants one.

        Inside the block it takes rows filled up to one length and their attention mask, not packed
        ones.

        Args:
            tasks: of all rows, or int64 [B] of each; −1 is the base model alone. One task of all rows
                is right whatever shape the model's code gives its activations.
        """
        ids = torch.as_tensor(tasks)
        use_attention(self.model, own_attention(self.model))
        try:
            with nullcontext() if self._adapter is None else self._adapter.routing.assign(ids):
                yield self.model
        finally:
            if self.plain is not None:
                self.plain.take_attention()

    @torch.no_grad()
    def rounding(self, batch: PackedBatch) -> Rounding:
        """What `base_compute: fp8` costs: the same questions, asked with rounded and exact products.

        Args:
            batch: on the CPU or the model's device.
        """
        assert self.decoder is not None, "fp8 is the fused engine's"
        there = batch.to(next(self.model.parameters()).device)
        training = self.training
        self.eval()
        with self.routed(there):
            rounded = self(there)
            with self.decoder.exactly():
                exact = self(there)
        self.train(training)
        difference = (rounded - exact).abs()
        return Rounding(
            mean=float(difference.mean()),
            largest=float(difference.max()),
            loss=-float(rounded.mean()),
            exact_loss=-float(exact.mean()),
        )

    def let_go(self) -> str | None:
        """With `base_compute: fp8` keep the layers' weights in 8 bits alone; `rounding` is no more possible.

        Nor is what reads the weights themselves: transformers' own layers. Merging and export read the
        base model's files.

        Returns:
            Which weights stay besides, in a line; None: none.
        """
        assert self.decoder is not None, "fp8 is the fused engine's"
        stay = self.decoder.let_go(self.model)
        if not stay:
            return None
        more = f" and {len(stay) - 1} more" if len(stay) > 1 else ""
        return f"base_compute: fp8: {stay[0]}{more} stay in memory beside their 8-bit copies"

    def train(self, mode: bool = True) -> Self:
        """The adapter's dropout is on. The base model is frozen and stays in evaluation mode: in training mode it
        would draw (routers that try other experts, noise on what they see) and be another function than the one
        that is evaluated. Only layers that are computed again in the backward pass have to know.
        """
        super().train(False)
        again = (m for m in self.model.modules() if getattr(m, "gradient_checkpointing", False))
        learning = () if self._adapter is None else self._adapter.layers.values()
        for module in (self, *again, *learning):
            module.training = mode
        return self

    @property
    def head(self) -> nn.Module:
        """The output layer."""
        return cast(nn.Module, self.model.get_output_embeddings())

    @property
    def head_is_adapted(self) -> bool:
        """Whether the output layer, too, carries an adapter."""
        return isinstance(self.model.get_output_embeddings(), MultiTaskLinear)

    def forward(self, batch: PackedBatch, slots: tuple[Slots, Slots] | None = None) -> Tensor:
        """log p(targets[i] | what stands before it), float32 [S].

        Args:
            batch: what is asked.
            slots: the routing of all positions and of those asked for, where it lies ready on the
                device; otherwise it is found from the batch's task ids.
        """
        return self._asked(batch, slots)[0]

    def losses(self, batch: PackedBatch) -> Tensor:
        """−log p of each question, float32 [S]: see `host.Host`."""
        return -self(batch)

    def judge(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """log p(targets[i] | …), float32 [S], and whether no token is likelier, bool [S]."""
        logprobs, likeliest = self._asked(batch, None, judged=True)
        assert likeliest is not None
        return logprobs, likeliest[batch.owner] == batch.targets

    def _asked(
        self, batch: PackedBatch, slots: tuple[Slots, Slots] | None, *, judged: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The log-probabilities, and the likeliest token of each position where it is wanted."""
        if self.plain is not None:
            chosen = self.plain(batch)
            if not self.plain.way.bare_head:
                return self._read(chosen, batch, judged)
        else:
            chosen = self._hidden(batch, slots)
        head = self.model.get_output_embeddings()
        capped = self.decoder is not None and self.decoder.plan.logit_softcap is not None
        if not self.training and not capped and _is_plain_half(head):
            return exact_logprobs(chosen, head.weight, batch.owner, batch.targets, judged=judged)
        select = (
            self._adapter.routing.select(batch.positions)
            if self._adapter is not None and self.head_is_adapted
            else nullcontext()
        )
        with select:
            logits = cast(Tensor, head(chosen))
        if self.decoder is not None:
            logits = self.decoder.capped(logits)
        return self._read(logits, batch, judged)

    def _read(
        self, logits: Tensor, batch: PackedBatch, judged: bool
    ) -> tuple[Tensor, Tensor | None]:
        likeliest = logits.argmax(dim=-1) if judged else None
        return token_logprobs(logits, batch.owner, batch.targets), likeliest

    def embedded(self, batch: PackedBatch) -> tuple[Tensor, Deeper | None]:
        """What the fused engine's layers begin with, [N, d], and what enters deeper ones."""
        assert self.decoder is not None
        if batch.embeddings is not None:
            return batch.embeddings, None
        if batch.pictures is None:
            return self.decoder.embed(batch.input_ids), None
        x, deeper = embeddings(self.model, batch, self.decoder.looked_up, self._adapter)
        return self.decoder.scaled(x), deeper

    def _hidden(self, batch: PackedBatch, slots: tuple[Slots, Slots] | None) -> Tensor:
        """Normed hidden states at the positions asked for, [U, d], by the fused engine."""
        assert self.decoder is not None
        every, chosen = slots or self._slots(batch)
        x, deeper = self.embedded(batch)
        return self.decoder.forward(
            x,
            batch.position_ids,
            batch.segments,
            moved(batch.positions, batch.input_ids.device),
            every,
            chosen,
            training=self.training,
            keep=self.keep,
            grid=None if batch.pictures is None else batch.pictures.grid,
            deeper=deeper,
        )

    def _slots(self, batch: PackedBatch) -> tuple[Slots, Slots]:
        """The routing of all positions and of those asked for."""
        device = batch.input_ids.device
        if self._adapter is None:
            none = slots_of(torch.full_like(batch.task_ids, BASE_ONLY), device)
            return none, none
        routing = self._adapter.routing
        every = routing.slots(batch.task_ids.shape, device)
        with routing.select(batch.positions):
            return every, routing.slots(batch.positions.shape, device)


def _first_way(model: Any, adapter: Adapter | None, first: Layout) -> PlainEngine:
    """The first layout, packed rows where the model's attention can be ours; what is right is for `trust.settle` to say."""
    try:
        return PlainEngine(model, adapter, Way(first))
    except NotHonoured:
        return PlainEngine(model, adapter, Way("rows"))


def _align(head: nn.Module) -> None:
    """Have a frozen output layer on a card write its logits in rows that are aligned, wherever it is called."""
    if not (isinstance(head, nn.Linear) and _is_plain_half(head)) or head.weight.requires_grad:
        return
    if head.weight.is_cuda and len(head.weight) % 8 and not isinstance(head.forward, partial):
        head.forward = partial(_aligned, head)  # type: ignore[method-assign]


def _aligned(head: nn.Linear, hidden: Tensor) -> Tensor:
    if hidden.ndim != 2 or hidden.dtype != head.weight.dtype:
        return nn.functional.linear(hidden, head.weight)
    return aligned_logits(hidden, head.weight)


def _is_plain_half(head: nn.Module) -> bool:
    """Whether an output layer is a product with a dense matrix of 16-bit floats, and nothing else."""
    return (
        type(head) is nn.Linear
        and head.bias is None
        and head.weight.dtype in (torch.bfloat16, torch.float16)
    )
