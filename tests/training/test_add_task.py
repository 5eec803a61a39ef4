"""A task that is added to a run: what was there stays to the last bit, and the new one learns."""

from __future__ import annotations

import gzip
import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from mtl_lora_cli.adapters.extend import save_beside
from mtl_lora_cli.adapters.files import read_adapter_file, read_tensors
from mtl_lora_cli.errors import MtlLoraError, UsageError
from mtl_lora_cli.evaluation.answers import answer
from mtl_lora_cli.evaluation.evaluate import Setting, held_out
from mtl_lora_cli.evaluation.opened import Run, open_run
from mtl_lora_cli.export.check import WrittenCheck
from mtl_lora_cli.export.comparison import Comparison
from mtl_lora_cli.export.order import Options
from mtl_lora_cli.export.questions import Questions
from mtl_lora_cli.export.write import write_tasks
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.runs.folder import RunFolder, read_json
from mtl_lora_cli.tasks.chosen import read_tasks
from mtl_lora_cli.tasks.task import Task
from mtl_lora_cli.training.add_task import load_addition
from mtl_lora_cli.training.prepare import prepare
from mtl_lora_cli.training.prepared import Prepared
from mtl_lora_cli.training.run import resume, start

from ..often import often

pytestmark = pytest.mark.slow

OLD, NEW = ("sst2", "home_depot"), "cola"
# Task → where its data lie, and its held-out split there.
DATA = {
    "sst2": ("glue/sst2", "validation"),
    "cola": ("glue/cola", "validation"),
    "home_depot": ("ads/home_depot", "test"),
}
TRAINING = {
    "epochs": 100,
    "max_steps": 24,
    "learning_rate": 1e-2,
    "row_length": 128,
    "rows_per_step": 2,
    "on_overflow": "truncate_prompt",
    "checkpoint_every": 8,
}
TARGETS = ["q_proj", "v_proj", "down_proj"]


@dataclass(frozen=True)
class Kind:
    """A method, and how well its rows alone can learn a task.

    Attributes:
        adapter: its keys in a recipe.
        learning_rate: of the rows.
        most: the held-out loss of the learned rows, as a share of that which they start with.
    """

    adapter: dict[str, Any]
    learning_rate: float
    most: float = 0.6


KINDS = {
    "weights": Kind({}, 3e-2),
    "diagonal": Kind({"transform": "diagonal"}, 1e-1),
    # Four numbers of a layer pick among matrices that do not learn.
    "bases": Kind({"transform": "bases"}, 1e-1, most=0.7),
    "embedding": Kind({"gate": "embedding"}, 3e-2),
    "fine": Kind({"method": "mtl-lora-fine"}, 1e-1),
    "mtlora": Kind({"method": "mtlora"}, 1e-2, most=0.2),
    "mtlora-modules": Kind({"method": "mtlora", "task_modules": ["down_proj"]}, 1e-2, most=0.2),
    # One embedding picks among experts: what none of them has learned stays unknown.
    # Of more experts its rows, which only weigh them, move too little in so few steps.
    "moelora": Kind({"method": "moelora", "up_projections": 2}, 1.0, most=0.95),
}


@dataclass
class Place:
    """A folder with data, recipes and runs.

    Attributes:
        folder: where they lie.
        base: the tiny model.
    """

    folder: Path
    base: Path

    def recipe(self, name: str, *tasks: str, **keys: Any) -> Path:
        entries = [{"name": t, "template": t, "source": str(self.folder / t)} for t in tasks]
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"tasks": entries, "training": TRAINING, **keys}))
        return path

    def train(self, name: str, adapter: dict[str, Any], **training: Any) -> RunFolder:
        recipe = self.recipe(
            name,
            *OLD,
            base_model=str(self.base),
            adapter={"rank": 8, "dropout": 0.1, "target_modules": TARGETS, **adapter},
            training={**TRAINING, **training},
        )
        return start(prepare(load_recipe(recipe)), self.folder / "runs" / name)

    def addition(self, run: RunFolder, **training: Any) -> Prepared:
        recipe = self.recipe(f"{run.name}-new", NEW, training={**TRAINING, **training})
        return prepare(load_addition(run, recipe), extends=run)


