import csv
import io
import json
import os
import re
from pathlib import Path

import datasets
import hypothesis
import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.table import InMemoryTable

from flaxmpc.data import decoder, tables
from flaxmpc.data.tables import ALL

ROWS = [{"sentence": "A film, or two.", "label": "1"}, {"sentence": 'He said "no".', "label": "0"}]


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def columns(table) -> dict[str, list]:
    return {name: list(column[:]) for name, column in table.columns.items()}


def read_text(folder: Path, name: str, text: str | bytes):
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return tables.read(file)[ALL]


def state(folder: Path) -> dict[str, tuple]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in [folder, *sorted(folder.rglob("*"))]}


# -------------------------------------------------------------------------------------------------------- the formats


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("a.csv", 'sentence,label\n"A film, or two.",1\n"He said ""no"".",0\n', [2, 3]),
        ("a.csv", '\ufeffsentence,label\r\n\r\n"A film, or two.",1\r\n"He said ""no"".",0', [3, 4]),
        ("a.TSV", 'sentence\tlabel\nA film, or two.\t1\n\nHe said "no".\t0\n', [2, 4]),
        ("a.jsonl", "\n".join(map(json.dumps, ROWS)), [1, 2]),
        ("a.jsonl", "\r\n".join(map(json.dumps, ROWS)) + "\n\n", [1, 2]),
        ("a.json", "\n".join(map(json.dumps, ROWS)), [1, 2]),
        ("a.json", json.dumps(ROWS, indent=2), [2, 6]),
    ],
)
def test_files_of_text(tmp_path, name, text, lines):
    table = read_text(tmp_path, name, text)
    assert columns(table) == {key: [row[key] for row in ROWS] for key in ("sentence", "label")}
    assert table.lines == lines
    assert len(table) == 2


def test_a_row_over_several_lines_stands_where_it_starts(tmp_path):
    table = read_text(tmp_path, "a.csv", 'text,label\n"one\ntwo\nthree",0\nfour,1\n')
    assert columns(table)["text"] == ["one\ntwo\nthree", "four"]
    assert table.lines == [2, 5]
    assert table.at(1) == f"{tmp_path / 'a.csv'}, line 5"


@hypothesis.given(
    st.lists(st.tuples(st.text("a ,\"'\n\tü\u2028", min_size=1), st.integers(-9, 9)), min_size=1, max_size=8),
)
def test_what_csv_and_json_write_is_read_back(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("written")
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("text", "label"), *rows])
    expected = [row[0] for row in rows]
    assert columns(read_text(folder, "a.csv", text.getvalue()))["text"] == expected
    objects = [{"text": row[0], "label": row[1]} for row in rows]
    for name, text in (("a.json", json.dumps(objects)), ("a.jsonl", "\n".join(map(json.dumps, objects)))):
        assert columns(read_text(folder, name, text))["text"] == expected


def test_parquet_keeps_the_names_of_classes(tmp_path):
    features = datasets.Features(
        sentence=datasets.Value("string"), label=datasets.ClassLabel(names=["negative", "positive"])
    )
    datasets.Dataset.from_dict({"sentence": ["a", "b"], "label": [1, 0]}, features=features).to_parquet(
        str(tmp_path / "a.parquet")
    )
    table = tables.read(tmp_path / "a.parquet")[ALL]
    assert columns(table) == {"sentence": ["a", "b"], "label": [1, 0]}
    assert table.class_names == {"label": ("negative", "positive")}
    assert table.at(1) == f"{tmp_path / 'a.parquet'}, row 1 (from 0)"


def test_shards_are_one_split(tmp_path):
    for shard in range(2):
        pq.write_table(
            pa.table({"text": [f"{shard}"], "label": [shard]}), tmp_path / f"train-0000{shard}-of-00002.parquet"
        )
    pq.write_table(pa.table({"text": ["2"], "label": [1]}), tmp_path / "validation_matched-00000-of-00001.parquet")
    found = tables.read(tmp_path)
    assert set(found) == {"train", "validation_matched"}
    assert columns(found["train"]) == {"text": ["0", "1"], "label": [0, 1]}
    pq.write_table(pa.table({"text": [2.5], "label": [1]}), tmp_path / "train-00001-of-00002.parquet")
    with pytest.raises(ValueError, match=r"00001-of-00002.parquet has other columns than train-00000-of-00002.parquet"):
        tables.read(tmp_path)


def test_what_datasets_saved(tmp_path):
    one = datasets.Dataset.from_dict({"sentence": ["a", "b", "c"], "label": [0, 1, 1]})
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": one, "test": one.select([2, 0])}).save_to_disk(str(tmp_path / "many"))
    assert columns(tables.read(tmp_path / "one")[ALL]) == {"sentence": ["a", "b", "c"], "label": [0, 1, 1]}
    found = tables.read(tmp_path / "many")
    assert set(found) == {"train", "test"}
    assert columns(found["test"])["sentence"] == ["c", "a"]
    assert found["test"].at(0) == f"{tmp_path / 'many' / 'test'}, row 0 (from 0)"


