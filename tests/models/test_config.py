import dataclasses
import json
import re
from typing import Any

import jax.numpy as jnp
import pytest

from flaxmpc.models.bert import PRESETS, BertConfig, preset
from flaxmpc.models.folder import read_config
from flaxmpc.nn.activation import ACTIVATIONS
from flaxmpc.nn.attention import ATTENTION, PerHead
from flaxmpc.nn.embedding import EMBEDDINGS
from flaxmpc.nn.normalization import NORMALIZATIONS, Chebyshev

TINY = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)


def written_and_read(config):
    return BertConfig.from_dict(json.loads(json.dumps(config.to_dict())))


def test_a_hf_folder_is_read_as_it_is(minilm):
    config = read_config(minilm)
    assert config == PRESETS["minilm-l6"]
    assert config.attention is ATTENTION["softmax"]
    assert config.hidden_act is ACTIVATIONS["gelu"]
    assert config.head_size == 32
    assert config.num_labels == 2


def test_hf_fields_are_read_and_those_that_do_not_matter_passed_over():
    config = BertConfig.from_dict(
        {
            "model_type": "bert",
            "architectures": ["BertForSequenceClassification"],
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "hidden_act": "gelu_new",
            "layer_norm_eps": 1e-6,
            "classifier_dropout": 0.3,
            "id2label": {str(i): "abcdefghijk"[i] for i in reversed(range(11))},
            "label2id": {"a": 0},
            "position_embedding_type": "absolute",
            "is_decoder": False,
            "transformers_version": "9.9",
            "a_field_of_the_future": {"nested": [1]},
        }
    )
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (32, 4, 3)
    assert config.hidden_act is ACTIVATIONS["gelu_tanh"]
    assert config.id2label == tuple("abcdefghijk")
    assert config.classifier_dropout == 0.3
    assert config.layer_norm_eps == 1e-6


@pytest.mark.parametrize("name", ["gelu_new", "gelu_pytorch_tanh", "gelu_tanh"])
def test_hf_names_of_the_tanh_gelu_are_known_and_written(name):
    config = BertConfig.from_dict({"hidden_act": name})
    assert config.hidden_act is ACTIVATIONS["gelu_tanh"]
    assert config.to_dict()["hidden_act"] == "gelu_new"


