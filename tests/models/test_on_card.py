"""On a card, in bfloat16: the fused engine is as near to float32 as transformers' own layers are."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from mtl_lora_cli.adapters.function import AdapterProducts
from mtl_lora_cli.adapters.inject import Adapter, inject
from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.bench.random_model import random_model
from mtl_lora_cli.data.collate import training_batch
from mtl_lora_cli.data.encoded import EncodedSplit
from mtl_lora_cli.data.epoch_rows import Place
from mtl_lora_cli.engine.saved import Keep
from mtl_lora_cli.evaluation.generate import generate
from mtl_lora_cli.evaluation.requests import Request
from mtl_lora_cli.models import registered
from mtl_lora_cli.models.packed import PackedBatch, PackedModel
from mtl_lora_cli.training.capacity import Fullest, PassSizes, padded
from mtl_lora_cli.training.passes import EagerPasses, GraphedPasses

from ..engine.test_shared_beginnings import of

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CARD = torch.device("cuda")
SEVEN = ("*_proj",)
FOUR = ("q_proj", "k_proj", "v_proj", "o_proj")
NOTHING = Keep(attended=False, qkv=False, gate_up=False)
LENGTHS, TASKS = [17, 1, 140, 64, 333, 5, 65], [0, 2, -1, 1, 0, 3, 2]
Learned = tuple[Tensor, dict[str, Tensor]]
MakeBatch = Callable[..., PackedBatch]


def build(
    *,
    head_dim: int = 64,
    vocabulary: int = 512,
    quantization: str = "none",
    dtype: torch.dtype = torch.bfloat16,
    tasks: int = 4,
    **config: Any,
) -> tuple[Any, Adapter]:
    """A small model of LLaMA's kind with grouped heads, and an adapter far from its start."""
    registered.register()
    shape = AutoConfig.for_model(
        "llama", hidden_size=384, intermediate_size=1024, num_hidden_layers=3, vocab_size=vocabulary,
        num_attention_heads=6, num_key_value_heads=2, head_dim=head_dim,
    )  # fmt: skip
    torch.manual_seed(0)
    model = random_model(
        shape,
        dtype=torch.bfloat16,
        device=CARD,
        quantization=quantization,
        attention=registered.NAME,
    )
    if dtype != torch.bfloat16:
        model.to(dtype)
    torch.manual_seed(1)
    adapter = inject(model, configure(**config), [f"task{number}" for number in range(tasks)])
    with torch.no_grad():
        for tensor in adapter.tensors().values():
            tensor.add_(0.05 * torch.randn_like(tensor))
    return model, adapter


def learned(packed: PackedModel, adapter: Adapter, batch: PackedBatch) -> Learned:
    for tensor in adapter.tensors().values():
        tensor.grad = None
    weights = torch.linspace(1, 2, len(batch.targets))
    passes = EagerPasses(packed.losses, packed, CARD)
    losses = passes.run(passes.prepare(batch, weights))
    return losses, {n: t.grad.clone() for n, t in adapter.tensors().items() if t.grad is not None}


def distances(one: Learned, exact: Learned) -> tuple[float, float]:
    """Relative error of the losses, and of all gradients together."""
    assert one[1].keys() == exact[1].keys()
    flat, true = (torch.cat([g.flatten().float() for g in x[1].values()]) for x in (one, exact))
    assert flat.isfinite().all()
    assert one[0].isfinite().all()
    return (
        float((one[0] - exact[0]).norm() / exact[0].norm()),
        float((flat - true).norm() / true.norm()),
    )


def assert_as_near(fused: Learned, plain: Learned, exact: Learned) -> None:
    for ours, theirs in zip(distances(fused, exact), distances(plain, exact), strict=True):
        print(f"fused {ours:.2e} plain {theirs:.2e}")
        assert ours < 1.25 * theirs + 1e-4


@pytest.fixture
def batch(make_batch: MakeBatch) -> PackedBatch:
    return make_batch(LENGTHS, TASKS, every=3)


