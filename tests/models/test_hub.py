"""Models on the hub, by the real client, from a stand-in server."""

import json
import os
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hub import OWNER, Client, Hub, Reply, Repository, serving

import flaxmpc
from flaxmpc.models import hub as hubs
from flaxmpc.models import tokenizer, zoo
from flaxmpc.serve import plans

# Of a model: what `zoo.find` fetches, and what it leaves there.
SMALL = {"config.json": b"{}", "tokenizer.json": b"{ }", "tokenizer_config.json": b"{  }", "bits.json": b"[]"}
WEIGHTS = {"model.safetensors": os.urandom(100_000)}
STRAY = {"pytorch_model.bin": b"pickle", "training_args.bin": b"pickle", "modeling.py": b"code", "onnx/model.onnx": b""}


@pytest.fixture
def server():
    with serving() as running:
        yield running


@pytest.fixture
def client(server, tmp_path):
    """client(folder, **settings) -> a machine that asks the server."""
    return lambda folder="machine", url=None, **settings: Client(tmp_path / folder, url or server.url, **settings)


def publish(server: Hub, name: str, contents=None, **settings) -> str:
    server.repositories[name] = Repository(**settings)
    return server.repositories[name].commit(SMALL | WEIGHTS | STRAY if contents is None else contents)


def cached(machine: Client, name: str) -> dict[str, set[str]]:
    """The files of each commit in a machine's cache."""
    snapshots = machine.cache / f"models--{name.replace('/', '--')}" / "snapshots"
    return {folder.name: {path.name for path in folder.rglob("*")} for folder in snapshots.glob("*")}


# ---------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("org/name", ("org/name", None)),
        ("Org-1/na_me.v2", ("Org-1/na_me.v2", None)),
        ("org/name@main", ("org/name", "main")),
        ("org/name@refs/pr/1", ("org/name", "refs/pr/1")),
        ("org/name@v1.0", ("org/name", "v1.0")),
        ("name", None),
        ("../name", None),
        ("./name", None),
        ("/org/name", None),
        ("org/name/", None),
        ("org//name", None),
        ("org/name/../..", None),
        ("org/..", None),
        ("org/a--b", None),
        ("org/name.git", None),
        ("https://huggingface.co/org/name", None),
        ("org/" + "n" * 97, None),
        ("o" * 97 + "/name", None),
        ("org/n\n", None),
        ("org/имя", None),
        ("@", None),
        ("/@", None),
        ("", None),
    ],
)
def test_a_name_on_the_hub_is_an_owner_and_a_name(name, read):
    assert hubs.parse(name) == read


@pytest.mark.parametrize("revision", ["", "..", "../..", "a/../b", "/a", "-a", "a b", "a\n", "a@b", "x" * 201, "a//b"])
def test_what_is_no_revision_is_refused_before_anything_is_asked(revision):
    with pytest.raises(ValueError, match="after @ comes a branch, a tag or a commit of the hub, not"):
        hubs.parse(f"org/name@{revision}")


@pytest.mark.parametrize("name", ["org//name", "https://huggingface.co/org/name", "org/name/../..", "o" * 999 + "/x"])
def test_what_is_neither_a_folder_nor_a_name_is_told_so_in_a_line(name):
    with pytest.raises(FileNotFoundError, match="is no folder, nor a name on the hub") as error:
        zoo.find(name)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("name", ["/no/where", "./org/name", "../org/name", "~/name", Path("org/name")])
def test_a_path_is_never_asked_for(name):
    with pytest.raises(FileNotFoundError, match=r"is no folder$"):
        zoo.find(name)


def test_a_copy_in_the_cache_is_known_by_its_place(tmp_path):
    commit = "0123456789" * 4
    copy = tmp_path / "hub" / "models--org--na.me" / "snapshots" / commit
    assert hubs.origin(copy) == hubs.Name("org/na.me", commit)
    assert zoo.name_of(copy) == "na.me"
    assert hubs.parse_commit(str(hubs.origin(copy))) == hubs.origin(copy)
    for other in (copy.parent, copy / "config.json", copy.with_name("main"), tmp_path / commit, Path("/")):
        assert hubs.origin(other) is None
    assert zoo.name_of(tmp_path / "own") == "own"
    for place in ("org/name", "runs/teacher", f"runs@x/{commit}", f"name@{commit}", None, 3, []):
        assert hubs.parse_commit(place) is None


