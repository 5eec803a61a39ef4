"""Answers as a column of pandas frames: for Spark's `mapInPandas`, for `map_batches` over a Ray data set of one's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.evaluation.opened import open_run
from mtl_lora_cli.evaluation.predict import Predictor
from mtl_lora_cli.runs.folder import find_run

if TYPE_CHECKING:
    import pandas

Frames = Callable[[Iterable["pandas.DataFrame"]], Iterator["pandas.DataFrame"]]


class FramePredictor:
    """A finished run that answers the rows of frames; it is loaded once, where it is made.

    What comes back is the frame with one more column of texts, each the JSON of a prediction, as
    `mtl-lora predict` prints it: one type, whatever the tasks are.

    Args:
        run: its name or path.
        runs: the folder in which runs lie.
        task, task_column: see `Predictor.predict`.
        column: that answers stand in.
        integers, floats: columns of whole numbers, and of others. pandas holds whole numbers as 1.0 where some of a
            frame are missing, which a template would print otherwise; what a column is has to be said then.
        root: the folder that paths of pictures in rows are relative to.
        force: go on where the base model is not the one that the adapter was trained on.

    Raises:
        UsageError: there is no such run, or it answers with maps.
    """

    def __init__(
        self,
        run: str | Path,
        *,
        runs: str | Path = "runs",
        task: str | Sequence[str] | None = None,
        task_column: str | None = None,
        column: str = "prediction",
        integers: Sequence[str] = (),
        floats: Sequence[str] = (),
        root: str | Path | None = None,
        force: bool = False,
    ) -> None:
        opened = open_run(find_run(str(run), Path(runs)), force=force)
        if opened.of_maps:
            raise UsageError(f"run '{opened.folder.name}' answers with maps: use predict --input")
        self._predictor = Predictor(opened, None if root is None else Path(root))
        self._task, self._task_column, self._column = task, task_column, column
        self._integers, self._floats = frozenset(integers), frozenset(floats)

    def __call__(self, frame: pandas.DataFrame) -> pandas.DataFrame:
        """Answer all rows of a frame.

        Raises:
            UsageError: a row cannot be answered, there is such a column already, or whole numbers stand beside
                missing ones in a column that is neither in `integers` nor in `floats`.
        """
        if self._column in frame.columns:
            raise UsageError(f"the frame has a column '{self._column}' already: name another")
        self._require_numbers(frame)
        known = frame.astype(object).where(frame.notna(), None)
        rows: list[dict[str, Any]] = [
            {str(name): self._cell(str(name), value) for name, value in row.items()}
            for row in known.to_dict("records")
        ]
        found = self._predictor.predict(rows, task=self._task, task_column=self._task_column)
        texts = [json.dumps(one, ensure_ascii=False, allow_nan=False) for one in found]
        return frame.assign(**{self._column: texts})

    def _cell(self, name: str, value: Any) -> Any:
        if name in self._integers and isinstance(value, float) and value.is_integer():
            return int(value)
        return _plain(value)

    def _require_numbers(self, frame: pandas.DataFrame) -> None:
        """Refuse numbers of which nobody can know how the table has them.

        Raises:
            UsageError: naming the column and what to say of it.
        """
        for name, values in frame.items():
            if values.dtype.kind != "f" or name in self._integers | self._floats:
                continue
            there = values.dropna()
            mixed = 0 < len(there) < len(values) and bool((there % 1 == 0).all())
            if mixed and self._predictor.reads(str(name)):
                raise UsageError(
                    f"column '{name}': whole numbers beside missing ones, which pandas holds as {there.iloc[0]}; say "
                    f"integers=['{name}'] where the table has whole numbers, floats=['{name}'] where it has others"
                )


def _plain(value: Any) -> Any:
    """A cell as a file of rows has it: pandas holds lists as arrays, which templates would show otherwise."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    elif isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return value


@lru_cache(maxsize=1)
def _loaded(run: str, options: tuple[tuple[str, Any], ...]) -> FramePredictor:
    """One a process: Spark calls a function anew for each partition."""
    return FramePredictor(run, **dict(options))


def in_pandas(run: str | Path, **options: Any) -> Frames:
    """A function for Spark's `DataFrame.mapInPandas`: frames in, the same frames with answers out.

    It is loaded in the worker that calls it first, and stays there for the partitions to come.

    Args:
        run: as of `FramePredictor`; a path that all workers can read.
        options: of `FramePredictor`.
    """
    chosen = tuple(
        (name, tuple(value) if isinstance(value, list) else value)
        for name, value in sorted(options.items())
    )

    def answer(frames: Iterable[pandas.DataFrame]) -> Iterator[pandas.DataFrame]:
        predictor = _loaded(str(run), chosen)
        for frame in frames:
            yield predictor(frame)

    return answer
