"""From a recipe to encoded tasks: fan-out by a column, the cache, the audit, the shared stream."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtl_lora_cli.data import cache
from mtl_lora_cli.data import prepare as preparing
from mtl_lora_cli.data.audit import Leak
from mtl_lora_cli.data.bind import bind_tasks
from mtl_lora_cli.data.prepare import TrainingData, prepare_training, read_examples
from mtl_lora_cli.errors import MtlLoraError, UsageError
from mtl_lora_cli.machine import pool
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import load_tokenizer
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.tasks.task import Task

TEMPLATE = """description: a task of a user's own
prompt: "{{ text }}"
label: label
choices: {0: "no", 1: "yes"}
"""


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def rows_of(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"text": f"row {i + start}", "label": i % 2} for i in range(count)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe's folder with one template, and a cache of its own."""
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "own.yaml").write_text(TEMPLATE, encoding="utf-8")
    return tmp_path


def prepare(folder: Path, stories: Path, tasks: str, *overrides: str) -> TrainingData:
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"base_model: {stories}\ntasks:\n{tasks}", encoding="utf-8")
    loaded = load_recipe(recipe, overrides)
    tokenizer = load_tokenizer(find_base_model(str(stories)))
    return prepare_training(bind_tasks(loaded), loaded.recipe, tokenizer, 512)


def test_a_task_column_fans_out_into_tasks(folder: Path, stories_folder: Path) -> None:
    rows = [{**row, "task_id": i % 3} for i, row in enumerate(rows_of(12))]
    write_rows(folder / "all.jsonl", rows)
    source = "{path: all.jsonl, task_column: task_id, task_names: {0: left, 1: middle, 2: right}}"
    data = prepare(folder, stories_folder, f"- {{name: x, template: own.yaml, source: {source}}}\n")
    assert [task.name for task in data.tasks] == ["left", "middle", "right"]
    assert [task.id for task in data.tasks] == [0, 1, 2]
    assert [len(split) for split in data.splits] == [4, 4, 4]
    examples = read_examples(data.tasks[1], "train")
    assert examples is not None
    assert [example.prompt for example in examples.examples] == [
        "row 1",
        "row 4",
        "row 7",
        "row 10",
    ]
    assert examples.wheres[1].endswith("all.jsonl:5")


def test_a_task_column_without_names_takes_its_values(folder: Path, stories_folder: Path) -> None:
    rows = [{**row, "task": ("boolq", "piqa")[i % 2]} for i, row in enumerate(rows_of(6))]
    write_rows(folder / "all.jsonl", rows)
    tasks = "- {name: x, template: own.yaml, source: {path: all.jsonl, task_column: task}}\n"
    data = prepare(folder, stories_folder, tasks)
    assert [task.name for task in data.tasks] == ["boolq", "piqa"]


def test_an_unknown_id_in_the_task_column_is_named(folder: Path, stories_folder: Path) -> None:
    write_rows(folder / "all.jsonl", [{**row, "task_id": 7} for row in rows_of(2)])
    source = "{path: all.jsonl, task_column: task_id, task_names: {0: left}}"
    with pytest.raises(UsageError, match=r"all\.jsonl:1: task_id: expected one of 0, received 7"):
        prepare(folder, stories_folder, f"- {{name: x, template: own.yaml, source: {source}}}\n")


