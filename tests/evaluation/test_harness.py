"""Beside lm-evaluation-harness itself: the same figures, and our model plugged into it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtl_lora_cli.data.examples import Examples
from mtl_lora_cli.errors import MtlLoraError, NoNumbersError, UsageError
from mtl_lora_cli.evaluation.choices import score
from mtl_lora_cli.evaluation.evaluate import Setting, evaluate
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.evaluation.requests import Request, build_requests
from mtl_lora_cli.evaluation.scored import normalised
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.tasks.rendering import Example
from mtl_lora_cli.tasks.task import Task

lm_eval = pytest.importorskip(
    "lm_eval", reason="lm-evaluation-harness is not installed: pip install 'mtl-lora[lm-eval]'"
)
CPU = torch.device("cpu")


def instances(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, some, number) for number, some in enumerate(arguments)]


@pytest.fixture(scope="module")
def hflm(stories_folder: Path) -> Any:
    """The harness's own model class on the base model."""
    from lm_eval.models.huggingface import HFLM

    folder = find_base_model(str(stories_folder)).folder
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=8)


@pytest.fixture
def base_lm(opened: Run) -> Any:
    """Ours without the adapter."""
    from mtl_lora_cli.evaluation.lm_eval_model import AdaptedLM

    return AdaptedLM(opened, -1)


def texts_of(examples: dict[str, list[Example]]) -> list[tuple[str, str]]:
    return [
        (example.prompt, f" {choice}")
        for some in examples.values()
        for example in some[:3]
        for choice in example.choices
    ]


def test_scores_equal_those_of_the_harness(
    hflm: Any, opened: Run, examples: dict[str, list[Example]]
) -> None:
    """Tokenised by each in its own way, and through the model in its own way."""
    from mtl_lora_cli.data.encoding import Encoder

    encoder = Encoder(opened.tokenizer, "plain")
    chosen = [example for some in examples.values() for example in some[:3]]
    requests = build_requests(chosen, -1, encoder, opened.longest)
    ours = score(opened.packed, requests, device=CPU, tokens_per_pass=2048)
    theirs = hflm.loglikelihood(instances("loglikelihood", texts_of(examples)), disable_tqdm=True)
    values = iter([value for value, _ in theirs])
    for own in ours:
        expected = np.asarray([next(values) for _ in own])
        np.testing.assert_allclose(own, expected, rtol=0, atol=1e-4)
        assert own.argmax() == expected.argmax()


def test_our_model_answers_the_harness_as_its_own_does(
    hflm: Any, base_lm: Any, examples: dict[str, list[Example]]
) -> None:
    """Greedy flags, contexts that are empty or too long, and candidates that the model would say."""
    asked = [
        *texts_of(examples)[::3],
        ("", "Once upon a time"),
        ("Once upon a time Nora", " drew a broken clock"),
        ("Nora and her old lamp " * 80, "lay under the bridge"),
    ]
    ours = base_lm.loglikelihood(instances("loglikelihood", asked), disable_tqdm=True)
    theirs = hflm.loglikelihood(instances("loglikelihood", asked), disable_tqdm=True)
    np.testing.assert_allclose([v for v, _ in ours], [v for v, _ in theirs], rtol=0, atol=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert {greedy for _, greedy in ours} == {True, False}


def test_whole_texts_and_continuations_are_the_harness_s(hflm: Any, base_lm: Any) -> None:
    texts = [("One day a girl named Lily went out.",), ("Tom had a red ball. " * 60,)]
    ours = base_lm.loglikelihood_rolling(instances("loglikelihood_rolling", texts))
    theirs = hflm.loglikelihood_rolling(
        instances("loglikelihood_rolling", texts), disable_tqdm=True
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-4)
    asked = [
        ("Once upon a time", {"until": ["."], "max_gen_toks": 30}),
        ("Lily and Tom went to the", {"until": ["box", "\n"], "max_gen_toks": 30}),
        ("The dog was", {"until": ["."], "max_gen_toks": 5}),
    ]
    generated = base_lm.generate_until(instances("generate_until", asked))
    assert generated == hflm.generate_until(instances("generate_until", asked), disable_tqdm=True)
    with pytest.raises(UsageError, match="sampled answers"):
        wish = {"until": [], "do_sample": True, "temperature": 1.0}
        base_lm.generate_until(instances("generate_until", [("A", wish)]))


def test_the_adapter_of_the_task_answers_the_harness(
    opened: Run, requests: list[Request], examples: dict[str, list[Example]]
) -> None:
    from mtl_lora_cli.evaluation.lm_eval_model import AdaptedLM

    first = next(iter(examples.values()))[0]
    asked = instances("loglikelihood", [(first.prompt, f" {c}") for c in first.choices])
    found = [
        [value for value, _ in AdaptedLM(opened, task).loglikelihood(asked, disable_tqdm=True)]
        for task in (-1, 0, 1)
    ]
    request = requests[0]
    for task, values in zip((-1, 0, 1), found, strict=True):
        one = Request(task, request.prompt, request.choices)
        (expected,) = score(opened.packed, [one], device=CPU, tokens_per_pass=2048)
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-4)
    assert len({round(values[0], 2) for values in found}) == 3


