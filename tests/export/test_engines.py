"""Three tasks of a run in the engines that serve them, rows mixed: the answers are those that `predict` gives.

vLLM runs in an environment of its own, whose interpreter MTL_LORA_VLLM_PYTHON names; llama.cpp's server is the program that
MTL_LORA_LLAMA_SERVER names, or `llama-server` on the PATH. Without them their tests are left out.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mtl_lora_cli
from mtl_lora_cli.errors import CheckError, UsageError
from mtl_lora_cli.evaluation.opened import Run, open_run
from mtl_lora_cli.evaluation.protocols import Setting
from mtl_lora_cli.evaluation.requests import Request
from mtl_lora_cli.export.engine_check import check_by_engine, require_engine
from mtl_lora_cli.export.engines import (
    llama_server_command,
    ollama_command,
    sglang_command,
    vllm_command,
)
from mtl_lora_cli.export.gguf_files import base_file
from mtl_lora_cli.export.gguf_model import write_model
from mtl_lora_cli.export.order import Options
from mtl_lora_cli.export.questions import Questions
from mtl_lora_cli.export.write import write_tasks
from mtl_lora_cli.recipe.load import find_recipe, load_recipe
from mtl_lora_cli.training.prepare import prepare
from mtl_lora_cli.training.run import start

TASKS = ("animals", "uses", "search_ads")
ROWS = 200  # of each
VLLM = os.environ.get("MTL_LORA_VLLM_PYTHON", "")
TEXTS = 48  # sequences that PEFT is given together
SLOTS = 4  # requests that llama.cpp's server answers at once

Asked = Sequence[tuple[str, Request]]


@dataclass(frozen=True)
class Served:
    """A run, its adapters, and what `predict` says to rows in turns of the tasks.

    Attributes:
        run: three tasks far from where their adapters began.
        folder: `peft/TASK` and `gguf/TASK`.
        asked: task and request of each row.
        right: of each row `predict`'s answer and the probabilities of all candidates.
    """

    run: Run
    folder: Path
    asked: list[tuple[str, Request]]
    right: list[tuple[str, dict[str, float]]]


@pytest.fixture(scope="module")
def base(stories_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights with heads of 32 features: vLLM has no smaller ones on a CPU, and stories260k has 8."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(stories_folder / name, folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=3, bos_token_id=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, eos_token_id=2, initializer_range=0.1,
        max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("served")
    changes = [f"base_model={base}", "training.max_steps=12", "training.row_length=512",
               "training.learning_rate=2e-2", "training.checkpoint_every=null"]  # fmt: skip
    found = start(prepare(load_recipe(find_recipe("quickstart"), changes)), folder / "run")
    run = open_run(found)
    for kind in ("peft", "gguf"):
        targets = [(task, folder / kind / task.name) for task in run.tasks]
        write_tasks(kind, run, targets, Options(checked=False))
    held = [Questions(run, task, Setting(limit=ROWS)) for task in run.tasks]
    assert [one.task.name for one in held] == list(TASKS)
    assert [len(one.requests) for one in held] == [ROWS] * len(TASKS)
    turns = [(one, number) for number in range(ROWS) for one in held]
    rows = [{**one.examples.rows[number], "task": one.task.name} for one, number in turns]
    predicted = mtl_lora_cli.load(found.path).predict(rows, task_column="task")
    right = [(one["answer"], one["probabilities"]) for one in predicted]
    assert len({answer for answer, _ in right}) > 5  # not one answer to all
    return Served(run, folder, [(o.task.name, o.requests[n]) for o, n in turns], right)


def agree(served: Served, scores: Sequence[np.ndarray], tolerance: float) -> None:
    """p ∝ exp(log p of the candidates), and the likeliest of them."""
    assert len(scores) == len(served.right) == ROWS * len(TASKS)
    for own, (answer, known) in zip(scores, served.right, strict=True):
        likely = np.exp(own - own.max())
        likely /= likely.sum()
        assert likely == pytest.approx(list(known.values()), abs=tolerance)
        assert list(known)[int(np.argmax(own))] == answer


@pytest.mark.long
def test_peft_in_mixed_batches(served: Served) -> None:
    """PEFT's own `adapter_names`: every sequence of a batch goes through its task's adapter."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(served.run.base.folder, dtype=torch.float32)
    first, *others = TASKS
    model = peft.PeftModel.from_pretrained(
        model, served.folder / "peft" / first, adapter_name=first
    )
    for name in others:
        model.load_adapter(served.folder / "peft" / name, adapter_name=name)
    model.eval()
    texts = [
        (task, request.prompt, choice)
        for task, request in served.asked
        for choice in request.choices
    ]
    sums: list[float] = []
    for start_ in range(0, len(texts), TEXTS):
        some = texts[start_ : start_ + TEXTS]
        longest = max(len(prompt) + len(choice) for _, prompt, choice in some)
        ids, mask = torch.zeros(2, len(some), longest, dtype=torch.long)
        for row, (_, prompt, choice) in enumerate(some):
            own = torch.tensor([*prompt, *choice])
            ids[row, : len(own)], mask[row, : len(own)] = own, 1
        with torch.inference_mode():
            logits = model(
                input_ids=ids, attention_mask=mask, adapter_names=[task for task, _, _ in some]
            ).logits
        for row, (_, prompt, choice) in enumerate(some):
            part = logits[row, len(prompt) - 1 : len(prompt) + len(choice) - 1].double()
            sums.append(float(part.log_softmax(-1)[range(len(choice)), choice].sum()))
    values = iter(sums)
    agree(served, [np.array([next(values) for _ in r.choices]) for _, r in served.asked], 1e-4)


