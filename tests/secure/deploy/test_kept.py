import hashlib
import os
import random
import secrets
import socket
import stat
import tracemalloc
from pathlib import Path

import msgspec
import pytest

from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy.cluster import ClusterFile
from flaxmpc.secure.deploy.kept import KEY_VARIABLE, KeptShares
from flaxmpc.secure.deploy.local import write_local

KEY = hashlib.sha256(b"a key").digest()
SHARES = [m.Put(f"w{i}", m.Share(b"meta", [bytes([65 + i]) * 5000, b"z"])) for i in range(3)]
HEADER = m.Publish("session", "lease", "film", "hash", ["w0", "w1", "w2"], {})


@pytest.fixture
def kept(tmp_path):
    made = KeptShares(tmp_path / "kept", KEY)
    made.stage(HEADER, b"the bundle", SHARES)
    made.commit("film", "hash")
    return made


@pytest.fixture
def path(kept, tmp_path):
    """Of the put that is served."""
    (found,) = (tmp_path / "kept").iterdir()
    assert found.name == "film.shares"
    return found


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def damage_first(content: bytes) -> bytes:
    return content[:60] + bytes([content[60] ^ 1]) + content[61:]


def damage_last(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def cut(content: bytes) -> bytes:
    return content[:-100]


def cut_a_record(content: bytes) -> bytes:
    return content[: -(4 + 17 + len(m.encode(SHARES[2])))]


def test_what_was_kept_is_read(kept, tmp_path):
    again = KeptShares(tmp_path / "kept", KEY)
    assert again.models == {"film": "hash"}
    header, bundle, shares = again.read("film")
    assert (header, bundle, list(shares)) == (HEADER, b"the bundle", SHARES)


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (3 << 20) + 7])
def test_records_of_any_size_are_read(kept, size):
    bundle = random.Random(size).randbytes(size)
    header = msgspec.structs.replace(HEADER, hash="large", weights=["w"])
    weight = m.Put("w", m.Share(b"", [bundle[::-1]]))
    kept.stage(header, bundle, [weight])
    kept.commit("film", "large")
    assert kept.read("film")[1] == bundle
    assert list(kept.read("film")[2]) == [weight]


def test_a_staged_put_takes_the_old_ones_place_or_goes(kept, path):
    for hash_ in ("second", "third"):
        kept.stage(msgspec.structs.replace(HEADER, hash=hash_), b"another", SHARES)
    kept.stage(m.Publish("session", "lease", "other", "h", [], {}), b"", [])
    staged = ["film.second.staged", "film.shares", "film.third.staged", "other.h.staged"]
    assert names(path.parent) == staged
    assert kept.read("film")[1] == b"the bundle"
    again = KeptShares(path.parent, KEY)  # whichever party 0 chooses, it is there
    assert again.models == {"film": "hash"}
    again.commit("film", "second")
    again.commit("other", "h")
    again.discard("film", "third")
    again.discard("film", "third")
    assert names(path.parent) == ["film.shares", "other.shares"]
    assert again.read("film")[1] == b"another"
    assert again.models == {"film": "second", "other": "h"}
    with pytest.raises(FileNotFoundError):
        again.commit("film", "third")
    assert again.models["film"] == "second"
    again.stage(msgspec.structs.replace(HEADER, hash="fourth"), b"", SHARES)
    again.sweep()
    assert names(path.parent) == ["film.shares", "other.shares"]


def test_nothing_is_in_the_clear_and_nobody_else_can_read_it(kept, path):
    content = path.read_bytes()
    for share in SHARES:
        assert share.share.chunks[0][:16] not in content
    assert b"film" not in content
    assert b"bundle" not in content
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize(
    "change", [damage_first, damage_last, cut, cut_a_record, lambda content: b"", lambda content: content + b"\0"]
)
def test_a_damaged_file_is_named(kept, path, change, staged):
    if staged:
        kept.stage(msgspec.structs.replace(HEADER, hash="second"), b"", SHARES)
        path = path.with_name("film.second.staged")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(
        ValueError,
        match=rf"{path.name} is (of another version of flaxmpc, or is )?damaged",
    ):
        KeptShares(path.parent, KEY)


