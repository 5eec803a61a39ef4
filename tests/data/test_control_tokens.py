"""Control tokens that rows bring are text; those that templates write stand once."""

from __future__ import annotations

import copy
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from mtl_lora_cli.data.bind import bind_tasks
from mtl_lora_cli.data.control_tokens import ControlTokens
from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.data.examples import Examples
from mtl_lora_cli.data.prepare import prepare_training
from mtl_lora_cli.data.written import one_turn
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.recipe.yaml_file import parse_document, validate_document
from mtl_lora_cli.tasks.rendering import Renderer
from mtl_lora_cli.tasks.task import Task
from mtl_lora_cli.tasks.template import Template

REVIEW = """\
description: Is a review good?
prompt: "Review: {{ sentence }} Good?"
label: label
choices: {0: no, 1: yes}
"""
BY_HAND = (
    'description: By hand\nprompt: "<s>[INST] {{ sentence }} [/INST]"\nanswer: "{{ label }}</s>"\n'
)
ROWS = [{"sentence": "a fine </s><s> film", "label": 1}, {"sentence": "dull", "label": 0}]


def spelled(tokenizer: Any, tokens: list[int]) -> str:
    """A text in which control tokens that are tokens stand in ⟦ ⟧."""
    control = tokenizer.added_tokens_decoder
    parts = groupby(tokens, key=lambda token: token in control)
    return "".join(
        "".join(f"⟦{control[token].content}⟧" for token in some)
        if known
        else tokenizer.decode(list(some))
        for known, some in parts
    )


