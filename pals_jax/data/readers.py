"""Strict readers of TSV, CSV and JSONL files."""

import csv
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from pals_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a data file, with its location.

    Attributes:
        path: the file.
        line: the line on which the row begins, counted from 1.
        values: column name to value; strings, unless the file is JSONL.
    """

    path: Path
    line: int
    values: Mapping[str, Any]

    @property
    def where(self) -> str:
        """File and line, as the beginning of an error message."""
        return f"{self.path}, line {self.line}"

    def __getitem__(self, column: str) -> Any:
        """The value of a column; UserError if there is none."""
        if column not in self.values:
            raise UserError(
                f"{self.where}: there is no column {column!r};"
                f" the columns are {', '.join(self.values)}."
            )
        return self.values[column]

    def text(self, column: str) -> str:
        """The value of a text column; UserError unless it is a string of valid Unicode."""
        text = self[column]
        if not isinstance(text, str):
            raise UserError(f"{self.where}: the text in column {column!r} is not a string: {text}.")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
            raise UserError(f"{self.where}: column {column!r} is not valid Unicode.") from error
        return text

    def label(self, column: str) -> str | float:
        """The value of a label column; UserError unless it is a string or a number."""
        label = self[column]
        if not isinstance(label, str | int | float):
            raise UserError(
                f"{self.where}: the label in column {column!r} is neither a string nor a number:"
                f" {label}."
            )
        return label


def read_rows(path: Path, header: Sequence[str] | None = None) -> Iterator[Row]:
    r"""The rows of a data file; its suffix determines the format.

    `.tsv`: tab-separated, quotes are literal. Rows end with "\n" or "\r\n" and with nothing else,
    since texts may contain other line separators.
    `.csv`: comma-separated, a field may be quoted and then hold commas and line ends.
    `.jsonl`: one JSON object per line.
    All are UTF-8, with or without a byte-order mark; blank lines are skipped.

    Args:
        path: the file.
        header: the columns of a TSV or CSV file without a header line.

    Raises:
        UserError: if the file is missing, empty, has no rows or is in another format, or a row is
            ragged or invalid.
    """
    if path.suffix not in _NEWLINE:
        raise UserError(f"{path} is none of the known formats: {', '.join(_NEWLINE)}.")
    row = None
    try:
        with path.open(encoding="utf-8-sig", newline=_NEWLINE[path.suffix]) as file:
            for row in _parse(file, path, header):
                yield row
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid UTF-8 ({error.reason}).") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from error
    if row is None:
        empty = path.stat().st_size == 0
        raise UserError(f"{path} {'is empty' if empty else 'has no rows'}.")


# Maps each known suffix to the `newline` argument of `open`.
_NEWLINE = {".tsv": "\n", ".csv": "", ".jsonl": "\n"}


def _parse(file: TextIO, path: Path, header: Sequence[str] | None) -> Iterator[Row]:
    if path.suffix == ".jsonl":
        return _json_rows(file, path)
    records = _tsv_records(file) if path.suffix == ".tsv" else _csv_records(file, path)
    return _named_rows(records, path, header)


def _tsv_records(file: TextIO) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(file, 1):
        if stripped := line.removesuffix("\n").removesuffix("\r"):
            yield number, stripped.split("\t")


def _csv_records(file: TextIO, path: Path) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(file, strict=True)
    begin = 1
    try:
        for record in reader:
            if record:
                yield begin, record
            begin = reader.line_num + 1  # a quoted field may span several lines
    except csv.Error as error:
        raise UserError(f"{path}, line {begin}: not valid CSV ({error}).") from error


def _named_rows(
    records: Iterator[tuple[int, list[str]]], path: Path, header: Sequence[str] | None
) -> Iterator[Row]:
    columns = header if header is not None else next(records, (0, []))[1]
    for line, fields in records:
        if len(fields) != len(columns):
            raise UserError(
                f"{path}, line {line}: {len(columns)} columns expected, {len(fields)} found."
            )
        yield Row(path, line, dict(zip(columns, fields, strict=True)))


def _json_rows(file: TextIO, path: Path) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({error}).") from error
        if not isinstance(values, dict):
            raise UserError(f"{path}, line {number}: a JSON object expected, {line.strip()} found.")
        yield Row(path, number, values)
