import copy
import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxmpc import secure
from flaxmpc.convert.calibrate import calibrate_attention
from flaxmpc.convert.fold import fold
from flaxmpc.data.batches import Split, batches, encode
from flaxmpc.models import folder as folders
from flaxmpc.models import zoo
from flaxmpc.models.bert import ARCHITECTURES, BertForMaskedLM, BertForSequenceClassification, param_shapes
from flaxmpc.models.config import BertConfig
from flaxmpc.models.folded import FoldedLayer
from flaxmpc.models.params import flatten
from flaxmpc.nn.attention import ATTENTION, Constant
from flaxmpc.serve.private import split_at_shares

TINY = BertConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=8,
    attention="2quad_freediv",
    hidden_act="quad",
)
MASK = np.arange(7) < np.array([7, 4, 1])[:, None]
RNG = np.random.default_rng(0)
IDS, TYPES = RNG.integers(1, 40, MASK.shape) * MASK, RNG.integers(0, 2, MASK.shape) * MASK
SENTENCES = [
    "A gripping, beautifully acted film.",
    "A tedious, lifeless mess.",
    "Not for everyone, but for those with whom it will connect, it's a nice departure from standard moviegoing fare.",
    "Bad.",
]


def random_params(model, seed=0):
    """Parameters of which no two are alike; a row sum has no constant, so its head keeps the 1."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.4, leaf.shape).astype(np.float32), param_shapes(model))
    for i in range(model.config.num_hidden_layers):
        attention, part = params["bert"][f"layer_{i}"]["attention"], model.config.attention_of(i)
        if "shift" in attention:
            attention["shift"] += np.float32(3.0)
        if "scale" in attention:
            heads = getattr(part, "parts", [part] * model.config.num_attention_heads)
            constant = [isinstance(head.normaliser, Constant) for head in heads]
            attention["scale"] = np.where(constant, 0.1 + np.abs(attention["scale"]), 1.0).astype(np.float32)
    return params


def output(model, params, ids=IDS, mask=MASK, types=None):
    """The head's output, of valid tokens where it has one for each."""
    types = None if types is None else jnp.asarray(types)
    apply = jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs))
    head = np.asarray(apply(params, jnp.asarray(ids), jnp.asarray(mask), types))
    return head if head.ndim == 2 else head[mask > 0]


def assert_the_same_function(model, params, **inputs):
    folded, config = fold(params, model.config)
    plain = output(model, params, **inputs)
    assert np.isfinite(plain).all()
    np.testing.assert_allclose(output(type(model)(config), folded, **inputs), plain, atol=1e-4)
    return folded, config


def model_of(architecture: Any = BertForSequenceClassification, **changes):
    return architecture(dataclasses.replace(TINY, **changes))


# -------------------------------------------------------------------------------------------------- the same function


@pytest.mark.parametrize("attention", ATTENTION)
def test_every_attention_with_quad_and_with_gelu(attention):
    model = model_of(attention=attention, hidden_act=["quad", "gelu"])
    folded, config = assert_the_same_function(model, random_params(model))
    assert [config.hidden_act_of(i).name for i in range(2)] == ["square", "gelu"]
    assert not any(path.endswith("attention/scale") for path in flatten(folded))


@pytest.mark.parametrize("attention", ["2quad_freediv", "softmax"])
def test_heads_one_by_one(attention):
    model = model_of(attention=attention)
    folded, config = fold(random_params(model), model.config)
    one_by_one = dataclasses.replace(config, grouped_heads=False)
    results = [output(type(model)(each), folded) for each in (config, one_by_one)]
    np.testing.assert_allclose(results[0], results[1], atol=1e-4)
    programs = [
        jax.jit(type(model)(each).apply).lower({"params": folded}, IDS, MASK).as_text() for each in (config, one_by_one)
    ]
    assert ["convolution" in program for program in programs] == [True, False]


@pytest.mark.parametrize(
    "attention",
    [
        [["2quad_freediv", "softmax"], ["2quad", "relu_freediv"]],
        ["softmax", ["scaling", "2quad_freediv"]],
        ["2quad_freediv", "2quad"],
    ],
    ids=str,
)
def test_variants_mixed_by_head_and_by_layer(attention):
    model = model_of(attention=attention)
    assert_the_same_function(model, random_params(model))


def test_a_constant_that_became_negative_or_zero():
    model = model_of(attention=["2quad_freediv", "relu_freediv"])
    params = random_params(model)
    for layer in ("layer_0", "layer_1"):
        params["bert"][layer]["attention"]["scale"] = np.array([-0.7, 0.0], np.float32)
    assert_the_same_function(model, params)


def test_token_types():
    model = model_of()
    assert_the_same_function(model, random_params(model), types=TYPES)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_head(name):
    model = model_of(ARCHITECTURES[name])
    assert_the_same_function(model, random_params(model))


