"""Parquet and Arrow of others: a small file that holds much takes little memory, and nothing is read elsewhere."""

import contextlib
import json
import resource
import subprocess
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flaxmpc.data import tables
from flaxmpc.data.tables import ALL

GIGABYTE = 1 << 30


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def repeated(path, rows, text):
    """One text many times: Parquet holds it once."""
    indices = pa.array(np.zeros(rows, np.int32))
    table = pa.table({"text": pa.DictionaryArray.from_arrays(indices, [text])})
    pq.write_table(table, path, store_schema=False)


def one_page(path, size):
    """One text of zeros, which zstd packs 10,000 times."""
    pq.write_table(
        pa.table({"text": ["0" * size]}), path, compression="zstd", use_dictionary=False, write_statistics=False
    )


def packed_arrow(folder, size):
    """As `datasets` saves it, but its buffers are compressed."""
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).save_to_disk(str(folder))
    (path,) = folder.glob("*.arrow")
    table = pa.table({"text": ["0" * size], "label": [0]})
    with pa.ipc.new_stream(path, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)


def peak(path) -> tuple[str, int]:
    """What a process of its own says of a path, and the most memory that it or the decoder had, in bytes."""
    code = f"""
import re, resource
from flaxmpc.data import tables
try:
    print(len(tables.read({str(path)!r})))
except ValueError as error:
    print(error)
own = int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])  # getrusage counts the parent's
print(max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    said, most = done.stdout.splitlines()
    return said, int(most)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (lambda path: repeated(path, 5_000, "x" * 10**6), "a.parquet"),  # 5 GB of one text
        (lambda path: one_page(path, 300 << 20), "a.parquet"),
        (lambda path: packed_arrow(path, 300 << 20), "saved"),
    ],
    ids=["dictionary", "page", "arrow"],
)
def test_a_small_file_that_holds_much_is_refused_in_little_memory(write, name, tmp_path):
    path = tmp_path / name
    write(path)
    assert sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir())) < 2_000_000
    said, most = peak(path)
    assert f"{path}" in said
    assert "bytes" in said
    assert most < 700 << 20


def test_what_is_not_much_is_read(tmp_path):
    repeated(tmp_path / "a.parquet", 100_000, "a film")
    table = tables.read(tmp_path / "a.parquet")[ALL]
    assert table.columns["text"][:] == ["a film"] * 100_000
    assert table.columns["text"][5:7] == ["a film"] * 2


def test_rows_and_columns_are_counted(tmp_path, monkeypatch):
    pq.write_table(pa.table({"text": pa.nulls(20_000_000)}), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"rows\.parquet cannot be read .* it has 20000000 rows; at most 10000000"):
        tables.read(tmp_path / "rows.parquet")
    pq.write_table(pa.table({f"c{i}": [1] for i in range(1001)}), tmp_path / "columns.parquet")
    with pytest.raises(ValueError, match=r"columns\.parquet cannot be read .* it has 1001 columns; at most 1000"):
        tables.read(tmp_path / "columns.parquet")
    keys = "\n".join(json.dumps({f"k{i}": 1}) for i in range(1001))  # every row has all of them, so a million cells
    (tmp_path / "keys.jsonl").write_text(keys)
    with pytest.raises(ValueError, match=r"keys\.jsonl, line 1001: more than 1000 columns"):
        tables.read(tmp_path / "keys.jsonl")


def test_what_is_no_text_or_number_is_not_read(tmp_path):
    """An image of `datasets` is a path, or an address, that it opens when it is looked at."""
    features = datasets.Features(text=datasets.Value("string"), picture=datasets.Image())
    data = {"text": ["a"], "picture": [{"path": "/etc/passwd", "bytes": None}]}
    table = pa.table(data).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features.to_dict()}})}
    )
    pq.write_table(table.append_column("tokens", pa.array([[1, 2]])), tmp_path / "a.parquet")
    found = tables.read(tmp_path / "a.parquet")[ALL]
    assert found.columns["text"][:] == ["a"]
    assert list(found.columns) == ["text", "picture", "tokens"]
    for name, kind in (("picture", "struct"), ("tokens", "list")):
        with pytest.raises(ValueError, match=f"column {name} is {kind}<.*; text, numbers, true and false are read"):
            found.columns[name][:]


def test_nothing_is_unpickled(tmp_path):
    """pyarrow's own extension types were pickles, and it warns where a file has one."""
    field = pa.field(
        "text",
        pa.string(),
        metadata={"ARROW:extension:name": "arrow.py_extension_type"}
        | {"ARROW:extension:metadata": "cos\nsystem\n(S'touch run'\ntR."},
    )
    pq.write_table(pa.table([["a"]], schema=pa.schema([field])), tmp_path / "a.parquet")
    with contextlib.suppress(ValueError):
        tables.read(tmp_path / "a.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        (
            "state.json",
            {"_data_files": [{"filename": "../other/data-00000-of-00001.arrow"}]},
            "it names '../other/data-",
        ),
        ("state.json", {"_data_files": [{"filename": "{other}/data-00000-of-00001.arrow"}]}, "it names '/"),
        ("state.json", {"_data_files": ["a"]}, "names no data files"),
        ("state.json", {"_data_files": [{}]}, "it names None"),
        ("state.json", {"_data_files": []}, r"\[\] is no list of names"),
        ("state.json", {"_indices_data_files": [{"filename": "a"}]}, "or an order of their rows: save it anew"),
        ("dataset_info.json", {"features": {"label": {"_type": "ClassLabel"}}}, "features are {'label'"),
        ("dataset_info.json", {"features": [1]}, r"features are \[1\]"),
    ],
)
def test_a_saved_folder_names_no_file_elsewhere(file, fields, message, tmp_path):
    for name in ("given", "other"):
        datasets.Dataset.from_dict({"text": [name], "label": [0]}).save_to_disk(str(tmp_path / name))
    assert tables.read(tmp_path / "given")[ALL].columns["text"][:] == ["given"]
    fields = json.loads(json.dumps(fields).replace("{other}", str(tmp_path / "other")))
    change(tmp_path / "given" / file, **fields)
    with pytest.raises(ValueError, match=rf"given cannot be read as a folder of datasets.save_to_disk: .*{message}"):
        tables.read(tmp_path / "given")


