"""Parity is with transformers' own Flax BERT. transformers 5 has none: there, what it gave is read from data/.

pytest tests/models/test_bert.py --record     writes data/hf_bert.npz, with a transformers that has Flax models
"""

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import traverse_util
from safetensors.numpy import save_file

from flaxmpc.models import folder as folders
from flaxmpc.models.base import init_params, num_params, param_shapes
from flaxmpc.models.bert import (
    ARCHITECTURES,
    PRESETS,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)
from flaxmpc.models.params import flatten, unflatten
from flaxmpc.models.weights import read_params
from flaxmpc.nn.activation import ACTIVATIONS
from flaxmpc.nn.attention import ATTENTION
from flaxmpc.nn.embedding import EMBEDDINGS
from flaxmpc.nn.normalization import NORMALIZATIONS, Chebyshev

TINY = BertConfig(
    vocab_size=60,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=12,
)
LENGTHS = (7, 4, 1)


def inputs(config, lengths=LENGTHS, seed=0):
    """Ids, mask and token types of sentences of these lengths, padded to the first."""
    rng = np.random.default_rng(seed)
    shape = (len(lengths), lengths[0])
    mask = np.arange(lengths[0]) < np.array(lengths)[:, None]
    ids = rng.integers(1, config.vocab_size, shape)
    types = rng.integers(0, config.type_vocab_size, shape)
    return tuple(jnp.asarray(array * mask, jnp.int32) for array in (ids, np.ones(shape, int), types))


# ------------------------------------------------------------------------------------------------- parameter counts


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("tiny", 4_385_920),
        ("mini", 11_170_560),
        ("small", 28_763_648),
        ("medium", 41_373_184),
        ("base", 109_482_240),
        ("large", 335_141_888),
        ("minilm-l6", 22_713_216),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, count):
    config = PRESETS[name]
    head = config.num_labels * (config.hidden_size + 1)
    assert num_params(BertForSequenceClassification(config)) - head == count


def test_fresh_parameters_are_small_and_do_not_repeat():
    model = BertForSequenceClassification(dataclasses.replace(TINY, num_hidden_layers=1))
    params = init_params(model, seed=1)
    kernel = np.asarray(params["bert"]["layer_0"]["intermediate"]["kernel"])
    assert 0.015 < kernel.std() < 0.025
    other = init_params(model, seed=2)
    assert not np.allclose(kernel, other["bert"]["layer_0"]["intermediate"]["kernel"])
    np.testing.assert_array_equal(params["bert"]["layer_0"]["output"]["bias"], 0.0)
    np.testing.assert_array_equal(params["bert"]["layer_0"]["output_layer_norm"]["scale"], 1.0)


# --------------------------------------------------------------------------------------------- parity with transformers

HAS_FLAX = hasattr(transformers, "FlaxBertForSequenceClassification")
DATA = Path(__file__).parent / "data" / "hf_bert.npz"
CONFIGS = {
    "two heads": TINY,
    "wide": dataclasses.replace(TINY, hidden_size=24, num_attention_heads=3, num_hidden_layers=3, intermediate_size=80),
    "one layer": dataclasses.replace(TINY, num_hidden_layers=1, num_attention_heads=4, hidden_act="gelu_tanh"),
    "relu": dataclasses.replace(
        TINY, hidden_act="relu", layer_norm_eps=1e-3, type_vocab_size=3, id2label=tuple("abcde")
    ),
    "minilm-l6": None,
}
CASES = [(config, architecture) for config in CONFIGS for architecture in ARCHITECTURES]


@functools.cache
def case(config, architecture, minilm):
    """The model, its parameters: random, or the real encoder of MiniLM-L6 with a random head. And its inputs."""
    model_class = ARCHITECTURES[architecture]
    if CONFIGS[config] is None:
        model = model_class(PRESETS[config])
        fresh = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), param_shapes(model))
        params = flatten(read_params(minilm / "model.safetensors", fresh, fresh=lambda: fresh))
    else:
        model = model_class(CONFIGS[config])
        if architecture == "BertForQuestionAnswering":  # HF's takes two labels
            model = model_class(dataclasses.replace(model.config, id2label=("start", "end")))
        params = flatten(param_shapes(model))
    # numpy's own numbers: jax's differ between versions, and these must be those that were recorded.
    rng = np.random.default_rng(0)
    real = CONFIGS[config] is None
    for path, leaf in sorted(params.items()):
        if not real or not path.startswith("bert/"):
            noise = rng.normal(0, 0.05 if real else 0.3, leaf.shape)
            params[path] = (noise + path.endswith("/scale")).astype(np.float32)
    return model, unflatten(params), inputs(model.config)


