"""Render every row of real data sets with its template, and keep the result in docs/tasks.md.

    python docs/make_task_table.py FOLDER           rewrite the table in the page
    python docs/make_task_table.py FOLDER --check   compare it with the page; exit code 1 if not equal

FOLDER has the layout that docs/real-data.md describes: `glue/NAME`, `commonsense/NAME` in the
LLM-Adapters format, `ads/NAME`, each with train, validation or test as JSON lines. The bundled
samples are rendered, too. A row that a template cannot render, or a file whose rows are not as many
as its lines, ends the script with exit code 1.
"""

from __future__ import annotations

import argparse
import gzip
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mtl_lora_cli.data.prepare import read_examples
from mtl_lora_cli.errors import MtlLoraError
from mtl_lora_cli.recipe.source import SPLITS, Source
from mtl_lora_cli.resources import bundled
from mtl_lora_cli.tasks.registry import find_template, template_names
from mtl_lora_cli.tasks.task import Task

PAGE = Path(__file__).resolve().parent / "tasks.md"
BEGIN = "<!-- task table: made by docs/make_task_table.py -->"
END = "<!-- end of task table -->"
ENDINGS = (".jsonl", ".jsonl.gz")

# Data sets whose template has another name; `commonsense/*` all take commonsense/llm_adapters.
TEMPLATES = {
    "ads/amazon_google": "ads/product_matching",
    "ads/esci_us_sample": "ads/esci",
}
HEADER = ("data set", "template", "file", "rows", "rendered", "choices", "majority")


@dataclass(frozen=True)
class Line:
    """What became of one file.

    Attributes:
        data_set, template, file: what was rendered, with what.
        rows: lines of the file.
        rendered: examples with a right answer among their choices.
        choices: the numbers of choices that occur.
        majority: share of the most frequent right choice, by its place among the choices.
    """

    data_set: str
    template: str
    file: str
    rows: int
    rendered: int
    choices: tuple[int, ...]
    majority: float

    @property
    def cells(self) -> tuple[str, ...]:
        """The line as it stands in the page."""
        few, many = self.choices[0], self.choices[-1]
        return (
            self.data_set,
            f"`{self.template}`",
            self.file,
            f"{self.rows:,}",
            f"{self.rendered:,}",
            str(few) if few == many else f"{few} to {many}",
            f"{self.majority:.1%}",
        )


def main() -> int:
    """Make or check the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--check", action="store_true", help="compare with the page, write nothing")
    arguments = parser.parse_args()
    try:
        table = make_table(arguments.folder)
    except MtlLoraError as error:
        print("\n".join(f"error: {line}" for line in error.lines), file=sys.stderr)
        return 1
    page = PAGE.read_text(encoding="utf-8")
    updated = replaced(page, table)
    if not arguments.check:
        PAGE.write_text(updated, encoding="utf-8")
    elif updated != page:
        print(f"{PAGE.name} is not what {arguments.folder} gives", file=sys.stderr)
        return 1
    return 0


def make_table(folder: Path) -> str:
    """The table of all data sets of a folder, in Markdown.

    Raises:
        MtlLoraError: a file or row is wrong, or a file's rows are not as many as its lines.
    """
    lines = [line for data_set, path in data_sets(folder) for line in rendered(data_set, path)]
    used = {line.template for line in lines}
    unused = [name for name in template_names() if name not in used]
    rows = [HEADER, tuple("---" for _ in HEADER), *(line.cells for line in lines)]
    return "\n".join(
        [
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            f"{sum(line.rendered for line in lines):,} rows of {len({x.data_set for x in lines})} "
            f"data sets and {len(used)} templates. Without rows here: "
            f"{', '.join(f'`{name}`' for name in unused)}.",
        ]
    )


def data_sets(folder: Path) -> Iterator[tuple[str, Path]]:
    """Names and folders, in the order of the table."""
    for family in ("glue", "commonsense", "ads"):
        if not (folder / family).is_dir():
            raise MtlLoraError(f"{folder / family}: no such folder")
        for path in sorted((folder / family).iterdir()):
            yield f"{family}/{path.name}", path
    for path in sorted((bundled("data_templates") / "samples").iterdir()):
        if path.is_dir():
            yield f"samples/{path.name}", path


def rendered(data_set: str, path: Path) -> Iterator[Line]:
    """One line for each file of a data set."""
    family = data_set.partition("/")[0]
    name = "commonsense/llm_adapters" if family == "commonsense" else data_set
    full, file, template = find_template(TEMPLATES.get(name, name), None)
    task = Task(
        name=data_set,
        id=0,
        template_name=full,
        template_text=file.read_text(encoding="utf-8"),
        template=template,
        source=Source(path=str(path)),
    )
    for split in SPLITS:
        files = [path / f"{split}{ending}" for ending in ENDINGS]
        found = next((each for each in files if each.is_file()), None)
        if found is None:
            continue
        examples = read_examples(task, split)
        count = lines_in(found)
        if examples is None or len(examples.examples) != count:
            read = 0 if examples is None else len(examples.examples)
            raise MtlLoraError(f"{found}: {count} lines, {read} rows read")
        golds = Counter(example.gold for example in examples.examples)
        yield Line(
            data_set=data_set,
            template=full,
            file=found.name,
            rows=count,
            rendered=sum(golds[gold] for gold in golds if gold >= 0),
            choices=tuple(sorted({len(example.choices) for example in examples.examples})),
            majority=golds.most_common(1)[0][1] / count,
        )


def lines_in(path: Path) -> int:
    """Lines of a file, counted without the reader that is being checked."""
    data = path.read_bytes()
    plain = gzip.decompress(data) if path.suffix == ".gz" else data
    return sum(1 for line in plain.split(b"\n") if line.strip())


def replaced(page: str, table: str) -> str:
    """The page with the table between its two markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{PAGE.name}: the markers {BEGIN} and {END} are missing")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


if __name__ == "__main__":
    raise SystemExit(main())