@pytest.mark.long
def test_llama_cpp_with_the_adapter_of_each_row(served: Served) -> None:
    """All adapters on one model, set row by row, as its server does for each request."""
    llama_cpp = pytest.importorskip("llama_cpp")
    longest = max(len(r.prompt) + max(map(len, r.choices)) for _, r in served.asked)
    kinds = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    with base_file(served.run, served.folder) as file:
        model = llama_cpp.Llama(str(file), n_ctx=longest, n_batch=longest, n_ubatch=longest, logits_all=True, n_threads=torch.get_num_threads(),
                                n_threads_batch=torch.get_num_threads(),
                                flash_attn=False, verbose=False, use_mmap=False, **kinds)  # fmt: skip
        adapters = {
            task: llama_cpp.llama_adapter_lora_init(
                model.model, str(served.folder / "gguf" / task / "adapter.gguf").encode()
            )
            for task in TASKS
        }
        scores = []
        for task, request in served.asked:
            set_adapter(llama_cpp, model, adapters[task])
            sums = []
            for choice in request.choices:
                model.reset()
                model.eval([*request.prompt, *choice[:-1]])
                rows = model.scores[len(request.prompt) - 1 : len(request.prompt) + len(choice) - 1]
                part = torch.from_numpy(rows.copy()).double().log_softmax(-1)
                sums.append(float(part[range(len(choice)), choice].sum()))
            scores.append(np.array(sums))
        model.close()
    agree(served, scores, 1e-4)


def set_adapter(llama_cpp: Any, model: Any, adapter: Any) -> None:
    """This one alone."""
    import ctypes

    one = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
    assert llama_cpp.llama_set_adapters_lora(model.ctx, one, 1, (ctypes.c_float * 1)(1.0)) == 0


