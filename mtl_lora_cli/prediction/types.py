"""Predictions as Arrow types: the same for all parts of an output, whatever stands in a part's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    import json

    import pyarrow as pa

    if value is None:
        return None
    if pa.types.is_map(kind):
        return list(value.items())
    if pa.types.is_struct(kind):
        return {
            field.name: _missing(field)
            if field.name not in value
            else as_type(value[field.name], field.type)
            for field in kind
        }
    if pa.types.is_string(kind) and not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return value


def _missing(field: Any) -> Any:
    """What stands for a field that an answer does not have: false for what is only said where it is so."""
    return False if field.name in ("truncated", "ends_counted") else None
