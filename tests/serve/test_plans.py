"""A classifier with a plan of its bits answers as without, for less; a plan that is not its own is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flaxmpc import secure
from flaxmpc.cli.main import main
from flaxmpc.models import folder as folders
from flaxmpc.models import zoo
from flaxmpc.secure.deploy.local import write_local
from flaxmpc.serve import plans, remote
from flaxmpc.serve.private import SecureClassifier, answered, plan_bits, private_classifier

TEXTS = ["A gripping, beautifully acted film.", "a tedious, lifeless movie.", "good"]
CHEBYSHEV = {"name": "layer_norm_chebyshev", "low": 0.2, "high": 40.0, "depth": 5}


@pytest.fixture(scope="module")
def planned(write_classifier, tmp_path_factory):
    """A model folder with a plan, and what planning said. Its layer is no smaller beside its norms than usual ones."""
    shape = {"num_hidden_layers": 1, "intermediate_size": 192}
    folder = write_classifier(tmp_path_factory.mktemp("planned"), layer_norm=CHEBYSHEV, **shape)
    return folder, plan_bits(folders.load(folder), TEXTS, error=0.01)


@pytest.fixture
def copy(planned, tmp_path):
    return shutil.copytree(planned[0], tmp_path / "copy")


def test_a_plan_says_what_it_does_in_the_clear(planned):
    _, trial = planned
    assert trial.texts == len(TEXTS)
    assert trial.same_labels == len(TEXTS)
    assert trial.difference < 0.05
    assert trial.plan.error <= 0.01


def checked_cost(folder, parties) -> secure.Cost:
    """What a later run of one text of 16 tokens costs with the strain, which a classifier without a plan leaves out."""
    loaded = folders.load(folder)
    found = private_classifier(loaded, parties.config, checked=True)
    run, weights = secure.jit(found.function, parties=parties), parties.put(found.weights)
    ids = np.zeros((1, 16), np.int32)
    shared = found.client(loaded.tokenizer).share(ids, np.ones_like(ids))
    return [run.run(weights, *shared).cost for _ in range(2)][1]


@pytest.mark.parametrize(("protocol", "bytes_left"), [("REF2K", None), ("ABY3", 0.8), ("SEMI2K", 0.95)])
def test_answers_follow_the_plan_and_cost_less(planned, protocol, bytes_left, group):
    """Than the same function, which also tells of divergence, without a plan. SEMI2K: in later runs, whose weights are
    opened already; a truncation sends nothing there.
    """
    with_plan = SecureClassifier.from_folder(planned[0], group(protocol, fraction_bits=secure.FRACTION_BITS))
    usual = SecureClassifier.from_folder(planned[0], group(protocol))
    ours, theirs = with_plan.classify(TEXTS), usual.classify(TEXTS)
    for one, other in zip(ours.predictions, theirs.predictions, strict=True):
        assert one.label == other.label
        assert one.difference < 0.05
    if bytes_left is not None:
        few, many = with_plan.estimate(16, 1), checked_cost(planned[0], group(protocol))
        assert few.bytes_sent < bytes_left * many.bytes_sent
        assert few.rounds < 0.9 * many.rounds


@pytest.mark.parametrize("protocol", ["ABY3", "SEMI2K"])
def test_public_weights_follow_the_plan_too(planned, protocol, group):
    parties = group(protocol, fraction_bits=secure.FRACTION_BITS)
    known = SecureClassifier.from_folder(planned[0], parties, public_weights=True)
    assert max(one.difference for one in known.classify(TEXTS).predictions) < 0.05


def test_products_one_by_one_follow_the_plan_too(planned, group):
    """On a fast line the heads are multiplied one by one: the same answers, bytes and plan, in more rounds."""
    settings = [{"fraction_bits": secure.FRACTION_BITS, "network": network} for network in ("wan", "lan")]
    pair = [SecureClassifier.from_folder(planned[0], group("ABY3", **each)) for each in settings]
    wan, lan = (classifier.estimate(16, 1) for classifier in pair)
    assert lan.rounds > wan.rounds
    assert max(one.difference for one in pair[1].classify(TEXTS).predictions) < 0.05


def test_many_texts_of_a_run_follow_the_plan(planned, group):
    """More heads than one grouped convolution takes: they are still one product."""
    classifier = SecureClassifier.from_folder(planned[0], group("ABY3", fraction_bits=secure.FRACTION_BITS))
    found = classifier.classify([f"{TEXTS[number % 3]} {number}" for number in range(26)])
    assert max(one.difference for one in found.predictions) < 0.1
    assert found.cost.rounds < 2 * classifier.estimate(16, 1).rounds


def test_a_plan_for_other_weights_is_refused(copy, group):
    tensors = load_file(copy / "model.safetensors")
    tensors["classifier.weight"] = tensors["classifier.weight"] * 1.01
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(ValueError, match=r"bits\.json was made for other weights than the folder's: make it again"):
        SecureClassifier.from_folder(copy, group("REF2K", fraction_bits=secure.FRACTION_BITS))
    SecureClassifier.from_folder(copy, group("REF2K")).classify(TEXTS[:1])  # without the plan


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"plan": {}, "weights": "0"}', '{"plan": []}'])
def test_a_broken_plan_is_refused_in_one_line(copy, content, group):
    (copy / plans.FILE).write_text(content)
    with pytest.raises(ValueError, match=r"bits\.json.*make it again with `flaxmpc plan`, or delete it"):
        SecureClassifier.from_folder(copy, group("REF2K", fraction_bits=secure.FRACTION_BITS))


def test_a_plan_of_too_little_room_is_refused(copy, group):
    value = json.loads((copy / plans.FILE).read_text())
    step = next(step for step in value["plan"]["steps"] if step["kept"] is not None)
    step["magnitude"] *= 2.0**50
    (copy / plans.FILE).write_text(json.dumps(value))
    with pytest.raises(ValueError, match="bits to spare in this plan; 10 are needed"):
        SecureClassifier.from_folder(copy, group("REF2K", fraction_bits=secure.FRACTION_BITS))


def test_what_has_a_division_has_no_plan(write_classifier, tmp_path):
    for parts, named in (({"attention": "2quad"}, "div"), ({}, "rsqrt")):
        folder = write_classifier(tmp_path / named, **parts)
        with pytest.raises(secure.SecureError, match=rf"cannot compute ({named}) \(.*a plan of bits is for"):
            plan_bits(folders.load(folder), TEXTS)
        assert not plans.has(folder)


def test_the_commands_make_a_plan_and_follow_it(copy, capsys, tmp_path, group):
    (copy / plans.FILE).unlink()
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS) + "\n")
    main(["cost", str(copy), "--tokens", "8", "--json"])
    before = json.loads(capsys.readouterr().out)
    main(["plan", str(copy), "--file", str(texts), "--error", "0.01", "--json"])
    made = json.loads(capsys.readouterr().out)
    assert made["same_labels"] == made["texts"] == len(TEXTS)
    assert secure.BitPlan.from_dict(made["plan"]).error <= 0.01
    main(["cost", str(copy), "--tokens", "8", "--json"])
    after = json.loads(capsys.readouterr().out)
    with_plan = SecureClassifier.from_folder(copy, group("ABY3", fraction_bits=secure.FRACTION_BITS))
    assert after["bytes_sent"] == with_plan.estimate(8, 1).bytes_sent < before["bytes_sent"]
    main(["cost", str(copy), "--tokens", "8", "--fraction-bits", "18", "--json"])
    assert json.loads(capsys.readouterr().out)["bytes_sent"] == before["bytes_sent"]
    main(["cost", str(copy), "--tokens", "8", "--protocol", "SEMI2K", "--json"])
    assert json.loads(capsys.readouterr().out)["fraction_bits"] == secure.FRACTION_BITS
    main(["plan", str(copy), "--file", str(texts)])
    shown = capsys.readouterr().out
    assert "bits to spare" in shown
    assert "layer_0/attention product" in shown  # whole, on a narrow terminal
    assert "BertForSequenceClassification/" not in shown
    assert "3 of 3 labels the same" in shown


@pytest.mark.parametrize(("options", "said"), [(["--sentences", "0"], "at least 1"), (["--error", "-1"], "positive")])
def test_bad_options_are_refused(copy, options, said, capsys):
    with pytest.raises(SystemExit):
        main(["plan", str(copy), *options])
    assert said in capsys.readouterr().err


def test_a_text_far_from_those_of_the_plan_is_refused(planned, group):
    classifier = SecureClassifier.from_folder(planned[0], group("REF2K", fraction_bits=secure.FRACTION_BITS))
    classifier.client_params = jax.tree.map(lambda leaf: 5000 * leaf, classifier.client_params)
    with pytest.raises(ValueError, match=r"an argument holds .*; its plan of bits is for up to"):
        classifier.share(np.array([[2, 9, 3]]), np.ones((1, 3), int))


@pytest.mark.parametrize("fraction_bits", [18, secure.FRACTION_BITS])
def test_an_answer_to_one_word_many_times_is_right_or_none(fraction_bits, group):
    """The shipped model diverges on most of these. What is opened then looks like other logits."""
    loaded, parties = folders.load(zoo.find(zoo.DEFAULT)), group("REF2K", fraction_bits=fraction_bits)
    found = private_classifier(loaded, parties.config, checked=True)
    client, run, weights = found.client(loaded.tokenizer), secure.jit(found.function, parties=parties), found.weights
    words = "capture amazing raft preferred lids chris concerned art weeks blindly feel obstacle boring fun"
    texts, weights = [" ".join([word] * 10) for word in words.split()], parties.put(weights)
    encoded, none = client.encode(texts), 0
    for place in range(len(texts)):
        one = client.run(encoded, [place], 1)
        logits = answered(*client.opened(jax.tree.leaves(run(weights, *client.share(one.ids, one.mask, one.types)))))
        plain = found.model.apply({"params": loaded.params}, jnp.asarray(one.ids), jnp.asarray(one.mask))
        none += bool(np.isnan(logits).all())
        assert np.isnan(logits).all() or np.abs(logits - plain).max() < 0.3
    assert len(texts) / 2 < none < len(texts)


def test_parties_on_hosts_follow_the_plan(planned, copy, running, tmp_path, group, monkeypatch):
    monkeypatch.setenv("FLAXMPC_CACHE", str(tmp_path / "cache"))
    changes = [
        ("fraction_bits = 18", "fraction_bits = 30"),
        ("max_batch_rows = 8", "max_batch_rows = 2"),
    ]
    local = SecureClassifier.from_folder(planned[0], group("ABY3", fraction_bits=secure.FRACTION_BITS))
    (copy / plans.FILE).unlink()
    with running(tmp_path / "c", timeout=30, changes=changes) as parties:
        with parties.connect() as owner:
            loaded, sizes = folders.load(planned[0]), {"lengths": (16,), "batches": (1, 2)}
            remote.put(loaded, owner, name="tiny", **sizes)
            with pytest.raises(ValueError, match=r"30 fraction bits .* are for plans of bits .*copy has none"):
                remote.put(folders.load(copy), owner, name="other", lengths=(16,))
        with parties.connect("client") as client:
            classifier = remote.RemoteClassifier(client, "tiny")
            predictions, _ = classifier.classify(TEXTS)
    expected = local.classify(TEXTS).predictions
    for ours, theirs in zip(predictions, expected, strict=True):
        np.testing.assert_allclose(ours.logits, theirs.logits, atol=0.05)
    few = local.estimate(16, 1)
    alone = next(each.cost for each in predictions[::-1] if each.cost)
    assert alone.bytes_sent <= 1.01 * few.bytes_sent
    # The client learns how its own numbers and the answer are encoded, and nothing of what is in between.
    assert classifier.encoding is not None
    shared = classifier.share(np.zeros((1, 16), int), np.ones((1, 16), int))
    assert len(classifier.encoding.inputs) == len(jax.tree.leaves(shared))
    assert len(classifier.encoding.outputs) == 2


def test_programs_of_a_plan_are_approved_without_the_weights(planned, tmp_path, group, monkeypatch):
    """From the config and the plan alone they are those that the owner puts."""
    monkeypatch.setenv("FLAXMPC_CACHE", str(tmp_path / "cache"))
    loaded, parties = folders.load(planned[0]), group("ABY3", fraction_bits=secure.FRACTION_BITS)
    written = write_local(tmp_path / "c")
    limits = msgspec.structs.replace(written.limits, max_batch_rows=2)
    cluster = msgspec.structs.replace(
        written, programs="programs.txt", limits=limits, fraction_bits=secure.FRACTION_BITS
    )
    found = private_classifier(loaded, parties.config)
    resident = parties.put(found.weights)
    put = remote._programs(found.client(loaded.tokenizer), found.function, resident, cluster, [(1, 16)])
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in ("config.json", plans.FILE):
        shutil.copy(planned[0] / file, bare / file)
    assert remote.approve(bare, cluster, lengths=(16,)) == put


@pytest.mark.parametrize(
    ("settings", "why"),
    [({"protocol": "REF2K"}, "has none"), ({"protocol": "CHEETAH"}, "CHEETAH follows none")],
)
def test_fraction_bits_of_plans_without_a_plan_are_refused(copy, settings, why, group):
    """Their products would overflow without a word."""
    if "none" in why and settings["protocol"] == "REF2K":
        (copy / plans.FILE).unlink()
    with pytest.raises(ValueError, match=f"30 fraction bits in the ring FM64 are for plans of bits.*{why}"):
        SecureClassifier.from_folder(copy, group(**settings, fraction_bits=secure.FRACTION_BITS))
