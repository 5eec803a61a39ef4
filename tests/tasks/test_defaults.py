"""A first recipe's settings follow from the model and the mixture."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mtl_lora_cli.tasks.defaults import FEW, Halves, Mixture, choose, parameters_of

SMOLL, LARGE = 135_000_000, 8 * 10**9
CPUS: tuple[Halves | None, ...] = (None, "vectors", "tiles")


@pytest.mark.parametrize("tokens", [5_000, 100_000, 700_000, 2_000_000])
@pytest.mark.parametrize(("size", "steps"), [(SMOLL, 2_000), (LARGE, 1_000)])
def test_a_small_mixture_gets_many_steps(size: int, steps: int, tokens: int) -> None:
    choice = choose(size, Mixture(tokens, longest=300))
    step = choice.row_length * choice.rows_per_step
    if choice.max_steps is None:
        assert choice.epochs * tokens >= steps * step
    else:
        assert choice.max_steps == steps
        assert choice.epochs * tokens >= 2 * steps * step  # rows are never full: steps end the run
    assert choice.row_length >= 300


def test_a_large_mixture_gets_large_steps() -> None:
    small, large = (choose(SMOLL, Mixture(tokens, 100)) for tokens in (500_000, 50_000_000))
    assert small.row_length * small.rows_per_step < large.row_length * large.rows_per_step == 8_192
    assert large.max_steps is None
    assert small.rate == 1e-3  # measured at 2,048 tokens
    assert large.rate == pytest.approx(1.41e-3, abs=1e-5)
    assert small.up_rate == 4e-3
    assert small.clipping and not choose(LARGE, Mixture(500_000, 100)).clipping


def test_the_model_decides_the_rates_and_not_the_card() -> None:
    mixture = Mixture(50_000_000, 1_000)
    rates = [choose(size, mixture).rate for size in (SMOLL, 2 * 10**9, 8 * 10**9, None)]
    assert rates == [pytest.approx(1.41e-3, abs=1e-5), 4e-4, 2e-4, 2e-4]


@pytest.mark.parametrize(
    ("tokens", "longest"), [(20_000, 60), (30_000, 300), (30_000, 1_500), (1_000_000, 400)]
)
@pytest.mark.parametrize(
    ("halves", "core"), [(None, 120e9), ("vectors", 460e9), ("tiles", 1_200e9)]
)
def test_on_a_cpu_a_run_takes_an_hour_at_most(
    tokens: int, longest: int, halves: Halves | None, core: float
) -> None:
    mixture = Mixture(tokens, longest)
    for cores in (1, 2, 8):
        choice = choose(SMOLL, mixture, cores=cores, halves=halves, flops=cores * core)
        step = choice.row_length * choice.rows_per_step
        steps = choice.max_steps or choice.epochs * tokens / step
        assert steps >= FEW
        assert choice.row_length >= longest
        assert choice.dtype == ("bfloat16" if halves else None)
        if steps > FEW:
            assert choice.hours is not None
            assert choice.hours <= 1


@pytest.mark.parametrize("halves", CPUS)
def test_on_a_cpu_so_does_one_of_rows_that_are_not_at_hand(halves: Halves | None) -> None:
    choice = choose(SMOLL, None, cores=2, halves=halves, flops=4e11)
    assert (choice.max_steps is not None and "hour" in choice.why) or "fewest" in choice.why
    assert choice.hours is not None


def test_two_cores_with_instructions_for_bfloat16_do_what_a_small_card_does() -> None:
    mixture = Mixture(1_200_000, 400)
    plain, half = (choose(SMOLL, mixture, cores=2, halves=each) for each in CPUS[:2])
    assert (half.row_length, half.rows_per_step) == (1_024, 1)
    assert 2_000 <= (half.max_steps or 0) < 3_200
    assert plain.row_length * plain.rows_per_step * (plain.max_steps or 0) < 600_000
    assert half.rate == pytest.approx(7.07e-4, rel=1e-3)
    assert plain.rate == 5e-4


@pytest.mark.parametrize(
    ("halves", "cores", "step", "flops", "seconds"),
    [
        (None, 2, 128, 108e9, 0.82),
        (None, 8, 512, 108e9, 2.73),
        ("vectors", 2, 1_024, 460e9, 1.9),
        ("vectors", 4, 2_048, 460e9, 3.5),
        ("tiles", 2, 512, 2_400e9, 1.2),
        ("tiles", 4, 1_024, 2_400e9, 2.05),
    ],
)
def test_what_is_told_is_what_a_cpu_was_seen_to_take(
    halves: Halves | None, cores: int, step: int, flops: float, seconds: float
) -> None:
    """A full step of smollm2-135m: processor time of one thread of an AMD EPYC whose products reach these rates, and of
    two threads of an Intel Xeon with tiles."""
    mixture = Mixture(step * 2_000 // 6 + 1, 100)
    choice = choose(SMOLL, mixture, cores=cores, halves=halves, flops=flops)
    assert choice.row_length * choice.rows_per_step == step
    steps = choice.max_steps or choice.epochs * mixture.tokens / step
    assert 3600 * (choice.hours or 0) / steps == pytest.approx(seconds, rel=0.25)


def test_on_a_cpu_nothing_that_is_written_depends_on_the_moment() -> None:
    mixture = Mixture(1_000_000, 400)
    busy, idle = (choose(SMOLL, mixture, cores=2, flops=flops) for flops in (1e10, 3e11))
    assert replace(busy, hours=None) == replace(idle, hours=None)
    assert (busy.hours or 0) > 10 * (idle.hours or 0)
    assert (busy.max_steps or 0) % 50 == 0
    assert busy.looked_at is None
    assert choose(SMOLL, mixture, cores=2, held_out=True).looked_at == 40


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smollm2-135m", SMOLL),
        ("meta-llama/Llama-2-7b-hf", 7 * 10**9),
        ("Qwen/Qwen2.5-0.5B-Instruct", 5 * 10**8),
        ("org/model3b", None),
        ("org/model", None),
        ("llama3.2", None),
    ],
)
def test_a_name_may_say_how_large_a_model_is(name: str, expected: int | None) -> None:
    assert parameters_of(name) == expected


def test_a_folder_says_it_in_its_configuration(stories_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    exact = sum(t.numel() for t in load_file(stories_folder / "model.safetensors").values())
    assert parameters_of(str(stories_folder)) == pytest.approx(exact, rel=0.3)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": None}))
    assert parameters_of(str(tmp_path)) is None
