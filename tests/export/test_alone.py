"""The party that a check asks: transformers alone. What our own path gets wrong does not hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_lora_cli.errors import CheckError, ExitCode, UsageError
from mtl_lora_cli.evaluation import opened
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.evaluation.protocols import GENERATE, Setting
from mtl_lora_cli.evaluation.requests import Request
from mtl_lora_cli.export import merge
from mtl_lora_cli.export.alone import generate_alone, load_alone, score_alone
from mtl_lora_cli.export.comparison import largest_difference
from mtl_lora_cli.export.formats import find_format
from mtl_lora_cli.export.questions import Questions
from mtl_lora_cli.export.weight_names import WeightNames, weight_names
from mtl_lora_cli.models.base import BaseModel

from .conftest import exported, itself


@pytest.fixture(scope="session")
def of_type(stories_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The tiny model's weights under another model type that has the same ones."""

    def make(kind: str, **keys: object) -> Path:
        folder = Path(shutil.copytree(stories_folder, tmp_path_factory.mktemp("base") / kind))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": kind, **keys}))
        return folder

    return make


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], object]], None]:
    """Changes the run's own model behind our path's back, wherever a run is opened."""

    def change(spoil: Callable[[Any], object]) -> None:
        for name in ("load_model", "load_for_float32"):
            right = getattr(opened, name)

            def wrong(*args: Any, right: Callable[..., Any] = right, **keys: Any) -> Any:
                model = right(*args, **keys)
                spoil(model)
                return model

            monkeypatch.setattr(opened, name, wrong)

    return change


def without_window(model: Any) -> None:
    model.config.sliding_window = None
    for module in model.modules():
        if hasattr(module, "sliding_window"):
            module.sliding_window = None


def without_scale(model: Any) -> None:
    model.config.logits_scaling = 1.0


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("kind", "keys", "spoil"),
    [
        ("mistral", {"sliding_window": 16}, without_window),
        (
            "granite",
            {"logits_scaling": 4.0, "attention_multiplier": 8**-0.5},
            without_scale,
        ),
    ],
)
def test_a_packed_path_that_leaves_something_out_does_not_hold(
    train: Callable[..., Run],
    of_type: Callable[..., Path],
    ours: Callable[..., None],
    tmp_path: Path,
    kind: str,
    keys: dict[str, object],
    spoil: Callable[[Any], None],
) -> None:
    run = train(of_type(kind, **keys))
    written = exported("merged", run, run.tasks[0], tmp_path / "right", limit=4)
    assert written.comparison is not None and written.comparison.largest < 5e-5
    ours(spoil)
    with pytest.raises(CheckError, match="the merged model differs from the adapted one") as caught:
        exported("merged", run, run.tasks[0], tmp_path / "out", limit=4)
    assert caught.value.exit_code == ExitCode.CHECK
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.failed" / "FAILED.md").is_file()


