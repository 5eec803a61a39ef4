"""Which runs a comparison makes."""

from __future__ import annotations

from typing import Any

import pytest

from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.compare.grid import (
    RATE,
    Point,
    Variant,
    budget_lines,
    parse_baseline,
    parse_match,
    parse_methods,
    parse_score,
    parse_seeds,
    parse_sweeps,
    parse_variants,
    points_of,
    require_known,
    run_name,
    with_settings,
)
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.recipe.schema import Recipe, TaskSettings


@pytest.fixture
def recipe() -> Recipe:
    return Recipe(
        tasks=[TaskSettings(name="sst2", template="sst2")],
        adapter=configure(up_projections=2, dropout=0.1),
    )


def test_a_number_of_seeds_begins_at_the_recipe_s() -> None:
    assert parse_seeds("3", first=5) == [5, 6, 7]


def test_a_list_of_seeds_is_taken_as_it_stands() -> None:
    assert parse_seeds("7,0") == [7, 0]


@pytest.mark.parametrize("text", ["1,1", "0", "x", "", "-1"])
def test_bad_seeds_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--seeds"):
        parse_seeds(text)


@pytest.mark.parametrize(
    ("text", "expected"), [("params", "params"), ("none", None), ("params:40_000", 40000)]
)
def test_what_is_matched(text: str, expected: int | str | None) -> None:
    assert parse_match(text) == expected


def test_what_is_scored_is_test_or_validation() -> None:
    assert [parse_score(text) for text in ("test", "validation")] == ["test", "validation"]
    with pytest.raises(UsageError, match="expected test or validation, received 'train'"):
        parse_score("train")


@pytest.mark.parametrize("text", ["rank", "params:", "params:0", "params:x"])
def test_what_cannot_be_matched_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected params, params:N or none"):
        parse_match(text)


def test_an_unknown_method_is_refused_with_a_near_one() -> None:
    with pytest.raises(UsageError, match="unknown method 'mtl-lara'; did you mean 'mtl-lora'"):
        parse_methods("lora,mtl-lara")


