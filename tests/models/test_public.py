import dataclasses
import json
import re
from typing import Any

import jax
import numpy as np
import pytest

from flaxmpc.data.batches import padded
from flaxmpc.models import folder as folders
from flaxmpc.models.base import families, param_shapes, without_embeddings
from flaxmpc.models.config import PublicLayers
from flaxmpc.models.params import flatten
from flaxmpc.models.public import with_public_layers
from flaxmpc.models.weights import hf_name
from flaxmpc.serve import remote
from flaxmpc.serve.private import SecureClassifier, private_classifier

DISTINCT = {family.prefix: family for family in families()}
SHAPE: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
PUBLIC: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "hidden_act": "gelu",
}
REST: dict[str, Any] = {"vocab_size": 40, "max_position_embeddings": 24}
TEXTS = ["A gripping, beautifully acted film.", "a tedious, lifeless mess.", "good"]


def classifier(name: str, random_params, **changes):
    family = DISTINCT[name]
    model = family.models[0](family.config(**{**SHAPE, **REST, **changes}))
    return model, random_params(model)


@pytest.mark.parametrize("name", [name for name in DISTINCT if name != "mpnet"])
def test_it_is_the_same_function_in_every_family(name, random_params):
    model, params = classifier(name, random_params)
    rows = [np.array(row) for row in ([5, 9, 12, 7], [5, 30, 7], [5, 8, 8, 21, 22, 7])]
    ids, mask = np.zeros((3, 8), np.int32), np.zeros((3, 8), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    expected = jax.jit(model.apply)({"params": params}, ids, mask)
    for count in (1, 3):
        made, moved = with_public_layers(model, params, count)
        assert made.config.num_hidden_layers == 3 - count
        assert made.config.public_layers.num_hidden_layers == count
        np.testing.assert_allclose(jax.jit(made.apply)({"params": moved}, ids, mask), expected, atol=1e-4)
        client, secret = (flatten(part) for part in without_embeddings(made, moved))
        of_layers = re.compile(r"/layer_\d")
        assert [sum(bool(of_layers.search(path)) for path in part) for part in (client, secret)] == [
            count * 16,
            (3 - count) * 16,
        ]


def test_what_cannot_be_public_is_refused(random_params):
    model, params = classifier("bert", random_params)
    for count in (0, -1, 4):
        with pytest.raises(ValueError, match=f"^public_layers is {count}: the encoder has 3 layers, so 1 to as many$"):
            with_public_layers(model, params, count)
    made, moved = with_public_layers(model, params, 2)
    with pytest.raises(ValueError, match=r"^2 layers are public already"):
        with_public_layers(made, moved, 1)
    for changes in ({"attention": ("softmax", "2quad", "softmax")}, {"hidden_act": ("gelu", "relu", "gelu")}):
        other, own = classifier("bert", random_params, **changes)
        with_public_layers(other, own, 1)
        with pytest.raises(ValueError, match=r"^layer 1 has other parts than a published encoder"):
            with_public_layers(other, own, 2)
    other, own = classifier("bert", random_params, embedding="secret")
    with pytest.raises(ValueError, match=r"^public_layers read a public embedding, and this one is 'secret'$"):
        with_public_layers(other, own, 1)
    other, own = classifier("mpnet", random_params)
    with pytest.raises(ValueError, match=r"^the layers of mpnet share a bias of positions, so none can be public$"):
        with_public_layers(other, own, 1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "public_layers is an object of num_hidden_layers, .*, not 3"),
        ({"num_hidden_layers": 1}, "public_layers is an object of num_hidden_layers, "),
        ({**PUBLIC, "more": 1}, "public_layers is an object of num_hidden_layers, "),
        ({**PUBLIC, "num_hidden_layers": 0}, r"public_layers\.num_hidden_layers 0 is not a whole number in 1\.\.128"),
        ({**PUBLIC, "num_hidden_layers": True}, r"public_layers\.num_hidden_layers True is not"),
        ({**PUBLIC, "intermediate_size": 1e9}, r"public_layers\.intermediate_size 1000000000\.0 is not a whole number"),
        (
            {**PUBLIC, "num_attention_heads": 3},
            r"hidden_size 16 is not a multiple of public_layers\.num_att",
        ),
        ({**PUBLIC, "hidden_act": "gelo"}, "unknown activation 'gelo'"),
    ],
)
def test_a_config_of_others_is_refused_in_one_line(value, message):
    with pytest.raises(ValueError, match=message) as error:
        DISTINCT["bert"].config(**SHAPE, **REST, public_layers=value)
    assert "\n" not in str(error.value)