@pytest.mark.usefixtures("in_process")
def test_an_update_on_another_layers_weight_does_not_hold(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a wrong name of one weight would lead it there, if `require_meant` did not see it first."""
    one, other = (f"model.layers.{number}.mlp.down_proj.weight" for number in (1, 2))

    def wrong(base: BaseModel) -> WeightNames:
        names = weight_names(base)
        swapped = {**names.tensors, one: names.tensors[other], other: names.tensors[one]}
        return replace(names, tensors=swapped)

    monkeypatch.setattr(merge, "same_names", lambda _base, _weights: None)
    monkeypatch.setattr(merge, "require_meant", lambda _names: None)
    monkeypatch.setattr(merge, "weight_names", wrong)
    with pytest.raises(CheckError, match="differs from the adapted one") as caught:
        exported("merged", run, run.tasks[0], tmp_path / "out", limit=4)
    assert caught.value.exit_code == ExitCode.CHECK


# What it says, beside the formula.


@pytest.fixture(scope="session")
def plain(stories_folder: Path) -> Any:
    return load_alone(stories_folder, torch.float32)


CHOICES = [[5, 6], [5, 7], [5], [9, 8, 7], [5, 6, 7], [20, 21, 22]]


def test_log_probabilities_are_the_formulas(plain: Any) -> None:
    """Σ log softmax(logits)[token] of each candidate's own pass, in float64."""
    prompts = [[1, 300, 41, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
    found = score_alone(plain, [Request(0, prompt, CHOICES) for prompt in prompts])
    model = plain.double()
    try:
        for prompt, scores in zip(prompts, found, strict=True):
            for choice, score in zip(CHOICES, scores, strict=True):
                ids = torch.tensor([prompt + choice])
                logprobs = model(ids).logits[0].log_softmax(-1)
                places = range(len(prompt) - 1, len(prompt) + len(choice) - 1)
                expected = sum(float(logprobs[p, t]) for p, t in zip(places, choice, strict=True))
                assert score == pytest.approx(expected, abs=2e-5)
    finally:
        model.float()


def test_a_row_holds_one_example_and_no_filling(
    plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[Tensor] = []
    forward = plain.forward

    def watched(input_ids: Tensor, **keys: Any) -> Any:
        rows.extend(input_ids)
        return forward(input_ids, **keys)

    monkeypatch.setattr(plain, "forward", watched)
    score_alone(plain, [Request(0, [1, 2], CHOICES), Request(0, [3], [[4], [5]])])
    assert [row.tolist() for row in rows] == [
        [1, 2], [1, 2, 5], [1, 2, 5, 6], [1, 2, 9, 8], [1, 2, 20, 21], [3]
    ]  # fmt: skip


def test_greedy_answers_are_the_likeliest_tokens(plain: Any) -> None:
    """Whatever the checkpoint says of how to generate; by a loop without a cache."""
    plain.generation_config.repetition_penalty = 50.0
    prompts = [[1, 300, 41], [1, 2, 3, 4, 5]]
    limits = [12, 7]

    def greedy(prompt: list[int], most: int) -> list[int]:
        ids = torch.tensor([prompt])
        for _ in range(most):
            ids = torch.cat([ids, plain(ids).logits[:, -1:].argmax(-1)], dim=1)
        return list(ids[0, len(prompt) :].tolist())

    expected = [greedy(prompt, most) for prompt, most in zip(prompts, limits, strict=True)]
    requests = [Request(0, prompt, [[0]]) for prompt in prompts]
    keys: dict[str, Any] = {"new_tokens": limits, "stopped": lambda tokens: False}
    assert generate_alone(plain, requests, ends=[10**6], **keys) == expected
    end = expected[0][4]
    first = expected[0].index(end)
    cut = generate_alone(plain, requests[:1], ends=[end], **{**keys, "new_tokens": [12]})
    assert cut == [expected[0][:first]], "the end token is no part of an answer"
    keys = {"new_tokens": [12], "stopped": lambda tokens: len(tokens) == 3}
    assert generate_alone(plain, requests[:1], ends=[10**6], **keys) == [expected[0][:3]]


def test_answers_of_both_protocols_equal_the_runs(run: Run, tmp_path: Path) -> None:
    exported("merged", run, run.tasks[0], tmp_path / "out", checked=False)
    for setting in (Setting(limit=6), Setting(limit=6, protocol=GENERATE)):
        questions = Questions(run, run.tasks[0], setting)
        ours, theirs = itself(questions), find_format("merged").read(questions, tmp_path / "out")
        assert largest_difference(ours.scores, theirs.scores) < 2e-5
        assert ours.outcome is not None and theirs.outcome is not None
        assert ours.outcome.predicted.tolist() == theirs.outcome.predicted.tolist()


# What cannot be asked.


def test_a_weight_without_a_value_is_told(stories_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(stories_folder, tmp_path / "base"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckError, match=r"no value for 1 weights in .*, the first is model\.norm"):
        load_alone(folder, torch.float32)


def test_what_is_no_model_is_no_folder_to_compare_with(
    run: Run, stories_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(stories_folder, tmp_path / "base"))
    (folder / "model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(CheckError, match="transformers does not load"):
        load_alone(folder, torch.float32)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="holds no safetensors weights"):
        find_format("merged").read(Questions(run, run.tasks[0], Setting(limit=2)), folder)