@pytest.mark.parametrize(
    ("field", "value"),
    [("position_embedding_type", "relative_key"), ("is_decoder", True), ("model_type", "roberta")],
)
def test_what_the_model_cannot_do_is_refused(field, value):
    with pytest.raises(ValueError, match=re.escape(f"config.json has {field}={value!r}; only")):
        BertConfig.from_dict({field: value})


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"id2label": None},
        {"id2label": {"0": 0, "1": 1}},
        {"id2label": {"1": "b", "0": "a"}, "label2id": {"a": 1, "b": 0}},
        {"id2label": {"0": "score"}},
        {"id2label": {0: "a", 1: "b", 2: "c"}, "num_labels": 3},
        {"label2id": {"a": 0, "b": 1, "c": 2}},
        {"num_labels": 3},
        {"num_labels": 1},
        {"num_labels": None},
        {"num_labels": None, "id2label": None},
        {"pad_token_id": None},
    ],
    ids=str,
)
def test_labels_are_read_as_transformers_reads_them(fields):
    import transformers

    theirs: Any = transformers.BertConfig(**fields)
    ours = BertConfig.from_dict(fields)
    assert ours.num_labels == theirs.num_labels
    assert ours.id2label == tuple(str(theirs.id2label[i]) for i in range(theirs.num_labels))
    assert ours.pad_token_id == (theirs.pad_token_id or 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id2label": {"0": "a", "2": "c"}}, r"id2label has the ids \['0', '2'\]: they are 0, 1, 2"),
        ({"id2label": {"0": "a", "00": "b"}}, "id2label has the ids"),
        ({"id2label": {}}, r"id2label has the ids \[\]: .* at least one"),
        ({"id2label": {"a": "b"}}, "has a key that is no id"),
        ({"id2label": {"0": None, "1": "b"}}, "id2label names a label None"),
        ({"id2label": {"0": ["a"]}}, r"id2label names a label \['a'\]"),
        ({"id2label": "ab"}, "id2label 'ab' is not an object"),
        ({"id2label": {"0": "a", "1": "b"}, "num_labels": 3}, r"num_labels is 3, but id2label names 2: \['a', 'b'\]"),
        ({"num_labels": "3"}, "num_labels '3' is not a whole number"),
        ({"num_labels": 10**9}, "num_labels 1000000000 is not a whole number in 1..1000000"),
        ({"num_labels": True}, "num_labels True is not"),
        ({"hidden_size": "384"}, "hidden_size '384' is not a whole number in 1.."),
        ({"hidden_size": None}, "hidden_size None is not"),
        ({"hidden_size": 3.5}, "hidden_size 3.5 is not"),
        ({"hidden_size": -8}, "hidden_size -8 is not"),
        ({"vocab_size": True}, "vocab_size True is not"),
        ({"num_attention_heads": 0}, "num_attention_heads 0 is not"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000 is not a whole number in 0..128"),
        ({"max_position_embeddings": 10**30}, "max_position_embeddings 10+ is not"),
        ({"type_vocab_size": 0}, "type_vocab_size 0 is not"),
        ({"pad_token_id": -1}, "pad_token_id -1 is not a whole number in 0.."),
        ({"pad_token_id": 30522}, "pad_token_id 30522 is not in 0..30521, the vocabulary"),
        ({"model_max_length": 513}, "model_max_length 513 is not in 1..512, the positions"),
        ({"model_max_length": "64"}, "model_max_length '64' is not"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob 1.5 is not a number from 0 to below 1"),
        ({"classifier_dropout": "none"}, "classifier_dropout 'none' is not"),
        ({"layer_norm_eps": "1e-12"}, "layer_norm_eps '1e-12' is not"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps nan is not"),
        ({"initializer_range": None}, "initializer_range None is not"),
        ({"vocab_size": 2**31}, "vocab_size 2147483648 is not a whole number in 1..1000000"),
        ({"hidden_size": 10**6}, "hidden_size 1000000 is not a whole number in 1..16384"),
        (
            {"hidden_size": 16384, "num_attention_heads": 1024},
            "num_attention_heads 1024 is not a whole number in 1..256",
        ),
        (
            {"hidden_size": 16128, "vocab_size": 10**6},
            r"a model of \d{11} parameters; at most 1000000000 are supported",
        ),
        ({"hidden_act": "x" * 10**6}, r"unknown activation 'xxx.*\.\.\.x*'\. Known"),
        ({"model_type": ["bert"] * 10**5}, r"unknown model_type \['bert', 'bert', .*\.\.\.\]\. Known: bert"),
        (
            {"layer_norm": {"name": "layer_norm_chebyshev", "depth": 10**9}},
            "layer_norm_chebyshev needs a depth of 1 to 7, not 100",
        ),
        (
            {"layer_norm": {"name": "layer_norm_chebyshev", "depth": "5"}},
            "depth of layer_norm 'layer_norm_chebyshev' is '5'; on",
        ),
        ({"hidden_act": {"name": "gelu", "f": 3}}, "f of activation 'gelu' is 3; one like"),
        ({"attention": {"name": "2quad", "shift": [1, 2]}}, r"shift of attention '2quad' is \[1, 2\]; one like 5"),
        ({"problem_type": "ranking"}, "unknown problem_type 'ranking'"),
    ],
    ids=str,
)
def test_a_value_that_a_field_cannot_have_is_named(fields, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message) as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value)
    assert "config.json" in str(error.value)
    assert len(str(error.value)) < 1000


def test_a_field_that_does_not_exist_gets_the_closest():
    makers: list[Any] = [BertConfig, lambda **fields: preset("base", **fields)]
    for make in makers:
        with pytest.raises(ValueError, match="num_labels is how many id2label has"):
            make(num_labels=3)
        with pytest.raises(ValueError, match=r"unknown field of BertConfig 'hiden_size'\. Did you mean 'hidden_size'"):
            make(hiden_size=3)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="hidden_size 16 is not a multiple of num_attention_heads 3"):
        dataclasses.replace(TINY, num_attention_heads=3)


def test_one_part_serves_every_layer():
    config = dataclasses.replace(TINY, attention="2quad", hidden_act="quad", layer_norm="layer_norm_chebyshev")
    for layer in range(2):
        assert config.attention_of(layer) is ATTENTION["2quad"]
        assert config.hidden_act_of(layer) is ACTIVATIONS["quad"]
        assert config.layer_norms_of(layer) == (NORMALIZATIONS["layer_norm_chebyshev"],) * 2


