"""The recipes that come with the package: they parse, and explain every key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.recipe.yaml_file import read_document
from mtl_lora_cli.resources import bundled

RECIPES = sorted(bundled("recipes").glob("**/*.yaml"))
REAL = [path for path in RECIPES if "${MTL_LORA_DATA}" in path.read_text(encoding="utf-8")]
PAPER = [path for path in RECIPES if path.stem.startswith(("commonsense", "glue"))]
WINNER = "recipes/real-17.yaml"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"


@pytest.fixture(autouse=True)
def _data_folder_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTL_LORA_DATA", "data")


def unexplained_keys(path: Path) -> list[str]:
    """Keys without a comment in the line above; each is to be explained where it stands first.

    A section (a key with keys below it) is explained by what stands in it.
    """
    lines = ["", *path.read_text(encoding="utf-8").splitlines()]
    document = read_document(path)
    seen: set[str] = set()
    missing = []
    sections = {key[:end] for key in document.lines for end in range(1, len(key))}
    for key, line in sorted(document.lines.items(), key=lambda item: item[1]):
        if not key or key in sections or key[-1].isdigit():
            continue
        name = ".".join(part for part in key if not part.isdigit())
        if name not in seen and not lines[line - 1].lstrip().startswith("#"):
            missing.append(f"{path.name}:{line}: {name}")
        seen.add(name)
    return missing


def test_there_are_recipes() -> None:
    assert "real-small" in {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_parses(path: Path) -> None:
    loaded = load_recipe(path)
    assert len({task.name for task in loaded.recipe.tasks}) == len(loaded.recipe.tasks) >= 1


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_it_names_what_won_in_the_study(path: Path) -> None:
    changes = " ".join(re.findall(r"(?m)^#   (\S.*)$", path.read_text(encoding="utf-8"))).split()
    loaded, winner = load_recipe(path, changes).recipe, load_recipe(bundled(WINNER)).recipe
    targets = loaded.adapter.target_modules
    same = winner.adapter.changed(target_modules=targets)
    assert loaded.adapter.changed(dropout=0.0, temperature=0.5) == same
    for one in (loaded.training, winner.training):
        assert one.parts.up.learning_rate == pytest.approx(4 * one.learning_rate)
        assert one.parts.transform.learning_rate == pytest.approx(10 * one.learning_rate)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_explains_itself(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# "), "the first line says what the recipe is for"
    assert unexplained_keys(path) == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_names_no_place_on_anyones_disk(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w}.~])/(?:\w+/)+|/home/|~/", re.sub(r"https?://\S+", "", text))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_its_templates_are_there(path: Path) -> None:
    from mtl_lora_cli.tasks.registry import find_template

    for task in load_recipe(path).recipe.tasks:
        find_template(task.template, path.parent)


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_its_rows_become_examples(
    path: Path, each_data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mtl_lora_cli.data.bind import bind_tasks
    from mtl_lora_cli.data.prepare import held_out_examples, read_examples

    monkeypatch.setenv("MTL_LORA_DATA", str(each_data_folder))
    for task in bind_tasks(load_recipe(path)):
        for found in (read_examples(task, "train", at_most=20), held_out_examples(task)):
            assert found is not None, f"{task.name}: a split is missing"
            assert len(found.examples) >= 20
            assert all(example.prompt and example.answer for example in found.examples)


@pytest.mark.real_data
def test_the_unbalanced_one_is_as_unbalanced_as_it_says(
    real_data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And docs/mixtures.md says how a temperature evens it out."""
    from mtl_lora_cli.data import mixture
    from mtl_lora_cli.data.bind import bind_tasks
    from mtl_lora_cli.data.prepare import read_examples

    monkeypatch.setenv("MTL_LORA_DATA", str(real_data_folder))
    counts = []
    loaded = load_recipe(bundled("recipes") / "unbalanced-3.yaml")
    tasks = bind_tasks(loaded)
    for task in tasks:
        found = read_examples(task, "train", at_most=task.max_examples)
        assert found is not None
        counts.append(len(found.examples))
    assert counts == [5749, 384, 150]
    page = (PAGE.parent / "mixtures.md").read_text(encoding="utf-8")
    epochs = loaded.recipe.training.epochs
    for number, task in enumerate(tasks):
        row = f"| {task.name} | {counts[number]:,} |"
        for strategy, temperature in (("proportional", 1.0), ("temperature", 2.0)):
            shares = mixture.shares(counts, strategy, (), temperature)
            passes = epochs * mixture.counts(counts, shares)[number] / counts[number]
            row += f" {shares[number]:.1%} | {passes:.2f} |"
        assert row in page


@pytest.mark.parametrize("name", ["commonsense", "glue"])
def test_the_larger_model_changes_the_base_model_alone(name: str) -> None:
    small, large = (
        load_recipe(bundled("recipes") / f"{one}.yaml").recipe
        for one in (name, f"{name}-llama3-8b")
    )
    assert large.base_model == "meta-llama/Meta-Llama-3-8B"
    assert large == small.model_copy(update={"base_model": large.base_model})


def test_the_page_lists_them_all() -> None:
    """docs/recipes.md has a row for each, with the number of its tasks and its base model."""
    table = r"^\| \[([\w-]+)\]\(../recipes/\1\.yaml\) \| (\d+) \| `([^`]+)` \|"
    recipes = ((path.stem, load_recipe(path).recipe) for path in RECIPES)
    expected = [(name, str(len(one.tasks)), one.base_model) for name, one in recipes]
    assert sorted(re.findall(table, PAGE.read_text(encoding="utf-8"), re.MULTILINE)) == sorted(
        expected
    )


def test_the_check_of_comments_sees_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "# why\na: 1\nb: 2\nsection:\n  # why\n  c: 1\n  d: 2\n"
        "tasks:\n  # why\n  - name: x\n    # why\n    e: 1\n  - name: y\n    e: 2\n    f: 3\n",
        encoding="utf-8",
    )
    assert unexplained_keys(path) == ["r.yaml:3: b", "r.yaml:7: section.d", "r.yaml:15: tasks.f"]
