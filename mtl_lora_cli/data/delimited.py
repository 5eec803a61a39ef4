"""Tables as text: CSV, TSV and their relatives, each row with the line on which it begins.

Values stay strings: whether `007` is a number is for the template to say. Quotation marks have two
meanings in public files. In CSV a field in them may hold delimiters and line ends; in tab-separated
files as GLUE and PAWS publish them they are text. Read by the wrong rule rows vanish or texts keep
marks that are none, so what cannot be right is an error, and what may be wrong is a note.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

from mtl_lora_cli.errors import UsageError, file_problem

_OTHERS = (",", ";", "\t", "|")  # delimiters that are guessed at in errors
_MARK = "\ufeff"  # of byte order, at the start of a file
_MOST_NAMES = 20  # of columns in an error


@dataclass(frozen=True)
class Layout:
    """How files are written, where their ending does not say it.

    Attributes:
        delimiter: one character between fields; None: by the ending.
        quoting: `csv`: a field in quotation marks may hold delimiters, line ends and doubled marks;
            `none`: quotation marks are text; None: by the ending.
        columns: names, where the first line is a row already; or present names → other names.
        broken_rows: `drop` leaves out, and counts, rows with another number of fields.
        of_new_rows: these are the keys of a task's own files, for rows that may lack their labels
            and may come in another format.
    """

    delimiter: str | None = None
    quoting: Literal["csv", "none"] | None = None
    columns: Sequence[str] | Mapping[str, str] | None = None
    broken_rows: Literal["error", "drop"] = "error"
    of_new_rows: bool = False

    @property
    def names(self) -> list[str] | None:
        """Of the columns, for a file without a header."""
        return list(self.columns) if isinstance(self.columns, Sequence) else None

    @property
    def of_tables(self) -> list[str]:
        """The keys that are given and mean something for tables as text alone."""
        given = {
            "delimiter": self.delimiter,
            "quoting": self.quoting,
            "columns as a list": self.names,
            "broken_rows": self.broken_rows == "drop" or None,
        }
        return [key for key, value in given.items() if value is not None]


BY_ENDING = Layout()


@dataclass
class Table:
    """A table as text.

    Attributes:
        text: of the whole file.
        file: as errors show it.
        delimiter: between fields.
        quoted: whether quotation marks mean what they mean in CSV.
        layout: what the source says of it.
        first: the line with which the text begins.
        names: of the columns, where the text is a later part of a table; else known once `rows` has begun.
        notes: what may have been read wrongly, known once `rows` has ended.
    """

    text: str
    file: str
    delimiter: str
    quoted: bool
    layout: Layout
    first: int = 1
    names: list[str] | None = None
    notes: list[str] = field(default_factory=list)

    def rows(self) -> Iterator[tuple[dict[str, str], int]]:
        """Each row and the line on which it begins.

        Raises:
            UsageError: broken quoting, a header that is none, or a row of another length.
        """
        part = self.names is not None
        header, seen = self.names or self.layout.names, part
        dropped: list[int] = []
        begun: list[int] = []
        marked: list[int] = []
        spanning: list[tuple[int, int]] = []
        for record, first, last in self._records():
            if header is not None and not seen and self._is_header(record, first):
                header = None
            seen = True
            if header is None:
                header = self._header(record, first)
                continue
            self.names = header
            if self._begins_another(record, header):
                if self.layout.broken_rows != "drop":
                    raise self._joined(first)
                begun.append(first)
            elif len(record) == len(header):
                if last > first and self.layout.quoting is None:
                    spanning.append((first, last))
                if record[0].startswith(_MARK):
                    marked.append(first)
                yield dict(zip(header, record, strict=True)), first
            elif self.layout.broken_rows == "drop":
                dropped.append(first)
            else:
                raise self._wrong_length(record, header, first)
        if part:
            return
        self._note(dropped, "rows left out for another number of fields", "")
        self._note(begun, "lines left out with which another file begins", "")
        self._note(marked, "rows that begin with a byte order mark, as where files were joined", "")
        if self.layout.quoting is None:
            self._note(
                self._several_rows(spanning, len(header or ())) if spanning else [],
                "rows that hold line ends in quotation marks and look like several rows",
                "where marks are text, say quoting: none; quoting: csv takes this note away",
            )
            self._note(
                [] if self.quoted else self._quoted_as_in_csv(),
                "fields that look quoted as in CSV, read as they stand",
                "quoting: csv takes the marks away, quoting: none takes this note away",
            )

    def _begins_another(self, record: list[str], header: list[str]) -> bool:
        """Whether several files became one: the header of the second would be a row."""
        bare = [record[0].removeprefix(_MARK), *record[1:]]
        # A list of words may hold any word; a text may begin with such a mark.
        return bare == header and (len(header) > 1 or bare != record)

    def _joined(self, line: int) -> UsageError:
        message = (
            "another file begins here: its header would be read as a row; take it away (broken_rows: drop in a "
            "recipe's source leaves such lines out)"
        )
        return file_problem(self.file, message, line=line)

    def _records(self) -> Iterator[tuple[list[str], int, int]]:
        """The fields of each line that is not empty, with its first and last line."""
        if not self.quoted:
            for number, text in enumerate(self._lines(), start=self.first):
                if text:
                    yield text.split(self.delimiter), number, number
            return
        csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than a long document
        lines = io.StringIO(self.text, newline="")
        reader = csv.reader(lines, delimiter=self.delimiter, strict=True)
        before = self.first - 1
        line = self.first
        try:
            for record in reader:
                first, line = line, before + reader.line_num + 1  # a quoted value may span lines
                if record:
                    yield record, first, line - 1
        except csv.Error as error:
            raise self._broken_quoting(error, line) from None

    def _lines(self) -> list[str]:
        # Not splitlines(): a text may hold U+2028 and other ends of line that are none here.
        text = self.text.replace("\r\n", "\n")
        if "\n" not in text:
            text = text.replace("\r", "\n")
        return text.split("\n")

    def _header(self, record: list[str], line: int) -> list[str]:
        if self.layout.delimiter is None and len(record) == 1 and (other := self._other(record, 0)):
            message = (
                f"the only column is {record[0]!r:.80}; say delimiter: '{other}' in the source"
            )
            raise file_problem(self.file, message, line=line)
        if not self.quoted and self.layout.quoting is None:
            marked = [name for name in record if re.fullmatch(r'".*"', name)]
            if marked:
                message = (
                    f"the column {marked[0]} is in quotation marks; say quoting: csv in the source"
                )
                raise file_problem(
                    self.file, f"{message}, or quoting: none if they are part of it", line=line
                )
        return unique_columns(record, self.file, line)

    def _is_header(self, record: list[str], line: int) -> bool:
        """Names are given: the first line must not give them, too, unless it is one of new rows."""
        names = self.layout.names or []
        own = {name.casefold() for name in names}
        found = [value for value in record if value.strip().casefold() in own]
        if self.layout.of_new_rows:
            return bool(found) or len(record) != len(names)
        if found:
            message = f"the first line is a header, it has '{found[0]}'; columns as a list goes with files"
            raise file_problem(
                self.file, f"{message} without one, columns: {{OLD: NEW}} renames", line=line
            )
        return False

    def _several_rows(self, spanning: list[tuple[int, int]], columns: int) -> list[int]:
        """First lines of rows each of whose lines could be a row by itself.

        It has as many fields, and begins or ends, with the label as a rule, as other rows do.
        """
        lines = [line.removesuffix("\r") for line in self.text.split("\n")]
        others = [record for record, first, last in self._records() if first == last]
        values = [{record[place] for record in others} for place in (0, -1)]

        def is_row(line: str) -> bool:
            fields = line.split(self.delimiter)
            known = fields[0] in values[0] or fields[-1] in values[1]
            return len(fields) == columns and known

        return [
            first
            for first, last in spanning
            if all(map(is_row, lines[first - self.first : last - self.first + 1]))
        ]

    def _quoted_as_in_csv(self) -> list[int]:
        """Lines of fields in quotation marks whose marks inside are doubled, as a CSV writer does it."""
        if '""' not in self.text:
            return []
        quoted = re.compile(r'"[^"]*(?:""[^"]*)+"')
        return [
            number
            for number, line in enumerate(self._lines(), start=self.first)
            if '""' in line
            for value in line.split(self.delimiter)
            if quoted.fullmatch(value)
        ]

    def _note(self, lines: list[int], what: str, advice: str) -> None:
        if lines:
            text = f"{self.file}: {what}: {len(lines):,}, the first in line {lines[0]}"
            self.notes.append(f"{text}; {advice}" if advice else text)

    def _other(self, record: list[str], columns: int) -> str:
        """A delimiter that would give the right number of fields, or any if that is not known."""
        text = self.delimiter.join(record)
        for other in _OTHERS:
            found = text.count(other) + 1
            if other != self.delimiter and (found == columns if columns else found > 1):
                return "\\t" if other == "\t" else other
        return ""

    def _wrong_length(self, record: list[str], header: list[str], line: int) -> UsageError:
        names = ", ".join(header[:_MOST_NAMES]) + (", …" if len(header) > _MOST_NAMES else "")
        message = f"expected {len(header)} columns ({names}), received {len(record)}"
        other = self._other(record, len(header)) if self.layout.names else ""
        if other:
            message += (
                f"; say delimiter: '{other}' in the source if that is what stands between them"
            )
        elif not self.quoted and any(value.startswith('"') for value in record):
            message += (
                "; quotation marks are text here, say quoting: csv in the source if they are not"
            )
        else:
            message += "; broken_rows: drop in the source leaves such rows out"
        return file_problem(self.file, message, line=line)

    def _broken_quoting(self, error: csv.Error, line: int) -> UsageError:
        """The line is the one on which the field begins, which may be long before the row's end."""
        start = sum(map(len, islice(io.StringIO(self.text, newline=""), line - self.first)))
        delimiter = re.escape(self.delimiter)
        opening = re.compile(rf'(?<![^{delimiter}\r\n])"[^"]*(?:""[^"]*)*("|\Z)')
        after = {"", self.delimiter, "\r", "\n"}
        reason = str(error)
        for found in opening.finditer(self.text, start):
            if not found[1] or self.text[found.end() : found.end() + 1] not in after:
                line += len(re.findall(r"\r\n|\r|\n", self.text[start : found.start()]))
                reason = reason if found[1] else "a quotation mark opens here and never closes"
                break
        advice = "where quotation marks are text, say quoting: none in the source"
        return file_problem(self.file, f"broken quoting: {reason}; {advice}", line=line)


def unique_columns(names: list[str], file: str, line: int | None) -> list[str]:
    """The names, if they differ.

    Raises:
        UsageError: one stands twice.
    """
    if len(set(names)) < len(names):
        name = Counter(names).most_common(1)[0][0]
        message = f"the column '{name}' stands twice"
        if not name:
            message = (
                "two columns have no name; name those of a file without a header: columns: […]"
            )
        raise file_problem(file, message, line=line)
    return names
