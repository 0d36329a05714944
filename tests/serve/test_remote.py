"""A small BERT on real parties: answers as in process, and nobody but the client sees any of it."""

import dataclasses
import json
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import msgspec
import numpy as np
import pytest
import scipy.stats
from safetensors.numpy import load

from flaxmpc import secure
from flaxmpc.models import folder as folders
from flaxmpc.models.base import without_embeddings
from flaxmpc.models.bert import BertConfig, BertForQuestionAnswering, BertForTokenClassification
from flaxmpc.models.tokenizer import FILES as TOKENIZER_FILES
from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy.cluster import Limits
from flaxmpc.secure.deploy.local import write_local
from flaxmpc.serve import remote
from flaxmpc.serve.classify import Client
from flaxmpc.serve.private import SecureClassifier, private_classifier, visibility

TEXTS = ["A gripping, beautifully acted film.", "a tedious, lifeless movie.", "good"]

# Runs in the parties: keeps all that comes in, after TLS.
CAPTURE = """
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
import flaxmpc.secure.deploy.messages as messages, flaxmpc.secure.deploy.connection as connection
seen = open({path!r}, 'ab', buffering=0)
decode = messages.decode
def decode_and_keep(content, kind):
    seen.write(content)
    return decode(content, kind)
messages.decode = decode_and_keep
read = connection.Secure.read
async def read_and_keep(self):
    content = await read(self)
    seen.write(content)
    return content
connection.Secure.read = read_and_keep
"""