@pytest.fixture
def prepared(stories_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Encode rows of a template as a run does: the tokens as text, and what is said."""
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path / "cache"))

    def make(
        template: str, rows: list[dict[str, Any]] = ROWS, **keys: Any
    ) -> tuple[list[str], list[str]]:
        (tmp_path / "task.yaml").write_text(template, encoding="utf-8")
        (tmp_path / "rows").mkdir(exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "rows" / "train.jsonl").write_text(lines, encoding="utf-8")
        tasks = [{"name": "a", "template": "task.yaml", "source": "rows"}]
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps({"tasks": tasks, "training": {"row_length": 256}, **keys}))
        loaded = load_recipe(path)
        tokenizer = copy.copy(stories_tokenizer)
        tokenizer.chat_template = (
            "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n"
            "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
        )
        data = prepare_training(bind_tasks(loaded), loaded.recipe, tokenizer, 512)
        split = data.splits[0]
        shown = [spelled(tokenizer, split.example(n).tolist()) for n in range(len(split))]
        return shown, data.audits[0].findings("a")

    return make


@pytest.mark.parametrize("form", ["plain", "chat"])
def test_a_row_brings_text(prepared: Any, form: str) -> None:
    shown, said = prepared(REVIEW, prompt_format=form)
    assert "a fine </s><s> film" in shown[0]
    assert [one.count("⟦<s>⟧") for one in shown] == [1, 1]
    assert [one.count("⟦</s>⟧") for one in shown] == [1 + (form == "chat")] * 2
    (line,) = [line for line in said if "control token" in line]
    assert line.startswith(
        "a: 1 of 2 training rows hold a control token of the tokenizer, which is"
    )
    assert line.endswith("read as text: </s>, " + line.rpartition(", ")[2])
    assert line.endswith("train.jsonl:1")


def test_a_free_answer_with_an_end_token_in_it_goes_on(prepared: Any) -> None:
    free = 'description: x\nprompt: "{{ sentence }}"\nanswer: "{{ label }}"\n'
    shown, _ = prepared(free, [{"sentence": "one", "label": "a </s> b"}])
    assert shown[0].endswith("a </s> b⟦</s>⟧")


def test_the_recipe_may_say_otherwise(prepared: Any) -> None:
    shown, _ = prepared(REVIEW, control_tokens="token")
    assert "⟦</s>⟧⟦<s>⟧" in shown[0]
    with pytest.raises(UsageError) as caught:
        prepared(REVIEW, control_tokens="error")
    (line,) = caught.value.lines
    assert "train.jsonl:1: task 'a': the row holds </s>, a control token" in line
    assert "control_tokens is error; text and token go on" in line


def test_what_a_template_writes_by_hand_stands_once_and_is_said(prepared: Any) -> None:
    shown, said = prepared(BY_HAND, [{"sentence": "a <s> film", "label": "x"}])
    assert [one.replace("⟧ ", "⟧") for one in shown] == ["⟦<s>⟧[INST] a <s> film [/INST] x⟦</s>⟧"]
    assert (
        "a: the template itself writes <s> (task.yaml:2), </s> (task.yaml:3); it is not set twice"
        in said
    )
    _, said = prepared(BY_HAND, [{"sentence": "a film", "label": "x"}], prompt_format="chat")
    assert any(
        line.endswith("</s> (task.yaml:3); the chat template writes its own") for line in said
    )


def test_cutting_leaves_a_start_token_written_by_hand(stories_tokenizer: Any) -> None:
    (prompt,), _ = Encoder(stories_tokenizer, "plain").continuations(
        ["<s>" + "a film " * 9], [["x"]]
    )
    assert prompt.shortened(4)[0] == stories_tokenizer.bos_token_id
    assert prompt.tokens[1] != stories_tokenizer.bos_token_id


def test_a_chat_is_what_transformers_makes_of_untrusted_messages(small_tokenizer: Any) -> None:
    encoder = Encoder(small_tokenizer, "chat")
    pair = one_turn("as <end><user> says: <model>", "<end> yes: y")
    theirs = small_tokenizer.apply_chat_template(pair, tokenize=True, sanitize_control_tokens=True)
    marked = [{**one, "content": encoder.control_tokens.marked(one["content"])} for one in pair]
    (ours,) = encoder.conversations([marked])
    names = small_tokenizer.convert_ids_to_tokens(ours.tokens)
    assert [name for name in names if name in ("<user>", "<model>", "<end>")] == [
        "<user>", "<end>", "<model>", "<end>"
    ]  # fmt: skip
    assert small_tokenizer.decode(ours.tokens) == small_tokenizer.decode(theirs["input_ids"])
    known = {number for number in theirs["input_ids"] if number > 259}
    assert known == {number for number in ours.tokens if number > 259}


def test_a_vocabulary_that_holds_control_tokens_as_pieces(tmp_path: Path) -> None:
    """A unigram model would find `</s>` among its pieces, were it there by that name."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((c, -1.0) for c in "</s>ab ")]
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.Unigram(pieces, 0, False)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    encoder = Encoder(made, "plain")
    (ours,) = encoder.conversations([one_turn(encoder.control_tokens.marked("a</s>b"), "a")])
    assert made.convert_ids_to_tokens(ours.tokens) == [
        "a",
        "<",
        "/",
        "s",
        ">",
        "b",
        " ",
        "a",
        "</s>",
    ]


def test_lists_and_labels_of_a_row_are_read_too(stories_tokenizer: Any) -> None:
    text = (
        "description: x\nprompt: \"{{ words|join(' ') }}?\"\nlabel: label\n"
        "choices: {each: options, labels: options}\n"
    )
    template = validate_document(parse_document(text, "t.yaml"), Template)
    row = {"words": ["a", "<s>"], "options": ["no", "</s>"], "label": "</s>"}
    example = Renderer(template, "t").render(row, "rows:1")
    held = Examples("train", [example], ["rows:1"], [row], "")
    control = ControlTokens(stories_tokenizer)
    task = Task("t", 0, "t.yaml", text, template, None)  # type: ignore[arg-type]
    (marked,) = control.mark(task, held).examples
    assert marked.gold == example.gold == 1
    assert marked.answer == marked.choices[1] == control.marked("</s>")
    assert marked.prompt == f"a {control.marked('<s>')}?"
