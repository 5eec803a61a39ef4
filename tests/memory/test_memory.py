"""`training.memory: auto`: what a step is estimated to take, and what is picked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

from mtl_lora_cli.adapters.inject import inject
from mtl_lora_cli.adapters.methods import configure
from mtl_lora_cli.bench.random_model import empty_model, random_model
from mtl_lora_cli.bench.shapes import find_config
from mtl_lora_cli.bench.yardstick import Yardstick
from mtl_lora_cli.cli.plan import tasks_table
from mtl_lora_cli.engine.families import plan_of
from mtl_lora_cli.engine.memory import (
    CONTEXT,
    GIB,
    fixed_bytes,
    keep_of,
    kept_bytes,
    needed_bytes,
    peak_bytes,
    peak_parts,
    recompute_of,
    sizes_of,
    weight_bytes,
)
from mtl_lora_cli.engine.saved import Keep
from mtl_lora_cli.engine.sizes import GroupSizes, LayerSizes, Load, ModelSizes
from mtl_lora_cli.errors import MtlLoraError, UsageError
from mtl_lora_cli.machine.processes import Place, Processes
from mtl_lora_cli.memory import choice as picking
from mtl_lora_cli.memory.choice import Choice, choose
from mtl_lora_cli.memory.explain import explained
from mtl_lora_cli.memory.remedies import alternatives
from mtl_lora_cli.models import registered
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.recipe.load import dump_recipe, load_recipe
from mtl_lora_cli.recipe.training import Diagnose, Recompute
from mtl_lora_cli.training.passes import EagerPasses
from mtl_lora_cli.training.prepare import prepare
from mtl_lora_cli.training.prepared import Prepared
from mtl_lora_cli.training.run import resume, start

from ..often import often

# d = 8, H = 2, G = 1, D = 4, F = 16; an adapter of r = 2 and n = 3 on q.
SMALL_LAYER = LayerSizes(
    plan_of(
        LlamaConfig(
            hidden_size=8, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1
        )
    ).layers[0],
    qkv=GroupSizes(8, 16, rows=2, columns=6),
    o=GroupSizes(8, 8),
    gate_up=GroupSizes(8, 32),
    down=GroupSizes(16, 8),
)
SMALL = ModelSizes(
    layers=(SMALL_LAYER, SMALL_LAYER),
    vocabulary=100,
    other_weights=1000,
    trained=100,
    value=2,
)
# LLaMA-3-8B, r = 8 and n = 3 on q, k, v and o.
EIGHT_B = ModelSizes(
    layers=(
        LayerSizes(
            plan_of(find_config("llama3-8b")).layers[0],
            qkv=GroupSizes(4096, 6144, rows=24, columns=72),
            o=GroupSizes(4096, 4096, rows=8, columns=24),
            gate_up=GroupSizes(4096, 28672),
            down=GroupSizes(14336, 4096),
        ),
    )
    * 32,
    vocabulary=128_256,
    other_weights=2 * 128_256 * 4096 + 65 * 4096,
    trained=12_127_232,
    value=2,
)
EIGHT_B_NF4 = replace(EIGHT_B, four_bit=True)
EVERYTHING = Recompute(attended=True, qkv=32, gate_up=32)


def pick(sizes: ModelSizes, gib: float, **changes: Any) -> Choice | int:
    asked: dict[str, Any] = {
        "row_length": 2048,
        "rows_per_step": 8,
        "supervised": lambda length: length * 7 // 100,
        "longest": 469,
    }
    return choose(sizes, int(gib * GIB), **asked | changes)


def picked(sizes: ModelSizes, gib: float, **changes: Any) -> Choice:
    found = pick(sizes, gib, **changes)
    assert isinstance(found, Choice), f"{found / GIB:.1f} GiB are needed"
    return found


def test_weights_by_hand() -> None:
    layers = 2 * (8 * 16 + 8 * 8 + 8 * 32 + 16 * 8)
    assert weight_bytes(SMALL) == 2 * layers + 2 * 1000
    assert weight_bytes(replace(SMALL, four_bit=True)) == 595 + 2000  # 1152 · 4.127 / 8 = 594.3
    assert weight_bytes(replace(SMALL, eight_bit=True)) == layers + 2000


def test_weights_in_parts_by_hand() -> None:
    """One part, the head, and four layers that are there whole."""
    layer = 4096 * (6144 + 4096 + 28672) + 14336 * 4096
    head = 128_256 * 4096
    whole = 32 * layer + 2 * head + 65 * 4096
    assert weight_bytes(replace(EIGHT_B, parts=2)) == 2 * (whole // 2 + 4 * layer + head)
    assert weight_bytes(replace(EIGHT_B, parts=8)) == 2 * (whole // 8 + 4 * layer + head)
    # Two layers are not worth cutting: nothing takes more than all of it.
    assert weight_bytes(replace(SMALL, parts=2)) == weight_bytes(SMALL)


def test_what_is_gathered_is_laid_into_the_buffer() -> None:
    assert not SMALL.expanded
    for changes in ({"four_bit": True}, {"eight_bit": True}, {"parts": 2}):
        sizes = replace(SMALL, **changes)
        assert sizes.expanded
        assert fixed_bytes(sizes) == weight_bytes(sizes) + 1600 + 2 * 8 * 32


def test_fixed_by_hand() -> None:
    assert fixed_bytes(SMALL) == 4304 + 16 * 100
    assert fixed_bytes(replace(SMALL, fp8=True)) == 4304 - 2 * 1152 + 1600 + 2 * 1152
    both = replace(SMALL, fp8=True, four_bit=True)  # what is quantised stays
    assert fixed_bytes(both) == fixed_bytes(replace(SMALL, four_bit=True)) + 2 * 1152
    assert fixed_bytes(replace(SMALL, four_bit=True)) == 2595 + 1600 + 2 * 8 * 32


def test_before_the_first_step_weights_are_there_in_both_forms() -> None:
    sizes, recompute = replace(EIGHT_B, fp8=True), recompute_of(False, 32)
    inside = 32 * (4096 * (6144 + 4096 + 28672) + 14336 * 4096)
    long = peak_parts(sizes, recompute, Load(8192, 768))
    assert long["weights"] == weight_bytes(sizes) == weight_bytes(EIGHT_B) - 2 * inside
    short = peak_parts(sizes, recompute, Load(512, 64))
    assert short["weights"] == weight_bytes(EIGHT_B) and short["activations"] == 0
    assert short["buffers"] >= 2 * inside


def test_margins_by_hand() -> None:
    """8 rows and 24 columns are aligned: q has 16 + 8 rows of 8 + 24 values, 64 with their pitch."""
    layer = replace(SMALL_LAYER, qkv=GroupSizes(8, 16, rows=8, columns=24))
    roomy = replace(SMALL, layers=(layer, layer))
    assert fixed_bytes(roomy) == 4304 + 1600 + 2 * 2 * (24 * 64 - 16 * 8)
    assert fixed_bytes(replace(roomy, kernels=False)) == 4304 + 1600
    assert fixed_bytes(replace(roomy, four_bit=True)) == 2595 + 1600 + 2 * 24 * 64


@pytest.mark.parametrize(
    ("keep", "attention", "mlp"),
    [
        # total 8, qkv 16, attended 8, z 2 in 16 bit; 1/rms, and log-sum-exp of 2 heads
        (Keep(), 2 * (8 + 16 + 8 + 2) + 4 + 8, 2 * (8 + 32) + 4),
        (Keep(attended=False), 2 * (8 + 16 + 2) + 4 + 8, 2 * (8 + 32) + 4),
        (Keep(qkv=False), 2 * (8 + 2) + 4, 2 * (8 + 32) + 4),
        (Keep(gate_up=False), 2 * (8 + 16 + 8 + 2) + 4 + 8, 2 * 8 + 4),
    ],
    ids=str,
)
def test_kept_by_hand(keep: Keep, attention: int, mlp: int) -> None:
    load = Load(positions=10, asked=3)
    factors = 2 * (2 * 8 + 16 * 6)  # 2 rows and 6 columns are not aligned: no margins
    found = [kept_bytes(SMALL, SMALL_LAYER, keep, load, last=last) for last in (False, True)]
    assert found == [
        10 * (attention + mlp) + factors,
        10 * attention + 3 * mlp + factors,
    ]


def test_the_measured_peak_of_eight_billion() -> None:
    """One row of 8,192: 40.2 GiB were allocated on an H100, when 31 outputs of norms were kept, too."""
    assert weight_bytes(EIGHT_B) == pytest.approx(16.06e9, rel=0.001)
    peak = peak_bytes(EIGHT_B, Recompute(), Load(8192, 560))
    norms = 31 * 8192 * 4096 * 2
    assert (peak + norms) / GIB == pytest.approx(40.2, rel=0.02)


def test_sizes_are_read_from_the_model() -> None:
    with torch.device("meta"):
        model = empty_model(find_config("llama3-8b"), dtype=torch.bfloat16)
        adapter = inject(model, configure(), [str(task) for task in range(8)])
    assert sizes_of(model, adapter, value=2, on_card=True) == EIGHT_B
    four_bit = sizes_of(model, adapter, value=2, on_card=True, quantization="nf4")
    assert four_bit == EIGHT_B_NF4


@pytest.mark.parametrize(
    "recompute",
    [False, Recompute(attended=True), Recompute(qkv=2, gate_up=3), True],
    ids=str,
)
def test_the_estimate_is_what_torch_allocates(recompute: bool | Recompute) -> None:
    """The peak of one pass over the memory before it, on the CPU."""
    config = find_config("tiny")
    config.num_hidden_layers, config.intermediate_size = 4, 192
    registered.register()
    cpu = torch.device("cpu")
    model = random_model(
        config, dtype=torch.float32, device=cpu, quantization="none", attention=registered.NAME
    )
    adapter = inject(model, configure(target_modules=("*_proj",)), ("one", "two"))
    packed = PackedModel(model, adapter, keep=keep_of(recompute, 4)).train()
    steps = Yardstick.build(256, 2, seed=0).steps(
        1, row_length=2048, rows_per_step=1, rows_per_pass=1, seed=0
    )
    batch = steps[0].batches[0]
    passes = EagerPasses(packed, packed, cpu)
    ready = passes.prepare(batch, torch.ones(len(batch.owner)))
    passes.run(ready)  # gradients have their memory from now on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        passes.run(ready)
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    taken = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        taken += event.nbytes()
        peak = max(peak, taken)
    sizes = sizes_of(model, adapter, value=4, on_card=False)
    load = Load(batch.input_ids.numel(), len(batch.positions))
    estimate = peak_bytes(sizes, recompute_of(recompute, 4), load) - fixed_bytes(sizes)
    assert estimate == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(("gib", "row_length"), [(24, 2048), (16, 1024)])
def test_eight_billion_in_four_bit_fit_small_cards(gib: int, row_length: int) -> None:
    choice = picked(EIGHT_B_NF4, gib, row_length=row_length)
    assert choice.row_length == row_length
    assert (choice.recompute.qkv, choice.recompute.gate_up) == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [EIGHT_B, EIGHT_B_NF4], ids=["bf16", "nf4"])
@pytest.mark.parametrize("row_length", often([1024, 8192], [1024]))
def test_less_memory_never_keeps_more(sizes: ModelSizes, row_length: int) -> None:
    before: tuple[int, int, int] | None = None
    for tenths in range(800, 60, -11):
        found = pick(sizes, tenths / 10, row_length=row_length)
        if isinstance(found, int):
            assert found > tenths / 10 * GIB
            before = (0, 0, 0)
            continue
        assert needed_bytes(found.peak) <= found.free
        one = found.recompute
        again = one.attended + one.qkv * 6144 + one.gate_up * 28672
        now = (found.row_length, found.rows_per_pass, -again)
        assert before is None or now <= before
        before = now


def test_everything_computed_again_takes_least() -> None:
    load = Load(2048, 143)
    everything = peak_bytes(EIGHT_B, EVERYTHING, load)
    for part in (
        Recompute(),
        Recompute(attended=True),
        Recompute(attended=True, gate_up=16, qkv=16),
    ):
        assert peak_bytes(EIGHT_B, part, load) > everything


def test_products_are_computed_again_in_no_more_layers_than_needed() -> None:
    choice = picked(EIGHT_B_NF4, 24, row_length=8192)
    one = choice.recompute
    assert one.gate_up or one.qkv
    for name in ("gate_up", "qkv"):
        if getattr(one, name):
            fewer = one.model_copy(update={name: getattr(one, name) - 1})
            assert needed_bytes(peak_bytes(EIGHT_B_NF4, fewer, Load(8192, 768))) > choice.free


def test_passes_of_a_step_are_of_one_size() -> None:
    for gib in range(12, 80, 4):
        choice = picked(EIGHT_B_NF4, gib, row_length=1024)
        passes = -(-8 // choice.rows_per_pass)
        assert choice.rows_per_pass == -(-8 // passes)
    assert picked(EIGHT_B_NF4, 80, row_length=1024).rows_per_pass == 8


def test_rows_are_halved_last_and_a_step_keeps_its_tokens() -> None:
    choice = picked(EIGHT_B_NF4, 10, row_length=8192)
    assert choice.row_length == 4096
    assert choice.row_length * choice.rows_per_step == 8192 * 8
    assert choice.rows_per_pass == 1
    assert isinstance(pick(EIGHT_B_NF4, 10, row_length=8192, longest=4097), int)


def test_free_memory_holds_layers_left_expanded() -> None:
    """A layer's matrices with their margins: 0.41 GiB; all of them as bf16's own weights."""
    one: dict[str, Any] = {"row_length": 8192, "rows_per_step": 1}
    load = Load(8192, 768, 469)
    needed = needed_bytes(peak_bytes(EIGHT_B_NF4, Recompute(), load)) / GIB
    within = picked(EIGHT_B_NF4, needed + 0.01, **one)
    some = picked(EIGHT_B_NF4, 40, **one)
    plenty = picked(EIGHT_B_NF4, 60, **one)
    assert (within.expanded, plenty.expanded) == (0, 32)
    assert 0 < some.expanded < 32
    for choice in (within, some):
        more = replace(EIGHT_B_NF4, left_expanded=choice.expanded + 1)
        assert needed_bytes(peak_bytes(more, choice.recompute, load)) > choice.free
        assert choice.recompute == Recompute()
    dense = picked(EIGHT_B, 60, **one)
    buffers = (28672 * 4096 * 2 + EIGHT_B_NF4.trained * 2) / GIB
    four_bits = (weight_bytes(EIGHT_B_NF4) - 2 * EIGHT_B_NF4.other_weights) / GIB
    assert (plenty.peak - dense.peak) / GIB == pytest.approx(buffers + four_bits, abs=0.1)
    assert picked(EIGHT_B_NF4, 60, **one, expandable=False).expanded == 0
    assert dense.quantised == 0


def test_a_limit_is_planned_with(auto: Callable[..., Path]) -> None:
    """Where a gigabyte and 100 MiB are free, within a gigabyte and 25: as where only these are."""
    limit = (CONTEXT + 25 * 2**20) / GIB
    limited = prepare(load_recipe(auto(100, memory_limit=limit)))
    alone = prepare(load_recipe(auto(25)))
    assert limited.recipe.training == alone.recipe.training
    assert limited.recipe.training.memory_limit is None
    assert f"1.1 GiB free on a small card, {limit:g} allowed: rows of " in str(limited.memory)
    with pytest.raises(UsageError, match=r"a small card, 1 are allowed by memory_limit, and the"):
        prepare(load_recipe(auto(100, memory_limit=1)))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["training.memory_limit=3"], "'memory_limit' is read with memory: auto only"),
        (["training.expanded_layers=3"], "training.expanded_layers is read with quantization: nf4"),
        (
            ["training.expanded_layers=3", "quantization=nf4", "distributed.zero_stage=3"],
            "training.expanded_layers does not go with zero_stage: 3",
        ),
    ],
)
def test_what_is_not_read_is_refused(
    auto: Callable[..., Path], given: list[str], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        load_recipe(auto(100), ["training.memory=manual", *given])


def test_the_message_says_what_and_why() -> None:
    found = picked(EIGHT_B_NF4, 24)
    assert found.message("NVIDIA L4", 2048, 8) == (
        "memory: 24.0 GiB free on NVIDIA L4: rows of 2,048, 3 rows a pass (fewer, larger passes do "
        "not fit); attention computed again (saves 1.5 GiB); none of 32 layers left expanded; "
        "estimated peak 21.6 GiB"
    )
    plenty = picked(EIGHT_B, 80, row_length=8192, rows_per_step=1).message("card", 8192, 1)
    assert "rows of 8,192, 1 row a pass; nothing computed again; estimated peak 38.4 GiB" in plenty
    shorter = picked(EIGHT_B_NF4, 10, row_length=8192).message("card", 8192, 8)
    assert "rows of 4,096, 1 row a pass" in shorter
    assert "INSTEAD OF 8,192" in shorter
    assert "16 rows a step instead of 8" in shorter
    assert "gate and up in " in shorter


def test_layers_compute_again_from_the_first() -> None:
    assert keep_of(False, 3) == [Keep()] * 3
    assert keep_of(True, 3) == [Keep(attended=False, qkv=False, gate_up=False)] * 3
    assert keep_of(Recompute(qkv=1, gate_up=9), 3) == [
        Keep(qkv=False, gate_up=False),
        Keep(gate_up=False),
        Keep(gate_up=False),
    ]


# Whole recipes: the tiny real model on two bundled samples.


@pytest.fixture
def auto(
    stories_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Writes a recipe with `memory: auto` and pretends that so many MiB above 1 GiB are free."""

    def write(mib: float, **training: Any) -> Path:
        free = CONTEXT + int(mib * 2**20)
        monkeypatch.setattr(picking, "free_memory", lambda device: (free, "a small card"))
        path = tmp_path / "auto.yaml"
        content = {
            "base_model": str(stories_folder),
            "tasks": [
                {"name": name, "template": f"samples/{name}", "max_examples": 60}
                for name in ("animals", "uses")
            ],
            "training": {
                "memory": "auto",
                "row_length": 256,
                "rows_per_step": 4,
                "max_steps": 2,
                **training,
            },
            "run": {"name": "mine", "directory": str(tmp_path / "runs")},
        }
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return path

    return write


