"""What commands say of a run of maps, held against scikit-learn and NumPy on the files that predict writes."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from sklearn.metrics import jaccard_score

from mtl_lora_cli.resources import bundled

from ..forks import Call, Forks
from .conftest import Backbones

pytestmark = pytest.mark.slow

ROOMS = bundled("data_templates") / "samples" / "rooms"
TASKS = ("classes", "depth", "normals", "saliency")
LIMIT = 3


@pytest.fixture(scope="module")
def place(forks: Forks, backbones: Backbones, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe over the sample, smaller than its pictures, and its run `one`; and a recipe of depth alone."""
    folder = tmp_path_factory.mktemp("maps")
    recipe = {
        "base_model": str(backbones("swin").folder),
        "images": {"size": [32, 48], "augment": {"flip": True}},
        "adapter": {"method": "lora", "rank": 2, "target_modules": ["q_proj"]},
        "tasks": [{"name": task, "template": f"samples/room_{task}"} for task in TASKS],
        "training": {
            "max_steps": 3,
            "rows_per_step": 4,
            "rows_per_pass": 4,
            "learning_rate": 2e-3,
            "validation": {"every": 3, "examples": 4, "best": "depth"},
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    alone = {**recipe, "tasks": [recipe["tasks"][1]]}
    (folder / "alone.yaml").write_text(yaml.safe_dump(alone))
    ended = forks.run("train", "recipe.yaml", "run.name=one", cwd=folder)
    assert ended.returncode == 0, ended.stderr
    assert " pictures/s  " in ended.stderr
    return folder


def rows() -> list[dict[str, str]]:
    lines = (ROOMS / "test.jsonl").read_text().splitlines()[:LIMIT]
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def predicted(place: Path, call: Call) -> Path:
    """Maps of the first test pictures, all tasks at once, as arrays."""
    link = place / "rooms"
    link.symlink_to(ROOMS)
    (link.parent / "few.jsonl").write_text(
        "\n".join(json.dumps({"image": f"rooms/{one['image']}"}) for one in rows())
    )
    more = ("few.jsonl", "--format", "npy", "--output", "maps")
    out = call("predict", "--run", "one", "--task", "all", *more).stdout
    lines = [json.loads(line) for line in out.splitlines()]
    assert [one["task"] for one in lines] == list(TASKS) * LIMIT
    assert {tuple(one["size"]) for one in lines} == {(96, 128)}
    return place / "maps"


@pytest.mark.long
def test_eval_is_what_others_compute_of_the_predictions(call: Call, predicted: Path) -> None:
    said = call("eval", "--run", "one", "--task", "all", "--limit", str(LIMIT), "--json").stdout
    found = {one["task"]: one for one in json.loads(said)["results"]}
    right, given, apart = [], [], []
    for row in rows():
        stem = Path("rooms") / Path(row["image"]).with_suffix("")
        right.append(np.asarray(Image.open(ROOMS / row["classes"])).ravel())
        given.append(np.load(predicted / "classes" / f"{stem}.npy").ravel())
        codes = np.asarray(Image.open(ROOMS / row["depth"])).astype(np.float64)
        metres = 0.8 * (9 / 0.8) ** (codes / 255)
        array = np.load(predicted / "depth" / f"{stem}.npy").astype(np.float64)
        apart.append((array - metres) ** 2)
    one, two = np.concatenate(right), np.concatenate(given)
    expected = jaccard_score(one, two, average="macro", labels=np.union1d(one, two))
    assert found["classes"]["metrics"]["miou"]["value"] == pytest.approx(expected, abs=1e-12)
    rmse = found["depth"]["metrics"]["depth_rmse"]["value"]
    assert rmse == pytest.approx(float(np.sqrt(np.mean(apart))), rel=1e-5)
    assert found["depth"]["beside"]["answer"].endswith("everywhere")
    assert found["depth"]["examples"] == LIMIT
    assert "shown" not in found["depth"] and "tallies" not in found["depth"]


@pytest.mark.long
def test_load_gives_arrays(place: Path, predicted: Path, call: Call) -> None:
    import mtl_lora_cli

    run = mtl_lora_cli.load(place / "runs" / "one")
    picture = ROOMS / rows()[0]["image"]
    paths, arrays = (
        run.predict([picture], task="all"),
        run.predict([np.asarray(Image.open(picture))], task=["depth"]),
    )
    stem = Path("rooms") / Path(rows()[0]["image"]).with_suffix("")
    stored = np.load(predicted / "depth" / f"{stem}.npy")
    assert np.abs(arrays[0]["depth"]["map"] - stored).max() < 1e-5
    call("predict", "--run", "one", "--task", "depth,classes", "few.jsonl", "--output", "png")
    codes = np.asarray(Image.open(place / "png" / "depth" / f"{stem}.png")) / 65535
    assert 0.8 * (9 / 0.8) ** codes == pytest.approx(stored.clip(0.8, 9), rel=1e-3)
    indices = np.asarray(Image.open(place / "png" / "classes" / f"{stem}.png"))
    assert (indices == paths[0]["classes"]["map"]).all()
    assert paths[0]["classes"]["map"].dtype == np.int16
    assert paths[0]["normals"]["map"].shape == (96, 128, 3)
    assert np.linalg.norm(paths[0]["normals"]["map"], axis=2) == pytest.approx(
        np.ones((96, 128)), abs=1e-4
    )


@pytest.mark.long
def test_delta_m_over_single_task_runs(call: Call) -> None:
    call("train", "alone.yaml", "run.name=single")
    few = ("--limit", str(LIMIT))
    said = call(
        "eval", "--run", "one", "--task", "depth", "--baseline", "single", *few, "--json"
    ).stdout
    both = json.loads(said)
    (result,) = both["results"]
    ours = result["metrics"]["depth_rmse"]["value"]
    theirs = result["beside"]["metrics"]["depth_rmse"]["value"]
    assert both["delta_m"]["value"] == pytest.approx(100 * (theirs - ours) / theirs)
    table = call("eval", "--run", "one", "--task", "depth", "--baseline", "single", *few).stdout
    assert f"Δm {both['delta_m']['value']:+.2f} %" in table
    refused = call(
        "eval", "--run", "single", "--task", "depth", "--baseline", "one,one", *few, code=2
    )
    assert "--baseline: run one learned none of the tasks that are left" in refused.stderr


@pytest.mark.long
def test_a_comparison_is_of_delta_m(place: Path, call: Call) -> None:
    """It is what eval says of each of its runs beside the same references; the report comes again without a model."""
    for task in ("classes", "depth"):
        own = yaml.safe_load((place / "recipe.yaml").read_text())
        own["tasks"] = [one for one in own["tasks"] if one["name"] == task]
        del own["training"]["validation"]
        (place / f"only-{task}.yaml").write_text(yaml.safe_dump(own))
        call("train", f"only-{task}.yaml", f"run.name=only-{task}")
    both = yaml.safe_load((place / "recipe.yaml").read_text())
    both["tasks"] = [one for one in both["tasks"] if one["name"] in ("classes", "depth")]
    del both["training"]["validation"]
    (place / "both.yaml").write_text(yaml.safe_dump(both))
    few, over = ("--limit", str(LIMIT)), "only-classes,only-depth"
    more = ("--methods", "lora,mtlora", "--seeds", "2", "--match", "none", "--references", over)
    report = json.loads(call("compare", "both.yaml", *more, *few, "--json").stdout)
    for method in ("lora", "mtlora"):
        said = []
        for seed in (0, 1):
            run = f"comparisons/both/runs/{method}-seed{seed}"
            answer = call("eval", "--run", run, "--task", "all", "--baseline", over, *few, "--json")
            said.append(json.loads(answer.stdout)["delta_m"]["value"])
        assert report["average"][method]["seeds"] == pytest.approx(said, rel=1e-4)
    assert report["average"]["references"]["value"] == 0
    again = call("compare", "both.yaml", *more, *few, "--report-only").stdout
    assert "Δm, %" in again and "pictures/s" in again and "nearly all rows" not in again


def test_looks_have_metrics(place: Path) -> None:
    lines = (place / "runs" / "one" / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    look = next(one for one in events if one["event"] == "validation")
    assert look["metric_name"]["depth"] == "depth_rmse ↓" and look["metric"]["depth"] > 0
    assert "metric" not in look["macro"]
    steps = [one for one in events if one["event"] == "step"]
    assert all(set(one["examples"]) == set(TASKS) for one in steps)
    assert all(one["supervised"] == 4 * len(TASKS) and one["tokens"] == 4 for one in steps)
    best = next(one for one in events if one["event"] == "best")
    assert best["value"] == look["metric"]["depth"]


@pytest.mark.long
def test_the_data_are_shown_and_counted(place: Path, call: Call) -> None:
    shown = call("data", "show", "recipe.yaml", "--count", "1", "--task", "normals").stdout
    path = place / shown.partition(":")[0]
    assert Image.open(path).size[1] == 240
    counted = call("validate", "recipe.yaml").stdout
    assert "depth: test: 32 maps, 0.0% of the pixels not known; " in counted
    assert "classes: train: 96 maps" in counted and "wall " in counted
    assert "3 optimiser steps of 4 pictures of 32 x 48" in counted
    assert (
        "segmentation, 8 classes: wall, floor"
        in call("tasks", "show", "samples/room_classes").stdout
    )


@pytest.mark.long
def test_the_report_shows_answers(place: Path, call: Call) -> None:
    call("eval", "--run", "one", "--task", "all", "--limit", str(LIMIT))
    call("report", "one")
    page = (place / "runs" / "one" / "report.html").read_text()
    assert page.count('<img src="data:image/png;base64,') == len(TASKS) * LIMIT
    assert "mean_angle ↓" in page


@pytest.mark.long
def test_init_writes_a_recipe_that_trains(place: Path, call: Call) -> None:
    folder = place / "pets"
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(12):
        pixels = generator.integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.jpg")
        mask = (pixels[..., 0] > 128).astype(np.uint8)
        mask[0] = 255
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
    (folder / "classes.txt").write_text("background\npet\n")
    base = yaml.safe_load((place / "recipe.yaml").read_text())["base_model"]
    call("init", "--base-model", base, "--task", "masks=segmentation:pets", "--hardware", "cpu",
         "--output", "first.yaml")  # fmt: skip
    assert yaml.safe_load((place / "masks.yaml").read_text())["classes"] == ["background", "pet"]
    call("train", "first.yaml", "run.name=first", "training.max_steps=1", "images.size=[32, 48]")
    assert "miou" in call("eval", "--run", "first", "--task", "masks").stdout


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("eval", "--run", "one", "--task", "depth", "--base-only"), "a backbone alone gives no maps"),
        (("eval", "--run", "one", "--task", "depth", "--protocol", "choices"), "--protocol is for texts"),
        (("eval", "--run", "one", "--task", "depth", "--predictions", "p.jsonl"), "--predictions is for texts"),
        (("predict", "--run", "one", "--task", "depth", "few.jsonl", "--temperature", "1"), "--temperature is for texts"),
        (("predict", "--run", "one", "--task", "depth", "few.jsonl", "--format", "glue"), "expected one of png, npy"),
        (("predict", "--run", "one", "--task", "dept", "few.jsonl"), "unknown task 'dept'; did you mean 'depth'?"),
        (("predict", "--run", "one", "few.jsonl"), "give --task"),
        (("data", "show", "recipe.yaml", "--packed"), "--packed is for texts"),
        (("compare", "recipe.yaml"), "--match: picks ranks for texts; maps are compared with --match none"),
        (("compare", "recipe.yaml", "--match", "none", "--score", "validation"), "--score validation is for texts"),
        (("compare", "recipe.yaml", "--match", "none", "--sweep", "training.learning_rate=1e-3"), "--sweep: is for texts; of maps each setting is a --variant"),
        (("compare", "alone.yaml", "--match", "none", "--references", "one,one"), "one learned none of the tasks that are left"),
        (("compare", "quickstart", "--references", "one"), "--references is for maps"),
        (("bench", "--recipe", "recipe.yaml"), "a swin is none; bench measures language models"),
        (("router", "--run", "one"), "only text can be told apart by a router"),
        (("serve", "one", "--port", "0"), "serve answers texts; its answers are maps"),
        (("export", "--run", "one", "--task", "all", "--format", "onnx", "--check", "vllm"), "--check vllm is for texts"),
        (("train", "recipe.yaml", "training.row_length=64"), "training.row_length: is for text"),
        (("train", "recipe.yaml", "mixing={dynamic: progress}"), "mixing: needs rows of one task alone, and tasks with objective segmentation learn from the same pictures; training.rows: one_task shows"),
        (("train", "recipe.yaml", "training.validation.best=macro"), "their average says nothing; name a task"),
        (("train", "recipe.yaml", "images.projector_start=words"), "images.projector_start: is for prompts that show pictures; tasks with objective segmentation go without it"),
        (("train", "recipe.yaml", "images=null"), "images: is required with objective segmentation"),
        (("init", "--base-model", "x", "--task", "a=depth:nowhere", "--hardware", "cpu", "--output", "n.yaml"), "no such folder: nowhere"),
    ],
)  # fmt: skip
def test_what_is_for_texts_is_one_line(
    call: Call, predicted: Path, arguments: tuple[str, ...], said: str
) -> None:
    ended = call(*arguments, code=2)
    (line,) = [one for one in ended.stderr.splitlines() if one.startswith("error")]
    assert said in line


