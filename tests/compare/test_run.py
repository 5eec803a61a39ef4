"""`compare` from end to end: two methods, two seeds and four steps on two real tasks and a tiny model."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import pickle
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from mtl_lora_cli.compare.grid import Variant
from mtl_lora_cli.compare.markdown import markdown
from mtl_lora_cli.compare.report import build_report
from mtl_lora_cli.compare.rows import write_cuts
from mtl_lora_cli.compare.run import run_study
from mtl_lora_cli.compare.study import Study, StudyOptions, checked_plan, plan_study
from mtl_lora_cli.compare.workers import environments
from mtl_lora_cli.errors import MtlLoraError, Problem, ProblemsError, UsageError
from mtl_lora_cli.machine.cards import SHARING
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.recipe.source import Source
from mtl_lora_cli.runs.folder import RunFolder
from mtl_lora_cli.training import run as training
from mtl_lora_cli.training.checkpoints import newest_checkpoint

pytestmark = pytest.mark.slow

TASKS = {"sst2": "glue/sst2", "rte": "glue/rte"}
METHODS = ("lora", "mtl-lora")
Plan = Callable[..., Study]


@pytest.fixture(scope="module")
def recipe_file(
    data_folder: Path, stories_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A recipe of two tasks with 60 training and 30 held-out rows each."""
    root = tmp_path_factory.mktemp("comparison")
    for name, folder in TASKS.items():
        (root / name).mkdir()
        for split, count in (("train", 60), ("validation", 30)):
            source = data_folder / folder / f"{split}.jsonl.gz"
            with gzip.open(source, "rt", encoding="utf-8") as rows:
                text = "".join(itertools.islice(rows, count))
            (root / name / f"{split}.jsonl").write_text(text, encoding="utf-8")
    content = {
        "base_model": str(stories_folder.resolve()),
        "adapter": {"rank": 8},
        "tasks": [{"name": name, "template": name, "source": name} for name in TASKS],
        "training": {
            "max_steps": 4,
            "learning_rate": 3e-3,
            "row_length": 128,
            "rows_per_step": 2,
            "on_overflow": "truncate_prompt",
            "checkpoint_every": 2,
        },
    }
    path = root / "small.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    before = os.environ.get("MTL_LORA_CACHE")
    os.environ["MTL_LORA_CACHE"] = str(root / "cache")
    yield path
    if before is None:
        del os.environ["MTL_LORA_CACHE"]
    else:
        os.environ["MTL_LORA_CACHE"] = before


@pytest.fixture(scope="module")
def plan(recipe_file: Path) -> Plan:
    """`plan(folder, overrides=…, …)`: two methods and two seeds, where nothing else is said."""

    def make(folder: Path, *overrides: str, **options: Any) -> Study:
        chosen: dict[str, Any] = {
            "methods": METHODS,
            "match": "params",
            "seeds": [0, 1],
            "sweeps": {},
            "baseline": "lora",
            "limit": 12,
            **options,
        }
        return plan_study(load_recipe(recipe_file, overrides), folder, StudyOptions(**chosen))

    return make


