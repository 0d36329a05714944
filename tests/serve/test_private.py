import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxmpc import secure
from flaxmpc.models import folder as folders
from flaxmpc.models import zoo
from flaxmpc.secure.deploy.signature import Signature
from flaxmpc.serve.private import SecureClassifier, answered, private_classifier

# Of 3 to 18 tokens, so in two buckets.
TEXTS = [
    "A gripping, beautifully acted film.",
    "a tedious, lifeless mess.",
    "good",
    "the film the film a very, very, very good movie . a good film",
]


@pytest.fixture(scope="module")
def folder_of(write_classifier, tmp_path_factory):
    folders_by_mode = {
        mode: write_classifier(tmp_path_factory.mktemp(mode), embedding=mode) for mode in ("public", "secret")
    }
    return folders_by_mode.__getitem__


@pytest.fixture(
    scope="module",
    params=[(mode, protocol) for mode in ("public", "secret") for protocol in ("REF2K", "ABY3")],
    ids=" ".join,
)
def classifier(request, folder_of, group):
    mode, protocol = request.param
    return SecureClassifier.from_folder(folder_of(mode), group(protocol))


@pytest.fixture(scope="module")
def public(folder_of, group):
    return SecureClassifier.from_folder(folder_of("public"), group("REF2K"))


def shares_of(classifier, texts):
    """What the client shares of texts of one length."""
    run = classifier.run(classifier.encode(texts), range(len(texts)), len(texts))
    return classifier.share(run.ids, run.mask, run.types)


# -------------------------------------------------------------------------------------------------------- the answers


def test_answers_on_shares_are_those_in_the_clear(classifier):
    predictions, cost = classifier.classify(TEXTS)
    assert [prediction.text for prediction in predictions] == TEXTS
    for prediction in predictions:
        assert prediction.difference < 0.02
        assert prediction.difference == np.abs(np.array(prediction.logits) - prediction.logits_plaintext).max()
        probabilities = jax.nn.softmax(jnp.array(prediction.logits))
        assert prediction.label == ("negative", "positive")[int(probabilities.argmax())]
        assert prediction.score == pytest.approx(float(probabilities.max()))
        assert not prediction.truncated
    assert np.ptp([prediction.logits[0] for prediction in predictions]) > 0.1  # the sentences matter
    assert cost.protocol == classifier._secure.config.protocol


def test_a_batch_gives_what_its_sentences_give_one_by_one(classifier):
    together = classifier.classify(TEXTS).predictions
    alone = [classifier.classify([text]).predictions[0] for text in TEXTS]
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a.logits, b.logits, atol=0.02)
        np.testing.assert_allclose(a.logits_plaintext, b.logits_plaintext, atol=1e-4)


