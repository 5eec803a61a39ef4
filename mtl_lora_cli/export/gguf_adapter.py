"""One task of a run for llama.cpp: its LoRA as an adapter's GGUF file, or a merged model in one.

llama.cpp adds (alpha / r) B A x of each pair `NAME.lora_a` [r, in], `NAME.lora_b` [out, r], with one
alpha for all and the r of each. The method's own factor s goes into B, and so does r / alpha where a
layer's rank is not the largest. The rows of B for q and k are in llama.cpp's order, see `gguf_model`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gguf import GGUFReader, GGUFType, Keys

from mtl_lora_cli.data.encoding import Encoder
from mtl_lora_cli.errors import CheckError
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.export.card import model_card
from mtl_lora_cli.export.check import (
    TOLERANCE,
    Answers,
    Check,
    Comparison,
    Questions,
    Reader,
    run_itself,
    run_on_original,
)
from mtl_lora_cli.export.gguf_model import (
    Dialect,
    dialect_of,
    model_size,
    require_writable,
    stored_dtypes,
    write_model,
    writing,
)
from mtl_lora_cli.export.llama_scores import llama, require_llama_cpp, score
from mtl_lora_cli.export.low_rank import Exported, Truncation, ask_at, updates_at
from mtl_lora_cli.export.merge import Update, plan_merge, write_merged
from mtl_lora_cli.export.run_merge import Written, require_held_out, write_checked
from mtl_lora_cli.models.load import load_tokenizer
from mtl_lora_cli.tasks.task import Task

ADAPTER, MODEL = "adapter.gguf", "model.gguf"
_USE = """\
```sh
llama-cli -m BASE_MODEL.gguf --lora {file}
```

Several tasks beside each other, of which each request names one by its place, counted from 0, with
`"lora": [{{"id": 0, "scale": 1.0}}]`; without `--lora-init-without-apply` all of them would be added up:

```sh
llama-server -m BASE_MODEL.gguf --lora {file} --lora {other} --lora-init-without-apply
```

llama.cpp's sources turn a transformers folder into a GGUF file:
`python convert_hf_to_gguf.py BASE_MODEL --outfile BASE_MODEL.gguf`.
"""


def export_gguf(
    run: Run,
    task: Task,
    folder: Path,
    *,
    rank: int | None = None,
    limit: int = 32,
    tolerance: float | None = None,
    checked: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Exported:
    """Write one task's adapter, run it with llama.cpp, compare, and only then put it in its place.

    Args:
        run: the run.
        task: which one.
        folder: where to; must not exist or be empty.
        rank: a lower rank than the update's own, see `low_rank`.
        limit, tolerance: see `Check`.
        checked: compare at all.
        say: called with progress lines.

    Raises:
        UsageError: the output folder is not empty, llama.cpp is not installed, it knows no such model
            or no such module, the rank is too large, or the method is no LoRA for any task.
        CheckError: what llama.cpp makes of it differs; it lies aside.
    """
    updates, truncation = updates_at(run, task, rank)
    config = _config(run.base.folder)
    dialect = dialect_of(config)
    for name in updates:
        dialect.name(name)  # a weight without a name is found before anything is written
    check, size = None, sum(4 * (down.numel() + up.numel()) for down, up, _ in updates.values())
    if checked:
        require_llama_cpp()
        require_held_out(task, limit)
        require_writable(config)
        size += model_size(run.base.folder, run.dtype)
        check = Check(adapter_in_llama, _models(run, rank), limit, tolerance)
    written = write_checked(
        run,
        task,
        folder,
        what="the adapter in llama.cpp differs from the run's",
        size=size,
        write=lambda path: write_adapter(updates, dialect, path / ADAPTER, title=_title(run, task)),
        check=check,
        readme=partial(_adapter_card, run, task, truncation=truncation),
        say=say,
    )
    return Exported(**vars(written), truncation=truncation)


def export_gguf_merged(
    run: Run,
    task: Task,
    folder: Path,
    *,
    limit: int = 32,
    tolerance: float | None = None,
    checked: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Written:
    """Write one task's merged model as a GGUF file; otherwise like `export_gguf`.

    Raises:
        UsageError: as there, or the base model's tokenizer is of no kind that is known here.
        CheckError: log-probabilities differ, or llama.cpp makes other tokens of the task's prompts.
    """
    updates, _ = updates_at(run, task, None)
    tokenizer = load_tokenizer(run.base)
    require_writable(_config(run.base.folder), tokenizer)
    check = None
    if checked:
        require_llama_cpp()
        require_held_out(task, limit)
        if tolerance is None:  # the file is as coarse as the base model's own, whatever the run is
            dtypes = {run.dtype, *stored_dtypes(run.base.folder)}
            tolerance = max(TOLERANCE[dtype] for dtype in dtypes)
        check = Check(model_in_llama, _models(run, None), limit, tolerance)
    plan = plan_merge(run.base, updates)

    def write(path: Path) -> None:
        with TemporaryDirectory(dir=path) as merged:
            write_merged(plan, Path(merged), say)
            say("writing it as GGUF")
            title = _title(run, task)
            write_model(Path(merged), path / MODEL, title=title, tokenizer=tokenizer)

    return write_checked(
        run,
        task,
        folder,
        what="the merged model in llama.cpp differs from the adapted one",
        size=2 * model_size(run.base.folder),
        write=write,
        check=check,
        readme=partial(_merged_card, run, task),
        say=say,
    )


def write_adapter(
    updates: Mapping[str, Update], dialect: Dialect, path: Path, *, title: str
) -> None:
    """Write an adapter's GGUF file, float32.

    Args:
        updates: weight → A' [k, in], B' [out, k], s.
        dialect: of the base model.
        path: the file.
        title: `general.name`.

    Raises:
        UsageError: llama.cpp has no name for a weight.
    """
    alpha = max(len(down) for down, _, _ in updates.values())
    with writing(path, dialect) as writer:
        writer.add_type(GGUFType.ADAPTER)
        writer.add_name(title)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, float(alpha))
        for weight, (down, up, scale) in updates.items():
            name = dialect.name(weight)
            scaled = dialect.rows(weight, up * (scale * len(down) / alpha))
            writer.add_tensor(f"{name}.lora_a", down.contiguous().numpy())
            writer.add_tensor(f"{name}.lora_b", scaled.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def adapter_in_llama(questions: Questions, folder: Path) -> Answers:
    """llama.cpp with the written adapter on the original base weights, in the run's dtype."""
    with base_file(questions.run, folder) as base, llama(
        base, folder / ADAPTER, questions.requests
    ) as opened:  # fmt: skip
        return questions.answers(score(opened, questions.requests))


