"""A small BERT on real parties: answers as in process, and nobody but the client sees any of it."""

import os

import numpy as np
import pytest
import scipy.stats

from flaxmpc import serving
from flaxmpc.inference import SecureClassifier
from flaxmpc.models import folder as folders

TEXTS = ["A gripping, beautifully acted film.", "a tedious, lifeless mess.", "good"]

# Runs in the parties: keeps all that comes in, after TLS.
CAPTURE = """
import sys
import flaxmpc.secure.rpc as rpc, flaxmpc.secure.tunnel as tunnel
seen = open({path!r}, 'ab', buffering=0)
decode = rpc.decode
def decode_and_keep(content, kind):
    seen.write(content)
    return decode(content, kind)
rpc.decode = decode_and_keep
read = tunnel.asyncio.StreamReader.read
async def read_and_keep(self, size=-1):
    content = await read(self, size)
    seen.write(content)
    return content
tunnel.asyncio.StreamReader.read = read_and_keep
"""


@pytest.fixture(scope="module")
def loaded(write_classifier, tmp_path_factory):
    return folders.load(write_classifier(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def parties(tmp_path_factory, running, loaded):
    directory = tmp_path_factory.mktemp("cluster") / "c"
    with running(
        directory,
        timeout=10,
        changes=[("max_batch_sentences = 8", "max_batch_sentences = 2")],
        code=lambda rank: CAPTURE.format(path=str(directory / f"capture{rank}")),
    ) as started:
        with started.connect() as owner:
            serving.put(loaded, owner, name="tiny", lengths=(16,), batches=(1, 2))
        yield started


@pytest.fixture(scope="module")
def expected(loaded, group):
    local = SecureClassifier(loaded, group("ABY3"))
    return np.array([local.classify([text]).predictions[0].logits for text in TEXTS])


def test_answers_are_those_of_the_in_process_run(parties, expected):
    with parties.connect("client") as client:
        predictions = serving.RemoteClassifier(client, "tiny").classify(TEXTS)
    np.testing.assert_allclose([prediction.logits for prediction in predictions], expected, atol=0.01)
    assert [prediction.text for prediction in predictions] == TEXTS
    assert [prediction.label for prediction in predictions] == [
        ("negative", "positive")[int(row.argmax())] for row in expected
    ]


def test_a_warm_request_sends_its_shares_and_no_weights(parties):
    with parties.connect("client") as client:
        classifier = serving.RemoteClassifier(client)
        before = client.bytes_sent
        classifier.classify(TEXTS[:1])
        ids, mask, _ = classifier.client.encode(TEXTS[:1])
        numbers = sum(leaf.size for leaf in _leaves(classifier.client.share(ids, mask)))
        assert client.bytes_sent - before < 3 * 2 * 8 * numbers + 65536


def _leaves(tree):
    import jax

    return jax.tree.leaves(tree)


def test_a_longer_sentence_than_the_model_was_put_for_is_refused(parties):
    with parties.connect("client") as client:
        classifier = serving.RemoteClassifier(client)
        with pytest.raises(ValueError, match="a sentence has 20 tokens; the model is served for at most 16"):
            classifier.classify(["the film " * 9])
        with pytest.raises(ValueError, match="there is no sentence"):
            classifier.classify([])


def test_a_length_that_is_no_bucket_is_refused(parties, loaded):
    with parties.connect() as owner, pytest.raises(ValueError, match=r"lengths \[17\]: this model has 16, 24"):
        serving.put(loaded, owner, lengths=(17,))


def test_no_party_receives_ids_logits_or_anything_but_uniform_shares(parties, monkeypatch):
    with parties.connect("client") as client:
        classifier = serving.RemoteClassifier(client)
        made = []
        make = client._io.make_shares
        monkeypatch.setattr(client._io, "make_shares", lambda *arguments: made.append(make(*arguments)) or made[-1])
        starts = [(parties.directory / f"capture{rank}").stat().st_size for rank in range(3)]
        (prediction,) = classifier.classify(TEXTS[:1])
        ids, mask, _ = classifier.client.encode(TEXTS[:1])
        tokens = classifier.client.share(ids, mask)[0]
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


def test_a_bundle_holds_the_tokenizer_that_the_model_has(loaded, group, tmp_path):
    """Tokens that were added later too, and in files that others may read as the umask says."""
    tokenizer = folders.load_tokenizer(loaded.folder)
    tokenizer.add_tokens(["<film>"])
    bundle = serving._bundle(SecureClassifier(loaded._replace(tokenizer=tokenizer), group("REF2K")))
    before = os.umask(0o027)
    try:
        serving._unpack(bundle, tmp_path / "bundles" / "one")
    finally:
        os.umask(before)
    text = "a <film> acted beautifully"
    unpacked = folders.load_tokenizer(tmp_path / "bundles" / "one")
    assert unpacked(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (tmp_path / "bundles" / "one").stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "bundles" / "one").iterdir()} == {0o640}
    serving._unpack(bundle, tmp_path / "bundles" / "one")  # another process was faster
    assert [path.name for path in (tmp_path / "bundles").iterdir()] == ["one"]


def test_a_client_does_without_a_cache(parties, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    for cache in (None, tmp_path / "file" / "cache"):
        monkeypatch.setattr(serving.secure, "cache_dir", lambda cache=cache: cache)
        with parties.connect("client") as client:
            assert serving.RemoteClassifier(client).client.encode(TEXTS)[0].shape == (3, 16)
