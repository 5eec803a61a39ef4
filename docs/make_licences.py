"""Writes licences.md: what is installed with mtl-lora, and under which licence each says it stands.

python docs/make_licences.py           # from the packages of this environment
python docs/make_licences.py --check   # is the page about the versions of constraints.txt?
"""

from __future__ import annotations

import argparse
import re
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "licences.md"
CONSTRAINTS = DOCS.parent / "constraints.txt"
HEAD = """# Licences

What is installed with mtl-lora (Apache-2.0), in the versions that were tested, and the licence that each
package's own metadata names. Made by `make licences`; `make audit` asks for known vulnerabilities of the
same versions.

Nothing of these is part of this repository or of its wheel. Base models and data sets have licences of
their own: `mtl-lora tasks` names each data set's source, a model's page names its own.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        sys.exit(_difference())
    pins = _pins()
    used = _closure("mtl-lora")
    parts = {
        "With `pip install mtl-lora`": sorted(pins.keys() & used),
        "Only with extras, or to develop it": sorted(pins.keys() - used),
    }
    text = HEAD
    for title, names in parts.items():
        text += f"\n## {title}\n\n| package | version | licence |\n| --- | --- | --- |\n"
        text += "".join(_row(name, pins[name]) for name in names)
    PAGE.write_text(text, encoding="utf-8")


def _pins() -> dict[str, str]:
    """Canonical name → version of constraints.txt."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(name): version.strip() for name, version in pairs}


def _closure(name: str) -> set[str]:
    """The packages that one needs without its extras, and those that these need."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        own = canonicalize_name(waiting.pop())
        if own in found:
            continue
        found.add(own)
        for text in _requirements(own):
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


def _requirements(name: str) -> list[str]:
    try:
        return distribution(name).requires or []
    except PackageNotFoundError:
        return []


def _row(name: str, version: str) -> str:
    try:
        licence = _licence(distribution(name))
    except PackageNotFoundError:
        licence = "not installed where this page was made"
    return f"| {name} | {version} | {licence} |\n"


def _licence(package: Distribution) -> str:
    """SPDX's expression where there is one, else the classifiers, else the first line of the field."""
    expression = package.metadata.get("License-Expression")
    if expression:
        return str(expression)
    classifiers = [
        line.rpartition(" :: ")[2]
        for line in package.metadata.get_all("Classifier") or []
        if line.startswith("License ::") and not line.endswith("OSI Approved")
    ]
    if classifiers:
        return ", ".join(dict.fromkeys(classifiers))
    first = (package.metadata.get("License") or "").strip().splitlines()
    return first[0][:60].replace("|", "/") if first else "not named"


def _difference() -> str | None:
    rows = re.findall(
        r"^\| (\S+) \| (\S+) \| .+ \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
    listed = {name: version for name, version in rows if name not in ("package", "---")}
    wrong = sorted(name for name in {*listed, *_pins()} if listed.get(name) != _pins().get(name))
    return (
        f"docs/licences.md differs from constraints.txt in: {', '.join(wrong)}" if wrong else None
    )


if __name__ == "__main__":
    main()
