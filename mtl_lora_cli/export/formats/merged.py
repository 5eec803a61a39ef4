"""An ordinary transformers folder: the task's update added to the base weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.export.formats import Format, Reference, export_format

if TYPE_CHECKING:
    import numpy as np

    from mtl_lora_cli.evaluation.opened import Run
    from mtl_lora_cli.export.comparison import Comparison
    from mtl_lora_cli.export.merge import MergePlan
    from mtl_lora_cli.export.order import Order
    from mtl_lora_cli.export.quantised import Quantised, WeightRounding
    from mtl_lora_cli.export.questions import Questions, Scored
    from mtl_lora_cli.export.weight_check import Meant

BASES = ("original", "dequantized")
_USE = """\
```python
from transformers import {kind}, AutoTokenizer

model = {kind}.from_pretrained("THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```

With vLLM, and with llama.cpp (the converter is in its sources):

```sh
vllm serve THIS_FOLDER
python convert_hf_to_gguf.py THIS_FOLDER --outfile model.gguf && llama-cli -m model.gguf
```
"""


@export_format
class Merged(Format):
    """See `merge` for the sums."""

    name = "merged"
    about = "an ordinary transformers model"
    marker = "config.json"
    differs = "the merged model differs from the adapted one"
    reducible = False
    pictures = True
    early = True

    _rounding: WeightRounding | None = None
    _model: Any = None  # as transformers has read it
    _expected: Meant | None = None

    @property
    def root(self) -> Path:
        return Path("merged")

    def refuses(self, order: Order) -> None:
        from mtl_lora_cli.export.quantised import require_whole_stacks

        kind = order.run.recipe.quantization
        if order.options.base == "dequantized" and kind != "none":
            require_whole_stacks(order.run.base, kind)
        if order.options.base == "dequantized" and kind == "none":
            raise UsageError(
                f"--base dequantized is for quantised runs; run '{order.run.folder.name}' has "
                "quantization: none, so the original weights are what it saw"
            )

    def size(self, order: Order) -> int:
        from mtl_lora_cli.runs.paths import existing

        return self._plan(order).size(existing(order.folder))

    def write(self, order: Order, folder: Path) -> None:
        from mtl_lora_cli.export.merge import write_merged
        from mtl_lora_cli.export.quantised import measure_rounding

        how = self._quantised(order)
        if how is not None and self._rounding is None:
            order.say(f"measuring what {how.kind} rounds")
            self._rounding = measure_rounding(order.run.base, how)
        write_merged(self._plan(order), folder, order.say)

    def fault(self, order: Order, folder: Path) -> str | None:
        """Every tensor against the sum in float64."""
        from mtl_lora_cli.export.weight_check import fault_in

        return fault_in(folder, self._meant(order))

    def _meant(self, order: Order) -> Meant:
        """What the folder has to hold."""
        from mtl_lora_cli.export.weight_check import Meant

        run = order.run
        how = self._quantised(order) if order.options.base == "dequantized" else None
        updates, lengths = order.parts
        return Meant(run.base, updates, how, lengths, run.adapter.whole, _sight(run))

    def read(self, questions: Questions, folder: Path) -> Scored:
        """By transformers alone, as any user would."""
        from mtl_lora_cli.models.base import find_base_model

        self._model = questions.load_alone(find_base_model(str(folder)).folder)
        return questions.ask_alone(self._model)

    def expect(self, questions: Questions, reference: Reference) -> None:
        """The update, and the names of its weights."""
        from mtl_lora_cli.export.order import Options, Order
        from mtl_lora_cli.export.weight_names import weight_names

        if self._expected is not None or str(questions.dtype) != "torch.float32":
            return
        base = "original" if reference.quantization == "none" else "dequantized"
        run = questions.run.but(in_float32=False)
        self._expected = self._meant(
            Order(run, questions.task, run.folder.path, Options(base=base))
        )
        weight_names(run.base)

    def unrounded(
        self, questions: Questions, folder: Path, reference: Reference
    ) -> Callable[[Sequence[int]], list[np.ndarray]] | None:
        """By transformers alone, with the sums that the files' dtype has rounded."""
        import torch

        from mtl_lora_cli.export.alone import score_alone
        from mtl_lora_cli.export.shards import matrix_dtypes
        from mtl_lora_cli.export.unrounded import take_rounding_back
        from mtl_lora_cli.models.files import weight_files

        rounded = matrix_dtypes(weight_files(folder)) & {torch.float16, torch.bfloat16}
        if questions.dtype != torch.float32 or not rounded:
            return None
        self.expect(questions, reference)
        assert self._expected is not None
        coarsest = max(rounded, key=lambda dtype: torch.finfo(dtype).eps)
        take_rounding_back(self._model, self._expected, coarsest)
        return lambda rows: score_alone(self._model, [questions.requests[row] for row in rows])

    def references(self, order: Order) -> list[Reference]:
        found = super().references(order)
        return found if order.options.base == "original" else found[::-1]

    def card(self, order: Order, folder: Path, comparison: Comparison | None) -> str:
        from mtl_lora_cli.export.card import model_card, shown_name
        from mtl_lora_cli.models.load import load_config, model_class

        base = order.run.base
        return model_card(
            order.run,
            order.task,
            comparison,
            title=f"{shown_name(base)} merged for {order.task.name}",
            library="transformers",
            relation="finetune",
            about="\n\n".join(
                [
                    f"The base model {shown_name(base)} with one task of the run "
                    f"`{order.run.folder.name}` merged into its weights: W + s · B' A', added in "
                    "float32 and cast once.",
                    *self._which_weights(order, compared=comparison is not None),
                    *_linked(folder),
                ]
            ),
            use=_USE.format(kind=model_class(base, load_config(base)).__name__),
        )

    def _plan(self, order: Order) -> MergePlan:
        if "plan" not in order.known:
            order.known["plan"] = self._planned(order)
        plan: MergePlan = order.known["plan"]
        return plan

    def _planned(self, order: Order) -> MergePlan:
        from mtl_lora_cli.export.merge import plan_merge

        how = self._quantised(order) if order.options.base == "dequantized" else None
        updates, lengths = order.parts
        whole, sight = order.run.adapter.whole, _sight(order.run)
        return plan_merge(order.run.base, updates, how, lengths, whole, sight)

    def _quantised(self, order: Order) -> Quantised | None:
        """How the run saw the base weights; None: as they are."""
        from mtl_lora_cli.export.quantised import quantised

        run = order.run
        kind = run.recipe.quantization
        return None if kind == "none" else quantised(run.base, kind, run.dtype)

    def _which_weights(self, order: Order, *, compared: bool) -> list[str]:
        """Of a quantised run: which of the two kinds of weights these are, and how far apart they lie."""
        kind, rounding = order.run.recipe.quantization, self._rounding
        if rounding is None:
            return []
        which = (
            f"These are the **original** weights of the base model, not the {kind} ones that the "
            "adapter was trained on"
            if order.options.base == "original"
            else f"These are the **dequantized** weights, {kind} expanded to "
            f"{str(order.run.dtype).removeprefix('torch.')}: what the adapter was trained on, not "
            "the base model's original ones"
        )
        effect = (
            " What that does to log-probabilities and scores stands under *Check*."
            if compared
            else ""
        )
        return [
            f"{which}. The two differ by ‖W − Ŵ‖ / ‖W‖ = {rounding.mean:.4f} on average over "
            f"{rounding.matrices} matrices, {rounding.largest:.4f} at most (`{rounding.where}`)."
            f"{effect}"
        ]


def _sight(run: Run) -> dict[str, str]:
    """The image processor's file, where the run's pictures have another size than the base model's."""
    images = run.recipe.images
    if images is None or images.size is None or run.vision is None:
        return {}
    own = json.loads(run.vision.processor.to_json_string())
    found = {"preprocessor_config.json": own}
    nested = run.base.folder / "processor_config.json"
    if nested.is_file():
        whole = json.loads(nested.read_text(encoding="utf-8"))
        if "image_processor" in whole:
            found["processor_config.json"] = {**whole, "image_processor": own}
    return {name: json.dumps(content, indent=2) + "\n" for name, content in found.items()}


def _linked(folder: Path) -> list[str]:
    """Which files it shares with the base model."""
    linked = [p.name for p in sorted(folder.glob("*.safetensors")) if p.stat().st_nlink > 1]
    if not linked:
        return []
    return [
        f"Hard links to the base model's own files: {', '.join(f'`{name}`' for name in linked)}. "
        "They can be replaced or deleted here, but what is written *into* them changes the base "
        "model, too."
    ]
