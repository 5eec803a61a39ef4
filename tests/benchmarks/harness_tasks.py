"""Real rows as requests, for us and for lm-evaluation-harness; what the two scripts beside share.

The commonsense files hold the LLM-Adapters format, which offers the answers inside the question and
asks for a name such as "answer2". Where a task is to be asked as the harness asks it, by the full text
of each answer, the question is taken apart again.
"""

from __future__ import annotations

import gzip
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mtl_lora_cli.tasks.registry import find_template
from mtl_lora_cli.tasks.rendering import Example, Renderer

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """One task: its template, the file of its rows, and what brings them into the template's form."""

    template: str
    file: str
    convert: Callable[[Row], Row] = lambda row: row


_PART = re.compile(r"\s*(?:Answer|Ending|Solution|Option)\d: ?")


def _parts(row: Row) -> tuple[str, list[str], int]:
    """The question without its first words, the full answers, and which is right."""
    text = row["instruction"].rpartition("Answer format:")[0].strip()
    question, *answers = _PART.split(text)
    return (
        question.partition(": ")[2],
        [answer.strip() for answer in answers],
        int(row["answer"][-1]) - 1,
    )


def _lettered(row: Row) -> Row:
    question, answers, gold = _parts(row)
    letters = "ABCDE"[: len(answers)]
    return {
        "question": question,
        "choices": {"text": answers, "label": list(letters)},
        "answerKey": letters[gold],
    }


def _piqa(row: Row) -> Row:
    question, answers, gold = _parts(row)
    return {"goal": question, "sol1": answers[0], "sol2": answers[1], "label": gold}


def _hellaswag(row: Row) -> Row:
    text, endings, gold = _parts(row)
    activity, _, context = text.partition(": ")
    return {"activity_label": activity, "ctx": context, "endings": endings, "label": gold}


def _boolq(row: Row) -> Row:
    text = row["instruction"].rpartition("Answer format:")[0]
    question = text.partition("question: ")[2].strip().removesuffix("?")
    return {"question": question, "answer": row["answer"]}


KINDS = {
    "arc_challenge": Kind("arc_challenge", "commonsense/ARC-Challenge/test", _lettered),
    "hellaswag": Kind("hellaswag", "commonsense/hellaswag/test", _hellaswag),
    "boolq": Kind("boolq_no_passage", "commonsense/boolq/test", _boolq),
    "piqa": Kind("piqa", "commonsense/piqa/test", _piqa),
    "arc_easy": Kind("arc_easy", "commonsense/ARC-Easy/test", _lettered),
    "openbookqa": Kind("llm_adapters", "commonsense/openbookqa/test"),
    "sst2": Kind("sst2", "glue/sst2/validation"),
    "rte": Kind("rte", "glue/rte/validation"),
    "mrpc": Kind("mrpc", "glue/mrpc/validation"),
    "stsb": Kind("stsb", "glue/stsb/validation"),
    "home_depot": Kind("home_depot", "ads/home_depot/test"),
    "amazon_google": Kind("product_matching", "ads/amazon_google/test"),
}


def read_examples(name: str, data: Path, rows: int | None) -> list[Example]:
    """The first rows of a task, rendered; a row whose answers are not distinct is passed over."""
    kind = KINDS[name]
    _, _, template = find_template(kind.template, None)
    renderer = Renderer(template, name)
    found = (kind.convert(row) for row in _rows(data / f"{kind.file}.jsonl.gz"))
    distinct = (row for row in found if _answers_differ(row))
    return [renderer.render(row, name) for row in itertools.islice(distinct, rows)]


def hflm(folder: Path, device: torch.device, dtype: torch.dtype, **options: Any) -> Any:
    """The harness's own model class on a transformers folder, asked one request at a time."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, **options)


def _rows(path: Path) -> Iterator[Row]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _answers_differ(row: Row) -> bool:
    answers: Sequence[str] = row.get("endings") or [row[k] for k in ("sol1", "sol2") if k in row]
    if "choices" in row:
        answers = row["choices"]["text"]
    return all(answers) and len(set(answers)) == len(answers)