def test_the_files_are_those_that_a_folder_is_read_from():
    vocabularies = [name for names in tokenizer._VOCABULARIES for name in names]
    beside = {"config.json", "added_tokens.json", "recipe.json", "results.json", "README.md"}
    assert {*hubs.MODEL_FILES} == {plans.FILE, *tokenizer.FILES, *vocabularies, *beside}
    named = [
        "config.json",
        "pytorch_model.bin",
        "a/config.json",
        "model-1-of-2.safetensors",
        "a/model-1-of-2.safetensors",
    ]
    assert hubs.model_files(named) == ["config.json", "model-1-of-2.safetensors"]
    assert hubs.model_files(["model.safetensors", *named]) == ["model.safetensors", "config.json"]
    assert not hubs.model_files(["../model.safetensors", "model-../../x-of-y.safetensors", "ca.key", "model.msgpack"])


# ------------------------------------------------------------------------------------------------------------- fetching


def test_only_the_files_of_a_model_are_fetched_and_a_copy_is_kept(server, client):
    sha = publish(server, "org/name")
    machine = client()
    assert machine.found("org/name", "org/name@main", f"org/name@{sha}", "org/name") == ["found"] * 4
    assert cached(machine, "org/name") == {sha: {*SMALL, *WEIGHTS}}
    assert sum("GET" in asked and "/resolve/" in asked for asked in server.asked) == len(SMALL | WEIGHTS)
    server.asked.clear()
    offline, unreachable = client(HF_HUB_OFFLINE="1"), client(url="http://127.0.0.1:9")
    for without, why in (
        (offline, "HF_HUB_OFFLINE says not to ask the hub"),
        (unreachable, "the hub can't be reached ("),
    ):
        found, here, gone, other = without.found("org/name", f"org/name@{sha}", "org/name@v2", "runs/teacher")
        assert found == here == "found"
        for name, said in (("org/name@v2", gone), ("runs/teacher", other)):
            assert said.startswith(f"FileNotFoundError: {name} is no folder here, {why}")
            assert "its cache has no whole copy: name a folder, or " in said
    assert not server.asked


def test_a_card_is_shown_without_the_weights(server, client):
    sha = publish(server, "org/name", SMALL | WEIGHTS | {"README.md": b"---\nlicense: mit\n---\n\n# Mine\n"})
    machine = client()
    shown = machine.run("zoo", "show", "org/name")
    assert "Mine" in shown.stdout
    assert "license" not in shown.stdout
    assert cached(machine, "org/name") == {sha: {*SMALL, "README.md"}}
    offline = client(HF_HUB_OFFLINE="1")
    (said,) = offline.found("org/name")
    assert "whole" in said  # the weights are not here
    assert offline.found("org/name", weights=False) == ["found"]


def test_shards_are_fetched_with_their_index_and_not_beside_the_whole(server, client):
    shards = {f"model-0000{i}-of-00002.safetensors": b"weights" for i in (1, 2)}
    index = {
        "model.safetensors.index.json": json.dumps({"weight_map": dict.fromkeys("ab", next(iter(shards)))}).encode()
    }
    shard_sha = publish(server, "org/shards", SMALL | shards | index)
    both = publish(server, "org/both", SMALL | WEIGHTS | shards | index)
    machine = client()
    assert machine.found("org/shards", "org/both") == ["found"] * 2
    assert cached(machine, "org/shards") == {shard_sha: {*SMALL, *shards, *index}}
    assert cached(machine, "org/both") == {both: {*SMALL, *WEIGHTS}}


def test_a_folder_and_the_zoo_go_before_the_hub(server, client):
    publish(server, "org/name")
    machine = client()
    (machine.home / "org" / "name").mkdir(parents=True)
    assert machine.found("org/name", zoo.DEFAULT) == ["found", "found"]
    assert not server.asked