@pytest.mark.parametrize("hidden_act", [["gelu", "quad"], ["quad", "gelu"]], ids=str)
def test_the_activation_in_the_head_of_masked_lm_is_the_last_layers(hidden_act):
    model = model_of(BertForMaskedLM, hidden_act=hidden_act)
    assert_the_same_function(model, random_params(model))


def real_sentences(loaded, length=32):
    ids = encode(loaded.tokenizer, SENTENCES, length).input_ids
    (batch,) = batches(Split(ids, np.zeros(len(ids))), batch_size=len(ids), lengths=[length])
    return batch


def test_real_weights(minilm):
    loaded = folders.load_pretrained(minilm, attention="2quad_freediv", hidden_act="quad")
    batch = real_sentences(loaded)
    params = calibrate_attention(loaded.model, loaded.params, batch)
    assert (params["bert"]["layer_5"]["attention"]["scale"] != 1).all()
    assert_the_same_function(loaded.model, params, ids=batch.input_ids, mask=batch.attention_mask)


def test_the_zoos_weights():
    loaded = folders.load(zoo.find(zoo.DEFAULT))
    batch = real_sentences(loaded)
    assert_the_same_function(loaded.model, loaded.params, ids=batch.input_ids, mask=batch.attention_mask)


# ------------------------------------------------------------------------------------------------------ what it is not


def test_folding_leaves_what_it_was_given():
    model = model_of()
    params = random_params(model)
    before = copy.deepcopy(params)
    fold(params, model.config)
    chex.assert_trees_all_equal(params, before)


def test_folding_twice_is_refused():
    model = model_of()
    folded, config = fold(random_params(model), model.config)
    with pytest.raises(ValueError, match="folded already"):
        fold(folded, config)


def test_a_folded_model_is_not_written(tmp_path, minilm):
    model = model_of(vocab_size=30522)
    folded, config = fold(random_params(model), model.config)
    with pytest.raises(ValueError, match="folded when it is loaded"):
        folders.save(tmp_path, BertForSequenceClassification(config), folded, minilm)


def test_padding_stays_zero_and_needs_no_product_with_the_mask():
    model = model_of(num_hidden_layers=3)
    folded, config = fold(random_params(model), model.config)
    u = RNG.normal(size=(3, 7, 16)).astype(np.float32) * MASK[..., None]
    layer = FoldedLayer(config, 0)
    out = np.asarray(layer.apply({"params": folded["bert"]["layer_0"]}, jnp.asarray(u), config.keys(jnp.asarray(MASK))))
    assert (out[~MASK] == 0).all()
    assert (out[MASK] != 0).all()


# --------------------------------------------------------------------------------------------------------------- cost


@pytest.fixture(scope="module")
def layer(group):
    """name -> (cost under ABY3, compiled program, logits) of one layer of four heads."""
    model = model_of(num_hidden_layers=1, num_attention_heads=4, hidden_size=32, intermediate_size=48)
    params = random_params(model)
    embeddings = np.random.default_rng(1).normal(size=(1, 8, 32)).astype(np.float32)
    found = {}
    for name, (weights, config) in {"as written": (params, model.config), "folded": fold(params, model.config)}.items():
        function, _, shared = split_at_shares(BertForSequenceClassification(config), weights)
        keys = jax.device_get(config.keys(jnp.ones((1, 8))))
        run = secure.jit(function, parties=group("ABY3"))
        logits, cost = run.run(shared, embeddings, keys)
        found[name] = cost, run.program(shared, embeddings, keys), logits
    return found


def test_a_folded_layer_sends_less_in_fewer_rounds(layer):
    for name, (cost, *_) in layer.items():
        print(f"{name}: {cost.bytes_sent / 1e3:.1f} kB, {cost.rounds:.0f} rounds")
    written, folded = layer["as written"][0], layer["folded"][0]
    assert folded.bytes_sent < written.bytes_sent
    assert folded.rounds < written.rounds
    np.testing.assert_allclose(layer["folded"][2], layer["as written"][2], atol=0.01)


def test_heads_are_one_convolution_and_the_activation_one_square(layer):
    def products(program, size):
        """The factors of every elementwise product on a tensor of so many features."""
        lines = [line for line in program.splitlines() if "pphlo.multiply" in line and f"x{size}x!pphlo.secret" in line]
        return [line.split("pphlo.multiply ")[1].split(" :")[0].split(", ") for line in lines]

    written, folded = layer["as written"][1], layer["folded"][1]
    assert written.count("pphlo.dot_general") == 2
    assert "pphlo.convolution" not in written
    assert folded.count("pphlo.convolution") == 2
    assert "pphlo.dot_general" not in folded
    ((first, second),) = products(folded, 48)
    assert first == second
    assert len(products(written, 48)) == 3