@functools.cache
def ours(config, architecture, minilm):
    """Output, embeddings and hidden states, and attention weights."""
    model, params, (ids, mask, types) = case(config, architecture, minilm)
    apply = jax.jit(functools.partial(model.apply, method="outputs"))
    output, intermediates = apply({"params": params}, ids, mask, types)
    minus_infinity = jnp.where(mask, 0.0, -jnp.inf)[:, None, None, :]
    return {
        "output": np.asarray(output),
        "hidden_states": np.stack([intermediates.embeddings, *intermediates.hidden_states]),
        "attentions": np.stack([jax.nn.softmax(scores + minus_infinity) for scores in intermediates.scores]),
    }


def theirs(config, architecture, minilm, folder):
    """The same of transformers, which reads the folder that we write."""
    model, params, (ids, mask, types) = case(config, architecture, minilm)
    folders.save(folder, model, params, minilm)
    hf = getattr(transformers, f"Flax{architecture}").from_pretrained(folder)
    out = hf(ids, mask, types, output_hidden_states=True, output_attentions=True)
    answer = architecture == "BertForQuestionAnswering"
    return {
        "output": np.stack([out.start_logits, out.end_logits], -1) if answer else np.asarray(out.logits),
        "hidden_states": np.stack(out.hidden_states),
        "attentions": np.stack(out.attentions),
    }


def sample(arrays, size=24):
    """Elements from all over every array, repeated where it is smaller: what is recorded."""
    flat = [array.ravel() for array in arrays.values()]
    return np.stack([array[np.linspace(0, array.size - 1, size).astype(int)] for array in flat])


@pytest.fixture(scope="module")
def recorded(request):
    values = dict(np.load(DATA)) if DATA.is_file() else {}
    yield values
    if request.config.getoption("--record"):
        np.savez_compressed(DATA, **values)


@pytest.mark.skipif(not HAS_FLAX, reason="this transformers has no Flax BERT: see the recorded values")
@pytest.mark.parametrize(("config", "architecture"), CASES)
def test_parity_with_transformers(config, architecture, minilm, tmp_path, recorded, request):
    logging.getLogger("transformers").setLevel(logging.ERROR)
    expected = theirs(config, architecture, minilm, tmp_path / "model")
    for name, value in ours(config, architecture, minilm).items():
        assert value.shape == expected[name].shape
        assert np.abs(value - expected[name]).max() < 1e-4, name
    if request.config.getoption("--record"):
        recorded[f"{config}/{architecture}"] = sample(expected)


@pytest.mark.parametrize(("config", "architecture"), CASES)
def test_parity_with_what_transformers_gave(config, architecture, minilm, recorded):
    expected = recorded[f"{config}/{architecture}"]
    np.testing.assert_allclose(sample(ours(config, architecture, minilm)), expected, rtol=0, atol=1e-4)


def test_recorded_values_are_not_trivial(recorded):
    assert set(recorded) == {f"{config}/{architecture}" for config, architecture in CASES}
    for values in recorded.values():
        assert (values.std(1) > 0.02).all()