def test_the_resolved_recipe_repeats_the_choice(auto: Callable[..., Path], tmp_path: Path) -> None:
    prepared = prepare(load_recipe(auto(5)))
    training = prepared.recipe.training
    assert training.memory == "manual"
    assert prepared.memory is not None
    assert prepared.memory in tasks_table(prepared)
    written = tmp_path / "resolved.yaml"
    written.write_text(dump_recipe(prepared.recipe), encoding="utf-8")
    again = prepare(load_recipe(written))
    assert again.recipe.training == training
    assert again.memory is None
    assert again.data.mixture.epoch(0) == prepared.data.mixture.epoch(0)
    packed, _ = again.build()
    assert packed.keep == keep_of(training.gradient_checkpointing, 5)


def test_each_part_of_the_choice_is_reached(auto: Callable[..., Path]) -> None:
    plenty = prepare(load_recipe(auto(1000))).recipe.training
    assert (plenty.rows_per_pass, plenty.gradient_checkpointing) == (4, False)
    some = [prepare(load_recipe(auto(mib))).recipe.training for mib in (5, 3.5)]
    assert all(isinstance(one.gradient_checkpointing, Recompute) for one in some)
    assert some[0].row_length == 256
    assert (some[1].row_length, some[1].rows_per_step) == (128, 8)