def test_what_the_hub_refuses_is_one_line_that_says_what_to_do(server, client):
    publish(server, "org/private", private=True)
    publish(server, "org/gated", gated=True)
    publish(server, "org/name")
    publish(server, "org/data", {"train.csv": b"a"})
    publish(server, "org/pickle", SMALL | STRAY)
    publish(server, "org/empty", {})
    publish(server, "org/huge", SMALL | WEIGHTS)
    publish(server, "org/vast", SMALL | WEIGHTS | {"notes.md": b""})
    server.repositories["org/new"] = Repository()
    expected = {
        "org/none": "on the hub there is no org/none, or it is private: check the name; for a private one log in ",
        "org/private": "it is private: check the name; for a private one log in with `hf auth login`, or set HF_TOKEN",
        "org/gated": "its owner asks for consent: give it at the page of org/gated, and log in with `hf auth login`",
        "org/name@v2": "on the hub org/name has no revision v2",
        f"org/name@{'0' * 40}": f"on the hub org/name has no revision {'0' * 40}",
        "org/data": "on the hub it has no config.json: it is no model's",
        "org/empty": "on the hub it has no config.json: it is no model's",
        "org/pickle": "on the hub it has no weights in safetensors (model.safetensors); it has bits.json, ",
    }
    for name, said in zip(expected, client().found(*expected), strict=True):
        assert said.startswith(f"FileNotFoundError: {name} is no folder here, and on the hub ")
        assert expected[name] in said
        assert "\n" not in said
    assert not any("/resolve/" in asked and "gated" not in asked for asked in server.asked)
    assert client("known", HF_TOKEN=OWNER).found("org/private", "org/gated") == ["found"] * 2


def test_files_larger_than_any_model_has_are_not_downloaded(server, client):
    publish(server, "org/name")
    machine = client()
    server.large = {"config.json": 1 << 40}
    (said,) = machine.found("org/name")
    assert said == "ValueError: org/name: config.json has 1099511627776 bytes on the hub; at most 33554432 are fetched"
    server.large = {"model.safetensors": 1 << 40}
    (said,) = machine.found("org/name")
    assert said.startswith("ValueError: org/name: its weights have 1099511627776 bytes on the hub; at most ")
    assert not any("/resolve/" in asked for asked in server.asked)


def _fail(reply: Reply, where: str):
    def fault(method: str, path: str) -> None:
        if re.search(where, path):
            raise reply

    return fault


@pytest.mark.parametrize(
    "reply",
    [
        Reply(500, {"error": "Internal"}),
        Reply(200, b"<html>Sign in to the hotel's network</html>"),
        Reply(200, []),
        Reply(200, {"id": "org/name", "sha": "../../../evil", "siblings": []}),
        Reply(200, {"id": "org/name", "sha": None, "siblings": [{"rfilename": "config.json"}]}),
    ],
)
def test_an_answer_of_no_hub_is_no_model_and_a_copy_is_used(reply, server, client):
    server.fault = _fail(reply, "/api/models/")
    machine = client()
    (said,) = machine.found("org/name")
    assert said.startswith("FileNotFoundError: org/name is no folder here, the hub can't be reached (")
    assert "\n" not in said
    server.fault = lambda method, path: None
    publish(server, "org/name")
    assert machine.found("org/name") == ["found"]
    server.fault = _fail(reply, "/api/models/")
    assert machine.found("org/name") == ["found"]


def test_a_download_that_is_cut_leaves_no_half_model_and_goes_on(server, client):
    sha = publish(server, "org/name")
    machine, offline = client(), client(HF_HUB_OFFLINE="1")
    for cut in ("model.safetensors", "tokenizer_config.json"):
        server.cut = {cut}
        if cut in SMALL:
            sha = server.repositories["org/name"].commit(SMALL | WEIGHTS | {cut: b"{     }"})
        (said,) = machine.found("org/name")
        assert said.startswith("ConnectionError: org/name: the download from the hub broke off ("), said
        assert cut not in cached(machine, "org/name").get(sha, ())
        assert "whole" in offline.found("org/name")[0]
        server.cut = set()
        assert machine.found("org/name") == ["found"]
        folder = machine.cache / "models--org--name" / "snapshots" / sha
        assert {name: (folder / name).read_bytes() for name in hubs.model_files(server.files("org/name"))} == {
            name: content for name, content in server.files("org/name").items() if name not in STRAY
        }
        assert offline.found("org/name") == ["found"]


