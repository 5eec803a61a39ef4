"""From a recipe file and overrides on the command line to a checked, resolved recipe."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtl_lora_cli.adapters.methods import common_keys
from mtl_lora_cli.errors import Problem, ProblemsError, UsageError, did_you_mean
from mtl_lora_cli.extensions import load_extensions
from mtl_lora_cli.recipe.schema import ENVIRONMENT, Recipe
from mtl_lora_cli.recipe.yaml_file import (
    Document,
    KeyPath,
    dump_yaml,
    parse_scalar,
    read_document,
    validate_document,
)
from mtl_lora_cli.resources import bundled, expanded

COMMAND_LINE = "command line"
_OF_A_SOURCE = re.compile(r"tasks\.\d+\.source")  # keys of what rows are read from
# What tasks that are added to a run have in common with it.
INHERITED = (
    "base_model",
    "dtype",
    "quantization",
    "prompt_format",
    "chat",
    "control_tokens",
    "images",
    "adapter",
)


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe and where it came from.

    Attributes:
        recipe: checked, with defaults filled in.
        path: the file.
        document: its keys' lines, for errors that only show later.
    """

    recipe: Recipe
    path: Path
    document: Document

    @property
    def base(self) -> Path:
        """The folder that relative paths in the recipe are relative to."""
        return self.path.resolve().parent

    def base_of(self, path: KeyPath) -> Path:
        """The folder that a relative path under one key is relative to.

        What is typed on the command line is relative to where it is typed.
        """
        return Path.cwd() if self.document.where(path)[0] == COMMAND_LINE else self.base

    def problem(self, path: KeyPath, message: str) -> ProblemsError:
        """An error about one key, naming its file and line."""
        file, line = self.document.where(path)
        return ProblemsError([Problem(file, line, ".".join(map(str, path)), message)])


def find_recipe(name: str) -> Path:
    """A recipe file: as named, or one of the bundled recipes (`quickstart`, `quickstart.yaml`).

    Raises:
        UsageError: neither exists.
    """
    path = Path(name)
    if path.exists():
        return path
    known = {file.stem: file for file in sorted(bundled("recipes").glob("*.yaml"))}
    stem = path.name.removesuffix(".yaml")
    if stem in known and path.parent.name in ("", "recipes"):
        return known[stem]
    raise UsageError(
        f"{name}: no such recipe file{did_you_mean(stem, known)}; "
        f"bundled recipes: {', '.join(known) or 'none'}"
    )


def load_recipe(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    heir_of: Recipe | None = None,
    with_data: bool = True,
) -> LoadedRecipe:
    """Read, override and check a recipe.

    Args:
        path: the YAML file.
        overrides: `key.path=value`; values are read as YAML; a task is named by its name or index.
        heir_of: where `INHERITED` keys come from that are left out; by default none do.
        with_data: whether the tasks' rows are going to be read. If not, environment variables that their
            sources name need not be set.

    Raises:
        ProblemsError: with one line for every fault.
        UsageError: an override that is not `key.path=value`.
    """
    document = read_document(path)
    data = copy.deepcopy(document.data)
    if isinstance(data, dict):
        for override in overrides:
            _override(data, override, document)
        if heir_of is not None:
            _fill(data, _inheritance(data, heir_of))
        problems: list[Problem] = []
        data = _expand(data, (), document, problems)
        if not with_data:
            problems = [one for one in problems if not _OF_A_SOURCE.match(one.key)]
        if problems:
            raise ProblemsError(problems)
        _extend(data, document, path, heir_of)
    document.data = data
    return LoadedRecipe(validate_document(document, Recipe), path, document)


def load_extensions_of(path: Path) -> None:
    """Run the extensions that a run's recipe names, for what needs no more of it.

    Raises:
        ProblemsError: the recipe cannot be read, or a file of its is missing or fails.
    """
    document = read_document(path)
    if isinstance(document.data, dict):
        _extend(document.data, document, path, None)