@pytest.fixture(scope="module")
def llama_server(served: Served) -> Iterator[str]:
    """Its address: the exported adapters on the base model, started by the words that `export` says."""
    program = os.environ.get("MTL_LORA_LLAMA_SERVER") or shutil.which("llama-server")
    if not program:
        pytest.skip("no llama-server: MTL_LORA_LLAMA_SERVER names none, and none is on the PATH")
    gguf = [(task, served.folder / "gguf" / task) for task in TASKS]
    name, *words = shlex.split(llama_server_command(gguf))
    assert name == "llama-server"
    model = served.folder / "base.gguf"
    write_model(served.run.base.folder, model, title="base", tokenizer=served.run.tokenizer)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words[words.index("BASE_MODEL.gguf")] = str(model)
    words += ["--host", "127.0.0.1", "--port", port, "--parallel", str(SLOTS), "-c", str(512 * SLOTS)]  # fmt: skip
    words += ["--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off", "--threads", "2"]  # fmt: skip
    environment = {**os.environ, "LD_LIBRARY_PATH": str(Path(program).resolve().parent)}
    log = served.folder / "llama-server.log"
    with log.open("w") as said:
        process = subprocess.Popen([program, *words], env=environment, stdout=said, stderr=said)
    try:
        address = f"http://127.0.0.1:{port}"
        until = time.monotonic() + 60
        while not healthy(address):
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def healthy(address: str) -> bool:
    """503 while it loads."""
    with suppress(OSError), urlopen(f"{address}/health", timeout=5):
        return True
    return False