@pytest.fixture(scope="module")
def finished(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A comparison that ran to its end, and what it said."""
    folder = tmp_path_factory.mktemp("finished")
    said: list[str] = []
    run_study(plan(folder), said.append)
    return folder, said


def result(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "results" / f"{name}.json").read_text(encoding="utf-8"))


def names(folder: Path) -> list[str]:
    return sorted(path.stem for path in (folder / "results").iterdir())


def test_each_run_leaves_a_result(finished: tuple[Path, list[str]]) -> None:
    expected = ["lora-seed0", "lora-seed1", "mtl-lora-seed0", "mtl-lora-seed1", "untrained"]
    assert names(finished[0]) == expected


def test_a_line_says_what_is_done_and_what_is_left(finished: tuple[Path, list[str]]) -> None:
    starts = [line.split(":")[0] for line in finished[1]]
    assert starts == ["lora-seed0", "mtl-lora-seed0", "lora-seed1", "mtl-lora-seed1", "untrained"]
    assert [line.split("; ")[1].split(",")[0] for line in finished[1]] == [
        "3 left",
        "2 left",
        "1 left",
        "0 left",
        "0 left",
    ]


def test_trained_values_agree_within_two_percent(finished: tuple[Path, list[str]]) -> None:
    methods = build_report(finished[0])["methods"]
    one, two = (methods[name]["parameters"] for name in METHODS)
    assert abs(one - two) <= 0.02 * two


@pytest.mark.parametrize("method", METHODS)
def test_the_formula_counts_what_is_trained(finished: tuple[Path, list[str]], method: str) -> None:
    stored = result(finished[0], f"{method}-seed0")
    assert stored["parameters"] == stored["planned_parameters"]


def test_the_report_s_scores_are_counted_from_the_answers(
    finished: tuple[Path, list[str]],
) -> None:
    """From the result files alone, by counting."""
    report = build_report(finished[0])
    shares: dict[tuple[str, str], list[float]] = {}
    for method, seed, task in itertools.product(METHODS, (0, 1), TASKS):
        entry = result(finished[0], f"{method}-seed{seed}")["test"][task]
        pairs = list(zip(entry["gold"].split(), entry["predicted"].split(), strict=True))
        assert len(pairs) == 12
        shares.setdefault((method, task), []).append(sum(g == p for g, p in pairs) / len(pairs))
    for (method, task), each in shares.items():
        assert report["scores"][method][task]["seeds"] == pytest.approx(each)
        assert report["scores"][method][task]["value"] == pytest.approx(sum(each) / 2)
    means = {m: sum(sum(shares[m, task]) / 2 for task in TASKS) / 2 for m in METHODS}
    for method in METHODS:
        assert report["average"][method]["value"] == pytest.approx(means[method])
    difference = report["average_differences"]["mtl-lora"]["value"]
    assert difference == pytest.approx(means["mtl-lora"] - means["lora"])


def test_seeds_and_methods_see_the_same_rows(finished: tuple[Path, list[str]]) -> None:
    gold = {
        result(finished[0], f"{method}-seed{seed}")["test"]["rte"]["gold"]
        for method, seed in itertools.product(METHODS, (0, 1))
    }
    assert len(gold) == 1


def test_the_scores_are_those_of_an_evaluation(
    finished: tuple[Path, list[str]], plan: Plan
) -> None:
    """The run's own answers, asked again through `evaluate` with all rows."""
    from mtl_lora_cli.evaluation.evaluate import Setting, evaluate
    from mtl_lora_cli.evaluation.opened import open_run

    opened = open_run(RunFolder(finished[0] / "runs" / "lora-seed1"))
    study = plan(finished[0], limit=None)
    whole = evaluate(opened, study.tasks, Setting())
    from mtl_lora_cli.data.mixture import subset

    for entry in whole:
        stored = result(finished[0], "lora-seed1")["test"][entry["task"]]
        drawn = subset(30, 12, 0, entry["task"])
        expected = " ".join(str(entry["predicted"][number]) for number in drawn)
        assert stored["predicted"] == expected


def test_nothing_is_done_twice(finished: tuple[Path, list[str]], plan: Plan) -> None:
    said: list[str] = []
    run_study(plan(finished[0]), said.append)
    assert said == []


def test_a_run_whose_result_is_gone_is_the_only_one_that_is_done_again(
    finished: tuple[Path, list[str]], plan: Plan
) -> None:
    folder = finished[0]
    before = result(folder, "lora-seed1")
    (folder / "results" / "lora-seed1.json").unlink()
    said: list[str] = []
    run_study(plan(folder), said.append)
    assert [line.split(":")[0] for line in said] == ["lora-seed1"]
    assert result(folder, "lora-seed1")["test"] == before["test"]


def test_a_comparison_may_grow(finished: tuple[Path, list[str]], plan: Plan) -> None:
    said: list[str] = []
    run_study(plan(finished[0], seeds=[0, 1, 2], methods=["lora"]), said.append)
    assert [line.split(":")[0] for line in said] == ["lora-seed2"]
    run_study(plan(finished[0]), said.append)  # the plan as it was


def test_a_comparison_of_before_goes_on(
    finished: tuple[Path, list[str]], plan: Plan, tmp_path: Path
) -> None:
    """Keys of the recipe that there were not yet have their defaults."""
    folder = Path(shutil.copytree(finished[0], tmp_path / "before"))
    stored = json.loads((folder / "plan.json").read_text())
    recipe = stored["fixed"]["recipe"]
    del recipe["extensions"]
    for task in recipe["tasks"]:
        del task["conversation"]
        assert task["objective"] == "causal_lm"
    (folder / "plan.json").write_text(json.dumps(stored))
    assert checked_plan(plan(folder))["fixed"]["recipe"]["extensions"] == []
    with pytest.raises(UsageError, match=r"holds another comparison: recipe\.adapter\.alpha: 16"):
        checked_plan(plan(folder, "adapter.alpha=8"))


def test_a_folder_of_another_comparison_is_refused(
    finished: tuple[Path, list[str]], plan: Plan
) -> None:
    other = plan(finished[0], "training.max_steps=5")
    with pytest.raises(UsageError, match=r"training\.max_steps: 4 → 5"):
        run_study(other, print)


def test_a_plan_of_before_there_was_a_choice_is_about_test(
    finished: tuple[Path, list[str]], plan: Plan
) -> None:
    path = finished[0] / "plan.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    del stored["fixed"]["score"]
    path.write_text(json.dumps(stored), encoding="utf-8")
    assert build_report(finished[0])["score"] == "test"
    with pytest.raises(UsageError, match="score: 'test' → 'validation'"):
        run_study(plan(finished[0], score="validation"), print)
    run_study(plan(finished[0]), print)


def test_data_that_changed_are_refused(
    finished: tuple[Path, list[str]], plan: Plan, recipe_file: Path
) -> None:
    path = recipe_file.parent / "rte" / "train.jsonl"
    text = path.read_text(encoding="utf-8")
    path.write_text("".join(text.splitlines(keepends=True)[:-1]), encoding="utf-8")
    try:
        with pytest.raises(UsageError, match=r"data\.rte\.train"):
            run_study(plan(finished[0]), print)
    finally:
        path.write_text(text, encoding="utf-8")


def test_an_interrupted_run_goes_on(
    finished: tuple[Path, list[str]], plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in its second run after a step, it ends with the answers of one that never stopped."""
    from mtl_lora_cli.training.progress import TrainingProgress

    update, stopped = TrainingProgress.update, []

    def watch(self: TrainingProgress, event: Any) -> None:
        update(self, event)
        if names(tmp_path) and event["step"] == 1 and not stopped:
            stopped.append(True)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(TrainingProgress, "update", watch)
    with pytest.raises(KeyboardInterrupt, match="stopped in mtl-lora-seed0; 1 of 2 runs"):
        run_study(plan(tmp_path, seeds=[0]), print)
    assert names(tmp_path) == ["lora-seed0"]
    run_study(plan(tmp_path, seeds=[0]), print)
    again, whole = result(tmp_path, "mtl-lora-seed0"), result(finished[0], "mtl-lora-seed0")
    assert again["test"] == whole["test"]
    assert again["last_loss"] == whole["last_loss"]


def test_a_run_that_fails_takes_no_other_with_it(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = training.start

    def fail(prepared: Any, path: Path, *rest: Any) -> RunFolder:
        if path.name == "mtl-lora-seed0":
            raise MtlLoraError("the loss is no longer a finite number")
        return start(prepared, path, *rest)

    monkeypatch.setattr(training, "start", fail)
    said: list[str] = []
    run_study(plan(tmp_path, seeds=[0]), said.append)
    assert result(tmp_path, "lora-seed0")["status"] == "done"
    failed = result(tmp_path, "mtl-lora-seed0")
    assert (failed["status"], failed["reason"]) == (
        "failed",
        "the loss is no longer a finite number",
    )


@pytest.fixture(scope="module")
def swept(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison with two settings of each method."""
    folder = tmp_path_factory.mktemp("swept")
    run_study(plan(folder, seeds=[0], sweeps={"adapter.temperature": [0.1, 1.0]}), print)
    return folder


def test_only_the_chosen_settings_are_scored_on_test(swept: Path) -> None:
    report = build_report(swept)
    chosen = {(one["method"], one["point"]) for one in report["tuning"] if one["chosen"]}
    scored = {
        (one["method"], one["point"])
        for one in (result(swept, name) for name in names(swept) if name != "untrained")
        if one["test"] is not None
    }
    assert len(chosen) == 2 and scored == chosen


def test_rows_that_choose_settings_are_neither_learned_nor_reported(
    swept: Path, recipe_file: Path
) -> None:
    def rows(path: Path) -> list[Any]:
        data = path.read_bytes()
        text = gzip.decompress(data) if path.suffix == ".gz" else data
        return [json.loads(line) for line in text.splitlines()]

    for name in TASKS:
        train, validation = (
            rows(swept / "data" / name / f"{split}.jsonl.gz") for split in ("train", "validation")
        )
        assert len(validation) == 12  # a fifth of 60
        whole = rows(recipe_file.parent / name / "train.jsonl")
        assert sorted(map(str, [*train, *validation])) == sorted(map(str, whole))
        entry = result(swept, "lora-learning_rate-0.003-seed0")
        assert entry["validation"][name]["examples"] == 12
        assert entry["recipe"]["tasks"][0]["source"]["path"].endswith("data/sst2")


def answers(stored: dict[str, Any], split: str) -> dict[str, Any] | None:
    entries = stored[split]
    return entries and {name: (one["predicted"], one["metrics"]) for name, one in entries.items()}


@pytest.mark.long
def test_side_by_side_the_results_are_the_same(swept: Path, plan: Plan, tmp_path: Path) -> None:
    """Two processes, through both phases: learning, and scoring the chosen settings on test."""
    said: list[str] = []
    study = plan(tmp_path, seeds=[0], sweeps={"adapter.temperature": [0.1, 1.0]})
    run_study(study, said.append, jobs=2)
    assert names(tmp_path) == names(swept)
    for run in study.runs:
        here, there = result(tmp_path, run.id), result(swept, run.id)
        assert here["last_loss"] == there["last_loss"]
        for split in ("validation", "test"):
            assert answers(here, split) == answers(there, split)
    both = (result(folder, "untrained") for folder in (tmp_path, swept))
    assert len({str(answers(one, "test")) for one in both}) == 1
    assert sorted(line.split(":")[0] for line in said[:4]) == sorted(run.id for run in study.runs)
    assert [line.split("; ")[-1].split(" left")[0] for line in said] == list("3210210")
    assert "2 runs at a time shared a device" in markdown(build_report(tmp_path))


def when(ready: Callable[[], bool], do: Callable[[], None]) -> threading.Thread:
    """Do something beside the comparison as soon as it is ready for it."""

    def watch() -> None:
        deadline = time.monotonic() + 100
        while not ready() and time.monotonic() < deadline:
            time.sleep(0.005)
        do()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def workers() -> list[psutil.Process]:
    """Of this process, in the order in which they were started."""
    found = [one for one in psutil.Process().children() if "worker_process" in str(one.cmdline())]
    return sorted(found, key=psutil.Process.create_time)


def learning(folder: Path, name: str) -> bool:
    metrics = folder / "runs" / name / "metrics.jsonl"
    return metrics.is_file() and "\n" in metrics.read_text(encoding="utf-8")


@pytest.mark.long
def test_a_process_that_is_killed_takes_only_its_run_with_it_and_ctrl_c_stops_all(
    plan: Plan, tmp_path: Path
) -> None:
    """Killed in its first run, it fails, and another process begins the third beside the second."""
    endless = ("training.max_steps=100000", "training.epochs=10000")
    study = plan(tmp_path, *endless, "training.checkpoint_every=null")
    killed = when(
        lambda: learning(tmp_path, "lora-seed0") and learning(tmp_path, "mtl-lora-seed0"),
        lambda: workers()[0].kill(),  # the first one has the first run
    )
    stopped = when(
        lambda: learning(tmp_path, "lora-seed1"), lambda: os.kill(os.getpid(), signal.SIGINT)
    )
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt, match="stopped in lora-seed1, mtl-lora-seed0; 0 of 4"):
        run_study(study, said.append, jobs=2)
    killed.join()
    stopped.join()
    assert workers() == []
    assert [line.split(",")[0] for line in said] == [
        "lora-seed0: failed: its process was ended by SIGKILL"
    ]
    assert names(tmp_path) == ["lora-seed0"]
    assert result(tmp_path, "lora-seed0")["status"] == "failed"
    steps = {
        name: newest_checkpoint(tmp_path / "runs" / name / "checkpoints")
        for name in ("lora-seed0", "mtl-lora-seed0", "lora-seed1")
    }
    assert [step is not None for step in steps.values()] == [False, True, True]


def test_an_error_of_another_process_has_all_its_lines() -> None:
    problems = [Problem("a.yaml", line, "key", "expected a number") for line in (1, 2)]
    error = ProblemsError(problems)
    assert pickle.loads(pickle.dumps(error)).lines == error.lines


def test_each_process_has_a_card_and_knows_who_shares_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = [(one["CUDA_VISIBLE_DEVICES"], one[SHARING]) for one in environments(3)]
    assert found == [("4", "2"), ("7", "1"), ("4", "2")]


def test_without_a_card_processes_divide_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    found = environments(3)
    assert [(one["OMP_NUM_THREADS"], one[SHARING]) for one in found] == [("2", "3")] * 3
    assert not any("CUDA_VISIBLE_DEVICES" in one for one in found)


@pytest.fixture
def without_tests(recipe_file: Path, tmp_path: Path) -> Path:
    """The recipe with rows that test, and that nobody can read.

    sst2 has a validation and a test split; rte is tested by its validation split.
    """
    root = tmp_path / "broken"
    shutil.copytree(recipe_file.parent, root, ignore=shutil.ignore_patterns("cache"))
    for path in (root / "sst2" / "test.jsonl", root / "rte" / "validation.jsonl"):
        path.write_text("no JSON\n", encoding="utf-8")
    return root / recipe_file.name


def test_a_score_by_validation_reads_no_test_file(without_tests: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    options = {"match": None, "seeds": [0], "sweeps": {}, "baseline": "lora", "limit": 10}
    with pytest.raises(UsageError, match=r"test\.jsonl.*not valid JSON"):
        run_study(
            plan_study(
                load_recipe(without_tests), folder, StudyOptions(methods=["lora"], **options)
            ),
            print,
        )
    scored = StudyOptions(methods=["lora"], score="validation", **options)
    run_study(plan_study(load_recipe(without_tests), folder, scored), print)
    stored, report = result(folder, "lora-seed0"), build_report(folder)
    assert stored["test"] is None
    for name, count in (("sst2", 10), ("rte", 10)):
        entry = stored["validation"][name]
        assert (entry["split"], entry["examples"]) == ("validation", count)
        assert report["scores"]["lora"][name]["value"] == entry["metrics"]["accuracy"]
    assert set(report["average"]) == {"lora", "untrained"}
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    assert plan["validation"] == {"sst2": "validation split", "rte": "rows cut from train"}
    assert plan["fixed"]["data"]["sst2"].keys() == {"train", "validation"}


def test_rows_are_cut_once_and_no_more_than_500(plan: Plan, tmp_path: Path) -> None:
    task = replace(plan(tmp_path).tasks[0], source=Source(path=str(tmp_path / "rows")))
    (tmp_path / "rows").mkdir()
    train = tmp_path / "rows" / "train.jsonl"
    train.write_text("".join(f'{{"n": {n}}}\n' for n in range(3000)), encoding="utf-8")
    write_cuts(tmp_path, [task])
    cut = tmp_path / "data" / task.name / "validation.jsonl.gz"
    assert len(gzip.decompress(cut.read_bytes()).splitlines()) == 500
    before = cut.stat().st_mtime_ns
    write_cuts(tmp_path, [task])
    assert cut.stat().st_mtime_ns == before
    train.write_text("".join(f'{{"n": {n}}}\n' for n in range(2000)), encoding="utf-8")
    with pytest.raises(UsageError, match="holds other rows than would be cut now"):
        write_cuts(tmp_path, [task])


def test_ranks_that_do_not_match_are_refused_before_anything_is_written(
    plan: Plan, tmp_path: Path
) -> None:
    folder = tmp_path / "new"
    with pytest.raises(UsageError) as refused:
        plan(folder, match=10_000)
    assert "lora cannot come within 2% of 10,000" in refused.value.lines[0]
    assert not folder.exists()


def test_a_variant_is_planned_with_its_settings(plan: Plan, tmp_path: Path) -> None:
    variants = {"embedded": Variant("mtl-lora", {"adapter.gate": "embedding"})}
    study = plan(
        tmp_path,
        methods=["lora", "mtl-lora", "embedded"],
        seeds=[0],
        variants=variants,
        match=26880,
    )
    recipes = {run.method: run.recipe for run in study.runs}
    assert recipes["embedded"].adapter.method == "mtl-lora"
    assert recipes["embedded"].adapter.gate == "embedding"
    assert recipes["mtl-lora"].adapter.gate == "weights"
    assert [run.id for run in study.runs] == ["lora-seed0", "mtl-lora-seed0", "embedded-seed0"]
    counts = [run.parameters for run in study.runs]
    assert study.target is not None
    assert all(abs(count / study.target - 1) <= 0.02 for count in counts)
    assert study.to_json()["variants"] == {"embedded": "mtl-lora with adapter.gate=embedding"}


def test_without_matching_ranks_are_the_recipe_s(plan: Plan, tmp_path: Path) -> None:
    ranks = {run.recipe.adapter.rank for run in plan(tmp_path, match=None).runs}
    assert ranks == {8}


def test_matched_ranks_keep_the_scale(plan: Plan, tmp_path: Path) -> None:
    scales = {run.recipe.adapter.alpha / run.recipe.adapter.rank for run in plan(tmp_path).runs}
    assert scales == {2.0}
