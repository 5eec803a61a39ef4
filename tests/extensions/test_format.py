"""An export format from one file of the user's: written, read back by others, compared, and refused in a line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from ..forks import Ended, Forks

pytestmark = pytest.mark.slow

# No LoRA at all: the whole ΔW of each weight, for a program that adds arrays. NumPy reads the file and
# transformers alone answers; none of our code has a part in either.
DELTAS = '''\
import numpy as np

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.export.formats import Format, export_format


@export_format
class Deltas(Format):
    """ΔW = s B A of each weight, float32."""

    name = "deltas"
    about = "whole updates, as NumPy stores arrays"
    marker = "deltas.npz"

    def refuses(self, order):
        if order.run.recipe.quantization != "none":
            raise UsageError("deltas go on weights that are not quantised")

    def size(self, order):
        return sum(4 * len(up) * down.shape[1] for down, up, _ in order.updates.values())

    def write(self, order, folder):
        whole = {
            name: (scale * up.double() @ down.double()).float().numpy()
            for name, (down, up, scale) in order.updates.items()
        }
        np.savez(folder / self.marker, **whole)

    def read(self, questions, folder):
        import torch

        model = questions.load_alone(questions.run.base.folder)
        weights = dict(model.named_parameters())
        with np.load(folder / self.marker) as whole:
            for name in whole.files:
                weights[name] += torch.from_numpy(whole[name])
        return questions.ask_alone(model)
'''


@pytest.fixture(scope="module")
def place(warm: Forks, small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the format's file and a run whose recipe does not name it."""
    folder = tmp_path_factory.mktemp("deltas")
    (folder / "deltas.py").write_text(DELTAS)
    recipe = {
        "base_model": str(small_model.resolve()),
        "adapter": {"rank": 4, "target_modules": ["q_proj", "down_proj"]},
        "tasks": [{"name": name, "template": f"samples/{name}"} for name in ("animals", "uses")],
        "training": {"max_steps": 6, "learning_rate": 1e-2, "row_length": 128, "rows_per_step": 2},
        "run": {"name": "own"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    ended = warm.run("train", "recipe.yaml", cwd=folder, seconds=300)
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.fixture(scope="module")
def call(place: Path, warm: Forks) -> Callable[..., Ended]:
    def run(*arguments: str, file: str = "deltas.py", code: int = 0) -> Ended:
        ended = warm.run("--extension", file, *arguments, cwd=place, seconds=300)
        assert ended.returncode == code, ended.stderr
        return ended

    return run


@pytest.fixture(scope="module")
def written(place: Path, call: Callable[..., Ended]) -> dict[str, Any]:
    """What the export of both tasks says, checked in a process of its own."""
    both = json.loads(
        call("export", "--task", "all", "--format", "deltas", "--limit", "8", "--json").stdout
    )
    assert [one["path"] for one in both] == [f"exported/deltas/own/{one['task']}" for one in both]
    return {one["task"]: one for one in both}


def test_it_is_written_read_back_and_compared(place: Path, written: dict[str, Any]) -> None:
    for task, found in written.items():
        assert found["checked"]
        assert 0 < found["largest_difference"] < 1e-4
        assert found["equal_answers"] == 1
        folder = place / "exported/deltas/own" / task
        assert sorted(path.name for path in folder.iterdir()) == ["README.md", "deltas.npz"]
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert "whole updates, as NumPy stores arrays" in card
        assert "| the run's adapter | " in card


@torch.no_grad()
def test_numpy_and_transformers_have_what_peft_has(
    place: Path, written: dict[str, Any], call: Callable[..., Ended], small_model: Path
) -> None:
    peft = pytest.importorskip("peft")
    call("export", "--task", "all", "--format", "peft", "--no-check")
    ids = torch.tensor([[1, 5, 17, 101, 64, 33, 250, 7]])

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float64).eval()

    for task in written:
        added = base()
        with np.load(place / f"exported/deltas/own/{task}/deltas.npz") as whole:
            assert len(whole.files) == 2 * added.config.num_hidden_layers
            for name in whole.files:
                added.get_parameter(name).add_(torch.from_numpy(whole[name]))
        by_peft = peft.PeftModel.from_pretrained(base(), str(place / f"exported/own/{task}"))
        assert float((added(ids).logits - base()(ids).logits).abs().max()) > 1e-2
        assert float((added(ids).logits - by_peft(ids).logits).abs().max()) < 1e-5


def test_eval_knows_the_folder(
    place: Path, written: dict[str, Any], call: Callable[..., Ended]
) -> None:
    table = call(
        "eval", "--task", "uses", "--limit", "20", "--against", "exported/deltas/own/uses"
    ).stdout
    assert "equal answers 100.0%" in table


def test_a_lower_rank_is_the_order_s_affair(
    written: dict[str, Any], call: Callable[..., Ended]
) -> None:
    text = call(
        "export", "--task", "uses", "--format", "deltas", "--rank", "1", "--limit", "8",
        "--output", "lower",
    ).stdout  # fmt: skip
    assert "at rank 1 the relative Frobenius error of the update is" in text
    assert "from the run's adapter: largest difference" in text


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (("scale * up", "1.05 * scale * up"), 3, "what was written differs from the run's adapter"),
        (("order.updates.items()", "order.update.items()"), 2, "/broken.py:25: AttributeError: "),
        (("whole[name])", "whole['x'])"), 2, "/broken.py:36: KeyError: "),
        (("def read", "def reads"), 2, "/broken.py:7: the format 'deltas' has no read"),
        (('name = "deltas"', 'name = "peft"'), 2, "/broken.py:7: a format 'peft' is there already"),
        (('!= "none"', '== "none"'), 2, "deltas go on weights that are not quantised"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_left(
    place: Path, call: Callable[..., Ended], change: tuple[str, str], code: int, said: str
) -> None:
    (place / "broken.py").write_text(DELTAS.replace(*change))
    assert (place / "broken.py").read_text() != DELTAS
    ended = call(
        "export", "--task", "uses", "--format", "deltas", "--limit", "4", "--output", "wrong/out",
        file="broken.py", code=code,
    )  # fmt: skip
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, ended.stderr
    assert said in errors[0], ended.stderr
    assert ended.stdout == ""
    left = sorted(path.name for path in (place / "wrong").glob("*")) if code == 3 else []
    assert left == (["out.failed"] if code == 3 else [])
    assert not (place / "wrong" / "out").exists()


def test_without_its_file_it_is_not_known(place: Path, warm: Forks) -> None:
    ended = warm.run("export", "--task", "uses", "--format", "deltas", cwd=place)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.splitlines() == [
        "error: --format: expected merged, peft, gguf, gguf-merged, onnx, received 'deltas'"
    ]
