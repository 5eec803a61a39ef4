"""The report says what the small result files say: no model is needed, and its sums are right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtl_lora_cli.compare import plots
from mtl_lora_cli.compare.markdown import markdown, notes
from mtl_lora_cli.compare.report import build_report, write_report
from mtl_lora_cli.errors import MtlLoraError
from mtl_lora_cli.runs.folder import save_json

ENVIRONMENT = {
    "device": "cpu",
    "dtype": "float32",
    "versions": {"torch": "2"},
    "git_revision": None,
}
# method, setting, seed → right or wrong on the tasks `a` and `b`, on validation and on test
ANSWERS = {
    ("lora", "x", 0): (("11", "11"), ("1100", "10")),
    ("lora", "x", 1): (("11", "11"), ("1000", "11")),
    ("mtl-lora", "y", 0): (("10", "00"), ("1111", "11")),
    ("mtl-lora", "y", 1): (("10", "00"), ("1111", "11")),
    ("mtl-lora", "z", 0): (("11", "10"), ("1110", "10")),
    ("mtl-lora", "z", 1): (("11", "10"), ("1101", "00")),
}


def entries(words: tuple[str, str], split: str) -> dict[str, Any]:
    return {
        name: {
            "split": split,
            "examples": len(word),
            "rows": f"{split}-{name}",
            "metric": "accuracy",
            "metrics": {"accuracy": word.count("1") / len(word)},
            "positive": 1,
            "gold": " ".join("1" * len(word)),
            "predicted": " ".join(word),
        }
        for name, word in zip(("a", "b"), words, strict=True)
    }


def run_of(method: str, point: str, seed: int) -> dict[str, Any]:
    return {
        "id": f"{method}-{point}-seed{seed}",
        "method": method,
        "point": point,
        "settings": {"adapter.dropout": point},
        "filled": False,
        "seed": seed,
        "rank": 4,
        "alpha": 8.0,
        "parameters": 100,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A comparison of two methods on two seeds, one of them with two settings."""
    (tmp_path / "results").mkdir()
    runs = [run_of(*key) for key in ANSWERS]
    save_json(
        tmp_path / "plan.json",
        {
            "fixed": {"sweep": {"adapter.dropout": []}, "match": "params", "limit": None},
            "methods": ["lora", "mtl-lora"],
            "baseline": "lora",
            "seeds": [0, 1],
            "target": 100,
            "budget": ["tuning: as much as it takes"],
            "validation": {"a": "validation split", "b": "rows cut from train"},
            "runs": runs,
            "recipe_name": "small",
            "command_line": ["mtl-lora", "compare", "small"],
        },
    )
    for (key, (validation, test)), run in zip(ANSWERS.items(), runs, strict=True):
        result = {
            **run,
            "status": "done",
            "reason": None,
            "environment": ENVIRONMENT,
            "steps": 4,
            "tokens": 1000,
            "seconds": 2.0,
            "tokens_per_second": 500.0 + 100 * key[2],
            "peak_memory_gib": 1.0 + key[2],
            "last_loss": 1.5,
            "gradients": {"tasks": ["a", "b"], "cosine": [[1.0, 0.2 * key[2]]] * 2, "steps": 1},
            "validation_loss": [{"step": 2, "loss": {"a": 1.0 + key[2]}}],
            "validation": entries(validation, "validation"),
            "test": entries(test, "test") if key[1] != "y" else None,
        }
        save_json(tmp_path / "results" / f"{run['id']}.json", result)
    return tmp_path


def test_what_was_not_learned_is_told(folder: Path) -> None:
    """One answer to nearly all of thirty rows; what the runs' own looks showed; spikes."""
    gold, same = " ".join("10" * 15), " ".join("1" * 30)

    def one_sided(content: dict[str, Any]) -> None:
        content["test"]["a"] |= {"gold": gold, "predicted": same, "rows": "test-a", "examples": 30}
        content |= {"signs": ["a: it was not learned"], "spikes": 3}

    for method, point in (("lora", "x"), ("mtl-lora", "z")):
        for seed in (0, 1):
            other = (
                (lambda c: c["test"]["a"].update(gold=gold, predicted=gold)) if seed else one_sided
            )
            change(folder, f"{method}-{point}-seed{seed}", other)
    change(folder, "mtl-lora-z-seed0", lambda c: c["test"]["a"].update(predicted=gold))
    guess = {"loss": 0.7, "guess": 0.69, "better": False}
    for name in ("lora-x-seed0", "mtl-lora-z-seed0"):  # the first gives one answer, which is said
        change(folder, name, lambda c: c["test"]["a"].update(guess=guess))
    report = build_report(folder)
    assert report["not_learned"] == [
        "a: lora gives one answer to nearly all rows with 1 of 2 seeds",
        "a: answers of mtl-lora cannot be told from a guess by how often each is right with 1 of 2 seeds",
        "lora, seed 0: a: it was not learned",
        "lora: 3 of 8 steps had a gradient more than 5 times the usual",
        "mtl-lora, seed 0: a: it was not learned",
        "mtl-lora: 3 of 8 steps had a gradient more than 5 times the usual",
    ]
    assert set(report["not_learned"]) <= set(notes(report))


