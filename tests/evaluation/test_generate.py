"""Greedy answers: they equal transformers' own, and what they name is read without guessing."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl_lora_cli.errors import NoNumbersError
from mtl_lora_cli.evaluation.generate import Reading, generate
from mtl_lora_cli.evaluation.requests import Request
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.models.load import load_model, load_tokenizer
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.tasks.reading import reading_of
from mtl_lora_cli.tasks.registry import find_template
from mtl_lora_cli.tasks.rendering import Renderer

TEXTS = ("Once upon a time", "Lily and Tom went to the", "The dog was very", "One day a girl named")
LIMITS = (12, 5, 0, 12)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(stories_folder: Path) -> Any:
    return load_tokenizer(find_base_model(str(stories_folder)))


@pytest.mark.parametrize("tokens", [1, 40, 1000])
def test_greedy_answers_equal_those_of_transformers(
    stories_folder: Path, tokenizer: Any, tokens: int
) -> None:
    from transformers import AutoModelForCausalLM

    base = find_base_model(str(stories_folder))
    packed = PackedModel(load_model(base, dtype=torch.float32, device=CPU))
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    ours = generate(
        packed,
        [Request(-1, prompt, [[]]) for prompt in prompts],
        ends=[tokenizer.eos_token_id],
        new_tokens=LIMITS,
        device=CPU,
        tokens_per_pass=tokens,
    )
    plain = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    for prompt, answer, count in zip(prompts, ours, LIMITS, strict=True):
        theirs = plain.generate(
            torch.tensor([prompt]), max_new_tokens=max(1, count), do_sample=False, pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert answer == [token for token in theirs if token != tokenizer.eos_token_id][:count]


@pytest.mark.parametrize("engine", ["fused", "plain"])
def test_no_number_behind_the_first_token_is_no_answer(
    stories_folder: Path, tokenizer: Any, engine: Any
) -> None:
    base = find_base_model(str(stories_folder))
    model = load_model(base, dtype=torch.float32, device=CPU)
    packed = PackedModel(model, engine=engine)
    seen: list[list[int]] = []

    def stopped(answer: list[int]) -> bool:
        seen.append(list(answer))
        model.model.norm.weight.data.fill_(torch.nan)
        return False

    with pytest.raises(NoNumbersError, match="finds no finite logits behind 1 of 1 prompts"):
        generate(
            packed,
            [Request(-1, tokenizer(TEXTS[0])["input_ids"], [[]])],
            ends=[],
            new_tokens=[4],
            device=CPU,
            tokens_per_pass=100,
            stopped=stopped,
        )
    assert [len(answer) for answer in seen] == [1]


def naive(packed: PackedModel, request: Request, limit: int, end: int) -> list[int]:
    """The whole text again for every token, alone."""
    answer: list[int] = []
    with torch.no_grad(), packed.over_rows(request.task) as model:
        while len(answer) < limit:
            logits = model(
                input_ids=torch.tensor([request.prompt + answer]), use_cache=False
            ).logits
            token = int(logits[0, -1].argmax())
            if token == end:
                break
            answer.append(token)
    return answer


def test_each_row_is_answered_by_its_own_task(packed: PackedModel, requests: list[Request]) -> None:
    chosen = [Request(task, r.prompt, r.choices) for r in requests[::5] for task in (-1, 0, 2)]
    limits = [number % 7 for number in range(len(chosen))]
    ours = generate(packed, chosen, ends=[2], new_tokens=limits, device=CPU, tokens_per_pass=1500)
    assert ours == [naive(packed, r, n, 2) for r, n in zip(chosen, limits, strict=True)]
    assert len({tuple(answer[:2]) for answer in ours}) > 3


def test_the_packed_model_comes_back(packed: PackedModel, requests: list[Request]) -> None:
    packed = PackedModel(packed.model, packed.adapter, engine="plain")
    before = packed.model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), packed.over_rows(0):
        assert packed.model.config._attn_implementation == "sdpa"
        raise ZeroDivisionError
    assert packed.model.config._attn_implementation == before == "mtl_lora_packed"


def test_an_answer_ends_where_it_is_complete(packed: PackedModel, requests: list[Request]) -> None:
    def answered(stopped: Any) -> list[list[int]]:
        return generate(
            packed, requests[:6], ends=[2], new_tokens=[8] * 6, device=CPU, tokens_per_pass=2048,
            stopped=stopped,
        )  # fmt: skip

    whole = answered(lambda answer: False)
    cut = answered(lambda answer: len(answer) == 3)
    assert cut == [answer[:3] for answer in whole]


LINE = Reading(stop=("\n",))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" yes", 0),
        ("No, it is not", 1),
        ("maybe\nyes", -1),
        ("", -1),
        ("it is yes", -1),
        ("YES.", 0),
        ("\n\nyes\nno", 0),
    ],
)
def test_an_answer_is_the_choice_that_it_begins_with(text: str, expected: int) -> None:
    assert LINE.choice(text, ("yes", "no")) == expected


NAMES = Reading(extract="true|false|(?:solution|answer|ending|option)[1-5]")
SENTENCES = tuple(f"the correct answer is answer{number}" for number in (1, 2, 3))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the correct answer is answer2", 1),
        ("answer3, not answer1", 2),
        ("it is true that answer1\nis right", 0),  # no choice says true
        ("the correct answer is answer5", -1),
        ("the correct answer is Answer2", -1),  # case counts, as in LLM-Adapters
        ("the correct answer is", -1),
    ],
)
def test_an_answer_is_the_first_choice_that_is_found_in_it(text: str, expected: int) -> None:
    assert NAMES.choice(text, SENTENCES) == expected


# What the collection's commonsense_evaluate.py looks for, by data set.
THEIRS = {
    "boolq": r"true|false",
    "piqa": r"solution1|solution2",
    "ARC-Easy": r"answer1|answer2|answer3|answer4|answer5",
    "hellaswag": r"ending1|ending2|ending3|ending4",
    "winogrande": r"option1|option2",
}


@pytest.mark.parametrize("name", THEIRS)
def test_answers_are_read_as_in_llm_adapters(each_data_folder: Path, name: str) -> None:
    """On each row's own answer, and on words that its and other data sets' answers are made of."""
    _, _, template = find_template("llm_adapters", None)
    reading, renderer = reading_of(template), Renderer(template, name)
    words = [
        "the correct answer is",
        "true",
        "answer2",
        "solution1",
        "ending4",
        "option2",
        "\n",
        "no",
    ]
    generator = random.Random(0)
    with gzip.open(each_data_folder / "commonsense" / name / "test.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, 60)]
    for row in rows:
        example = renderer.render(row, name)
        assert reading.choice(row["output"], example.choices) == example.gold
        said = " ".join(generator.choices([*words, row["answer"]], k=generator.randrange(6)))
        theirs = [*re.findall(THEIRS[name], said.strip()), ""][0]
        ours = reading.choice(said, example.choices)
        assert (ours == example.gold) == (theirs == row["answer"]), said
        if not theirs:
            assert ours == -1


def test_a_group_is_what_counts() -> None:
    reading = Reading(stop=("Q:",), extract=r"#### (-?\d+)")
    assert reading.equal("so 3 + 4\n#### 7 Q: 3", "7 is four more\n#### 7") is True
    assert reading.equal("#### 8", "#### 7") is False
    assert reading.equal("Q: #### 7", "#### 7") is None  # nothing is left of it
    assert reading.complete(" Q:") and not reading.complete("Q")


def test_a_free_answer_is_compared_as_a_whole() -> None:
    assert Reading().equal(" a dog \n", "a dog") is True
    assert Reading().equal("a dog barks", "a dog") is False


def merged(packed: PackedModel, folder: Path, task: int) -> Any:
    """transformers' own model with W + ΔW_t in its weights; the base model for −1."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert packed.adapter is not None
    with torch.no_grad():
        for path, layer in packed.adapter.layers.items() if task >= 0 else ():
            down, up = layer.task_update(task)
            scale = layer.config.scale(layer.rank)
            plain.get_submodule(path).weight += (scale * up @ down).float()
    return plain


