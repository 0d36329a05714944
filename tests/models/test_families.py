"""Every family: parity with transformers, folders read and written, the same function on a lazy state and on shares.

pytest tests/models/test_families.py --record     writes data/hf_families.npz, with a transformers that has the models,
in Flax, or for MPNet and CamemBERT in PyTorch
"""

import dataclasses
import functools
import json
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from flaxmpc import secure
from flaxmpc.models import folder as folders
from flaxmpc.models.base import defer, families, family_of, family_of_params, param_shapes, register
from flaxmpc.models.bert import BERT
from flaxmpc.models.electra import ELECTRA
from flaxmpc.models.mpnet import MPNET, MPNetConfig, buckets
from flaxmpc.models.params import flatten, unflatten
from flaxmpc.models.roberta import CAMEMBERT, ROBERTA, XLM_ROBERTA, RobertaForSequenceClassification
from flaxmpc.models.weights import hf_name
from flaxmpc.nn.attention import ATTENTION
from flaxmpc.nn.product import grouped_conv
from flaxmpc.serve.private import private

slow = pytest.mark.slow

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 14,
}
FAMILIES = {family.config.model_type: family for family in families()}
# Without those that differ from another in names alone: what runs on shares is tried once.
DISTINCT = {family.prefix: family for family in reversed(FAMILIES.values())}
MODELS = {model.__name__: (family, model) for family in FAMILIES.values() for model in family.models}
DATA = Path(__file__).parent / "data" / "hf_families.npz"
LENGTHS = (8, 5, 2)
MASK = np.arange(8) < np.array(LENGTHS)[:, None]


def config_of(family, **changes):
    return family.config(**{**SHAPE, **changes})


@functools.cache
def case(name: str, **changes: Any):
    """A model by the name of its class, parameters of which no two are alike, and inputs."""
    family, model_class = MODELS[name]
    if name.endswith("QuestionAnswering"):  # HF's takes two labels
        changes = {**changes, "id2label": ("start", "end")}
    model = model_class(config_of(family, **changes))
    rng = np.random.default_rng(0)
    params = {
        path: (rng.normal(0, 0.3, leaf.shape) + path.endswith("/scale")).astype(np.float32)
        for path, leaf in sorted(flatten(param_shapes(model)).items())
    }
    pad = model.config.pad_token_id
    ids = np.where(MASK, rng.integers(2, SHAPE["vocab_size"], MASK.shape), pad)
    return model, unflatten(params), (jnp.asarray(ids, jnp.int32), jnp.asarray(MASK, jnp.int32))


@functools.cache
def ours(name: str) -> dict[str, np.ndarray]:
    """Output and hidden states at the tokens."""
    model, params, inputs = case(name)
    output: Any = jax.jit(functools.partial(model.apply, method="outputs"))({"params": params}, *inputs)
    logits = np.asarray(output.logits)
    states = np.stack([output.intermediates.embeddings, *output.intermediates.hidden_states])
    return {"output": logits if logits.ndim == 2 else logits[MASK], "hidden_states": states[:, MASK]}


def theirs(name: str, folder: Path) -> dict[str, np.ndarray]:
    """The same of transformers, which reads the weights and the config that we write."""
    model, params, (ids, mask) = case(name)
    write(folder, model, params)
    # Flax's ELECTRA takes them as 1 where it is not told.
    types = {"token_type_ids": jnp.zeros_like(ids)} if model.config.has_token_types else {}
    if hasattr(transformers, f"Flax{name}"):
        hf = getattr(transformers, f"Flax{name}").from_pretrained(folder)
        out = hf(ids, mask, **types, output_hidden_states=True)
    else:
        torch = pytest.importorskip("torch")
        hf = getattr(transformers, name).from_pretrained(folder)
        given = (torch.from_numpy(np.asarray(array, np.int64)) for array in (ids, mask))
        with torch.no_grad():
            out = hf(*given, output_hidden_states=True)
    states = np.stack([np.asarray(state) for state in out.hidden_states])
    if name.endswith("QuestionAnswering"):
        logits = np.stack([np.asarray(out.start_logits), np.asarray(out.end_logits)], -1)
    else:
        logits = np.asarray(out.logits)
    return {"output": logits if logits.ndim == 2 else logits[MASK], "hidden_states": states[:, MASK]}


def applied(model, params, *args, **options) -> Any:
    return model.apply({"params": params}, *args, **options)