@pytest.fixture(scope="module")
def place(
    data_folder: Path, stories_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Place:
    root = tmp_path_factory.mktemp("added")
    for name, (folder, held) in DATA.items():
        (root / name).mkdir()
        for split, file, count in (("train", "train", 120), ("test", held, 24)):
            source = data_folder / folder / f"{file}.jsonl.gz"
            with gzip.open(source, "rt", encoding="utf-8") as rows:
                text = "".join(itertools.islice(rows, count))
            (root / name / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return Place(root, stories_folder.resolve())


@pytest.fixture(scope="module")
def runs(place: Place) -> Callable[[str], tuple[RunFolder, RunFolder]]:
    """`runs(kind)`: a run of two tasks, and the one that adds a third, with weight decay."""
    found: dict[str, tuple[RunFolder, RunFolder]] = {}

    def make(name: str) -> tuple[RunFolder, RunFolder]:
        if name not in found:
            kind = KINDS[name]
            old = place.train(name, kind.adapter)
            prepared = place.addition(old, learning_rate=kind.learning_rate, weight_decay=0.1)
            found[name] = old, start(prepared, place.folder / "runs" / f"{name}-new")
        return found[name]

    return make


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder, with size and time of change."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def logits(run: RunFolder, tasks: tuple[str, ...]) -> list[Tensor]:
    """What the head says to held-out rows of some tasks, asked as `eval` asks."""
    opened, said = open_run(run), list[Tensor]()
    head = opened.packed.model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: said.append(output))
    chosen = [task for task in opened.tasks if task.name in tasks]
    assert [task.name for task in chosen] == list(tasks)
    setting = Setting(limit=12)
    answer(opened, chosen, [held_out(task, setting) for task in chosen], setting)
    return said


def held_out_loss(run: RunFolder, task: str, *, base_only: bool = False) -> float:
    """Mean −log p of the right choices of held-out rows."""
    opened, setting = open_run(run), Setting(base_only=base_only)
    (one,) = (one for one in opened.tasks if one.name == task)
    examples = held_out(one, setting)
    ((answers),) = answer(opened, [one], [examples], setting)
    assert answers.scores is not None
    right = [s[e.gold] for s, e in zip(answers.scores, examples.examples, strict=True)]
    return -float(sum(right)) / len(right)


@pytest.mark.parametrize("kind", often(KINDS, ("weights", "diagonal", "mtlora")))
def test_the_old_tasks_stay_to_the_last_bit_and_the_new_one_learns(
    kind: str, place: Place, runs: Callable[[str], tuple[RunFolder, RunFolder]]
) -> None:
    old, new = runs(kind)
    before, after = logits(old, OLD), logits(new, OLD)
    assert len(before) == len(after) > 0
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    was, now = read_tensors(old.adapter), read_tensors(new.adapter)
    assert list(was) == list(now)
    config = read_adapter_file(old.adapter).config
    for name, tensor in was.items():
        assert len(now[name]) == len(tensor) + config.role(name).per_task
        assert torch.equal(now[name][: len(tensor)], tensor), name

    assert all(list(event["task_loss"]) == [NEW] for event in new.events())
    untouched = place.addition(old, learning_rate=1e-12, max_steps=1)
    begun = start(untouched, place.folder / "runs" / f"{kind}-begun")
    learned = held_out_loss(new, NEW)
    assert learned < KINDS[kind].most * held_out_loss(begun, NEW)
    assert learned < held_out_loss(new, NEW, base_only=True)


def test_rows_start_at_the_mean_of_those_that_there_are(
    place: Place, runs: Callable[[str], tuple[RunFolder, RunFolder]]
) -> None:
    for kind in ("weights", "embedding", "mtlora"):
        old, _ = runs(kind)
        _, adapter = place.addition(old).build()
        was = read_tensors(old.adapter)
        for name, tensor in adapter.tensors().items():
            assert tensor.requires_grad == adapter.role(name).per_task
            if not adapter.role(name).per_task:
                assert torch.equal(tensor, was[name])
            elif name.endswith("task_lora_B"):
                assert not tensor.any()
            elif not name.endswith("task_lora_A"):
                torch.testing.assert_close(tensor[0].detach(), was[name].mean(0))


def test_the_new_run_offers_all_tasks_and_says_where_they_come_from(
    place: Place, runs: Callable[[str], tuple[RunFolder, RunFolder]]
) -> None:
    old, new = runs("weights")
    assert [(task.name, task.id) for task in read_tasks(new)] == [
        *((name, number) for number, name in enumerate(OLD)),
        (NEW, len(OLD)),
    ]
    assert read_json(new.tasks)["tasks"][: len(OLD)] == read_json(old.tasks)["tasks"]
    origin = read_json(new.tasks)["added_to"]
    assert (origin["run"], origin["path"]) == ("weights", str(old.path))
    readme = (new.adapter / "README.md").read_text()
    assert f"Tasks: {NEW}, added to those of the run `weights`, which are as they were: " in readme
    named = load_addition(old, place.recipe("nameless", NEW)).recipe.run.name
    assert named == f"weights-{NEW}"


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of what was written compares here; its own process is tests/export's."""

    @contextmanager
    def beside(
        check: WrittenCheck, run: Run, task: Task, folder: Path
    ) -> Iterator[Callable[[], Comparison]]:
        yield lambda: check.compare(Questions(run, task, Setting(limit=check.limit)), folder)

    monkeypatch.setattr(WrittenCheck, "beside", beside)


@pytest.mark.usefixtures("in_process")
def test_the_new_task_is_merged_and_exported(
    runs: Callable[[str], tuple[RunFolder, RunFolder]], tmp_path: Path
) -> None:
    finished = open_run(runs("weights")[1])
    task = finished.tasks[-1]
    options = Options(limit=8)
    (merged,) = write_tasks("merged", finished, [(task, tmp_path / "merged")], options)
    assert merged.comparison is not None and merged.comparison.largest < 1e-3
    card = (tmp_path / "merged" / "README.md").read_text()
    assert f"{NEW}: added to tasks that had been learned before" in card
    pytest.importorskip("peft")
    (exported,) = write_tasks("peft", finished, [(task, tmp_path / "exported")], options)
    assert exported.comparison is not None and exported.comparison.largest < 1e-3


def test_what_was_stopped_goes_on_to_the_same_without_the_old_run(
    place: Place, tmp_path: Path
) -> None:
    old = place.train("alone", {}, max_steps=4)
    before = listing(old.path)
    new = start(place.addition(old, max_steps=12), place.folder / "runs" / "whole")
    assert listing(old.path) == before
    finished = read_tensors(new.adapter)
    shutil.rmtree(new.adapter)
    shutil.rmtree(new.checkpoints / "step-000012")
    shutil.rmtree(old.path)
    recipe = place.recipe("alone-new", NEW, training={**TRAINING, "max_steps": 12})
    with pytest.raises(UsageError, match=r"training\.seed: 0 → 1"):
        resume(new, recipe, ["training.seed=1"])
    with pytest.raises(UsageError, match="diagnose: looks at what tasks share"):
        resume(new, recipe, ["training.diagnose=true"])
    resume(new, recipe, [])
    again = read_tensors(new.adapter)
    assert all(torch.equal(finished[name], again[name]) for name in finished)
    assert [event["step"] for event in new.events()] == list(range(1, 13))


def test_tasks_can_be_added_to_added_ones_and_several_at_once(
    place: Place, runs: Callable[[str], tuple[RunFolder, RunFolder]]
) -> None:
    _, new = runs("embedding")
    entries = [
        {"name": f"again_{one}", "template": one, "source": str(place.folder / one)} for one in OLD
    ]
    recipe = place.recipe("more", tasks=entries, training={**TRAINING, "max_steps": 2})
    more = start(
        prepare(load_addition(new, recipe), extends=new), place.folder / "runs" / "embedding-more"
    )
    names = [*OLD, NEW, *(f"again_{one}" for one in OLD)]
    assert [(task.name, task.id) for task in read_tasks(more)] == [
        (name, number) for number, name in enumerate(names)
    ]
    before, after = logits(new, (*OLD, NEW)), logits(more, (*OLD, NEW))
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))