@pytest.mark.skipif(not HAS_FLAX, reason="this transformers has no Flax BERT")
def test_a_folder_of_transformers_is_read(tmp_path, minilm):
    """What transformers wrote with names, config and all of its own, and no token types given."""
    hf_config = transformers.BertConfig(
        vocab_size=30522, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    hf: Any = transformers.FlaxBertForSequenceClassification(hf_config, seed=7)
    parameters: dict[Any, Any] = dict(traverse_util.flatten_dict(hf.params))
    names = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
    tensors = {
        ".".join([*path[:-1], names[path[-1]]]): np.ascontiguousarray(value.T if path[-1] == "kernel" else value)
        for path, value in parameters.items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    hf_config.architectures = ["BertForSequenceClassification"]
    hf_config.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_bytes((minilm / "vocab.txt").read_bytes())

    loaded = folders.load(tmp_path)
    ids, mask, _ = inputs(loaded.model.config)
    expected = hf(ids, mask).logits
    assert expected.shape == (3, 3)
    np.testing.assert_allclose(jax.jit(loaded.model.apply)({"params": loaded.params}, ids, mask), expected, atol=1e-4)


# ------------------------------------------------------------------------------------------------------ the model alone


def run(model, variables, *args, **options) -> Any:
    return model.apply(variables, *args, **options)


@pytest.fixture(scope="module")
def tiny(random_params):
    """tiny(**changes) -> a sequence classifier with these parts, and parameters."""

    def make(architecture=BertForSequenceClassification, **changes):
        model = architecture(dataclasses.replace(TINY, **changes))
        params = {path: jnp.asarray(leaf) for path, leaf in flatten(random_params(model)).items()}
        for path, leaf in params.items():
            if path.endswith("attention/shift"):  # the per-head scalars as they start
                params[path] = jnp.full_like(leaf, 5.0)
            elif path.endswith("attention/scale"):
                params[path] = jnp.ones_like(leaf)
        return model, {"params": unflatten(params)}

    return make


def test_shapes_of_outputs_and_intermediates(tiny):
    ids, mask, types = inputs(TINY)
    shapes = {
        BertForSequenceClassification: (3, 2),
        BertForTokenClassification: (3, 7, 2),
        BertForQuestionAnswering: (3, 7, 2),
        BertForMaskedLM: (3, 7, 60),
    }
    assert set(shapes) == set(ARCHITECTURES.values())
    for architecture, shape in shapes.items():
        model, variables = tiny(architecture)
        output, intermediates = model.apply(variables, ids, mask, types, method="outputs")
        assert output.shape == shape
        assert intermediates.embeddings.shape == (3, 7, 16)
        assert [state.shape for state in intermediates.hidden_states] == [(3, 7, 16)] * 2
        assert [scores.shape for scores in intermediates.scores] == [(3, 2, 7, 7)] * 2
        assert [[one.shape for one in layer] for layer in intermediates.variances] == [[(3, 7, 1)] * 2] * 2
        np.testing.assert_array_equal(model.apply(variables, ids, mask, types), output)


def test_the_head_reads_the_last_state_and_the_pooled_first_token(tiny):
    model, variables = tiny()
    output, intermediates = run(model, variables, *inputs(TINY), method="outputs")
    params = variables["params"]
    pooler, classifier = params["bert"]["pooler"], params["classifier"]
    pooled = np.tanh(intermediates.hidden_states[-1][:, 0] @ pooler["kernel"] + pooler["bias"])
    np.testing.assert_allclose(output, pooled @ classifier["kernel"] + classifier["bias"], atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_init_gives_parameters_and_nothing_else(name):
    model = ARCHITECTURES[name](TINY)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.ones((2, 3), jnp.int32)))
    assert set(variables) == {"params"}


def test_types_of_numbers_are_as_flax_has_them():
    model = BertForSequenceClassification(TINY, dtype=jnp.bfloat16, param_dtype=jnp.float16)
    variables: Any = jax.jit(model.init)(jax.random.key(0), *inputs(TINY))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float16")}
    outputs: Any = jax.jit(functools.partial(model.apply, method="outputs"))(variables, *inputs(TINY))
    assert outputs.logits.dtype == jnp.bfloat16
    assert {state.dtype for state in outputs.intermediates.hidden_states} == {jnp.dtype("bfloat16")}
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), variables)
    exact = run(BertForSequenceClassification(TINY), wide, *inputs(TINY))
    np.testing.assert_allclose(outputs.logits.astype(jnp.float32), exact, atol=0.02)


def test_compiled_and_interpreted_are_equal(tiny):
    model, variables = tiny(attention=["softmax", "2quad"], hidden_act="gelu_puma")
    args = inputs(TINY)
    np.testing.assert_allclose(jax.jit(model.apply)(variables, *args), model.apply(variables, *args), atol=1e-5)


def test_parameters_may_be_numpys_and_ids_traced(tiny):
    """As parameters are loaded, and as a closure over them is compiled."""
    model, variables = tiny()
    ids, *_ = inputs(TINY)
    loaded = jax.device_get(variables)
    np.testing.assert_allclose(
        jax.jit(lambda ids: model.apply(loaded, ids))(ids), model.apply(variables, ids), atol=1e-5
    )


def test_the_halves_make_the_whole(tiny):
    """`embed` at the client, `from_embeddings` on shares."""
    model, variables = tiny()
    ids, mask, types = inputs(TINY)
    embeddings = model.apply(variables, ids, types, method="embed")
    output = model.apply(variables, embeddings, model.config.mask(mask), method="from_embeddings")
    np.testing.assert_array_equal(output, model.apply(variables, ids, mask, types))


def test_without_mask_every_token_counts_and_without_types_all_are_of_type_0(tiny):
    model, variables = tiny()
    ids, mask, types = inputs(TINY, lengths=(5, 5))
    np.testing.assert_allclose(model.apply(variables, ids), model.apply(variables, ids, mask, 0 * types), atol=1e-5)


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_every_embedding_gives_the_same_model(name, tiny):
    part = EMBEDDINGS[name]
    model, variables = tiny(embedding=name)
    ids, mask, types = inputs(TINY)
    tokens, encoded_types = part.encode(ids, TINY.vocab_size), part.encode(types, TINY.type_vocab_size)
    output = model.apply(variables, tokens, mask, encoded_types)
    model, variables = tiny()
    np.testing.assert_allclose(output, model.apply(variables, ids, mask, types), atol=1e-5)


