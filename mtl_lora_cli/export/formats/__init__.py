"""The formats in which a task of a run leaves it, each declared in a file of its own.

    @export_format
    class Peft(Format):
        name = "peft"
        ...
        def write(self, order, folder): ...
        def read(self, questions, folder): ...

`export.write` has the one course that all of them take: refuse, write, check, card. What `--format` and
`--against` know is asked here. A file of the user's own declares more with the same decorator. Nothing
here loads a large library: a format does so where it is used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mtl_lora_cli.errors import MtlLoraError, UsageError, did_you_mean
from mtl_lora_cli.extensions import fault_of, is_ours, require_new

if TYPE_CHECKING:
    import numpy as np

    from mtl_lora_cli.evaluation.opened import Run
    from mtl_lora_cli.export.comparison import Comparison
    from mtl_lora_cli.export.order import Order
    from mtl_lora_cli.export.questions import Questions, Scored

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")


@dataclass(frozen=True)
class Reference:
    """The run itself, as something written is compared with it.

    Attributes:
        label: for tables.
        quantization: of the base weights; None: the run's own.
        rank: of the task's update; None: its own.
    """

    label: str
    quantization: str | None = None
    rank: int | None = None


class Format:
    """One format. An object of it lives for one call.

    Attributes:
        name: for `--format`.
        about: what it writes, in a few words.
        marker: the file by which a folder that it wrote is known.
        differs: beginning of the error where what was written differs from the run.
        weights: the base weights that it goes with: the `original` ones, or the run's `own`, which may be
            quantised.
        reducible: whether the update's rank can be lowered.
        pictures: whether it holds a model that is shown pictures, and what of it learned whole.
        early: whether the run can be asked before anything is written: what is written are safetensors.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    marker: ClassVar[str]
    differs: ClassVar[str] = "what was written differs from the run's adapter"
    weights: ClassVar[Literal["original", "own"]] = "original"
    reducible: ClassVar[bool] = True
    pictures: ClassVar[bool] = False
    early: ClassVar[bool] = False

    @property
    def root(self) -> Path:
        """The folder that RUN/TASK lies in by default."""
        return Path("exported", self.name)

    def require_reader(self) -> None:
        """Refuse where that is not installed which reads the format back.

        Raises:
            UsageError: it is not.
        """

    def refuses(self, order: Order) -> None:
        """Refuse what cannot be written, before anything is.

        Raises:
            UsageError: with the reason.
        """

    def size(self, order: Order) -> int:
        """Bytes that stay on the disk."""
        return sum(4 * (down.numel() + up.numel()) for down, up, _ in order.updates.values())

    def scratch(self, order: Order) -> int:
        """Bytes that lie there besides, while it is written and checked."""
        return 0

    def write(self, order: Order, folder: Path) -> None:
        """Fill an empty folder."""
        raise NotImplementedError

    def fault(self, order: Order, folder: Path) -> str | None:
        """In what the files that were written are not what they have to be, before anybody runs them; None: in
        nothing that can be seen so."""
        return None

    def read(self, questions: Questions, folder: Path) -> Scored:
        """Put the check's questions to what was written, by code that had no part in writing it."""
        raise NotImplementedError

    def expect(self, questions: Questions, reference: Reference) -> None:
        """Make ready for `unrounded` what can be, before anything is written: a check's process waits meanwhile."""

    def unrounded(
        self, questions: Questions, folder: Path, reference: Reference
    ) -> Callable[[Sequence[int]], list[np.ndarray]] | None:
        """Take back what the dtype of the written weights rounds, in what `read` has read.

        Args:
            questions: that were asked.
            folder: what was read.
            reference: the run as it has to equal it.

        Returns:
            Scores some rows again, as `Scored.scores`; None where nothing was rounded, or cannot be taken back.
        """
        return None

    def references(self, order: Order) -> list[Reference]:
        """What it is compared with; what it must equal stands first."""
        kind = order.run.recipe.quantization
        beneath = "none" if self.weights == "original" else None
        rank = order.options.rank
        reduced = [Reference(f"the run's update at rank {rank}", beneath, rank)] if rank else []
        if kind == "none" or self.weights == "own":
            return [*reduced, Reference("the run's adapter")]
        return [
            *reduced,
            Reference("the run's adapter on the original weights", "none"),
            Reference(f"the run's adapter on its {kind} weights"),
        ]

    def tolerance(self, run: Run) -> float | None:
        """Largest difference of a log-probability that is allowed; None: by the dtypes that round."""
        return None

    def card(self, order: Order, folder: Path, comparison: Comparison | None) -> str:
        """The text of README.md."""
        from mtl_lora_cli.export.card import model_card

        return model_card(
            order.run,
            order.task,
            comparison,
            title=f"{order.task.name} of {order.run.folder.name}, as {self.name}",
            library=self.name,
            relation="adapter",
            about=f"One task of the run `{order.run.folder.name}`: {self.about}.{order.reduced}",
            use=f"`{self.marker}` in this folder.\n",
        )


FORMATS: dict[str, type[Format]] = {}


def export_format(declared: type[Format]) -> type[Format]:
    """Declare a class as a format.

    Raises:
        UsageError: something is missing, or the name is taken or cannot be one.
    """
    for attribute in ("name", "about", "marker"):
        if not isinstance(getattr(declared, attribute, None), str):
            raise UsageError(f"the format {declared.__name__} has no {attribute}")
    name = declared.name
    if not _NAME.fullmatch(name):
        raise UsageError(f"'{name}' cannot name a format: letters a to z, digits and -")
    for method in ("write", "read"):
        if getattr(declared, method) is getattr(Format, method):
            raise UsageError(f"the format '{name}' has no {method}")
    require_new("format", name, FORMATS.get(name))
    FORMATS[name] = declared
    return declared


def find_format(name: str) -> Format:
    """A new object of the format of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in FORMATS:
        raise UsageError(
            f"--format: expected {', '.join(FORMATS)}, received '{name}'"
            f"{did_you_mean(name, FORMATS)}"
        )
    return FORMATS[name]()


@contextmanager
def blamed(declared: Format | type[Format]) -> Iterator[None]:
    """A fault in an extension's own code is told by its line, and is not ours.

    Raises:
        UsageError: in the place of the fault.
    """
    kind: Any = declared if isinstance(declared, type) else type(declared)
    try:
        yield
    except (MtlLoraError, OSError):
        raise
    except Exception as error:
        if is_ours(kind):
            raise
        raise fault_of(kind, error) from error


for _file in ("merged", "peft", "gguf", "gguf_merged", "onnx"):  # in the order of tables
    import_module(f"{__name__}.{_file}")