def _extend(data: dict[str, Any], document: Document, path: Path, heir_of: Recipe | None) -> None:
    """Run a recipe's extensions before its other keys are checked, and give their absolute paths.

    Raises:
        ProblemsError: a file is missing or fails, or lies in a run's folder: opening a stranger's run
            must not run what came with it.
    """
    inherited = [] if heir_of is None else heir_of.extensions
    files = data.get("extensions", [])
    if not isinstance(files, list) or not all(isinstance(one, str) for one in files):
        return  # the schema says so
    folder = path.resolve().parent
    found = list(inherited)
    for number, name in enumerate(files):
        key = ("extensions", number)
        where, line = document.where(key)
        file = (Path.cwd() if where == COMMAND_LINE else folder) / name
        problem = None
        if not file.is_file():
            problem = f"no such file {file}"
        elif (folder / "tasks.json").is_file() and file.resolve().is_relative_to(folder):
            problem = f"{file} lies in the run's folder, and is not run; move it elsewhere"
        if problem is not None:
            raise ProblemsError([Problem(where, line, f"extensions.{number}", problem)])
        found.append(str(file.resolve()))
    if found:
        data["extensions"] = list(dict.fromkeys(found))
        load_extensions(data["extensions"])


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every default filled in."""
    data = recipe.model_dump(mode="json", exclude_none=False)
    for task in data["tasks"]:
        task["source"] = task["source"] and {
            k: v for k, v in task["source"].items() if v is not None
        }
    return dump_yaml(data)


def _inheritance(data: Mapping[str, Any], heir_of: Recipe) -> dict[str, Any]:
    """What is inherited; of the adapter's keys another method takes those that every method reads."""
    beneath = heir_of.model_dump(mode="json", include=set(INHERITED))
    given = data.get("adapter")
    if (
        isinstance(given, dict)
        and given.get("method", heir_of.adapter.method) != heir_of.adapter.method
    ):
        common = common_keys()
        beneath["adapter"] = {k: v for k, v in beneath["adapter"].items() if k in common}
    return beneath


def _fill(data: dict[str, Any], beneath: Mapping[str, Any]) -> None:
    """Give `data` what it leaves out and `beneath` has."""
    for key, value in beneath.items():
        here = data.setdefault(key, value)
        if here is not value and isinstance(here, dict) and isinstance(value, Mapping):
            _fill(here, value)


def _override(data: dict[str, Any], text: str, document: Document) -> None:
    key, separator, value = text.partition("=")
    parts = key.split(".")
    if not separator or not all(parts):
        raise UsageError(f"'{text}': expected key.path=value, such as training.seed=1")
    try:
        parsed = parse_scalar(value)
    except ProblemsError:
        raise UsageError(f"'{text}': the value is not valid YAML") from None
    here: Any = data
    path: list[str | int] = []
    for part in parts[:-1]:
        place: Any = _place(here, part, text)
        path.append(place)
        below = here.get(place) if isinstance(here, dict) else here[place]
        if not isinstance(below, dict | list):
            here[place] = {}
            document.set_elsewhere(tuple(path), COMMAND_LINE)
        here = here[place]
    place = _place(here, parts[-1], text)
    path.append(place)
    here[place] = parsed
    document.set_elsewhere(tuple(path), COMMAND_LINE)


def _place(here: Any, part: str, text: str) -> str | int:
    if not isinstance(here, list):
        return part
    names = [item.get("name") if isinstance(item, dict) else None for item in here]
    if part in names:
        return names.index(part)
    if part.isdecimal() and int(part) < len(here):
        return int(part)
    known = [str(name) for name in names if name]
    raise UsageError(
        f"'{text}': no entry '{part}'{did_you_mean(part, known)}; known: {', '.join(known)}"
    )


def _expand(value: Any, path: KeyPath, document: Document, problems: list[Problem]) -> Any:
    """Replace `${NAME}` and `${NAME:-default}` in every string, and a leading `~` in paths."""
    if isinstance(value, dict):
        return {k: _expand(v, (*path, k), document, problems) for k, v in value.items()}
    if isinstance(value, list):
        return [_expand(v, (*path, i), document, problems) for i, v in enumerate(value)]
    if not isinstance(value, str):
        return value

    def replace(match: Any) -> str:
        name, default = match.group(1), match.group(2)
        found = os.environ.get(name) or default
        if found is None:
            file, line = document.where(path)
            key = ".".join(map(str, path))
            problems.append(Problem(file, line, key, f"the environment variable {name} is not set"))
            return ""
        return str(found)

    text = ENVIRONMENT.sub(replace, value)
    return str(expanded(text)) if text.startswith("~/") else text


def describe_changes(
    before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = ""
) -> list[str]:
    """Lines `key: before → after` for every key in which two recipes differ."""
    lines: list[str] = []
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += describe_changes(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {old!r} → {new!r}")
    return lines
