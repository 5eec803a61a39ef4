"""What `inspect` says of an adapter: every number against the dense matrices it is about."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtl_lora_cli.adapters.files import TENSOR_FILE, read_alone, save_adapter
from mtl_lora_cli.adapters.inject import Adapter, inject
from mtl_lora_cli.adapters.methods import METHODS, configure
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.report.adapter import inspect_adapter, inspect_run, update_gram
from mtl_lora_cli.report.heatmaps import draw, require_plots
from mtl_lora_cli.runs.folder import RunFolder

TASKS = ("one", "two", "three")
SHAPES = {"layers.0.q_proj": (6, 10), "layers.0.up_proj": (12, 6), "layers.1.q_proj": (6, 10)}
FORMS: dict[str, dict[str, Any]] = {
    "mtl-lora": {},
    "mtl-lora embedding diagonal": {"gate": "embedding", "transform": "diagonal"},
    "mtl-lora-fine": {},
    "lora": {"rank_pattern": {"up_proj": 2}},
    "mtl-lora bases": {"transform": "bases", "transform_bases": 2},
    "mtlora": {"task_rank": 2},
    "mtlora modules": {"task_modules": ("q_proj",)},
    "moelora": {"up_projections": 2},
    "multilora": {},
    "hydralora": {},
    "pissa": {},
    "dora": {},
}
MERGEABLE = [form for form in FORMS if METHODS[form.split()[0]].mergeable()]


def make(form: str) -> Adapter:
    """An adapter of random numbers on layers at `SHAPES`."""
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Module(), nn.Module()])
    for path, (out, width) in SHAPES.items():
        _, number, name = path.split(".")
        model.layers[int(number)].add_module(name, nn.Linear(width, out, bias=False))
    settings = {"rank": 4, "target_modules": ("q_proj", "up_proj"), **FORMS[form]}
    adapter = inject(model, configure(method=form.split()[0], **settings), TASKS)
    with torch.no_grad():
        for tensor in adapter.tensors().values():
            tensor.copy_(torch.randn_like(tensor))
    return adapter


def dense(adapter: Adapter, path: str, task: int) -> Tensor:
    """ΔW_t [out, in], read off the layer itself: what it adds to W x for every unit vector x."""
    layer = adapter.layers[path]
    layer.eval()
    unit = torch.eye(layer.base_layer.in_features)
    with torch.no_grad(), adapter.routing.assign(torch.full((len(unit),), task)):
        return (layer(unit) - layer.base_layer(unit)).T.double()


@pytest.mark.parametrize("form", MERGEABLE)
def test_norms_and_cosines_are_those_of_the_whole_updates(form: str) -> None:
    adapter = make(form)
    found = inspect_adapter(adapter)
    updates = {path: [dense(adapter, path, task) for task in range(3)] for path in SHAPES}
    for path, several in updates.items():
        for name, update in zip(TASKS, several, strict=True):
            norm = found["layers"][path]["norms"]["update"][name]
            assert norm == pytest.approx(float(update.norm()), rel=1e-5)
    whole = [torch.cat([updates[path][task].flatten() for path in SHAPES]) for task in range(3)]
    for t, first in enumerate(whole):
        assert found["update_norm"][TASKS[t]] == pytest.approx(float(first.norm()), rel=1e-5)
        for u, second in enumerate(whole):
            cosine = float(torch.dot(first, second) / first.norm() / second.norm())
            assert found["similarity"]["updates"][t][u] == pytest.approx(cosine, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_sizes_and_norms_of_factors(form: str) -> None:
    adapter = make(form)
    found = inspect_adapter(adapter)
    assert found["parameters"]["total"] == adapter.parameter_count()
    assert sum(found["parameters"]["by_role"].values()) == adapter.parameter_count()
    for path, layer in adapter.layers.items():
        entry = found["layers"][path]
        assert (entry["out_features"], entry["in_features"]) == SHAPES[path]
        assert entry["rank"] == layer.rank
        assert entry["norms"]["A"] == pytest.approx([float(a.norm()) for a in layer.lora_A])
        ups = layer.lora_B
        if form == "multilora":
            ups = layer.scale.unsqueeze(-1) * ups
        assert entry["norms"]["B"] == pytest.approx([float(b.norm()) for b in ups])
        if form.startswith("mtl-lora"):
            square = layer.task_transform[1]
            if form.endswith(("diagonal", "fine")):
                square = torch.diag(square)
            elif form.endswith("bases"):
                square = torch.eye(4) + torch.einsum("k,kab->ab", square, layer.transform_basis)
            assert entry["norms"]["transform"]["two"] == pytest.approx(float(square.norm()))
            change = float((square - torch.eye(4)).norm())
            assert entry["norms"]["transform_change"]["two"] == pytest.approx(change)


@torch.no_grad()
def test_gates_and_their_cosines() -> None:
    adapter = make("mtl-lora")
    found = inspect_adapter(adapter)
    gates = {
        path: (layer.task_gate.double() / layer.config.tau).softmax(-1)
        for path, layer in adapter.layers.items()
    }
    for path, expected in gates.items():
        for task, name in enumerate(TASKS):
            gate = found["layers"][path]["gates"][name]
            assert sum(gate) == pytest.approx(1, abs=1e-6)
            assert gate == pytest.approx(expected[task].tolist(), abs=1e-6)
    one, two = (torch.cat([gates[path][task] for path in SHAPES]) for task in (0, 1))
    cosine = float(torch.dot(one, two) / one.norm() / two.norm())
    assert found["similarity"]["gates"][0][1] == pytest.approx(cosine, abs=1e-6)


@pytest.mark.parametrize(
    ("form", "note"),
    [
        ("lora", "the same for all tasks"),
        ("multilora", "the same for all tasks"),
        ("mtlora", "no gate of a task"),
        ("hydralora", "reads the token"),
    ],
)
def test_what_a_method_does_not_have_is_said(form: str, note: str) -> None:
    found = inspect_adapter(make(form))
    assert found["similarity"]["gates"] is None
    assert all(layer["gates"] is None for layer in found["layers"].values())
    assert any(note in line for line in found["notes"])
    if form == "hydralora":
        assert found["update_norm"] is None and found["similarity"]["updates"] is None
    if "same" in note:
        for row in found["similarity"]["updates"]:
            assert row == pytest.approx([1, 1, 1])


def test_products_of_updates_never_take_a_whole_one() -> None:
    """Each would have 4·10¹⁰ numbers, 320 GB."""
    torch.manual_seed(0)
    updates = [(torch.randn(2, 200_000), torch.randn(200_000, 2)) for _ in range(2)]
    gram = update_gram(updates)
    (a, b), (c, d) = updates
    trace = torch.trace(b.double().T @ d.double() @ (c.double() @ a.double().T))
    assert float(gram[0, 1]) == pytest.approx(float(trace), rel=1e-9)


def test_an_adapter_at_its_start_has_no_cosine() -> None:
    adapter = make("mtl-lora")
    for layer in adapter.layers.values():
        layer.lora_B.data.zero_()
    found = inspect_adapter(adapter)
    assert found["update_norm"] == {"one": 0, "two": 0, "three": 0}
    assert found["similarity"]["updates"] == [[None] * 3] * 3


def test_numbers_that_are_none_are_named_and_the_rest_is_json() -> None:
    adapter = make("mtl-lora")
    adapter.layers["layers.0.q_proj"].lora_B.data[0, 0, 0] = math.nan
    found = inspect_adapter(adapter)
    assert found["notes"] == ["'layers.0.q_proj.lora_B' holds numbers that are not finite"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["layers"]["layers.0.q_proj"]["norms"]["update"]["one"] is None
    assert found["layers"]["layers.1.q_proj"]["norms"]["update"]["one"] > 0


def saved(form: str, folder: Path) -> RunFolder:
    run = RunFolder(folder)
    run.adapter.mkdir()
    save_adapter(make(form), run.adapter, {})
    return run


@pytest.mark.parametrize("form", FORMS)
def test_the_files_alone_tell_the_same(form: str, tmp_path: Path) -> None:
    found = inspect_run(saved(form, tmp_path))
    assert found == {"run": tmp_path.name, **inspect_adapter(make(form))}


def test_an_adapter_alone_takes_no_memory_for_the_base_model(tmp_path: Path) -> None:
    saved("lora", tmp_path)
    adapter = read_alone(tmp_path / "adapter")
    for layer in adapter.layers.values():
        assert layer.base_layer.weight.untyped_storage().nbytes() == 4


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    run = saved("lora", tmp_path)
    path = run.adapter / TENSOR_FILE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(UsageError, match="is damaged: its checksum differs"):
        inspect_run(run)


@pytest.mark.parametrize("form", FORMS)
def test_the_picture(form: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    path = tmp_path / "adapter.png"
    require_plots(path)
    draw({"run": "mine", **inspect_adapter(make(form))}, path)
    picture = imread(path)
    assert min(picture.shape[:2]) > 100
    assert len(set(picture.reshape(-1, picture.shape[2])[:, 0].tolist())) > 20  # not blank


def test_a_picture_that_cannot_be_drawn_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"expected a file ending in .*\.png.*received"):
        require_plots(tmp_path / "adapter.xyz")
    with pytest.raises(UsageError, match="there is no folder"):
        require_plots(tmp_path / "nowhere" / "adapter.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match="matplotlib is not installed"):
        require_plots(tmp_path / "adapter.png")
