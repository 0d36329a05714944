"""The cache folder is trusted, so a folder or a file that another may have written is not it."""

import os
from pathlib import Path

import numpy as np
import pytest

from flaxmpc import secure
from flaxmpc.secure import cache


@pytest.fixture
def folder(monkeypatch, tmp_path):
    path = tmp_path / "cache"
    path.mkdir(mode=0o700)
    monkeypatch.setenv("FLAXMPC_CACHE", str(path))
    return path


def refused(message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        secure.cache_dir()
    assert "or let FLAXMPC_CACHE name another" in str(error.value)
    with pytest.raises(ValueError, match=message):
        secure.jit(lambda x: x - 49, "REF2K").compile(np.float32(1))


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775, 0o702])
def test_a_folder_that_others_may_write_to_is_refused(folder, mode):
    folder.chmod(mode)
    refused(rf"^the cache folder \S+cache may be written to by others \(mode {mode:04o}\): chmod go-w it")


def test_a_link_is_refused(folder):
    folder.rename(folder.with_name("there"))
    folder.symlink_to("there")
    refused("is a link: give what it leads to")
    folder.with_name("there").rmdir()
    refused("is a link: give what it leads to")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives folders away")
def test_a_folder_of_another_user_is_refused(folder):
    os.chown(folder, 1234, -1)
    refused(r"belongs to another user \(id 1234\): remove it")


def test_a_folder_that_others_may_replace_is_refused(folder):
    folder.parent.chmod(0o777)
    refused(r"is in \S+, where anybody may put another in its place: chmod o-w that")
    folder.rmdir()
    refused(r"is in \S+, where anybody may put another in its place")
    folder.parent.chmod(0o1777)  # as /tmp is
    assert secure.cache_dir() == folder


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o750, 0o500])
def test_others_may_read_it(folder, mode):
    folder.chmod(mode)
    assert secure.cache_dir() == folder


@pytest.mark.parametrize("own", ["/dev/null", "file"])
def test_what_is_no_folder_is_no_cache(folder, monkeypatch, own):
    (folder / "file").write_text("")
    monkeypatch.setenv("FLAXMPC_CACHE", str(folder / own))
    path = secure.cache_dir()
    assert path is not None
    cache.write(path / "name", b"code")
    assert cache.read(path / "name") is None


def other_users(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    os.chown(path, 1234, -1)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


@pytest.mark.parametrize(
    "spoil", [lambda path: path.chmod(0o664), lambda path: path.chmod(0o646), other_users, pipe, link]
)
def test_a_file_that_may_be_anothers_is_not_used(folder, spoil):
    path = folder / "name"
    cache.write(path, b"code")
    assert cache.read(path) == b"code"
    spoil(path)
    assert cache.read(path) is None
    cache.write(path, b"code")  # in its place
    assert cache.read(path) == b"code"


def test_what_it_makes_is_its_own_whatever_the_umask(folder, monkeypatch):
    monkeypatch.setenv("FLAXMPC_CACHE", str(folder / "made"))
    before = os.umask(0)
    try:
        path = secure.cache_dir()
        assert path is not None
        cache.write(path / "name", b"code")
    finally:
        os.umask(before)
    assert (path.stat().st_mode & 0o777, (path / "name").stat().st_mode & 0o777) == (0o755, 0o644)
    assert secure.cache_dir() == path