HARNESS_TASK = """\
task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - {{metric: acc}}
  - {{metric: acc_norm}}
metadata: {{version: 3}}
"""


@pytest.fixture
def harness_file(
    tmp_path: Path, examples: dict[str, list[Example]], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The rows of one task, rendered, as a task of the harness's own kind."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": e.prompt, "choices": list(e.choices), "gold": e.gold}
        for e in examples["home_depot"]
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = tmp_path / "own.yaml"
    path.write_text(HARNESS_TASK.format(file=file), encoding="utf-8")
    return path


def test_the_harness_runs_its_task_with_our_model(
    opened: Run,
    tasks: list[Task],
    held: list[Examples],
    harness_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its acc and acc_norm on our rendered rows are those that our own protocol reports."""
    monkeypatch.setattr("mtl_lora_cli.metrics.intervals.RESAMPLES", 10)
    task, rows = tasks[1], held[1]
    (own,) = evaluate(opened, [task], Setting(), rows=[rows])
    setting = Setting(protocol="lm-eval", harness_task=str(harness_file))
    (result,) = evaluate(opened, [task], setting)
    for name in ("acc", "acc_norm"):
        assert result["metrics"][name]["value"] == pytest.approx(own["harness"][name]["value"])
    assert (result["gold"], result["predicted"]) == (own["gold"], own["predicted"])
    assert result["protocol"] == "lm-eval"
    assert result["harness_task"] == {
        "task": "own",
        "version": 3,
        "num_fewshot": 0,
        "lm_eval": lm_eval.__version__,
    }
    assert (result["split"], result["examples"], result["template"]) == ("test", 6, None)
    (base,) = evaluate(opened, [task], replace(setting, base_only=True))
    assert base["rows_fingerprint"] == result["rows_fingerprint"]


def test_no_number_is_no_answer_of_the_harness_either(
    opened: Run, tasks: list[Task], harness_file: Path
) -> None:
    adapter = opened.packed.adapter
    assert adapter is not None
    tensors = adapter.tensors()
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    setting = Setting(protocol="lm-eval", harness_task=str(harness_file))
    try:
        for tensor in tensors.values():
            tensor.data.mul_(1e30)
        with pytest.raises(NoNumbersError, match="finds no finite log-probability"):
            evaluate(opened, [tasks[1]], setting)
    finally:
        for name, tensor in tensors.items():
            tensor.data.copy_(before[name])


def test_both_figures_where_one_choice_begins_another(
    opened: Run, tasks: list[Task], harness_file: Path, tmp_path: Path
) -> None:
    """The harness's own stand under its names; those with the ends counted are our own protocol's."""
    prompts = ("great film Rating:", "Lily saw ten birds:", "Tom had a ball:", "It was")
    options = [("1", "10"), ("1", "10"), ("yes", "no"), ("sun", "sunny", "rain")]
    examples = [
        Example(prompt, some[1], some, 1) for prompt, some in zip(prompts, options, strict=True)
    ]
    text = "".join(
        json.dumps({"prompt": e.prompt, "choices": list(e.choices), "gold": e.gold}) + "\n"
        for e in examples
    )
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    rows = Examples("test", examples, [f"rows:{n}" for n in range(4)], [], "rows")
    task = replace(
        tasks[2], template=tasks[2].template.model_copy(update={"metrics": ["accuracy"]})
    )
    (own,) = evaluate(opened, [task], Setting(protocol="choices"), rows=[rows])
    by_character = Setting(protocol="choices", normalisation="character")
    (per_character,) = evaluate(opened, [task], by_character, rows=[rows])
    setting = Setting(protocol="lm-eval", harness_task=str(harness_file))
    (result,) = evaluate(opened, [task], setting)
    assert own["ends_counted"] == result["ends_counted"] == 3
    found = {name: measured["value"] for name, measured in result["metrics"].items()}
    assert found["acc"] == own["harness"]["acc"]["value"]
    assert found["acc_norm"] == own["harness"]["acc_norm"]["value"]
    assert found["acc (ends counted)"] == own["metrics"]["accuracy"]["value"]
    assert found["acc_norm (ends counted)"] == per_character["metrics"]["accuracy"]["value"]
    (base,) = evaluate(opened, [tasks[1]], replace(setting, limit=1, base_only=True))
    assert base["ends_counted"] == 1


def test_normalised_predictions_are_the_harness_s(harness_file: Path, tmp_path: Path) -> None:
    """Its own code on drawn log-likelihoods; choices of several lengths and letters of several bytes."""
    from lm_eval.tasks import TaskManager

    rows = [("café au lait", "tea", "🫖🫖"), ("no", "yes"), ("naïve", "unnaïve", "a b c", "x" * 40)]
    content = [{"prompt": "p", "choices": list(row), "gold": len(row) - 2} for row in rows]
    text = "".join(json.dumps(row) + "\n" for row in content)
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    loaded = TaskManager(include_defaults=False).load([str(harness_file)])["tasks"]["own"]
    generator = np.random.default_rng(0)
    seen = set()
    for doc in loaded.test_docs():
        example = Example("p", doc["choices"][doc["gold"]], tuple(doc["choices"]), doc["gold"])
        examples = Examples("test", [example], [""], [], "")
        for _ in range(40):
            scores = -generator.random(len(doc["choices"])) * [len(c) for c in doc["choices"]]
            found = loaded.process_results(doc, [(value, False) for value in scores])
            for metric, how in (("acc", "sum"), ("acc_norm", "character")):
                (own,) = normalised([scores], examples, None, how)
                assert found[metric] == float(own.argmax() == doc["gold"])
            seen.add((found["acc"], found["acc_norm"]))
    assert len(seen) == 4


def test_a_task_that_the_harness_cannot_load_is_one_line(
    opened: Run, tasks: list[Task], harness_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").unlink()
    setting = Setting(protocol="lm-eval", harness_task=str(harness_file))
    with pytest.raises(MtlLoraError, match=r"the harness's task '.*own\.yaml' failed: ") as error:
        evaluate(opened, [tasks[1]], setting)
    assert len(error.value.lines) == 1


def test_one_harness_task_stands_for_one_task(tasks: list[Task], tmp_path: Path) -> None:
    from mtl_lora_cli.evaluation.lm_eval_bridge import harness_tasks

    with pytest.raises(UsageError, match="--harness-task boolq stands for one task"):
        harness_tasks(tasks, "boolq")
    with pytest.raises(UsageError, match=r"missing\.yaml: no such file"):
        harness_tasks(tasks[:1], str(tmp_path / "missing.yaml"))
