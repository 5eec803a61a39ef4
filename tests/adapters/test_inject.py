"""Putting adapters into models of any kind: what targets mean, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtl_lora_cli.adapters.experts import StackFrame
from mtl_lora_cli.adapters.inject import Adapter, inject
from mtl_lora_cli.adapters.layer import MultiTaskLinear
from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.errors import UsageError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.up_proj = nn.Linear(8, 12)
        self.down_proj = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(torch.relu(self.up_proj(self.q_proj(x))))


class Tower(nn.Module):
    """Twelve blocks between an embedding and a head that may share its weight."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(12))
        self.head = nn.Linear(8, 10, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Images(nn.Module):
    """A model without text: convolutions, channels last, then linear layers over every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.mix = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, images: Tensor) -> Tensor:
        pixels = self.stem(images).permute(0, 2, 3, 1)
        return self.head(pixels + self.mix(pixels))


def put(model: nn.Module, *targets: str, tasks: int = 3, **config: Any) -> Adapter:
    names = [f"task{number}" for number in range(tasks)]
    return inject(model, configure(target_modules=targets, **config), names)


def shake(adapter: Adapter) -> None:
    with torch.no_grad():
        for tensor in adapter.tensors().values():
            tensor.copy_(torch.randn_like(tensor))


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("q_proj",), {f"blocks.{i}.q_proj" for i in range(12)}),
        (("blocks.3.up_proj",), {"blocks.3.up_proj"}),
        (("3.up_proj",), {"blocks.3.up_proj"}),
        (
            ("blocks.1?.*_proj",),
            {f"blocks.{i}.{n}_proj" for i in (10, 11) for n in ("q", "up", "down")},
        ),
        (("*.4.q_proj", "head"), {"blocks.4.q_proj", "head"}),
        (("q_proj", "blocks.0.q_proj"), {f"blocks.{i}.q_proj" for i in range(12)}),
    ],
)
def test_what_a_target_names(targets: tuple[str, ...], expected: set[str]) -> None:
    model = Tower()
    adapter = put(model, *targets)
    assert set(adapter.layers) == expected
    found = {path for path, m in model.named_modules() if isinstance(m, MultiTaskLinear)}
    assert found == expected


def test_a_target_is_no_substring() -> None:
    model = nn.ModuleDict({"proj": nn.Linear(2, 2), "q_proj": nn.Linear(2, 2)})
    assert set(put(model, "proj").layers) == {"proj"}


def test_a_target_that_matches_nothing_suggests_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        put(Tower(), "q_proj", "upproj")
    assert str(caught.value) == (
        "adapter.target_modules: 'upproj' matches no linear layer of the model; did you mean "
        "'up_proj'?; linear layers: down_proj, head, q_proj, up_proj"
    )


@pytest.mark.parametrize("target", ["embed", "blocks", "blocks.0", "", "*.nothing"])
def test_a_target_that_is_no_linear_layer_is_refused(target: str) -> None:
    model = Tower()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(
        UsageError,
        match=r"matches no linear layer|class \w+, which cannot be adapted",
    ):
        put(model, target)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_weight_tied_to_an_embedding_is_refused() -> None:
    model = Tower(tied=True)
    with pytest.raises(UsageError, match="'head' shares its weight with 'embed'"):
        put(model, "q_proj", "head")
    assert not any(isinstance(module, MultiTaskLinear) for module in model.modules())
    put(model, "q_proj")  # the others can be adapted all the same


def test_a_weight_tied_to_another_linear_layer_is_refused() -> None:
    model = Tower()
    model.blocks[1].q_proj.weight = model.blocks[0].q_proj.weight
    with pytest.raises(UsageError, match=r"shares its weight"):
        put(model, "q_proj")


def test_a_layer_that_stands_at_two_places_is_refused() -> None:
    model = Tower()
    model.blocks[1].q_proj = model.blocks[0].q_proj
    with pytest.raises(UsageError, match=r"shares its weight|stands at"):
        put(model, "q_proj")


@pytest.mark.parametrize("gate", ["weights", "embedding"])
def test_a_fresh_adapter_changes_nothing(gate: str) -> None:
    model = Tower()
    ids = torch.randint(10, (2, 5))
    before = model(ids)
    adapter = put(model, "*", gate=gate)
    with adapter.routing.assign([0, 2]):
        assert torch.equal(model(ids), before)


@pytest.mark.parametrize("gate", ["weights", "embedding"])
def test_only_the_adapter_learns(gate: str) -> None:
    model = Tower()
    adapter = put(model, "q_proj", "up_proj", gate=gate)
    shake(adapter)
    with adapter.routing.assign([0, 1]):
        model(torch.randint(10, (2, 5))).square().sum().backward()
    learning = {id(p) for p in model.parameters() if p.requires_grad}
    assert learning == {id(tensor) for tensor in adapter.tensors().values()}
    with_gradient = {id(p) for p in model.parameters() if p.grad is not None}
    assert with_gradient == learning


@pytest.mark.parametrize("gate", ["weights", "embedding"])
def test_a_model_of_images(gate: str) -> None:
    torch.manual_seed(0)
    model = Images().double()
    adapter = put(model, "mix.*", "head", gate=gate)
    shake(adapter)
    images = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    tasks = [2, 0, -1, 1]
    with torch.no_grad():
        with adapter.routing.assign(tasks):
            together = model(images)
        for row, task in enumerate(tasks):
            with adapter.routing.assign([task]):
                torch.testing.assert_close(model(images[row : row + 1])[0], together[row])
        torch.manual_seed(0)
        torch.testing.assert_close(Images().double()(images)[2], together[2])


@pytest.mark.parametrize("transform", ["full", "diagonal", "bases"])
@pytest.mark.parametrize("gate", ["weights", "embedding"])
@pytest.mark.parametrize("n", [1, 3])
def test_the_number_of_trained_values(transform: str, gate: str, n: int) -> None:
    r, tasks, d = 4, 5, 6
    adapter = put(
        Tower(),
        "q_proj",
        "blocks.0.up_proj",
        tasks=tasks,
        rank=r,
        up_projections=n,
        transform=transform,
        gate=gate,
        embedding_size=d,
    )
    sizes = [(8, 8)] * 12 + [(8, 12)]
    transforms = {"full": tasks * r * r, "diagonal": tasks * r, "bases": 4 * r * r + tasks * 4}
    gates = tasks * n if gate == "weights" else n * d
    expected = sum(r * i + n * o * r + transforms[transform] + gates for i, o in sizes)
    expected += tasks * d if gate == "embedding" else 0
    assert adapter.parameter_count() == expected


def test_the_start_follows_from_the_seed_and_not_from_the_order_of_targets() -> None:
    starts = []
    for targets in (("up_proj", "q_proj"), ("q_proj", "up_proj")):
        model = Tower()
        torch.manual_seed(3)
        starts.append(put(model, *targets).tensors())
    assert list(starts[0]) == list(starts[1])
    assert all(torch.equal(one, two) for one, two in zip(*map(dict.values, starts), strict=True))


@pytest.mark.parametrize("gate", ["weights", "embedding"])
def test_the_gates_logits_start_with_the_configured_spread(gate: str) -> None:
    torch.manual_seed(0)
    adapter = put(Tower(), "*_proj", gate=gate, tasks=200, gate_start=1.5, temperature=0.3)
    logits = []
    for layer in adapter.layers.values():
        gates = layer.config.gates(layer.tensors(None))[0].detach()
        torch.testing.assert_close(gates.sum(1), torch.ones(200))
        centred = gates.log() - gates.log().mean(1, keepdim=True)
        logits.append(centred)
    n = 3
    spread = torch.cat(logits).square().mean() * n / (n - 1)
    assert spread.sqrt().item() == pytest.approx(1.5, rel=0.1)


def test_the_handle_names_tensors_as_the_file_does() -> None:
    adapter = put(Tower(), "blocks.0.q_proj", gate="embedding", embedding_size=4)
    shapes = {name: tuple(tensor.shape) for name, tensor in adapter.tensors().items()}
    assert shapes == {
        "task_embedding": (3, 4),
        "blocks.0.q_proj.lora_A": (1, 8, 8),
        "blocks.0.q_proj.lora_B": (3, 8, 8),
        "blocks.0.q_proj.task_transform": (3, 8, 8),
        "blocks.0.q_proj.gate_projection": (3, 4),
    }


class Unstacked(nn.Module):
    """A layer whose experts are no stacks."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.experts = nn.ModuleList([nn.Linear(4, 4)])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.ModuleDict({"q_proj": nn.Linear(4, 4)}),
            r"adapter\.experts: each: the model has no experts",
        ),
        (nn.ModuleDict({"layer": Unstacked()}), r"'layer.experts' \(ModuleList\) does not hold"),
    ],
)
def test_experts_that_are_not_there_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        inject(model, configure(rank=2, experts="each", target_modules=["q_proj"]), ["one"])
    assert len(caught.value.lines) == 1
    assert not any(isinstance(module, MultiTaskLinear) for module in model.modules())


@pytest.mark.parametrize("method", ["dora", "pissa"])
@pytest.mark.parametrize("experts", ["shared", "each"])
def test_methods_that_start_from_the_weight_are_not_for_experts(method: str, experts: str) -> None:
    stacks = StackFrame(transposed=False)
    stacks.add("gate_up_proj", 3, 8, 4)
    stacks.add("down_proj", 3, 4, 4)
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "experts": stacks})
    with pytest.raises(UsageError, match=f"experts: {experts}: method {method} starts from"):
        inject(model, configure(method, experts=experts, target_modules=["q_proj"]), ["one"])


def test_a_target_that_names_experts_says_which_key_adapts_them() -> None:
    experts = StackFrame(transposed=False)
    experts.add("gate_up_proj", 3, 8, 4)
    experts.add("down_proj", 3, 4, 4)
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "experts": experts})
    with pytest.raises(
        UsageError, match=r"'gate_up_proj' matches experts, which `adapter\.experts`"
    ):
        inject(model, configure(target_modules=["q_proj", "gate_up_proj"]), ["one"])