@pytest.fixture(scope="module")
def loaded(write_diverging, tmp_path_factory):
    return folders.load(write_diverging(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def parties(tmp_path_factory, running, loaded):
    directory = tmp_path_factory.mktemp("cluster") / "c"
    with running(
        directory,
        timeout=10,
        changes=[("max_batch_rows = 8", "max_batch_rows = 2")],
        code=lambda rank: CAPTURE.format(path=str(directory / f"capture{rank}")),
    ) as started:
        with started.connect() as owner:
            remote.put(loaded, owner, name="tiny", lengths=(16,), batches=(1, 2))
        yield started


@pytest.fixture(scope="module")
def expected(loaded, group):
    local = SecureClassifier(loaded, group("ABY3"))
    return np.array([local.classify([text]).predictions[0].logits for text in TEXTS])


def test_answers_are_those_of_the_in_process_run(parties, expected):
    with parties.connect("client") as client:
        predictions, cost = remote.RemoteClassifier(client, "tiny").classify(TEXTS)
    np.testing.assert_allclose([prediction.logits for prediction in predictions], expected, atol=0.01)
    assert [prediction.text for prediction in predictions] == TEXTS
    assert [prediction.label for prediction in predictions] == [
        ("negative", "positive")[int(row.argmax())] for row in expected
    ]
    assert [prediction.logits_plaintext for prediction in predictions] == [[]] * 3
    # A run of two texts, and one of one.
    assert cost.bytes_sent == sum(each.cost.bytes_sent for each in predictions[::2] if each.cost)


def test_entities_and_answers_to_questions_are_those_of_the_in_process_run(parties, write_diverging, tmp_path, group):
    """Of the logits of every token nothing but these comes out, and padding has no part in them."""
    asked = {
        "tokens": (BertForTokenClassification, {"id2label": ("O", "B-film", "I-film")}, [TEXTS[0], "a mess"]),
        "answers": (BertForQuestionAnswering, {}, [("good", TEXTS[0]), ("a", "mess")]),
    }
    for name, (architecture, changes, texts) in asked.items():
        model = folders.load(write_diverging(tmp_path / name, architecture=architecture, **changes))
        with parties.connect() as owner:
            remote.put(model, owner, name=name, lengths=(16,), batches=(1,))
        here = SecureClassifier(model, group("ABY3")).classify(texts[:1]).predictions[0]
        with parties.connect("client") as client:
            found, diverged = remote.RemoteClassifier(client, name).classify(texts).predictions
        assert diverged.error == "the model diverges on this text"
        assert diverged.entities is diverged.answer is None
        assert found.error is here.error is None
        for ours, theirs in zip(found.entities or (), here.entities or (), strict=True):
            assert ours | {"score": 0} == theirs | {"score": 0}
            assert ours["score"] == pytest.approx(theirs["score"], abs=0.01)
        assert (found.answer, found.start, found.end) == (here.answer, here.start, here.end)


def test_clients_of_one_certificate_may_all_start_at_once(parties, monkeypatch):
    """A party sends one certificate two bundles at a time."""
    monkeypatch.setattr(remote.secure, "cache_dir", lambda: None)
    together = threading.Barrier(8)

    def start(_: int) -> set[str]:
        with parties.connect("client") as client:
            together.wait()
            return {remote.RemoteClassifier(client, "tiny").model.hash for _ in range(5)}

    with ThreadPoolExecutor(8) as pool:
        assert len(set().union(*pool.map(start, range(8)))) == 1


def test_a_text_that_the_model_diverges_on_has_an_error_in_its_place(parties, expected):
    """Nobody has its logits in the clear, and those on shares look like any others."""
    with parties.connect("client") as client:
        for _ in range(2):  # what a diverged model gives differs from run to run
            bad, good = remote.RemoteClassifier(client, "tiny").classify(["a mess", TEXTS[2]]).predictions
            assert (bad.error, bad.label) == ("the model diverges on this text", None)
            assert good.error is None  # though of the same run
            np.testing.assert_allclose(good.logits, expected[2], atol=0.01)


def test_a_model_that_is_put_anew_is_followed(parties, loaded, expected, monkeypatch):
    with parties.connect("client") as client:
        classifier = remote.RemoteClassifier(client, "tiny")
        bundle, before = client.bundle, classifier.model.hash

        def put() -> None:
            with parties.connect() as owner:
                remote.put(loaded, owner, name="tiny", lengths=(16,), batches=(1, 2))

        put()
        predictions = classifier.classify(TEXTS).predictions
        np.testing.assert_allclose([prediction.logits for prediction in predictions], expected, atol=0.01)
        assert classifier.model.hash != before

        def bundle_of_another(*given):
            monkeypatch.setattr(client, "bundle", bundle)
            put()
            raise secure.SecureError("party 0 sent another bundle")

        def lose(*given):
            raise secure.SecureError("lost")

        monkeypatch.setattr(client, "bundle", bundle_of_another)
        monkeypatch.setattr(remote.secure, "cache_dir", lambda: None)
        again = remote.RemoteClassifier(client, "tiny")
        assert again.model.hash != classifier.model.hash
        monkeypatch.setattr(client, "infer", lose)
        with pytest.raises(secure.SecureError, match="lost"):
            again.classify(TEXTS[:1])


def test_outputs_that_are_not_those_of_a_classifier_are_refused(parties, monkeypatch):
    with parties.connect("client") as client:
        classifier = remote.RemoteClassifier(client, "tiny")
        for outputs in ([np.zeros((1, 2))], [np.zeros((1, 3)), np.zeros(1)], [np.zeros((2, 2)), np.zeros(2)]):
            monkeypatch.setattr(client, "infer", lambda *_, outputs=outputs: (outputs, None))
            refused = r"program 1x16 gives .*, not \[\(1, 2\), \(1,\)\], the logits and the strain: the owner"
            with pytest.raises(ValueError, match=refused):
                classifier.classify(TEXTS[:1])


def test_a_warm_request_sends_its_shares_and_no_weights(parties):
    with parties.connect("client") as client:
        classifier = remote.RemoteClassifier(client, "tiny")
        before = client.bytes_sent
        classifier.classify(TEXTS[:1])
        run = classifier.run(classifier.encode(TEXTS[:1]), [0], 1)
        numbers = sum(leaf.size for leaf in jax.tree.leaves(classifier.share(run.ids, run.mask)))
        assert client.bytes_sent - before < 3 * 2 * 8 * numbers + 65536


def test_a_longer_text_than_the_model_was_put_for_has_an_error_in_its_place(parties, expected):
    with parties.connect("client") as client:
        classifier = remote.RemoteClassifier(client, "tiny")
        (long, cut, good), _ = classifier.classify(["the film " * 9, "film " * 60, TEXTS[2]])
        assert long.error == "a text has 20 tokens; the model is served for at most 16"
        assert cut.error == "a text has 24 tokens; the model is served for at most 16"
        assert (long.label, long.truncated, cut.truncated) == (None, False, True)
        np.testing.assert_allclose(good.logits, expected[2], atol=0.01)
        with pytest.raises(ValueError, match="text 1 of 2 has no answer: a text has 20 tokens"):  # nor has any other
            classifier.classify(["the film " * 9, "film " * 60])
        with pytest.raises(ValueError, match="there is no text"):
            classifier.classify([])


@pytest.mark.parametrize(
    ("model_max_length", "lengths", "message"),
    [
        (
            None,
            (17,),
            r"lengths \[17\]: this model has 16, 24; a text may have 24 tokens, all that the model has posit",
        ),
        (
            18,
            (24,),
            r"lengths \[24\]: this model has 16, 18; a text may have 18 tokens, all that the model was trained",
        ),
    ],
)
def test_a_length_that_is_no_bucket_is_refused(parties, loaded, model_max_length, lengths, message):
    model = type(loaded.model)(dataclasses.replace(loaded.model.config, model_max_length=model_max_length))
    with parties.connect() as owner, pytest.raises(ValueError, match=message):
        remote.put(loaded._replace(model=model), owner, lengths=lengths)


@pytest.mark.parametrize("name", ["my model", "../film", "a\nb", "x" * 129])
def test_a_name_that_no_model_can_have_is_refused_before_anything_is_sent(parties, loaded, name):
    with parties.connect() as owner:
        before = owner.bytes_sent
        with pytest.raises(ValueError, match=r"^a model's name has 1 to 128 letters, .* not '.*: give one with"):
            remote.put(loaded, owner, name=name)
        assert owner.bytes_sent - before < 1000


def test_pairs_and_sets_of_labels_are_answered_as_in_process(parties, group, write_classifier, tmp_path):
    """A table that is secret, so types are shared too; by default programs end at what the model was trained for."""
    folder = write_classifier(
        tmp_path,
        num_hidden_layers=1,
        embedding="secret",
        num_texts=2,
        problem_type="multi_label_classification",
        model_max_length=12,
    )
    loaded = folders.load(folder)
    pairs = [("a good film", "bad"), ("good", "a bad movie"), ("film " * 20, "good")]
    expected = SecureClassifier(loaded, group("ABY3")).classify(pairs).predictions
    with parties.connect() as owner:
        assert list(remote.put(loaded, owner, name="pairs").programs) == ["1x12"]
    with parties.connect("client") as client:
        classifier = remote.RemoteClassifier(client, "pairs")
        found, _ = classifier.classify(pairs)
        with pytest.raises(
            ValueError, match="text 1 of 1 is a single text, but the model was trained on a pair of tex"
        ):
            classifier.classify(["good"])
    np.testing.assert_allclose([each.logits for each in found], [each.logits for each in expected], atol=0.01)
    assert [each.truncated for each in found] == [False, False, True]
    for each, local in zip(found, expected, strict=True):
        assert each.label is None
        assert each.probabilities == pytest.approx(local.probabilities, abs=0.01)
    assert np.ptp([each.logits for each in found], 0).min() > 0.05


def test_public_weights_are_answered_as_secret_ones(parties, loaded, expected):
    with parties.connect() as owner:
        remote.put(loaded, owner, name="known", lengths=(16,), public_weights=True)
    with parties.connect("client") as client:
        predictions, known = remote.RemoteClassifier(client, "known").classify(TEXTS)
        _, usual = remote.RemoteClassifier(client, "tiny").classify(TEXTS)
    np.testing.assert_allclose([each.logits for each in predictions], expected, atol=0.02)
    assert known.bytes_sent < 0.95 * usual.bytes_sent


def test_no_party_receives_ids_logits_or_anything_but_uniform_shares(parties, monkeypatch):
    with parties.connect("client") as client:
        classifier = remote.RemoteClassifier(client, "tiny")
        made = []
        make = client._io.make_shares
        monkeypatch.setattr(client._io, "make_shares", lambda *arguments: made.append(make(*arguments)) or made[-1])
        starts = [(parties.directory / f"capture{rank}").stat().st_size for rank in range(3)]
        ((prediction,), _) = classifier.classify(TEXTS[:1])
        ids, mask = classifier.run(classifier.encode(TEXTS[:1]), [0], 1)[1:3]
        tokens = classifier.share(ids, mask)[0]
    logits = np.array(prediction.logits, np.float32)
    encoded = [np.rint(values.astype(np.float64) * 2**18).astype(np.int64) for values in (tokens[0, 0, :4], logits)]
    secrets = {
        "ids": [form[0, :4].tobytes() for form in (ids, ids.astype(np.int64), ids.astype(np.int64) << 18)],
        "embeddings": [tokens[0, 0].tobytes(), encoded[0].tobytes()],
        "logits": [logits.tobytes(), encoded[1].tobytes()],
        "text": [TEXTS[0].encode()],
    }
    for rank, start in enumerate(starts):
        received = (parties.directory / f"capture{rank}").read_bytes()[start:]
        own = [chunk for shares in made for chunk in shares[rank].share_chunks]
        assert all(chunk in received for chunk in own)  # it captures what it should,
        assert received.count(b"PRPC") > 10  # and brpc's messages of the other parties too
        for other in {0, 1, 2} - {rank}:
            chunks = [chunk for shares in made for chunk in shares[other].share_chunks]
            assert not any(chunk in received for chunk in chunks if len(chunk) >= 64)
        for kind, forms in secrets.items():
            assert not any(form in received for form in forms), f"party {rank} received the {kind}"
        assert TEXTS[0] not in parties.log_of(rank).read_text()
        counts = np.bincount(np.frombuffer(b"".join(own), np.uint8), minlength=256)
        assert counts.sum() > 256 * 20
        assert scipy.stats.chisquare(counts).pvalue > 1e-4


def bundle_of(loaded):
    table, _ = without_embeddings(loaded.model, loaded.params)
    return remote._bundle(Client(loaded.model, loaded.tokenizer, table), loaded.model)


@pytest.fixture(scope="module")
def contents(loaded):
    """The files of a bundle, of which a client makes the model."""
    return msgspec.msgpack.decode(bundle_of(loaded))


def test_a_bundle_holds_what_a_client_needs_and_nothing_else(loaded, contents):
    """Of what stands in the folder, or in the fields of its files."""
    assert contents.keys() == {"config.json", "embeddings.safetensors", *TOKENIZER_FILES}
    model, params, tokenizer, _ = remote._Bundle.read(msgspec.msgpack.encode(contents))
    assert tokenizer(TEXTS)["input_ids"] == loaded.tokenizer(TEXTS)["input_ids"]
    assert model.config.id2label == ("negative", "positive")
    assert set(load(contents["embeddings.safetensors"])) == {
        f"bert.embeddings.{name}"
        for name in (
            *("word_embeddings.weight", "position_embeddings.weight", "token_type_embeddings.weight"),
            *("LayerNorm.weight", "LayerNorm.bias"),
        )
    }
    assert params["bert"].keys() == {"embeddings"}
    assert not any(str(loaded.folder).encode() in content for content in contents.values())


def test_a_bundle_holds_the_tokenizer_that_the_model_has(loaded):
    """Tokens that were added later too."""
    tokenizer = folders.load_tokenizer(loaded.folder)
    tokenizer.add_tokens(["<film>"])
    bundle = bundle_of(loaded._replace(tokenizer=tokenizer))
    text = "a <film> acted beautifully"
    assert remote._Bundle.read(bundle).tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_bundle_is_kept_under_its_hash_and_fetched_anew_where_it_may_be_anothers(parties, monkeypatch, tmp_path):
    monkeypatch.setenv("FLAXMPC_CACHE", str(tmp_path))
    with parties.connect("client") as client:
        fetch, fetched = client.bundle, []
        monkeypatch.setattr(client, "bundle", lambda *given: fetched.append(given) or fetch(*given))
        for count, spoil in (
            (1, lambda path: None),
            (1, lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?")),
            (2, lambda path: path.chmod(0o666)),
            (3, lambda path: path.unlink()),
            (4, lambda path: None),
        ):
            assert remote.RemoteClassifier(client, "tiny").lengths == [16]
            assert len(fetched) == count
            (kept,) = (tmp_path / "bundles").iterdir()
            assert kept.name == f"{client.find('tiny')[1].bundle}.bundle"
            spoil(kept)


def test_what_parties_say_of_a_bundle_is_no_path_and_no_gigabyte(parties, monkeypatch):
    with parties.connect("client") as client:
        name, model = client.find("tiny")
        for changes, message in (
            ({"bundle": "0" * 64, "bundle_bytes": 10**12}, "has 1000000000000 bytes; max_request_bytes is 268435456"),
            ({"bundle": "0" * 64, "bundle_bytes": 10}, "sent another bundle of 'tiny' than the parties agreed on"),
            ({"programs": {}}, "model 'tiny' has no program"),
            (
                {"programs": {"1x16": _of(model, batch=10**9)}},
                "'1x16' is for 1000000000 x 16; cluster.toml allows 32 x 5",
            ),
            ({"programs": {"1x16": _of(model, length=0)}}, "program '1x16' is for 1 x 0; cluster.toml allows"),
            ({"programs": {"a": _of(model)}}, "program 'a' is for 1 x 16"),
        ):
            changed = msgspec.structs.replace(model, **changes)
            monkeypatch.setattr(client, "find", lambda _, changed=changed: (name, changed))
            with pytest.raises((ValueError, secure.SecureError), match=message):
                remote.RemoteClassifier(client, "tiny")


def _of(model, **changes):
    return msgspec.structs.replace(model.programs["1x16"], **changes)


def test_shares_that_are_too_large_are_not_made():
    """The client sends a row as long as the vocabulary for each token."""
    config = BertConfig(embedding="secret", vocab_size=10**6, hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    program = m.ModelProgram(b"", (), (), 32, 512)
    with pytest.raises(
        ValueError, match="program 32x512 takes 131072262144 bytes of shares; max_request_bytes in cluster"
    ):
        remote._check_shares({"32x512": program}, config, Limits())


# Reads the bundles that the owner might give, and says what is said of each, in which time, and the peak of memory.
READ = """
import json, pathlib, sys, time
from flaxmpc.serve import remote
from flaxmpc.data.batches import encode
peak = lambda: 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    bundle, start = path.read_bytes(), time.process_time()
    try:
        found = remote._Bundle.read(bundle)
        said = [len(row) for row in encode(found.tokenizer, ["a film"], 16).input_ids]
    except ValueError as error:
        said = str(error)
    print(json.dumps([path.name, said, time.process_time() - start, peak()]), flush=True)
"""


def test_a_client_refuses_a_hostile_bundle_in_one_line_and_little_memory(contents, tmp_path):
    config, tokenizer = (json.loads(contents[name]) for name in ("config.json", "tokenizer.json"))
    growing = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    special = [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}] * 10**5
    table = contents["embeddings.safetensors"]
    hostile = {
        "layers": ({"config.json": config | {"num_hidden_layers": 10**9}}, "num_hidden_layers 1000000000 is not"),
        "vocabulary": ({"config.json": config | {"vocab_size": 10**12}}, "vocab_size 1000000000000 is not a whole"),
        "width": ({"config.json": config | {"hidden_size": 8192}}, "wrong shape: bert.embeddings"),
        "tokens": ({"config.json": config | {"vocab_size": 10**6}}, "wrong shape: bert.embeddings.word_embeddings"),
        "depth": (
            {"config.json": config | {"layer_norm": {"name": "layer_norm_chebyshev", "depth": 10**9}}},
            "a depth of 1 to 7",
        ),
        "deep": ({"config.json": b"[" * 10**6}, "config.json is nested more than 64 deep"),
        "parts": ({"tokenizer.json": b"[" + b"[]," * 2_500_000 + b"[]]"}, "has 2500002 lists and objects"),
        "long": ({"tokenizer_config.json": b" " * 10**7}, "tokenizer_config.json has more than 4194304 bytes"),
        "growing": (
            {"tokenizer.json": tokenizer | {"normalizer": {"type": "Sequence", "normalizers": [growing] * 16}}},
            "makes a text 6.55e+04 times longer",
        ),
        "special": (
            {"tokenizer.json": tokenizer | {"post_processor": tokenizer["post_processor"] | {"single": special}}},
            "single is a list of 100000; a list of at most 16",
        ),
        "padded": ({"tokenizer.json": tokenizer | {"padding": {"strategy": {"Fixed": 10**9}}}}, [4]),
        "ids": (
            {"tokenizer.json": tokenizer | {"model": tokenizer["model"] | {"vocab": {"a": 4 * 10**9}}}},
            "vocab has 'a': 4000000000",
        ),
        "path": ({"special_tokens_map.json": {"vocab_file": "/etc/passwd"}}, "unknown special token 'vocab_file'"),
        "code": ({"tokenizer_config.json": {"tokenizer_class": "Evil"}}, "unknown tokenizer_class 'Evil'"),
        "header": (
            {"embeddings.safetensors": (90_000_000).to_bytes(8, "little") + b" " * 90_000_001},
            "its header has 90000000 bytes; at most 4194304",
        ),
        "short": ({"embeddings.safetensors": table[:1000]}, "embeddings.safetensors cannot be read as safetensors"),
        "type": ({"embeddings.safetensors": table.replace(b'"F32"', b'"I32"')}, "is i32; weights are float32"),
        "missing": ({"tokenizer.json": None}, "it has no tokenizer"),
        "no table": ({"embeddings.safetensors": None}, "embeddings.safetensors does not exist"),
        "encoding": (
            {"encoding.json": {"inputs": [10**9], "magnitudes": [1.0], "outputs": []}},
            "no encoding of a plan",
        ),
        "no encoding": ({"encoding.json": b"[]"}, "encoding.json holds no JSON object"),
        "elsewhere": ({"../evil": b""}, "it holds a file '../evil'"),
        "good": ({}, [4]),
    }
    for name, (changes, _) in hostile.items():
        changed = contents | {
            file: content if isinstance(content, bytes) else json.dumps(content).encode()
            for file, content in changes.items()
            if content is not None
        }
        kept = {file: content for file, content in changed.items() if changes.get(file, b"") is not None}
        (tmp_path / name).write_bytes(msgspec.msgpack.encode(kept))
    (tmp_path / "~garbage").write_bytes(b"\xc1" * 100)
    done = subprocess.run(
        [sys.executable, "-c", READ, tmp_path], capture_output=True, text=True, check=True, timeout=300
    )
    found = {name: rest for name, *rest in map(json.loads, done.stdout.splitlines())}
    assert found.keys() == {*hostile, "~garbage"}
    for name, (_, expected) in hostile.items():
        said, seconds, _ = found[name]
        if isinstance(expected, str):
            assert said.startswith("the model's bundle: "), name
            assert expected in said, name
            assert len(said) < 2000, name
            assert "\n" not in said, name
        else:
            assert said == expected, name
        assert seconds < 10, name
    assert "can't be read" in found["~garbage"][0]
    first, last = (found[name][-1] for name in sorted(found)[:: len(found) - 1])
    assert last < 1 << 30
    assert last - first < 500 << 20


def test_a_client_does_without_a_cache(parties, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    for cache in (None, tmp_path / "file" / "cache"):
        monkeypatch.setattr(remote.secure, "cache_dir", lambda cache=cache: cache)
        with parties.connect("client") as client:
            assert len(remote.RemoteClassifier(client, "tiny").encode(TEXTS).input_ids) == 3


@pytest.mark.parametrize("changes", [{}, {"embedding": "secret", "num_texts": 2, "hidden_act": "gelu_puma"}])
def test_programs_are_approved_without_the_weights(changes, group, write_classifier, tmp_path, monkeypatch):
    """Who runs a party has the config alone, and compiles for itself what the owner puts."""
    loaded = folders.load(write_classifier(tmp_path / "made", num_hidden_layers=1, **changes))
    written = write_local(tmp_path / "c")
    limits = msgspec.structs.replace(written.limits, max_batch_rows=1 if changes else 2)
    cluster = msgspec.structs.replace(written, programs="programs.txt", limits=limits)
    found = private_classifier(loaded, cluster.config, checked=True)
    public = bool(changes)
    resident = group("ABY3").put(found.weights, visibility(public))
    put = remote._programs(found.client(loaded.tokenizer), found.function, resident, cluster, [(1, 16)])
    (tmp_path / "film").mkdir()
    shutil.copy(loaded.folder / "config.json", tmp_path / "film")
    monkeypatch.setenv("FLAXMPC_CACHE", str(tmp_path / "cache"))
    assert remote.approve(tmp_path / "film", cluster, lengths=(16,), public_weights=public) == put
    assert cluster.file("programs.txt").read_text() == f"{put['1x16'].digest}  film 1x16\n"
    with pytest.raises(ValueError, match=r"lengths \[17\]: this model has 16, 24"):
        remote.approve(tmp_path / "film", cluster, lengths=(17,))
    with pytest.raises(ValueError, match=r'add the line programs = "programs\.txt" above its first \[table\]'):
        remote.approve(tmp_path / "film", written)
