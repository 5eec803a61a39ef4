"""Results: what stands in them, by which normalisation, and which of them can be compared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mtl_lora_cli.data.examples import Examples
from mtl_lora_cli.evaluation.answers import answer, predict
from mtl_lora_cli.evaluation.asked import Sampling
from mtl_lora_cli.evaluation.choices import score
from mtl_lora_cli.evaluation.evaluate import Setting, compare_with_base, evaluate, stored
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.evaluation.requests import Request
from mtl_lora_cli.evaluation.scored import outcome_of
from mtl_lora_cli.metrics import intervals as metrics
from mtl_lora_cli.tasks.rendering import Example
from mtl_lora_cli.tasks.task import Task
from mtl_lora_cli.tasks.template import Generation


@pytest.fixture(scope="module", autouse=True)
def _few_resamples() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "RESAMPLES", 10)
        yield


def changed(task: Task, **keys: Any) -> Task:
    return replace(task, template=task.template.model_copy(update=keys))


def test_a_result_says_how_it_came_about(
    opened: Run, tasks: list[Task], held: list[Examples]
) -> None:
    (result,) = evaluate(opened, tasks[:1], Setting(limit=6), rows=held[:1])
    assert result["protocol"] == "choices"
    assert result["normalisation"] == "sum"
    assert result["template"] == {"name": "sst2", "version": 1}
    assert (result["loss_on"], result["prompt_format"]) == ("answer", "plain")
    assert (result["dtype"], result["limit"], result["examples"]) == ("float32", 6, 6)
    assert result["base_model"]["fingerprint"] == opened.base.fingerprint
    assert result["adapter_base_model"] is None
    assert result["generate"] is None
    assert set(result["harness"]) == {"acc", "acc_norm"}
    (kept,) = stored(opened.folder)
    assert {key: kept[key] for key in result} == result


def test_answers_are_those_of_their_scores(
    opened: Run, tasks: list[Task], held: list[Examples], requests: list[Request]
) -> None:
    """All tasks together, an expectation among them, against each request's own scores."""
    answers = answer(opened, tasks, held, Setting())
    scores = iter(score(opened.packed, requests, device=torch.device("cpu"), tokens_per_pass=900))
    for task, examples, own in zip(tasks, held, answers, strict=True):
        expected = [next(scores) for _ in examples.examples]
        assert own.scores is not None and own.texts is None
        for one, two in zip(own.scores, expected, strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)
        outcome = outcome_of(task, examples, expected)
        assert own.outcome.predicted.tolist() == outcome.predicted.tolist()
    pairs = predict(opened, tasks, held, Setting())
    assert [o.predicted.tolist() for _, o in pairs] == [
        a.outcome.predicted.tolist() for a in answers
    ]


HOWS = ("sum", "token", "character")


@pytest.fixture(scope="module")
def uneven() -> Examples:
    """Choices of which the first is long and has many characters a token."""
    choices = ("Lily and her mommy and her mommy and her mommy", "a cat", "of")
    prompts = ("Once upon a time", "One day", "Tom said", "She was happy because", "In the park")
    examples = [Example(prompt, choices[0], choices, 0) for prompt in prompts]
    return Examples("test", examples, [""] * len(examples), [], "uneven")


def test_the_template_names_the_normalisation_and_the_setting_overrules_it(
    opened: Run, tasks: list[Task], uneven: Examples
) -> None:
    found = []
    for how in HOWS:
        task = changed(tasks[2], normalisation=how)
        (own,) = answer(opened, [task], [uneven], Setting())
        (told,) = answer(opened, [tasks[2]], [uneven], Setting(normalisation=how))
        assert own.scores is not None
        lengths = {
            "sum": [[1] * 3 for _ in uneven.examples],
            "token": [[len(choice) for choice in request.choices] for request in own.requests],
            "character": [[len(choice) for choice in e.choices] for e in uneven.examples],
        }[how]
        expected = [
            int((values / np.asarray(of)).argmax())
            for values, of in zip(own.scores, lengths, strict=True)
        ]
        assert own.outcome.predicted.tolist() == told.outcome.predicted.tolist() == expected
        (result,) = evaluate(opened, [task], Setting(), rows=[uneven])
        assert (result["normalisation"], result["predicted"]) == (how, expected)
        shares = [result["harness"][name]["value"] for name in ("acc", "acc_norm")]
        found.append((expected, shares))
    predicted, shares = zip(*found, strict=True)
    assert len({tuple(some) for some in predicted}) == 3, "the rows do not tell them apart"
    accuracy = [some.count(0) / len(some) for some in predicted]
    assert all(some == [accuracy[0], accuracy[2]] for some in shares)


