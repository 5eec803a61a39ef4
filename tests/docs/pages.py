"""The pages, and the fenced blocks that stand in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted([REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")])
_BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page, line: where its first line stands.
        language: the first word behind the fence.
        words: the others: `runs` (its commands, or its Python, are run and must end well), `fails`
            (run, and must end with exit code 2), `file=NAME` (written before the page's commands are
            run).
        text: what stands in it.
    """

    page: str
    line: int
    language: str
    words: tuple[str, ...]
    text: str

    @property
    def commands(self) -> list[tuple[list[str], str]]:
        """The arguments of each `mtl-lora` command, and the output that stands below it."""
        found: list[tuple[list[str], str]] = []
        for line in self.text.replace("\\\n", " ").splitlines():
            typed = line if self.language == "sh" else line.removeprefix("$ ")
            arguments = (
                None if self.language == "console" and typed == line else arguments_of(typed)
            )
            if arguments is not None:
                found.append((arguments, ""))
            elif found:
                found[-1] = (found[-1][0], f"{found[-1][1]}{line}\n")
        return found


def arguments_of(line: str) -> list[str] | None:
    """What a shell line gives to `mtl-lora`; None where it runs something else."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    for place, word in enumerate(words):
        if word in ("|", "<", ">", "&&", ";"):
            words = words[:place]
            break
    return words[1:] if words and Path(words[0]).name == "mtl-lora" else None


def blocks_of(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        yield Block(
            page=page.relative_to(REPOSITORY).as_posix(),
            line=text.count("\n", 0, match.start()) + 2,
            language=match[1],
            words=tuple(match[2].split()),
            text=match[3],
        )