def test_a_change_of_what_is_shared_is_never_written(
    place: Place, runs: Callable[[str], tuple[RunFolder, RunFolder]], tmp_path: Path
) -> None:
    old, _ = runs("weights")
    prepared = place.addition(old)
    _, adapter = prepared.build()
    name, tensor = next((n, t) for n, t in adapter.tensors().items() if n.endswith("lora_A"))
    tensor.data[0, 0, 0] += 1e-6
    with pytest.raises(MtlLoraError, match=f"'{name}': what other tasks had learned was changed"):
        save_beside(adapter, old.adapter, tmp_path, prepared.base.identity())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["lora", "multilora", "hydralora"])
def test_methods_without_anything_of_a_tasks_own_are_refused(place: Place, method: str) -> None:
    old = place.train(method, {"method": method}, max_steps=1)
    with pytest.raises(UsageError, match=f"its method, {method}, has nothing of a task's own"):
        load_addition(old, place.recipe("refused", NEW))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"adapter": {"rank": 4}}, r"adapter\.rank: 8 → 4"),
        ({"adapter": {"method": "mtlora"}}, r"adapter\.method: 'mtl-lora' → 'mtlora'"),
        ({"dtype": "bfloat16"}, "dtype: 'auto' → 'bfloat16'"),
        ({"quantization": "nf4"}, "quantization: 'none' → 'nf4'"),
        ({"prompt_format": "chat"}, "prompt_format: 'plain' → 'chat'"),
    ],
)
def test_what_contradicts_the_run_is_refused(
    keys: dict[str, Any],
    said: str,
    place: Place,
    runs: Callable[[str], tuple[RunFolder, RunFolder]],
) -> None:
    old, _ = runs("weights")
    with pytest.raises(UsageError, match=f"differs from that of run 'weights'.*{said}"):
        load_addition(old, place.recipe("other", NEW, **keys))


def test_what_says_the_same_in_other_words_is_taken(
    place: Place, runs: Callable[[str], tuple[RunFolder, RunFolder]]
) -> None:
    old, _ = runs("weights")
    recipe = place.recipe(
        "same", NEW, adapter={"up_projections": 3, "rank": 8}, base_model=f"{place.base}/."
    )
    assert prepare(load_addition(old, recipe), extends=old).recipe.adapter.ups == 3


def test_settings_of_parts_that_do_not_learn_are_refused(
    place: Place, runs: Callable[[str], tuple[RunFolder, RunFolder]]
) -> None:
    old, _ = runs("weights")
    prepared = place.addition(old, parts={"up": {"learning_rate": 1e-3}})
    with pytest.raises(UsageError, match="has no up that learns; its parts: transform, gate"):
        prepared.build()
