"""A small BERT on real parties: answers as in process, and nobody but the client sees any of it."""

import dataclasses
import os

import jax
import numpy as np
import pytest
import scipy.stats

from flaxmpc import serving
from flaxmpc.inference import SecureClassifier
from flaxmpc.models import folder as folders

TEXTS = ["A gripping, beautifully acted film.", "a tedious, lifeless movie.", "good"]

# Runs in the parties: keeps all that comes in, after TLS.
CAPTURE = """
import sys
import flaxmpc.secure.deploy.rpc as rpc, flaxmpc.secure.deploy.connection as connection
seen = open({path!r}, 'ab', buffering=0)
decode = rpc.decode
def decode_and_keep(content, kind):
    seen.write(content)
    return decode(content, kind)
rpc.decode = decode_and_keep
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
        predictions, cost = serving.RemoteClassifier(client, "tiny").classify(TEXTS)
    np.testing.assert_allclose([prediction.logits for prediction in predictions], expected, atol=0.01)
    assert [prediction.text for prediction in predictions] == TEXTS
    assert [prediction.label for prediction in predictions] == [
        ("negative", "positive")[int(row.argmax())] for row in expected
    ]
    assert [prediction.logits_plaintext for prediction in predictions] == [[]] * 3
    # A run of two texts, and one of one.
    assert cost.bytes_sent == sum(each.cost.bytes_sent for each in predictions[::2] if each.cost)


def test_a_text_that_the_model_diverges_on_has_an_error_in_its_place(parties, expected):
    """Nobody has its logits in the clear, and those on shares look like any others."""
    with parties.connect("client") as client:
        for _ in range(2):  # what a diverged model gives differs from run to run
            bad, good = serving.RemoteClassifier(client, "tiny").classify(["a mess", TEXTS[2]]).predictions
            assert (bad.error, bad.label) == ("the model diverges on this text", None)
            assert good.error is None  # though of the same run
            np.testing.assert_allclose(good.logits, expected[2], atol=0.01)


def test_outputs_that_are_not_those_of_a_classifier_are_refused(parties, monkeypatch):
    with parties.connect("client") as client:
        classifier = serving.RemoteClassifier(client, "tiny")
        for outputs in ([np.zeros((1, 2))], [np.zeros((1, 3)), np.ones(1)], [np.zeros((2, 2)), np.ones(2)]):
            monkeypatch.setattr(client, "infer", lambda *_, outputs=outputs: (outputs, None))
            with pytest.raises(
                ValueError, match=r"program 1x16 gives .* not logits of 2 labels and the size: the owner"
            ):
                classifier.classify(TEXTS[:1])


def test_a_warm_request_sends_its_shares_and_no_weights(parties):
    with parties.connect("client") as client:
        classifier = serving.RemoteClassifier(client)
        before = client.bytes_sent
        classifier.classify(TEXTS[:1])
        run = classifier.run(classifier.encode(TEXTS[:1]), [0], 1)
        numbers = sum(leaf.size for leaf in jax.tree.leaves(classifier.share(run.ids, run.mask)))
        assert client.bytes_sent - before < 3 * 2 * 8 * numbers + 65536


def test_a_longer_text_than_the_model_was_put_for_has_an_error_in_its_place(parties, expected):
    with parties.connect("client") as client:
        classifier = serving.RemoteClassifier(client)
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
        serving.put(loaded._replace(model=model), owner, lengths=lengths)


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
        assert list(serving.put(loaded, owner, name="pairs").programs) == ["1x12"]
    with parties.connect("client") as client:
        classifier = serving.RemoteClassifier(client, "pairs")
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


def test_no_party_receives_ids_logits_or_anything_but_uniform_shares(parties, monkeypatch):
    with parties.connect("client") as client:
        classifier = serving.RemoteClassifier(client, "tiny")
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
            assert len(serving.RemoteClassifier(client, "tiny").encode(TEXTS).input_ids) == 3
