"""A model on a lazy state is the model: in the clear, and on shares."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxmpc import secure
from flaxmpc.convert.calibrate import calibrate_attention
from flaxmpc.data.batches import Split, batches, encode
from flaxmpc.models import folder as folders
from flaxmpc.models import zoo
from flaxmpc.models.base import defer, param_shapes
from flaxmpc.models.bert import ARCHITECTURES, BertConfig, BertForMaskedLM, BertForSequenceClassification
from flaxmpc.nn.activation import ACTIVATIONS
from flaxmpc.nn.attention import ATTENTION, scalars_of
from flaxmpc.nn.normalization import NORMALIZATIONS, Chebyshev
from flaxmpc.nn.product import grouped_conv
from flaxmpc.serve.private import private

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
CONFIG = secure.Config()
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
    """Parameters of which no two are alike."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.4, leaf.shape).astype(np.float32), param_shapes(model))
    for i in range(model.config.num_hidden_layers):
        attention = params["bert"][f"layer_{i}"]["attention"]
        if "shift" in attention:
            attention["shift"] += np.float32(3.0)
        if "scale" in attention:
            attention["scale"] = 0.1 + np.abs(attention["scale"])
    return params


def output(model, params, ids=IDS, mask=MASK, types=None):
    """The head's output, of valid tokens where it has one for each."""
    types = None if types is None else jnp.asarray(types)
    apply = jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs))
    head = np.asarray(apply(params, jnp.asarray(ids), jnp.asarray(mask), types))
    return head if head.ndim == 2 else head[mask > 0]


def lazily(model, params, ids=IDS, mask=MASK, types=None, config=CONFIG):
    """The same on a lazy state, as it runs on shares, and the weights."""
    ids, types = jnp.asarray(ids), None if types is None else jnp.asarray(types)
    _, client, function, weights, _ = private(model, params, config)
    head = np.asarray(jax.jit(function)(weights, *shared_of(model, client, ids, mask, types)))
    return (head if head.ndim == 2 else head[mask > 0]), weights


def shared_of(model, client_params, ids, mask, types=None) -> Any:
    """What the client shares."""
    embed = model.apply({"params": client_params}, jnp.asarray(ids), types, jnp.asarray(mask), method="embed")
    return jax.device_get((embed, model.config.mask(jnp.asarray(mask))))


def assert_the_same_function(model, params, **inputs):
    plain = output(model, params, **inputs)
    assert np.isfinite(plain).all()
    ours, weights = lazily(model, params, **inputs)
    np.testing.assert_allclose(ours, plain, atol=1e-5 * max(1.0, np.abs(plain).max()))
    return weights


def model_of(architecture: Any = BertForSequenceClassification, **changes):
    return architecture(dataclasses.replace(TINY, **changes))


# -------------------------------------------------------------------------------------------------- the same function


@pytest.mark.parametrize("attention", ATTENTION)
def test_every_attention_with_quad_and_with_gelu(attention):
    model = model_of(attention=attention, hidden_act=["quad", "gelu"])
    assert_the_same_function(model, random_params(model))


@pytest.mark.parametrize(
    "layer_norm",
    [*NORMALIZATIONS, ("rms_norm", "layer_norm"), ("layer_norm_constant", "layer_norm")],
    ids=str,
)
@pytest.mark.parametrize("attention", ["2quad_freediv", "softmax"])
def test_every_normalisation(attention, layer_norm):
    model = model_of(attention=attention)
    params = random_params(model)
    if layer_norm == "layer_norm_chebyshev":
        seen: Any = model.apply({"params": params}, jnp.asarray(IDS), jnp.asarray(MASK), method="outputs")
        variances = np.concatenate([np.ravel(one[MASK]) for layer in seen.intermediates.variances for one in layer])
        layer_norm = Chebyshev(low=variances.min() / 2, high=variances.max() * 2, depth=7)
    model = model_of(attention=attention, layer_norm=[layer_norm] * 2)
    assert_the_same_function(model, params)