def test_every_changed_byte_and_every_cut_is_noticed(kept, path):
    content = path.read_bytes()
    positions = random.Random(15).sample(range(len(content)), 60)
    changed = [content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] for at in positions]
    for damaged in (*changed, *(content[:at] for at in positions)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            KeptShares(path.parent, KEY)


def test_another_key_is_noticed(path):
    with pytest.raises(ValueError, match="damaged, or was written with another key"):
        KeptShares(path.parent, bytes(32))


def test_a_renamed_file_is_noticed(path):
    for name in ("other.shares", "film.other.staged"):
        other = path.rename(path.with_name(name))
        with pytest.raises(ValueError, match=f"{name} holds put hash of model 'film': its name was changed"):
            KeptShares(path.parent, KEY)
        other.rename(path)


@pytest.mark.parametrize("name", ["film.shares", "film.hash.staged"])
@pytest.mark.parametrize("kind", ["pipe", "link", "link to nothing", "folder", "socket", "device"])
def test_what_is_no_regular_file_is_named_and_not_waited_for(path, tmp_path, name, kind):
    moved = path.rename(tmp_path / "moved")
    strange = path.with_name(name)
    match kind:
        case "pipe":
            os.mkfifo(strange)
        case "link":
            strange.symlink_to(moved)
        case "link to nothing":
            strange.symlink_to(tmp_path / "nothing")
        case "folder":
            strange.mkdir()
        case "socket":
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(os.path.relpath(strange))  # a path of a socket is short
        case "device":
            strange.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=f"{name} is no regular file: remove it"):
        KeptShares(path.parent, KEY)


def test_a_huge_length_takes_no_memory(path):
    start = 16 + 24  # magic and the stream's header; then the length
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.write(content[:start] + b"\xff\xff\xff\xff")
        file.truncate(5 << 30)  # sparse
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="is damaged"):
            KeptShares(path.parent, KEY)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_file_of_another_version_is_named(kept, path, monkeypatch):
    monkeypatch.setattr(m, "encode", lambda message: msgspec.msgpack.encode({"version": 0}))
    kept.stage(HEADER, b"", SHARES)
    with pytest.raises(ValueError, match=r"film\.hash\.staged is of another version of flaxmpc: remove the file"):
        KeptShares(path.parent, KEY)


@pytest.mark.parametrize("version", [b"1", b"2", b"4"])
def test_a_file_of_another_format_is_named_and_never_misread(path, version):
    path.write_bytes(b"flaxmpc-shares-" + version + path.read_bytes()[16:])
    with pytest.raises(
        ValueError,
        match=r"film\.shares is of another version of flaxmpc, or is damaged: remove the file and let the owner put",
    ):
        KeptShares(path.parent, KEY)


def test_an_interrupted_write_leaves_the_old_file(kept, path):
    def failing():
        yield SHARES[0]
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        kept.stage(msgspec.structs.replace(HEADER, hash="second"), b"new", failing())
    assert names(path.parent) == ["film.shares"]
    (path.parent / "film.second.staged.new").write_bytes(b"the power failed here")
    assert KeptShares(path.parent, KEY).read("film")[1] == b"the bundle"
    assert names(path.parent) == ["film.shares"]


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
    kept.stage(HEADER, b"", SHARES)
    kept.commit("film", "hash")
    assert KEY_VARIABLE not in os.environ  # nor in that of a worker
    (cluster.path.parent / "key").write_text(KEY.hex() + "\n")
    (cluster.path.parent / "key").chmod(0o600)
    cluster.path.write_text(text.replace("rank = 1\n", 'rank = 1\nkeep_shares = "kept"\nshares_key = "key"\n'))
    cluster = ClusterFile.read(cluster.path)
    again = KeptShares.of(cluster, cluster.party[1])
    assert again is not None
    assert again.models == {"film": "hash"}


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