def model_in_llama(questions: Questions, folder: Path) -> Answers:
    """llama.cpp with the written model.

    Raises:
        CheckError: it cuts a prompt into other tokens than the base model's tokenizer.
    """
    with llama(folder / MODEL, None, questions.requests) as opened:
        _require_same_tokens(questions, opened)
        return questions.answers(score(opened, questions.requests))


def run_at_written_rank(questions: Questions, folder: Path) -> Answers:
    """The run at the rank of the written adapter, on the original base weights."""
    fields = GGUFReader(folder / ADAPTER).fields
    return ask_at(questions, int(fields[Keys.Adapter.LORA_ALPHA].contents()), "none")


@contextmanager
def base_file(run: Run, folder: Path) -> Iterator[Path]:
    """The base model as a GGUF file that lies in the folder for a while."""
    with TemporaryDirectory(dir=folder) as scratch:
        path = Path(scratch) / "base.gguf"
        write_model(run.base.folder, path, title=run.base.name, dtype=run.dtype)
        yield path


def _models(run: Run, rank: int | None) -> dict[str, Reader]:
    """What llama.cpp's answers are compared with; what they must equal stands first."""
    models: dict[str, Reader] = {}
    if rank is not None:
        models[f"the run's update at rank {rank}"] = run_at_written_rank
    kind = run.recipe.quantization
    if kind == "none":
        return {**models, "the run's adapter": run_itself}
    return {
        **models,
        "the run's adapter on the original weights": run_on_original,
        f"the run's adapter on its {kind} weights": run_itself,
    }


def _require_same_tokens(questions: Questions, opened: Any) -> None:
    tokenizer = questions.run.tokenizer
    encoder = Encoder.of(tokenizer, questions.run.recipe, lenient=True)
    examples = questions.examples.examples
    starts = tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    for text in encoder.prompts([f"{one.prompt} {one.answer}" for one in examples]):
        ours = tokenizer(text)["input_ids"]
        theirs = opened.tokenize(text.encode(), add_bos=starts, special=True)
        if ours != theirs:
            raise CheckError(
                f"llama.cpp makes other tokens of a prompt of task '{questions.task.name}': "
                f"{theirs[:12]} instead of {ours[:12]} of {text[:40]!r}"
            )


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def _title(run: Run, task: Task) -> str:
    return f"{task.name} of {run.folder.name}"


def _adapter_card(
    run: Run,
    task: Task,
    folder: Path,
    comparison: Comparison | None,
    *,
    truncation: Truncation | None,
) -> str:
    reduced = "" if truncation is None else f"\n\nThe rank was reduced: {truncation}."
    return model_card(
        run,
        task,
        comparison,
        title=f"A LoRA for {task.name}, for llama.cpp",
        library="llama.cpp",
        relation="adapter",
        about=f"One task of the run `{run.folder.name}`, which is exactly an ordinary LoRA, as "
        f"llama.cpp reads it. It goes on the base model as a GGUF file, of any precision.{reduced}",
        use=_USE.format(file=f"THIS_FOLDER/{ADAPTER}", other=f"ANOTHER_TASK/{ADAPTER}"),
    )


def _merged_card(run: Run, task: Task, folder: Path, comparison: Comparison | None) -> str:
    return model_card(
        run,
        task,
        comparison,
        title=f"{Path(run.base.name).name} merged for {task.name}, for llama.cpp",
        library="llama.cpp",
        relation="finetune",
        about=f"The base model with one task of the run `{run.folder.name}` merged into its original "
        "weights, W + s · B' A', added in float32 and cast once, as llama.cpp reads it: matrices in "
        "the base model's own precision.",
        use=f"```sh\nllama-cli -m THIS_FOLDER/{MODEL}\n```\n\n"
        "Smaller, and less exact, which nothing here measures: "
        f"`llama-quantize THIS_FOLDER/{MODEL} model-Q8_0.gguf Q8_0`.\n",
    )
