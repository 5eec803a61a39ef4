"""Every method against its paper, written out a position at a time in float64."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.func import functional_call

from mtl_lora_cli.adapters import frozen
from mtl_lora_cli.adapters.inject import inject
from mtl_lora_cli.adapters.layer import MultiTaskLinear
from mtl_lora_cli.adapters.methods import BUILT_IN, METHODS, configure
from mtl_lora_cli.adapters.methods.base import Role, Settings
from mtl_lora_cli.errors import UsageError

MakeLayer = Callable[..., MultiTaskLinear]
Trained = Callable[[MultiTaskLinear], dict[str, nn.Parameter]]
IDS = torch.tensor([[2, 0, -1, 2, 3, 3], [0, -1, 0, 2, 2, 0]])  # task 1 is absent
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {},
    "pissa": {},
    "mtl-lora": {"up_projections": 2},
    "mtl-lora-fine": {"rank": 5, "up_rank": 2, "embedding_size": 4},
    "mtlora": {"task_rank": 2},
    "moelora": {"rank": 6, "up_projections": 3, "embedding_size": 4},
    "multilora": {"up_projections": 3},
    "hydralora": {"up_projections": 3, "temperature": 0.7},
}
_LEARNED = Role("", (), torch.zeros, "up")
MERGEABLE = [method for method in CONFIGS if METHODS[method].mergeable()]


def update(method: str, p: Mapping[str, Tensor], c: Settings, task: int, x: Tensor) -> Tensor:
    """ΔW_t x of one position, as the paper writes it."""
    a, b = p["lora_A"], p["lora_B"]
    s = c.alpha / c.rank
    if method == "lora":  # arXiv 2106.09685, equation 3
        return s * (b[0] @ (a[0] @ x))
    if method == "pissa":  # arXiv 2404.02948: the residual W − s B₀ A₀ is frozen
        return s * (b[0] @ (a[0] @ x) - p["start_B"][0] @ (p["start_A"][0] @ x))
    if method == "mtl-lora":  # arXiv 2410.09437, equations 3 to 5
        gate = torch.softmax(p["task_gate"][task] / c.tau, 0)
        low = p["task_transform"][task] @ (a[0] @ x)
        return s * sum(g * (up @ low) for g, up in zip(gate, b, strict=True))
    if method == "mtl-lora-fine":  # groups of columns b_k, each weighed by its gate and d_{t,k}
        gate = 1 + p["gate_projection"] @ p["task_embedding"][task]
        total = torch.zeros(len(b[0]), dtype=x.dtype)
        for k in range(c.rank):
            weight = gate[k // c.up_rank] * p["task_transform"][task][k]
            total = total + weight * b[0][:, k] * (a[0][k] @ x)
        return s * total
    if method == "mtlora":  # arXiv 2403.20320: task-agnostic plus task-specific module
        own = p["task_lora_B"][task] @ (p["task_lora_A"][task] @ x)
        return s * (b[0] @ (a[0] @ x)) + c.alpha / c.task_rank * own
    if method == "moelora":  # arXiv 2310.18339, equations 5 to 8
        gate = torch.softmax(p["gate_projection"] @ p["task_embedding"][task] / c.tau, 0)
        n = len(gate) if c.gate_form == "mean_one" else 1
        return s * sum(n * g * (up @ (down @ x)) for g, up, down in zip(gate, b, a, strict=True))
    if method == "multilora":  # arXiv 2311.11501, section 3
        parts = zip(p["scale"], b, a, strict=True)
        return s * sum(scale * (up @ (down @ x)) for scale, up, down in parts)
    # arXiv 2404.19245, equations 4 and 5: the router reads the token
    gate = torch.softmax(p["gate_projection"] @ x / c.tau, 0)
    return s * sum(g * (up @ (a[0] @ x)) for g, up in zip(gate, b, strict=True))


def naive(layer: MultiTaskLinear, p: Mapping[str, Tensor], x: Tensor, ids: Tensor) -> Tensor:
    rows = []
    for i, task in enumerate(ids.tolist()):
        weight, bias = layer.base_layer.weight.detach(), layer.base_layer.bias.detach()
        y = weight @ x[i] + bias
        if task >= 0 and layer.config.method == "dora":  # arXiv 2402.09353, equations 5 and 11
            turned = (
                weight + layer.config.alpha / layer.config.rank * p["lora_B"][0] @ p["lora_A"][0]
            )
            y = p["magnitude"] * (turned @ x[i]) / turned.detach().norm(dim=1) + bias
        elif task >= 0:
            y = y + update(layer.config.method, p, layer.config, task, x[i])
        rows.append(y)
    return torch.stack(rows)


def build(make_layer: MakeLayer, method: str, **more: Any) -> MultiTaskLinear:
    return make_layer(method=method, **{**CONFIGS[method], **more})


def test_every_method_is_here() -> None:
    assert set(CONFIGS) == set(METHODS) == set(BUILT_IN)


@pytest.mark.parametrize("step", [1, 8])
@pytest.mark.parametrize("method", CONFIGS)
def test_equals_the_paper(
    make_layer: MakeLayer,
    trained: Trained,
    method: str,
    step: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In sizes as they are, and filled up with zeros, as a card multiplies them."""
    monkeypatch.setattr(frozen, "step_of", lambda like, dtype: step)
    layer = build(make_layer, method)
    parameters = trained(layer)
    x = torch.randn(*IDS.shape, 7, dtype=torch.float64, requires_grad=True)
    weighting = torch.randn(*IDS.shape, 5, dtype=torch.float64)
    with layer.routing.assign(IDS):
        y = layer(x)
        (y * weighting).sum().backward()
    theirs = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    flat = x.detach().reshape(-1, 7).clone().requires_grad_()
    expected = naive(layer, theirs, flat, IDS.reshape(-1))
    (expected * weighting.reshape(-1, 5)).sum().backward()
    close: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(y.reshape(-1, 5), expected, **close)
    torch.testing.assert_close(x.grad.reshape(-1, 7), flat.grad, **close)
    for name, parameter in parameters.items():
        if not layer.roles.get(name, _LEARNED).learned:
            assert parameter.grad is None
            continue
        torch.testing.assert_close(
            parameter.grad, theirs[name].grad, msg=lambda text, n=name: f"{n}: {text}", **close
        )


