"""A merged model for llama.cpp: one file that needs no base model."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.export.formats import Format, export_format

if TYPE_CHECKING:
    from mtl_lora_cli.evaluation.opened import Run
    from mtl_lora_cli.export.comparison import Comparison
    from mtl_lora_cli.export.order import Order
    from mtl_lora_cli.export.questions import Questions, Scored

MODEL = "model.gguf"


@export_format
class GgufMerged(Format):
    """See `merge` for the sums and `gguf_model` for the file."""

    name = "gguf-merged"
    about = "a merged model for llama.cpp"
    marker = MODEL
    differs = "the merged model in llama.cpp differs from the adapted one"
    reducible = False

    def require_reader(self) -> None:
        from mtl_lora_cli.export.llama_scores import require_llama_cpp

        require_llama_cpp()

    def refuses(self, order: Order) -> None:
        """Also a base model whose tokenizer is of no kind that is known here or to llama.cpp's converter."""
        from mtl_lora_cli.export.llama_converter import require_convertible
        from mtl_lora_cli.models.load import load_config

        order.parts  # noqa: B018 - the method may be no LoRA for any task
        if not _known(order):
            require_convertible(load_config(order.run.base), order.run.base.folder)

    def size(self, order: Order) -> int:
        from mtl_lora_cli.export.gguf_model import model_size

        return model_size(order.run.base.folder)

    def scratch(self, order: Order) -> int:
        """The merged model in transformers' form."""
        return self.size(order)

    def write(self, order: Order, folder: Path) -> None:
        from mtl_lora_cli.export.gguf_model import stored_dtypes, write_model
        from mtl_lora_cli.export.llama_converter import convert_model
        from mtl_lora_cli.export.merge import plan_merge, write_merged
        from mtl_lora_cli.export.ollama import write_modelfile

        run = order.run
        with TemporaryDirectory(dir=folder) as merged:
            updates, lengths = order.parts
            write_merged(plan_merge(run.base, updates, lengths=lengths), Path(merged), order.say)
            order.say("writing it as GGUF")
            path = folder / MODEL
            if _known(order):
                write_model(Path(merged), path, title=order.title, tokenizer=run.tokenizer)
            else:
                widest = max(stored_dtypes(Path(merged)), key=lambda dtype: dtype.itemsize)
                convert_model(Path(merged), path, title=order.title, dtype=widest)
        write_modelfile(order, folder, model=f"./{MODEL}")

    def read(self, questions: Questions, folder: Path) -> Scored:
        """llama.cpp with the written model.

        Raises:
            CheckError: it cuts a prompt into other tokens than the base model's tokenizer.
        """
        from mtl_lora_cli.export.gguf_files import require_same_tokens
        from mtl_lora_cli.export.llama_scores import llama, score

        with llama(folder / MODEL, None, questions.requests) as opened:
            require_same_tokens(questions, opened)
            return questions.answers(score(opened, questions.requests))

    def tolerance(self, run: Run) -> float | None:
        """The file is as coarse as the base model's own, whatever the run is; llama.cpp may be coarser."""
        from mtl_lora_cli.export.check import TOLERANCE
        from mtl_lora_cli.export.gguf_model import stored_dtypes
        from mtl_lora_cli.export.llama_scores import table_tolerance
        from mtl_lora_cli.models.load import load_config

        stored = max(TOLERANCE[dtype] for dtype in {run.dtype, *stored_dtypes(run.base.folder)})
        return max(stored, table_tolerance(load_config(run.base)))

    def card(self, order: Order, folder: Path, comparison: Comparison | None) -> str:
        from mtl_lora_cli.export.card import model_card

        run = order.run
        return model_card(
            run,
            order.task,
            comparison,
            title=f"{Path(run.base.name).name} merged for {order.task.name}, for llama.cpp",
            library="llama.cpp",
            relation="finetune",
            about=f"The base model with one task of the run `{run.folder.name}` merged into its "
            "original weights, W + s · B' A', added in float32 and cast once, as llama.cpp reads it: "
            "matrices in the base model's own precision.",
            use=f"```sh\nllama-cli -m THIS_FOLDER/{MODEL}\n"
            f"ollama create {order.task.name} -f THIS_FOLDER/Modelfile && ollama run {order.task.name}\n```\n\n"
            "Smaller, and less exact, which nothing here measures: "
            f"`llama-quantize THIS_FOLDER/{MODEL} model-Q8_0.gguf Q8_0`.\n",
        )


def _known(order: Order) -> bool:
    """Whether we write the file, model and tokenizer; else llama.cpp's converter does.

    Raises:
        UsageError: a model of a kind that we know, of which llama.cpp would compute something else, or whose
            tokenizer nobody here knows.
    """
    from mtl_lora_cli.export.gguf_model import is_known, require_writable
    from mtl_lora_cli.export.gguf_tokenizer import rule_of
    from mtl_lora_cli.export.llama_converter import find_sources
    from mtl_lora_cli.models.load import load_config

    config = load_config(order.run.base)
    if not is_known(config):
        return False
    require_writable(config)
    try:
        rule_of(order.run.tokenizer)
    except UsageError:
        if find_sources() is None:
            raise
        return False
    return True
