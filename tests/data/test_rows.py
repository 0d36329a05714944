import contextlib
import csv
import io
import json
import re
import sys
import threading
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

from flaxmpc.data import tables
from flaxmpc.data.tables import ALL

# What str.splitlines() takes for the end of a line, and no format does.
NO_LINE_ENDS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"


def read(folder: Path, name: str, data: str | bytes) -> tables.Table:
    file = folder / name
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    return tables.read(file)[ALL]


def rows(table: tables.Table) -> list[tuple]:
    return list(zip(*table.columns.values(), strict=True))


def written(name: str, objects: list[dict]) -> str:
    """The objects as a file of the format that the name says; values are strings."""
    if name.endswith(".jsonl"):
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in objects)
    if name.endswith(".json"):
        return json.dumps(objects, ensure_ascii=False)
    if name.endswith(".tsv"):
        return "".join("\t".join(fields) + "\n" for fields in ([*objects[0]], *(row.values() for row in objects)))
    text = io.StringIO(newline="")
    csv.writer(text).writerows([[*objects[0]], *(row.values() for row in objects)])
    return text.getvalue()


every_format = pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json"])


# -------------------------------------------------------------------------------------------------------- right values


@every_format
def test_what_is_no_line_end_is_text(tmp_path, name):
    texts = [f"one{mark}two" for mark in NO_LINE_ENDS] + [NO_LINE_ENDS, f"{NO_LINE_ENDS}a{NO_LINE_ENDS}"]
    objects = [{"text": text, f"la{NO_LINE_ENDS[0]}bel": "1"} for text in texts]
    if name.startswith("a.json"):
        for row in objects:  # raw control characters are no JSON
            row["text"] = "".join(mark for mark in row["text"] if mark >= " ")
    table = read(tmp_path, name, written(name, objects))
    assert rows(table) == [tuple(row.values()) for row in objects]
    if name != "a.json":
        first = 1 if name == "a.jsonl" else 2
        assert table.lines == [*range(first, first + len(objects))]


@every_format
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    objects = [{"text": "\ufeffa", "label": "1"}]
    assert rows(read(tmp_path, name, "\ufeff" + written(name, objects))) == [("\ufeffa", "1")]


@every_format
def test_lines_end_in_crlf_too(tmp_path, name):
    text = written(name, [{"text": "a", "label": "1"}, {"text": "b", "label": "0"}])
    text = text.replace("\r\n", "\n").replace("\n", "\r\n").replace("}, {", "},\r\n{")
    assert rows(read(tmp_path, name, text)) == [("a", "1"), ("b", "0")]


@every_format
def test_a_field_may_be_long(tmp_path, name):
    long = 'a ""b, ' * 100_000
    limit = csv.field_size_limit()
    table = read(tmp_path, name, written(name, [{"text": long, "label": "1"}, {"text": "c", "label": "0"}]))
    assert rows(table) == [(long, "1"), ("c", "0")]
    assert csv.field_size_limit() == limit


def test_long_fields_in_many_threads(tmp_path):
    long = "a" * 200_000
    file = tmp_path / "a.csv"
    file.write_text(f"text,label\n{long},1\n")
    found: list[list[tuple]] = []
    threads = [threading.Thread(target=lambda: found.append(rows(tables.read(file)[ALL]))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[(long, "1")]] * 8


def test_tsv_has_no_quotes(tmp_path):
    text = '"a\t1\nb "c" d\t"0"\n""\t"\n'
    assert rows(read(tmp_path, "a.tsv", "text\tlabel\n" + text)) == [('"a', "1"), ('b "c" d', '"0"'), ('""', '"')]


def test_a_carriage_return_within_quotes_is_text(tmp_path):
    assert rows(read(tmp_path, "a.csv", 'text,label\n"a\rb\r\nc\nd",1\n')) == [("a\rb\r\nc\nd", "1")]


def test_whole_pairs_of_surrogates_are_characters(tmp_path):
    assert rows(read(tmp_path, "a.jsonl", r'{"text": "\ud83d\ude00 \\ud800", "\ud83d\ude00": 1}')) == [
        ("\U0001f600 \\ud800", 1)
    ]


fields = st.text("a ,\"'\n\r\tü\u2028\x85\x1c\x00".replace("\x00", ""), max_size=6)


@hypothesis.given(st.lists(st.tuples(fields, fields), max_size=5))
def test_csv_is_read_as_csv_reads_it(tmp_path_factory, found):
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("text", "label"), *found])
    folder = tmp_path_factory.mktemp("csv")
    assert rows(read(folder, "a.csv", text.getvalue())) == found


