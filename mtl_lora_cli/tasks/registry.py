"""Finding a template by the name that a recipe gives it.

A name is, in this order: a path ending in `.yaml` beside the recipe; a bundled template, in full
(`glue/sst2`) or by its last part where only one has it (`sst2`); a template that an installed
package offers under the entry point group `mtl_lora.templates`. Bundled names come first, so that
installing a package never changes what an existing recipe means.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path

from mtl_lora_cli.errors import UsageError, did_you_mean
from mtl_lora_cli.resources import bundled, expanded
from mtl_lora_cli.tasks.template import Template, read_template

GROUP = "mtl_lora.templates"
_SUFFIXES = (".yaml", ".yml")


def template_names() -> dict[str, Path]:
    """The bundled templates: `glue/sst2` and its file, and so on, in order of name."""
    return dict(_bundled(bundled("data_templates")))


@cache  # these files are part of the installed package
def _bundled(folder: Path) -> dict[str, Path]:
    return _templates_in(folder)


def installed_templates() -> dict[str, Path]:
    """The templates of installed packages.

    An entry point gives a path, or a function that returns one: of a YAML file, named like the
    entry point, or of a folder of them, named `ENTRY_POINT/FILE`.

    Raises:
        UsageError: an entry point cannot be loaded, or gives no path.
    """
    found: dict[str, Path] = {}
    for point in metadata.entry_points(group=GROUP):
        try:
            target = point.load()
            path = Path(target() if callable(target) else target)
        except Exception as error:  # a stranger's module may fail in any way
            what = f"{type(error).__name__}: {error}"
            raise UsageError(
                f"the installed templates '{point.name}' ({point.value}) cannot be loaded: {what}"
            ) from None
        if path.is_dir():
            found |= _templates_in(path, prefix=f"{point.name}/")
        else:
            found[point.name] = path
    return found


def find_template(name: str, beside: Path | None) -> tuple[str, Path, Template]:
    """The template that a recipe means by `name`.

    Args:
        name: as written in the recipe.
        beside: the recipe's folder, from which paths start; None: the working directory.

    Returns:
        Its full name (a path stays as written), its file, and the template.

    Raises:
        UsageError: nothing, or more than one thing, has that name.
        ProblemsError: the file has faults.
    """
    if name.endswith(_SUFFIXES):
        path = (beside or Path()) / expanded(name)
        return name, path, read_template(path)
    known: dict[str, Path] = {}
    for source in (template_names, installed_templates):
        templates = source()
        full = _full_name(name, templates)
        if full is not None:
            return full, templates[full], read_template(templates[full])
        known |= templates
    near = did_you_mean(name, [*known, *(_last_part(full) for full in known)])
    raise UsageError(f"unknown template '{name}'{near or '; `mtl-lora tasks` lists them'}")


def _full_name(name: str, known: Iterable[str]) -> str | None:
    if name in known:
        return name
    candidates = [full for full in known if _last_part(full) == name]
    if len(candidates) > 1:
        raise UsageError(
            f"the template '{name}' could be {' or '.join(candidates)}; write its full name"
        )
    return candidates[0] if candidates else None


def _last_part(name: str) -> str:
    return name.rpartition("/")[2]


def _templates_in(folder: Path, prefix: str = "") -> dict[str, Path]:
    files = sorted(path for path in folder.rglob("*") if path.suffix in _SUFFIXES)
    return {prefix + path.relative_to(folder).with_suffix("").as_posix(): path for path in files}