def write(folder: Path, model, params) -> None:
    folder.mkdir()
    folders.write_params(folder / "model.safetensors", params)
    (folder / "config.json").write_text(json.dumps(folders.described(model)))


def sample(arrays: dict[str, np.ndarray], size: int = 24) -> np.ndarray:
    """Elements from all over every array, repeated where it is smaller: what is recorded."""
    flat = [array.ravel() for array in arrays.values()]
    return np.stack([array[np.linspace(0, array.size - 1, size).astype(int)] for array in flat])


@pytest.fixture(scope="module")
def recorded(request):
    values = dict(np.load(DATA)) if DATA.is_file() else {}
    yield values
    if request.config.getoption("--record"):
        np.savez_compressed(DATA, **values)


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name][0] is not BERT])
def test_parity_with_transformers(name, tmp_path, recorded, request):
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if not hasattr(transformers, f"Flax{name}"):
        pytest.importorskip("torch", reason="this transformers has no such Flax model: see the recorded values")
    expected = theirs(name, tmp_path / "model")
    for what, value in ours(name).items():
        assert value.shape == expected[what].shape
        np.testing.assert_allclose(value, expected[what], rtol=0, atol=1e-4, err_msg=what)
    if request.config.getoption("--record"):
        recorded[name] = sample(expected)


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name][0] is not BERT])
def test_parity_with_what_transformers_gave(name, recorded):
    np.testing.assert_allclose(sample(ours(name)), recorded[name], rtol=0, atol=1e-4)


def test_recorded_values_are_not_trivial(recorded):
    assert set(recorded) == {name for name in MODELS if MODELS[name][0] is not BERT}
    for values in recorded.values():
        assert (values.std(1) > 0.02).all()


# ----------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_survives(name, tmp_path):
    model, params, _ = case(name)
    write(tmp_path / "model", model, params)
    read = folders.read_model(tmp_path / "model")
    assert type(read) is type(model)
    assert read.config == model.config
    found = folders.read_params(tmp_path / "model" / "model.safetensors", param_shapes(read))
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(flatten(found)[path], leaf)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize(
    ("changes", "own"),
    [
        ({}, False),
        ({"hidden_act": "gelu_tanh"}, False),
        ({"attention": "2quad"}, True),
        ({"hidden_act": "quad"}, True),
        ({"attention": ["softmax", "2quad"]}, True),
        ({"layer_norm": "layer_norm_chebyshev"}, True),
        ({"hidden_act": ["gelu", "relu"]}, True),
    ],
    ids=str,
)
def test_a_folder_with_parts_that_hf_lacks_is_no_model_of_hfs(family, changes, own, tmp_path):
    config = config_of(family, **changes)
    said = config.to_dict()
    assert said["model_type"] == ("flaxmpc-" if own else "") + family.config.model_type
    (tmp_path / "config.json").write_text(json.dumps(said))
    assert folders.read_config(tmp_path) == config
    if own:
        with pytest.raises(ValueError, match=r"model_type|model type"):
            transformers.AutoConfig.from_pretrained(tmp_path)
    else:
        assert transformers.AutoConfig.from_pretrained(tmp_path).hidden_size == 16


def test_defaults_are_those_of_hf(tmp_path):
    for model_type in FAMILIES:
        theirs = transformers.AutoConfig.for_model(model_type)
        theirs.save_pretrained(tmp_path)
        said = json.loads((tmp_path / "config.json").read_text())
        small = {"model_type": model_type}
        (tmp_path / "config.json").write_text(json.dumps(small))
        default = folders.read_config(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(said))
        assert folders.read_config(tmp_path) == default, model_type


@pytest.mark.parametrize(
    "model_type", ["gpt2", "albert", "Bert", "", 3, None, ["bert"], "flaxmpc-", "flaxmpc-flaxmpc-bert"]
)
def test_an_unknown_family_is_named(model_type, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ValueError, match="unknown model_type") as error:
        folders.read_config(tmp_path)
    assert "Known: bert, camembert, distilbert, electra, mpnet, roberta, xlm-roberta" in str(error.value)


@pytest.mark.parametrize("family", [BERT, XLM_ROBERTA], ids=lambda family: family.config.model_type)
def test_an_architecture_of_another_family_is_refused(family, tmp_path):
    said = {**config_of(family).to_dict(), "architectures": ["RobertaForMaskedLM"]}
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match=f"a RobertaForMaskedLM is none of model_type '{family.config.model_type}'"):
        folders.read_model(tmp_path)


