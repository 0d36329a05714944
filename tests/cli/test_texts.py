import io
import json
import re
import sys

import pytest

from flaxmpc.cli import texts

# Line ends of Unicode, of C and of old terminals: in a text they are none.
NO_LINE_ENDS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"


def test_a_line_of_plain_text_ends_in_lf_or_crlf_and_nowhere_else(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_bytes(f"a{NO_LINE_ENDS}b\r\n\n \u2028\nc\n".encode())
    assert texts.of_file(file) == (
        [f"a{NO_LINE_ENDS}b", "c"],
        [f"{file}, line 1", f"{file}, line 4"],
    )


@pytest.mark.parametrize("separator", NO_LINE_ENDS)
@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl"])
def test_nor_do_they_end_a_row(tmp_path, separator, form):
    file = tmp_path / f"texts.{form}"
    text = f"a{separator}b"
    content = {
        "csv": f"text\n{text}\nc\n",
        "tsv": f"text\n{text}\nc\n",
        # JSON has no bare control characters.
        "jsonl": json.dumps({"text": text}, ensure_ascii=separator < " ") + '\n{"text": "c"}\n',
    }
    file.write_bytes(content[form].encode())
    assert texts.of_file(file).texts == [text, "c"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"good\nb\xe9d\n", ", line 2: not UTF-8 (byte 0xe9)"),
        (b"good\rbad\n", ", line 1: a carriage return without a line feed"),
        (b"good\nb\0d\n", ", line 2: a NUL byte"),
        (b"\xff\xfeg\0", ", line 1: not UTF-8 (byte 0xff)"),
        (b" \n", " holds no text"),
    ],
)
def test_broken_plain_text_names_its_line(tmp_path, content, message):
    file = tmp_path / "texts"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{file}{message}")):
        texts.of_file(file)


def test_the_columns_of_a_table(tmp_path):
    file = tmp_path / "texts.tsv"
    file.write_text("id\tsentence1\tsentence2\treview\n7\ta\tb\tc\n")
    assert texts.of_file(file) == ([("a", "b")], [f"{file}, line 2"])
    assert texts.of_file(file, columns=["review"]).texts == ["c"]
    assert texts.of_file(file, columns=["review", "id"]).texts == [("c", "7")]
    only = tmp_path / "only.csv"
    only.write_text("review\ngood\n")
    assert texts.of_file(only).texts == ["good"]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("t.csv", "review,stars\ngood,3\n", {}, "has no column of text that is named as usual"),
        ("t.csv", "review,stars\ngood,3\n", {"columns": ["a"]}, " has no column a. Its columns are review, stars"),
        ("t.csv", "a,b,c\n1,2,3\n", {"columns": ["a", "b", "c"]}, "a row has one text or two, not 3: a, b, c"),
        ("t.csv", "text,stars\n,3\n", {}, ", line 2: text is empty"),
        ("t.csv", "text\n", {}, " holds no text"),
        ("t.jsonl", '{"text": "a"}\n{"text": 3}\n', {}, ", line 2: text is 3, not a string"),
        ("t.jsonl", '{"text": "a"}\n{"text": \n', {}, ", line 2: not JSON"),
        ("t.txt", "good\n", {"columns": ["text"]}, " is plain text, it has no columns text"),
        ("t.ndjson", '{"text": "a"}\n', {}, ": what is .ndjson? Say --format, one of text, csv, tsv, jsonl, "),
        ("t.csv", "text\na\n", {"format_": "xls"}, "unknown format 'xls'"),
    ],
)
def test_a_table_without_the_texts_is_refused(tmp_path, name, content, options, message):
    file = tmp_path / name
    file.write_text(content)
    whole = f"{file}{message}" if message.startswith((",", " ")) else message
    with pytest.raises(ValueError, match=re.escape(whole)):
        texts.of_file(file, **options)


def test_standard_input_is_text_or_what_is_said(monkeypatch, tmp_path):
    def given(content, *arguments):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        return texts.of_file(texts.Path("-"), *arguments)

    assert given(b"good\nbad\n") == (["good", "bad"], ["standard input, line 1", "standard input, line 2"])
    assert given(b'{"text": "good"}\n', "jsonl") == (["good"], ["standard input, line 1"])
    with pytest.raises(ValueError, match=r"^standard input, line 2: not JSON"):
        given(b'{"text": "good"}\n{\n', "jsonl")
    renamed = tmp_path / "t.ndjson"
    renamed.write_text('{"text": "good"}\n')
    assert texts.of_file(renamed, "jsonl") == (["good"], [f"{renamed}, line 1"])


def test_a_byte_of_an_argument_that_is_not_utf8_is_named():
    assert texts.of_arguments(["a", "é"], [("b", "c")]) == (["a", "é", ("b", "c")], ["text 1", "text 2", "pair 1"])
    with pytest.raises(ValueError, match=r"^text 2 is not UTF-8: it has the byte 0xe9$"):
        texts.of_arguments(["a", b"caf\xe9".decode("utf-8", "surrogateescape")])
    with pytest.raises(ValueError, match=r"^pair 1 is not UTF-8: it has the byte 0x80$"):
        texts.of_arguments([], [("a", b"\x80".decode("utf-8", "surrogateescape"))])