def test_a_list_names_a_part_for_every_layer_head_and_layer_norm():
    chebyshev = Chebyshev(low=0.5)
    config = dataclasses.replace(
        TINY,
        attention=["softmax", ["scaling", "2relu"]],
        hidden_act=["gelu", "quad"],
        layer_norm=["layer_norm", ["layer_norm", chebyshev]],
    )
    assert config.attention_of(0) is ATTENTION["softmax"]
    assert config.attention_of(1) == PerHead((ATTENTION["scaling"], ATTENTION["2relu"]))
    assert [config.hidden_act_of(layer).name for layer in range(2)] == ["gelu", "quad"]
    exact = NORMALIZATIONS["layer_norm"]
    assert [config.layer_norms_of(layer) for layer in range(2)] == [(exact, exact), (exact, chebyshev)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention": ["softmax"]}, "attention lists 1 parts, num_hidden_layers is 2"),
        ({"hidden_act": ["quad"] * 3}, "hidden_act lists 3 parts, num_hidden_layers is 2"),
        ({"layer_norm": []}, "layer_norm lists 0 parts, num_hidden_layers is 2"),
        ({"layer_norm": ["layer_norm", ["layer_norm"]]}, "a layer has two LayerNorms, not 1"),
        (
            {"attention": ["softmax", ["softmax"] * 3]},
            "attention of layer 1 names 3 heads, num_attention_heads is 2",
        ),
        (
            {"attention": PerHead((ATTENTION["softmax"],))},
            "attention of layer 0 names 1 heads, num_attention_heads is 2",
        ),
    ],
)
def test_a_list_of_the_wrong_length_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **fields)