def test_what_cannot_be_read_is_counted_and_wrong(
    opened: Run, tasks: list[Task], held: list[Examples]
) -> None:
    """A model that tells stories names no answer; made to begin with one, it does."""
    task = changed(tasks[2], generate=Generation(extract="answer[1-5]", max_new_tokens=3))
    (own,) = answer(opened, [task], [held[2]], Setting(protocol="generate"))
    assert own.texts is not None and own.scores is None
    assert own.unparsable == 6 and own.outcome.predicted.tolist() == [-1] * 6
    (result,) = evaluate(opened, [task], Setting(protocol="generate"), rows=[held[2]])
    assert (result["unparsable"], result["metrics"]["accuracy"]["value"]) == (6, 0.0)
    assert result["generate"] == {"extract": "answer[1-5]", "max_new_tokens": 3, "stop": None}
    assert result["normalisation"] is None and result["harness"] is None

    def echo(texts: list[Any], **options: Any) -> list[str]:
        return [f"I say {e.choices[e.gold]}" for e in held[2].examples]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opened.tokenizer, "batch_decode", echo)
        (own,) = answer(opened, [task], [held[2]], Setting(protocol="generate"))
    assert own.unparsable == 0
    assert own.outcome.predicted.tolist() == own.outcome.gold.tolist()


def test_the_base_model_stands_beside_the_same_question_only(
    opened: Run, tasks: list[Task], held: list[Examples]
) -> None:
    def asked(base_only: bool, normalisation: str) -> dict[str, Any]:
        setting = Setting(base_only=base_only, normalisation=normalisation)
        return evaluate(opened, tasks[1:2], setting, rows=held[1:2])[0]

    base = asked(True, "sum")
    result, other = asked(False, "sum"), asked(False, "token")
    beside = compare_with_base(opened.folder, result)
    assert beside is not None
    assert (beside["metrics"], beside["harness"]) == (base["metrics"], base["harness"])
    assert compare_with_base(opened.folder, other) is None
    for key, value in (("name", "other"), ("tokenizer", "other"), ("chat_template", "other")):
        elsewhere = {**result["base_model"], key: value}
        assert compare_with_base(opened.folder, {**result, "base_model": elsewhere}) is None
    assert len({entry["id"] for entry in stored(opened.folder)}) == 3


def test_several_answers_a_row_are_drawn_and_scored_together(
    opened: Run, tasks: list[Task], held: list[Examples]
) -> None:
    setting = Setting(protocol="generate", sampling=Sampling(1.0, 3, 4))
    said: list[Any] = []
    chosen = [tasks[0], tasks[2]]
    results = evaluate(
        opened, chosen, setting, rows=[held[0], held[2]], told=lambda *own: said.append(own[2])
    )
    for result, own in zip(results, said, strict=True):
        assert result["sampling"] == {"temperature": 1.0, "seed": 3, "answers": 4, "first": 0}
        assert [len(texts) for texts in own.several] == [4] * 6
        assert [texts[0] for texts in own.several] == own.texts
        right = [[one.gold[n] == one.predicted[n] for one in own.outcomes] for n in range(6)]
        assert result["metrics"]["accuracy"]["value"] == pytest.approx(np.mean(right))
        assert result["pass_at"]["4"]["value"] == pytest.approx(np.mean([any(r) for r in right]))
        assert compare_with_base(opened.folder, result) is None
    (once,) = evaluate(opened, tasks[:1], Setting(protocol="generate"), rows=held[:1])
    assert (once["pass_at"], once["sampling"]) == (None, None)
