"""CSV: rows end where Python's reader says, whatever stands in a cell, and no row is lost without a word."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rolecall.protocols import DataError
from rolecall.roles.data import Files, Mix, Stream
from rolecall.roles.data.report import Report

CELLS = st.text("ab1\",;\t '\n\u2028\x85\x0b\x0c\x1cé", max_size=8)


def rows(file: Path, report: Report | None = None, **settings: object) -> list[dict[str, str]]:
    mix = Mix({"a": Files(str(file), **settings)}, epochs={"a": 1}, shuffle=False)
    return [raw.columns for raw in Stream(mix, report=report).at()]


@settings(deadline=None, max_examples=80)
@given(table=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6), quoted=st.booleans(), tabs=st.booleans())
def test_what_was_written_is_read(tmp_path_factory: pytest.TempPathFactory, table: list[tuple[str, str]], quoted: bool, tabs: bool):
    out = io.StringIO()
    quoting = csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL
    csv.writer(out, delimiter="\t" if tabs else ",", quoting=quoting).writerows([("n", "text", "end"), *((*row, "x") for row in table)])
    file = tmp_path_factory.mktemp("csv") / ("a.tsv" if tabs else "a.csv")
    file.write_bytes(out.getvalue().encode())
    assert rows(file) == [{"n": n, "text": text, "end": "x"} for n, text in table]


def test_a_quote_within_a_cell_opens_nothing(tmp_path: Path):
    file = tmp_path / "a.csv"
    file.write_text('n,text\n1,5" disk\n2,b\n3,6" disk\n4,"d"\n')
    report = Report()
    assert rows(file, report) == [{"n": str(n), "text": text} for n, text in ((1, '5" disk'), (2, "b"), (3, '6" disk'), (4, "d"))]
    assert report.counts == {("read", ""): 4}


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x0b", "\x0c", "\x1c"])
def test_what_other_readers_take_for_the_end_of_a_line_is_text(tmp_path: Path, mark: str):
    file = tmp_path / "a.csv"
    file.write_text(f"n,text\n1,a{mark}b\n2,c\n")
    assert rows(file) == [{"n": "1", "text": f"a{mark}b"}, {"n": "2", "text": "c"}]


@pytest.mark.parametrize("on_error", ["refuse", "skip"])
def test_a_quote_that_is_never_closed_is_refused_with_its_line(tmp_path: Path, on_error: str):
    """To skip it would lose the rest of the file."""
    file = tmp_path / "a.csv"
    file.write_text('n,text\n1,"a\nb"\n2,"c\n3,d\n4,e\n')
    with pytest.raises(DataError, match=r'a\.csv:4: a quote \("\) is opened in this row and never closed.*3 lines from there to the end'):
        rows(file, on_error=on_error)


def test_a_cell_larger_than_pythons_own_limit_is_read_and_one_larger_than_a_record_may_be_is_not(tmp_path: Path):
    file = tmp_path / "a.csv"
    file.write_text(f'n,text\n1,{"x" * 200_000}\n2,"{"y" * 300_000}"\n3,z\n')
    assert [len(row["text"]) for row in rows(file)] == [200_000, 300_000, 1]
    with pytest.raises(DataError, match=r"a\.csv:3: the record is longer than 250000 bytes"):
        rows(file, longest=250_000)
    report = Report()
    assert [row["n"] for row in rows(file, report, longest=250_000, on_error="skip")] == ["1", "3"]
    assert report.counts == {("read", ""): 3, ("dropped", "too long a record"): 1}


def test_lines_that_end_otherwise_are_told(tmp_path: Path):
    file = tmp_path / "a.csv"
    file.write_bytes(b"n,text\n1,a\rb\n2,c\n")
    with pytest.raises(DataError, match=r"a\.csv:2: this is no CSV: new-line character"):
        rows(file)
    file.write_bytes(b"n,text\r1,a\r2,c\r")  # of an old Mac: one line
    with pytest.raises(DataError, match=r"a\.csv:1: the head can't be read: .*lines end with a line feed"):
        rows(file, on_error="skip")


def test_heads(tmp_path: Path):
    file = tmp_path / "a.csv"
    file.write_text('n,"te\nxt"\n1,a\n')
    assert rows(file) == [{"n": "1", "te\nxt": "a"}]
    file.write_text("n,text,n\n1,a,2\n")
    with pytest.raises(DataError, match=r"a\.csv:1: several columns are called 'n'\. There is: n, text, n"):
        rows(file)
    file.write_bytes("größe,text\n1,a\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.csv:1: the head can't be read: .*utf-8"):
        rows(file, on_error="skip")
    assert rows(file, encoding="latin-1") == [{"größe": "1", "text": "a"}]


def test_a_row_of_another_encoding_is_named_or_skipped(tmp_path: Path):
    file = tmp_path / "a.csv"
    file.write_bytes("n,text\n1,ok\n2,café\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.csv:3: .*not UTF-8.*encoding=\"latin-1\""):
        rows(file)
    assert [row["n"] for row in rows(file, on_error="skip")] == ["1"]
    assert rows(file, encoding="latin-1")[1]["text"] == "café"