def test_a_damaged_cache_is_told_and_a_mended_one_is_read(server, client):
    sha = publish(server, "org/name")
    machine, offline = client(), client(HF_HUB_OFFLINE="1")
    assert machine.found("org/name") == ["found"]
    folder = machine.cache / "models--org--name" / "snapshots" / sha
    # A link to nothing would be taken for a folder without this file, and texts get other tokens.
    (folder / "tokenizer_config.json").resolve().unlink()
    (said,) = offline.found("org/name")
    assert "tokenizer_config.json" in said or "whole" in said
    assert machine.found("org/name") == ["found"]
    weights = (folder / "model.safetensors").resolve()
    weights.write_bytes(weights.read_bytes()[:-1])
    (said,) = machine.found("org/name")
    assert re.search(
        r"model\.safetensors in the hub's cache is damaged: remove .*/models--org--name and try again$", said
    )
    weights.unlink()
    assert machine.found("org/name") == ["found"]
    (folder / plans.FILE).unlink()
    (folder / plans.FILE).write_text("a plan that was made here")
    assert machine.found("org/name") == ["found"]
    (machine.cache / "models--org--name" / "refs" / "main").write_text("../../..")
    (said,) = offline.found("org/name")
    assert "damaged" in said or "whole" in said


# ------------------------------------------------------------------------------------------------------------ uploading


@pytest.fixture
def folder(tmp_path):
    """A model folder, and in it what is nobody's business."""
    path = tmp_path / "model"
    (path / "runs").mkdir(parents=True)
    for name, content in (SMALL | WEIGHTS | {"README.md": b"---\nlicense: mit\n---\n# Mine\n"}).items():
        (path / name).write_bytes(content)
    for name in ("owner.key", "notes.md", "training.log", "optimizer.msgpack", "runs/config.json", ".env"):
        (path / name).write_bytes(b"secret")
    return path


def test_a_models_files_are_uploaded_and_no_others(server, client, folder):
    owner = client(HF_TOKEN=OWNER)
    address, again = owner.uploaded((folder, "org/name", False), (folder, "org/name", False))
    assert address == again == f"{server.url}/org/name"
    assert set(server.files("org/name")) == {*SMALL, *WEIGHTS, "README.md"}
    for name, content in server.files("org/name").items():
        assert content == (folder / name).read_bytes()
    # Of another model in its place nothing is left that would be read with it; what is no model's stays.
    server.repositories["org/name"].commit(
        server.files("org/name") | {"vocab.txt": b"[PAD]", "model-1-of-2.safetensors": b"", "LICENSE": b"mine"}
    )
    (folder / plans.FILE).unlink()
    assert owner.uploaded((folder, "org/name", False)) == [address]
    assert set(server.files("org/name")) == {*SMALL, *WEIGHTS, "README.md", "LICENSE"} - {plans.FILE}


def test_what_is_to_be_private_is_never_public(server, client, folder):
    owner = client(HF_TOKEN=OWNER)
    publish(server, "org/known", {})
    made, again, known = owner.uploaded(*((folder, f"org/{name}", True) for name in ("new", "new", "known")))
    assert made == again == f"{server.url}/org/new"
    assert server.repositories["org/new"].private
    assert known == ("ValueError: org/known is on the hub already, and public: make it private there, or name another")
    assert server.files("org/known") == {}
    # One that is private stays so.
    assert owner.uploaded((folder, "org/new", False)) == [made]
    assert server.repositories["org/new"].private