def test_a_run_resumes_where_other_memory_is_free(auto: Callable[..., Path]) -> None:
    recipe = auto(3.5)
    prepared = prepare(load_recipe(recipe))
    run = start(prepared, Path(str(prepared.recipe.run.directory)) / "mine")
    for part in sorted(run.adapter.iterdir()):
        part.unlink()
    run.adapter.rmdir()
    recipe = auto(1000)
    resume(run, recipe, ())
    assert load_recipe(run.recipe).recipe.training.row_length == 128
    for part in sorted(run.adapter.iterdir()):
        part.unlink()
    run.adapter.rmdir()
    with pytest.raises(UsageError, match="row_length: 128 → 192"):
        resume(run, recipe, ["training.row_length=192"])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0"),
            "2.50 GiB",
        ),
        (RuntimeError("can't allocate memory: you tried to allocate 22201760 bytes."), "21.2 MiB"),
        (MemoryError(), None),
    ],
)
def test_out_of_memory_says_what_was_asked_for(
    prepared: Prepared, error: Exception, said: str | None
) -> None:
    with pytest.raises(MtlLoraError) as caught, explained(prepared.situation):
        raise error
    (line,) = caught.value.lines
    assert line.startswith("out of memory on the CPU: ")
    asked = "" if said is None else f", asked for {said} more"
    assert f" GiB available{asked}; by estimate a step takes " in line


