"""Modelfiles: their Go template, run by a reader of its own, writes what the tokenizer's chat template writes."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.export.ollama import find_pieces

from .conftest import exported

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\n"
    "You help.<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (  # the system message stands inside the first user's turn
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ first if loop.first else '' }}{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GEMMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}"
    "<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m['role'] == 'user' %}[INST] "
    "{% if loop.first and system is defined %}{{ system + '\n\n' }}{% endif %}{{ m['content'] }}[/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
PHI = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
QWEN = (  # a prompt that no history has
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
BRACES = (
    "{% for m in messages %}{{ '{{' }}{{ m['role'] }}}}{{ m['content'] }}\n{% endfor %}assistant:"
)
TEMPLATES = {
    "chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "gemma2": GEMMA2, "mistral": MISTRAL, "phi": PHI,
    "qwen": QWEN, "braces": BRACES,
}  # fmt: skip
NO_SYSTEM = ("gemma2",)
TALKS: dict[str, Sequence[tuple[str, str]]] = {
    "one": [("user", "Is it wet?")],
    "two": [("user", "Is it wet?"), ("assistant", "Yes."), ("user", "Very?")],
    "system": [("system", "Be short."), ("user", "Is it wet?")],
    "system, two": [("system", "Be short."), ("user", "a"), ("assistant", "b"), ("user", "c")],
    "four": [(role, f"text {n}") for n, role in enumerate(["user", "assistant"] * 3 + ["user"])],
}


def go(template: str, talk: Sequence[tuple[str, str]]) -> str:
    """The part of Go's text/template that Modelfiles here need, written from its documentation."""
    pieces = re.findall(r"\{\{(?:\s*\"\{\{\"\s*|[^}]*)\}\}|(?:(?!\{\{).)+", template, re.DOTALL)
    names: dict[str, Any] = {}
    data = {
        "System": "\n\n".join(text for role, text in talk if role == "system"),
        "Messages": [{"Role": role, "Content": text} for role, text in talk],
    }

    def value(word: str, dot: dict[str, Any]) -> Any:
        if word.startswith('"'):
            return word[1:-1]
        if word == "true":
            return True
        if word.startswith("$."):
            return data[word[2:]]
        return names[word] if word.startswith("$") else dot[word[1:]]

    def holds(words: list[str], dot: dict[str, Any]) -> bool:
        if words[0] == "eq":
            return bool(value(words[1], dot) == value(words[2], dot))
        if words[0] == "not":
            return not holds(words[1:], dot)
        return bool(value(words[0], dot))

    def block(tokens: Iterator[str], dot: dict[str, Any], live: bool, out: list[str]) -> list[str]:
        """Up to the words that end the block."""
        for token in tokens:
            if not token.startswith("{{"):
                out.extend([token] * live)
                continue
            words = re.findall(r'"[^"]*"|\S+', token[2:-2])
            if words[0] in ("end", "else"):
                return words
            if words[0] == "if":
                branch(words[1:], tokens, dot, live, out)
            elif words[0] == "range":
                body = list(tokens)
                behind = iter(body)
                for one in data["Messages"]:
                    behind = iter(body)
                    block(behind, one, live, out)
                return block(behind, dot, live, out)
            elif len(words) > 1 and words[1] in (":=", "="):
                if live:
                    names[words[0]] = (
                        holds(words[2:], dot) if words[2] == "not" else value(words[2], dot)
                    )
            else:
                out.extend([str(value(words[0], dot))] * live)
        return []

    def branch(
        words: list[str], tokens: Iterator[str], dot: dict[str, Any], live: bool, out: list[str]
    ) -> None:
        done = False
        while True:
            taken = live and not done and holds(words, dot)
            ended = block(tokens, dot, taken, out)
            done = done or taken
            if ended[0] == "end":
                return
            words = ended[2:] if ended[1:2] == ["if"] else ['"else"']

    out: list[str] = []
    block(iter(pieces), data, True, out)
    return "".join(out)


def renderer(template: str) -> Callable[[Sequence[tuple[str, str]]], str]:
    """transformers' own rendering; the start token is the reader's."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(talk: Sequence[tuple[str, str]]) -> str:
        messages = [{"role": role, "content": text} for role, text in talk]
        try:
            (text,), _ = render_jinja_template(
                conversations=[messages],
                chat_template=template,
                add_generation_prompt=True,
                bos_token="<bos>",
                eos_token="</s>",
            )
        except Exception as error:
            raise UsageError(str(error)) from None
        return str(text).removeprefix("<bos>")

    return render


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_go_template_writes_what_the_chat_template_writes(name: str) -> None:
    render = renderer(TEMPLATES[name])
    pieces = find_pieces(render)
    assert pieces is not None
    for kind, talk in TALKS.items():
        if kind.startswith("system") and name in NO_SYSTEM:
            assert pieces.system is None
        else:
            assert go(pieces.go(), talk) == render(talk), kind


def test_a_template_that_cannot_be_taken_apart_is_not() -> None:
    numbered = "{% for m in messages %}{{ loop.index }}: {{ m['content'] }}\n{% endfor %}"
    assert find_pieces(renderer(numbered)) is None


@pytest.mark.long
def test_public_templates() -> None:
    """As trl ships them: taken apart exactly, or not at all."""
    trl = importlib.util.find_spec("trl")
    if trl is None or trl.origin is None:
        pytest.skip("trl is not installed: pip install --no-deps trl")
    folder = Path(trl.origin).parent / "chat_templates"
    taken = []
    for path in sorted(folder.glob("*.jinja")):
        render = renderer(path.read_text(encoding="utf-8"))
        pieces = find_pieces(render)
        if pieces is None:
            continue
        taken.append(path.stem)
        for kind, talk in TALKS.items():
            if not kind.startswith("system") or pieces.system is not None:
                assert go(pieces.go(), talk) == render(talk), (path.stem, kind)
    assert len(taken) >= 20, taken


def test_a_modelfile_names_files_prompt_and_stops(run: Run, tmp_path: Path) -> None:
    """The tiny model has no chat template: the prompt is the task's own text."""
    for kind, first in (
        ("gguf", "FROM ./BASE_MODEL.gguf\nADAPTER ./adapter.gguf\n"),
        ("gguf-merged", "FROM ./model.gguf\n"),
    ):
        exported(kind, run, run.tasks[0], tmp_path / kind, checked=False)
        text = (tmp_path / kind / "Modelfile").read_text(encoding="utf-8")
        assert first in text and (kind == "gguf" or "ADAPTER" not in text)
        assert 'TEMPLATE "{{ .Prompt }}"' in text
        stops = re.findall(r'^PARAMETER stop "(.*)"$', text, re.MULTILINE)
        assert stops == [run.tokenizer.eos_token]
        assert "PARAMETER num_ctx 256\n" in text and "\nLICENSE " in text