def test_the_baseline_is_lora_where_it_is_there() -> None:
    assert parse_baseline(None, ["mtl-lora", "lora"]) == "lora"
    assert parse_baseline(None, ["mtl-lora", "mtlora"]) == "mtl-lora"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("adapter.temperature", "expected key=v1,v2"),
        ("adapter.temperature=1,1", "'1' stands twice"),
        ("run.name=a", "cannot be swept"),
        ("training.seed=1,2", "what --seeds says"),
        ("adapter.method=lora", "what --methods says"),
    ],
)
def test_bad_sweeps_are_refused(text: str, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        parse_sweeps([text])


def test_an_unknown_swept_key_is_refused_with_a_near_one(recipe: Recipe) -> None:
    with pytest.raises(UsageError, match="did you mean 'temperature'"):
        require_known({"adapter.temprature": [1.0]}, recipe)


def test_a_swept_value_that_no_recipe_may_have_is_refused(recipe: Recipe) -> None:
    with pytest.raises(UsageError, match=r"adapter\.temperature: .*greater than 0"):
        require_known({"adapter.temperature": [0.5, -1.0]}, recipe)


def test_sweeps_are_crossed() -> None:
    sweeps = {"adapter.temperature": [0.1, 1.0], RATE: [1e-3, 2e-3]}
    settings = [dict(point.settings) for point in points_of("mtl-lora", sweeps, rate=1e-3)]
    assert settings == [
        {"adapter.temperature": 0.1, RATE: 1e-3},
        {"adapter.temperature": 0.1, RATE: 2e-3},
        {"adapter.temperature": 1.0, RATE: 1e-3},
        {"adapter.temperature": 1.0, RATE: 2e-3},
    ]


def test_a_method_that_does_not_read_a_key_is_tried_with_other_learning_rates() -> None:
    points = points_of("lora", {"adapter.temperature": [0.1, 0.5, 1.0]}, rate=4e-3)
    assert [point.settings for point in points] == [{RATE: 4e-3}, {RATE: 2e-3}, {RATE: 8e-3}]
    assert all(point.filled for point in points)


def test_filled_learning_rates_are_no_swept_ones() -> None:
    sweeps = {"adapter.temperature": [0.1, 1.0], RATE: [1e-3, 2e-3]}
    rates = [point.settings[RATE] for point in points_of("lora", sweeps, rate=1e-3)]
    assert rates == [1e-3, 2e-3, 0.5e-3, 4e-3]  # 2e-3 / 2 and 1e-3 · 2 are there already


@pytest.mark.parametrize("method", ["lora", "mtl-lora", "mtlora", "moelora", "hydralora"])
def test_every_method_gets_the_same_number_of_settings(method: str) -> None:
    sweeps = {"adapter.temperature": [0.1, 1.0], "adapter.up_projections": [2, 3, 4]}
    points = points_of(method, sweeps, rate=1e-3)
    assert len({point.label for point in points}) == 6


def test_a_variant_is_a_method_with_settings_of_its_own() -> None:
    text = "wide=mtl-lora,adapter.gate=embedding,adapter.target_modules=[q_proj, v_proj]"
    variants = parse_variants([text])
    assert variants == {
        "wide": Variant(
            "mtl-lora",
            {"adapter.gate": "embedding", "adapter.target_modules": ["q_proj", "v_proj"]},
        )
    }
    assert parse_methods("lora,wide", variants) == ["lora", "wide"]
    assert "mtl-lora with adapter.gate=embedding" in variants["wide"].text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("wide", "expected NAME=METHOD,key=value"),
        ("wide=mtl-lora,embedding", "unknown method 'mtl-lora,embedding'"),
        ("lora=mtl-lora", "'lora' is a name already"),
        ("wide=mtl-lara", "unknown method 'mtl-lara'; did you mean 'mtl-lora'"),
        ("wide=lora,adapter.gate=embedding", "lora does not read 'adapter.gate'"),
        ("wide=lora,adapter.rank=4", "what --match picks"),
        ("wide=lora,training.seed=4", "what --seeds says"),
        ("../wide=lora", "expected NAME=METHOD"),
    ],
)
def test_bad_variants_are_refused(text: str, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        parse_variants([text])


def test_a_variant_that_is_not_compared_is_refused() -> None:
    with pytest.raises(UsageError, match="'wide' is not among --methods"):
        parse_methods("lora", parse_variants(["wide=mtl-lora"]))


def test_what_a_variant_says_is_not_swept_for_it() -> None:
    sweeps = {"adapter.temperature": [0.1, 1.0], RATE: [1e-3, 2e-3]}
    variant = Variant("mtl-lora", {RATE: 4e-3})
    points = points_of(variant, sweeps, rate=1e-3)
    assert [dict(point.settings) for point in points] == [
        {"adapter.temperature": 0.1},
        {"adapter.temperature": 1.0},
        {"adapter.temperature": 0.1, RATE: 2e-3},
        {"adapter.temperature": 1.0, RATE: 2e-3},
    ]


def test_the_budget_is_said() -> None:
    points = {
        name: points_of(name, {"adapter.temperature": [0.1, 1.0]}, 1e-3)
        for name in ("lora", "mtl-lora")
    }
    first, second = budget_lines(points, seeds=3)
    assert first == "tuning: 2 settings for each method, on 3 seeds: 6 runs each"
    assert second.startswith("lora does not read every swept key: 2 of its 2 settings")


def test_runs_are_named_by_method_setting_and_seed() -> None:
    assert run_name("lora", Point(), 3) == "lora-seed3"
    (point, _) = points_of("mtl-lora", {"adapter.temperature": [0.1, 1.0]}, 1e-3)
    assert run_name("mtl-lora", point, 0) == "mtl-lora-temperature-0.1-seed0"


def test_another_method_takes_the_common_keys_and_its_own_defaults(recipe: Recipe) -> None:
    other = with_settings(recipe, "hydralora", {}).adapter
    assert (other.method, other.dropout, other.up_projections) == ("hydralora", 0.1, 3)


def test_the_recipe_s_own_method_keeps_its_keys(recipe: Recipe) -> None:
    assert with_settings(recipe, "mtl-lora", {}).adapter == recipe.adapter


def test_a_nested_key_is_set_beside_its_neighbours(recipe: Recipe) -> None:
    other = with_settings(recipe, "lora", {"training.parts.up.learning_rate": 0.1})
    assert other.training.parts.up.learning_rate == 0.1
    assert other.training.parts.down.learning_rate is None


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("training.balance=uncertainty", lambda recipe: recipe.training.balance.method),
        ("training.balance={method: gradnorm, every: 5}", lambda r: r.training.balance.every),
        ("mixing.dynamic=progress", lambda recipe: recipe.mixing.dynamic),
        ("mixing={dynamic: excess_loss, every: 20}", lambda recipe: recipe.mixing.every),
        ("training.rows=one_task", lambda recipe: recipe.training.rows),
        ("training.stages=[{tasks: [a]}]", lambda recipe: recipe.training.stages[0].tasks),
    ],
)
def test_what_follows_the_tasks_is_a_setting_like_any_other(text: str, read: Any) -> None:
    """Beside `proportional` in a sweep, or under a name of its own."""
    recipe = Recipe.model_validate({"tasks": [{"name": "a", "template": "samples/animals"}]})
    (variant,) = parse_variants([f"other=mtl-lora,{text}"]).values()
    found = read(with_settings(recipe, variant.method, variant.settings))
    assert str(found).strip("[]'") in text
    assert with_settings(recipe, "mtl-lora", {}).mixing == "proportional"


def test_another_method_takes_no_rate_of_a_part_that_only_some_methods_have(recipe: Recipe) -> None:
    rates = {part: {"learning_rate": 0.1} for part in ("up", "whole", "transform", "gate")}
    own = Recipe.model_validate({**recipe.model_dump(), "training": {"parts": rates}})
    found = with_settings(own, "lora", {}).training.parts
    assert (found.up.learning_rate, found.whole.learning_rate) == (0.1, 0.1)
    assert found.transform.learning_rate is found.gate.learning_rate is None
    assert with_settings(own, "mtl-lora", {}).training.parts == own.training.parts