@pytest.mark.long
def test_llama_server_over_http(served: Served, llama_server: str) -> None:
    """Rows of three tasks at once, a request naming its adapter by its place. It says the log-probabilities of all tokens that
    may come next, before any bias; and none at all where what it writes is an end or a part of a character."""
    plain = served.run.tokenizer("a")["input_ids"][-1]

    def next_tokens(task: str, tokens: Sequence[int]) -> dict[int, float]:
        lora = [{"id": n, "scale": float(name == task)} for n, name in enumerate(TASKS)]
        asked = {"prompt": list(tokens), "n_predict": 1, "n_probs": 512, "lora": lora, "logit_bias": [[plain, 100]]}  # fmt: skip
        request = HttpRequest(
            f"{llama_server}/completion",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        with urlopen(request, timeout=60) as answer:
            found = json.load(answer)["completion_probabilities"][0]["top_logprobs"]
        return {one["id"]: one["logprob"] for one in found}

    def scores(one: tuple[str, Request]) -> np.ndarray:
        task, request = one
        inner = {
            tuple(choice[:length]) for choice in request.choices for length in range(len(choice))
        }
        after = {own: next_tokens(task, [*request.prompt, *own]) for own in inner}
        return np.array(
            [
                sum(after[tuple(choice[:n])][token] for n, token in enumerate(choice))
                for choice in request.choices
            ]
        )

    with ThreadPoolExecutor(SLOTS) as pool:
        agree(served, list(pool.map(scores, served.asked)), 1e-4)


@pytest.fixture(scope="module")
def engine() -> Path:
    if not VLLM:
        pytest.skip("MTL_LORA_VLLM_PYTHON names no interpreter of vLLM's environment")
    return Path(VLLM)


@pytest.fixture
def written(served: Served, tmp_path: Path) -> Iterator[list[Any]]:
    """The PEFT folders, to be damaged."""
    targets = [(task, tmp_path / task.name) for task in served.run.tasks]
    yield write_tasks("peft", served.run, targets, Options(checked=False))


@pytest.mark.long
def test_vllm_in_one_batch(served: Served, engine: Path, written: list[Any]) -> None:
    said = check_by_engine(served.run, engine, written, Options(limit=ROWS), print)
    for task in TASKS:
        found = said.comparisons[task]
        assert (found.examples, found.equal) == (ROWS, 1.0)
        assert 0 < found.largest < 1e-3 and found.dtype == "float32"


@pytest.mark.long
def test_vllm_generates_free_answers(base: Path, engine: Path, tmp_path: Path) -> None:
    """Beside choices in the same batch: the same tokens, and the right answers' log-probabilities."""
    template = {"description": "A free answer.", "prompt": "{{ question }}\nAnswer:", "answer": "{{ answer }}",
                "metrics": ["exact_match"], "generate": {"max_new_tokens": 12}}  # fmt: skip
    (tmp_path / "free.yaml").write_text(json.dumps(template))
    tasks = f"[{{name: free, template: {tmp_path / 'free.yaml'}, source: 'sample:animals'}}, {{name: uses, template: samples/uses}}]"
    changes = [f"base_model={base}", f"tasks={tasks}", "training.max_steps=6", "training.row_length=512",
               "training.learning_rate=2e-2", "training.checkpoint_every=null"]  # fmt: skip
    run = open_run(
        start(prepare(load_recipe(find_recipe("quickstart"), changes)), tmp_path / "run")
    )
    targets = [(task, tmp_path / task.name) for task in run.tasks]
    written = write_tasks("peft", run, targets, Options(checked=False))
    said = check_by_engine(run, engine, written, Options(limit=12), print)
    for found in said.comparisons.values():
        assert (found.examples, found.equal) == (12, 1.0) and found.largest < 1e-3


@pytest.mark.long
def test_vllm_finds_a_wrong_adapter(served: Served, engine: Path, written: list[Any]) -> None:
    """The others stay; what differs lies aside."""
    file = written[1].folder / "adapter_model.safetensors"
    save_file({name: 1.2 * tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(
        CheckError, match="the adapter in vLLM differs from the run's on task 'uses'"
    ):
        check_by_engine(served.run, engine, written, Options(limit=8), print)
    left = sorted(path.name for path in written[0].folder.parent.iterdir())
    assert left == ["animals", "search_ads", "uses.failed"]


@pytest.mark.long
def test_vllms_own_resolver_finds_each_task(served: Served, engine: Path) -> None:
    program = (
        "import asyncio, sys; from vllm.plugins.lora_resolvers.filesystem_resolver import FilesystemResolver as R; "
        "r = R(sys.argv[1]); print([asyncio.run(r.resolve_lora(sys.argv[2], n)).lora_path for n in sys.argv[3:]])"
    )
    root, name = served.folder / "peft", str(served.run.base.folder)
    ended = subprocess.run(
        [engine, "-P", "-c", program, root, name, *TASKS], capture_output=True, text=True
    )
    assert ended.stdout.strip().splitlines()[-1] == str([str(root / task) for task in TASKS]), (
        ended.stderr
    )


def test_commands_name_every_folder(tmp_path: Path) -> None:
    folders = []
    for name, rank in (("a", 4), ("b c", 12)):
        (tmp_path / name).mkdir()
        config = {"r": rank, "base_model_name_or_path": "BASE", "rank_pattern": {"x": rank + 1}}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
        folders.append((name, tmp_path / name))
    vllm = str(vllm_command(folders))
    assert "vllm serve BASE --enable-lora --max-lora-rank 16 --max-loras 2" in vllm
    assert f"a={tmp_path}/a 'b c={tmp_path}/b c'" in vllm
    assert (
        f"--max-lora-rank 13 --max-loras-per-batch 2 --lora-paths a={tmp_path}/a"
        in sglang_command(folders)
    )
    assert f"--lora-init-without-apply --lora {tmp_path}/a/adapter.gguf" in llama_server_command(
        folders
    )
    assert f"ollama create a -f {tmp_path}/a/Modelfile; ollama create 'b c'" in ollama_command(
        folders
    )


@pytest.mark.parametrize(
    ("kind", "form", "python", "said"),
    [
        ("sglang", "peft", None, "--check: expected vllm, received 'sglang'"),
        ("vllm", "gguf", None, "vLLM reads --format peft, not gguf"),
        ("vllm", "peft", None, "name its interpreter with --engine-python"),
        ("vllm", "peft", "nowhere/python", "--engine-python nowhere/python: no interpreter"),
        ("vllm", "peft", shutil.which("python3"), "vLLM is not installed there"),
    ],
)
def test_what_cannot_be_checked_is_one_line(
    run: Run, kind: str, form: str, python: str | None, said: str
) -> None:
    with pytest.raises(UsageError, match=said.replace("(", ".")):
        require_engine(kind, form, None if python is None else Path(python), run)
