"""What is asked about rows, and what answers mean: all that can be done ahead of the model, and behind it.

A desk belongs to no thread. The model's thread gets packed passes, or a function to call, and nothing else to do.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from mtl_lora_cli.data.picture_rows import picture_address
from mtl_lora_cli.evaluation.asked import Sampling
from mtl_lora_cli.evaluation.choices import Passes, shared_up_to
from mtl_lora_cli.evaluation.map_predictor import encoded_map
from mtl_lora_cli.evaluation.maps import Answering, at_size
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.evaluation.predict import Predictor
from mtl_lora_cli.models.batch import PackedBatch
from mtl_lora_cli.pictures.decode import Site, read_picture
from mtl_lora_cli.prediction.inputs import Part
from mtl_lora_cli.prediction.manifest import MAPS
from mtl_lora_cli.prediction.reading import Chunk
from mtl_lora_cli.prediction.types import answer_type, map_type
from mtl_lora_cli.runs.atomic import write_bytes
from mtl_lora_cli.tasks.chosen import by_router, require_task, several_tasks
from mtl_lora_cli.tasks.maps import spec_of

Prediction = dict[str, Any]
Payload = Sequence[PackedBatch] | Callable[[], Any]

_ROWS = {"cuda": 2048, "cpu": 256}  # with choices, that are put together: some passes
_FREE_ROWS = {"cuda": 1024, "cpu": 128}
_DECODERS = 8


@dataclass(frozen=True)
class How:
    """What is asked about the rows.

    Attributes:
        task, task_column: see `Predictor.predict`.
        temperature, seed, answers: how free answers are drawn; no temperature: as the templates say.
        form: of maps: png or npy.
    """

    task: str | list[str] | None = None
    task_column: str | None = None
    temperature: float | None = None
    seed: int = 0
    answers: int = 1
    form: str = "png"

    def sampling(self, part: Part, row: int) -> Sampling | None:
        """How the answers to rows from that one on are drawn: by part and row, not by when they are."""
        if self.temperature is None:
            return None
        first = zlib.crc32(part.name.encode()) * 2**32 + row
        return Sampling(self.temperature, self.seed, self.answers, first)


class Asked(NamedTuple):
    """Rows on their way through the model.

    Attributes:
        payload: passes, for which the log-probabilities of all their questions come back; or a function, whose
            result does.
        told: from what came back to a prediction for each row.
    """

    payload: Payload
    told: Callable[[Any], list[Prediction]]


class Fit(NamedTuple):
    """How rows go together on a device, known to who has the model.

    Attributes:
        rows: that are put together.
        tokens: of a pass.
        shared_up_to: see `choices.shared_up_to`.
    """

    rows: int
    tokens: int
    shared_up_to: int | None

    @classmethod
    def of(cls, opened: Run) -> Fit:
        """Of a run with its model."""
        rows = _ROWS.get(opened.device.type, 256)
        return cls(rows, opened.tokens_per_pass, shared_up_to(opened.packed))


class Desk(Protocol):
    """Asks about the rows of one kind of run.

    Attributes:
        rows: that are put together.
        kind: the Arrow type of a prediction.
    """

    @property
    def rows(self) -> int: ...

    @property
    def kind(self) -> Any: ...

    def ask(self, chunk: Chunk, part: Part, root: Path) -> Asked:
        """Get rows of a part ready.

        Args:
            chunk: the rows.
            part: that they are of.
            root: the folder that paths of pictures in them are relative to.

        Raises:
            UsageError: one of them cannot be answered; a chunk of that row alone says so, too.
        """
        ...


class _Rooted:
    """One predictor for each folder of rows."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._at: dict[Path, Predictor] = {}

    def __call__(self, root: Path) -> Predictor:
        if root not in self._at:
            self._at[root] = self._predictor.at(root)
        return self._at[root]


class ChoiceDesk:
    """Rows of tasks with choices, one task each.

    Args:
        opened: the run; neither its model nor its device is asked for.
        how: what is asked.
        fit: of the device.
    """

    def __init__(self, opened: Run, how: How, fit: Fit) -> None:
        self._how, self._fit = how, fit
        self._predictor = _Rooted(Predictor(opened, loaded=False))
        self.rows = fit.rows
        named = [task for task in opened.tasks if how.task in (None, task.name)]
        self.kind = answer_type(named)

    def ask(self, chunk: Chunk, part: Part, root: Path) -> Asked:
        """See `Desk`."""
        predictor = self._predictor(root)
        assert not isinstance(self._how.task, list)
        asked = predictor.questions(
            chunk.rows, task=self._how.task, task_column=self._how.task_column
        )
        passes = Passes.build(asked.together, self._fit.shared_up_to, self._fit.tokens)

        def told(values: list[np.ndarray]) -> list[Prediction]:
            return predictor.told(asked, passes.scores(values))

        return Asked(passes.batches, told)


