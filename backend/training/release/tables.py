"""Tables for people: CSV that a spreadsheet opens as meant, and that is read back exactly."""

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

# Excel takes a cell for a formula by its first character; where it splits at semicolons, as in much
# of Europe, so is what follows one inside a cell.
STARTS_FORMULA = r"(^|[;\t\r\n])([\s\"']*)%s(?=[=+\-@])"


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows as CSV, every cell quoted, in UTF-8; with a byte order mark where Excel needs it.

    Without the mark Excel reads UTF-8 as the system's code page, and "crème" as "crÃ¨me".
    """
    table = [[_cell(row[name]) for name in columns] for row in rows]
    is_plain = all(cell.isascii() for row in table for cell in row)
    encoding = "utf-8" if is_plain else "utf-8-sig"
    # backslashreplace: a file name may hold bytes that are not text
    with path.open("w", newline="", encoding=encoding, errors="backslashreplace") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(columns)
        writer.writerows(table)


def read_table(path: Path) -> list[dict[str, str]]:
    """Read what `write_table` wrote, or any other CSV with a header line.

    Raises:
        OSError, ValueError, csv.Error: it cannot be read, or its last line is cut off.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if any(None in row.values() for row in rows):
        raise ValueError("its last line is cut off")
    return [{name: as_meant(cell) for name, cell in row.items()} for row in rows]


def _cell(value: object) -> str:
    return defused(value) if isinstance(value, str) else "" if value is None else str(value)


def defused(text: str) -> str:
    """Put an apostrophe before what a spreadsheet would compute."""
    return re.sub(STARTS_FORMULA % "", r"\1\2'", text)


def as_meant(cell: str) -> str:
    """Take the apostrophe away again."""
    return re.sub(STARTS_FORMULA % "'", r"\1\2", cell)