@hypothesis.given(st.text('a1,"\n', max_size=12))
def test_csv_is_read_or_refused_as_csv_does(tmp_path_factory, text):
    text = f"text,label\n{text}"
    try:
        expected = [tuple(row) for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row][1:]
    except csv.Error:
        expected = None
    folder = tmp_path_factory.mktemp("csv")
    if expected is None or any(len(row) != 2 for row in expected):
        with pytest.raises(ValueError, match=r"a.csv, line \d+: "):
            read(folder, "a.csv", text)
    else:
        assert rows(read(folder, "a.csv", text)) == expected


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        # A quote that never closes: where it opened, not where the row starts.
        ("a.csv", 'text,label\n"a\nb","c\nd,1\n', "a.csv, line 3: a quote opens here that never closes"),
        ("a.csv", 'text,label\na,1\n"b"",0\n', "a.csv, line 3: a quote opens here that never closes"),
        (
            "a.csv",
            'text,label\n"a,1\n"b",0\n',
            "a.csv, line 2: after the quoted field that starts here stands 'b', not",
        ),
        ("a.csv", "text,label\ra,1\r", "a.csv, line 1: a carriage return without a line feed; a line ends in LF or"),
        ("a.csv", 'text,label\n"a",1\rb,0\n', "a.csv, line 2: a carriage return without a line feed"),
        ("a.csv", 'text,label\n"a"\r,0\n', "a.csv, line 2: after the quoted field that starts here stands '\\r', not"),
        ("a.tsv", "text\tlabel\na\rb\t1\n", "a.tsv, line 2: a carriage return without a line feed"),
        ("a.tsv", "text\tlabel\na\t1\r\r\n", "a.tsv, line 2: a carriage return without a line feed"),
        ("a.jsonl", '{"text": "a"}\r{"text": "b"}\n', "a.jsonl, line 1: not JSON: Extra data, column 15"),
        ("a.csv", "text,label\na,1\n\0b,1\n", "a.csv, line 3: a NUL byte, which UTF-16 has"),
        ("a.tsv", "text\tlabel\na\0\t1\n", "a.tsv, line 2: a NUL byte"),
        ("a.jsonl", '{"text": "a\0"}', "a.jsonl, line 1: a NUL byte"),
        ("a.json", "[{\0", "a.json, line 1: a NUL byte"),
        # Half a surrogate pair: in a value, within a value, in a name.
        ("a.jsonl", '{"text": "a"}\n{"text": "\\ud800"}', "line 2: half a surrogate pair, '\\ud800', is no character"),
        ("a.jsonl", '{"text": "\\uDE00\\ud83d"}', "a.jsonl, line 1: half a surrogate pair, '\\ude00'"),
        ("a.jsonl", '{"text": [1, {"b": "\\udfff"}]}', "a.jsonl, line 1: half a surrogate pair"),
        ("a.jsonl", '{"a": 1}\n\n{"\\ud800": "a"}', "a.jsonl, line 3: half a surrogate pair"),
        ("a.json", '[{"text": "a"},\n{"text": "\\ud800"}]', "a.json, line 2: half a surrogate pair"),
        # What JSON does not mean to say.
        ("a.jsonl", '{"a": 1}\n{"text": "a", "text": "b"}', "a.jsonl, line 2: an object has the key 'text' twice"),
        ("a.json", '[{"a": 1},\n{"a": {"b": 1, "b": 2}}]', "a.json, line 2: an object has the key 'b' twice"),
        ("a.jsonl", '{"a": 1}\n{"a": ' + "[" * 100_000, "a.jsonl, line 2: nested too deeply"),
        ("a.json", '[{"a": 1},\n{"a": ' + '{"b":' * 100_000, "a.json, line 2: nested too deeply"),
        ("a.json", '[{"a": 1},\n{"a": 2},]', "a.json, line 2: not JSON: "),
        ("a.json", '[{"a": 1}\n{"a": 2}]', "a.json, line 2: not JSON: Expecting ',' delimiter"),
        ("a.json", '[{"a": 1}]\n[{"a": 2}]', "a.json, line 2: not JSON: Extra data"),
        ("a.json", '[{"a": 1},\n\n3]', "a.json, line 3: not a JSON object"),
        ("a.json", "[", "a.json, line 1: not JSON: Expecting value"),
        # Other encodings.
        ("a.csv", "text,label\na,1\n".encode("utf-16"), "a.csv is UTF-16: save it as UTF-8"),
        ("a.tsv", "text\tlabel\na\t1\n".encode("utf-16-be"), "a.tsv, line 1: a NUL byte, which UTF-16 has"),
        ("a.jsonl", b"\n{}\n{}", "a.jsonl, line 2: rows without a column"),
        ("a.jsonl", "\ufeff{}".encode("utf-16-be"), "a.jsonl is UTF-16: save it as UTF-8"),
        ("a.json", "[]".encode("utf-32"), "a.json is UTF-32: save it as UTF-8"),
        ("a.csv", b"text,label\na\x85b,1\n", "a.csv, line 2: not UTF-8 (byte 0x85)"),
        ("a.csv", b"text,label\na\xed\xa0\x80b,1\n", "a.csv, line 2: not UTF-8 (byte 0xed)"),  # a surrogate's bytes
    ],
)
def test_what_is_broken_is_named_by_its_line(tmp_path, name, data, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read(tmp_path, name, data)
    assert str(error.value).startswith(str(tmp_path / name))
    assert len(str(error.value).splitlines()) == 1


def test_integers_of_many_digits_are_read_or_refused(tmp_path):
    assert rows(read(tmp_path, "a.jsonl", '{"label": ' + "9" * 4000 + "}")) == [(10**4000 - 1,)]
    limited = hasattr(sys, "get_int_max_str_digits")  # 4,300 digits, in all but early Pythons
    for name, data in (("a.jsonl", '{"label": 1}\n{"label": %s}'), ("a.json", '[{"label": 1},\n{"label": %s}]')):
        refused = pytest.raises(ValueError, match=f"{name}, line 2: Exceeds the limit")
        with refused if limited else contextlib.nullcontext():
            assert rows(read(tmp_path, name, data % ("9" * 5000)))[1] == (10**5000 - 1,)


def test_what_is_long_is_cut_in_messages(tmp_path):
    with pytest.raises(ValueError, match=r"two columns are named 'aaa") as error:
        read(tmp_path, "a.csv", ",".join(["a" * 100_000] * 3))
    assert len(str(error.value)) < 500


# ----------------------------------------------------------------------------------------------------------- any bytes

VALID = {
    "a.csv": 'text,label\n"A film, or ""two"".",1\n"a\r\nb",0\r\nc,\u2028x\n'.encode(),
    "a.tsv": b'text\tlabel\nA "film\t1\nb\xc2\x85\x0b\x1c\t0\n',
    "a.jsonl": b'{"text": "a\\ud83d\\ude00", "label": 1}\n{"text": "b", "label": [1, {"x": null}]}\n',
    "a.json": b'[{"text": "a\\ud83d\\ude00", "label": 1.5e3},\n {"text": "b", "label": true}]\n',
}
PARTS = [
    b'"',
    b",",
    b"\n",
    b"\r",
    b"\t",
    b"\\ud800",
    b"\\",
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"[",
    b"]",
    b"{",
    b"}",
]
PARTS += [b"NaN", b"1e999", b"\xe2\x80\xa8", b"\x85", b'""', b":", b"9" * 5000, b"[" * 3000, b"", b" "]
edits = st.lists(st.tuples(st.integers(0, 100), st.integers(0, 4), st.sampled_from(PARTS)), max_size=4)


@every_format
@hypothesis.given(st.binary(max_size=40) | edits)
@hypothesis.settings(max_examples=150)
def test_any_bytes_are_rows_or_an_error_of_one_line(tmp_path_factory, name, change):
    data = VALID[name]
    if isinstance(change, bytes):
        data = change
    else:
        for start, length, part in change:
            data = data[:start] + part + data[start + length :]
    folder = tmp_path_factory.mktemp("any")
    table, refused = None, None
    try:
        table = read(folder, name, data)
    except ValueError as error:
        refused = error
    if table is None:
        assert type(refused) is ValueError
        assert str(refused).startswith(str(folder / name))
        assert len(str(refused).splitlines()) == 1
        assert len(str(refused)) < 500
        return
    assert table.lines is not None
    lines = data.decode("utf-8-sig").split("\n")
    if name.endswith((".tsv", ".jsonl")):  # a row for every line
        header = name == "a.tsv"
        blank = "" if header else " \t\r"  # as JSON has it
        assert len(table) + header == sum(bool(line.removesuffix("\r").strip(blank)) for line in lines)
    for column in table.columns.values():
        assert len(column) == len(table) == len(table.lines)
    if name == "a.tsv":
        for number, row in zip(table.lines, rows(table), strict=True):
            assert "\t".join(row) == lines[number - 1].removesuffix("\r")