@pytest.mark.parametrize("attention", ["2quad_freediv", "softmax"])
def test_products_are_grouped_or_one_by_one_as_protocol_and_network_have_it(attention):
    model = model_of(attention=attention)
    params = random_params(model)
    plain = output(model, params)
    for protocol, network, grouped in (("ABY3", "wan", True), ("ABY3", "lan", False), ("SEMI2K", "wan", False)):
        config = secure.Config(protocol, network=network)
        found, _ = lazily(model, params, config=config)
        np.testing.assert_allclose(found, plain, atol=1e-4)
        function, weights = private(model, params, config)[2:4]
        text = jax.jit(function).lower(weights, *shared_of(model, params, IDS, MASK)).as_text()
        assert ("convolution" in text) == grouped


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


@pytest.mark.parametrize("attention", ATTENTION)
def test_layers_that_share_scores(attention, group):
    """The third layer has its own again, the fourth computes the first token alone."""
    model = model_of(attention=attention, num_hidden_layers=4, layers_sharing_scores=2, layer_norm="layer_norm")
    params = random_params(model)
    for layer in (1, 3):
        assert set(params["bert"][f"layer_{layer}"]["attention"]) == {"value", "output"}
    assert_the_same_function(model, params)
    if attention in ("softmax", "2quad_freediv"):
        _, client, function, weights, _ = private(model, params, CONFIG)
        shared = shared_of(model, client, IDS, MASK)
        logits, cost = secure.jit(function, parties=group("ABY3")).run(weights, *shared)
        np.testing.assert_allclose(logits, output(model, params), atol=0.03)
        own = model_of(attention=attention, num_hidden_layers=4, layer_norm="layer_norm")
        _, client, function, weights, _ = private(own, random_params(own), CONFIG)
        _, more = secure.jit(function, parties=group("ABY3")).run(weights, *shared)
        assert cost.bytes_sent < more.bytes_sent
        assert cost.rounds < more.rounds


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


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation_in_a_classifiers_head(act):
    model = model_of(classifier_activation=act)
    weights = assert_the_same_function(model, random_params(model))
    shapes = [np.shape(leaf) for leaf in weights.values()]
    assert ((model.config.hidden_size, model.config.num_labels) in shapes) or act == "identity"


def test_a_feed_forward_without_an_activation_is_one_matrix():
    """So none has the features in between, as with an activation some have."""
    for act, has in (("identity", False), ("quad", True)):
        model = model_of(hidden_act=act)
        weights = assert_the_same_function(model, random_params(model))
        assert any(model.config.intermediate_size in np.shape(leaf) for leaf in weights.values()) == has


def test_a_linear_head_is_one_matrix():
    """That of what follows the last LayerNorm, too."""
    plain, linear = (model_of(classifier_activation=act) for act in ("tanh", "identity"))
    counts = [len(private(model, random_params(model), CONFIG).weights) for model in (plain, linear)]
    assert counts[1] == counts[0] - 2


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
    private(model, params, CONFIG)
    chex.assert_trees_all_equal(params, before)


@pytest.mark.parametrize("embedding", ["public", "secret"])
@pytest.mark.parametrize("attention", ["2quad_freediv", "2quad", ["softmax", "2quad_freediv"]], ids=str)
def test_the_weights_are_the_same_for_every_length(attention, embedding):
    model = model_of(attention=attention, embedding=embedding)
    params = random_params(model)
    _, client, function, weights, _ = private(model, params, CONFIG)
    planned = private(model, param_shapes(model), CONFIG).weights
    assert jax.tree.map(jnp.shape, weights) == jax.tree.map(lambda leaf: leaf.shape, planned)
    encode = model.config.embedding.encode
    for length in (1, 3, 8):
        ids, mask = jnp.ones((2, length), jnp.int32), model.config.mask(jnp.ones((2, length)))
        tokens = encode(ids, 40), encode(0 * ids, 2)
        shared = tokens
        if client:
            shared = model.apply({"params": client}, *tokens, method="embed")
        plain = model.apply({"params": params}, tokens[0], None, tokens[1])
        np.testing.assert_allclose(function(weights, shared, mask), plain, atol=1e-4)


