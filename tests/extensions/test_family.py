"""A model family from one file of the user's own: on the fused engine, in memory, in a whole run.

Mellum with dense layers: norms of each head, windows and a second rotary embedding, with norms before each
half alone. No built-in plan says that. On the other side stands transformers, on each example alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtl_lora_cli.engine import families
from mtl_lora_cli.engine.decoder import obstacle
from mtl_lora_cli.errors import MtlLoraError
from mtl_lora_cli.extensions import VARIABLE, load_extensions
from mtl_lora_cli.recipe.training import Recompute

from ..engine.double import WINDOW, adapt_all, tiny
from ..engine.peaks import WIDE, peaks
from ..engine.test_families import CLOSE, furthest
from ..families.build import build
from ..families.models import tiny as declared
from ..forks import Forks

FILE = '''
from mtl_lora_cli.engine.families import family, llama
from mtl_lora_cli.engine.plan import LayerPlan, NotPlanned


@family("mellum")
def mellum(config):
    """Mellum, where all of its layers are dense."""
    if set(config.mlp_layer_types) != {"dense"}:
        raise NotPlanned("experts")
    mlp = llama.mlp(config)
    layers = [
        LayerPlan(
            llama.attention(
                config,
                rotary=llama.rotary(config, kind),
                window=llama.window(config, kind),
                q_norm=llama.norm(config, "self_attn.q_norm"),
                k_norm=llama.norm(config, "self_attn.k_norm"),
            ),
            mlp,
        )
        for kind in llama.layer_types(config)
    ]
    return llama.stack(config, layers)
'''
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]


def changes(layers: list[str]) -> dict[str, Any]:
    return {"layer_types": layers, "mlp_layer_types": ["dense"] * len(layers)}


@pytest.fixture
def register(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """`register(text)` writes the file and runs it; afterwards the family is forgotten."""
    families.known_types()  # the built-in ones are there before
    monkeypatch.setattr(families, "_families", dict(families._families))
    monkeypatch.setenv(VARIABLE, "")

    def run(text: str = FILE) -> Path:
        path = tmp_path / "mellum.py"
        path.write_text(text, encoding="utf-8")
        load_extensions([path])
        return path

    yield run


def test_it_is_transformers_alone(register: Callable[..., Path]) -> None:
    model = tiny("mellum", **changes(KINDS))
    assert obstacle(model, None) == "model type mellum"
    register()
    assert obstacle(tiny("mellum", mlp_layer_types=["dense", "sparse", "dense"]), None) == "experts"
    plans = {repr(layer) for layer in families.plan_of(model.config).layers}
    for kind in ("qwen3", "gemma3_text", "olmo3"):
        other = families.plan_of(tiny(kind, layer_types=KINDS).config)
        assert plans.isdisjoint(repr(layer) for layer in other.layers)
    assert furthest(model) < CLOSE


@pytest.mark.parametrize(
    ("line", "broken"),
    [
        ("llama.rotary(config, kind)", 'llama.rotary(config, "full_attention")'),
        ("window=llama.window(config, kind)", f"window={WINDOW + 1}"),
        ('"self_attn.k_norm"', '"self_attn.q_norm"'),
    ],
)
def test_a_wrong_line_of_it_is_seen(register: Callable[..., Path], line: str, broken: str) -> None:
    assert FILE.count(line) == 1
    register(FILE.replace(line, broken))
    assert furthest(tiny("mellum", **changes(KINDS))) > 1e-3


@pytest.mark.parametrize("recompute", [False, Recompute(attended=True, qkv=2, gate_up=3)], ids=str)
def test_its_bytes_are_predicted(
    register: Callable[..., Path], recompute: bool | Recompute
) -> None:
    register()
    keys = {**changes([*KINDS, KINDS[1]]), **WIDE, "sliding_window": 100}
    model = tiny("mellum", **keys).float()
    adapter = adapt_all(model)
    for tensor in adapter.tensors().values():
        tensor.data = tensor.data.float()
    estimate, measured = peaks(model, adapter, recompute)
    assert estimate == pytest.approx(measured, rel=0.06)


def test_a_plan_that_names_what_is_not_there_is_said(register: Callable[..., Path]) -> None:
    register(FILE.replace("self_attn.q_norm", "self_attn.norm_of_q"))
    found = obstacle(tiny("mellum", **changes(KINDS)), None)
    assert found == "no module 'layers.0.self_attn.norm_of_q', which its family's plan names"


@pytest.mark.parametrize(
    ("line", "broken", "said"),
    [
        ("config.mlp_layer_types", "config.mlp_types", "failed: AttributeError: "),
        ("return llama.stack(config, layers)", "return layers", "expected a Plan, received list"),
    ],
)
def test_a_file_that_fails_is_a_reason(
    register: Callable[..., Path], line: str, broken: str, said: str
) -> None:
    path = register(FILE.replace(line, broken))
    found = str(obstacle(tiny("mellum", **changes(KINDS)), None))
    assert found.startswith(f"the family of 'mellum' ({path}:6)") and said in found


def test_a_type_has_one_family(register: Callable[..., Path]) -> None:
    with pytest.raises(
        MtlLoraError, match=r"a model family 'qwen3' is there already \(.*qwen3.py:"
    ):
        register(FILE.replace('@family("mellum")', '@family("qwen3")'))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mellum of random weights, the file, and a recipe that names both."""
    folder = tmp_path_factory.mktemp("place")
    kinds = KINDS[:2]
    build(declared("mellum", layer_types=kinds, mlp_layer_types=["dense"] * 2), folder / "mellum")
    (folder / "mellum.py").write_text(FILE, encoding="utf-8")
    recipe = {
        "extensions": ["mellum.py"],
        "base_model": "mellum",
        "engine": "fused",
        "adapter": {"rank": 4, "target_modules": ["q_proj", "o_proj", "gate_proj", "down_proj"]},
        "tasks": [{"name": name, "template": f"samples/{name}"} for name in ("animals", "uses")],
        "training": {
            "max_steps": 4,
            "learning_rate": 1e-2,
            "row_length": 128,
            "rows_per_step": 2,
            "memory": "auto",
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    cache = tmp_path_factory.mktemp("cache")
    started = Forks(environment={**os.environ, "MTL_LORA_CACHE": str(cache)})
    yield started
    started.close()


@pytest.mark.slow
@pytest.mark.long
def test_a_whole_run(place: Path, forks: Forks) -> None:
    trained = forks.run("train", "recipe.yaml", "run.name=whole", cwd=place)
    assert trained.returncode == 0, trained.stderr
    assert "estimated peak" in trained.stderr
    answers = {}
    for engine in ("fused", "plain"):
        run = forks.run("train", "recipe.yaml", f"engine={engine}", "training.memory=manual",
                        f"run.name={engine}", cwd=place)  # fmt: skip
        assert run.returncode == 0, run.stderr
        lines = (place / "runs" / engine / "metrics.jsonl").read_text().splitlines()
        answers[engine] = [json.loads(line)["loss"] for line in lines]
    assert answers["fused"] == pytest.approx(answers["plain"], rel=1e-4)
    merged = forks.run("merge", "--run", "whole", "--task", "uses", cwd=place)
    assert merged.returncode == 0, merged.stderr


@pytest.mark.slow
def test_without_the_file_the_engine_does_not_know_it(place: Path, forks: Forks) -> None:
    ended = forks.run("train", "recipe.yaml", "extensions=[]", "training.memory=manual", cwd=place)
    assert ended.returncode == 2
    (line,) = ended.stderr.strip().splitlines()
    assert "engine: fused does not know this model: model type mellum" in line