def test_other_errors_are_left_as_they_are(prepared: Prepared) -> None:
    with pytest.raises(RuntimeError, match="something else"), explained(prepared.situation):
        raise RuntimeError("something else")


def test_what_would_help_depends_on_the_run(prepared: Prepared) -> None:
    def settings(changes: dict[str, Any], count: int = 1) -> list[str]:
        recipe = prepared.recipe.model_copy(update=changes)
        processes = Processes(Place(rank=0, count=count))
        own = replace(prepared, recipe=recipe, processes=processes)
        return [text for text, _ in alternatives(own.situation())]

    training = prepared.recipe.training
    wide = training.model_copy(update={"rows_per_pass": 4, "loss_on": "all", "row_length": 512})
    assert settings({"training": wide}) == [
        "training.gradient_checkpointing: true",
        "training.rows_per_pass: 2",
        "training.row_length: 256",
        "training.loss_on: answer",
        "quantization: nf4",
        "dtype: bfloat16",
    ]
    stage = "distributed.zero_stage: 3"
    assert stage in settings({}, count=2)
    # The recipe would be refused.
    assert stage not in settings({"quantization": "int8"}, count=2)
    looking = training.model_copy(update={"diagnose": Diagnose()})
    assert stage not in settings({"training": looking}, count=2)


