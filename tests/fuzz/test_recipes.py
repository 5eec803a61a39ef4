"""Recipes: random valid ones mean the same when they are read again; damage is named by its key."""

from __future__ import annotations

import copy
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_lora_cli.errors import ProblemsError, UsageError
from mtl_lora_cli.recipe.load import dump_recipe, load_recipe
from mtl_lora_cli.recipe.schema import Recipe

Fuzz = settings.get_profile("fuzz")

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,20}", fullmatch=True)
WORDS = st.text("abcdefghijklmnopqrstuvwxyz_/ äß", min_size=1, max_size=12)
COUNTS = st.integers(1, 10**6)
AMOUNTS = st.floats(1e-9, 1e6, allow_nan=False)
RATES = st.floats(0, 1e3, allow_nan=False)


def some(required: dict[str, Any], **optional: Any) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(required, optional=optional)


def adapters() -> st.SearchStrategy[dict[str, Any]]:
    common = {
        "rank": st.sampled_from([2, 4, 8, 16]).map(lambda half: 2 * half),
        "alpha": AMOUNTS,
        "scaling": st.sampled_from(["rank", "sqrt_rank"]),
        "dropout": st.floats(0, 0.99),
        "down_start": st.sampled_from(["kaiming", "normal"]),
        "target_modules": st.lists(NAMES, min_size=1, max_size=4, unique=True),
    }
    read_by = {
        "lora": {},
        "mtl-lora": {
            "up_projections": st.integers(1, 8),
            "temperature": AMOUNTS,
            "transform": st.sampled_from(["full", "diagonal"]),
            "transform_start": RATES,
            "gate": st.sampled_from(["weights", "embedding"]),
            "gate_start": AMOUNTS,
            "embedding_size": st.integers(1, 99),
            "tied": st.booleans(),
        },
        "mtl-lora-fine": {
            "up_rank": st.just(1),
            "gate_spread": AMOUNTS,
            "transform_start": RATES,
            "embedding_size": st.integers(1, 99),
            "tied": st.booleans(),
        },
        "mtlora": {
            "task_rank": st.integers(1, 8),
            "task_modules": st.lists(NAMES, min_size=1, max_size=2, unique=True),
        },
        "moelora": {"up_projections": st.sampled_from([1, 2, 4]), "temperature": AMOUNTS},
        "multilora": {"up_projections": st.integers(1, 8)},
        "hydralora": {"up_projections": st.integers(1, 8), "temperature": AMOUNTS},
    }
    return (
        st.one_of(
            some({"method": st.just(method)}, **common, **own)
            for method, own in read_by.items()
            if method != "moelora"
        )
        | some(
            {"method": st.just("moelora"), "up_projections": st.sampled_from([1, 2, 4])},
            **common,
            temperature=AMOUNTS,
            gate_form=st.sampled_from(["softmax", "mean_one"]),
            tied=st.booleans(),
        )
        | some(
            {"method": st.just("mtl-lora"), "transform": st.just("bases")},
            **common,
            transform_bases=st.integers(1, 8),
        )
    )


def tasks() -> st.SearchStrategy[list[dict[str, Any]]]:
    source = st.one_of(
        WORDS.map(str.strip).filter(bool).map(lambda path: f"data/{path}"),
        some(
            {"path": WORDS},
            splits=st.just({"train": "a.jsonl"}),
            delimiter=st.sampled_from([";", "\t", "tab", "|"]),
            quoting=st.sampled_from(["csv", "none"]),
            columns=st.lists(WORDS, min_size=1, max_size=3, unique=True)
            | st.dictionaries(WORDS, WORDS, max_size=2),
            broken_rows=st.sampled_from(["error", "drop"]),
        ),
        some({"hub": st.just("owner/name")}, config=NAMES, revision=NAMES),
        some({"sample": st.just("animals")}),
        some(
            {"path": WORDS, "task_column": NAMES},
            task_names=st.dictionaries(COUNTS, NAMES, min_size=1),
        ),
    )
    one = some(
        {"name": NAMES, "template": WORDS},
        source=source,
        tags=st.lists(NAMES, max_size=3),
        sampling_weight=st.floats(0.1, 10),
        loss_weight=AMOUNTS,
        max_examples=COUNTS,
        repeat=AMOUNTS,
    )
    return st.lists(one, min_size=1, max_size=4, unique_by=lambda task: task["name"])