def test_dropout_acts_while_training_and_repeats_for_a_key(tiny):
    model, variables = tiny(attention=["softmax", "2quad_freediv"])
    args = inputs(TINY)

    def train(seed, model=model) -> Any:
        return model.apply(variables, *args, deterministic=False, rngs={"dropout": jax.random.key(seed)})

    still = model.apply(variables, *args)
    np.testing.assert_array_equal(model.apply(variables, *args, deterministic=True), still)
    np.testing.assert_array_equal(train(0), train(0))
    assert np.abs(train(0) - train(1)).max() > 1e-3
    assert np.abs(train(0) - still).max() > 1e-3
    rates = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
    none = dict.fromkeys(rates, 0.0)
    off = BertForSequenceClassification(dataclasses.replace(model.config, **none))
    np.testing.assert_allclose(train(0, off), still, atol=1e-5)
    for rate in rates:
        one = BertForSequenceClassification(dataclasses.replace(model.config, **{**none, rate: 0.5}))
        assert np.abs(train(0, one) - still).max() > 1e-3, rate


@pytest.mark.parametrize(
    "attention", [*ATTENTION, ("softmax", "2quad_freediv")], ids=lambda a: a if isinstance(a, str) else "+".join(a)
)
def test_padding_changes_nothing(attention, tiny):
    model, variables = tiny(BertForTokenClassification, attention=[attention] * 2)
    apply = functools.partial(model.apply, variables)
    ids, mask, types = inputs(TINY, lengths=(9, 6))
    padded = apply(ids, mask, types)
    alone = apply(ids[1:, :6], mask[1:, :6], types[1:, :6])
    np.testing.assert_allclose(padded[1:, :6], alone, rtol=0, atol=1e-5 * max(1.0, np.abs(alone).max()))
    other_padding = ids.at[1, 6:].set(59)
    np.testing.assert_allclose(apply(other_padding, mask, types)[1, :6], padded[1, :6], atol=1e-5)


@pytest.mark.parametrize("attention", ["softmax", "softmax_freediv", "2quad_freediv", "scaling"])
def test_padding_stays_in_the_ranges_that_tokens_have(attention, tiny):
    """A padded query's weights are bounded by nothing; here its variances are a thousand times those of tokens."""
    ids, mask, types = inputs(TINY, lengths=(9, 6))
    model, variables = tiny(attention=attention)
    table = variables["params"]["bert"]["embeddings"]["word_embeddings"]
    variables["params"]["bert"]["embeddings"]["word_embeddings"] = table.at[0].set(100.0 * table[0])
    exact, intermediates = run(model, variables, ids, mask, types, method="outputs")
    seen = [[np.asarray(one)[mask > 0] for one in layer] for layer in intermediates.variances]
    chebyshev = [tuple(Chebyshev().calibrated(one, margin=1.01, tolerance=1e-4) for one in layer) for layer in seen]
    model = BertForSequenceClassification(dataclasses.replace(model.config, layer_norm=chebyshev))
    logits, intermediates = run(model, variables, ids, mask, types, method="outputs")
    np.testing.assert_allclose(logits, exact, atol=1e-3)
    for states in intermediates.hidden_states:
        np.testing.assert_allclose(states[1, 6:], jnp.broadcast_to(states[1, 0], (3, 16)), atol=1e-4)


@pytest.mark.parametrize(
    ("field", "registry"),
    [("attention", ATTENTION), ("hidden_act", ACTIVATIONS), ("layer_norm", NORMALIZATIONS), ("embedding", EMBEDDINGS)],
)
def test_every_choice_of_a_part_changes_the_traced_program(field, registry, tiny):
    """Or it would do nothing: the field's commonest bug. The name is given, as a user gives it."""

    def program(name):
        model, variables = tiny(**{field: name})
        ids, mask, types = inputs(TINY)
        part = model.config.embedding
        args = (part.encode(ids, TINY.vocab_size), mask, part.encode(types, TINY.type_vocab_size))
        return jax.jit(model.apply).lower(variables, *args).as_text()

    programs = {name: program(name) for name in registry}
    assert len(set(programs.values())) == len(registry)
    assert all(program(name) == programs[name] for name in list(registry)[:2])  # the text is that of the program alone