def test_a_split_of_a_saved_folder_stands_in_it(tmp_path):
    one = datasets.Dataset.from_dict({"text": ["a"], "label": [0]})
    one.save_to_disk(str(tmp_path / "other"))
    datasets.DatasetDict({"train": one}).save_to_disk(str(tmp_path / "given"))
    assert tables.read(tmp_path / "given")["train"].columns["text"][:] == ["a"]
    change(tmp_path / "given" / "dataset_dict.json", splits=["../other"])
    with pytest.raises(ValueError, match=r"it names '../other': all of it stands in its folder"):
        tables.read(tmp_path / "given")
    change(tmp_path / "given" / "dataset_dict.json", splits=["linked"])
    (tmp_path / "given" / "linked").symlink_to(tmp_path / "other")
    with pytest.raises(ValueError, match=r"given/linked/state.json is a link to"):
        tables.read(tmp_path / "given")


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_the_files_of_a_folder_are_no_links(suffix, tmp_path):
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).to_parquet(str(tmp_path / "secret.parquet"))
    (tmp_path / "secret.csv").write_text("text,label\na,0\n")
    (tmp_path / "secret.jsonl").write_text('{"text": "a", "label": 0}\n')
    (tmp_path / "given").mkdir()
    link = tmp_path / "given" / f"train.{suffix}"
    link.symlink_to(tmp_path / f"secret.{suffix}")
    with pytest.raises(ValueError, match=rf"given/train\.{suffix} is a link to"):
        tables.read(tmp_path / "given")
    assert tables.read(link)[ALL].columns["text"][:]  # whoever names a file means where it leads


def test_the_reader_has_its_own_limits():
    code = f"from flaxmpc.data import decoder; decoder.limit({1 << 28}); bytearray({GIGABYTE})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MemoryError" in done.stderr
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY  # here there is none