def test_a_family_is_registered_once():
    with pytest.raises(ValueError, match="a family like 'roberta' is registered"):
        register(dataclasses.replace(ROBERTA))
    assert family_of("roberta") is ROBERTA
    with pytest.raises(ValueError, match="a family like 'xlm-roberta' is registered"):
        register(ROBERTA.kin("xlm-roberta", "Own"))
    with pytest.raises(ValueError, match="a family like 'other' is registered: 'roberta'"):  # the classes' names
        register(ROBERTA.kin("other", "Roberta"))
    for change in ({"names": ()}, {"tied": {}}, {"heads": ("other.",)}):
        with pytest.raises(ValueError, match="a family like 'other' is registered: 'roberta'"):
            register(dataclasses.replace(ROBERTA.kin("other", "Other"), **change))


def test_kin_are_the_same_model_under_names_of_their_own():
    """Parameters do not tell them apart, and need not: the weights of all have the same names."""
    assert XLM_ROBERTA.config.__name__ == "XLMRobertaConfig"
    assert [model.__name__ for model in CAMEMBERT.models] == [
        f"CamembertFor{task}"
        for task in ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM")
    ]
    for family in (XLM_ROBERTA, CAMEMBERT):
        for ours, theirs in zip(family.models, ROBERTA.models, strict=True):
            assert issubclass(ours, theirs)
            shapes = param_shapes(ours(config_of(family)))
            assert family_of_params(shapes) is ROBERTA
            assert {hf_name(path, family) for path in flatten(shapes)} == {
                hf_name(path, ROBERTA) for path in flatten(shapes)
            }
        assert (family.names, family.tied, family.heads) == (ROBERTA.names, ROBERTA.tied, ROBERTA.heads)


