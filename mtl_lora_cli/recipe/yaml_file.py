"""Reading YAML so that every error can name its file, line and key.

YAML 1.2's core rules are used: `yes` and `no` are words, `3e-4` is a number, a key may stand once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mtl_lora_cli.errors import Problem, ProblemsError, did_you_mean, file_problem

KeyPath = tuple[str | int, ...]
Spelled = tuple[str, ...]


def spelled(path: KeyPath) -> Spelled:
    """A path as written: a key `0` and the index 0 are both "0"."""
    return tuple(map(str, path))


class StrictModel(BaseModel):
    """Base of everything read from YAML: unknown keys and wrong types are errors.

    Attributes:
        elsewhere: keys that are none here, but that people look for → what is so instead.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    elsewhere: ClassVar[Mapping[str, str]] = {}


_MOST_LINES = 200_000
_LONG = 50_000  # characters; people write less
ModelT = TypeVar("ModelT", bound=StrictModel)


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars instead of YAML 1.1's."""


class _FastLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The same by libyaml, ten times as fast: for what programs wrote, a run of a thousand tasks."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}",
        re.compile(rf"^(?:{_pattern})$"),
        [char if char != "\0" else "" for char in _first],
    )


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    text = loader.construct_scalar(node).lower()
    return float(re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", text))


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)
_FastLoader.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers
_FastLoader.yaml_constructors = _Loader.yaml_constructors


@dataclass
class Document:
    """A parsed file: its data, and the line on which each key stands."""

    file: str
    data: Any
    lines: dict[Spelled, int] = field(default_factory=dict)
    origins: dict[Spelled, str] = field(default_factory=dict)  # keys set elsewhere than in the file

    def set_elsewhere(self, path: KeyPath, origin: str) -> None:
        """The key at `path`, and all below it, no longer come from the file."""
        names = spelled(path)
        self.lines = {key: n for key, n in self.lines.items() if key[: len(names)] != names}
        self.origins[names] = origin

    def where(self, path: KeyPath) -> tuple[str, int | None]:
        """The file (or 'command line') and line of the nearest known key on the path."""
        names = spelled(path)
        for length in range(len(names), 0, -1):
            if names[:length] in self.origins:
                return self.origins[names[:length]], None
            if names[:length] in self.lines:
                return self.file, self.lines[names[:length]]
        return self.file, self.lines.get(())


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would read as something else than text."""


_Dumper.yaml_implicit_resolvers = {
    first: [
        *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
        *_Loader.yaml_implicit_resolvers.get(first, []),
    ]
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
}


def dump_yaml(data: Any) -> str:
    """YAML that reads back as the same data, here and by readers of YAML 1.1."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def dump_flow(data: Any) -> str:
    """YAML on one line, `{path: rows, splits: {train: train.jsonl}}`."""
    text = yaml.dump(
        data,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=True,
        width=math.inf,
    )
    return text.strip()


def parse_scalar(text: str) -> Any:
    """A value as it would be read in a recipe: `3e-4` is a float, `[q_proj, k_proj]` a list."""
    return parse_document(text, "").data