@pytest.mark.long
def test_a_folder_of_rows_becomes_maps_beside_a_table(
    call: Call, place: Path, predicted: Path
) -> None:
    """The maps of `predict FILE`, in parts; pictures lie relative to their rows' file."""
    import pyarrow
    from pyarrow import parquet

    folder = place / "many" / "inner"
    folder.mkdir(parents=True)
    (folder / "rooms").symlink_to(ROOMS)
    table = [{"id": n, "image": f"rooms/{one['image']}"} for n, one in enumerate(rows())]
    parquet.write_table(pyarrow.Table.from_pylist(table), folder / "few.parquet")
    arguments = ("predict", "--run", "one", "--task", "all", "--input", "many", "--output", "done")
    more = ("--format", "npy", "--part-rows", "2")
    assert json.loads(call(*arguments, *more).stdout)["parts"] == 2
    found = parquet.read_table(place / "done" / "inner").to_pylist()
    assert [{k: v for k, v in one.items() if k != "prediction"} for one in found] == table
    for one in found:
        for task in TASKS:
            own = one["prediction"][task]
            right = np.load(predicted / task / Path(one["image"]).with_suffix(".npy"))
            mine = np.load(place / "done" / own["map"])
            assert (own["task"], own["size"]) == (task, list(right.shape[:2]))
            assert Path(own["map"]).parent.name.startswith("few-0000")
            np.testing.assert_allclose(mine, right, atol=1e-5)
    if find_spec("ray") is not None:
        own = [sys.executable, "-m", "mtl_lora_cli.cli.main", *arguments[:-1], "rayed", *more]
        subprocess.run([*own, "--ray", "local", "--actors", "1"], cwd=place, check=True)
        beside = parquet.read_table(place / "rayed" / "inner").to_pylist()
        assert beside == found
        for one in found:
            for task in TASKS:
                mine, other = (
                    np.load(place / f / one["prediction"][task]["map"]) for f in ("done", "rayed")
                )
                np.testing.assert_allclose(mine, other, atol=1e-5)
    (folder / "few.parquet").unlink()
    bad = [*table[:2], {"id": 9, "image": "rooms/none.jpg"}]
    (folder / "few.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in bad))
    ended = call(*arguments[:-1], "depth", *more[:1], "png", code=2)
    assert ended.stderr.splitlines() == [
        "error: many/inner/few.jsonl:3: image: no such file: 'rooms/none.jpg', expected a file below many/inner"
    ]
    listed = call(*arguments[:-1], "depth", "--errors", "bad.jsonl")
    assert json.loads(listed.stdout)["bad_rows"] == 1
    lines = (place / "depth" / "inner" / "few-00000.jsonl").read_text().splitlines()
    said = json.loads(lines[1])["prediction"]["depth"]
    assert said["bits"] == 16
    assert Image.open(place / "depth" / said["map"]).size == (128, 96)