def exact_of(batch: PackedBatch, **config: Any) -> Learned:
    model, adapter = build(dtype=torch.float32, **config)
    return learned(PackedModel(model, adapter, engine="plain"), adapter, batch)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("targets", [FOUR, SEVEN])
@pytest.mark.parametrize("keep", [Keep(), NOTHING], ids=["kept", "again"])
def test_bfloat16(batch: PackedBatch, head_dim: int, targets: Sequence[str], keep: Keep) -> None:
    config: dict[str, Any] = {"head_dim": head_dim, "target_modules": targets}
    exact = exact_of(batch, **config)
    model, adapter = build(**config)
    plain = learned(PackedModel(model, adapter, engine="plain"), adapter, batch)
    fused = learned(PackedModel(model, adapter, engine="fused", keep=keep), adapter, batch)
    assert_as_near(fused, plain, exact)


def test_logits_in_aligned_rows(batch: PackedBatch) -> None:
    """Of a vocabulary that is no multiple of 8; in float32 the output layer is left as it is."""
    config: dict[str, Any] = {"target_modules": FOUR, "vocabulary": 515}
    exact = exact_of(batch, **config)
    model, adapter = build(**config)
    plain = learned(PackedModel(model, adapter, engine="plain"), adapter, batch)
    fused = PackedModel(model, adapter, engine="fused")
    assert fused.head(torch.zeros(2, 384, dtype=torch.bfloat16, device=CARD)).stride() == (520, 1)
    assert_as_near(learned(fused, adapter, batch), plain, exact)


@pytest.mark.parametrize(
    "config",
    [
        {"method": "lora"},
        {"gate": "embedding", "transform": "diagonal"},
        {"rank": 5, "rank_pattern": {"k_proj": 17, "up_proj": 70}},
        {"method": "lora", "rank": 17, "rank_pattern": {"v_proj": 3}},
        {"method": "hydralora", "rank": 5, "rank_pattern": {"v_proj": 9}},
    ],
)
def test_other_forms(batch: PackedBatch, config: dict[str, Any]) -> None:
    exact = exact_of(batch, target_modules=SEVEN, **config)
    model, adapter = build(target_modules=SEVEN, **config)
    plain = learned(PackedModel(model, adapter, engine="plain"), adapter, batch)
    fused = learned(PackedModel(model, adapter, engine="fused"), adapter, batch)
    assert_as_near(fused, plain, exact)


@pytest.mark.parametrize("keep", [Keep(), NOTHING], ids=["kept", "again"])
def test_four_bit(batch: PackedBatch, keep: Keep) -> None:
    model, adapter = build(target_modules=SEVEN, quantization="nf4")
    plain = learned(PackedModel(model, adapter, engine="plain"), adapter, batch)
    fused = learned(PackedModel(model, adapter, engine="fused", keep=keep), adapter, batch)
    for distance in distances(fused, plain):
        assert distance < 0.02


@pytest.mark.parametrize("keep", [Keep(), NOTHING], ids=["kept", "again"])
def test_layers_left_expanded(make_batch: MakeBatch, keep: Keep) -> None:
    """The same bits as expanded for each product, launch by launch and in a graph."""
    model, adapter = build(target_modules=FOUR, quantization="nf4")
    start = {name: tensor.detach().clone() for name, tensor in adapter.tensors().items()}
    batches = [
        make_batch([100 + 7 * number, 33, 400 - number, 1], [0, -1, 2, 3], every=5)
        for number in range(5)
    ]

    def run(left: int) -> list[Tensor]:
        with torch.no_grad():
            for name, tensor in adapter.tensors().items():
                tensor.copy_(start[name])
                tensor.grad = None
        packed = PackedModel(model, adapter, engine="fused", keep=keep).train()
        assert packed.decoder is not None
        packed.decoder.leave_expanded(left)
        eager = EagerPasses(packed.losses, packed, CARD)
        graphed = GraphedPasses(packed, adapter, PassSizes(1024, 4), eager)
        found = []
        for one in batches:
            weights = torch.linspace(1, 2, len(one.targets))
            found.append(graphed.run(graphed.prepare(one, weights)).clone())
            found += [t.grad.clone() for t in adapter.tensors().values() if t.grad is not None]
        assert graphed.captures
        return found

    each = run(0)
    assert all(one.isfinite().all() for one in each)
    for left in (3, 1):
        assert all(map(torch.equal, run(left), each))


