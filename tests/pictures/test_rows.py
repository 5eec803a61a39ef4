"""Rows of pictures: what a batch holds, what follows from the seed, fingerprints, leaks, and others' folders."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from mtl_lora_cli.data.bind import bind_tasks
from mtl_lora_cli.data.collate import ChosenDataset
from mtl_lora_cli.data.map_batch import Normalisation, Room, SeenBatch
from mtl_lora_cli.data.maps import MapDataset
from mtl_lora_cli.data.mixture import Mixture
from mtl_lora_cli.data.picture_rows import leaks, map_print
from mtl_lora_cli.data.sources import available_splits, read_split
from mtl_lora_cli.errors import MtlLoraError, UsageError
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.recipe.pictures import Augment, Images
from mtl_lora_cli.recipe.source import Source
from mtl_lora_cli.resources import bundled
from mtl_lora_cli.tasks.maps import MapSpec, spec_of
from mtl_lora_cli.tasks.registry import find_template
from mtl_lora_cli.tasks.task import Task

from .test_bad_files import TEMPLATES, whole

CPU = torch.device("cpu")
IMAGES = Images(size=[20, 28], augment=Augment(flip=True, scale=[0.7, 1.6]))


def sized(size: list[int]) -> Images:
    """Without a recipe's bounds."""
    return Images.model_construct(size=size, augment=None)


@pytest.fixture
def tasks(tmp_path: Path) -> list[Task]:
    """Four tasks over three pictures, the second of which has no depth."""
    folder = tmp_path / "rows"
    folder.mkdir()
    whole(folder)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    rows.append({**rows[0], "depth": None})
    rows[1], rows[2] = rows[2], rows[1]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return bind_tasks(load_recipe(tmp_path / "recipe.yaml"))


def specs(tasks: list[Task]) -> list[MapSpec]:
    return [spec_of(task.template) for task in tasks]


def read(tasks: list[Task], images: Images = IMAGES, seed: int = 0) -> MapDataset:
    found = MapDataset.read(tasks, specs(tasks), "train", images, Normalisation(), seed=seed)
    assert found is not None
    return found


def same(first: SeenBatch, second: SeenBatch) -> bool:
    one, other = first.to(CPU), second.to(CPU)
    return torch.equal(one.pixels, other.pixels) and all(
        torch.equal(one.targets[task].nan_to_num(-9), other.targets[task].nan_to_num(-9))
        if one.targets[task].is_floating_point()
        else torch.equal(one.targets[task], other.targets[task])
        for task in one.targets
    )


def test_a_batch_is_the_port_s(tasks: list[Task]) -> None:
    data = read(tasks)
    assert [len(own) for own in data.lengths] == [3, 0, 0, 0]
    assert (data.entries, data.examples) == ([0, 0, 0, 0], [3, 2, 3, 3])
    rows = [[(0, 0)], [(0, 1)], [(0, 2)]]
    batch = data.collate(rows).to(CPU)
    assert batch.pixels.shape == (3, 3, 20, 28)
    assert batch.owners.tolist() == [0, 1, 2, 3, 0, 2, 3, 0, 1, 2, 3]
    assert torch.equal(data.units(rows), torch.bincount(batch.owners))
    assert batch.present.tolist()[1] == [True, False, True, True]
    assert batch.targets[0].dtype == torch.long and batch.targets[2].shape == (3, 3, 20, 28)
    assert batch.targets[1][1].isnan().all()
    assert data.collate([[(0, 1)]]).task_ids.tolist() == [0, 2, 3]
    assert data.size(rows) == 3