def test_too_many_parameters_are_refused():
    public = {"num_hidden_layers": 128, "num_attention_heads": 1, "intermediate_size": 65_536, "hidden_act": "gelu"}
    with pytest.raises(ValueError, match="parameters; at most 1000000000 are supported"):
        DISTINCT["bert"].config(hidden_size=128, num_attention_heads=1, public_layers=public)


@pytest.fixture(scope="module")
def folder(write_classifier, tmp_path_factory, random_params):
    """A classifier of a public layer and one of 2quad_freediv."""
    source = write_classifier(
        tmp_path_factory.mktemp("source"), attention=("softmax", "2quad_freediv"), hidden_act=("gelu", "quad")
    )
    loaded = folders.load(source)
    model, params = with_public_layers(loaded.model, loaded.params, 1)
    return folders.save(tmp_path_factory.mktemp("public") / "public", model, params, source, matrix_bits=8)


def test_a_folder_is_read_as_it_was_written(folder):
    loaded = folders.load(folder)
    fields = json.loads((folder / "config.json").read_text())
    assert fields["model_type"] == "flaxmpc-bert"  # HF would load another function
    assert fields["public_layers"]["num_hidden_layers"] == 1
    assert loaded.model.config.public_layers == PublicLayers(1, 2, 48, loaded.model.config.public_layers.hidden_act)
    assert json.loads(json.dumps(loaded.model.config.to_dict())) == {
        name: value for name, value in fields.items() if name != "architectures"
    }
    paths = flatten(param_shapes(loaded.model))
    names = {hf_name(path, DISTINCT["bert"]) for path in paths}
    assert len(names) == len(paths)
    assert "public.bert.encoder.layer.0.attention.self.query.weight" in names


@pytest.mark.parametrize("protocol", ["REF2K", "ABY3"])
def test_answers_on_shares_are_those_in_the_clear(folder, protocol, group):
    classifier = SecureClassifier.from_folder(folder, group(protocol))
    predictions, _ = classifier.classify(TEXTS)
    assert max(each.difference for each in predictions) < 0.02
    assert np.ptp([each.logits[0] for each in predictions]) > 0.1
    secret = [leaf.shape for leaf in jax.tree.leaves(classifier.weights.struct)]
    assert sum(np.prod(shape) for shape in secret) < 12_000  # of one layer, and the head


def test_a_text_on_shares_costs_what_the_secret_layers_cost(folder, write_classifier, tmp_path, group):
    one = SecureClassifier.from_folder(write_classifier(tmp_path, num_hidden_layers=1), group("ABY3")).estimate(16, 1)
    ours = SecureClassifier.from_folder(folder, group("ABY3")).estimate(16, 1)
    assert (ours.bytes_sent, ours.rounds) == (one.bytes_sent, one.rounds)


def test_all_layers_may_be_public(folder, tmp_path, group, write_classifier):
    source = write_classifier(tmp_path, attention="softmax", hidden_act="gelu")
    loaded = folders.load(source)
    model, params = with_public_layers(loaded.model, loaded.params, 2)
    head = folders.save(tmp_path / "head", model, params, source)
    predictions, _ = SecureClassifier.from_folder(head, group("ABY3")).classify(TEXTS)
    assert max(each.difference for each in predictions) < 0.02


def test_a_client_of_a_cluster_gets_the_public_layers_and_no_others(folder, group):
    loaded = folders.load(folder)
    found = private_classifier(loaded, group("ABY3").config, checked=True)
    client = found.client(loaded.tokenizer)
    read = remote._Bundle.read(remote._bundle(client, found.model))
    own, theirs = flatten(read.params), flatten(loaded.params)
    assert own.keys() == {path for path in theirs if path.startswith("bert/embeddings/")}
    for path, leaf in own.items():
        np.testing.assert_array_equal(leaf, theirs[path])
    assert any("/layer_0/" in path for path in own)
    encoded = client.encode(TEXTS)
    ids, mask = padded(encoded, [0, 1, 2], (3, 16), 0)[:2]
    other = remote.Client(read.model, read.tokenizer, read.params)
    for ours, these in zip(
        jax.tree.leaves(client.share(ids, mask)), jax.tree.leaves(other.share(ids, mask)), strict=True
    ):
        np.testing.assert_array_equal(ours, these)


def test_configs_without_public_layers_say_nothing_of_them():
    config = DISTINCT["bert"].config(**SHAPE, **REST)
    assert "public_layers" not in config.to_dict()
    assert dataclasses.replace(config, public_layers=None) == config