def test_dropout_with_a_fixed_mask(batch: PackedBatch, monkeypatch: pytest.MonkeyPatch) -> None:

    def mask(self: AdapterProducts, x: Tensor) -> Tensor:
        at = torch.arange(x.numel(), device=x.device).view(x.shape)
        return (at * 2654435761 % 1000) >= 1000 * self.dropout

    monkeypatch.setattr(AdapterProducts, "mask", mask)
    config: dict[str, Any] = {"target_modules": SEVEN, "dropout": 0.2}

    def one(engine: Any, dtype: torch.dtype) -> Learned:
        model, adapter = build(dtype=dtype, **config)
        return learned(PackedModel(model, adapter, engine=engine).train(), adapter, batch)

    exact = one("fused", torch.float32)
    fused = one("fused", torch.bfloat16)
    for distance in distances(fused, exact):
        assert distance < 0.05


def test_a_tail_of_padding_changes_only_rounding(batch: PackedBatch) -> None:
    model, adapter = build(target_modules=SEVEN)
    packed = PackedModel(model, adapter, engine="fused")
    alone = learned(packed, adapter, batch)
    capacity = PassSizes(1500, 4).capacity(batch)
    filled = padded(batch, capacity)
    for tensor in adapter.tensors().values():
        tensor.grad = None
    weights = torch.zeros(capacity.questions)
    weights[: len(batch.targets)] = torch.linspace(1, 2, len(batch.targets))
    passes = EagerPasses(packed.losses, packed, CARD)
    losses = passes.run(passes.prepare(filled, weights))[: len(batch.targets)]
    grads = {n: t.grad.clone() for n, t in adapter.tensors().items() if t.grad is not None}
    for distance in distances((losses, grads), alone):
        assert distance < 0.01


def test_a_graph_gives_what_its_passes_give(make_batch: MakeBatch) -> None:
    model, adapter = build(target_modules=SEVEN)
    packed = PackedModel(model, adapter, engine="fused").train()
    tensors = adapter.tensors()
    eager = EagerPasses(packed.losses, packed, CARD)
    graphed = GraphedPasses(packed, adapter, PassSizes(1024, 4), eager)
    kept = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    for number in range(5):
        lengths = [100 + 7 * number, 33, 400 - number, 1]
        one = make_batch(lengths, [number % 4, -1, 2, 3], every=5)
        weights = torch.linspace(1, 2, len(one.targets))
        expected = learned(packed, adapter, one)
        for name, tensor in tensors.items():
            tensor.grad = kept[name].zero_()  # a graph adds where it was captured
        found = graphed.run(graphed.prepare(one, weights))
        for distance in distances((found, kept), expected):
            assert distance < 0.01


@pytest.mark.parametrize("tasks", [8, 1000])
@pytest.mark.parametrize("config", [{}, {"gate": "embedding", "transform": "bases"}], ids=str)
def test_one_graph_for_any_row(make_batch: MakeBatch, tasks: int, config: dict[str, Any]) -> None:
    """Of any tasks and sizes up to the fullest: the bits of its passes, run launch by launch."""
    model, adapter = build(target_modules=SEVEN, tasks=tasks, **config)
    packed = PackedModel(model, adapter, engine="fused").train()
    tensors = adapter.tensors()
    eager = EagerPasses(packed.losses, packed, CARD)
    sizes = PassSizes(1024, tasks, Fullest(asked=300, examples=30, tasks=20), rows=(2,))
    graphed = GraphedPasses(packed, adapter, sizes, eager)
    kept = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    drawn = random.Random(0)
    for number in range(8):
        count = 4 + 3 * number
        own = [drawn.randrange(-1, tasks) for _ in range(count)]
        one = make_batch([20 + drawn.randrange(30) for _ in own], own, every=5)
        ready = graphed.prepare(one, torch.linspace(1, 2, len(one.targets)))
        for tensor in tensors.values():
            tensor.grad = None
        expected = eager.run(ready)
        alone = {n: t.grad.clone() for n, t in tensors.items() if t.grad is not None}
        for name, tensor in tensors.items():
            tensor.grad = kept[name].zero_()  # a graph adds where it was captured
        found = graphed.run(ready)
        assert torch.equal(found, expected)
        for name, gradient in kept.items():
            torch.testing.assert_close(gradient, alone[name], rtol=1e-5, atol=1e-6)
            if adapter.role(name).per_task:
                absent = [task for task in range(tasks) if task not in own]
                assert not gradient[absent].any()
    assert graphed.captures == 1


