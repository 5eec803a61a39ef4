"""From a recipe file and overrides to a resolved recipe, and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.recipe.load import (
    describe_changes,
    dump_recipe,
    find_recipe,
    load_recipe,
)
from mtl_lora_cli.recipe.mixing import TemperatureMixing
from mtl_lora_cli.recipe.schema import Recipe, RunSettings, TaskSettings
from mtl_lora_cli.recipe.source import Source
from mtl_lora_cli.recipe.yaml_file import parse_document, validate_document

Written = Callable[[str], Path]


def _errors(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        load_recipe(path, overrides)
    return [line.removeprefix(f"{path}:") for line in caught.value.lines]


def _line(text: str, part: str) -> int:
    """The line on which a part stands first."""
    return text[: text.index(part)].count("\n") + 1


def test_the_complete_recipe_sets_every_key(complete: str, written: Written) -> None:
    recipe = load_recipe(written(complete)).recipe
    left_out = {
        f"{type(part).__name__}.{name}"
        for part in (recipe, recipe.adapter, recipe.training, recipe.run, recipe.tasks[0])
        for name in type(part).model_fields
        if name not in part.model_fields_set
    }
    assert left_out == set(), "write them into the recipe in conftest.py"


def test_defaults(written: Written) -> None:
    recipe = load_recipe(written("tasks: [{name: a, template: glue/rte}]\n")).recipe
    assert recipe.adapter == configure()
    assert (recipe.mixing, recipe.base_model) == ("proportional", "smollm2-135m")
    assert recipe.tasks[0].source is None


@pytest.mark.parametrize(
    ("override", "where", "value"),
    [
        ("training.learning_rate=3e-4", ("training", "learning_rate"), 3e-4),
        ("training.seed=11", ("training", "seed"), 11),
        ("training.max_steps=null", ("training", "max_steps"), None),
        ("training.max_steps=", ("training", "max_steps"), None),
        ("adapter.target_modules=[up_proj]", ("adapter", "target_modules"), ["up_proj"]),
        ("adapter.target_modules.1=o_proj", ("adapter", "target_modules"), ["q_proj", "o_proj"]),
        ("mixing=uniform", ("mixing",), "uniform"),
        ("training.parts.up.learning_rate=0", ("training", "parts", "up", "learning_rate"), 0.0),
        ("training.diagnose=true", ("training", "diagnose"), {"every": 50}),
        ("training.clipping=true", ("training", "clipping", "relative"), 1.05),
        ("training.diagnose=false", ("training", "diagnose"), None),
        ("training.diagnose.every=7", ("training", "diagnose", "every"), 7),
        ("training.validation=true", ("training", "validation", "every"), 100),
        ("training.validation.best=rte", ("training", "validation", "best"), "rte"),
        ("training.validation=null", ("training", "validation"), None),
        ("base_model=a=b", ("base_model",), "a=b"),
        ("run.name='08'", ("run", "name"), "08"),
    ],
)
def test_overrides(
    complete: str, written: Written, override: str, where: tuple[str, ...], value: object
) -> None:
    found = load_recipe(written(complete), [override]).recipe.model_dump()
    for part in where:
        found = found[part]
    assert found == value


def test_overrides_name_a_task_by_its_name_or_index(complete: str, written: Written) -> None:
    overrides = ["tasks.second.source=some/file.csv", "tasks.0.max_examples=5", "tasks.0.name=new"]
    tasks = load_recipe(written(complete), overrides).recipe.tasks
    assert tasks[1].source == Source(path="some/file.csv")
    assert (tasks[0].name, tasks[0].max_examples) == ("new", 5)


def test_an_override_makes_the_sections_it_needs(written: Written) -> None:
    path = written("tasks: [{name: a, template: t, source: short/form}]\n")
    recipe = load_recipe(path, ["adapter.rank=3", "tasks.a.source.sample=animals"]).recipe
    assert recipe.adapter.rank == 3
    assert recipe.tasks[0].source == Source(sample="animals")


def test_the_last_of_two_overrides_holds(complete: str, written: Written) -> None:
    recipe = load_recipe(written(complete), ["training.seed=1", "training.seed=2"]).recipe
    assert recipe.training.seed == 2


def test_the_file_stays_as_it_was(complete: str, written: Written) -> None:
    path = written(complete)
    load_recipe(path, ["training.seed=1", "tasks.first.name=other"])
    assert path.read_text(encoding="utf-8") == complete


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("training.seed", "'training.seed': expected key.path=value, such as training.seed=1"),
        ("=1", "'=1': expected key.path=value, such as training.seed=1"),
        ("a..b=1", "'a..b=1': expected key.path=value, such as training.seed=1"),
        ("training.seed=[", "'training.seed=[': the value is not valid YAML"),
        ("training.seed={a: 1", "'training.seed={a: 1': the value is not valid YAML"),
        ("training.sed=1", "command line: training.sed: unknown key; did you mean 'seed'?"),
        (
            "training.seed=1.5",
            "command line: training.seed: input should be a valid integer, received 1.5",
        ),
        (
            "tasks.third.name=x",
            "'tasks.third.name=x': no entry 'third'; known: first, second",
        ),
        (
            "tasks.secnd.name=x",
            "'tasks.secnd.name=x': no entry 'secnd'; did you mean 'second'?; known: first, second",
        ),
        ("tasks.2.name=x", "'tasks.2.name=x': no entry '2'; known: first, second"),
        (
            "tasks.second.nam=x",
            "command line: tasks.1.nam: unknown key; did you mean 'name'?",
        ),
    ],
)
def test_bad_overrides(complete: str, written: Written, override: str, error: str) -> None:
    assert _errors(written(complete), override) == [error]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("trainin.seed=1", "trainin"),
        ("base_model.name=x", "base_model"),
        ("adapter={rank: four}", "adapter.rank"),
        ("tasks=[{name: a}]", "tasks.0.template"),
    ],
)
def test_a_fault_of_the_command_line_is_not_laid_to_the_file(
    complete: str, written: Written, override: str, key: str
) -> None:
    (error,) = _errors(written(complete), override)
    assert error.startswith(f"command line: {key}: ")


@pytest.mark.parametrize(
    "override",
    [
        "adapter.target_modules.0.x=1",
        "adapter.target_modules.².x=1",
        "training.seed=!!int abc",
        "training.seed=!!bool maybe",
        "training.seed=!!timestamp abc",
        "training.seed=" + "9" * 5000,
        "training.seed=" + "[" * 600,
        "adapter={rank: 4, rank: 8}",
    ],
)
def test_overrides_that_no_one_thinks_of(complete: str, written: Written, override: str) -> None:
    _errors(written(complete), override)


def test_environment(complete: str, written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTL_TEST_SET", "here")
    monkeypatch.setenv("MTL_TEST_EMPTY", "")
    monkeypatch.delenv("MTL_TEST_UNSET", raising=False)
    for text, value in (
        ("${MTL_TEST_SET}/x", "here/x"),
        ("${MTL_TEST_SET}${MTL_TEST_SET}", "herehere"),
        ("${MTL_TEST_SET:-there}", "here"),
        ("${MTL_TEST_UNSET:-there}/x", "there/x"),
        ("${MTL_TEST_UNSET:-}x", "x"),
        ("${MTL_TEST_EMPTY:-there}", "there"),  # set to nothing is as good as not set
        ("$MTL_TEST_SET", "$MTL_TEST_SET"),
        ("{MTL_TEST_SET}", "{MTL_TEST_SET}"),
    ):
        changed = complete.replace("some/model", f"'{text}'")
        assert load_recipe(written(changed)).recipe.base_model == value
        assert load_recipe(written(complete), [f"base_model={text!r}"]).recipe.base_model == value


def test_home(complete: str, written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    recipe = load_recipe(written(complete.replace("some/model", "~/model"))).recipe
    assert recipe.base_model == "/home/someone/model"


def test_unset_variables_are_named_all_at_once(
    complete: str, written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MTL_TEST_UNSET", raising=False)
    changed = complete.replace("some/model", "${MTL_TEST_UNSET}/m").replace(
        "data/rte", "'${MTL_TEST_UNSET}/d'"
    )
    message = "the environment variable MTL_TEST_UNSET is not set"
    assert _errors(written(changed)) == [
        f"1: base_model: {message}",
        f"{_line(changed, '/d')}: tasks.0.source.path: {message}",
    ]
    assert _errors(written(complete), "base_model=${MTL_TEST_UNSET}") == [
        f"command line: base_model: {message}"
    ]


@pytest.mark.parametrize(
    ("before", "after", "at", "error"),
    [
        ("name: second", "name: first", "tasks:", "tasks: the task 'first' stands twice"),
        ("{path: data/rte, ", "{", "splits", "tasks.0.source: expected exactly one of"),
        ("data/rte, ", "data/rte, sample: x, ", "rte,", "tasks.0.source: expected exactly one"),
        ("{hub: owner/name", "{path: x", "{path: x", "tasks.1.source: 'config' goes with a hub"),
        ("{train: a", "{dev: a", "{dev", "tasks.0.source.splits.dev: input should be"),
        ("name: first", "name: a b", "name: a b", "tasks.0.name: string should match pattern"),
        ("rank: 4", "rank: true", "rank:", "adapter.rank: input should be a valid integer"),
        ("rank: 4", "rank: 4.0", "rank:", "adapter.rank: input should be a valid integer"),
        ("3e-4", "-3e-4", "3e-4", "training.learning_rate: input should be greater than 0"),
        ("3e-4", ".inf", ".inf", "training.learning_rate: input should be a finite number"),
        ("seed: 7", "seed: 4294967296", "seed:", "training.seed: input should be less than"),
        ("dropout: 0.1", "dropout: 1", "dropout", "adapter.dropout: input should be less than 1"),
        ("[q_proj, v_proj]", "[]", "target_", "adapter.target_modules: list should have at least"),
        ("{temperature: 2.0}", "sideways", "mixing:", "mixing: "),
        ("{temperature: 2.0}", "{temperature: 0}", "mixing:", "mixing.temperature: "),
    ],
)
def test_faults(
    complete: str, written: Written, before: str, after: str, at: str, error: str
) -> None:
    assert before in complete
    text = complete.replace(before, after)
    received = _errors(written(text))
    assert len(received) == 1, received
    assert received[0].startswith(f"{_line(text, at)}: {error}"), received


def test_a_misspelt_mixing_is_named(complete: str, written: Written) -> None:
    text = complete.replace("{temperature: 2.0}", "{temprature: 2.0}")
    line = _line(text, "mixing")
    assert sorted(_errors(written(text))) == [
        f"{line}: mixing.temperature: is required and missing",
        f"{line}: mixing.temprature: unknown key; did you mean 'temperature'?",
    ]


def test_mixing_by_weights_needs_a_weight(written: Written) -> None:
    text = "mixing: weights\ntasks: [{name: a, template: t, sampling_weight: 0}]\n"
    assert _errors(written(text)) == ["1: mixing: weights needs a sampling_weight above 0"]


def test_dumped_and_loaded_again(complete: str, written: Written) -> None:
    recipe = load_recipe(written(complete)).recipe
    assert load_recipe(written(dump_recipe(recipe))).recipe == recipe


_names = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9_.-]{0,12}\Z")
# No line ends: PyYAML folds some of them, and no path or name has any.
_characters = st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Zl", "Zp"))
_texts = st.text(_characters, min_size=1, max_size=20)
_sources = st.one_of(
    st.builds(Source, path=_texts),
    st.builds(Source, hub=_texts, revision=st.none() | _texts, config=st.none() | _texts),
)
_tasks = st.lists(
    st.builds(
        TaskSettings,
        name=_names,
        template=_texts,
        source=st.none() | _sources,
        tags=st.lists(_names, max_size=2),
        loss_weight=st.floats(min_value=1e-300, max_value=1e300),
    ),
    min_size=1,
    max_size=3,
    unique_by=lambda task: task.name,
)
_recipes = st.builds(
    Recipe,
    base_model=_texts,
    tasks=_tasks,
    mixing=st.sampled_from(["uniform", TemperatureMixing(temperature=1e-9)]),
    run=st.builds(RunSettings, name=st.none() | _names, directory=_texts),
)


def _with_run(name: str) -> Recipe:
    return Recipe(tasks=[TaskSettings(name="a", template="t")], run=RunSettings(name=name))


@given(_recipes)
@example(_with_run("7e10"))  # a word in YAML 1.1, by whose rules it must not be written
@example(_with_run("08"))
@example(_with_run("yes"))
@example(_with_run("2024-01-02"))
def test_any_recipe_survives_being_written_down(recipe: Recipe) -> None:
    text = dump_recipe(recipe)
    assert validate_document(parse_document(text, "dumped"), Recipe) == recipe, text


def test_a_recipe_is_found_by_path_or_bundled_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bundled = find_recipe("real-small")
    assert bundled.is_file()
    assert find_recipe("real-small.yaml") == bundled
    assert find_recipe("recipes/real-small.yaml") == bundled
    (tmp_path / "real-small.yaml").write_text("mine", encoding="utf-8")
    assert find_recipe("real-small.yaml") == Path("real-small.yaml")
    for name in ("real-smal", "elsewhere/real-small.yaml"):
        with pytest.raises(UsageError, match="no such recipe file"):
            find_recipe(name)


def test_relative_paths_start_at_the_recipe(complete: str, written: Written) -> None:
    path = written(complete)
    assert load_recipe(path).base == path.parent.resolve()


def test_a_fault_found_later_names_the_line(complete: str, written: Written) -> None:
    path = written(complete)
    loaded = load_recipe(path, ["tasks.first.template=x"])
    assert loaded.problem(("tasks", 1, "template"), "bad").lines == [
        f"{path}:{_line(complete, 'glue/sst2')}: tasks.1.template: bad"
    ]
    assert loaded.problem(("tasks", 0, "template"), "bad").lines == [
        "command line: tasks.0.template: bad"
    ]


def test_changes_between_two_recipes() -> None:
    before = {"a": {"b": 1, "c": 2}, "d": [1], "e": 0}
    after = {"a": {"b": 1, "c": 3}, "d": [1, 2], "f": 0}
    assert describe_changes(before, after) == [
        "a.c: 2 → 3",
        "d: [1] → [1, 2]",
        "e: 0 → None",
        "f: None → 0",
    ]