def change(folder: Path, name: str, edit: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "results" / f"{name}.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_settings_are_chosen_by_validation_alone(folder: Path) -> None:
    """y: (1/2 + 0) / 2 = 0.25, z: (1 + 1/2) / 2 = 0.75; y would be better on test."""
    tuning = {one["point"]: one for one in build_report(folder)["tuning"]}
    assert (tuning["y"]["validation"], tuning["z"]["validation"]) == (0.25, 0.75)
    assert [point for point, one in tuning.items() if one["chosen"]] == ["x", "z"]


def test_a_metric_that_is_0_by_0_is_told(folder: Path) -> None:
    """No row of `a` has the positive class, and the baseline gives none; the other method does."""

    def positive_0(content: dict[str, Any]) -> None:
        entry = content["test"]["a"]
        entry |= {"metric": "f1", "metrics": {"f1": 0.0}, "title": "f1 (no)", "positive": 0}
        entry["predicted"] = "1 1 1 1" if content["method"] == "lora" else "1 1 1 0"

    for method, point, seed in ANSWERS:
        if point != "y":
            change(folder, f"{method}-{point}-seed{seed}", positive_0)
    report = build_report(folder)
    line = (
        "a: f1 (no) of lora is undefined with 2 of 2 seeds (no row has the positive class, and none is "
        "given it) and counts as 0"
    )
    assert report["undefined"] == [line]
    assert line in notes(report)
    assert "| a | f1 (no) | 4 test |" in markdown(report)


def about_validation(folder: Path) -> dict[str, Any]:
    """The same comparison with its report about the validation rows."""
    plan = json.loads((folder / "plan.json").read_text())
    plan["fixed"]["score"] = "validation"
    (folder / "plan.json").write_text(json.dumps(plan))
    return build_report(folder)


def test_a_report_about_validation_takes_the_chosen_settings_validation_scores(
    folder: Path,
) -> None:
    report = about_validation(folder)
    assert report["scores"]["mtl-lora"]["a"]["seeds"] == [1.0, 1.0]
    assert report["scores"]["mtl-lora"]["b"]["seeds"] == [0.5, 0.5]
    assert report["average"]["mtl-lora"]["value"] == 0.75
    assert report["tasks"]["a"]["split"] == "validation"
    assert report["unfinished"] == []


def test_a_report_about_validation_says_so_everywhere(folder: Path) -> None:
    text = markdown(about_validation(folder))
    assert text.startswith("# Methods compared on small (validation)\n")
    assert "| method | average (validation) |" in text
    assert "| task | metric | rows | lora (validation) | mtl-lora (validation) |" in text
    assert "| task | difference (validation) |" in text
    assert "no test file was read; validation rows cut from train: b" in text
    assert "a score that chose is not one to publish" in text
    assert "scored on test" not in text
    assert "(validation)" not in markdown({**about_validation(folder), "score": "test"})


def test_speeds_of_runs_that_shared_a_device_are_said_to_be_so(folder: Path) -> None:
    assert not any("shared a device" in line for line in notes(build_report(folder)))
    change(folder, "lora-x-seed1", lambda one: one.update(sharing=4))
    assert "up to 4 runs at a time shared a device" in "\n".join(notes(build_report(folder)))


def test_a_base_model_that_could_not_be_scored_is_named(folder: Path) -> None:
    failed = {"id": "untrained", "status": "failed", "reason": "out of memory"}
    save_json(folder / "results" / "untrained.json", failed)
    report = build_report(folder)
    assert report["unfinished"] == [{"id": "untrained", "reason": "out of memory"}]
    assert "untrained" not in report["average"]


def test_scores_by_hand(folder: Path) -> None:
    report = build_report(folder)
    assert report["scores"]["lora"]["a"]["seeds"] == [0.5, 0.25]
    assert report["scores"]["mtl-lora"]["a"]["value"] == 0.75
    assert report["average"]["lora"]["value"] == pytest.approx((0.375 + 0.75) / 2)
    assert report["average"]["mtl-lora"]["value"] == pytest.approx((0.75 + 0.25) / 2)


def test_differences_by_hand(folder: Path) -> None:
    report = build_report(folder)
    assert report["differences"]["mtl-lora"]["a"]["value"] == pytest.approx(0.375)
    assert report["average_differences"]["mtl-lora"]["value"] == pytest.approx(-0.0625)


def test_costs_are_means_over_seeds_and_the_most_memory(folder: Path) -> None:
    about = build_report(folder)["methods"]["lora"]
    assert (about["tokens_per_second"], about["peak_memory_gib"]) == (550.0, 2.0)


def test_the_budget_of_each_method_is_counted(folder: Path) -> None:
    methods = build_report(folder)["methods"]
    assert (methods["mtl-lora"]["settings_tried"], methods["mtl-lora"]["runs"]) == (2, 4)


def test_cosines_are_means_over_seeds(folder: Path) -> None:
    assert build_report(folder)["gradients"]["lora"]["cosine"][0] == [1.0, pytest.approx(0.1)]


def test_validation_losses_are_means_over_seeds(folder: Path) -> None:
    assert build_report(folder)["validation_loss"]["lora"] == {"a": [[2, 1.5]]}


def test_a_method_none_of_whose_settings_is_whole_has_nothing_to_show(folder: Path) -> None:
    change(folder, "lora-x-seed1", lambda one: one.update(status="failed", reason="out of memory"))
    with pytest.raises(MtlLoraError, match="the baseline lora; lora-x-seed1: out of memory"):
        build_report(folder)


def test_a_setting_with_a_failed_run_is_not_chosen(folder: Path) -> None:
    change(folder, "mtl-lora-z-seed1", lambda one: one.update(status="failed", reason="nan"))
    for seed in (0, 1):
        change(
            folder,
            f"mtl-lora-y-seed{seed}",
            lambda one: one.update(test=entries(("1111", "11"), "test")),
        )
    report = build_report(folder)
    assert [one["point"] for one in report["tuning"] if one["chosen"]] == ["x", "y"]
    assert report["unfinished"] == [{"id": "mtl-lora-z-seed1", "reason": "nan"}]


def test_without_a_sweep_the_seeds_that_all_methods_have_are_compared(folder: Path) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    plan["fixed"]["sweep"] = {}
    plan["runs"] = [run for run in plan["runs"] if run["point"] != "y"]
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "results" / "mtl-lora-z-seed0.json").unlink()
    report = build_report(folder)
    assert report["seeds"] == [1]
    assert report["average"]["lora"]["value"] == pytest.approx((0.25 + 1) / 2)
    assert "seeds: 1 of 0, 1: the others are not finished for all methods" in notes(report)


