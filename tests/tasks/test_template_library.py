"""Every bundled template, on rows as the hub gives them and on the real files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mtl_lora_cli.tasks.reading import prefix_conflict
from mtl_lora_cli.tasks.registry import find_template, template_names
from mtl_lora_cli.tasks.rendering import Example, Renderer

MAPS_OF_PICTURES = ("samples/", "nyuv2/", "nyud_mt/", "pascal_context/")  # tests/pictures has those
LIBRARY = [name for name in template_names() if not name.startswith(MAPS_OF_PICTURES)]

# One row as each hub data set gives it, and the answer that is right.
HUB: dict[str, tuple[dict[str, Any], str]] = {
    "glue/cola": ({"sentence": "Me go.", "label": 0, "idx": 0}, "no"),
    "glue/sst2": ({"sentence": "lovely ", "label": 1, "idx": 0}, "positive"),
    "glue/mrpc": ({"sentence1": "a", "sentence2": "b", "label": 1, "idx": 0}, "yes"),
    "glue/qqp": ({"question1": "a", "question2": "b", "label": 0, "idx": 0}, "no"),
    "glue/stsb": ({"sentence1": "a", "sentence2": "b", "label": 3.8, "idx": 0}, "4.0"),
    "glue/mnli": ({"premise": "a", "hypothesis": "b", "label": 1, "idx": 0}, "maybe"),
    "glue/mnli_mismatched": ({"premise": "a", "hypothesis": "b", "label": 2, "idx": 0}, "no"),
    "glue/qnli": ({"question": "a", "sentence": "b", "label": 0, "idx": 0}, "yes"),
    "glue/rte": ({"sentence1": "a", "sentence2": "b", "label": 1, "idx": 0}, "no"),
    "glue/wnli": ({"sentence1": "a", "sentence2": "b", "label": 1, "idx": 0}, "yes"),
    "commonsense/boolq": ({"question": "is it", "answer": True, "passage": "It is."}, "yes"),
    "commonsense/boolq_no_passage": ({"question": "is it", "answer": False}, "no"),
    "commonsense/piqa": (
        {"goal": "Dry a shirt.", "sol1": "Hang it up.", "sol2": "Wet it.", "label": 0},
        "Hang it up.",
    ),
    "commonsense/social_i_qa": (
        {
            "context": "Kai sang.",
            "question": "Why?",
            "answerA": "joy",
            "answerB": "joy",
            "answerC": "rain",
            "label": "3",
        },
        "C",
    ),
    "commonsense/hellaswag": (
        {
            "ind": 4,
            "activity_label": "Shoes",
            "ctx": "[header] How to tie shoes [title] Sit down. [step] Take the laces.",
            "endings": ["[substeps] Pull them.", "Eat them.", "Sell them.", "Burn them."],
            "label": "0",
        },
        "Pull them.",
    ),
    "commonsense/winogrande": (
        {
            "sentence": "Ann beat Bea as _ was fast.",
            "option1": "Ann",
            "option2": "Bea",
            "answer": "1",
        },
        "Ann",
    ),
    "commonsense/arc_easy": (
        {
            "question": "What is wet?",
            "choices": {"text": ["sand", "water", "dust"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        },
        "water",
    ),
    "commonsense/arc_challenge": (
        {
            "question": "What is wet?",
            "choices": {"text": ["sand", "rock", "dust", "water"], "label": ["A", "B", "C", "D"]},
            "answerKey": "D",
        },
        "water",
    ),
    "commonsense/openbookqa": (
        {
            "question_stem": "Wet is",
            "choices": {"text": ["sky", "sea", "sky", "dust"], "label": ["A", "B", "C", "D"]},
            "answerKey": "B",
        },
        "B",
    ),
    "commonsense/commonsense_qa": (
        {
            "question": "Where is wet?",
            "question_concept": "wet",
            "choices": {"text": ["a", "b", "c", "d", "e"], "label": ["A", "B", "C", "D", "E"]},
            "answerKey": "E",
        },
        "E",
    ),
    "commonsense/copa": (
        {
            "premise": "The man fell.",
            "choice1": "It rained.",
            "choice2": "He slipped.",
            "question": "cause",
            "label": 1,
        },
        "he slipped.",
    ),
    "commonsense/llm_adapters": (
        {
            "instruction": "True or false?\n\nAnswer format: true/false",
            "input": "",
            "output": "the correct answer is true",
            "answer": "true",
        },
        "the correct answer is true",
    ),
    "ads/query_ad_relevance": ({"query": "shoes", "title": "Hats!", "label": "Bad"}, "bad"),
    "ads/home_depot": ({"query": "lamp", "product_title": "Lamp", "label": "relevant"}, "relevant"),
    "ads/esci": (
        {
            "query": "lamp",
            "product_title": "Bulb",
            "product_brand": None,
            "product_locale": "us",
            "esci_label": "Complement",
        },
        "complement",
    ),
    "ads/product_matching": (
        {
            "left": {"title": "a", "manufacturer": "x", "price": "1.0"},
            "right": {"title": "a"},
            "label": 1,
        },
        "yes",
    ),
    "instruct/messages": (
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello."},
            ]
        },
        "Hello.",
    ),
    "instruct/sharegpt": (
        {
            "id": "a1",
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello."},
            ],
        },
        "Hello.",
    ),
    "instruct/llava": (
        {
            "id": "1",
            "image": "1.jpg",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": "A cat."},
            ],
        },
        "A cat.",
    ),
    "instruct/messages_images": (
        {
            "messages": [
                {"role": "user", "content": "<image>What is it?"},
                {"role": "assistant", "content": "A cat."},
            ],
            "images": ["1.jpg"],
        },
        "A cat.",
    ),
    "instruct/alpaca": ({"instruction": "Add.", "input": "1, 2", "output": "3"}, "3"),
    "instruct/completion": ({"prompt": "1 + 2 =", "completion": " 3"}, "3"),
    "ads/click": ({"query": "shoes", "ad": "Shoes!", "click": 0}, "no"),
    "vision/statements_listed": (
        {"boxes": ["1.png", "2.png", "3.png"], "statements": "1. x", "answers": "1 no"},
        "1 no",
    ),
    "vision/box_described": (
        {"image": "1.png", "description": "a tower of 1: blue"},
        "a tower of 1: blue",
    ),
    "vision/box_counts": ({"image": "1.png", "thing": "blue item", "count": 2}, "2"),
    **{
        f"vision/easy_vqa_{kind}": (
            {"image": "1.png", "question": "what is it?", "answer": answer},
            answer,
        )
        for kind, answer in (("colour", "teal"), ("shape", "circle"), ("yes_no", "no"))
    },
    "vision/vqa_v2": (
        {"image": "1.jpg", "question": "What is it?", "answer": "cat", "answers": ["cat"] * 10},
        "cat",
    ),
    "vision/gqa": ({"image": "1.jpg", "question": "Is it red?", "answer": "yes"}, "yes"),
    "vision/nlvr2": (
        {"left": "1.png", "right": "2.png", "sentence": "Both are dogs.", "label": "False"},
        "no",
    ),
    "vision/coco_captions": (
        {"image": "1.jpg", "caption": "A cat sleeps.", "captions": ["A cat sleeps.", "A cat."]},
        "A cat sleeps.",
    ),
    "vision/product_title": ({"image": "1.jpg", "title": "A red cap"}, "A red cap"),
    "vision/statements_boxes": (
        {"boxes": ["1.png", "2.png", "3.png"], "sentence": "All are blue.", "label": "false"},
        "no",
    ),
    "vision/product_colour": ({"image": "1.jpg", "type": "Caps", "colour": "Red"}, "Red"),
    "vision/product_type": ({"image": "1.jpg", "type": "Caps"}, "Caps"),
    "vision/statements": (
        {"image": "1.png", "sentence": "There is a dog.", "label": "true"},
        "yes",
    ),
    "vision/title_matches": ({"image": "1.jpg", "title": "A red cap", "fits": "no"}, "no"),
}

# Which of the real files go with a template, and which of their splits is tested.
REAL = {
    "glue/cola": "validation",
    "glue/sst2": "validation",
    "glue/mrpc": "validation",
    "glue/qqp": "validation",
    "glue/stsb": "validation",
    "glue/mnli": "validation",
    "glue/qnli": "validation",
    "glue/rte": "validation",
    "glue/wnli": "validation",
    "ads/home_depot": "test",
    "ads/esci": "test",
    "ads/product_matching": "test",
}
FOLDERS = {"ads/esci": "ads/esci_us_sample", "ads/product_matching": "ads/amazon_google"}


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def rendered(name: str, path: Path) -> list[tuple[dict[str, Any], Example]]:
    rows = Renderer(find_template(name, None)[2], name)
    return [
        (row, rows.render(row, f"{path}:{number}")) for number, row in enumerate(lines_of(path), 1)
    ]


def rows_in_manifest(data_folder: Path) -> dict[str, int]:
    manifest = json.loads((data_folder / "manifest.json").read_text(encoding="utf-8"))
    return {entry["file"]: entry["rows"] for entry in manifest}


def test_the_library_is_tested_whole() -> None:
    assert sorted(HUB) == sorted(LIBRARY)


@pytest.mark.parametrize("name", template_names())
def test_every_template_is_found_by_its_name(name: str) -> None:
    full, path, template = find_template(name, None)
    assert (full, path) == (name, template_names()[name])
    assert template.description and "\n" not in template.description
    assert not template.description.startswith(" ")


@pytest.mark.parametrize("name", LIBRARY)
def test_a_row_as_the_hub_gives_it(name: str) -> None:
    row, answer = HUB[name]
    rows = Renderer(find_template(name, None)[2], name)
    example = rows.render(row, "hub:1")
    assert example.answer == answer
    assert prefix_conflict(example.choices) is None
    assert "None" not in example.prompt and "\n\n\n" not in example.prompt
    label = {"label", "answer", "answerKey", "esci_label", "click", "output", "completion"}
    unlabelled = {key: value for key, value in row.items() if key not in label}
    predicted = rows.render(unlabelled, "hub:1", labelled=False)
    assert (predicted.prompt, predicted.choices) == (example.prompt, example.choices)


def test_hellaswag_loses_its_marks() -> None:
    example = Renderer(find_template("hellaswag", None)[2], "h").render(
        HUB["commonsense/hellaswag"][0], "hub:1"
    )
    assert example.prompt == "Shoes: How to tie shoes. Sit down. Take the laces."


def test_stsb_names_its_grid() -> None:
    template = find_template("stsb", None)[2]
    assert template.labels == [step / 2 for step in range(11)]
    example = Renderer(template, "s").render(HUB["glue/stsb"][0], "hub:1")
    assert (example.value, example.gold) == (3.8, 8)


@pytest.mark.parametrize("name", REAL)
def test_every_row_of_a_file(name: str, each_data_folder: Path) -> None:
    file = f"{FOLDERS.get(name, name)}/{REAL[name]}.jsonl.gz"
    examples = rendered(name, each_data_folder / file)
    assert len(examples) == rows_in_manifest(each_data_folder)[file]
    labels = {str(row["label"]) for row, _ in examples}
    golds = {example.gold for _, example in examples}
    if name == "glue/stsb":
        assert max(abs(example.value - example.gold / 2) for _, example in examples) <= 0.25
    else:
        assert len(golds) == len(labels)  # each label has its own choice


def test_all_llm_adapters_test_files_say_what_their_output_says(each_data_folder: Path) -> None:
    count = 0
    for path in sorted((each_data_folder / "commonsense").glob("*/test.jsonl.gz")):
        for row, example in rendered("commonsense/llm_adapters", path):
            assert example.answer == row["output"]
            assert example.choices[example.gold].endswith(f" {row['answer']}")
            assert prefix_conflict(example.choices) is None
            count += 1
    assert count in (640, 13_377)  # ours, the real ones