# DoRA's norm counts as a constant in the gradient: its differences are those of another function.
@pytest.mark.parametrize("method", [method for method in CONFIGS if method != "dora"])
def test_gradients_equal_finite_differences(
    make_layer: MakeLayer, trained: Trained, method: str
) -> None:
    layer = build(make_layer, method)
    named = {n: p for n, p in trained(layer).items() if n in dict(layer.named_parameters())}

    def output(x: Tensor, *values: Tensor) -> Tensor:
        with layer.routing.assign(IDS):
            return functional_call(layer, dict(zip(named, values, strict=True)), (x,))

    x = torch.randn(*IDS.shape, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        output, (x, *(p.detach().clone().requires_grad_() for p in named.values()))
    )


@pytest.mark.parametrize("method", CONFIGS)
def test_a_fresh_layer_is_the_base_and_can_learn(make_layer: MakeLayer, method: str) -> None:
    some = build(make_layer, method)
    torch.manual_seed(0)
    layer = MultiTaskLinear(some.base_layer, some.config, some.routing, some._shared)
    for name, value in layer.config.starts(layer.weight.detach(), layer.rank).items():
        getattr(layer, name).data.copy_(value)
    x = torch.randn(*IDS.shape, 7, dtype=torch.float64)
    with layer.routing.assign(IDS):
        y = layer(x)
        y.square().sum().backward()
    torch.testing.assert_close(y, layer.base_layer(x), rtol=1e-13, atol=1e-13)
    moving = [n for n, p in layer.named_parameters() if p.grad is not None and bool(p.grad.any())]
    assert moving, "nothing would ever move"