def test_a_folder_of_files_by_their_names(tmp_path):
    (tmp_path / "Train.csv").write_text("text,label\na,0\n")
    (tmp_path / "dev.jsonl").write_text('{"text": "b", "label": 1}\n')
    (tmp_path / "README.md").write_text("what it is")
    found = tables.read(str(tmp_path))
    assert {split: columns(table)["text"] for split, table in found.items()} == {"train": ["a"], "dev": ["b"]}


def test_reading_writes_nothing(tmp_path, monkeypatch):
    data = tmp_path / "data"
    one = datasets.Dataset.from_dict({"sentence": ["a", "b", "c"], "label": [0, 1, 1]})
    datasets.DatasetDict({"train": one}).save_to_disk(str(data / "saved"))
    (data / "files").mkdir()
    one.to_parquet(str(data / "files" / "train.parquet"))
    (data / "files" / "test.csv").write_text("sentence,label\na,0\n")
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    before = state(data)
    for folder in ("saved", "files"):
        for table in tables.read(data / folder).values():
            columns(table)
    assert state(data) == before
    assert not home.exists()


# ------------------------------------------------------------------------------------------------------- broken files


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "text,label\na,0\nb,1,2\n", "a.csv, line 3: 3 fields, but the first line has 2"),
        ("a.csv", 'text,label\n"a\nb",0\n\nb\n', "a.csv, line 5: 1 fields, but the first line has 2"),
        ("a.csv", 'text,label\na,0\n"b,1\nc,0\n', "a.csv, line 3: a quote opens here that never closes"),
        ("a.csv", 'text,label\n"a" b,0\n', "a.csv, line 2: after the quoted field that starts here stands ' '"),
        ("a.csv", "text,text\na,0\n", "a.csv: two columns are named 'text'"),
        ("a.tsv", "text\tlabel\na\t0\nb 1\n", "a.tsv, line 3: 1 fields, but the first line has 2"),
        ("a.csv", b"text,label\na,0\n\xe9t\xe9,1\n", "a.csv, line 3: not UTF-8 (byte 0xe9)"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "\xff"}', "a.jsonl, line 3: not UTF-8 (byte 0xff)"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": "b"\n', "a.jsonl, line 3: not JSON: Expecting ',' delimiter"),
        ("a.jsonl", '{"text": "a"}\n["b", 1]\n', "a.jsonl, line 2: not a JSON object with the columns as keys"),
        ("a.json", '[{"text": "a"},\n{"text": b}]', "a.json, line 2: not JSON: Expecting value"),
        ("a.json", '[{"text": "a"}, 3]', "a.json, line 1: not a JSON object"),
        ("a.csv", " \n", "a.csv is empty"),
        ("a.jsonl", "", "a.jsonl is empty"),
        ("a.parquet", "no parquet", "a.parquet cannot be read as Parquet"),
        ("a.txt", "a\n", "a.txt is none of the formats that can be read: .conll, .csv, .json, .jsonl, .parquet, .tsv"),
    ],
)
def test_a_broken_file_is_refused_with_its_line(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_text(tmp_path, name, text)
    assert str(error.value).startswith(str(tmp_path / name))


@hypothesis.given(st.integers(0, 30), st.integers(1, 30))
def test_the_line_named_is_the_broken_one(tmp_path_factory, before, after):
    folder = tmp_path_factory.mktemp("broken")
    line = before + 2
    with pytest.raises(ValueError, match=f"a.csv, line {line}: 3 fields"):
        read_text(folder, "a.csv", "text,label\n" + "a,0\n" * before + "a,0,0\n" + "a,0\n" * after)
    with pytest.raises(ValueError, match=f"a.jsonl, line {line - 1}: not JSON"):
        read_text(folder, "a.jsonl", '{"text": "a"}\n' * before + "{\n" + '{"text": "a"}\n' * after)


def test_there_has_to_be_something(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        tables.read(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("no data")
    with pytest.raises(FileNotFoundError, match="has neither files of data"):
        tables.read(tmp_path)


def test_a_split_has_all_of_its_shards_once(tmp_path):
    def shard(name: str) -> None:
        pq.write_table(pa.table({"text": [name]}), tmp_path / name)

    shard("train-00000-of-00002.parquet")
    with pytest.raises(ValueError, match="has not one file, or every shard once, for the split train: train-00000-of-"):
        tables.read(tmp_path)
    shard("train-00001-of-00002.parquet")
    assert len(tables.read(tmp_path)["train"]) == 2
    shard("train.parquet")
    with pytest.raises(ValueError, match="has not one file, or every shard once"):
        tables.read(tmp_path)


def test_shards_name_their_classes_alike(tmp_path):
    for shard, names in enumerate((["no", "yes"], ["yes", "no"])):
        features = datasets.Features(label=datasets.ClassLabel(names=names))
        datasets.Dataset.from_dict({"label": [1]}, features=features).to_parquet(
            str(tmp_path / f"train-{shard:05}-of-00002.parquet")
        )
    with pytest.raises(ValueError, match=r"00001-of-00002.parquet has other columns than train-00000-of-00002.parquet"):
        tables.read(tmp_path)


def test_a_folder_named_as_a_column_is_none(tmp_path):
    file = tmp_path / "label=7" / "train.parquet"
    file.parent.mkdir()
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), file)
    assert columns(tables.read(file)[ALL]) == {"text": ["a"], "label": [1]}


def test_names_of_categories_are_read_from_parquet(tmp_path):
    pq.write_table(pa.table({"label": pa.array(["b", "a", "b"]).dictionary_encode()}), tmp_path / "a.parquet")
    assert columns(tables.read(tmp_path / "a.parquet")[ALL]) == {"label": ["b", "a", "b"]}


def test_a_split_that_is_a_link_to_nothing_is_not_left_out(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\na,0\n")
    (tmp_path / "dev.csv").symlink_to(tmp_path / "moved.csv")
    with pytest.raises(FileNotFoundError, match=r"dev\.csv"):
        tables.read(tmp_path)


def test_only_the_splits_that_are_asked_for_are_read(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\na,0\n")
    (tmp_path / "dataset_infos.json").write_text("not a table")
    assert set(tables.read(tmp_path, ("train", "dev"))) == {"train"}
    with pytest.raises(FileNotFoundError, match=r"has no file that is named as a split, .*: dataset_infos, train"):
        tables.read(tmp_path, ("dev",))
    with pytest.raises(ValueError, match=r"dataset_infos.json, line 1: not JSON"):
        tables.read(tmp_path)


def test_columns_of_a_file_without_a_line_of_names(tmp_path):
    unnamed = ("source", "label", "sentence")
    file = tmp_path / "a.tsv"
    file.write_text("x\t1\tA film.\ny\t0\tA film\n")
    table = tables.read(file, unnamed=unnamed)[ALL]
    assert columns(table) == {"source": ["x", "y"], "label": ["1", "0"], "sentence": ["A film.", "A film"]}
    assert table.lines == [1, 2]
    file.write_text("idx\tlabel\tsentence\n3\t1\tA film.\n")
    assert columns(tables.read(file, unnamed=unnamed)[ALL]) == {"idx": ["3"], "label": ["1"], "sentence": ["A film."]}
    file.write_text("index\tsentence\n3\tA film.\n")
    assert columns(tables.read(file, unnamed=unnamed)[ALL]) == {"index": ["3"], "sentence": ["A film."]}
    file.write_text("x\t1\tA film.\ny\t0\n")
    with pytest.raises(ValueError, match=r"a.tsv, line 2: 2 fields, but the first line has 3"):
        tables.read(file, unnamed=unnamed)


def corrupt(text: bytes) -> pa.Table:
    """A string that is no UTF-8, as other writers of Parquet let pass."""
    offsets = pa.array(["a" * len(text)]).buffers()[1]
    return pa.table({"text": pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(text)])})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (corrupt(b"\xff\xfe"), "cannot be read as Parquet: .*Invalid UTF8"),
        (pa.table({"text": ["a"]}).replace_schema_metadata({"huggingface": "{bad"}), "cannot be read as Parquet: "),
        (pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["x", "x"]), "cannot be read as Parquet: "),
    ],
)
def test_what_is_odd_within_parquet_is_refused_with_its_file(tmp_path, table, message):
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=f"a.parquet {message}") as error:
        tables.read(tmp_path / "a.parquet")
    assert str(error.value).startswith(str(tmp_path))
    assert len(str(error.value).splitlines()) == 1