def test_rows_that_changed_between_runs_are_not_paired(folder: Path) -> None:
    change(folder, "lora-x-seed0", lambda one: one["test"]["a"].update(rows="others"))
    with pytest.raises(MtlLoraError, match="task 'a': its rows changed"):
        build_report(folder)


def test_the_markdown_says_what_the_json_says(folder: Path) -> None:
    report = build_report(folder)
    text = markdown(report)
    one, other = report["average"]["mtl-lora"], report["average_differences"]["mtl-lora"]
    assert f"| mtl-lora | {one['value']:.3f} | {one['low']:.3f} – {one['high']:.3f} |" in text
    assert f"{other['value']:+.3f} | {other['low']:+.3f} – {other['high']:+.3f} |" in text
    assert "validation rows cut from train: b" in text


def test_everything_is_written(folder: Path) -> None:
    report = write_report(folder)
    names = {"report.json", "report.md", "scores.png", "gradients.png", "validation.png"}
    assert names <= {path.name for path in folder.iterdir()}
    stored = json.loads((folder / "report.json").read_text())
    assert stored["average"] == report["average"]


def test_differences_to_the_untrained_model_are_not_drawn(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = build_report(folder)
    for part in ("average", "average_differences", "scores", "differences"):
        report[part] = {**report[part], "untrained": report[part]["mtl-lora"]}
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    plots.write_plots(report, folder)
    scores, differences = ([line.get_label() for line in axis.lines] for axis in drawn[0].axes)
    assert {"lora", "mtl-lora", "untrained"} <= set(scores)
    assert "mtl-lora" in differences
    assert "untrained" not in differences


def test_the_same_results_make_the_same_numbers(folder: Path) -> None:
    one, two = build_report(folder), build_report(folder)
    assert {**one, "date": ""} == {**two, "date": ""}
