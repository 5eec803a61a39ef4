"""Runs the quickstart in an empty folder and writes down what a reader of a pipe sees.

python docs/record_session.py                       # quickstart.md, and the table in README.md
python docs/record_session.py --print KEY=VALUE …   # print the page; changes to the recipe keep it short

Nothing is left out and nothing is added, but a line with the time that each command took. What stands
for this machine alone, the folder of the command and that of the package, is cut off.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

DOCS = Path(__file__).resolve().parent
REPOSITORY = DOCS.parent
SCRIPT = REPOSITORY / "recipes" / "quickstart.sh"
PAGE = DOCS / "quickstart.md"
README = REPOSITORY / "README.md"
BEGIN, END = "<!-- quickstart: made by docs/record_session.py -->", "<!-- quickstart ends -->"
PACKAGES = ("torch", "transformers", "safetensors", "mtl-lora")


@dataclass
class Part:
    """A heading of the script, the commands below it, and all their lines."""

    title: str
    lines: list[str] = field(default_factory=list)
    seconds: float = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--print", action="store_true", help="write no file")
    parser.add_argument("overrides", nargs="*", help="changes to the recipe")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        parts = recorded(Path(folder).resolve(), arguments.overrides)
    page = rendered(parts)
    if arguments.print:
        print(page, end="")
        return
    PAGE.write_text(page, encoding="utf-8")
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    behind = rest.partition(END)[2]
    README.write_text(f"{before}{BEGIN}\n{summary(parts)}{END}{behind}", encoding="utf-8")


def recorded(folder: Path, overrides: list[str]) -> list[Part]:
    """What the script printed, in parts; both of its streams go into one pipe.

    Raises:
        SystemExit: when the script fails; its output is then on stderr.
    """
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("MTL_LORA_")},
        "BIN": str(Path(sys.executable).parent),
        "MTL_LORA_CACHE": str(folder / "cache"),
        "NO_COLOR": "1",
    }
    work = folder / "work"
    work.mkdir()
    parts = [Part("")]
    began = time.monotonic()
    with subprocess.Popen(
        ["sh", str(SCRIPT), *overrides],
        cwd=work,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stderr.write(line)
            if line.startswith("== "):
                parts.append(Part(line.removeprefix("== ").strip()))
                began = time.monotonic()
            else:
                parts[-1].lines.append(shortened(line.rstrip("\n"), work))
                parts[-1].seconds = time.monotonic() - began
    if process.returncode != 0:
        sys.exit(f"the quickstart ended with code {process.returncode}")
    return parts[1:]


def shortened(line: str, work: Path) -> str:
    """A line without the folders of this machine."""
    line = line.replace(f"{Path(sys.executable).parent}{os.sep}", "").replace(f"{work}{os.sep}", "")
    return line.replace(str(work.parent), "…").replace(str(REPOSITORY), "…")


def rendered(parts: list[Part]) -> str:
    """The page."""
    text = f"""# The quickstart, recorded

`make quickstart` as it runs once everything is installed: `make record` ran `recipes/quickstart.sh` in an
empty folder with an empty cache, and wrote this page. Nothing is left out but folders of this machine; both
streams stand in their order, as a pipe reads them. On a terminal a live screen stands in the place of the
lines of steps.

{circumstances(parts)}
"""
    for part in parts:
        body = "\n".join(part.lines).strip("\n")
        text += f"\n## {part.title}\n\n```text\n{body}\n```\n"
        text += f"\n{spoken(part.seconds)}.\n"
    return text


def summary(parts: list[Part]) -> str:
    """What the README tells of it: the last evaluation, and where it was made."""
    body = "\n".join(parts[2].lines).strip("\n")
    return (
        f"{circumstances(parts)}\n\nThe evaluation after training printed:\n\n```text\n{body}\n```\n\n"
        "*base* is the untouched model on the same rows, *difference* the score less its score, *p* the paired\n"
        "test of the two, *majority* what always giving the most frequent answer would score, *chance* what\n"
        "guessing would. [docs/quickstart.md](docs/quickstart.md) is the whole session.\n"
    )


def circumstances(parts: list[Part]) -> str:
    total = sum(part.seconds for part in parts)
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return textwrap.fill(
        f"Recorded on {datetime.datetime.now(datetime.UTC):%Y-%m-%d}: {spoken(total)} in all, on "
        f"{os.cpu_count()} cores of {processor()}, Python {platform.python_version()}, {packages}.",
        width=110,
    )


def processor() -> str:
    """The processor's name as Linux tells it, else as Python does."""
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def spoken(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


if __name__ == "__main__":
    main()
