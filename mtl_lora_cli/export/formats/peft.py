"""A standard PEFT LoRA folder: what PEFT and servers of many adapters read."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.export.engines import VLLM_RANKS
from mtl_lora_cli.export.formats import Format, export_format

if TYPE_CHECKING:
    from mtl_lora_cli.export.comparison import Comparison
    from mtl_lora_cli.export.order import Order
    from mtl_lora_cli.export.peft_names import PeftNames
    from mtl_lora_cli.export.questions import Questions, Scored
    from mtl_lora_cli.models.base import BaseModel

_USE = """\
```python
from peft import PeftModel
from transformers import {kind}

base = {kind}.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "THIS_FOLDER")
```

With vLLM, beside other tasks on the same base model:

```sh
vllm serve {base} --enable-lora --max-lora-rank {room} --lora-modules {task}=THIS_FOLDER
```
"""


@export_format
class Peft(Format):
    """See `peft_files` for the files; the comparison is on the run's own base weights, quantised ones included."""

    name = "peft"
    about = "a standard LoRA folder"
    marker = "adapter_config.json"
    differs = "the exported adapter differs from the run's"
    weights = "own"
    pictures = True

    def __init__(self) -> None:
        # Many tasks of a run have the same layers: what PEFT makes of these is found out once.
        self._known: dict[tuple[str, ...], PeftNames] = {}
        self._asked: set[tuple[Any, ...]] = set()

    @property
    def root(self) -> Path:
        return Path("exported")

    def require_reader(self) -> None:
        if find_spec("peft") is None:
            raise UsageError(
                "export --format peft checks what it wrote with PEFT, which is not installed; get it "
                "with: pip install peft, or write without comparing: --no-check"
            )

    def refuses(self, order: Order) -> None:
        from mtl_lora_cli.export.peft_files import saved_modules
        from mtl_lora_cli.models.load import skeleton

        self._names(order)
        if order.run.adapter.whole:
            saved_modules(skeleton(order.run.base), order.run.adapter.whole)

    def size(self, order: Order) -> int:
        values = sum(down.numel() + up.numel() for down, up, _ in order.parts[0].values())
        whole = sum(value.numel() for value in order.run.adapter.whole.values())
        return 4 * (values * (1 + bool(self._names(order).also)) + whole)

    def write(self, order: Order, folder: Path) -> None:
        from mtl_lora_cli.export.peft_files import write_peft
        from mtl_lora_cli.export.peft_names import require_named

        updates, lengths = order.parts
        whole = order.run.adapter.whole
        base = _loadable(order.run.base)
        write_peft(updates, self._names(order), base, folder, lengths, whole)
        ranks = tuple((weight, len(down)) for weight, (down, _, _) in updates.items())
        if ranks not in self._asked:
            require_named(order.run.base, folder)
            self._asked.add(ranks)

    def read(self, questions: Questions, folder: Path) -> Scored:
        """The run's own base model with the written adapter, as PEFT puts them together."""
        from peft import PeftModel

        run = questions.run
        model = questions.load_alone(run.base.folder, run.recipe.quantization)
        return questions.ask_alone(PeftModel.from_pretrained(model, str(folder)).eval())

    def _names(self, order: Order) -> PeftNames:
        from mtl_lora_cli.export.peft_files import targets_of
        from mtl_lora_cli.export.peft_names import peft_names

        updates = order.parts[0]
        key = tuple(updates)
        if key not in self._known:
            targets = targets_of(order.run.adapter)
            self._known[key] = peft_names(order.run.base, updates, targets)
        return self._known[key]

    def card(self, order: Order, folder: Path, comparison: Comparison | None) -> str:
        from mtl_lora_cli.export.card import model_card
        from mtl_lora_cli.export.peft_files import ranks_of
        from mtl_lora_cli.export.weight_names import wrapper_class

        run, task = order.run, order.task
        kind, wrapped = _loaded_as(run.base), wrapper_class(run.base)
        twice = (
            f" Its tensors stand there twice, as {kind} names them and as {wrapped.__name__} does."
            if wrapped is not None
            else ""
        )
        base = run.base.name if run.base.revision is not None else "BASE_MODEL"
        updates, lengths = order.parts
        rank = max(ranks_of(updates).values())
        room = next((room for room in VLLM_RANKS if room >= rank), rank)
        return model_card(
            run,
            task,
            comparison,
            title=f"A LoRA for {task.name} on {Path(run.base.name).name}",
            library="peft",
            relation="adapter",
            about=f"One task of the run `{run.folder.name}`: of its method, {run.recipe.adapter.method}, "
            f"one task is exactly {'a DoRA of PEFT' if lengths else 'an ordinary LoRA'}. lora_alpha / r "
            "is 1; the method's own scale is in B."
            f"{twice}{order.reduced}",
            use=_USE.format(kind=kind, base=base, room=room, task=task.name),
        )


def _loadable(base: BaseModel) -> str:
    """What transformers finds the base model by: a hub id, or the folder on this disk."""
    return base.name if base.revision is not None else str(base.folder)


@cache
def _loaded_as(base: BaseModel) -> str:
    """The class of transformers that loads it."""
    from mtl_lora_cli.models.load import load_config, model_class

    return str(model_class(base, load_config(base)).__name__)