@pytest.mark.parametrize("method", MERGEABLE)
def test_one_task_is_an_ordinary_lora(make_layer: MakeLayer, method: str) -> None:
    layer = build(make_layer, method)
    units = torch.eye(7, dtype=torch.float64)
    for task in range(4):
        with torch.no_grad(), layer.routing.assign(torch.full((7,), task)):
            effective = (layer(units) - layer.base_layer.bias).T
        down, up = layer.task_update(task)
        collapsed = layer.base_layer.weight + layer.config.scale(layer.rank) * up @ down
        torch.testing.assert_close(collapsed, effective, rtol=1e-11, atol=1e-11)


def test_a_gate_that_reads_the_token_is_no_lora(make_layer: MakeLayer) -> None:
    with pytest.raises(UsageError, match="hydralora mixes its up-projections by the token"):
        build(make_layer, "hydralora").task_update(0)


@pytest.mark.parametrize("method", ["mtl-lora", "mtl-lora-fine", "mtlora", "moelora"])
def test_a_tasks_parts_reach_no_other_task(make_layer: MakeLayer, method: str) -> None:
    layer = build(make_layer, method)
    x = torch.randn(*IDS.shape, 7, dtype=torch.float64)

    def output() -> Tensor:
        with torch.no_grad(), layer.routing.assign(IDS):
            return layer(x)

    before = output()
    for name, parameter in [*layer.named_parameters(), *layer._shared.items()]:
        if name.startswith("task_") and parameter is not None:
            parameter.data[2] += 17.0
    after = output()
    torch.testing.assert_close(before[IDS != 2], after[IDS != 2], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(before[IDS == 2], after[IDS == 2])


def test_lora_is_pefts_lora(make_layer: MakeLayer) -> None:
    from peft import LoraConfig, get_peft_model

    layer = build(make_layer, "lora")

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(7, 5, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(x)

    holder = Holder()
    holder.proj.load_state_dict(layer.base_layer.state_dict())
    c = layer.config
    theirs = get_peft_model(
        holder, LoraConfig(r=c.rank, lora_alpha=c.alpha, target_modules=["proj"])
    ).double()
    own = theirs.base_model.model.proj
    own.lora_A["default"].weight.data.copy_(layer.lora_A[0])
    own.lora_B["default"].weight.data.copy_(layer.lora_B[0])
    x = torch.randn(6, 7, dtype=torch.float64)
    weighting = torch.randn(6, 5, dtype=torch.float64)
    with layer.routing.assign(torch.zeros(6, dtype=torch.long)):
        ours = layer(x)
        (ours * weighting).sum().backward()
    expected = theirs(x)
    (expected * weighting).sum().backward()
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.lora_A.grad[0], own.lora_A["default"].weight.grad)
    torch.testing.assert_close(layer.lora_B.grad[0], own.lora_B["default"].weight.grad)


def test_fine_groups_may_have_any_size(make_layer: MakeLayer) -> None:
    """One group of all is a LoRA times a number and a diagonal; the last group may be smaller."""
    for up_rank, groups in ((1, 6), (2, 3), (4, 2), (6, 1)):
        layer = build(make_layer, "mtl-lora-fine", rank=6, up_rank=up_rank)
        assert layer.gate_projection.shape == (groups, 4)
        down, up = layer.task_update(2)
        p = {**dict(layer.named_parameters()), **layer._shared}
        gate = 1 + p["gate_projection"] @ p["task_embedding"][2]
        weights = [
            gate[k // up_rank].item() * d for k, d in enumerate(p["task_transform"][2].tolist())
        ]
        expected = layer.lora_B[0].detach() * torch.tensor(weights, dtype=torch.float64)
        torch.testing.assert_close(up, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(down, layer.lora_A[0].detach(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("mtl-lora-fine", {}),
        ("moelora", {}),
        ("mtl-lora", {}),
        ("mtl-lora", {"transform": "diagonal", "gate": "embedding", "transform_start": 0.5}),
        ("mtl-lora", {"transform": "bases"}),
    ],
)
def test_tied_a_method_knows_no_tasks(
    make_layer: MakeLayer, method: str, own: dict[str, Any]
) -> None:
    layer = build(make_layer, method, tied=True, **own)
    assert layer.config.mixing(layer.tensors(None)).shape[:2] == (1, 4)
    updates = [layer.task_update(task) for task in range(4)]
    assert all(torch.equal(up, updates[0][1]) for _, up in updates)
    x = torch.randn(4, 7, dtype=torch.float64)
    with torch.no_grad(), layer.routing.assign(torch.arange(4)):
        found = layer(x)
    with torch.no_grad(), layer.routing.assign(torch.zeros(4, dtype=torch.long)):
        torch.testing.assert_close(found, layer(x), rtol=1e-13, atol=1e-13)
    assert not layer.config.per_task
    apart = build(make_layer, method, **own)
    assert not torch.equal(apart.task_update(0)[1], apart.task_update(1)[1])
    gates = layer.config.gates(layer.tensors(None))
    assert gates.shape[:2] == (1, 4)
    assert all(one.shape[:2] == (1, 4) for one in layer.config.own(layer.tensors(None)).values())


def test_a_group_is_no_larger_than_a_layers_rank() -> None:
    with pytest.raises(ValueError, match="'up_rank' is at most the rank of a layer, 2, received 3"):
        configure(method="mtl-lora-fine", up_rank=3, rank_pattern={"v_proj": 2})


def test_gates_of_mean_one_do_not_divide_moeloras_update(make_layer: MakeLayer) -> None:
    for form, mean in (("softmax", 1 / 3), ("mean_one", 1.0)):
        layer = build(make_layer, "moelora", gate_form=form)
        gates = layer.config.gates(layer.tensors(None))
        torch.testing.assert_close(gates.mean(-1), torch.full((1, 4), mean, dtype=torch.float64))
        ids = IDS.reshape(-1)
        x = torch.randn(len(ids), 7, dtype=torch.float64)
        p = {**dict(layer.named_parameters()), **layer._shared}
        with torch.no_grad(), layer.routing.assign(ids):
            torch.testing.assert_close(layer(x), naive(layer, p, x, ids), rtol=1e-11, atol=1e-11)


SHAPES = {"first": (8, 12), "second": (6, 8)}


def by_the_table(c: Any, shapes: Mapping[str, tuple[int, int]], tasks: int) -> int:
    """Trained values by the formulas of docs/method.md."""
    total = 0
    for path, (out, width) in shapes.items():
        r, n = c.rank_of(path), c.ups
        if c.method == "mtlora":
            own = c.task_modules is None or path in c.task_modules
            total += (r + tasks * c.task_rank * own) * (width + out)
        elif c.method == "mtl-lora-fine":
            total += r * (width + out) + -(-r // c.up_rank) * c.embedding_size + tasks * r
        elif c.method in ("lora", "moelora", "pissa", "dora"):
            total += r * (width + out) + out * (c.method == "dora")
        elif c.method == "multilora":
            total += n * r * (width + out) + n * out
        elif c.method == "hydralora":
            total += r * (width + n * out) + n * width
        else:
            k = c.transform_bases
            transform = {"full": tasks * r * r, "diagonal": tasks * r, "bases": k * (r * r + tasks)}
            gate = tasks * n if c.gate == "weights" else n * c.embedding_size
            total += r * (width + n * out) + transform[c.transform] + gate
    if c.method == "moelora":
        total += (tasks + c.ups) * c.embedding_size
    if c.method == "mtl-lora-fine" or (c.method == "mtl-lora" and c.gate == "embedding"):
        total += tasks * c.embedding_size
    return total


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 6)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        *((name, {}) for name in CONFIGS),
        ("mtl-lora", {"gate": "embedding", "transform": "diagonal"}),
        ("mtl-lora-fine", {"rank_pattern": {"second": 2}}),
        ("mtl-lora", {"transform": "bases"}),
        ("mtl-lora", {"transform": "bases", "transform_bases": 2, "gate": "embedding"}),
        ("mtlora", {"task_modules": ("second",)}),
        ("mtlora", {"task_modules": ("first",), "rank_pattern": {"second": 2}}),
    ],
)
def test_the_formula_counts_what_is_trained(method: str, more: dict[str, Any]) -> None:
    config = configure(
        method=method, target_modules=("first", "second"), **{"rank": 3, **CONFIGS[method], **more}
    )
    adapter = inject(Two(), config, ("a", "b", "c"))
    counted = config.count(SHAPES, 3)
    assert counted == adapter.parameter_count() == by_the_table(config, SHAPES, 3)


def test_a_rank_pattern_names_layers() -> None:
    config = configure(target_modules=("first", "second"), rank_pattern={"second": 2})
    adapter = inject(Two(), config, ("a",))
    assert adapter.layers["first"].rank == 8
    assert adapter.layers["second"].lora_A.shape == (1, 2, 8)
    assert adapter.layers["second"].products((0, 8)).scales == (16 / 2,)
    assert config.count(SHAPES, 1) == adapter.parameter_count()
    wrong = configure(target_modules=("first",), rank_pattern={"secnd": 2})
    with pytest.raises(UsageError, match="rank_pattern: 'secnd' matches no adapted layer"):
        inject(Two(), wrong, ("a",))


def test_tasks_own_parts_in_some_layers_only() -> None:
    """The others are plain LoRAs of the same rank and scale."""
    parts = {"method": "mtlora", "target_modules": ("first", "second"), "alpha": 24.0}
    adapter = inject(Two(), configure(**parts, task_modules=("second",)), ("a", "b"))
    assert set(adapter.tensors()) == {
        "first.lora_A", "first.lora_B",
        "second.lora_A", "second.lora_B", "second.task_lora_A", "second.task_lora_B",
    }  # fmt: skip
    with torch.no_grad():
        for tensor in adapter.tensors().values():
            tensor.normal_()
    first, second = adapter.layers["first"], adapter.layers["second"]
    x, ids = torch.randn(3, 12), torch.tensor([1, -1, 0])
    with torch.no_grad(), adapter.routing.assign(ids):
        added = first(x) - first.base_layer(x)
    expected = 3 * x @ first.lora_A[0].T @ first.lora_B[0].T
    expected[1] = 0
    torch.testing.assert_close(added, expected)
    assert len({tuple(first.task_update(task)[1].flatten().tolist()) for task in (0, 1)}) == 1
    assert not torch.equal(second.task_update(0)[1], second.task_update(1)[1])
    everywhere = inject(Two(), configure(**parts), ("a", "b"))
    assert "first.task_lora_A" in everywhere.tensors()
    wrong = configure(**parts, task_modules=("second", "frist"))
    with pytest.raises(UsageError, match="task_modules: 'frist' matches no adapted layer; did you"):
        inject(Two(), wrong, ("a", "b"))


@pytest.mark.parametrize("transform", ["full", "diagonal"])
def test_each_task_may_weigh_the_directions_differently_from_the_start(
    make_layer: MakeLayer, transform: str
) -> None:
    some = make_layer(tasks=50, rank=40, transform=transform, transform_start=0.3)
    torch.manual_seed(0)
    layer = MultiTaskLinear(some.base_layer, some.config, some.routing)
    found = layer.config.transforms(layer.tensors(None))[0].detach()
    diagonal = found.diagonal(dim1=1, dim2=2)
    assert torch.equal(found, torch.diag_embed(diagonal))
    assert diagonal.mean().item() == pytest.approx(1, abs=0.03)
    assert diagonal.std().item() == pytest.approx(0.3, rel=0.1)
    x = torch.randn(50, 7, dtype=torch.float64)
    with layer.routing.assign(torch.arange(50)):
        assert torch.equal(layer(x), layer.base_layer(x))
    torch.manual_seed(0)
    again = MultiTaskLinear(some.base_layer, some.config, some.routing)
    assert torch.equal(again.task_transform, layer.task_transform)


def test_bases_start_as_the_identity_and_all_of_them_learn(make_layer: MakeLayer) -> None:
    some = make_layer(transform="bases", transform_bases=2)
    torch.manual_seed(0)
    layer = MultiTaskLinear(some.base_layer, some.config, some.routing)
    identity = torch.eye(3, dtype=torch.float64).expand(4, -1, -1)
    assert torch.equal(layer.config.transforms(layer.tensors(None))[0], identity)
    layer.lora_B.data.normal_()
    x = torch.randn(*IDS.shape, 7, dtype=torch.float64)
    with layer.routing.assign(IDS):
        layer(x).square().sum().backward()
    assert layer.transform_basis.grad is not None
    one, two = layer.transform_basis.grad
    assert one.any() and two.any() and not torch.allclose(one, two)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (
            {"transform_start": -0.1},
            "transform_start: input should be greater than or equal to 0, received -0.1",
        ),
        ({"transform": "bases", "transform_start": 0.1}, "not read with transform: bases"),
        ({"transform_bases": 0}, "transform_bases: input should be greater than 0, received 0"),
        (
            {"method": "mtlora", "task_modules": ()},
            "task_modules: list should have at least 1 item",
        ),
        ({"method": "lora", "gate": "weights"}, "gate: extra inputs are not permitted"),
    ],
)
def test_forms_that_cannot_be(config: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        configure(**config)


@pytest.mark.parametrize(
    ("method", "keys", "line"),
    [
        (
            "lora",
            {"transform_start": 1.0},
            "'transform_start' is not read by method: lora, only by",
        ),
        ("mtlora", {"transform_bases": 2}, "'transform_bases' is not read by method: mtlora"),
        (
            "mtl-lora",
            {"task_modules": ["o_proj"]},
            "'task_modules' is not read by method: mtl-lora",
        ),
        ("mtl-lora", {"transform_bases": 2}, "'transform_bases' is not read with transform: full"),
        (
            "mtl-lora",
            {"transform": "bases", "transform_start": 1.0},
            "'transform_start' is not read with transform: bases",
        ),
    ],
)
def test_a_recipe_says_nothing_that_would_do_nothing(
    method: str, keys: dict[str, Any], line: str
) -> None:
    from mtl_lora_cli.recipe.method import Adapter

    with pytest.raises(ValueError, match=line):
        TypeAdapter(Adapter).validate_python({"method": method, **keys})


def test_llama_2_7b_by_the_formulas() -> None:
    """q, k, v, o of 32 layers of width 4,096; 8 tasks, n = 3, r = 8, as in the paper."""
    shapes = dict.fromkeys(map(str, range(4 * 32)), (4096, 4096))
    assert configure(method="lora").count(shapes, 8) == 8_388_608
    assert configure(method="mtl-lora").count(shapes, 8) == 16_845_824


def test_scaling_by_the_root_of_the_rank(make_layer: MakeLayer) -> None:
    assert configure(alpha=12, scaling="sqrt_rank").scale(9) == 4
    assert configure(alpha=12).scale(6) == 2


def test_what_a_recipe_is_checked_with_loads_no_torch() -> None:
    code = (
        "import sys\n"
        "from mtl_lora_cli.adapters.methods import BUILT_IN, METHODS, configure\n"
        "import mtl_lora_cli.recipe.json_schema\n"
        "counts = [configure(name).count({'a': (8, 8)}, 3) for name in METHODS]\n"
        "print(len(counts), {'torch', 'transformers', 'numpy'} & {*sys.modules})\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == f"{len(METHODS)} set()\n"