@pytest.mark.parametrize("task", ["SequenceClassification", "MaskedLM"])
@pytest.mark.parametrize(
    ("family", "prefix"), [(XLM_ROBERTA, "XLMRoberta"), (CAMEMBERT, "Camembert")], ids=["xlm-roberta", "camembert"]
)
def test_a_kins_folder_of_hfs_is_read_and_written_back(family, prefix, task, sentencepiece, tmp_path):
    name, given = f"{prefix}For{task}", tmp_path / "given"
    tokenizer = sentencepiece(family.config.model_type)
    model_class = MODELS[name][1]
    model = model_class(config_of(family, vocab_size=tokenizer.get_vocab_size(), type_vocab_size=1))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), param_shapes(model))
    write(given, model, params)
    theirs = getattr(transformers, f"{prefix}Config").from_pretrained(given)
    (given / "config.json").write_text(json.dumps({**theirs.to_dict(), "architectures": [name]}))
    (given / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    tokenizer.save(str(given / "tokenizer.json"))

    loaded = folders.load(given)
    assert type(loaded.model) is model_class
    saved = folders.save(tmp_path / "saved", loaded.model, loaded.params, given)
    said = json.loads((saved / "config.json").read_text())
    assert (said["model_type"], said["architectures"]) == (family.config.model_type, [name])
    assert transformers.AutoConfig.from_pretrained(saved).pad_token_id == 1
    again = folders.load(saved)
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(flatten(again.params)[path], leaf)
    assert again.tokenizer("un bon film <mask>")["input_ids"] == tokenizer.encode("un bon film <mask>").ids

    changes = {"attention": "2quad_freediv", "id2label": ("a", "b", "c")}
    student = folders.load_pretrained(given, **changes)  # a classifier of the same family
    assert type(student.model) is family.models[0]
    kept = folders.save(tmp_path / "kept", student.model, student.params, given)
    assert json.loads((kept / "config.json").read_text())["model_type"] == f"flaxmpc-{family.config.model_type}"
    assert type(folders.load(kept).model) is family.models[0]
    with pytest.raises(ValueError, match=r"model_type|model type"):
        transformers.AutoConfig.from_pretrained(kept)


# -------------------------------------------------------------------------------------------------- the same function


def lazily(model, params, ids, mask) -> np.ndarray:
    def on_shares(params, embeddings, mask):
        lazy = defer(model.config, embeddings, mask, grouped_conv)
        return applied(model, params, lazy, mask, method="from_embeddings")

    embeddings = applied(model, params, ids, method="embed")
    seen = model.config.mask(mask)
    function, weights = secure.hoist(on_shares, params, embeddings, seen, dtype="float64")
    return np.asarray(function(weights, embeddings, seen))


@pytest.mark.parametrize("name", [model.__name__ for family in DISTINCT.values() for model in family.models])
def test_every_model_is_the_same_on_a_lazy_state(name):
    model, params, inputs = case(name, attention="2quad_freediv", hidden_act="quad")
    plain = np.asarray(applied(model, params, *inputs))
    found = lazily(model, params, *inputs)
    if plain.ndim == 3:
        plain, found = plain[MASK], found[MASK]
    np.testing.assert_allclose(found, plain, rtol=0, atol=2e-5 * max(1.0, np.abs(plain).max()))


@pytest.mark.parametrize("family", DISTINCT.values(), ids=lambda family: family.prefix)
def test_layers_that_share_scores_are_the_same_on_a_lazy_state(family):
    shared = {"attention": "2quad_freediv", "hidden_act": "quad", "num_hidden_layers": 3, "layers_sharing_scores": 2}
    model, params, inputs = case(family.models[0].__name__, **shared)
    plain = np.asarray(applied(model, params, *inputs))
    np.testing.assert_allclose(lazily(model, params, *inputs), plain, atol=2e-5 * max(1.0, np.abs(plain).max()))


# The other families differ from BERT, whose attention is tried elsewhere, in what enters and leaves the layers.
ON_SHARES = [
    pytest.param(family, attention, marks=() if family is MPNET or attention in ("softmax", "2quad_freediv") else slow)
    for family in DISTINCT.values()
    if family is not BERT
    for attention in (*ATTENTION, ("softmax", "2quad_freediv"))
]


@pytest.mark.parametrize(("family", "attention"), ON_SHARES, ids=lambda value: getattr(value, "prefix", str(value)))
def test_every_attention_in_every_family_is_the_same_on_shares(family, attention, group):
    name = family.models[0].__name__
    model, params, (ids, mask) = case(name, attention=(attention,), hidden_act="quad", num_hidden_layers=1)
    flat = flatten(params)
    for path in flat:
        if path.endswith("kernel"):
            flat[path] = 0.5 * flat[path]
        elif path.endswith("attention/scale"):
            flat[path] = 0.1 + np.abs(flat[path])
        elif attention == "2relu" and path.endswith(("query/bias", "key/bias")):
            flat[path] = flat[path] + 2.0  # where no score is positive nothing is left to divide by
    params = unflatten(flat)
    plain = np.asarray(applied(model, params, ids, mask))
    _, client, function, weights, _ = private(model, params, secure.Config())
    embeddings = applied(model, client, ids, method="embed")
    shared = jax.device_get((embeddings, model.config.mask(mask)))
    tolerance = max(1.0, np.abs(plain).max())
    np.testing.assert_allclose(function(weights, *shared), plain, rtol=0, atol=2e-5 * tolerance)
    ours = secure.jit(function, parties=group("ABY3"))(weights, *shared)
    np.testing.assert_allclose(ours, plain, rtol=0, atol=0.02 * tolerance)


@pytest.mark.parametrize("family", DISTINCT.values(), ids=DISTINCT)
@pytest.mark.parametrize("embedding", ["public", "secret"])
def test_weights_are_the_same_for_every_length(family, embedding):
    model, params, _ = case(family.models[0].__name__, attention="2quad_freediv", embedding=embedding)
    _, client, function, weights, _ = private(model, params, secure.Config())
    part, config = model.config.embedding, model.config
    for length in (1, 3, config.num_positions):
        ids = jnp.full((2, length), 5, jnp.int32)
        tokens = [part.encode(ids, config.vocab_size)]
        if config.shares_types:
            tokens.append(part.encode(0 * ids, config.type_vocab_size))
        shared = tuple(tokens) if not client else applied(model, client, *tokens, method="embed")
        plain = applied(model, params, tokens[0])
        found = function(weights, shared, config.mask(jnp.ones((2, length))))
        np.testing.assert_allclose(found, plain, rtol=0, atol=1e-4)


# --------------------------------------------------------------------------------------------------------- one family


@pytest.mark.parametrize("model_type", ["distilbert", "mpnet"])
def test_a_family_without_token_types_has_none(model_type, tmp_path):
    family = FAMILIES[model_type]
    with pytest.raises(ValueError, match=f"type_vocab_size 2 is not 0, as {model_type} has no types"):
        config_of(family, type_vocab_size=2)
    said = config_of(family).to_dict() | {"type_vocab_size": 2}  # which HF's model does not look at
    (tmp_path / "config.json").write_text(json.dumps(said))
    assert folders.read_config(tmp_path) == config_of(family)
    with pytest.raises(ValueError, match="type_vocab_size 0 is not a whole number in 1"):
        config_of(BERT, type_vocab_size=0)


def test_positions_start_after_paddings():
    model, params, (ids, _) = case("RobertaForSequenceClassification")
    table = params["roberta"]["embeddings"]["position_embeddings"]
    moved = np.concatenate([100 + table[:2], table[2:]])
    changed = {**params, "roberta": {**params["roberta"], "embeddings": {
        **params["roberta"]["embeddings"], "position_embeddings": moved}}}  # fmt: skip
    same, other = (applied(model, p, ids, method="embed") for p in (params, changed))
    np.testing.assert_array_equal(same, other)
    assert model.config.num_positions == model.config.longest == 12
    with pytest.raises(ValueError, match="a text has 13 tokens, but the model has 12 positions"):
        applied(model, params, jnp.ones((1, 13), jnp.int32))
    with pytest.raises(ValueError, match="max_position_embeddings 2 leaves none for a text"):
        RobertaForSequenceClassification(config_of(ROBERTA, max_position_embeddings=2))


@pytest.mark.parametrize(
    ("family", "field", "allowed", "refused"),
    [
        (ELECTRA, "embedding_size", (1, 16, 16_384), (0, -1, 16_385, 2.0, True, "128", None, [128])),
        (MPNET, "relative_attention_num_buckets", (4, 32, 511), (0, 1, 3, 512, -32, 32.0, True, "32", None)),
    ],
    ids=["electra", "mpnet"],
)
def test_a_field_of_one_family_is_checked(family, field, allowed, refused, tmp_path):
    for value in allowed:
        assert getattr(config_of(family, **{field: value}), field) == value
    for value in refused:
        (tmp_path / "config.json").write_text(json.dumps(config_of(family).to_dict() | {field: value}))
        message = rf"config\.json: {field} .* is not a whole number in {allowed[0]}\.\.{allowed[-1]}"
        with pytest.raises(ValueError, match=message):
            folders.read_config(tmp_path)


def test_embeddings_as_wide_as_the_states_have_no_projection():
    """As in ELECTRA-Base and -Large."""
    names = []
    for size in (16, 128):
        shapes = param_shapes(ELECTRA.models[0](config_of(ELECTRA, embedding_size=size)))
        names.append({hf_name(path, ELECTRA) for path in flatten(shapes)})
        assert shapes["electra"]["embeddings"]["word_embeddings"].shape == (SHAPE["vocab_size"], size)
    assert names[1] - names[0] == {"electra.embeddings_project.weight", "electra.embeddings_project.bias"}
    assert names[0] < names[1]
    with pytest.raises(ValueError, match="a model of 1009782272 parameters"):
        config_of(ELECTRA, vocab_size=61_616, embedding_size=16_384)


@pytest.mark.parametrize("count", [4, 8, 16, 32, 511])
def test_buckets_of_distances(count):
    """Written out: the first quarter exact, then logarithmic up to 128, the other half for what comes after."""
    half, exact = count // 2, count // 4
    distances = np.arange(-200, 201)
    for distance, found in zip(distances, buckets(distances, count), strict=True):
        away = abs(int(distance))
        far = exact + int(np.log(max(away, 1) / exact) / np.log(128 / exact) * (half - exact) + 1e-6)
        expected = (away if away < exact else min(far, half - 1)) + half * (distance > 0)
        assert found == expected, distance


def test_the_bias_of_two_tokens_is_that_of_their_distance():
    model, params, _ = case("MPNetForSequenceClassification")
    config: MPNetConfig = model.config
    table = params["mpnet"]["relative_attention_bias"]["table"]
    for n in (1, 2, 5, config.num_positions):
        bias = applied(model, params, n, method=lambda model, n: model.encoder.position_bias(n))
        assert bias.shape == (1, 2, n, n)
        for query in range(n):
            for key in range(n):
                row = table[buckets(np.array([key - query]), config.relative_attention_num_buckets)[0]]
                np.testing.assert_array_equal(bias[0, :, query, key], row)
