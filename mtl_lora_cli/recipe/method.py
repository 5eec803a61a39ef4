"""`adapter`: the settings that the method itself declares, and what is said of those that it does not read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import PlainValidator, SerializeAsAny, ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from mtl_lora_cli.adapters.methods import DEFAULT, METHODS, reads, unknown_method
from mtl_lora_cli.adapters.methods.base import Settings


def _settings(value: Any) -> Settings:
    """The settings of the method that a recipe's `adapter` names.

    A key that only other methods read must say nothing: it may be null or its default, as it is where
    an older run wrote every key.
    """
    if isinstance(value, Settings):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"expected keys and values, received {value!r:.60}")
    name = value.get("method", DEFAULT)
    if not isinstance(name, str) or name not in METHODS:
        raise _faults([_fault("method", unknown_method(name), name)])
    kind, faults, given = METHODS[name], [], {}
    for key, one in value.items():
        readers = [other for other in METHODS if reads(other, key)]
        if not reads(name, key) and readers:
            if not _says_nothing(key, one, name, readers):
                said = f"'{key}' is not read by method: {name}, only by {', '.join(readers)}"
                faults.append(_fault(key, said, one))
        elif one is not None or key not in kind.model_fields or key in Settings.model_fields:
            given[key] = one  # null is the method's own default
    try:
        settings = kind.model_validate(given)
    except ValidationError as error:
        faults += [_known_fault(detail) for detail in error.errors()]
    if faults:
        raise _faults(faults)
    return settings


def _says_nothing(key: str, value: Any, method: str, readers: Sequence[str]) -> bool:
    """Whether the value is what goes without saying: null, the one default, a single B."""
    if value is None or (key == "up_projections" and value == 1):
        return True
    default = METHODS[readers[0]].start_of(key)
    same = all(METHODS[other].start_of(key) == default for other in readers)
    return same and isinstance(value, bool) == isinstance(default, bool) and value == default


def _fault(key: str, said: str, value: Any) -> InitErrorDetails:
    error = PydanticCustomError("value_error", "{error}", {"error": said})
    return InitErrorDetails(type=error, loc=(key,), input=value)


def _known_fault(detail: ErrorDetails) -> InitErrorDetails:
    return InitErrorDetails(
        type=detail["type"], loc=detail["loc"], input=detail["input"], ctx=detail.get("ctx", {})
    )


def _faults(faults: list[InitErrorDetails]) -> ValidationError:
    return ValidationError.from_exception_data("Adapter", faults)


# The method's own settings: each method declares its keys, in adapters/methods.
Adapter = Annotated[SerializeAsAny[Settings], PlainValidator(_settings)]