@pytest.mark.parametrize("engine", ["fused", "plain"])
def test_tasks_in_one_batch_are_transformers_generate_on_each_merged_model(
    packed: PackedModel, requests: list[Request], stories_folder: Path, engine: Any
) -> None:
    """Twelve prompts in as few as three rows, so that most get the place of one that has ended."""
    packed = PackedModel(packed.model, packed.adapter, engine=engine).eval()
    chosen = [replace(one, task=n % 4 - 1) for n, one in enumerate(requests[::2])]
    limits = [3 + 5 * n % 9 for n in range(len(chosen))]
    longest = max(len(one.prompt) + n for one, n in zip(chosen, limits, strict=True))
    ours = generate(
        packed, chosen, ends=[2], new_tokens=limits, device=CPU, tokens_per_pass=3 * longest
    )
    if engine == "fused":
        assert packed.kept_rows.rows < len(chosen) and packed.rows_agree
    for task in range(-1, 3):
        model = merged(packed, stories_folder, task)
        for number in range(task + 1, len(chosen), 4):
            prompt = torch.tensor([chosen[number].prompt])
            theirs = model.generate(
                prompt, max_new_tokens=limits[number], do_sample=False, pad_token_id=0
            )[0, prompt.shape[1] :].tolist()
            assert ours[number] == [token for token in theirs if token != 2]


def test_where_the_engine_says_something_else_transformers_answers(
    packed: PackedModel, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or where it says no number at all."""
    settings = {"ends": [2], "new_tokens": [5] * 4, "device": CPU, "tokens_per_pass": 2048}
    right = generate(packed, requests[:4], **settings)
    for wrong in (0.5, float("nan")):
        other = PackedModel(packed.model, packed.adapter).eval()
        assert other.decoder is not None
        with torch.inference_mode():
            last = other.decoder.last
            assert last.norm is not None
            worse = last.norm._replace(weight=last.norm.weight * wrong)
            other.decoder.last = replace(last, norm=worse)
        assert generate(other, requests[:4], **settings) == right
        assert set(other.rows_agree.values()) == {False} and other.kept_rows is None