def test_where_the_layers_are_not_known_settings_are_named_without_figures(
    prepared: Prepared,
) -> None:
    own = replace(prepared, recipe=prepared.recipe.model_copy(update={"engine": "plain"}))
    with pytest.raises(MtlLoraError) as caught, explained(own.situation):
        raise MemoryError
    assert str(caught.value).endswith(
        "available; what would help: quantization: nf4; dtype: bfloat16; a smaller "
        "training.row_length with on_overflow: truncate_prompt"
    )


def test_nothing_fits(auto: Callable[..., Path]) -> None:
    with pytest.raises(UsageError) as caught:
        prepare(load_recipe(auto(1)))
    text = str(caught.value)
    assert "1.0 GiB are free on a small card, and the least that is needed is 1.0 GiB" in text
    assert text.count(";") == 3
    for setting in ("quantization: nf4", "dtype: bfloat16", "training.row_length"):
        assert setting in text


def test_the_plain_engine_is_not_known(auto: Callable[..., Path]) -> None:
    with pytest.raises(
        UsageError, match="only the fused engine's layers are known, found engine: "
    ):
        prepare(load_recipe(auto(100), ["engine=plain"]))


@pytest.mark.parametrize(
    "given",
    [
        "rows_per_pass=2",
        "gradient_checkpointing=true",
        "gradient_checkpointing={qkv: 3}",
        "expanded_layers=2",
    ],
)
def test_what_is_picked_is_not_given_too(auto: Callable[..., Path], given: str) -> None:
    name = given.partition("=")[0]
    with pytest.raises(UsageError, match=f"'{name}' is picked by memory: auto"):
        load_recipe(auto(100), [f"training.{given}"])
