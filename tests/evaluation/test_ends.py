"""Choices of which one begins another: there the end of each choice counts, everywhere alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtl_lora_cli.cli.eval_table import as_table
from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.data.examples import Examples
from mtl_lora_cli.evaluation.choices import score
from mtl_lora_cli.evaluation.evaluate import Setting, compare_with_base, evaluate
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.evaluation.predict import Predictor
from mtl_lora_cli.evaluation.requests import Request, build_requests
from mtl_lora_cli.evaluation.scored import normalised
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import load_model, load_tokenizer
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.recipe.yaml_file import parse_document, validate_document
from mtl_lora_cli.tasks.rendering import Example
from mtl_lora_cli.tasks.task import Task
from mtl_lora_cli.tasks.template import Template

from ..by_transformers import log_probability

CPU = torch.device("cpu")
RATING = 'description: x\nprompt: "{{ text }} Rating:"\nlabel: label\nchoices: {1: "1", 2: "10"}\n'
PROMPTS = ("great film Rating:", "Lily saw ten birds Rating:", "Once upon a time Rating:")


def rated(choices: tuple[str, ...] = ("1", "10"), gold: int = 1) -> Examples:
    examples = [Example(prompt, choices[gold], choices, gold) for prompt in PROMPTS]
    return Examples("test", examples, ["rows:1", "rows:2", "rows:3"], [], "rows")


@pytest.fixture
def rating(tasks: list[Task]) -> Task:
    template = validate_document(parse_document(RATING, "rating.yaml"), Template)
    return Task("a", 1, "rating.yaml", RATING, template, tasks[0].source)


@pytest.fixture(scope="module")
def encoder(stories_folder: Path) -> Encoder:
    return Encoder(load_tokenizer(find_base_model(str(stories_folder))), "plain")


@pytest.fixture(scope="module")
def base(stories_folder: Path) -> PackedModel:
    found = find_base_model(str(stories_folder))
    return PackedModel(load_model(found, dtype=torch.float32, device=CPU)).eval()


@pytest.fixture(scope="module")
def plain(stories_folder: Path) -> Any:
    """The same model as transformers alone knows it, in float64."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(stories_folder, dtype=torch.float64).eval()


@pytest.mark.parametrize("end", [(2,), (5, 13)])
def test_an_end_of_several_tokens_goes_into_the_tree(
    encoder: Encoder, base: PackedModel, plain: Any, end: tuple[int, ...], monkeypatch: Any
) -> None:
    monkeypatch.setattr(Encoder, "answer_end", property(lambda self: end))
    requests = build_requests(rated().examples, -1, encoder, 512)
    assert {request.ends for request in requests} == {len(end)}
    assert all(one.cost == one.with_open.cost for one in requests), "asking both costs nothing"
    scores = score(base, requests, device=CPU, tokens_per_pass=2048)
    for request, values in zip(requests, scores, strict=True):
        assert [tuple(choice[-len(end) :]) for choice in request.choices] == [end, end]
        expected = [log_probability(plain, request.prompt, one) for one in request.choices]
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-4)
    short = build_requests(rated().examples, -1, encoder, 9)
    assert all(len(one.prompt) + max(map(len, one.choices)) == 9 for one in short)


def test_lengths_have_the_end_where_it_counts() -> None:
    """By hand: 2 and 3 tokens with the end, 1 + 1 and 2 + 1 characters."""
    examples = Examples("test", [Example("p", "10", ("1", "10"), 1)] * 2, ["", ""], [], "")
    ended = Request(0, [1], [[7, 2], [7, 8, 2]], ends=1)
    bare = Request(0, [1], [[7], [7, 8]])
    scores = [np.array([-6.0, -6.0])] * 2
    for how, lengths in (("token", [[2, 3], [1, 2]]), ("character", [[2, 3], [1, 2]])):
        found = normalised(scores, examples, [ended, bare], how)
        assert [values.tolist() for values in found] == [[-6 / n for n in own] for own in lengths]


def test_eval_and_predict_count_the_end_and_say_so(
    opened: Run, rating: Task, encoder: Encoder
) -> None:
    """Both figures: with the end, and as lm-evaluation-harness scores, by which only `1` can win."""
    rows = rated()
    (result,) = evaluate(opened, [rating], Setting(), rows=[rows])
    bare = [Request(1, r.prompt, [c[:-1] for c in r.choices]) for r in build_requests(rows.examples, 1, encoder, 512)]  # fmt: skip
    ends = [Request(1, r.prompt, [[*c, 2] for c in r.choices]) for r in bare]
    with_end, without = (
        [int(v.argmax()) for v in score(opened.packed, some, device=CPU, tokens_per_pass=2048)]
        for some in (ends, bare)
    )
    assert without == [0, 0, 0]
    assert result["predicted"] == with_end
    assert (result["ends_counted"], result["examples"]) == (3, 3)
    assert result["harness"]["acc"]["value"] == 0.0
    table = as_table([result], [None], [], None, base_only=False)
    assert (
        "a: in 3 of 3 rows one choice begins another; there the end of each choice counts, too; "
        "without it, as in lm-evaluation-harness, acc is 0.000"
    ) in table
    said = Predictor(opened.but(tasks=[rating])).predict(
        [{"text": prompt.removesuffix(" Rating:")} for prompt in PROMPTS], task="a"
    )
    assert [one["label"] for one in said] == [(1, 2)[number] for number in with_end]
    assert all(one["ends_counted"] is True for one in said)


def test_nothing_is_said_where_no_choice_begins_another(opened: Run, rating: Task) -> None:
    (result,) = evaluate(opened, [rating], Setting(), rows=[rated(("yes", "no"))])
    assert result["ends_counted"] == 0
    assert "begins another" not in as_table([result], [None], [], None, base_only=False)


def test_an_older_result_is_compared_only_where_no_end_counts(opened: Run, rating: Task) -> None:
    """Results of before have no `ends_counted`, and counted none."""
    base_only = Setting(base_only=True)
    for choices, comparable in ((("1", "10"), False), (("yes", "no"), True)):
        (kept,) = evaluate(opened, [rating], base_only, rows=[rated(choices)])
        path = opened.folder.evaluations / f"{kept['id']}.json"
        old = json.loads(path.read_text(encoding="utf-8"))
        del old["ends_counted"]
        path.write_text(json.dumps(old), encoding="utf-8")
        (result,) = evaluate(opened, [rating], Setting(), rows=[rated(choices)])
        assert (compare_with_base(opened.folder, result) is not None) == comparable
