"""Files of others: no link is followed out of their folder, nothing is waited for, and sizes are bounded. And ours."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from flaxmpc import files


def test_a_file_is_there_whole_and_readable_as_others_are(tmp_path):
    path = tmp_path / "a.txt"
    for content in ("first\n", b"second, longer\n"):
        files.write(path, content)
    assert path.read_text() == "second, longer\n"
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.txt", "other"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_what_cannot_be_written_leaves_what_was_there(call, tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space left"):
            files.write_json(path, {"a": 2})
    assert files.read_object(path) == {"a": 1}
    with pytest.raises(ValueError, match="Out of range float values"):
        files.write_json(path, {"a": float("nan")})
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_leftover_of_a_killed_write_is_in_nobodys_way(tmp_path):
    (tmp_path / "a.json.new").write_text('{"a":')
    files.write_json(tmp_path / "a.json", {"a": 1})
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"[1]", b'{"a": "\xff"}', b"null", b'{"a":' * 100_000])
def test_what_is_no_object_is_named_with_what_to_do(content, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json .*: remove it$"):
        files.read_object(path, mend="remove it")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.json").write_text('{"a": [1, {"b": 2}]}')
    (tmp_path / "secret").write_text('{"secret": 1}')
    return tmp_path / "folder"


def test_a_file_is_read_as_it_is(folder, monkeypatch):
    assert files.read(folder / "a.json", 20) == b'{"a": [1, {"b": 2}]}'
    assert files.read_object(folder / "a.json") == {"a": [1, {"b": 2}]}
    monkeypatch.chdir(folder)
    assert files.read_object(files.Path("a.json")) == {"a": [1, {"b": 2}]}


@pytest.mark.parametrize("target", ["../secret", "{absolute}", "a.json", "../folder/a.json"])
def test_a_link_is_refused_wherever_it_leads(folder, target):
    (folder / "link").symlink_to(target.format(absolute=folder.parent / "secret"))
    with pytest.raises(ValueError, match=r"folder/link is a link to .*; put the file itself there"):
        files.read(folder / "link", 100)


def test_a_folder_within_is_no_link_either(folder):
    (folder / "in").symlink_to(folder.parent)
    with pytest.raises(ValueError, match=r"folder/in/secret is a link to"):
        files.read(folder / "in" / "secret", 100, folder)


def test_the_folder_itself_is_the_users(folder, tmp_path):
    (tmp_path / "linked").symlink_to(folder)
    assert files.read(tmp_path / "linked" / "a.json", 20)


@pytest.mark.parametrize(
    ("repository", "link", "target", "reads"),
    [
        ("models--a--b", "snapshots/c/f", "../../blobs/1", True),
        ("datasets--a--b", "snapshots/c/data/f", "../../../blobs/1", True),
        ("models--a--b", "snapshots/c/f", "../../blobs/2", False),  # itself a link out of it
        ("models--a--b", "snapshots/c/f", "../../../../secret", False),
        ("models--a--b", "snapshots/c/f", "../../refs/main", False),
        ("models--a--b", "f", "blobs/1", False),  # no snapshot
        ("evil", "snapshots/c/f", "../../blobs/1", False),  # no repository of the hub
    ],
)
def test_links_of_a_hub_cache_lead_to_its_blobs(folder, repository, link, target, reads):
    root = folder / repository
    for name in ("blobs", "refs"):
        (root / name).mkdir(parents=True)
    (root / "blobs" / "1").write_text("blob")
    (root / "blobs" / "2").symlink_to(folder.parent / "secret")
    (root / "refs" / "main").write_text("c")
    path = root / link
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
    if reads:
        assert files.read(path, 4) == b"blob"
    else:
        with pytest.raises(ValueError, match="is a link to"):
            files.read(path, 100)


def test_blobs_that_are_a_link_are_no_blobs(folder):
    root = folder / "models--a--b"
    (root / "snapshots" / "c").mkdir(parents=True)
    (root / "blobs").symlink_to(folder.parent)
    (root / "snapshots" / "c" / "f").symlink_to("../../blobs/secret")
    with pytest.raises(ValueError, match="is a link to"):
        files.read(root / "snapshots" / "c" / "f", 100)


def test_what_is_no_file_is_not_waited_for(folder):
    os.mkfifo(folder / "fifo")
    for name in ("fifo", "."):
        with pytest.raises(ValueError, match="is no regular file"):
            files.read(folder / name, 100)
    (folder / "circle").symlink_to("circle")
    with pytest.raises(ValueError, match=r"circle cannot be read"):
        files.read(folder / "circle", 100)
    (folder / "nothing").symlink_to("moved")
    with pytest.raises(FileNotFoundError, match="nothing does not exist, it is a link to nothing"):
        files.read(folder / "nothing", 100)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"x" * 101, "has more than 100 bytes"),
        (b"{", "cannot be read as JSON: "),
        (b"\xff\xfe{}", "cannot be read as JSON: 'utf-8'"),
        (b"[" * 65 + b"]" * 65, "is nested more than 64 deep"),
        (b"[]", "holds no JSON object"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_its_file(folder, content, message):
    (folder / "b.json").write_bytes(content)
    most = 100 if content.startswith(b"x") else 1000
    with pytest.raises(ValueError, match=f"folder/b.json {message}") as error:
        files.read_object(folder / "b.json", most)
    assert "\n" not in str(error.value)


def test_as_deep_as_is_allowed(folder):
    (folder / "b.json").write_text("[" * 64 + "]" * 64)
    assert files.read_json(folder / "b.json")


HOLDS = """
import sys, time
from pathlib import Path
from flaxmpc.files import claimed
with claimed(Path(sys.argv[1])):
    print("claimed", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_one_runs_until_it_ends_or_is_killed(tmp_path):
    folder = tmp_path / "models" / "student"
    root = str(Path(__file__).parents[1])
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(folder)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": root},
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"claimed\n"
        whose = rf"^process {holder.pid} on {socket.gethostname()} writes to .*/student: wait until it ends, or name"
        linked = tmp_path / "linked"
        linked.symlink_to(tmp_path / "models")
        for path in (folder, linked / "student"):
            with pytest.raises(ValueError, match=whose), files.claimed(path):
                pass
        with files.claimed(tmp_path / "models" / "other"):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    for _ in range(2):
        with files.claimed(folder), pytest.raises(ValueError, match=f"process {os.getpid()} on"), files.claimed(folder):
            pass
    assert list((tmp_path / "models").iterdir()) == []
