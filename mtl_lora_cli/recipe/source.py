"""`source`: where rows come from, and how their files are read."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from mtl_lora_cli.recipe.names import Name
from mtl_lora_cli.recipe.yaml_file import StrictModel

SPLITS = ("train", "validation", "test")


def _texts(names: Any) -> Any:
    """`1` and `"1"` in a column are one value."""
    if not isinstance(names, dict):
        return names
    return {str(key) if type(key) is int else key: value for key, value in names.items()}


def _one_character(delimiter: Any) -> Any:
    """`tab` is a word for the one that is hard to write."""
    if delimiter == "tab":
        return "\t"
    if isinstance(delimiter, str) and (len(delimiter) != 1 or delimiter in '"\r\n'):
        raise ValueError(f"expected one character, or tab, received {delimiter!r:.60}")
    return delimiter


def _columns_form(value: Any) -> str:
    return "renamed" if isinstance(value, dict) else "named"


ColumnNames = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
Columns = Annotated[
    Annotated[ColumnNames, Tag("named")] | Annotated[dict[str, str], Tag("renamed")],
    Discriminator(_columns_form),
]


LayoutName = Literal[
    "folders", "nyud-mt", "nyu-mat", "pascal-context", "vqa-v2", "gqa", "nlvr2", "coco-captions"
]


class Source(StrictModel):
    """Where a task's rows come from: exactly one of `sample`, `path` and `hub`."""

    sample: Name | None = None  # a bundled sample
    path: str | None = None  # a file, or a folder with train.*, validation.*, test.*
    hub: str | None = None  # a data set on the hub, `owner/name`
    config: str | None = None  # the hub data set's configuration
    revision: str | None = None  # the hub data set's revision
    # split of ours -> file below `path`, or name of the hub's split
    splits: dict[Literal["train", "validation", "test"], str] | None = None
    # A folder as others lay it out: pictures and maps (docs/dense.md), or questions about pictures (docs/pictures.md).
    layout: LayoutName | None = None
    # How tables as text are written, where their ending does not say it; see docs/tasks.md.
    delimiter: Annotated[str | None, BeforeValidator(_one_character)] = None
    quoting: Literal["csv", "none"] | None = None
    columns: Columns | None = None  # of files without a header; or a name -> another one
    # With another number of fields; of a stream whatever row cannot be learned.
    broken_rows: Literal["error", "drop"] | None = None
    # Training rows are taken `buffer` by `buffer` from the files, which are never all on this disk; see docs/tasks.md.
    stream: bool | None = None
    buffer: Annotated[int, Field(ge=1)] | None = None  # rows that are shuffled together; 100,000
    # One file for many tasks: the column that says which task a row belongs to. A recipe's entry
    # with such a source stands for all of its tasks, or for the one that `task` names.
    task_column: str | None = None
    # value in the column -> task name
    task_names: Annotated[dict[str, Name] | None, BeforeValidator(_texts)] = None
    task: Name | None = None

    @property
    def window(self) -> int:
        """Rows of a stream that are shuffled together."""
        return self.buffer or 100_000

    @property
    def drops_rows(self) -> bool:
        """Rows of its stream that cannot be learned are left out."""
        return bool(self.stream) and self.broken_rows == "drop"

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        """`source: some/path` and `source: sample:NAME` are short for the long forms."""
        if isinstance(value, str):
            return {"sample": value[7:]} if value.startswith("sample:") else {"path": value}
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> Source:
        given = [name for name in ("sample", "path", "hub") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"expected exactly one of sample, path and hub, received {', '.join(given) or 'none'}"
            )
        for name in ("config", "revision"):
            if getattr(self, name) is not None and self.hub is None:
                raise ValueError(f"'{name}' goes with a hub source only")
        for name in ("delimiter", "quoting", "broken_rows", "layout"):
            if getattr(self, name) is not None and self.path is None:
                raise ValueError(f"'{name}' goes with a path only")
        if self.stream and self.path is None:
            raise ValueError(
                "'stream' goes with a path only; of the hub: path: hf://datasets/owner/name"
            )
        if self.stream and self.task_column is not None:
            raise ValueError("'stream' does not go with a task_column")
        if not self.stream and self.buffer is not None:
            raise ValueError("'buffer' goes with stream: true")
        for name in (
            "splits",
            "delimiter",
            "quoting",
            "columns",
            "broken_rows",
            "task_column",
            "stream",
        ):
            if self.layout is not None and getattr(self, name) is not None:
                raise ValueError(f"'{name}' does not go with a layout: its rows are files")
        if isinstance(self.columns, list):
            if self.path is None:
                raise ValueError("'columns' as a list goes with a path only")
            if len(set(self.columns)) < len(self.columns):
                raise ValueError("two of the 'columns' have the same name")
        for name in ("task_names", "task"):
            if getattr(self, name) is not None and self.task_column is None:
                raise ValueError(f"'{name}' goes with a task_column only")
        return self