def test_what_the_hub_does_not_take_is_one_line(server, client, folder):
    login = "`hf auth login`"
    (said,) = client().uploaded((folder, "org/name", False))
    assert said == f"PermissionError: the hub takes uploads from whom it knows: log in with {login}, or set HF_TOKEN"
    assert not server.asked
    for machine, repository in ((client(HF_TOKEN="hf_other"), "org/name"), (client(HF_TOKEN=OWNER), "other/name")):
        (said,) = machine.uploaded((folder, repository, False))
        assert said.startswith(f"PermissionError: the hub refuses to write {repository} (You don't have the rights to ")
        assert said.endswith(f"a token with that right is needed, from {login} or HF_TOKEN")
    offline, unreachable = client(HF_TOKEN=OWNER, HF_HUB_OFFLINE="1"), client(url="http://127.0.0.1:9", HF_TOKEN=OWNER)
    (said,) = offline.uploaded((folder, "org/name", False))
    assert said == "ConnectionError: org/name: HF_HUB_OFFLINE says not to ask the hub: unset it to upload"
    (said,) = unreachable.uploaded((folder, "org/name", False))
    assert said.startswith("ConnectionError: org/name: nothing was published, the hub can't be reached (")
    (folder / "README.md").write_bytes(b"---\nlicense: [\n---\n# Mine\n")
    (said,) = client(HF_TOKEN=OWNER).uploaded((folder, "org/name", False))
    assert said.startswith("ValueError: the hub refuses org/name: ")
    assert "\n" not in said
    assert not server.repositories["org/name"].commits


@pytest.mark.parametrize(
    ("reply", "where"),
    [
        (Reply(500, {"error": "Internal"}), "/commit/main"),
        (Reply(200, b"<html>Sign in to the hotel's network</html>"), "/api/"),
    ],
)
def test_a_commit_that_fails_publishes_nothing(reply, where, server, client, folder):
    server.fault = _fail(reply, where)
    (said,) = client(HF_TOKEN=OWNER).uploaded((folder, "org/name", False))
    assert said.startswith("ConnectionError: org/name: nothing was published, the hub can't be reached ("), said
    assert not any(repository.commits for repository in server.repositories.values())


@pytest.mark.parametrize(
    "name", ["name", "org/name@main", "org//name", "../name", "https://huggingface.co/org/name", ""]
)
def test_a_repository_is_an_owner_and_a_name(name, tmp_path):
    with pytest.raises(ValueError, match="is no name on the hub: OWNER/NAME"):
        hubs.upload(tmp_path, name)


def test_links_are_not_uploaded(folder, tmp_path):
    (tmp_path / "secret").write_text("key")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"README\.md is a link to .*/secret: of a folder only its own files are read"):
        hubs.contents(folder)
    with pytest.raises(ValueError, match=r"README\.md is a link to .*/secret"):
        hubs.upload(folder, "org/name")


# ----------------------------------------------------------------------------------------------------------- round trip


def test_a_model_that_is_pushed_is_the_one_that_is_loaded_and_asked(server, client):
    own = zoo.find(zoo.DEFAULT)
    pushed = client("owner", HF_TOKEN=OWNER).run("zoo", "push", zoo.DEFAULT, "--to", "org/film")
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout == f"{server.url}/org/film\n"
    known = hubs.contents(own)
    assert server.files("org/film") == {name: (own / name).read_bytes() for name in known}
    assert not server.repositories["org/film"].private

    machine = client()
    code = (
        "import flaxmpc, jax.numpy as jnp\n"
        "found = flaxmpc.load('org/film')\n"
        "ids = jnp.array([found.tokenizer('A gripping film.')['input_ids']])\n"
        "print(found.model.apply({'params': found.params}, ids, jnp.ones_like(ids)).tolist())"
    )
    loaded = flaxmpc.load(zoo.DEFAULT)
    ids = jnp.array([loaded.tokenizer("A gripping film.")["input_ids"]])
    expected = loaded.model.apply({"params": loaded.params}, ids, jnp.ones_like(ids))
    np.testing.assert_allclose(json.loads(machine.python(code)), expected, rtol=1e-6)

    asked = machine.run("infer", "A gripping film.", "--model", "org/film", "--protocol", "REF2K", "--json")
    assert asked.returncode == 0, asked.stderr
    answer = json.loads(asked.stdout)
    assert answer["model"] == "film"
    assert answer["results"][0]["label"] == "positive"
    assert answer["results"][0]["difference"] < 0.05
    assert answer["cost"]["fraction_bits"] == flaxmpc.secure.FRACTION_BITS  # by the plan that came along
