"""Validation loss: the mean over supervised tokens of held-out examples, and who is left out."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from mtl_lora_cli.cli.plan import findings
from mtl_lora_cli.data.collate import training_batch
from mtl_lora_cli.data.encoded import EncodedSplit
from mtl_lora_cli.data.prepare import read_examples
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.recipe.training import ValidationSettings as Settings
from mtl_lora_cli.training.checkpoints import newest_checkpoint
from mtl_lora_cli.training.journal import Journal
from mtl_lora_cli.training.prepare import prepare
from mtl_lora_cli.training.prepared import Prepared
from mtl_lora_cli.training.progress import TrainingProgress
from mtl_lora_cli.training.validation import Validation, encode_validation

WITH_SPLIT = ["sst2", "rte", "cola"]


def held_out(prepared: Prepared, examples: int = 8, **training: Any) -> list[EncodedSplit]:
    settings = prepared.recipe.training.model_copy(
        update={"validation": Settings(examples=examples), **training}
    )
    recipe = prepared.recipe.model_copy(update={"training": settings})
    held = encode_validation(prepared.data.tasks, recipe, prepared.tokenizer, 512)
    return [one.split for one in held]


def plain_losses(prepared: Prepared, folder: Path, loss_on: str = "answer") -> dict[str, float]:
    """Of transformers alone, example by example."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    expected = {}
    for task, split in zip(prepared.data.tasks, held_out(prepared), strict=True):
        losses = []
        for number in range(len(split)):
            tokens = torch.from_numpy(split.example(number).astype("int64"))
            with torch.no_grad():
                logits = plain(tokens[None]).logits[0].log_softmax(-1)
            first = 1 if loss_on == "all" else int(split.prompt_lengths[number])
            losses += [
                -float(logits[place - 1, tokens[place]]) for place in range(first, len(tokens))
            ]
        if losses:
            expected[task.name] = sum(losses) / len(losses)
    assert list(expected) == WITH_SPLIT
    return expected


@pytest.mark.parametrize("loss_on", ["answer", "all"])
def test_the_untrained_loss_is_the_plain_models(
    small: Callable[..., Any], prepared: Prepared, stories_folder: Path, loss_on: str
) -> None:
    run = small(validation=Settings(examples=8), loss_on=loss_on)
    (observer,) = (one for one in run.trainer._observers if isinstance(one, Validation))
    expected = plain_losses(prepared, stories_folder, loss_on)
    assert observer.losses() == pytest.approx(expected, abs=1e-4)


def test_a_look_before_the_first_step_is_the_plain_models_and_never_the_best(
    small: Callable[..., Any], prepared: Prepared, stories_folder: Path
) -> None:
    """And a run that goes on does not look again."""
    looking = {"validation": Settings(every=2, examples=8, before=True, best="macro")}
    more = {"checkpoint_every": 2}
    run = small(steps=4, **looking, **more)
    run.train(stop_after=2)
    again = small(steps=4, folder=run.run.path, **looking, **more)
    again.trainer.resume(newest_checkpoint(run.run.checkpoints))
    again.train()
    looks = [event for event in again.events if event["event"] == "validation"]
    assert [event["step"] for event in looks] == [0, 2, 4]
    assert looks[0]["loss"] == pytest.approx(plain_losses(prepared, stories_folder), abs=1e-4)
    assert next(event["step"] for event in again.events if event["event"] == "best") == 2


def test_the_trained_loss_is_that_of_each_example_alone(
    small: Callable[..., Any], prepared: Prepared
) -> None:
    run = small(steps=5, validation=Settings(every=2, examples=8)).train()
    events = [event for event in run.events if event["event"] == "validation"]
    assert [event["step"] for event in events] == [2, 4, 5]
    assert all(event["examples"] == dict.fromkeys(WITH_SPLIT, 8) for event in events)
    packed = run.trainer.host.eval()
    splits = held_out(prepared)
    for task, name in enumerate(WITH_SPLIT):
        found = []
        for number in range(len(splits[task])):
            batch = training_batch([[(task, number)]], splits, loss_on="answer")
            with torch.no_grad(), packed.routed(batch):
                found.append(-packed(batch))
        assert events[-1]["loss"][name] == pytest.approx(float(torch.cat(found).mean()), abs=1e-5)
    assert events[-1]["loss"] != events[0]["loss"]


def test_the_rows_are_the_validation_splits_and_the_same_for_every_seed(
    prepared: Prepared,
) -> None:
    splits, other = held_out(prepared), held_out(prepared, seed=5)
    assert [len(split) for split in splits] == [8, 8, 8, 0]  # home_depot has no validation split
    for one, two in zip(splits, other, strict=True):
        assert one.tokens.tolist() == two.tokens.tolist()
    every = held_out(prepared, examples=10**6)
    assert [len(split) for split in every] == [40, 40, 40, 0]
    there = {tuple(every[0].example(i)) for i in range(40)}
    assert {tuple(splits[0].example(i)) for i in range(8)} <= there
    found = read_examples(prepared.data.tasks[0], "validation")
    assert found is not None
    text = prepared.tokenizer.decode(every[0].example(0))
    assert found.examples[0].prompt[-30:] in text


def test_a_line_is_shown_and_names_each_task(small: Callable[..., Any]) -> None:
    run = small(steps=2, validation=Settings(every=1, examples=2))
    console = Console(file=io.StringIO(), width=200)
    run.trainer.train(Journal(run.run, TrainingProgress(2, 0, console)))
    lines = [line for line in console.file.getvalue().splitlines() if "validation" in line]  # type: ignore[attr-defined]
    assert len(lines) == 2
    assert lines[0].startswith("validation after step 1/2  sst2 ")
    assert all(f"  {name} " in lines[1] for name in WITH_SPLIT)


def test_a_loss_that_is_no_number_is_null(small: Callable[..., Any]) -> None:
    run = small(validation=Settings(examples=2))
    (observer,) = (one for one in run.trainer._observers if isinstance(one, Validation))
    assert isinstance(observer, Validation)
    assert None not in observer.look(1).event["metric"].values()
    with torch.no_grad():
        next(iter(run.trainer.adapter.layers.values())).lora_A.fill_(float("nan"))
    event = observer.look(1).event
    assert set(event["loss"].values()) == set(event["metric"].values()) == {None}
    assert event["macro"] == {"loss": None, "metric": None}


def test_a_task_without_a_validation_split_is_left_out_with_a_note(recipe_file: Path) -> None:
    found = prepare(load_recipe(recipe_file, ["training.validation=true"]))
    assert found.unvalidated == ["home_depot"]
    note = "home_depot: there is no validation split, so training.validation leaves it out"
    assert note in findings(found)


def test_no_validation_split_at_all_is_an_error(recipe_file: Path, small_data: Path) -> None:
    tasks = f"[{{name: a, template: home_depot, source: {small_data / 'home_depot'}}}]"
    loaded = load_recipe(recipe_file, [f"tasks={tasks}", "training.validation.every=2"])
    with pytest.raises(UsageError) as caught:
        prepare(loaded)
    assert caught.value.lines == [
        "command line: training.validation: no task's source has a validation split"
    ]
