"""The pages, and the fenced blocks that stand in them."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted([REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")])
_BLOCK = re.compile(r"^( *)```(\w+)([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`(mtl-lora [a-z][^`]*)`")
_FENCED = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """One command as a reader would type it.

    Attributes:
        words: the program and its arguments, without variables that are set before it.
        source, target: the files behind `<` and `>`.
        output: what stands below it in the block.
    """

    words: tuple[str, ...]
    source: str | None = None
    target: str | None = None
    output: str = ""

    @property
    def text(self) -> str:
        return " ".join(self.words)

    @property
    def arguments(self) -> list[str] | None:
        """What `mtl-lora` is given, perhaps by a launcher; None where it is not called."""
        name = "mtl-lora"
        return list(self.words[self.words.index(name) + 1 :]) if name in self.words else None


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page, line: where its first line stands.
        language: the first word behind the fence.
        words: the others: `exact` (the output is compared line by line), `fails` (its commands must
            end with exit code 2, and the output is compared), `file=NAME` (written before the page's
            commands are run).
        text: what stands in it.
    """

    page: str
    line: int
    language: str
    words: tuple[str, ...]
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[Command]:
        """All commands of a `sh` block, and those behind a `$` of a `console` block."""
        if self.language not in ("sh", "console"):
            return []
        found: list[Command] = []
        for line in re.sub(r"\\\n\s*", "", self.text).splitlines():
            if self.language == "sh" or line.startswith("$ "):
                command = _command(line.removeprefix("$ "))
                found += [] if command is None else [command]
            elif found:
                found[-1] = replace(found[-1], output=f"{found[-1].output}{line}\n")
        return found


def _command(line: str) -> Command | None:
    """A shell's line up to its first pipe; None where it is empty or only a comment."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    files: dict[str, str] = {}
    for place, word in reversed(list(enumerate(words))):
        if word in ("|", "&&", ";"):
            words = words[:place]
        elif word in ("<", ">"):
            files[word] = words[place + 1]
            words = words[:place]
    return Command(tuple(words), files.get("<"), files.get(">")) if words else None


def blocks_of(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order, those of lists, too."""
    text = page.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        yield Block(
            page=page.relative_to(REPOSITORY).as_posix(),
            line=text.count("\n", 0, match.start()) + 2,
            language=match[2],
            words=tuple(match[3].split()),
            text=textwrap.dedent(match[4]),
        )


def imported(name: str) -> ModuleType:
    """A script of docs/, as a module."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def inline_commands(page: Path) -> list[str]:
    """The commands that are named in the midst of a sentence."""
    return _INLINE.findall(_FENCED.sub("", page.read_text(encoding="utf-8")))