def test_the_second_start_is_served_by_the_cache_and_equal(
    folder: Path, stories_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(folder / "d" / "train.jsonl", rows_of(20))
    tasks = "- {name: own, template: own.yaml, source: d}\n"
    first = prepare(folder, stories_folder, tasks)
    monkeypatch.setattr(
        "mtl_lora_cli.data.prepare.encode_task", lambda *a, **k: pytest.fail("encoded again")
    )
    second = prepare(folder, stories_folder, tasks)
    np.testing.assert_array_equal(first.splits[0].tokens, second.splits[0].tokens)
    np.testing.assert_array_equal(first.splits[0].starts, second.splits[0].starts)
    assert first.audits == second.audits


@pytest.mark.parametrize("change", ["template", "rows", "held-out rows", "row_length", "format"])
def test_whatever_determines_the_encoding_misses_the_cache(
    folder: Path, stories_folder: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(folder / "d" / "train.jsonl", rows_of(20))
    write_rows(folder / "d" / "test.jsonl", rows_of(4, start=50))
    tasks = "- {name: own, template: own.yaml, source: d}\n"
    prepare(folder, stories_folder, tasks)
    overrides = []
    if change == "template":
        text = TEMPLATE.replace("{{ text }}", "{{ text }}!")
        (folder / "own.yaml").write_text(text, encoding="utf-8")
    elif change == "rows":
        write_rows(folder / "d" / "train.jsonl", rows_of(20, start=1))
    elif change == "held-out rows":
        write_rows(folder / "d" / "test.jsonl", rows_of(4))
    elif change == "row_length":
        overrides = ["training.row_length=64"]
    else:
        monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    stored = len(list((folder / "cache" / "encoded").iterdir()))
    prepare(folder, stories_folder, tasks, *overrides)
    assert len(list((folder / "cache" / "encoded").iterdir())) == stored + 1


def test_a_damaged_cache_entry_is_made_again(folder: Path, stories_folder: Path) -> None:
    write_rows(folder / "d" / "train.jsonl", rows_of(20))
    tasks = "- {name: own, template: own.yaml, source: d}\n"
    first = prepare(folder, stories_folder, tasks)
    (entry,) = (folder / "cache" / "encoded").iterdir()
    entry.write_bytes(entry.read_bytes()[:100])
    second = prepare(folder, stories_folder, tasks)
    np.testing.assert_array_equal(first.splits[0].tokens, second.splits[0].tokens)


def test_the_audit_counts_leaks_repetitions_and_contradictions(
    folder: Path, stories_folder: Path
) -> None:
    train = [*rows_of(6), {"text": "row 0", "label": 0}, {"text": "row 1", "label": 0}]
    write_rows(folder / "d" / "train.jsonl", train)
    write_rows(folder / "d" / "test.jsonl", [*rows_of(2), {"text": "new", "label": 1}])
    data = prepare(folder, stories_folder, "- {name: own, template: own.yaml, source: d}\n")
    (audit,) = data.audits
    assert (audit.rows, audit.repeated, audit.contradictory) == (8, 1, 2)
    assert audit.leaks == (Leak("test", 2, 3),)
    assert audit.findings("own") == [
        "own: 2 of 3 test rows also stand in train",
        "own: 2 of 8 training rows have a prompt that also stands with another answer",
        "own: 1 of 8 training rows repeat an earlier one",
    ]


@pytest.mark.parametrize("again", [False, True], ids=["read", "from the cache"])
def test_validation_rows_are_held_against_train_beside_a_test_split(
    folder: Path, stories_folder: Path, again: bool
) -> None:
    """Without regard to white space, case and Unicode form; and their labels are not looked at."""
    train = [{"text": "A fine film", "label": 1}, {"text": "d\u00fcll", "label": 0}]
    held = [{"text": " a FINE\n film", "label": -1}, {"text": "du\u0308ll", "label": -1}]
    write_rows(folder / "d" / "train.jsonl", train)
    write_rows(folder / "d" / "validation.jsonl", [*held, {"text": "other", "label": -1}])
    write_rows(folder / "d" / "test.jsonl", [{"text": "new", "label": 1}])
    for _ in range(1 + again):
        data = prepare(folder, stories_folder, "- {name: own, template: own.yaml, source: d}\n")
    assert data.audits[0].findings("own") == ["own: 2 of 3 validation rows also stand in train"]


@pytest.mark.parametrize("again", [False, True], ids=["read", "from the cache"])
def test_held_out_rows_that_another_task_learns(
    folder: Path, stories_folder: Path, again: bool
) -> None:
    """Under the same template, or by their texts under another one with other names."""
    texts = ["a fine little film", "dull from end to end", "nothing to add here", "short"]
    write_rows(folder / "a" / "train.jsonl", rows_of(4))
    held = [{"text": text, "label": 1} for text in texts]
    write_rows(folder / "a" / "test.jsonl", held)
    write_rows(folder / "b" / "train.jsonl", [*rows_of(4, start=9), *held[:1]])
    others = [{"sentence": text.upper(), "label": 0} for text in texts]
    write_rows(folder / "c" / "train.jsonl", others)
    other = TEMPLATE.replace("{{ text }}", "Is this good? {{ sentence | trim }}")
    (folder / "other.yaml").write_text(other, encoding="utf-8")
    tasks = (
        "- {name: a, template: own.yaml, source: a}\n"
        "- {name: b, template: own.yaml, source: b}\n"
        "- {name: c, template: other.yaml, source: c}\n"
    )
    for _ in range(1 + again):
        data = prepare(folder, stories_folder, tasks)
    # One word alone, as `short` is, tells no row from another under another template.
    assert data.audits[0].findings("a") == [
        "a: 1 of 4 test rows also stand in the training rows of b",
        "a: 3 of 4 test rows also stand in the training rows of c",
    ]


def test_a_gap_in_a_prompt_is_said(folder: Path, stories_folder: Path) -> None:
    """Where the prompt prints a field whatever the row is like; not where it asks for it first."""
    (folder / "d").mkdir()
    (folder / "d" / "train.csv").write_text('text,more,label\ngood,,1\n,x,0\n"   ",,1\n')
    (folder / "d" / "test.csv").write_text("text,more,label\ngood,,1\nbad,,0\n")
    text = TEMPLATE.replace(
        "{{ text }}", "Review: {{ text | trim }}{% if more %} {{ more }}{% endif %}"
    )
    (folder / "own.yaml").write_text(text, encoding="utf-8")
    for _ in range(2):  # the second time from the cache
        data = prepare(folder, stories_folder, "- {name: own, template: own.yaml, source: d}\n")
        assert data.audits[0].findings("own")[1] == (
            "own: 2 of 3 training rows have an empty or blank field in their prompt (text), the "
            f"first is {folder}/d/train.csv:3"
        )


def test_a_list_of_nothing_and_what_nobody_sees_are_gaps(
    folder: Path, stories_folder: Path
) -> None:
    values = [["a", 1], [], [" ", ""], ["\u200b\ufeff"], [0]]
    rows = [{"tags": tags, "label": number % 2} for number, tags in enumerate(values)]
    write_rows(folder / "d" / "train.jsonl", rows)
    text = TEMPLATE.replace("{{ text }}", "Tags: {{ tags | join(', ') }}")
    (folder / "own.yaml").write_text(text, encoding="utf-8")
    data = prepare(folder, stories_folder, "- {name: own, template: own.yaml, source: d}\n")
    (blank,) = data.audits[0].odd
    assert (blank.found, blank.fields, blank.first) == (3, "tags", f"{folder}/d/train.jsonl:2")


def test_held_out_rows_with_one_answer_are_said(folder: Path, stories_folder: Path) -> None:
    write_rows(folder / "d" / "train.jsonl", rows_of(4))
    write_rows(folder / "d" / "test.jsonl", [{**row, "label": 0} for row in rows_of(12, start=9)])
    data = prepare(folder, stories_folder, "- {name: own, template: own.yaml, source: d}\n")
    assert data.audits[0].findings("own") == [
        "own: all 12 test rows have the answer 'no', as where labels are kept back"
    ]


def test_notes_of_files_are_findings(folder: Path, stories_folder: Path) -> None:
    (folder / "d").mkdir()
    (folder / "d" / "train.tsv").write_text('text\tlabel\n"A ""must see"""\t1\nbad\t0\n')
    (folder / "d" / "test.tsv").write_text("text\tlabel\nso\t1\n")
    for _ in range(2):
        data = prepare(folder, stories_folder, "- {name: own, template: own.yaml, source: d}\n")
        (line,) = data.audits[0].findings("own")
        assert line.startswith(
            f"own: {folder}/d/train.tsv: fields that look quoted as in CSV, read as they stand: 1, "
        )


# Ways in which public test splits keep their labels back; None: the column is not there.
@pytest.mark.parametrize("label", [-1, "-1", -1.0, "", "?", "-", None, "null", "hidden", -100])
@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_split_without_labels_names_the_way_out(
    folder: Path, stories_folder: Path, label: Any, split: str
) -> None:
    rows = [{**row, "label": label} for row in rows_of(3, start=50)]
    if label is None:
        rows = [{"text": row["text"]} for row in rows]
    elif label == "null":
        rows = [{**row, "label": None} for row in rows]
    write_rows(folder / "d" / "train.jsonl", rows_of(4))
    write_rows(folder / "d" / f"{split}.jsonl", rows)
    other = "validation" if split == "test" else ""
    if other:
        write_rows(folder / "d" / "dev.jsonl", rows_of(2, start=9))
    tasks = "- {name: own, template: own.yaml, source: d}\n"
    with pytest.raises(UsageError) as caught:
        prepare(folder, stories_folder, tasks)
    (line,) = caught.value.lines
    said, _, cure = line.partition("leave the split out with source: ")
    assert said.startswith(f"{folder}/d/{split}.jsonl:1: task 'own': label: ")
    assert said.endswith(f"; no {split} row has a right answer, as where labels are kept back: ")
    kept = "{train: train.jsonl, validation: dev.jsonl}" if other else "{train: train.jsonl}"
    assert cure == f"{{path: {folder}/d, splits: {kept}}}"
    data = prepare(folder, stories_folder, tasks, f"tasks.own.source={cure}")  # the way out is one
    assert len(data.splits[0]) == 4


def test_a_single_wrong_label_of_a_test_split_is_no_split_without_labels(
    folder: Path, stories_folder: Path
) -> None:
    write_rows(folder / "d" / "train.jsonl", rows_of(4))
    write_rows(folder / "d" / "test.jsonl", [{"text": "x", "label": -1}, *rows_of(3, start=50)])
    with pytest.raises(UsageError) as caught:
        prepare(folder, stories_folder, "- {name: own, template: own.yaml, source: d}\n")
    assert str(caught.value).endswith("label: received -1, expected one of 0, 1")


def test_a_free_answer_that_is_kept_back(folder: Path, stories_folder: Path) -> None:
    free = 'description: d\nprompt: "{{ text }}"\nanswer: "{{ label }}"\n'
    (folder / "own.yaml").write_text(free, encoding="utf-8")
    write_rows(folder / "d" / "train.jsonl", rows_of(4))
    write_rows(folder / "d" / "test.jsonl", [{"text": "x", "label": None}])
    with pytest.raises(UsageError, match=r"answer: a null would be printed.*leave the split out"):
        prepare(folder, stories_folder, "- {name: own, template: own.yaml, source: d}\n")


def test_arc_easy_has_the_two_questions_that_stand_in_both_splits(
    each_data_folder: Path, folder: Path, stories_folder: Path
) -> None:
    source = each_data_folder / "commonsense" / "ARC-Easy"
    data = prepare(
        folder,
        stories_folder,
        f"- {{name: arc, template: llm_adapters, source: {source}}}\n",
        "training.on_overflow=truncate_prompt",
    )
    assert [(leak.split, leak.found) for leak in data.audits[0].leaks] == [("test", 2)]


def test_an_empty_split_is_an_error(folder: Path, stories_folder: Path) -> None:
    write_rows(folder / "d" / "train.jsonl", rows_of(4))
    write_rows(folder / "d" / "test.jsonl", [])
    with pytest.raises(UsageError, match=r"test\.jsonl"):
        prepare(folder, stories_folder, "- {name: own, template: own.yaml, source: d}\n")


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_stream_is_the_same_for_any_number_of_processes(
    folder: Path, stories_folder: Path, processes: int
) -> None:
    write_rows(folder / "d" / "train.jsonl", rows_of(200))
    tasks = "- {name: own, template: own.yaml, source: d}\n"
    data = prepare(
        folder, stories_folder, tasks, "training.row_length=32", "training.rows_per_step=4"
    )
    for number in range(data.mixture.steps_in(2)):
        _, rows = data.mixture.step(number)
        parts = [rows[rank::processes] for rank in range(processes)]
        together = [parts[i % processes][i // processes] for i in range(len(rows))]
        assert together == rows


def test_repeat_goes_over_a_task_more_often(folder: Path, stories_folder: Path) -> None:
    write_rows(folder / "a" / "train.jsonl", rows_of(10))
    write_rows(folder / "b" / "train.jsonl", rows_of(30, start=100))
    tasks = (
        "- {name: a, template: own.yaml, source: a, repeat: 3}\n"
        "- {name: b, template: own.yaml, source: b}\n"
    )
    mixture = prepare(folder, stories_folder, tasks).mixture
    assert mixture.planned_counts() == [30, 30]
    places = [place for row in mixture.epoch(0) for place in row]
    assert all(places.count((0, i)) == 3 for i in range(10))
    assert all(places.count((1, i)) == 1 for i in range(30))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mixing.temperature=0", "mixing.temperature: input should be greater than 0, received 0"),
        ("tasks.own.sampling_weight=-1", "tasks.0.sampling_weight: input should be greater than"),
    ],
)
def test_mixing_that_means_nothing_is_refused(
    folder: Path, stories_folder: Path, override: str, message: str
) -> None:
    write_rows(folder / "d" / "train.jsonl", rows_of(4))
    with pytest.raises(MtlLoraError) as error:
        prepare(folder, stories_folder, "- {name: own, template: own.yaml, source: d}\n", override)
    assert any(message in line for line in error.value.lines), error.value.lines


def three_tasks(folder: Path) -> str:
    lines = []
    for number, name in enumerate(("one", "two", "three")):
        write_rows(folder / name / "train.jsonl", rows_of(20 + number, 100 * number))
        lines.append(f"- {{name: {name}, template: own.yaml, source: {folder / name}}}\n")
    return "".join(lines)


def test_where_it_takes_long_tasks_are_encoded_beside_each_other(
    folder: Path, stories_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process encodes the first one only, and all is what it would have made of them alone."""
    tasks = three_tasks(folder)
    alone = prepare(folder, stories_folder, tasks)
    monkeypatch.setenv("MTL_LORA_CACHE", str(folder / "another"))
    monkeypatch.setattr(preparing, "_LONG", -1.0)
    monkeypatch.setattr(pool, "cores", lambda: 2)
    here: list[str] = []
    encode = preparing.encode_task

    def noted(task: Task, *others: Any) -> Any:
        here.append(task.name)
        return encode(task, *others)

    monkeypatch.setattr(preparing, "encode_task", noted)
    beside = prepare(folder, stories_folder, tasks)
    assert here == ["one"]
    assert [task.fingerprints for task in alone.tasks] == [t.fingerprints for t in beside.tasks]
    for one, other in zip(alone.splits, beside.splits, strict=True):
        for name in ("tokens", "starts", "prompt_lengths"):
            assert np.array_equal(getattr(one, name), getattr(other, name))
    assert alone.audits == beside.audits


def test_a_fault_beside_is_told_here(
    folder: Path,
    stories_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    tasks = three_tasks(folder)
    write_rows(folder / "three" / "train.jsonl", [*rows_of(3), {"text": "x", "label": 7}])
    monkeypatch.setattr(preparing, "_LONG", -1.0)
    monkeypatch.setattr(pool, "cores", lambda: 2)
    with pytest.raises(UsageError, match=r"three/train\.jsonl:4: "):
        prepare(folder, stories_folder, tasks)
    assert capfd.readouterr().err == ""