def test_pixels_are_normalised(tasks: list[Task]) -> None:
    plain = sized([12, 16])
    batch, where = read(tasks, plain).collate([[(0, 0)]]).to(CPU), Path(tasks[0].source.path or "")
    pixels = np.asarray(Image.open(where / "0.jpg").convert("RGB")) / 255
    expected = (pixels - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    assert batch.pixels[0].numpy() == pytest.approx(expected.transpose(2, 0, 1), abs=1e-5)


def test_views_follow_from_seed_epoch_step_and_picture(tasks: list[Task]) -> None:
    data, again = read(tasks), read(tasks)
    rows = [[(0, 0)], [(0, 2)]]
    first = data.at(1, 7).collate(rows)
    assert same(first, again.at(1, 7).collate(rows))
    # Alone, on another process, behind other steps, or decoded ahead: it is the same.
    assert torch.equal(again.at(1, 7).collate(rows[1:]).seen[0], first.seen[1])
    ahead = read(tasks).at(1, 7)
    ahead.ahead(rows)
    assert same(ahead.collate(rows), first)
    others = [data.at(1, 8), data.at(2, 7), read(tasks, seed=1).at(1, 7)]
    assert not any(torch.equal(one.collate(rows).seen, first.seen) for one in others)
    held = MapDataset(tasks, specs(tasks), [], IMAGES, Normalisation())
    assert not held._augmented


def test_pictures_come_from_wherever_they_were_decoded(tasks: list[Task]) -> None:
    """Some ahead, some not, one of them twice, the second without depth; a second pass begins behind the first."""
    data = read(tasks).at(0, 1)
    data.ahead([[(0, 0)], [(0, 1)]])
    mixed = data.collate([[(0, 2)], [(0, 0)], [(0, 0)]]).to(CPU)
    rest = data.collate([[(0, 1)]])
    assert not data._asked
    for place, number in enumerate((2, 0, 0)):
        alone = read(tasks).at(0, 1).collate([[(0, number)]]).to(CPU)
        assert torch.equal(mixed.pixels[place], alone.pixels[0])
        assert torch.equal(mixed.targets[0][place], alone.targets[0][0])
    assert same(rest, read(tasks).at(0, 1).collate([[(0, 1)]]))


def test_what_another_process_calls_is_the_same(tasks: list[Task]) -> None:
    data, places = read(tasks), [(0, 2), (0, 1)]
    memory = torch.empty(Room.bytes_of(2, (20, 28), data._learned), dtype=torch.uint8)
    for at, place in enumerate(places):
        data.fill_memory(memory, 2, at, (1, 7), place)
    room, expected = data._room(2, memory), data.at(1, 7).collate([[place] for place in places])
    assert torch.equal(room.pixels, expected.seen)
    for task, own in expected.maps.items():
        torch.testing.assert_close(room.maps[task], own, rtol=0, atol=0, equal_nan=True)


@pytest.mark.long
def test_another_process_decodes_the_same(
    tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for steps on a card; a file that is gone is the same one line, memory is used again, and its end is told."""
    monkeypatch.setattr("mtl_lora_cli.data.maps.possible", lambda: True)
    monkeypatch.setattr("mtl_lora_cli.data.decoding.decoders", lambda: 2)
    data, rows = read(tasks), [[(0, 0)], [(0, 1)], [(0, 2)]]
    decoding = data.at(0, 0)._decoding
    assert decoding is not None
    assert [one.result(60) for one in decoding._begun] == [None, None]
    monkeypatch.undo()
    data.at(0, 0).ahead(rows)
    for step in range(3):
        data.at(0, step + 1).ahead(rows)
        found = data.at(0, step).collate(rows)
        assert found.rooms[0].block is not None
        assert same(found, read(tasks).at(0, step).collate(rows))
    del found
    assert len(decoding._returned) == 2
    data.at(0, 3).collate(rows)
    (Path(tasks[0].source.path or "") / "0.jpg").unlink()
    with pytest.raises(UsageError, match=r"train\.jsonl:1: image: no such file: '0\.jpg'"):
        data.at(0, 9).collate(rows)
    processes = [one.process for one in decoding._workers]
    processes[1].kill()
    with pytest.raises(MtlLoraError, match="a process that decodes pictures ended"):
        data.at(0, 10).collate(rows)
    del data, decoding
    gc.collect()
    assert all(one.returncode is not None for one in processes)


def test_some_pictures_are_chosen(tasks: list[Task]) -> None:
    data = read(tasks)
    none = np.zeros(0, dtype=np.int64)
    chosen = ChosenDataset(data, [np.array([1, 2]), none, none, none])
    assert chosen.examples == [2, 1, 2, 2] and chosen.row_length == 1
    some = chosen.at(0, 3)
    assert same(some.collate([[(0, 0)]]), data.at(0, 3).collate([[(0, 1)]]))


def test_an_epoch_goes_over_each_picture_once(tasks: list[Task]) -> None:
    for strategy in ("proportional", "uniform"):
        data = read(tasks)
        names = tuple(task.name for task in tasks)
        mixture = Mixture(names, tuple(data.lengths), 1, 2, strategy=strategy, seed=5)
        rows = mixture.epoch(0)
        assert sorted(place for row in rows for place in row) == [(0, 0), (0, 1), (0, 2)]
        assert {len(row) for row in rows} == {1}


def test_tasks_of_one_source_are_drawn_alike(tasks: list[Task], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    text = path.read_text().replace(
        "depth.yaml, source: rows}", "depth.yaml, source: rows, repeat: 2.0}"
    )
    path.write_text(text)
    with pytest.raises(
        UsageError, match=r"'seg' and 'depth' learn from the same pictures: repeat is 1"
    ):
        read(bind_tasks(load_recipe(path)))


def test_a_print_is_of_every_file(tasks: list[Task]) -> None:
    folder = Path(tasks[0].source.path or "")
    before = [map_print(task, "train") for task in tasks]
    Image.fromarray(np.full((12, 16), 2, np.uint8)).save(folder / "1-seg.png")
    after = [map_print(task, "train") for task in tasks]
    assert [one != two for one, two in zip(before, after, strict=True)] == [True] + [False] * 3
    Image.new("RGB", (16, 12)).save(folder / "0.jpg")
    assert all(one != map_print(task, "train") for one, task in zip(after, tasks, strict=True))
    assert map_print(tasks[0], "test") is None


def test_a_picture_of_training_in_the_test_is_told(tasks: list[Task]) -> None:
    folder = Path(tasks[0].source.path or "")
    assert leaks(tasks, specs(tasks)) == []
    (folder / "copy.jpg").write_bytes((folder / "1.jpg").read_bytes())
    Image.new("RGB", (16, 12), (1, 2, 3)).save(folder / "other.png")
    held = [{"image": "other.png", "seg": "0-seg.png"}, {"image": "copy.jpg", "seg": "1-seg.png"}]
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, held)))
    (line,) = leaks(tasks, specs(tasks))
    assert line.startswith("seg: 1 of 2 test pictures are learned, too: ")
    assert "test.jsonl:2 is the picture of" in line and "train.jsonl:3" in line


# ------------------------------------------------------------------------------------ others' folders


def task_of(template: str, folder: Path, layout: str) -> Task:
    _, path, found = find_template(template, Path())
    source = Source(path=str(folder), layout=layout)
    return Task("t", 0, template, path.read_text(), found, source, objective=found.objective)


def one_map(task: Task, split: str) -> np.ndarray:
    source = sized([6, 8])
    data = MapDataset.read([task], [spec_of(task.template)], split, source, Normalisation())
    assert data is not None
    return data.show(0, 0, whole=True).maps[0]


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (90, 80, 70)).save(path)


def saved(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        Image.fromarray(values).save(path)


def lists(folder: Path, train: list[str], val: list[str]) -> None:
    folder.mkdir(parents=True)
    (folder / "train.txt").write_text("\n".join(train) + "\n")
    (folder / "val.txt").write_text("\n".join(val) + "\n")


def test_nyud_mt(tmp_path: Path) -> None:
    lists(tmp_path / "gt_sets", ["a"], ["b"])
    for name in "ab":
        picture(tmp_path / "images" / f"{name}.jpg")
    classes = np.full((6, 8), 40, np.uint8)
    classes[0] = 0
    saved(tmp_path / "segmentation" / "a.png", classes)
    saved(tmp_path / "depth" / "a.npy", np.full((6, 8), 2.5, np.float32))
    saved(tmp_path / "normals" / "a.npy", np.full((6, 8, 3), (0.6, 0, -0.8), np.float32))
    saved(tmp_path / "edge" / "b.npy", np.eye(6, 8).astype(np.float32))
    found = {
        name: one_map(task_of(f"nyud_mt/{name}", tmp_path, "nyud-mt"), split)
        for name, split in (("segmentation", "train"), ("depth", "train"), ("normals", "train"), ("edges", "test"))
    }  # fmt: skip
    assert found["segmentation"][0].tolist() == [-100] * 8 and found["segmentation"][1, 1] == 39
    assert found["depth"][2, 2] == 2.5
    assert found["normals"][3, 3] == pytest.approx([0.6, 0, -0.8])
    assert (found["edges"] == np.eye(6, 8)).all()
    source = Source(path=str(tmp_path), layout="nyud-mt")
    assert available_splits(source, base=Path(), task="t") == ("train", "test")


def test_the_official_nyu_file(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    generator = np.random.default_rng(4)
    images = generator.integers(0, 256, (3, 6, 8, 3), dtype=np.uint8)
    depths = generator.uniform(1, 5, (3, 6, 8)).astype(np.float32)
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"] = images.transpose(0, 3, 2, 1)  # as MATLAB's columns come first
        file["depths"] = depths.transpose(0, 2, 1)
    labels = generator.integers(0, 41, (6, 8, 3)).astype(np.uint8)
    savemat(tmp_path / "labels40.mat", {"labels40": labels})
    savemat(tmp_path / "splits.mat", {"trainNdxs": [[2]], "testNdxs": [[3], [1]]})
    depth = one_map(task_of("nyud_mt/depth", tmp_path, "nyu-mat"), "train")
    assert depth == pytest.approx(depths[1])
    classes = one_map(task_of("nyud_mt/segmentation", tmp_path, "nyu-mat"), "test")
    right = np.where(labels[..., 2] == 0, -100, labels[..., 2].astype(int) - 1)
    assert (classes == right).all()
    task = task_of("nyud_mt/depth", tmp_path, "nyu-mat")
    spec = spec_of(task.template)
    data = MapDataset.read([task], [spec], "train", sized([6, 8]), Normalisation())
    assert data is not None and (data.show(0, 0).pixels == images[1]).all()


def parts_file(path: Path) -> None:
    """As PASCAL-Part has it: a person with a head and a hand, and a dog with a head."""
    mask = np.ones((6, 8), np.uint8)
    head, hand = np.zeros((6, 8), np.uint8), np.zeros((6, 8), np.uint8)
    head[0], hand[5] = 1, 1

    def parts(*pairs: tuple[str, np.ndarray]) -> np.ndarray:
        found = np.zeros((1, len(pairs)), dtype=[("part_name", object), ("mask", object)])
        for at, (name, own) in enumerate(pairs):
            found[0, at] = (name, own)
        return found

    kinds = [("class", object), ("class_ind", object), ("mask", object), ("parts", object)]
    objects = np.zeros((1, 2), dtype=kinds)
    objects[0, 0] = ("person", 15, mask, parts(("head", head), ("lhand", hand)))
    objects[0, 1] = ("dog", 12, mask, parts(("torso", mask)))
    anno = np.zeros((1, 1), dtype=[("imname", object), ("objects", object)])
    anno[0, 0] = ("a", objects)
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"anno": anno})


def test_pascal_context(tmp_path: Path) -> None:
    lists(tmp_path / "ImageSets" / "Context", ["a"], ["a"])
    picture(tmp_path / "JPEGImages" / "a.jpg")
    parts_file(tmp_path / "human_parts" / "a.mat")
    saved(tmp_path / "semseg" / "VOC12" / "a.png", np.full((6, 8), 15, np.uint8))
    saved(tmp_path / "sal_distill" / "a.png", np.full((6, 8), 255, np.uint8))
    saved(tmp_path / "normals_distill" / "a.png", np.full((6, 8, 3), (128, 128, 0), np.uint8))
    labels = np.zeros((6, 8), np.uint16)
    labels[:, 4:] = 300
    (tmp_path / "pascal-context" / "trainval").mkdir(parents=True)
    savemat(tmp_path / "pascal-context" / "trainval" / "a.mat", {"LabelMap": labels})
    found = {
        name: one_map(task_of(f"pascal_context/{name}", tmp_path, "pascal-context"), "train")
        for name in ("semseg", "parts", "saliency", "normals", "edges")
    }
    assert (found["semseg"] == 15).all() and (found["saliency"] == 1).all()
    assert found["parts"].tolist() == [[1] * 8, *[[0] * 8] * 4, [4] * 8]
    assert found["normals"][0, 0] == pytest.approx([0, 0, -1], abs=0.01)
    assert found["edges"][2].tolist() == [0, 0, 0, 0, 1, 0, 0, 0]


def test_folders_of_pictures_and_masks(tmp_path: Path) -> None:
    for number in range(30):
        picture(tmp_path / "images" / f"p{number}.jpg")
        saved(tmp_path / "masks" / f"p{number}.png", np.zeros((6, 8), np.uint8))
    (tmp_path / "masks" / "p3.png").unlink()
    source = Source(path=str(tmp_path), layout="folders")
    found = {
        s: read_split(source, s, base=Path(), task="t") for s in ("train", "validation", "test")
    }
    assert found["validation"] is None and found["train"] is not None and found["test"] is not None
    stems = [{row["image"] for row in found[s].rows} for s in ("train", "test")]
    assert len(stems[0] | stems[1]) == 30 and not stems[0] & stems[1] and len(stems[1]) > 1
    without = [row for s in ("train", "test") for row in found[s].rows if "masks" not in row]
    assert without == [{"image": "images/p3.jpg"}]
    (tmp_path / "train.txt").write_text("p1\np2\n")
    again = read_split(source, "train", base=Path(), task="t")
    assert again is not None and len(again.rows) == 2


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("folders", "has no folder 'images', nor 'train/images'"),
        ("nyud-mt", "gt_sets/train.txt: cannot be read"),
        ("nyu-mat", "no file 'nyu_depth_v2_labeled.mat', which layout: nyu-mat needs"),
        ("pascal-context", "ImageSets/Context/train.txt: cannot be read"),
    ],
)
def test_another_folder_is_refused(tmp_path: Path, layout: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_split(Source(path=str(tmp_path), layout=layout), "train", base=Path(), task="t")
    (line,) = caught.value.lines
    assert said in line


def test_a_list_names_a_picture_that_is_gone(tmp_path: Path) -> None:
    lists(tmp_path / "gt_sets", ["a", "b"], [])
    picture(tmp_path / "images" / "a.jpg")
    with pytest.raises(UsageError, match=r"gt_sets/train\.txt:2: no picture 'images/b\.jpg'"):
        read_split(Source(path=str(tmp_path), layout="nyud-mt"), "train", base=Path(), task="t")


def test_the_sample_is_what_its_templates_say() -> None:
    assert set(TEMPLATES) == {"seg", "depth", "normals", "edges"}
    names = ("classes", "parts", "depth", "normals", "edges", "saliency")
    for name in names:
        _, path, template = find_template(f"samples/room_{name}", Path())
        task = Task(
            "t", 0, name, path.read_text(), template, template.source, objective=template.objective
        )  # type: ignore[arg-type]
        data = MapDataset.read(
            [task], [spec_of(template)], "test", sized([96, 128]), Normalisation()
        )
        assert data is not None and data.examples == [32]
        assert data.show(0, 5).maps[0].shape[:2] == (96, 128)
    assert (bundled("data_templates") / "samples" / "rooms").is_dir()
