"""Whatever is wrong with the recipe, the data or the call: one line a fault, code 2, no trace left.

Faults that show before the heavy libraries are loaded are met by a process that has loaded none; for
the others the command runs inside this one, because importing torch again for each would take minutes.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ..forks import Ended, Forks

RECIPE = """\
base_model: STORIES
tasks:
  - name: color
    template: color.yaml
    source: color.jsonl
run:
  name: new
"""
TEMPLATE = """\
description: Does a word name a color?
prompt: "{{ word }} is a color?"
label: label
choices: {yes: "yes", no: "no"}
"""
ROWS = '{"word": "red", "label": "yes"}\n{"word": "dog", "label": "no"}\n'
POINTER = """\
version https://git-lfs.github.com/spec/v1
oid sha256:4665a5ea423c2713d436b5ee50593a9640e0018c1550b5a0002f74190d6caea8
size 1048576
"""
FILES = {"recipe.yaml": RECIPE, "color.yaml": TEMPLATE, "color.jsonl": ROWS}

TRAIN = ("train", "recipe.yaml")
HEAVY = ("torch", "transformers", "datasets", "accelerate", "sklearn")


@dataclass(frozen=True)
class Bad:
    """One mistake.

    Attributes:
        name: what it is.
        errors: the expected lines after `error: `; one that ends in `…` names only a beginning.
            STORIES, TMP and RUNS stand for folders, here as in the arguments and files.
        arguments: of the command.
        files: beside or instead of the good ones; None takes one away.
        early: it is found before any heavy library is loaded, which a cold process shows.
    """

    name: str
    errors: tuple[str, ...]
    arguments: tuple[str, ...] = TRAIN
    files: Mapping[str, str | None] = field(default_factory=dict)
    early: bool = True


def recipe(before: str, after: str) -> dict[str, str | None]:
    """The good recipe with one change."""
    assert before in RECIPE
    return {"recipe.yaml": RECIPE.replace(before, after)}


def more(text: str) -> dict[str, str | None]:
    """The good recipe with lines behind it; they begin at line 8."""
    return {"recipe.yaml": RECIPE + text}


CASES = [
    # The recipe as a file.
    Bad(
        "no recipe named",
        ("a recipe is missing: mtl-lora train RECIPE",),
        ("train",),
    ),
    Bad(
        "missing recipe file",
        ("rezipe.yaml: no such recipe file…",),
        ("train", "rezipe.yaml"),
    ),
    Bad(
        "missing recipe file, near a bundled one",
        ("real-smal: no such recipe file; did you mean 'real-small'?…",),
        ("train", "real-smal"),
    ),
    Bad(
        "a folder as recipe",
        ("data: is a folder, expected a recipe file",),
        ("train", "data"),
        {"data/x.txt": "x"},
    ),
    Bad(
        "YAML that does not parse",
        ("recipe.yaml:3: not valid YAML: expected ',' or ']', but got ':'",),
        files={"recipe.yaml": "base_model: a\ntasks: [a, b\ntraining: {}\n"},
    ),
    Bad(
        "duplicate key",
        ("recipe.yaml:8: the key 'base_model' stands twice",),
        files=more("base_model: other\n"),
    ),
    Bad(
        "an empty recipe",
        ("recipe.yaml: expected keys and values, received None",),
        files={"recipe.yaml": "# nothing\n"},
    ),
    # The recipe's keys.
    Bad(
        "unknown key",
        ("recipe.yaml:9: adapter.ranck: unknown key; did you mean 'rank'?",),
        files=more("adapter:\n  ranck: 4\n"),
    ),
    Bad(
        "unknown key of a task",
        (
            "recipe.yaml:4: tasks.0.templat: unknown key; did you mean 'template'?",
            "recipe.yaml:3: tasks.0.template: is required and missing",
        ),
        files=recipe("template:", "templat:"),
    ),
    Bad(
        "shuffled ids of a method that knows no tasks",
        (
            "recipe.yaml:1: training.shuffled_tasks: adapter.method: moelora with tied: true has no part of a "
            "task's own, so shuffled ids change nothing; leave it out",
        ),
        files=more(
            "training: {shuffled_tasks: true}\nadapter: {method: moelora, tied: true}\n"
        ),
    ),
    Bad(
        "a control that the method does not have",
        ("recipe.yaml:10: adapter.tied: 'tied' is not read by method: multilora, only by…",),
        files=more("adapter:\n  method: multilora\n  tied: true\n"),
    ),
    Bad(
        "unknown part of the adapter",
        ("recipe.yaml:10: training.parts.gates: unknown key; did you mean 'gate'?",),
        files=more("training:\n  parts:\n    gates: {learning_rate: 1.0e-3}\n"),
    ),
    Bad(
        "diagnose as a word",
        (
            "recipe.yaml:9: training.diagnose: expected true, false or the keys below it, received 'often'",
        ),
        files=more("training:\n  diagnose: often\n"),
    ),
    Bad(
        "wrong type",
        (
            "recipe.yaml:9: training.learning_rate: input should be a valid number, "
            "received 'fast'",
        ),
        files=more("training:\n  learning_rate: fast\n"),
    ),
    Bad(
        "out of range",
        ("recipe.yaml:9: adapter.rank: input should be greater than 0, received 0",),
        files=more("adapter:\n  rank: 0\n"),
    ),
    Bad(
        "none of the possible words",
        (
            "recipe.yaml:8: mixing: input should be 'proportional', 'uniform' or 'weights', "
            "received 'sideways'…",
        ),
        files=more("mixing: sideways\n"),
    ),
    Bad(
        "wrong mixing temperature",
        ("recipe.yaml:8: mixing.temperature: input should be greater than 0, received -1",),
        files=more("mixing: {temperature: -1}\n"),
    ),
    *(
        Bad(
            f"mixing temperature {value}",
            (f"recipe.yaml:8: mixing.temperature: input should be {message}, received …",),
            files=more(f"mixing: {{temperature: {value}}}\n"),
        )
        for value, message in (
            ("0", "greater than 0"),
            (".inf", "a finite number"),
            (".nan", "a finite number"),
        )
    ),
    *(
        Bad(
            f"a weight of {value}",
            (f"recipe.yaml:6: tasks.0.sampling_weight: input should be {message}, received …",),
            files=recipe("color.jsonl\n", f"color.jsonl\n    sampling_weight: {value}\n"),
        )
        for value, message in (("-1", "greater than or equal to 0"), (".nan", "a finite number"))
    ),
    Bad(
        "weights that are all 0",
        ("recipe.yaml:1: mixing: weights needs a sampling_weight above 0",),
        files={
            "recipe.yaml": RECIPE.replace("color.jsonl", "color.jsonl\n    sampling_weight: 0")
            + "mixing: weights\n"
        },
    ),
    Bad(
        "more epochs than can be counted",
        ("recipe.yaml:8: training: 'epochs' above 100,000 need 'max_steps', received 1e+09…",),
        files=more("training: {epochs: 1.0e+9}\n"),
    ),
    Bad(
        "a share of no example",
        (
            "tasks: an epoch would draw no example: 'repeat' times the examples of each task rounds "
            "to 0",
        ),
        files=recipe("color.jsonl\n", "color.jsonl\n    repeat: 0.1\n"),
        early=False,
    ),
    Bad(
        "more examples than an epoch can hold",
        ("tasks: an epoch would draw 1,000,000,000,000,000 examples, more than 268,435,456; …",),
        files=recipe("color.jsonl\n", "color.jsonl\n    repeat: 1.0e+300\n"),
        early=False,
    ),
    Bad(
        "a task twice",
        ("recipe.yaml:2: tasks: the task 'color' stands twice; names must differ",),
        files=recipe("run:", "  - {name: color, template: t, source: s}\nrun:"),
    ),
    Bad(
        "several errors at once",
        (
            "recipe.yaml:1: base_modle: unknown key; did you mean 'base_model'?",
            "recipe.yaml:3: tasks.0.name: input should be a valid string, received 7",
            "recipe.yaml:9: adapter.rank: input should be a valid integer, received 'four'",
        ),
        files={
            "recipe.yaml": RECIPE.replace("base_model", "base_modle").replace("color\n", "7\n", 1)
            + "adapter:\n  rank: four\n"
        },
    ),
    Bad(
        "unset environment variable",
        (
            "recipe.yaml:5: tasks.0.source: the environment variable MTL_LORA_NO_SUCH_NAME "
            "is not set",
        ),
        files=recipe("color.jsonl", "${MTL_LORA_NO_SUCH_NAME}/color.jsonl"),
    ),
    # Overrides.
    Bad(
        "override without =",
        ("'training.seed': expected key.path=value, such as training.seed=1",),
        (*TRAIN, "training.seed"),
    ),
    Bad(
        "override of an unknown key",
        ("command line: training.sed: unknown key; did you mean 'seed'?",),
        (*TRAIN, "training.sed=1"),
    ),
    Bad(
        "override of a key that others have",
        (
            "command line: device: is no key: models run on the CUDA cards that CUDA_VISIBLE_DEVICES shows, or "
            "on the CPU; Apple's mps is not supported, for losses are summed in float64, which it has not",
        ),
        (*TRAIN, "device=mps"),
    ),
    Bad(
        "override of an unknown key with keys below it",
        ("command line: trainin: unknown key; did you mean 'training'?",),
        (*TRAIN, "trainin.seed=1"),
    ),
    Bad(
        "override of a wrong type",
        ("command line: training.seed: input should be a valid integer, received 'one'",),
        (*TRAIN, "training.seed=one"),
    ),
    Bad(
        "override of an unknown task",
        ("'tasks.colour.max_examples=3': no entry 'colour'; did you mean 'color'?; known: color",),
        (*TRAIN, "tasks.colour.max_examples=3"),
    ),
    Bad(
        "override below a word of a list",
        ("…",),
        (*TRAIN, "adapter.target_modules.0.x=1"),
        more("adapter:\n  target_modules: [q_proj]\n"),
    ),
    Bad(
        "override that is no YAML",
        ("'base_model=[a': the value is not valid YAML",),
        (*TRAIN, "base_model=[a"),
    ),
    # The call.
    Bad(
        "--run with a new run",
        ("--run goes with --resume; a new run is named by run.name=NAME",),
        (*TRAIN, "--run", "x"),
    ),
    Bad(
        "no run yet: eval",
        (
            "no run yet in runs; start one with: mtl-lora train RECIPE, or name one with --run",
        ),
        ("eval", "--task", "color"),
    ),
    Bad(
        "no run yet: merge",
        (
            "no run yet in runs; start one with: mtl-lora train RECIPE, or name one with --run",
        ),
        ("merge", "--task", "color"),
    ),
    Bad(
        "no run yet: train --resume",
        (
            "no run yet in runs; start one with: mtl-lora train RECIPE, or name one with --run",
        ),
        ("train", "--resume"),
    ),
    Bad(
        "no run yet: report",
        (
            "no run yet in runs; start one with: mtl-lora train RECIPE, or name one with --run",
        ),
        ("report",),
    ),
    Bad(
        "unknown run",
        ("no run 'smal' in RUNS; did you mean 'small'?; runs: small",),
        ("eval", "--task", "warm", "--run", "smal", "--runs", "RUNS"),
    ),
    Bad(
        "unknown split",
        ("--split: expected one of train, validation, test, received 'tset'",),
        ("eval", "--task", "warm", "--runs", "RUNS", "--split", "tset"),
    ),
    Bad(
        "unknown format of an export",
        ("--format: expected merged, peft, gguf, gguf-merged, onnx, received 'gguff'; did you mean 'gguf'?",),
        ("export", "--task", "warm", "--runs", "RUNS", "--format", "gguff"),
    ),
    Bad(
        "a lower rank of a merged model",
        ("--rank is for adapters; a merged model has none",),
        ("export", "--task", "warm", "--runs", "RUNS", "--format", "gguf-merged", "--rank", "2"),
    ),
    Bad(
        "inspect of a run with no finished adapter",
        ("run 'half' has no finished adapter; finish it with: …",),
        ("inspect", "--run", "half"),
        {"runs/half/recipe.yaml": "RUNS/small/recipe.yaml"},
    ),
    # What the recipe names: templates and data.
    Bad(
        "unknown template",
        (
            "recipe.yaml:4: tasks.0.template: unknown template 'glue/sst3'; "
            "did you mean 'glue/sst2'?",
        ),
        files=recipe("color.yaml", "glue/sst3"),
        early=False,
    ),
    Bad(
        "a fault in a template",
        ("TMP/color.yaml:5: scorring: unknown key; did you mean 'scoring'?",),
        files={"color.yaml": TEMPLATE + "scorring: argmax\n"},
        early=False,
    ),
    Bad(
        "missing data file",
        ("TMP/color.jsonl: source of task 'color': no such file or folder",),
        files={"color.jsonl": None},
        early=False,
    ),
    Bad(
        "empty data file",
        ("TMP/color.jsonl: has no rows, expected at least one",),
        files={"color.jsonl": ""},
        early=False,
    ),
    Bad(
        "a row that lacks a field",
        (
            "TMP/color.jsonl:2: task 'color': prompt: the row has no field 'word'; "
            "it has: wort, label; did you mean 'wort'?",
        ),
        files={"color.jsonl": ROWS.replace('"word": "dog"', '"wort": "dog"')},
        early=False,
    ),
    Bad(
        "a row that lacks its label",
        ("TMP/color.jsonl:2: task 'color': label: the row has no field 'label'; it has: word",),
        files={"color.jsonl": ROWS.replace(', "label": "no"', "")},
        early=False,
    ),
    Bad(
        "a label outside the choices",
        (
            "TMP/color.jsonl:2: task 'color': label: received 'maybe', "
            "expected one of 'yes', 'no'",
        ),
        files={"color.jsonl": ROWS.replace('"no"', '"maybe"')},
        early=False,
    ),
    Bad(
        "a line that is no JSON",
        ("TMP/color.jsonl:2: not valid JSON: …",),
        files={"color.jsonl": ROWS.replace('{"word": "dog"', '{word: "dog"')},
        early=False,
    ),
    Bad(
        "rows that are a Git LFS pointer",
        ("TMP/color.jsonl is a Git LFS pointer, not the file: git lfs pull",),
        files={"color.jsonl": POINTER},
        early=False,
    ),
    Bad(
        "rows that are a web page",
        ("TMP/color.jsonl is a web page, not the file: download the file itself",),
        files={"color.jsonl": "\n<!DOCTYPE html>\n<html></html>\n"},
        early=False,
    ),
    Bad(
        "a base model that is a Git LFS pointer",
        ("TMP/base/model.safetensors is a Git LFS pointer, not the file: git lfs pull",),
        files={
            **recipe("STORIES", "base"),
            "base/config.json": '{"model_type": "llama"}',
            "base/model.safetensors": POINTER,
        },
        early=False,
    ),
    Bad(
        "a GGUF file that is a Git LFS pointer",
        ("TMP/base.gguf is a Git LFS pointer, not the file: git lfs pull",),
        (*TRAIN, "base_model=base.gguf"),
        {"base.gguf": POINTER},
        early=False,
    ),
    Bad(
        "a table with another delimiter",
        (
            "TMP/color.csv:1: the only column is 'word;label'; say delimiter: ';' in the source",
        ),
        files={**recipe("color.jsonl", "color.csv"), "color.csv": "word;label\nred;yes\n"},
        early=False,
    ),
    Bad(
        "a quotation mark that never closes",
        (
            "TMP/color.csv:3: broken quoting: a quotation mark opens here and never closes; where "
            "quotation marks are text, say quoting: none in the source",
        ),
        files={
            **recipe("color.jsonl", "color.csv"),
            "color.csv": 'word,label\nred,yes\n"dog,no\ncat,no\n',
        },
        early=False,
    ),
    Bad(
        "a list in a prompt",
        (
            "TMP/color.jsonl:1: task 'color': prompt: a list (['red']) would be printed; in this row: "
            "word; say how, as in {{ word | join(', ') }}",
        ),
        files={"color.jsonl": '{"word": ["red"], "label": "yes"}\n'},
        early=False,
    ),
    Bad(
        "a method in a prompt",
        (
            "TMP/color.jsonl:1: task 'color': prompt: the method 'title' would be printed; in this row "
            "word has no field of that name",
        ),
        files={"color.yaml": TEMPLATE.replace("{{ word }}", "{{ word.title }}")},
        early=False,
    ),
    Bad(
        "a field with the name of the row",
        (
            "TMP/color.jsonl:1: task 'color': row: the template reads the whole row under this name, "
            "which a field of it has, too; call that another: columns: {row: …} in the source",
        ),
        files={
            "color.yaml": TEMPLATE.replace("{{ word }}", "{{ row['word'] }}"),
            "color.jsonl": '{"word": "red", "label": "yes", "row": 7}\n',
        },
        early=False,
    ),
    Bad(
        "a label that only looks like one",
        (
            "TMP/color.jsonl:2: task 'color': label: received 'n\u03bf' (written 'n\\u03bf'), "
            "expected one of 'yes', 'no'",
        ),
        files={"color.jsonl": ROWS.replace('"no"', '"n\u03bf"')},
        early=False,
    ),
    Bad(
        "a test split whose labels are kept back",
        (
            "TMP/folder/test.jsonl:1: task 'color': label: received '?', expected one of 'yes', 'no'; "
            "no test row has a right answer, as where labels are kept back: leave the split out with "
            "source: {path: TMP/folder, splits: {train: train.jsonl}}",
        ),
        files={
            **recipe("color.jsonl", "folder"),
            "folder/train.jsonl": ROWS,
            "folder/test.jsonl": '{"word": "blue", "label": "?"}\n',
        },
        early=False,
    ),
    Bad(
        "a folder of several data sets",
        (
            "TMP/folder: source of task 'color': holds several data sets: one, two/data; name one: "
            "path: TMP/folder/one",
        ),
        files={
            **recipe("color.jsonl", "folder"),
            "folder/one/train.jsonl": ROWS,
            "folder/two/data/train.jsonl": ROWS,
        },
        early=False,
    ),
    Bad(
        "columns of a file that has a header",
        (
            "TMP/color.csv:1: the first line is a header, it has 'word'; columns as a list goes with "
            "files without one, columns: {OLD: NEW} renames",
        ),
        files={
            **recipe("color.jsonl", "{path: color.csv, columns: [word, label]}"),
            "color.csv": "word,label\nred,yes\n",
        },
        early=False,
    ),
    Bad(
        "quoting of a hub data set",
        ("recipe.yaml:5: tasks.0.source: 'quoting' goes with a path only",),
        files=recipe("color.jsonl", "{hub: owner/name, quoting: none}"),
    ),
    Bad(
        "unknown key of a source: tasks show",
        ("--source:1: quotin: unknown key; did you mean 'quoting'?",),
        ("tasks", "show", "color.yaml", "--source", "{path: color.jsonl, quotin: none}"),
    ),
    Bad(
        "a row with another number of fields",
        (
            "TMP/color.tsv:3: expected 2 columns (word, label), received 3; broken_rows: drop in "
            "the source leaves such rows out",
        ),
        files={
            **recipe("color.jsonl", "color.tsv"),
            "color.tsv": "word\tlabel\nred\tyes\ndog\tno\tno\n",
        },
        early=False,
    ),
    Bad(
        "a source without a train split",
        ("task 'color': its source has no train split",),
        files={**recipe("color.jsonl", "folder"), "folder/test.jsonl": ROWS},
        early=False,
    ),
    Bad(
        "an example longer than a row",
        (
            "TMP/color.jsonl:1: task 'color': the example has 14 tokens, rows hold 8 "
            "(2 of 2 examples are too long); raise training.row_length, "
            "or set training.on_overflow to drop or truncate_prompt",
        ),
        files=more("training: {row_length: 8, on_overflow: error}\n"),
        early=False,
    ),
    # What the recipe names: the base model.
    Bad(
        "no such folder",
        ("base_model: './nowhere' does not exist",),
        (*TRAIN, "base_model=./nowhere"),
        early=False,
    ),
    Bad(
        "a folder that holds no model",
        ("base_model: 'empty': TMP/empty holds no config.json",),
        (*TRAIN, "base_model=empty"),
        {"empty/x.txt": "x"},
        early=False,
    ),
    Bad(
        "no such GGUF file",
        ("base_model: 'models/nowhere.gguf' does not exist",),
        (*TRAIN, "base_model=models/nowhere.gguf"),
        early=False,
    ),
    Bad(
        "a GGUF file that is none",
        ("TMP/text.gguf: not a GGUF file (it starts with b'text', expected b'GGUF')",),
        (*TRAIN, "base_model=text.gguf"),
        {"text.gguf": "text"},
        early=False,
    ),
    Bad(
        "a hub id that cannot be had",
        (
            "base_model: 'nobody/nothing' is no folder here and cannot be had from the hub: …",
        ),
        (*TRAIN, "base_model=nobody/nothing"),
        early=False,
    ),
    Bad(
        "unknown alias",
        (
            "base_model: 'smollm2-135' is no alias, folder, .gguf file or hub id; "
            "did you mean 'smollm2-135m'?; aliases: smollm2-135m, dinov2-small, smollm2-135m-vision",
        ),
        (*TRAIN, "base_model=smollm2-135"),
        early=False,
    ),
    Bad(
        "a target module that matches nothing",
        (
            "adapter.target_modules: 'q_prog' matches no linear layer of the model; did you mean "
            "'q_proj'?; linear layers: down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, "
            "up_proj, v_proj",
        ),
        (*TRAIN, "adapter.target_modules=[q_prog]"),
        early=False,
    ),
    Bad(
        "a part that the adapter does not have",
        ("training.parts: this adapter (method lora) has no gate; its parts: down, up",),
        files=more(
            "adapter:\n  method: lora\ntraining:\n  parts: {gate: {learning_rate: 1.0e-3}}\n"
        ),
        early=False,
    ),
    Bad(
        "validation without a validation split",
        ("recipe.yaml:9: training.validation: no task's source has a validation split",),
        files=more("training:\n  validation: {every: 5}\n"),
        early=False,
    ),
    Bad(
        "chat without a chat template",
        ("prompt_format: chat needs a tokenizer with a chat template; use plain",),
        (*TRAIN, "prompt_format=chat"),
        early=False,
    ),
    Bad(
        "metrics that do not fit a task's answers",
        ("recipe.yaml:5: tasks.0.metrics: 'rouge_l' does not fit; possible here: accuracy…",),
        files={"recipe.yaml": "base_model: STORIES\ntasks:\n  - name: a\n    template: color.yaml\n    metrics: [rouge_l]\n"},
        early=False,
    ),
    Bad(
        "a key of chats beside plain prompts",
        ("recipe.yaml:8: chat: is read with prompt_format: chat only…",),
        files=more("chat: {answers: conversation}\n"),
    ),
    Bad(
        "a date that is none",
        (
            "recipe.yaml:9: chat.date: expected a date such as 2026-11-30 or 2026-11-30T12:00:00, received 'soon'",
        ),
        files=more("prompt_format: chat\nchat: {date: soon}\n"),
    ),
    Bad(
        "the messages as a variable of the chat template",
        (
            "recipe.yaml:9: chat.template_kwargs: 'messages' is no variable of a chat template that can be given…",
        ),
        files=more("prompt_format: chat\nchat: {template_kwargs: {messages: []}}\n"),
    ),
    Bad(
        "a control token in a row",
        (
            "TMP/color.jsonl:2: task 'color': the row holds </s>, a control token of the tokenizer, and "
            "control_tokens is error; text and token go on",
        ),
        (*TRAIN, "control_tokens=error"),
        {"color.jsonl": '{"word": "red", "label": "yes"}\n{"word": "a</s>b", "label": "no"}\n'},
        early=False,
    ),
    # The other commands that read a recipe, a template or a source.
    Bad(
        "unknown key: validate",
        ("recipe.yaml:9: adapter.ranck: unknown key; did you mean 'rank'?",),
        ("validate", "recipe.yaml"),
        more("adapter:\n  ranck: 4\n"),
    ),
    Bad(
        "a label outside the choices: validate",
        (
            "TMP/color.jsonl:2: task 'color': label: received 'maybe', "
            "expected one of 'yes', 'no'",
        ),
        ("validate", "recipe.yaml"),
        {"color.jsonl": ROWS.replace('"no"', '"maybe"')},
        early=False,
    ),
    Bad(
        "unknown task: data show",
        ("unknown task 'colour'; did you mean 'color'?…",),
        ("data", "show", "recipe.yaml", "--task", "colour"),
        early=False,
    ),
    Bad(
        "unknown template: tasks show",
        ("unknown template 'sst3'; did you mean 'sst2'?",),
        ("tasks", "show", "sst3"),
    ),
    Bad(
        "a sample's name that is none: tasks show",
        ("…",),
        ("tasks", "show", "sst2", "--source", "sample:a b"),
    ),
    Bad(
        "a task by the name that stands for all",
        ("recipe.yaml:3: tasks.0.name: a task cannot be called 'all': --task all stands for every …",),
        files=recipe("name: color", "name: all"),
        early=False,
    ),
    Bad(
        "a task of a column by the name that stands for all",
        ("recipe.yaml:3: tasks.0.name: a task cannot be called 'all': --task all stands for every …",),
        files={
            **recipe("color.jsonl", "{path: rows.jsonl, task_column: kind}"),
            "rows.jsonl": '{"word": "red", "label": "yes", "kind": "all"}\n',
        },
        early=False,
    ),
    Bad(
        "a label that is an index and an option",
        (
            "TMP/color.jsonl:1: task 'color': label: 2 fits in two ways: as the option '2' and as the "
            "index of '3'; say which with choices: {each: …, labels: …}",
        ),
        ("validate", "recipe.yaml"),
        {
            "color.yaml": "description: x\nprompt: '{{ word }}'\nlabel: label\nchoices: {each: options}\n",
            "color.jsonl": '{"word": "two", "options": ["1", "2", "3"], "label": 2}\n',
        },
        early=False,
    ),
    Bad(
        "a label that is an index and a text of the list",
        (
            "TMP/color.jsonl:1: task 'color': label: 1 fits in two ways: as the option '1' and as the "
            "index of '2'; say which with choices: {label: text, …}",
        ),
        ("validate", "recipe.yaml"),
        {
            "color.yaml": "description: x\nprompt: '{{ word }}'\nlabel: label\nchoices: ['1', '2']\n",
            "color.jsonl": '{"word": "two", "label": 1}\n',
        },
        early=False,
    ),
    Bad(
        "a label that fits two labels in other letters",
        ("TMP/color.jsonl:1: task 'color': label: 'YES' fits two of 'yes', 'Yes'",),
        ("validate", "recipe.yaml"),
        {
            "color.yaml": "description: x\nprompt: '{{ word }}'\nlabel: label\nchoices: {'yes': a, 'Yes': b}\n",
            "color.jsonl": '{"word": "two", "label": "YES"}\n',
        },
        early=False,
    ),
    Bad(
        "a right answer that its own stop text cuts",
        (
            "TMP/color.jsonl:2: task 'color': generate.stop ',' stands in the answer 'red, blue' and "
            "ends it: it could never be right",
        ),
        ("validate", "recipe.yaml"),
        {
            "color.yaml": "description: x\nprompt: '{{ word }}'\nanswer: '{{ label }}'\ngenerate: {stop: [',']}\n",
            "color.jsonl": '{"word": "one", "label": "red"}\n{"word": "two", "label": "red, blue"}\n',
        },
        early=False,
    ),
    Bad(
        "a right answer of two lines that is read to the line's end",
        (
            "TMP/color.jsonl:1: task 'color': generate.stop '\\n' stands in the answer 'red\\nblue' and "
            "ends it: it could never be right",
        ),
        ("validate", "recipe.yaml"),
        {
            "color.yaml": "description: x\nprompt: '{{ word }}'\nanswer: '{{ label }}'\ngenerate: {stop: [\"\\n\"]}\n",
            "color.jsonl": '{"word": "one", "label": "red\\nblue"}\n',
        },
        early=False,
    ),
    Bad(
        "a right answer in which nothing is found",
        (
            "TMP/color.jsonl:2: task 'color': generate.extract '[0-9]+' finds nothing in the answer "
            "'none': it could never be right",
        ),
        ("validate", "recipe.yaml"),
        {
            "color.yaml": "description: x\nprompt: '{{ word }}'\nanswer: '{{ label }}'\ngenerate: {extract: '[0-9]+'}\n",
            "color.jsonl": '{"word": "one", "label": "1"}\n{"word": "two", "label": "none"}\n',
        },
        early=False,
    ),
    # What lies there already.
    Bad(
        "a run folder that exists",
        ("run folder runs/new exists; choose another run.name, or go on with: …",),
        files={"runs/new/notes.txt": "mine"},
        early=False,
    ),
    Bad(
        "a run folder that exists, found in a dry run",
        ("run folder runs/new exists; choose another run.name, or go on with: …",),
        (*TRAIN, "--dry-run"),
        {"runs/new/notes.txt": "mine"},
        early=False,
    ),
    Bad(
        "unknown task in eval",
        ("unknown task 'warn'; did you mean 'warm'?; tasks of this run: warm, cold",),
        ("eval", "--task", "warn", "--runs", "RUNS"),
        early=False,
    ),
    Bad(
        "unknown task in merge",
        ("unknown task 'warn'; did you mean 'warm'?; tasks of this run: warm, cold",),
        ("merge", "--task", "warn", "--runs", "RUNS"),
        early=False,
    ),
    Bad(
        "a split that the source lacks",
        ("task 'warm': its source has no validation split",),
        ("eval", "--task", "warm", "--runs", "RUNS", "--split", "validation"),
        early=False,
    ),
    Bad(
        "unknown protocol",
        ("--protocol: expected one of choices, generate, lm-eval, received 'choice'; did you mean 'choices'?",),
        ("eval", "--task", "warm", "--runs", "RUNS", "--protocol", "choice"),
        early=False,
    ),
    Bad(
        "unknown normalisation",
        ("--normalisation: expected one of sum, token, character, received 'char'…",),
        ("eval", "--task", "warm", "--runs", "RUNS", "--normalisation", "char"),
        early=False,
    ),
    Bad(
        "a normalisation of generated answers",
        ("--normalisation goes with --protocol choices",),
        ("eval", "--task", "warm", "--runs", "RUNS", "--protocol", "generate", "--normalisation", "sum"),
        early=False,
    ),
    Bad(
        "answers that are drawn where none is generated",
        ("--temperature: no answer of warm is generated; use --protocol generate",),
        ("eval", "--task", "warm", "--runs", "RUNS", "--temperature", "1"),
        early=False,
    ),
    Bad(
        "several answers that are all alike",
        ("--answers: several answers are alike without --temperature above 0",),
        ("eval", "--task", "warm", "--runs", "RUNS", "--answers", "3"),
    ),
    Bad(
        "several answers beside another run's",
        ("--answers above 1 goes without --baseline and --against",),
        ("eval", "--task", "warm", "--runs", "RUNS", "--answers", "3", "--temperature", "1", "--against", "."),
    ),
    Bad(
        "drawn answers of the harness",
        ("--temperature goes with --protocol generate",),
        ("eval", "--task", "warm", "--runs", "RUNS", "--temperature", "1", "--protocol", "lm-eval"),
        early=False,
    ),
    Bad(
        "eval of a run with no finished adapter",
        ("run 'half' has no finished adapter; finish it with: …",),
        ("eval", "--task", "warm", "--run", "half"),
        {"runs/half/recipe.yaml": "RUNS/small/recipe.yaml", "runs/half/tasks.json": "RUNS/small/tasks.json"},
        early=False,
    ),
    Bad(
        "merge into a folder that is not empty",
        ("output folder full exists and is not empty; choose another with --output",),
        ("merge", "--task", "warm", "--runs", "RUNS", "--output", "full"),
        {"full/x.txt": "x"},
        early=False,
    ),
    *(
        Bad(
            f"{command} below a file",
            ("output folder a/b/c: a is a file, expected a folder",),
            (command, "--task", "warm", "--runs", "RUNS", "--output", "a/b/c"),
            {"a": "x"},
            early=False,
        )
        for command in ("merge", "export")
    ),
    Bad(
        "eval of a run whose results cannot be written",
        ("run 'half': runs/half/evaluations is a file, expected a folder",),
        ("eval", "--task", "warm", "--run", "half"),
        {
            "runs/half/recipe.yaml": "RUNS/small/recipe.yaml",
            "runs/half/tasks.json": "RUNS/small/tasks.json",
            "runs/half/evaluations": "x",
        },
        early=False,
    ),
    Bad(
        "an empty field where the prompt prints a text",
        (
            "TMP/color.jsonl:2: task 'color': word: is empty or blank, expected a text (1 of 2 training "
            "rows have such a field); blank_fields: note goes on",
        ),
        files={
            **more("blank_fields: error\n"),
            "color.jsonl": '{"word": "red", "label": "yes"}\n{"word": " ", "label": "no"}\n',
        },
        early=False,
    ),
    Bad(
        "merge of all tasks into one folder",
        ("--output names one folder; merge one task at a time with it",),
        ("merge", "--task", "all", "--runs", "RUNS", "--output", "one"),
        early=False,
    ),
    Bad(
        "an export at a higher rank than the adapter's",
        ("--rank 9: the update of task 'warm' has rank 8; expected at most that",),
        ("export", "--task", "warm", "--runs", "RUNS", "--rank", "9"),
        early=False,
    ),
    Bad(
        "a picture of a kind that cannot be written",
        ("--output: expected a file ending in …",),
        ("inspect", "--runs", "RUNS", "--output", "adapter.txt"),
        early=False,
    ),
    Bad(
        "merge of a run with no finished adapter",
        ("run 'half' has no finished adapter; finish it with: …",),
        ("merge", "--task", "warm", "--run", "half"),
        {"runs/half/recipe.yaml": "RUNS/small/recipe.yaml", "runs/half/tasks.json": "RUNS/small/tasks.json"},
        early=False,
    ),
    Bad(
        "merge into weights of no kind",
        ("--base: expected original or dequantized, received 'orginal'; did you mean 'original'?",),
        ("merge", "--task", "warm", "--runs", "RUNS", "--base", "orginal"),
        early=False,
    ),
    Bad(
        "dequantized weights of a run that is not quantised",
        (
            "--base dequantized is for quantised runs; run 'small' has quantization: none, so the "
            "original weights are what it saw",
        ),
        ("merge", "--task", "warm", "--runs", "RUNS", "--base", "dequantized"),
        early=False,
    ),
    Bad(
        "pushing several tasks into one repository",
        ("--push names one repository; push one task at a time",),
        ("merge", "--task", "all", "--runs", "RUNS", "--push", "me/it"),
        early=False,
    ),
    Bad(
        "pushing what nobody checked",
        ("--push does not go with --no-check: what is passed on has been compared",),
        ("merge", "--task", "warm", "--runs", "RUNS", "--push", "me/it", "--no-check"),
        early=False,
    ),
    Bad(
        "pushing to what is no name",
        ("--push: Repo id must …",),
        ("export", "--task", "warm", "--runs", "RUNS", "--push", "me/it/there"),
        early=False,
    ),
    Bad(
        "adding a task to a run with no finished adapter",
        ("run 'half' has no finished adapter; finish it with: …",),
        ("add-task", "recipe.yaml", "--run", "half"),
        {"runs/half/recipe.yaml": "RUNS/small/recipe.yaml", "runs/half/tasks.json": "RUNS/small/tasks.json"},
    ),
    Bad(
        "adding a task that the run has",
        ("recipe.yaml:2: tasks: run 'small' has a task 'warm' already; choose another name",),
        ("add-task", "recipe.yaml", "--runs", "RUNS"),
        recipe("name: color", "name: warm"),
        early=False,
    ),
    Bad(
        "adding a task on another adapter",
        (
            "the recipe differs from that of run 'small', which it adds to: adapter.rank: 8 → 4; "
            "adapter.gate: 'embedding' → 'weights'",
        ),
        ("add-task", "recipe.yaml", "adapter.gate=weights", "--runs", "RUNS"),
        more("adapter: {rank: 4}\n"),
        early=False,
    ),
    Bad(
        "adding a task and asking for cosines between tasks",
        ("recipe.yaml:8: training.diagnose: looks at what tasks share, which does not learn here",),
        ("add-task", "recipe.yaml", "--runs", "RUNS"),
        more("training: {diagnose: true}\n"),
        early=False,
    ),
    Bad(
        "adding a task under the name of a run that exists",
        ("run folder RUNS/small exists; choose another run.name, …",),
        ("add-task", "recipe.yaml", "run.name=small", "--runs", "RUNS"),
        early=False,
    ),
    Bad(
        "resuming a finished run",
        ("run 'small' is finished; nothing is left to resume",),
        ("train", "--resume", "--runs", "RUNS"),
        early=False,
    ),
    Bad(
        "beginning at a run that is not there",
        ("no run 'nobody' in runs; runs: none",),
        ("train", "recipe.yaml", "--from", "nobody"),
    ),
    Bad(
        "beginning at a run, and going on with another",
        ("--from goes without --resume and --find-rate",),
        ("train", "--resume", "--from", "small", "--runs", "RUNS"),
    ),
    Bad(
        "beginning at another adapter",
        (
            "the recipe differs from that of run 'small', at which it begins: …",
        ),
        ("train", "recipe.yaml", "--from", "small", "adapter.rank=3", "--runs", "RUNS"),
        early=False,
    ),
    Bad(
        "clipping below what is usual",
        ("recipe.yaml:8: training.clipping.relative: …",),
        files=more("training: {clipping: {relative: 0.5}}\n"),
    ),
    Bad(
        "parts of a larger rank than the layer's",
        ("recipe.yaml:8: adapter: 'up_rank' is at most the rank of a layer, 4, received 8",),
        files=more("adapter: {method: mtl-lora-fine, rank: 4, up_rank: 8}\n"),
    ),
    Bad(
        "a start from the gradient where there is none",
        (
            "recipe.yaml:8: adapter: 'down_start: gradient' is not for multilora: its A has no gradient at the "
            "start",
        ),
        files=more("adapter: {method: multilora, down_start: gradient}\n"),
    ),
    # What strangers may have made.
    Bad(
        "a base model that is a pickle",
        (
            "base_model: 'base': TMP/base holds no safetensors weights; pytorch_model.bin is a pickle, "
            "which can run any code when it is read: save the model as safetensors on a machine where "
            "you trust it",
        ),
        files={
            **recipe("STORIES", "base"),
            "base/config.json": '{"model_type": "llama"}',
            "base/pytorch_model.bin": "x",
        },
        early=False,
    ),
    Bad(
        "a base model with code of its own",
        (
            "base_model: 'base': its folder brings Python code of its own, which is never run; use a "
            "model that transformers knows itself",
        ),
        files={
            **recipe("STORIES", "base"),
            "base/config.json": '{"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}',
            "base/code.py": "raise SystemExit('it ran')",
            "base/model.safetensors": "x",
        },
        early=False,
    ),
    Bad(
        "a template that reaches for Python",
        ("TMP/color.jsonl:1: task 'color': prompt: access to attribute '__class__' of …",),
        files={"color.yaml": TEMPLATE.replace("{{ word }}", "{{ word.__class__.__mro__ }}")},
        early=False,
    ),
    Bad(
        "a task's name in the data that leads out of a folder",
        (
            "TMP/rows.jsonl:1: kind: '../../out' cannot be a task's name: letters, digits, '.', '_' and "
            "'-', the first a letter or a digit, 80 at most; give such values names in task_names",
        ),
        files={
            **recipe("color.jsonl", "{path: rows.jsonl, task_column: kind}"),
            "rows.jsonl": '{"word": "red", "label": "yes", "kind": "../../out"}\n',
        },
        early=False,
    ),
    Bad(
        "a run's name that leads out of a folder",
        ("recipe.yaml:7: run.name: string should match pattern …",),
        files=recipe("name: new", "name: ../new"),
    ),
    Bad(
        "a recipe that builds Python objects",
        ("recipe.yaml:8: not valid YAML: could not determine a constructor for the tag …",),
        files=more("mixing: !!python/object/apply:os.system [exit]\n"),
    ),
    Bad(
        "a DeepSpeed file that writes elsewhere",
        (
            "TMP/ds.json: csv_monitor: is not done: it writes outside of the run folder",
            "TMP/ds.json: flops_profiler.output_file: is not done: it writes outside of the run folder",
        ),
        files={
            **more("distributed: {zero_stage: 1, deepspeed: ds.json}\n"),
            "ds.json": '{"csv_monitor": {"enabled": true}, "flops_profiler": {"output_file": "/x"}}',
        },
        early=False,
    ),
]  # fmt: skip


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything below a folder, with size and time of change."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
    }


def lay_out(folder: Path, case: Bad, fill: Callable[[str], str]) -> None:
    """Write the good files, with the case's in their place.

    A text that is a path below RUNS stands for that file's content.
    """
    for name, text in {**FILES, **case.files}.items():
        if text is None:
            continue
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        filled = fill(text)
        if text.startswith("RUNS/"):
            filled = Path(filled).read_text(encoding="utf-8")
        path.write_text(filled, encoding="utf-8")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(
    case: Bad, tmp_path: Path, stories_folder: Path, request: pytest.FixtureRequest
) -> None:
    names = {"STORIES": str(stories_folder.resolve()), "TMP": str(tmp_path)}
    if "RUNS" in case.arguments or any("RUNS" in str(text) for text in case.files.values()):
        names["RUNS"] = str(request.getfixturevalue("small_run")[0].parent)

    def fill(text: str) -> str:
        for name, value in names.items():
            text = text.replace(name, value)
        return text

    lay_out(tmp_path, case, fill)
    arguments = [fill(argument) for argument in case.arguments]
    watched = [tmp_path, *([Path(names["RUNS"])] if "RUNS" in names else [])]
    before = [listing(folder) for folder in watched]

    finished: subprocess.CompletedProcess[str] | Ended
    if case.early:
        cold: Forks = request.getfixturevalue("cold")
        finished = cold.run(*arguments, cwd=tmp_path, heavy=HEAVY)
        assert finished.loaded == ()
    else:
        finished = request.getfixturevalue("invoke")(*arguments)

    lines = finished.stderr.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    progress = [line for line in lines if line not in errors]
    expected = [f"error: {fill(error)}" for error in case.errors]
    assert len(errors) == len(expected), finished.stderr
    for received, right in zip(sorted(errors), sorted(expected), strict=True):
        if right.endswith("…"):
            assert received.startswith(right.removesuffix("…"))
        else:
            assert received == right
    assert finished.returncode == 2
    assert finished.stdout == ""
    if case.early:
        assert progress == []
    assert lines[len(progress) :] == errors, "the fault is the last thing said"
    assert "Traceback" not in finished.stderr
    assert [listing(folder) for folder in watched] == before, "something was written"
