import hashlib
import os
import secrets
import stat
from pathlib import Path

import pytest

from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy.cluster import ClusterFile, write_local
from flaxmpc.secure.deploy.kept import KEY_VARIABLE, KeptShares

KEY = hashlib.sha256(b"a key").digest()
SHARES = [m.Put(f"w{i}", m.Share(b"meta", [bytes([65 + i]) * 5000, b"z"])) for i in range(3)]
HEADER = m.Publish("session", "film", "hash", ["w0", "w1", "w2"], {})


@pytest.fixture
def kept(tmp_path):
    made = KeptShares(tmp_path / "kept", KEY)
    made.write(HEADER, b"the bundle", SHARES)
    return made


def damage_first(content: bytes) -> bytes:
    return content[:60] + bytes([content[60] ^ 1]) + content[61:]


def damage_last(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def cut(content: bytes) -> bytes:
    return content[:-100]


def cut_a_record(content: bytes) -> bytes:
    return content[: -(4 + 16 + len(m.encode(SHARES[2])))]


def test_what_was_kept_is_read(kept, tmp_path):
    header, bundle, shares = KeptShares(tmp_path / "kept", KEY).read(kept.paths()[0])
    assert (header, bundle, list(shares)) == (HEADER, b"the bundle", SHARES)


def test_a_new_put_takes_the_old_ones_place(kept):
    kept.write(HEADER, b"another", [])
    kept.write(m.Publish("session", "other", "h", [], {}), b"", [])
    assert [path.name for path in kept.paths()] == ["film.shares", "other.shares"]
    assert kept.read(kept.paths()[1])[1] == b""


def test_nothing_is_in_the_clear_and_nobody_else_can_read_it(kept):
    (path,) = kept.paths()
    content = path.read_bytes()
    for share in SHARES:
        assert share.share.chunks[0][:16] not in content
    assert b"film" not in content
    assert b"bundle" not in content
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("change", [damage_first, damage_last, cut, cut_a_record, lambda content: b""])
def test_a_damaged_file_is_named(kept, change):
    (path,) = kept.paths()
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=r"film\.shares is damaged, or was written with another key"):
        KeptShares(path.parent, KEY)


def test_another_key_is_noticed(kept):
    (path,) = kept.paths()
    with pytest.raises(ValueError, match="damaged, or was written with another key"):
        KeptShares(path.parent, bytes(32))


def test_an_interrupted_write_leaves_the_old_file(kept):
    def failing():
        yield SHARES[0]
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        kept.write(HEADER, b"new", failing())
    (path,) = kept.paths()
    assert list(path.parent.iterdir()) == [path]
    assert kept.read(path)[1] == b"the bundle"


def test_the_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    cluster = write_local(tmp_path / "c")
    assert KeptShares.of(cluster, cluster.party[0]) is None
    text = cluster.path.read_text()
    cluster.path.write_text(text.replace("rank = 1\n", 'rank = 1\nkeep_shares = "kept"\n'))
    cluster = ClusterFile.read(cluster.path)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with pytest.raises(ValueError, match="party 1 keeps its shares in kept, but has no key for them: say shares_key"):
        KeptShares.of(cluster, cluster.party[1])
    monkeypatch.setenv(KEY_VARIABLE, "abc")
    with pytest.raises(ValueError, match=f"{KEY_VARIABLE} holds no key of 64 hex digits"):
        KeptShares.of(cluster, cluster.party[1])
    monkeypatch.setenv(KEY_VARIABLE, KEY.hex())
    kept = KeptShares.of(cluster, cluster.party[1])
    assert kept is not None
    kept.write(HEADER, b"", SHARES)
    assert KEY_VARIABLE not in os.environ  # nor in that of a worker
    (cluster.path.parent / "key").write_text(KEY.hex() + "\n")
    (cluster.path.parent / "key").chmod(0o600)
    cluster.path.write_text(text.replace("rank = 1\n", 'rank = 1\nkeep_shares = "kept"\nshares_key = "key"\n'))
    cluster = ClusterFile.read(cluster.path)
    again = KeptShares.of(cluster, cluster.party[1])
    assert again is not None
    assert [path.name for path in again.paths()] == ["film.shares"]


@pytest.mark.parametrize(
    "guessed", [bytes(32), b"\xff" * 32, b"0123456789abcdef" * 2, bytes(range(32)), bytes(range(64, 0, -2))]
)
def test_a_key_that_nobody_drew_is_refused(tmp_path, monkeypatch, guessed):
    cluster = keeping(tmp_path, "")
    monkeypatch.setenv(KEY_VARIABLE, guessed.hex())
    with pytest.raises(ValueError, match=f"^{KEY_VARIABLE} holds a key that can be guessed: make one with `openssl"):
        KeptShares.of(cluster, cluster.party[1])
    assert not (tmp_path / "kept").exists()


def test_drawn_keys_are_right(tmp_path, monkeypatch):
    cluster = keeping(tmp_path, "")
    for _ in range(1000):
        monkeypatch.setenv(KEY_VARIABLE, secrets.token_hex(32))
        assert KeptShares.of(cluster, cluster.party[1]) is not None


def test_a_key_file_is_its_owners_only(tmp_path):
    cluster = keeping(tmp_path, 'shares_key = "key"')
    path = cluster.file("key")
    path.write_text(KEY.hex())
    path.chmod(0o644)
    with pytest.raises(ValueError, match=r"key is secret, but others may read it \(mode 0644\): chmod 600 \S+key$"):
        KeptShares.of(cluster, cluster.party[1])
    path.unlink()
    os.mkfifo(path, 0o600)
    with pytest.raises(ValueError, match=r"key is not a file$"):
        KeptShares.of(cluster, cluster.party[1])


def test_the_key_is_taken_from_the_environment_by_those_who_keep_nothing_too(tmp_path, monkeypatch):
    cluster = keeping(tmp_path, "")
    monkeypatch.setenv(KEY_VARIABLE, KEY.hex())
    assert KeptShares.of(cluster, cluster.party[0]) is None
    assert KEY_VARIABLE not in os.environ


def keeping(folder: Path, line: str) -> ClusterFile:
    """A cluster whose party 1 keeps its shares in `folder`, with a further line."""
    cluster = write_local(folder / "c")
    text = cluster.path.read_text().replace("rank = 1\n", f'rank = 1\nkeep_shares = "{folder / "kept"}"\n{line}\n')
    cluster.path.write_text(text)
    return ClusterFile.read(cluster.path)