@pytest.mark.parametrize(
    ("field", "part"),
    [
        *(("attention", name) for name in ATTENTION if name != "softmax"),
        *(("hidden_act", name) for name in ACTIVATIONS if name != "gelu"),
        ("layer_norm", {"name": "layer_norm_chebyshev", "depth": 1}),  # so little that it shows
    ],
)
def test_a_list_changes_the_layer_that_it_names_and_no_other(field, part, tiny):
    _, variables = tiny(attention="2quad_freediv")  # has the parameters of every part
    usual = getattr(TINY, field)

    def states(**changes):
        model = BertForSequenceClassification(dataclasses.replace(TINY, **changes))
        given = inputs(TINY, lengths=(7, 7, 7))  # what padding holds depends on the LayerNorms of all layers
        return run(model, variables, *given, method="outputs").intermediates.hidden_states

    neither = states()
    second, first = states(**{field: [usual, part]}), states(**{field: [part, usual]})
    np.testing.assert_array_equal(second[0], neither[0])
    assert np.abs(second[1] - neither[1]).max() > 1e-6
    assert np.abs(first[0] - neither[0]).max() > 1e-6
    np.testing.assert_array_equal(states(**{field: [part, part]})[1], states(**{field: part})[1])


def test_heads_are_mixed_in_their_order(tiny):
    _, variables = tiny(attention="2quad_freediv")

    def first_state(attention):
        model = BertForSequenceClassification(dataclasses.replace(TINY, attention=[attention] * 2))
        return np.asarray(run(model, variables, *inputs(TINY), method="outputs").intermediates.hidden_states[0])

    mix = first_state(["softmax", "2quad_freediv"])
    assert np.abs(mix - first_state(["2quad_freediv", "softmax"])).max() > 1e-3
    np.testing.assert_allclose(first_state(["softmax", "softmax"]), first_state("softmax"), atol=1e-5)


def test_a_pair_of_layer_norms_is_after_attention_and_after_the_feed_forward(tiny):
    class Nothing:
        """Leaves of a LayerNorm its bias alone."""

        name = "nothing"

        def __call__(self, x, epsilon):
            return 0.0 * x

    for pair in (("layer_norm", Nothing()), (Nothing(), "layer_norm")):
        model, variables = tiny(layer_norm=[pair, "layer_norm"])
        first = run(model, variables, *inputs(TINY), method="outputs").intermediates.hidden_states[0]
        bias = variables["params"]["bert"]["layer_0"]["output_layer_norm"]["bias"]
        assert np.array_equal(first, np.broadcast_to(bias, first.shape)) == (pair[0] == "layer_norm")
        assert np.ptp(first, axis=(0, 1)).max() < 1e-6  # either way every token becomes the same


def test_only_parts_with_scalars_have_parameters_for_them(tiny):
    _, variables = tiny(attention=["softmax", ["2quad_freediv", "relu_freediv"]])
    bert = variables["params"]["bert"]
    own = [set(bert[f"layer_{i}"]["attention"]) - {"query", "key", "value", "output"} for i in range(2)]
    assert own == [set(), {"shift", "scale"}]


def test_gradients_of_the_whole_model_are_finite(tiny):
    """For every activation and attention at once: one layer each."""
    attention = [*ATTENTION, *["softmax"] * max(0, len(ACTIVATIONS) - len(ATTENTION))]
    activation = [*ACTIVATIONS, *["gelu"] * max(0, len(ATTENTION) - len(ACTIVATIONS))]
    model, variables = tiny(attention=attention, hidden_act=activation, num_hidden_layers=len(attention))
    grads = jax.grad(lambda variables: jnp.square(model.apply(variables, *inputs(TINY))).sum())(variables)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", ["public", "secret"])
def test_more_tokens_than_positions_are_refused(name, tiny):
    model, variables = tiny(embedding=name)
    with pytest.raises(ValueError, match="a text has 13 tokens, but the model has 12 positions"):
        model.apply(variables, model.config.embedding.encode(jnp.ones((1, 13), jnp.int32), 60))


def test_fresh_parameters_are_those_of_flaxs_init_for_the_seed_alone():
    model = BertForSequenceClassification(TINY)
    first = init_params(model, seed=1)
    variables: Any = jax.jit(model.init)(jax.random.key(1), *inputs(TINY))
    chex.assert_trees_all_close(first, variables["params"], atol=1e-7)
    chex.assert_trees_all_equal_shapes_and_dtypes(first, param_shapes(model))
    kept = jax.device_get(first)
    first["bert"].clear()  # what was done to others' changes nothing
    chex.assert_trees_all_equal(kept, jax.device_get(init_params(BertForSequenceClassification(TINY), seed=1)))