def test_padding_stays_zero_and_needs_no_product_with_the_mask():
    model = model_of(num_hidden_layers=3)
    params = random_params(model)

    def states(params, embeddings, mask):
        lazy = defer(model.config, embeddings, mask, grouped_conv)
        encoded = model.apply({"params": params}, lazy, mask, method=lambda model, *args: model.encoder.encode(*args))
        return [state.arrays[0] for state in encoded.intermediates.hidden_states[:-1]]

    for state in jax.jit(states)(params, *shared_of(model, params, IDS, MASK)):
        assert (np.asarray(state)[~MASK] == 0).all()
        assert (np.asarray(state)[MASK] != 0).all()


# ------------------------------------------------------------------------------------------------------ a foreign part


@dataclasses.dataclass(frozen=True)
class Named:
    """A part that has a name and one call, and nothing else."""

    name: str
    call: Callable[..., Any]

    def __call__(self, *args, **options):
        return self.call(*args, **options)


def tanh_attention(query, key, value, mask, scalars, *, bias=None, product=jnp.matmul, dropout=None):
    scores = product(query, key.swapaxes(-1, -2)) + (0.0 if bias is None else bias)
    weights = jnp.tanh(scores) * mask.weight[:, None, None, :]
    return product(weights if dropout is None else dropout(weights), value)


FOREIGN = {
    "attention": Named("tanh", tanh_attention),
    "hidden_act": Named("shifted_relu", lambda x: jax.nn.relu(x - 0.5)),
    "layer_norm": Named("divide_by_two", lambda x, epsilon: x / 2.0),
}


@pytest.mark.parametrize("field", FOREIGN)
@pytest.mark.parametrize("attention", ["2quad_freediv", "softmax"])
def test_a_foreign_part_is_the_same_function_on_a_lazy_state_and_on_shares(field, attention, group):
    model = model_of(**{"attention": attention, field: FOREIGN[field]})
    params = random_params(model)
    params["bert"]["embeddings"]["word_embeddings"] *= 0.3
    assert_the_same_function(model, params)
    _, client, function, weights, _ = private(model, params, CONFIG, checked=True)
    logits, strain = secure.jit(function, parties=group("ABY3"))(
        weights, *shared_of(model, client, jnp.asarray(IDS), MASK)
    )
    np.testing.assert_allclose(logits, output(model, params), atol=0.02)
    np.testing.assert_array_equal(strain, 0.0)  # these parts are right for variances of any size


def test_a_foreign_attention_stands_beside_ours_in_one_layer():
    model = model_of(attention=[[FOREIGN["attention"], "2quad_freediv"], "2quad_freediv"])
    params = random_params(model)
    assert set(scalars_of(model.config.attention_of(0), 2)) == {"shift", "scale"}
    assert_the_same_function(model, params)


# --------------------------------------------------------------------------------------------------------------- cost


@pytest.fixture(scope="module")
def layer(group):
    """name -> (cost under ABY3, compiled program, logits) of one layer of four heads."""
    model = model_of(num_hidden_layers=1, num_attention_heads=4, hidden_size=32, intermediate_size=48)
    params = random_params(model)
    embeddings = np.random.default_rng(1).normal(size=(1, 8, 32)).astype(np.float32)
    found = {}
    mask = jax.device_get(model.config.mask(jnp.ones((1, 8))))
    _, _, function, weights, _ = private(model, params, secure.Config())

    def as_written(params, embeddings, mask):
        return model.apply({"params": params}, embeddings, mask, method="from_embeddings")

    for name, (fn, own) in {"as written": (as_written, params), "folded": (function, weights)}.items():
        run = secure.jit(fn, parties=group("ABY3"))
        logits, cost = run.run(own, embeddings, mask)
        found[name] = cost, run.program(own, embeddings, mask), logits
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
        lines = [line for line in program.splitlines() if "pphlo.multiply" in line and f"{size}x!pphlo.secret" in line]
        return [line.split("pphlo.multiply ")[1].split(" :")[0].split(", ") for line in lines]

    written, folded = layer["as written"][1], layer["folded"][1]
    assert written.count("pphlo.dot_general") == 2
    assert "pphlo.convolution" not in written
    assert folded.count("pphlo.convolution") == 4  # scores, context, and the squares of two normalisations
    assert "pphlo.dot_general" not in folded
    ((first, second),) = products(folded, 48)
    assert first == second
    assert len(products(written, 48)) == 3