class FreeDesk:
    """Rows of any tasks, several of them a row, free answers, or the router's choice.

    Args:
        opened: the run.
        how: what is asked.
    """

    def __init__(self, opened: Run, how: How) -> None:
        self._how = how
        self._predictor = _Rooted(Predictor(opened))
        self.rows = _FREE_ROWS.get(opened.device.type, 128)
        names = [task.name for task in opened.tasks]
        self._routed = by_router(names, how.task, how.task_column)
        self._several = None if self._routed else several_tasks(names, how.task, how.task_column)
        known = {task.name: task for task in opened.tasks}
        drawn = how.answers > 1
        if self._several:
            tasks = {name: answer_type([known[name]], drawn=drawn) for name in self._several}
            self.kind = map_type(tasks)
        else:
            own = [task for task in opened.tasks if self._routed or how.task in (None, task.name)]
            self.kind = answer_type(own, drawn=drawn, routed=self._routed)

    def ask(self, chunk: Chunk, part: Part, root: Path) -> Asked:
        """See `Desk`."""
        predictor, how = self._predictor(root), self._how
        if not self._routed:
            one = how.task if isinstance(how.task, str) else None
            names: list[str | None] = [*self._several] if self._several else [one]
            for name in names:
                predictor.questions(chunk.rows, task=name, task_column=how.task_column)
        first = chunk.numbers[0] if chunk.numbers else 0
        answer = partial(
            predictor.answer,
            chunk.rows,
            task=how.task,
            task_column=how.task_column,
            sampling=how.sampling(part, first),
        )
        return Asked(answer if chunk.rows else list, list)


class MapDesk:
    """Pictures to maps, which are written as files.

    Args:
        opened: the run with its model.
        how: what is asked.
        output: the folder that the maps are written below.
    """

    def __init__(self, opened: Run, how: How, output: Path) -> None:
        self._output, self._form = output, how.form
        self._answering = Answering(opened)
        self.rows = self._answering.pictures_per_pass
        names = [task.name for task in opened.tasks]
        several = several_tasks(names, how.task, None)
        assert several is not None or not isinstance(how.task, list)
        one = how.task if isinstance(how.task, str) else None
        self._names = several or [require_task(names, one, None)]
        self._alone = several is None
        self._tasks = {task.name: task for task in opened.tasks}
        self._specs = {name: spec_of(self._tasks[name].template) for name in self._names}
        kinds = {name: map_type() for name in self._names}
        self.kind = map_type() if self._alone else map_type(kinds)
        self._pool = ThreadPoolExecutor(_DECODERS)

    def ask(self, chunk: Chunk, part: Part, root: Path) -> Asked:
        """See `Desk`."""
        task = self._tasks[self._names[0]]

        def decoded(placed: tuple[Mapping[str, Any], str]) -> tuple[str, tuple[int, int], Any]:
            row, where = placed
            address = picture_address(task, row, where)
            picture = read_picture(root, address, Site(where, "image"))
            return address, (picture.height, picture.width), self._answering.ready(picture)

        found = list(self._pool.map(decoded, chunk.rows))
        ids = [self._tasks[name].id for name in self._names]
        pixels = [ready for _, _, ready in found]
        raw = partial(self._answering.raw, pixels, ids) if found else dict
        stems = [
            f"{number:08d}-{Path(address.partition('#')[0]).stem}"
            for number, (address, _, _) in zip(chunk.numbers, found, strict=True)
        ]
        sizes = [size for _, size, _ in found]

        def told(maps: dict[int, Any]) -> list[Prediction]:
            rows = zip(range(len(stems)), stems, sizes, strict=True)
            return list(self._pool.map(lambda row: self._written(maps, part, *row), rows))

        return Asked(raw, told)

    def _written(
        self, maps: dict[int, Any], part: Part, place: int, stem: str, size: tuple[int, int]
    ) -> Prediction:
        """A picture's maps, as files."""
        said: Prediction = {}
        for name in self._names:
            spec = self._specs[name]
            values = at_size(maps[self._tasks[name].id][place], spec, size)
            path = self._output / MAPS / name / part.name / f"{stem}.{self._form}"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, encoded_map(values, spec, self._form))
            said[name] = {
                "task": name,
                "map": path.relative_to(self._output).as_posix(),
                "size": list(size),
            }
            if spec.objective == "depth" and self._form == "png":
                said[name] |= {"range": [spec.low, spec.high], "scale": spec.scale, "bits": 16}
        return said[self._names[0]] if self._alone else said