def test_layers_that_share_scores_have_one_attention(tmp_path):
    shared = dataclasses.replace(TINY, num_hidden_layers=5, layers_sharing_scores=2, attention="2quad")
    assert [shared.source_of_scores(layer) for layer in range(5)] == [0, 0, 2, 2, 4]
    assert shared.to_dict()["model_type"] == "flaxmpc-bert", "HF would load another function"
    assert BertConfig.from_dict(shared.to_dict()) == shared
    assert "layers_sharing_scores" not in TINY.to_dict()
    for changes, message in (
        ({"attention": ["2quad", "scaling"] * 2 + ["2quad"]}, r"layer 1 shares .* of layer 0: .* 'scaling'$"),
        ({"attention": [["2quad", "scaling"]] * 5}, r"attention '2quad\+scaling' has no `numerators` to share"),
        ({"layers_sharing_scores": 0}, r"layers_sharing_scores 0 is not a whole number in 1\.\.128"),
        ({"layers_sharing_scores": None}, r"layers_sharing_scores None is not a whole number"),
        ({"layers_sharing_scores": True}, r"layers_sharing_scores True is not a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(shared, **changes)


@pytest.mark.parametrize(
    ("field", "name", "closest"),
    [
        ("attention", "2quad_freedif", "2quad_freediv"),
        ("hidden_act", "gelu_pumma", "gelu_puma"),
        ("layer_norm", "layernorm", "layer_norm"),
        ("embedding", "secrets", "secret"),
    ],
)
def test_an_unknown_part_gets_the_known_ones_and_the_closest(field, name, closest, tmp_path):
    with pytest.raises(ValueError, match=f"Did you mean {closest!r}") as error:
        dataclasses.replace(TINY, **{field: name})
    registry = {
        "attention": ATTENTION,
        "hidden_act": ACTIVATIONS,
        "layer_norm": NORMALIZATIONS,
        "embedding": EMBEDDINGS,
    }
    assert all(known in str(error.value) for known in registry[field])

    (tmp_path / "config.json").write_text(json.dumps({field: name}))
    with pytest.raises(ValueError, match=f"Did you mean {closest!r}") as error:
        read_config(tmp_path)
    assert "config.json" in str(error.value)


def test_a_heads_activation_is_a_part_and_no_other_model_for_hf():
    config = dataclasses.replace(TINY, classifier_activation="identity")
    assert written_and_read(config) == config
    assert TINY.to_dict()["model_type"] == "bert"
    assert config.to_dict()["model_type"] == "flaxmpc-bert"
    with pytest.raises(ValueError, match=r"unknown activation .*'tan'.*Did you mean 'tanh'"):
        dataclasses.replace(TINY, classifier_activation="tan")


def test_a_config_survives_json():
    config = dataclasses.replace(
        TINY,
        attention=[["softmax", {"name": "2quad_freediv", "shift": 3.0}], "scaling"],
        hidden_act=["gelu_puma", "gelu_tanh"],
        layer_norm=["layer_norm", ("layer_norm", Chebyshev().calibrated(jnp.array([0.3, 2.0])))],
        embedding="secret",
        id2label=("a", "b", "c"),
        classifier_dropout=0.2,
    )
    assert written_and_read(config) == config
    assert config.to_dict()["id2label"] == {"0": "a", "1": "b", "2": "c"}
    assert config.to_dict()["label2id"] == {"a": 0, "b": 1, "c": 2}


@pytest.mark.parametrize(
    ("field", "registry"), [("attention", ATTENTION), ("hidden_act", ACTIVATIONS), ("layer_norm", NORMALIZATIONS)]
)
def test_every_part_survives_json(field, registry):
    for name in registry:
        config = dataclasses.replace(TINY, **{field: name})
        assert getattr(written_and_read(config), field) is registry[name]
        config = dataclasses.replace(TINY, **{field: [name, next(iter(registry))]})
        assert written_and_read(config) == config


def test_every_preset_survives_json():
    for config in PRESETS.values():
        assert written_and_read(config) == config


def test_heads_given_for_the_whole_model_survive_json():
    """With as many heads as layers, heads must not be read back as layers."""
    heads = PerHead((ATTENTION["softmax"], ATTENTION["scaling"]))
    config = dataclasses.replace(TINY, attention=heads)
    assert [written_and_read(config).attention_of(layer) for layer in range(2)] == [heads, heads]
    assert written_and_read(config) == config


def test_an_own_part_is_taken_and_refused_only_where_it_would_be_written():
    own = dataclasses.replace(ACTIVATIONS["quad"], name="mine")
    config = dataclasses.replace(TINY, hidden_act=own)
    assert config.hidden_act_of(1) is own
    with pytest.raises(ValueError, match="'mine' is not registered"):
        config.to_dict()


def test_a_config_can_be_a_key():
    assert hash(dataclasses.replace(TINY, attention=["2quad", ["softmax", "scaling"]])) is not None
    assert hash(BertConfig.from_dict({"id2label": ["no", "yes"]})) is not None


@pytest.mark.parametrize(
    "text", ["{", "[]", "3", '"bert"', '{"hidden_size": "wide"}', '{"id2label": {"a": "b"}}', '{"attention": null}']
)
def test_a_bad_file_is_named(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json(: | cannot be read as JSON: | holds no JSON object)"):
        read_config(tmp_path)


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "config.json").write_bytes(b'{"hidden_act": "\xff"}')
    with pytest.raises(ValueError, match=r"config\.json cannot be read as JSON: 'utf-8' codec"):
        read_config(tmp_path)


def test_a_folder_without_config_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist: a model folder holds"):
        read_config(tmp_path)


def test_a_preset_is_found_and_changed():
    config = preset("base", attention="2quad_freediv", hidden_act="quad")
    assert config == dataclasses.replace(PRESETS["base"], attention="2quad_freediv", hidden_act="quad")
    with pytest.raises(ValueError, match=r"unknown preset 'bas'\. Did you mean 'base'") as error:
        preset("bas")
    assert all(name in str(error.value) for name in PRESETS)


def test_how_many_texts_a_model_takes_is_kept_and_checked():
    assert BertConfig.from_dict({}).num_texts is None
    assert written_and_read(dataclasses.replace(TINY, num_texts=2)).num_texts == 2
    with pytest.raises(ValueError, match="num_texts is 1, or 2 for pairs, not 3"):
        dataclasses.replace(TINY, num_texts=3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "is nested more than 64 deep"),
        ('{"a":' * 70 + "1" + "}" * 70, "is nested more than 64 deep"),
        ('{"hidden_size": ' + "9" * 10_000 + "}", "cannot be read as JSON: Exceeds the limit"),
        (" " * (5 << 20), "has more than 4194304 bytes"),
        ('"text"', "holds no JSON object"),
    ],
    ids=["lists", "objects", "digits", "large", "text"],
)
def test_a_config_that_takes_long_to_read_is_refused(content, message, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"config\.json {message}") as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value)
