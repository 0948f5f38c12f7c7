"""CSV for people: what Excel, LibreOffice and the project itself make of it."""

import csv
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.release.tables import as_meant, defused, read_table, write_table

COLUMNS = ["file", "share"]
FORMULAS = (
    "=1+1",
    "+1",
    "-2+3",
    "@SUM(A1)",
    "\t=1+1",
    "\r=1+1",
    " =1+1",
    '"=1+1',
    '=HYPERLINK("http://example.org";"pizza")',
    "pizza;=1+1",
    "pizza; =1+1",
    'pizza;"=1+1',
    "pizza\n=1+1",
)


def cells_of(text: str, delimiter: str) -> list[str]:
    """What a spreadsheet would split the file into."""
    return [cell for row in csv.reader(text.splitlines(), delimiter=delimiter) for cell in row]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("name", FORMULAS)
def test_no_cell_is_computed_wherever_it_is_split(
    name: str, delimiter: str, tmp_path: Path
) -> None:
    write_table(tmp_path / "t.csv", COLUMNS, [{"file": name, "share": 0.5}])
    text = (tmp_path / "t.csv").read_text(encoding="utf-8")
    for cell in cells_of(text, delimiter):
        assert not cell.strip(' \t\r\n"').startswith(("=", "+", "-", "@")), cell
    assert read_table(tmp_path / "t.csv") == [{"file": name, "share": "0.5"}]


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("=+-@'\" ;,\t\r\nax")) | st.text())
def test_what_is_defused_is_read_back_as_it_was(text: str) -> None:
    assert as_meant(defused(text)) == text


@pytest.mark.parametrize(
    ("name", "has_mark"), [("pizza", False), ("crème_brûlée", True), ("दाल", True)]
)
def test_excel_is_told_of_letters_that_it_would_misread(
    name: str, has_mark: bool, tmp_path: Path
) -> None:
    write_table(tmp_path / "t.csv", COLUMNS, [{"file": name, "share": 1}])
    assert (tmp_path / "t.csv").read_bytes().startswith(b"\xef\xbb\xbf") == has_mark
    assert read_table(tmp_path / "t.csv") == [{"file": name, "share": "1"}]


def test_every_cell_is_quoted_and_nothing_is_an_empty_cell(tmp_path: Path) -> None:
    rows = [{"file": 'comma, quote" and\nnewline.jpg', "share": None}]
    write_table(tmp_path / "t.csv", COLUMNS, rows)
    expected = b'"file","share"\r\n"comma, quote"" and\nnewline.jpg",""\r\n'
    assert (tmp_path / "t.csv").read_bytes() == expected


def test_a_name_that_is_not_text_is_escaped(tmp_path: Path) -> None:
    write_table(tmp_path / "t.csv", COLUMNS, [{"file": "not-\udcff-text.jpg", "share": 1}])
    assert read_table(tmp_path / "t.csv")[0]["file"] == "not-\\udcff-text.jpg"


def test_tables_of_the_version_before_are_read(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("file,share\r\ncrème.jpg,0.5\r\n", encoding="utf-8")
    assert read_table(tmp_path / "t.csv") == [{"file": "crème.jpg", "share": "0.5"}]


def test_a_table_that_is_cut_off_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('"file","share"\r\n"pizza.jpg"', encoding="utf-8")
    with pytest.raises(ValueError, match="cut off"):
        read_table(tmp_path / "t.csv")
