"""Bad recipes: as files, by their keys, by overrides."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .mistakes import RECIPE, TRAIN, Bad, more, recipe

CASES = [
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
    Bad(
        "quoting of a hub data set",
        ("recipe.yaml:5: tasks.0.source: 'quoting' goes with a path only",),
        files=recipe("color.jsonl", "{hub: owner/name, quoting: none}"),
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
        "unknown key: validate",
        ("recipe.yaml:9: adapter.ranck: unknown key; did you mean 'rank'?",),
        ("validate", "recipe.yaml"),
        more("adapter:\n  ranck: 4\n"),
    ),
    Bad(
        "a task by the name that stands for all",
        ("recipe.yaml:3: tasks.0.name: a task cannot be called 'all': --task all stands for every …",),
        files=recipe("name: color", "name: all"),
        early=False,
    ),
    Bad(
        "clipping below what is usual",
        ("recipe.yaml:8: training.clipping.relative: …",),
        files=more("training: {clipping: {relative: 0.5}}\n"),
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
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(case: Bad, refused: Callable[[Bad], None]) -> None:
    refused(case)