def trainings() -> st.SearchStrategy[dict[str, Any]]:
    return some(
        {},
        epochs=AMOUNTS.filter(lambda epochs: epochs <= 100_000),  # more need max_steps
        max_steps=COUNTS | st.none(),
        learning_rate=AMOUNTS,
        weight_decay=RATES,
        parts=some({}, up=some({}, learning_rate=RATES), gate=some({}, weight_decay=RATES)),
        schedule=st.sampled_from(["cosine", "linear", "constant"]),
        warmup=st.floats(0, 0.99),
        max_gradient_norm=AMOUNTS,
        row_length=st.integers(8, 10**5),
        rows_per_step=COUNTS,
        rows_per_pass=COUNTS,
        on_overflow=st.sampled_from(["error", "drop", "truncate_prompt"]),
        loss_on=st.sampled_from(["answer", "all"]),
        gradient_checkpointing=st.booleans()
        | some({}, attended=st.booleans(), qkv=st.integers(0, 99)),
        checkpoint_every=COUNTS | st.none(),
        keep_checkpoints=COUNTS,
        diagnose=st.booleans() | some({}, every=COUNTS),
        validation=st.booleans() | some({}, every=COUNTS, examples=COUNTS),
        seed=st.integers(0, 2**32 - 1),
    )


RECIPES = some(
    {"tasks": tasks(), "prompt_format": st.just("chat")},
    base_model=WORDS,
    dtype=st.sampled_from(["auto", "float32", "bfloat16"]),
    quantization=st.sampled_from(["none", "nf4", "fp4", "int8"]),
    engine=st.sampled_from(["auto", "fused", "plain"]),
    chat=some(
        {},
        template_kwargs=st.dictionaries(st.sampled_from(["enable_thinking", "x"]), st.booleans()),
        answers=st.sampled_from(["conversation", "generation_prompt"]),
        date=st.sampled_from(["2026-11-30", "2026-11-30T12:00:00"]),
    ),
    adapter=adapters(),
    mixing=st.sampled_from(["proportional", "uniform", "weights"]) | some({"temperature": AMOUNTS}),
    training=trainings(),
    distributed=some({"zero_stage": st.sampled_from([1, 2])}, offload=st.just("optimizer")),
    run=some({}, name=NAMES, directory=WORDS, trackers=st.just(["tensorboard"]), project=NAMES),
)


def read(text: str | bytes) -> Recipe:
    """A recipe from text that lies in a file, as a user's does."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_recipe(path).recipe


@settings(Fuzz)
@given(RECIPES)
def test_a_valid_recipe_means_the_same_when_it_is_read_again(content: dict[str, Any]) -> None:
    recipe = read(yaml.safe_dump(content, allow_unicode=True))
    assert [task.name for task in recipe.tasks] == [task["name"] for task in content["tasks"]]
    for key in ("base_model", "dtype", "quantization", "engine"):
        if key in content:
            assert getattr(recipe, key) == content[key]
    again = read(dump_recipe(recipe))
    assert again == recipe
    assert dump_recipe(again) == dump_recipe(recipe)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key of a recipe, by its path."""
    if isinstance(value, dict):
        below = [(key, one) for key, one in value.items()]
    else:
        below = list(enumerate(value)) if isinstance(value, list) else []
    found = [(*path, key) for key, _ in below if isinstance(key, str)]
    return found + [place for key, one in below for place in places(one, (*path, key))]


BAD = st.sampled_from([{"what?": 1}, [{"a": [1]}], -(10**9), 1e300, "\x85?", {"every": "x"}])


@settings(Fuzz)
@given(RECIPES, st.data())
def test_damage_is_named_by_its_key(content: dict[str, Any], data: st.DataObject) -> None:
    """A key that is misspelt, missing, or holds what it cannot hold."""
    place = data.draw(st.sampled_from(places(content)))
    damaged = copy.deepcopy(content)
    here: Any = damaged
    for part in place[:-1]:
        here = here[part]
    kind = data.draw(st.sampled_from(["misspelt", "replaced"]))
    if kind == "misspelt":
        here[f"{place[-1]}_x"] = here.pop(place[-1])
    else:
        here[place[-1]] = data.draw(BAD)
    try:
        recipe = read(yaml.safe_dump(damaged, allow_unicode=True))
    except ProblemsError as error:
        told = "\n".join(error.lines)
        named = [str(part) for part in place if isinstance(part, str)]
        assert any(name in told for name in named), (place, told)
        assert all("recipe.yaml" in line for line in error.lines)
        return
    assert read(dump_recipe(recipe)) == recipe  # what was put there can stand there


@settings(Fuzz)
@given(RECIPES, st.data())
def test_a_text_with_other_bytes_is_read_or_refused(
    content: dict[str, Any], data: st.DataObject
) -> None:
    text = bytearray(yaml.safe_dump(content, allow_unicode=True).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(text) - 1))
        text[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        read(bytes(text))
    except UsageError as error:
        assert all(line.strip() for line in error.lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
            f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 10)}]\n" for n in range(9)
        ), "holds more than 200,000 keys and values"),
        ("a: &a [*a]\n", "nested too deeply, or within itself"),
        ("[" * 50_000, "nested too deeply"),
        ("a: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
    ],
    ids=["a billion values", "itself", "deep", "code"],
)  # fmt: skip
def test_hostile_yaml(text: str, message: str) -> None:
    with pytest.raises(ProblemsError, match=rf"recipe\.yaml.*{re.escape(message)}"):
        read(text)
