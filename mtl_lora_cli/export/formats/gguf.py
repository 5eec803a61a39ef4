"""An adapter for llama.cpp, on the base model as a GGUF file of any precision."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.export.formats import Format, export_format

if TYPE_CHECKING:
    from mtl_lora_cli.evaluation.opened import Run
    from mtl_lora_cli.export.comparison import Comparison
    from mtl_lora_cli.export.gguf_model import Dialect
    from mtl_lora_cli.export.order import Order
    from mtl_lora_cli.export.questions import Questions, Scored

ADAPTER = "adapter.gguf"
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
`python convert_hf_to_gguf.py BASE_MODEL --outfile BASE_MODEL.gguf`. Beside this page such a file makes the
`Modelfile` ready for Ollama: `ollama create NAME -f Modelfile`.
"""


@export_format
class GgufAdapter(Format):
    """See `gguf_files` for the file."""

    name = "gguf"
    about = "an adapter for llama.cpp"
    marker = ADAPTER
    differs = "the adapter in llama.cpp differs from the run's"

    def require_reader(self) -> None:
        from mtl_lora_cli.export.llama_scores import require_llama_cpp

        require_llama_cpp()

    def refuses(self, order: Order) -> None:
        from mtl_lora_cli.export.gguf_model import is_known, require_writable
        from mtl_lora_cli.export.llama_converter import require_convertible
        from mtl_lora_cli.models.load import load_config

        order.updates  # noqa: B018 - the method may be no LoRA for any task
        config = load_config(order.run.base)
        if not is_known(config):
            require_convertible(config, order.run.base.folder, whole=order.options.checked)
            return
        if any(down.ndim == 3 for down, _, _ in order.updates.values()):
            raise UsageError(
                "export --format gguf: adapters on experts (adapter.experts) are not written for llama.cpp; "
                "merged they are: export --format gguf-merged"
            )
        dialect = _dialect(order)
        for name in order.updates:
            dialect.name(name)  # a weight without a name is found before anything is written
        if order.options.checked:
            require_writable(config)

    def scratch(self, order: Order) -> int:
        """The base model as a file of llama.cpp's, for the check."""
        from mtl_lora_cli.export.gguf_model import model_size

        run = order.run
        return model_size(run.base.folder, run.dtype) if order.options.checked else 0

    def write(self, order: Order, folder: Path) -> None:
        from mtl_lora_cli.export.gguf_files import write_adapter
        from mtl_lora_cli.export.gguf_model import is_known
        from mtl_lora_cli.export.llama_converter import convert_adapter
        from mtl_lora_cli.export.ollama import write_modelfile
        from mtl_lora_cli.models.load import load_config

        run = order.run
        if is_known(load_config(run.base)):
            write_adapter(order.updates, _dialect(order), folder / ADAPTER, title=order.title)
        else:
            convert_adapter(order.updates, run.base.folder, folder / ADAPTER)
        write_modelfile(order, folder, model="./BASE_MODEL.gguf", adapter=f"./{ADAPTER}")

    def read(self, questions: Questions, folder: Path) -> Scored:
        """llama.cpp with the written adapter on the original base weights, in the run's dtype."""
        from mtl_lora_cli.export.gguf_files import base_file
        from mtl_lora_cli.export.llama_scores import llama, score

        with base_file(questions.run, folder) as base, llama(
            base, folder / ADAPTER, questions.requests
        ) as opened:  # fmt: skip
            return questions.answers(score(opened, questions.requests))

    def tolerance(self, run: Run) -> float | None:
        """By the run's dtype; llama.cpp may be coarser."""
        from mtl_lora_cli.export.check import TOLERANCE
        from mtl_lora_cli.export.llama_scores import table_tolerance
        from mtl_lora_cli.models.load import load_config

        return max(TOLERANCE.get(run.dtype, 0.0), table_tolerance(load_config(run.base)))

    def card(self, order: Order, folder: Path, comparison: Comparison | None) -> str:
        from mtl_lora_cli.export.card import model_card

        return model_card(
            order.run,
            order.task,
            comparison,
            title=f"A LoRA for {order.task.name}, for llama.cpp",
            library="llama.cpp",
            relation="adapter",
            about=f"One task of the run `{order.run.folder.name}`, which is exactly an ordinary LoRA, "
            "as llama.cpp reads it. It goes on the base model as a GGUF file, of any "
            f"precision.{order.reduced}",
            use=_USE.format(file=f"THIS_FOLDER/{ADAPTER}", other=f"ANOTHER_TASK/{ADAPTER}"),
        )


def _dialect(order: Order) -> Dialect:
    from mtl_lora_cli.export import gguf_model
    from mtl_lora_cli.models.load import load_config

    return gguf_model.dialect_of(load_config(order.run.base))