def read_document(path: str | Path, what: str = "recipe") -> Document:
    """Parse one YAML file.

    Raises:
        ProblemsError: the file is missing, not text, not YAML, or repeats a key.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise file_problem(path, f"no such {what} file") from None
    except IsADirectoryError:
        raise file_problem(path, f"is a folder, expected a {what} file") from None
    except UnicodeDecodeError as error:
        raise file_problem(path, f"not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise file_problem(path, f"cannot be read: {error.strerror}") from None
    return parse_document(text, str(path))


def parse_document(text: str, file: str) -> Document:
    """Parse YAML text that stands in (or came from) `file`."""
    document = Document(file=file, data=None)
    try:
        loader, node = _composed(text)
        if node is not None:
            _note_lines(node, (), document)
            document.data = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else None
        raise file_problem(file, f"not valid YAML: {error.problem}", line=line) from None
    except yaml.YAMLError as error:
        raise file_problem(file, f"not valid YAML: {error}") from None
    except RecursionError:
        raise file_problem(file, "not valid YAML: nested too deeply, or within itself") from None
    except (ValueError, KeyError, AttributeError) as error:  # a tag that its value does not fit
        raise file_problem(file, f"not valid YAML: {error}") from None
    return document


def _composed(text: str) -> tuple[Any, Any]:
    """A loader, and what it made of a text; faults are told in one way, whatever the length."""
    if len(text) > _LONG:
        try:
            fast = _FastLoader(text)
            return fast, fast.get_single_node()
        except yaml.YAMLError:
            pass
    loader = _Loader(text)
    return loader, loader.get_single_node()


def _note_lines(node: yaml.Node, path: Spelled, document: Document) -> None:
    document.lines.setdefault(path, node.start_mark.line + 1)
    if len(document.lines) > _MOST_LINES:  # a few aliases of aliases stand for billions of values
        raise file_problem(document.file, f"holds more than {_MOST_LINES:,} keys and values")
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise file_problem(
                    document.file, "a key must be a word", line=key_node.start_mark.line + 1
                )
            key = key_node.value
            if key in seen:
                raise file_problem(
                    document.file,
                    f"the key '{key}' stands twice",
                    line=key_node.start_mark.line + 1,
                )
            seen.add(key)
            document.lines[(*path, key)] = key_node.start_mark.line + 1
            _note_lines(value_node, (*path, key), document)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            document.lines[(*path, str(index))] = item.start_mark.line + 1
            _note_lines(item, (*path, str(index)), document)


def validate_document(document: Document, model: type[ModelT]) -> ModelT:
    """Check a document against its schema; every fault found is reported at once.

    Raises:
        ProblemsError: with one line for each unknown key, wrong type or value out of range.
    """
    if not isinstance(document.data, dict):
        raise file_problem(
            document.file, f"expected keys and values, received {_shown(document.data)}"
        )
    try:
        return model.model_validate(document.data)
    except ValidationError as error:
        raise ProblemsError(
            _problem(document, model, detail)
            for detail in error.errors(include_url=False, include_context=True)
        ) from None


def read_model(path: str | Path, model: type[ModelT], what: str = "recipe") -> ModelT:
    """`read_document` and `validate_document` in one."""
    return validate_document(read_document(path, what), model)


def _problem(document: Document, model: type[StrictModel], detail: Any) -> Problem:
    path = _data_path(document.data, detail["loc"])
    file, line = document.where(path)
    key = ".".join(str(part) for part in path)
    kind = detail["type"]
    elsewhere = model.elsewhere if len(path) == 1 else {}
    if kind == "extra_forbidden" and key in elsewhere:
        message = f"is no key: {elsewhere[key]}"
    elif kind == "extra_forbidden":
        known = _fields_at(model, path[:-1])
        message = f"unknown key{did_you_mean(str(path[-1]), known)}"
        if "did you mean" not in message and known:
            message += f"; known keys: {', '.join(sorted(known))}"
    elif kind == "missing":
        message = "is required and missing"
    elif kind == "value_error":
        message = str(detail["ctx"]["error"])
    else:
        message = (
            f"{detail['msg'][0].lower()}{detail['msg'][1:]}, received {_shown(detail['input'])}"
        )
    return Problem(file, line, key, message)


def _data_path(data: Any, location: tuple[str | int, ...]) -> KeyPath:
    """Pydantic's location without the names of union members, which no user wrote."""
    path: list[str | int] = []
    for position, part in enumerate(location):
        if isinstance(data, dict) and part in data:
            data = data[part]
        elif isinstance(data, dict) and isinstance(part, str) and position == len(location) - 1:
            data = None  # a missing key, or one that a validator names
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            continue
        path.append(part)
    return tuple(path)


def _fields_at(model: Any, path: KeyPath) -> set[str]:
    """Names of the keys that the schema knows below `path`."""
    candidates = [model]
    for part in path:
        following: list[Any] = []
        for candidate in candidates:
            if isinstance(part, int):
                following.append(candidate)
            elif part in candidate.model_fields:
                following.extend(_models_in(candidate.model_fields[part].annotation))
        candidates = following
    return {name for candidate in candidates for name in _keys_of(candidate)}


def _keys_of(model: Any) -> Iterable[str]:
    """A model's keys, or those that it says it may have in another form."""
    known_keys = getattr(model, "known_keys", None)
    return known_keys() if known_keys is not None else model.model_fields


def _models_in(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [
        model for argument in getattr(annotation, "__args__", ()) for model in _models_in(argument)
    ]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