def branching(number: int) -> list[PackedBatch]:
    """Examples of three tasks with a beginning of 70 tokens, shared and apart; of each `number` others."""
    drawn = random.Random(number)

    def new(count: int) -> list[int]:
        return [drawn.randrange(3, 512) for _ in range(count)]

    splits: list[EncodedSplit] = []
    row: list[Place] = []
    for task in range(3):
        trunk, bough = new(70), new(9)
        own = [trunk + bough * (n % 2) + new(20 + 3 * n) for n in range(4 + number % 3)]
        splits.append(of(own))
        row += [(task, n) for n in range(len(own))]
    return [training_batch([row], splits, loss_on="all", share=share) for share in (True, False)]


def test_shared_beginnings_give_what_examples_give_apart() -> None:
    """In graphs, too, of trees that are others in every pass."""
    model, adapter = build(target_modules=SEVEN)
    packed = PackedModel(model, adapter, engine="fused").train()
    tensors = adapter.tensors()
    eager = EagerPasses(packed.losses, packed, CARD)
    graphed = GraphedPasses(packed, adapter, PassSizes(2048, 4), eager)
    kept = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    for number in range(5):
        shared, apart = branching(number)
        assert shared.input_ids.numel() < 0.7 * apart.input_ids.numel()
        expected = learned(packed, adapter, apart)
        for name, tensor in tensors.items():
            tensor.grad = kept[name].zero_()  # a graph adds where it was captured
        found = graphed.run(graphed.prepare(shared, torch.linspace(1, 2, len(shared.targets))))
        losses, gradients = distances((found, kept), expected)
        assert losses < 0.01
        assert gradients < 0.05
    exact = [exact_of(batch, target_modules=SEVEN) for batch in branching(0)]
    assert max(distances(*exact)) < 1e-4


def test_eight_bit_floats_stay_near(batch: PackedBatch) -> None:
    model, adapter = build(target_modules=SEVEN)
    exact = learned(PackedModel(model, adapter, engine="fused"), adapter, batch)
    packed = PackedModel(model, adapter, engine="fused", base_compute="fp8")
    found = learned(packed, adapter, batch)
    logprobs, gradients = distances(found, exact)
    assert packed.let_go() is None
    assert distances(learned(packed, adapter, batch), found) == (0.0, 0.0)
    print(f"fp8: log-probabilities {logprobs:.3f}, gradients {gradients:.3f}")
    assert logprobs < 0.02
    assert gradients < 0.15


def test_answers_grow_on_the_engine_as_in_transformers() -> None:
    """Its own trial says so, in graphs and without; rows of several tasks, more than there are rows."""
    model, adapter = build(target_modules=SEVEN)
    packed = PackedModel(model, adapter).eval()
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, 512, (n,), generator=generator).tolist() for n in LENGTHS * 3]
    requests = [
        Request(task, prompt, [[]]) for prompt, task in zip(prompts, TASKS * 3, strict=True)
    ]
    settings: dict[str, Any] = {"ends": [], "new_tokens": [40] * len(requests), "device": CARD}
    found = generate(packed, requests, tokens_per_pass=1500, **settings)
    assert all(len(answer) == 40 for answer in found)
    assert set(packed.rows_agree.values()) == {True}
    assert packed.kept_rows is not None and packed.kept_rows.graphed
    assert generate(packed, requests, tokens_per_pass=1500, **settings) == found
