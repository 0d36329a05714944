import os

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
    assert files.read_json(path) == {"a": 1}
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
    with pytest.raises(ValueError, match=r"a\.json is damaged \(.*\): remove it"):
        files.read_json(path, "remove it")