def test_plaintext_is_the_model_as_it_was_trained(public, folder_of):
    loaded = folders.load(folder_of("public"))
    rows = loaded.tokenizer(TEXTS)["input_ids"]
    assert max(map(len, rows)) == 18
    for row, prediction in zip(rows[:2], public.classify(TEXTS[:2]).predictions, strict=True):
        logits = jax.jit(loaded.model.apply)({"params": loaded.params}, jnp.array([row]))
        np.testing.assert_allclose(prediction.logits_plaintext, logits[0], atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- the input


def test_a_text_longer_than_the_positions_is_cut_and_flagged(public):
    # [CLS] and [SEP] leave 22 of 24 positions.
    fits, cut = public.classify([" ".join(["film"] * n) for n in (22, 60)]).predictions
    assert (fits.truncated, cut.truncated) == (False, True)
    np.testing.assert_allclose(cut.logits, fits.logits, atol=1e-3)


def test_texts_of_other_lengths_cost_what_their_buckets_cost(public, folder_of, group):
    classifier = SecureClassifier.from_folder(folder_of("public"), group("ABY3"))
    texts = ["film", "film " * 18, "good", "bad"]
    predictions, cost = classifier.classify(texts)
    short, long = classifier.estimate(16, 3), classifier.estimate(24, 1)
    assert cost.bytes_sent == short.bytes_sent + long.bytes_sent
    assert cost.rounds == short.rounds + long.rounds
    assert sum(op.bytes_sent for op in cost.per_op.values()) == cost.bytes_sent == sum(cost.bytes_sent_per_party)
    assert [each.cost and each.cost.bytes_sent for each in predictions] == [
        *(short.bytes_sent, long.bytes_sent, short.bytes_sent, short.bytes_sent),
    ]
    alone = [public.classify([text]).predictions[0].logits for text in texts]
    np.testing.assert_allclose([each.logits for each in predictions], alone, atol=0.02)


def test_memory_bounds_the_texts_of_a_run(public):
    assert [list(public.sizes(length))[-1] for length in (16, 24, 512, 4096)] == [64, 42, 2, 1]


def test_a_text_that_the_model_diverges_on_has_an_error_in_its_place(write_diverging, tmp_path, group):
    classifier = SecureClassifier.from_folder(write_diverging(tmp_path), group("REF2K"))
    good, mess, bad = classifier.classify(["good", "a mess", "bad"]).predictions
    assert mess.error == "the model diverges on this text: its logits in the clear are not finite"
    assert (mess.label, mess.score, mess.logits) == (None, None, [])
    for each in (good, bad):  # of the same run
        assert each.error is None
        assert each.difference < 0.02
        assert each.label == ("negative", "positive")[int(np.argmax(each.logits_plaintext))]


def test_a_ring_that_does_not_hold_the_model_gives_no_answer(folder_of):
    classifier = SecureClassifier.from_folder(folder_of("public"), secure.InProcess("REF2K", fraction_bits=29))
    (prediction,) = classifier.classify(TEXTS[:1]).predictions
    assert (prediction.error or "").startswith("the logits on shares are off by ")
    assert prediction.label is None


@pytest.mark.parametrize("mode", ["public", "secret"])
def test_pairs_are_answered_as_in_the_clear(mode, write_classifier, tmp_path, group):
    folder = write_classifier(tmp_path, embedding=mode, num_texts=2)
    classifier = SecureClassifier.from_folder(folder, group("REF2K"))
    pairs = [("a good film", "bad"), ("good", "a bad movie"), ("a good film bad", "good")]
    predictions = classifier.classify(pairs).predictions
    loaded = folders.load(folder)
    for pair, prediction in zip(pairs, predictions, strict=True):
        encoded = loaded.tokenizer(*pair, return_tensors="np")
        ids, types = encoded["input_ids"], jnp.asarray(encoded["token_type_ids"])
        words = loaded.model.config.embedding.encode(jnp.asarray(ids), 20)
        types = loaded.model.config.embedding.encode(types, 2)
        (logits,) = jax.jit(loaded.model.apply)({"params": loaded.params}, words, jnp.ones(ids.shape), types)
        np.testing.assert_allclose(prediction.logits_plaintext, logits, atol=1e-4)
        assert prediction.difference < 0.02
        assert prediction.text == pair
    assert np.ptp([prediction.logits[0] for prediction in predictions]) > 0.01


def test_no_warning_reaches_the_terminal(folder_of, group, capfd):
    path = folder_of("public") / "tokenizer_config.json"
    path.write_text(json.dumps({"model_max_length": 24}))
    try:
        SecureClassifier.from_folder(folder_of("public"), group("REF2K")).encode(["film " * 60])
    finally:
        path.unlink()
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_of_another_model_is_refused(folder_of, minilm, tmp_path, group):
    loaded = folders.load(folder_of("public"))
    folder = folders.save(tmp_path, loaded.model, loaded.params, minilm)
    with pytest.raises(ValueError, match=r"the tokenizer gives token \d+, but the model has 20: they do not belong"):
        SecureClassifier.from_folder(folder, group("REF2K")).classify(["a film"])


# -------------------------------------------------------------------------------------- what is shared, what it costs


def test_weights_are_shared_once_and_each_call_shares_its_input_alone(folder_of, monkeypatch):
    stored = []
    parties = secure.InProcess("ABY3")
    store = parties.store
    monkeypatch.setattr(parties, "store", lambda name, shares: (stored.append(name), store(name, shares)))
    classifier = SecureClassifier.from_folder(folder_of("public"), parties)
    weights = len(stored)
    assert weights > 10
    for calls in (1, 2):
        cost = classifier.classify(TEXTS[:1]).cost
        assert len(stored) == weights + 9 * calls  # embeddings, and the eight forms of the mask
    assert cost.compile_seconds == 0
    assert all(len(member.names) == weights for member in parties.members)


def test_public_weights_give_the_same_answers_for_less(classifier, folder_of):
    folder, parties = folder_of(classifier.config.embedding.name), classifier.weights.parties
    known = SecureClassifier.from_folder(folder, parties, public_weights=True)
    predictions, cost = known.classify(TEXTS)
    assert max(each.difference for each in predictions) < 0.02
    if cost.protocol == "ABY3":
        assert cost.bytes_sent < 0.95 * classifier.classify(TEXTS).cost.bytes_sent


def test_public_weights_leave_texts_and_answers_secret(folder_of, group):
    """Parties hold the weights as they are, and of a client's arrays and the logits shares alone."""
    parties = group("ABY3")
    known = SecureClassifier.from_folder(folder_of("public"), parties, public_weights=True)
    shared = shares_of(known, TEXTS[:1])
    program = known._secure.program(known.weights, *shared)
    signature = Signature.of(known._secure.compile(known.weights, *shared).code)
    count = len(known.weights.names)
    assert [each.visibility for each in signature.inputs[:count]] == ["public"] * count
    assert {each.visibility for each in signature.inputs[count:]} == {"secret"}
    assert len(signature.inputs) > count
    assert {each.visibility for each in signature.outputs} == {"secret"}
    for opened in ("reveal", "gather", "while"):
        assert opened not in program


def test_an_estimate_is_what_a_run_costs(classifier):
    estimate, cost = classifier.estimate(16, 2), classifier.classify(TEXTS[:2]).cost
    assert (estimate.bytes_sent, estimate.rounds) == (cost.bytes_sent, cost.rounds)
    assert classifier.estimate(9, 2).bytes_sent == cost.bytes_sent  # of the bucket
    assert (cost.bytes_sent > 0) == (cost.protocol == "ABY3")


@pytest.mark.parametrize(
    ("tokens", "texts", "message"),
    [
        (0, 1, "a text has 1 to 24 tokens, all that the model has positions for; 0 were asked for"),
        (25, 1, "a text has 1 to 24 tokens, all that the model has positions for; 25 were asked for"),
        (8, 0, "a run has at least one text, not 0"),
    ],
)
def test_an_impossible_estimate_is_refused(public, tokens, texts, message):
    with pytest.raises(ValueError, match=message):
        public.estimate(tokens, texts)


def test_nothing_is_indexed_by_a_secret(classifier):
    program = classifier._secure.program(classifier.weights, *shares_of(classifier, TEXTS[:1]))
    assert "pphlo.dot" in program
    assert "gather" not in program
    assert "while" not in program


def test_the_client_keeps_the_public_table_and_nothing_of_a_secret_one(classifier):
    table = (20, 32)
    shared = [leaf.shape for leaf in jax.tree.leaves(classifier.weights.struct)]
    kept = [leaf.shape for leaf in jax.tree.leaves(classifier.client_params)]
    tokens, *_ = jax.tree.leaves(shares_of(classifier, TEXTS[:1])[0])
    if classifier.config.embedding.name == "public":
        assert (table in shared, table in kept, tokens.shape) == (False, True, (1, 16, 32))
    else:
        assert (table in shared, kept, tokens.shape) == (True, [], (1, 16, 20))
    assert classifier.weights.visibility == "secret"


# ----------------------------------------------------------------------------------------------------------- the demo


def test_the_zoos_default_is_right_about_the_demo_in_time(group):
    classifier = SecureClassifier.from_folder(zoo.find(zoo.DEFAULT), group("ABY3"))
    predictions, cost = classifier.classify(["A gripping, beautifully acted film.", "A tedious, lifeless mess."])
    assert [prediction.label for prediction in predictions] == ["positive", "negative"]
    assert max(prediction.difference for prediction in predictions) < 0.02
    assert cost.seconds < 25


CONSTANT, RANGED = "layer_norm_constant", "layer_norm_chebyshev"


@pytest.mark.parametrize(
    ("layer_norm", "refused"),
    [
        ([CONSTANT, CONSTANT], 1),
        ([(RANGED, CONSTANT), (RANGED, "layer_norm")], None),
        ([(RANGED, CONSTANT), (CONSTANT, "layer_norm")], 0),
        ([RANGED, (RANGED, CONSTANT)], 1),
        ([CONSTANT, (CONSTANT, RANGED)], None),
        ([(CONSTANT, "layer_norm")] * 2, None),
    ],
    ids=str,
)
def test_a_model_that_may_diverge_unseen_is_for_one_process_alone(layer_norm, refused, write_classifier, tmp_path):
    loaded = folders.load(write_classifier(tmp_path, layer_norm=layer_norm))
    private_classifier(loaded, secure.Config())
    if refused is None:
        private_classifier(loaded, secure.Config(), checked=True)
    else:
        with pytest.raises(ValueError, match=rf"'layer_norm_constant' .* of layer {refused} needs .*_chebyshev'"):
            private_classifier(loaded, secure.Config(), checked=True)


@pytest.mark.parametrize("protocol", ["REF2K", "ABY3"])
def test_the_strain_of_a_text_is_that_of_its_tokens_alone(protocol, group):
    """Padding has no range to be in, and the other texts of a run have strains of their own."""
    loaded = folders.load(zoo.find(zoo.DEFAULT))
    found = private_classifier(loaded, secure.Config(), checked=True)
    client, on_shares = found.client(loaded.tokenizer), secure.jit(found.function, parties=group(protocol))
    ids = np.asarray(loaded.tokenizer(TEXTS[0])["input_ids"])
    mad = np.full(32, ids[1])
    strains = []
    for length in (16, 32):
        rows = np.zeros((2, length), np.int32)
        rows[0, : len(ids)], rows[1] = ids, mad[:length]
        _, strain = on_shares(found.weights, *client.share(rows, (rows > 0).astype(np.int32)))
        strains.append(np.asarray(strain)[0])
    assert 0.2 < strains[0] < 0.6
    np.testing.assert_allclose(*strains, atol=0.01)


@pytest.mark.parametrize("factor", [1.0, 1.5, 3.0])
def test_a_text_beyond_the_calibrated_ranges_is_right_or_known_to_be_wrong(factor, group):
    """Where variances leave their ranges the polynomials diverge so fast that the opened strain tells."""
    loaded = folders.load(zoo.find(zoo.DEFAULT))
    exact = loaded.model.clone(config=dataclasses.replace(loaded.model.config, layer_norm="layer_norm"))
    client = SecureClassifier(loaded, group("REF2K"))
    pair = [private_classifier(loaded._replace(model=model), secure.Config(), checked=True)
            for model in (loaded.model, exact)]  # fmt: skip
    ours, theirs = (functools.partial(jax.jit(each.function), each.weights) for each in pair)
    encoded, wrong = client.encode(TEXTS * 2), 0
    for place in range(2 * len(TEXTS)):
        run = client.run(encoded, [place], 1)
        states, mask = client.share(run.ids, run.mask, run.types)
        states = np.array(states)
        states[:, 1 if place < len(TEXTS) else slice(None)] *= factor  # one token's, or all
        (logits, strain), (expected, _) = ours(states, mask), theirs(states, mask)
        refused = not np.isfinite(answered(np.asarray(logits), np.asarray(strain))).all()
        wrong += refused
        assert refused or np.abs(logits - expected).max() < 0.3
    assert (wrong > 0) == (factor > 1)
