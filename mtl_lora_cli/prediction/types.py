"""Predictions as Arrow types: the same for all parts of an output, whatever stands in a part's rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

from mtl_lora_cli.tasks.task import Task


def answer_type(tasks: Sequence[Task], *, drawn: bool = False, routed: bool = False) -> Any:
    """The type of an answer to a row of one of these tasks; see `Predictor` for its fields.

    A label is a whole number, a number, a truth value or a text where the labels of all tasks are, and else text.

    Args:
        tasks: that may answer.
        drawn: several answers are.
        routed: the router picks the task.
    """
    import pyarrow as pa

    fields = [("task", pa.string()), ("answer", pa.string())]
    with_choices = [task for task in tasks if task.template.choices is not None]
    if with_choices:
        fields[1:1] = [("label", _label_type(with_choices))]
        fields.append(("probabilities", pa.map_(pa.string(), pa.float64())))
        fields.append(("ends_counted", pa.bool_()))
    if any(task.template.scoring == "expectation" for task in tasks):
        fields.append(("value", pa.float64()))
    fields.append(("truncated", pa.bool_()))
    if drawn:
        fields.append(("answers", pa.list_(pa.string())))
    if any(task.template.conversation is not None for task in tasks):
        fields.append(("messages", pa.string()))  # as JSON: calls of tools have any form
    if routed:
        fields.append(("task_probability", pa.float64()))
    return pa.struct(fields)


def _label_type(tasks: Sequence[Task]) -> Any:
    import pyarrow as pa

    kinds: set[type] = set()
    for task in tasks:
        kinds |= {type(label) for label in task.template.labels or ("",)}
    if kinds == {bool}:
        return pa.bool_()
    if kinds == {int}:
        return pa.int64()
    return pa.float64() if kinds <= {int, float} else pa.string()


def map_type(tasks: Mapping[str, Any] | None = None) -> Any:
    """The type of a map's place; of several tasks: of the answers of each.

    Args:
        tasks: the type of each, by name.
    """
    import pyarrow as pa

    if tasks is not None:
        return pa.struct(list(tasks.items()))
    return pa.struct(
        [
            ("task", pa.string()),
            ("map", pa.string()),
            ("size", pa.list_(pa.int32())),
            ("range", pa.list_(pa.float64())),
            ("scale", pa.string()),
            ("bits", pa.int32()),
        ]
    )


def as_type(value: Any, kind: Any) -> Any:
    """An answer as `pyarrow.array` takes it for its type.

    Args:
        value: an answer, or a part of it.
        kind: its type.
    """
    return _reader(kind)(value)


@cache
def _reader(kind: Any) -> Callable[[Any], Any]:
    """What is done with each value of a type: found once, for millions of rows have the same."""
    import pyarrow as pa

    if pa.types.is_map(kind):
        return lambda value: None if value is None else list(value.items())
    if pa.types.is_struct(kind):
        fields = [(field.name, _missing(field), _reader(field.type)) for field in kind]
        return partial(_struct, fields)
    return _text if pa.types.is_string(kind) else lambda value: value


def _struct(fields: Sequence[tuple[str, Any, Callable[[Any], Any]]], value: Any) -> Any:
    if value is None:
        return None
    return {name: read(value[name]) if name in value else missing for name, missing, read in fields}


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _missing(field: Any) -> Any:
    """What stands for a field that an answer does not have: false for what is only said where it is so."""
    return False if field.name in ("truncated", "ends_counted") else None