def test_strings_that_are_no_utf8_in_a_folder_of_datasets(tmp_path):
    datasets.Dataset(InMemoryTable(corrupt(b"\xff"))).save_to_disk(str(tmp_path))
    with pytest.raises(ValueError, match=r"cannot be read as a folder of datasets.save_to_disk: .*Invalid UTF8"):
        tables.read(tmp_path)


@hypothesis.given(st.lists(st.tuples(st.integers(0, 700), st.integers(0, 3), st.binary(max_size=3)), min_size=1))
@hypothesis.settings(max_examples=100)
def test_damaged_parquet_is_refused_with_its_file(tmp_path_factory, edits):
    file = tmp_path_factory.mktemp("damaged") / "a.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "label": [0, 1]}), file)
    data = file.read_bytes()
    for start, length, part in edits:
        data = data[:start] + part + data[start + length :]
    file.write_bytes(data)
    refused = None
    try:
        assert decoder.read("parquet", [str(file)]).num_columns
    except MemoryError:
        return
    except ValueError as error:
        refused = error
    if refused is not None:
        assert str(refused).startswith(f"{file} cannot be read as Parquet: ")
        assert len(str(refused).splitlines()) == 1


def test_two_files_for_a_split_are_one_too_many(tmp_path):
    for name in ("train.csv", "train.jsonl"):
        (tmp_path / name).write_text("a")
    with pytest.raises(ValueError, match=r"has 2 files for the split train: train.csv, train.jsonl; one is needed"):
        tables.read(tmp_path)


def test_a_damaged_folder_of_datasets(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).save_to_disk(str(tmp_path))
    (arrow,) = tmp_path.glob("*.arrow")
    os.truncate(arrow, 20)
    with pytest.raises(ValueError, match=r"cannot be read as a folder of datasets.save_to_disk"):
        tables.read(tmp_path)
