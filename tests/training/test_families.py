"""Each family of the fused engine in whole runs: two processes under ZeRO-3, and a run that goes on."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import Qwen2Tokenizer

from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.runs.folder import RunFolder
from mtl_lora_cli.training.prepare import prepare
from mtl_lora_cli.training.run import resume, start

from ..engine.double import tiny
from ..engine.test_families_rounded import DENSE, KINDS
from .conftest import together
from .distributed_worker import stopped_after
from .families_worker import overrides

pytestmark = pytest.mark.long
FAMILIES = (
    *DENSE, "mixtral window", "qwen2_moe some dense", "qwen3_moe some dense", "olmoe", "glm4_moe",
    "dots1 window", "gpt_oss", "qwen3_5_moe_text delta nets", "qwen3_next delta nets",
)  # fmt: skip
TOLERANCE = 2e-6  # of a loss: sums over processes have another order; 10⁻⁷ were seen


@pytest.fixture(scope="module")
def trained(
    recipe_file: Path, stories_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """`zero-NAME` by two processes, `alone-NAME` by one."""
    folder = tmp_path_factory.mktemp("families")
    recipe = folder / "recipe.yaml"
    shutil.copy(recipe_file, recipe)
    sizes = {"stage": "auto", "stage3_param_persistence_threshold": 0}
    sizes["stage3_prefetch_bucket_size"] = 0  # type: ignore[assignment]
    zero = {"train_batch_size": "auto", "zero_optimization": sizes}
    (folder / "small.json").write_text(json.dumps(zero))
    for name in FAMILIES:
        kind, changes = KINDS[name]
        model = tiny(kind, **{**changes, "vocab_size": 512}).float()
        model.save_pretrained(folder / f"model-{short(name)}")
        add_tokenizer(folder / f"model-{short(name)}", kind, stories_folder)
    worker = str(Path(__file__).with_name("families_worker.py"))
    processes = together(worker, str(recipe), str(folder), *map(short, FAMILIES))
    for name in FAMILIES:
        loaded = load_recipe(recipe, overrides(folder, short(name)))
        start(prepare(loaded), folder / f"alone-{short(name)}")
    said = [process.communicate(timeout=1200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    return folder


def add_tokenizer(folder: Path, kind: str, stories: Path) -> None:
    """The tiny model's; but of some types transformers reads all by a class of their own."""
    if kind in ("qwen2", "qwen3_5_moe_text"):
        text = Path(__file__).parents[2].joinpath("CONTRIBUTING.md").read_text()
        Qwen2Tokenizer().train_new_from_iterator([text], 400).save_pretrained(folder)
        return
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(stories / file, folder / file)


def short(name: str) -> str:
    """The name of a family as a part of a path."""
    return "-".join(re.findall(r"\w+", name))


def losses(run: Path) -> list[float]:
    return [one["loss"] for one in RunFolder(run).events() if one["event"] == "step"]


@pytest.mark.parametrize("name", FAMILIES)
def test_two_processes_under_zero_3_learn_what_one_learns(trained: Path, name: str) -> None:
    alone, together = (losses(trained / f"{kind}-{short(name)}") for kind in ("alone", "zero"))
    environment = json.loads((trained / f"zero-{short(name)}" / "environment.json").read_text())
    assert environment["engine"]["engine"] == "fused"
    assert len(set(alone)) == 4
    assert together == pytest.approx(alone, rel=TOLERANCE)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_that_goes_on_ends_the_same_to_the_last_bit(trained: Path, name: str) -> None:
    whole = trained / f"alone-{short(name)}"
    copy = stopped_after(whole, 2, trained / f"again-{short(name)}")
    resume(RunFolder(copy), None, [])
    assert losses(copy) == losses(whole)
    file = Path("adapter", "mtl_lora.safetensors")
    assert (copy / file).read_bytes() == (whole / file).read_bytes()
    assert load_file(whole / file)
