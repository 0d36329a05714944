import dataclasses

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flaxmpc.models.bert import ARCHITECTURES, BertForMaskedLM, BertForSequenceClassification, param_shapes
from flaxmpc.models.config import BertConfig
from flaxmpc.models.params import flatten
from flaxmpc.models.weights import WeightsError, hf_name, read_params, read_tensors, write_params

TINY = BertConfig(
    vocab_size=50,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=128,
    max_position_embeddings=16,
    attention=["2quad_freediv", "softmax"],
)
MODEL = BertForSequenceClassification(TINY)
SHAPES = param_shapes(MODEL)

# As HF's BERT names them, and their shapes there: a dense layer's weight is (out, in).
LAYER = {
    **{f"attention.self.{name}.weight": (64, 64) for name in ("query", "key", "value")},
    **{f"attention.self.{name}.bias": (64,) for name in ("query", "key", "value")},
    "attention.output.dense.weight": (64, 64),
    "attention.output.dense.bias": (64,),
    "attention.output.LayerNorm.weight": (64,),
    "attention.output.LayerNorm.bias": (64,),
    "intermediate.dense.weight": (128, 64),
    "intermediate.dense.bias": (128,),
    "output.dense.weight": (64, 128),
    "output.dense.bias": (64,),
    "output.LayerNorm.weight": (64,),
    "output.LayerNorm.bias": (64,),
}
EMBEDDINGS = {
    "bert.embeddings.word_embeddings.weight": (50, 64),
    "bert.embeddings.position_embeddings.weight": (16, 64),
    "bert.embeddings.token_type_embeddings.weight": (2, 64),
    "bert.embeddings.LayerNorm.weight": (64,),
    "bert.embeddings.LayerNorm.bias": (64,),
}
POOLER = {"bert.pooler.dense.weight": (64, 64), "bert.pooler.dense.bias": (64,)}
ENCODER = {f"bert.encoder.layer.{i}.{name}": shape for i in range(2) for name, shape in LAYER.items()}
HEADS = {
    "BertForSequenceClassification": {**POOLER, "classifier.weight": (2, 64), "classifier.bias": (2,)},
    "BertForTokenClassification": {"classifier.weight": (2, 64), "classifier.bias": (2,)},
    "BertForQuestionAnswering": {"qa_outputs.weight": (2, 64), "qa_outputs.bias": (2,)},
    "BertForMaskedLM": {
        "cls.predictions.transform.dense.weight": (64, 64),
        "cls.predictions.transform.dense.bias": (64,),
        "cls.predictions.transform.LayerNorm.weight": (64,),
        "cls.predictions.transform.LayerNorm.bias": (64,),
        "cls.predictions.bias": (50,),
    },
}


@pytest.fixture
def params(random_params):
    return random_params(MODEL)


@pytest.fixture
def path(tmp_path, params):
    write_params(tmp_path / "model.safetensors", params)
    return tmp_path / "model.safetensors"


def rewrite(path, change):
    """Saves what `change` makes of the file's tensors."""
    save_file({name: np.ascontiguousarray(value) for name, value in change(load_file(path)).items()}, path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hf_names_and_shapes_are_written_and_read_back(architecture, tmp_path, random_params):
    model = ARCHITECTURES[architecture](dataclasses.replace(TINY, attention="softmax"))
    params, path = random_params(model), tmp_path / "model.safetensors"
    write_params(path, params)
    stored = load_file(path)
    assert {name: value.shape for name, value in stored.items()} == {**EMBEDDINGS, **ENCODER, **HEADS[architecture]}
    query = params["bert"]["layer_1"]["attention"]["query"]["kernel"]
    np.testing.assert_array_equal(stored["bert.encoder.layer.1.attention.self.query.weight"], query.T)
    chex.assert_trees_all_equal(read_params(path, param_shapes(model)), params)


def test_per_head_scalars_are_written_beside(path, params):
    stored = load_file(path)
    own = set(stored) - set(EMBEDDINGS) - set(ENCODER) - set(HEADS["BertForSequenceClassification"])
    assert own == {"bert.encoder.layer.0.attention.self.shift", "bert.encoder.layer.0.attention.self.scale"}
    chex.assert_trees_all_equal(read_params(path, SHAPES), params)


def test_names_may_lack_the_prefix(path, params):
    rewrite(path, lambda tensors: {name.removeprefix("bert."): value for name, value in tensors.items()})
    chex.assert_trees_all_equal(read_params(path, SHAPES), params)


def test_a_masked_lm_may_lack_the_prefix(tmp_path, random_params):
    model, path = BertForMaskedLM(dataclasses.replace(TINY, attention="softmax")), tmp_path / "model.safetensors"
    params = random_params(model)
    write_params(path, params)
    rewrite(path, lambda tensors: {name.removeprefix("bert."): value for name, value in tensors.items()})
    chex.assert_trees_all_equal(read_params(path, param_shapes(model)), params)


def test_old_names_of_the_layer_norm_are_read(path, params):
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def change(tensors):
        for new, name in old.items():
            tensors = {key.replace(new, name): value for key, value in tensors.items()}
        assert "bert.embeddings.LayerNorm.gamma" in tensors
        return tensors

    rewrite(path, change)
    chex.assert_trees_all_equal(read_params(path, SHAPES), params)


def test_what_is_no_parameter_is_passed_over(path, params):
    redundant = {
        "bert.embeddings.position_ids": np.arange(16)[None],
        "cls.predictions.decoder.weight": np.zeros((50, 64), np.float32),
        "cls.predictions.decoder.bias": np.zeros(50, np.float32),
    }
    rewrite(path, lambda tensors: {**tensors, **redundant})
    chex.assert_trees_all_equal(read_params(path, SHAPES), params)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats_are_read_as_float32(path, params, dtype):
    rewrite(path, lambda tensors: {name: value.astype(dtype) for name, value in tensors.items()})
    read = read_params(path, SHAPES)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(read))
    chex.assert_trees_all_close(read, params, rtol=1e-3, atol=1e-6)


def test_bfloat16_is_read_as_float32(path, params):
    from safetensors.flax import save_file as save_jax

    save_jax({name: jax.numpy.asarray(value, "bfloat16") for name, value in load_file(path).items()}, path)
    read = read_params(path, SHAPES)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(read))
    chex.assert_trees_all_close(read, params, rtol=1e-2)


def test_every_misfit_is_in_one_list(path):
    def change(tensors):
        del tensors["bert.pooler.dense.bias"], tensors["bert.encoder.layer.1.output.dense.weight"]
        return {**tensors, "bert.extra": np.zeros(1), "classifier.weight": np.zeros((7, 64), np.float32)}

    rewrite(path, change)
    with pytest.raises(WeightsError) as error:
        read_params(path, SHAPES)
    assert sorted(error.value.missing) == ["bert.encoder.layer.1.output.dense.weight", "bert.pooler.dense.bias"]
    assert error.value.unexpected == ["bert.extra"]
    assert len(error.value.wrong_shape) == 1
    lines = str(error.value).splitlines()
    assert lines[0] == f"{path} does not fit the model:"
    assert set(lines[1:]) == {
        "  missing: bert.encoder.layer.1.output.dense.weight",
        "  missing: bert.pooler.dense.bias",
        "  unexpected: bert.extra",
        "  wrong shape: classifier.weight: (64, 7) in the file, (64, 2) in the model",
    }


def test_a_fresh_head_fills_what_only_a_head_may_lack(path, params, random_params):
    own = ("classifier.", "bert.pooler.", "bert.encoder.layer.0.attention.self.s")
    encoder = {name: value for name, value in load_file(path).items() if not name.startswith(own)}
    save_file({**encoder, "cls.seq_relationship.bias": np.zeros(2, np.float32)}, path)
    fresh = random_params(MODEL, 1)
    read = flatten(read_params(path, SHAPES, fresh=fresh))
    flat_fresh, flat = (flatten(tree) for tree in (fresh, params))
    for name, value in read.items():
        head = name.startswith(("classifier/", "bert/pooler/")) or name.endswith(("/shift", "attention/scale"))
        np.testing.assert_array_equal(value, (flat_fresh if head else flat)[name])

    del encoder["bert.embeddings.LayerNorm.bias"]
    save_file(encoder, path)
    with pytest.raises(WeightsError, match=r"missing: bert\.embeddings\.LayerNorm\.bias"):
        read_params(path, SHAPES, fresh=fresh)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_weights_are_refused_by_name(path, bad):
    def change(tensors):
        tensors["classifier.bias"] = np.array([0.0, bad], np.float32)
        return tensors

    rewrite(path, change)
    with pytest.raises(ValueError, match=r"classifier\.bias holds non-finite weights") as error:
        read_params(path, SHAPES)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, -1])
def test_a_truncated_file_is_refused_by_name(path, keep):
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read as safetensors"):
        read_tensors(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors does not exist"):
        read_tensors(tmp_path / "model.safetensors")


def test_an_unknown_parameter_has_no_name():
    with pytest.raises(ValueError, match="no HF name is known for the parameter 'bert/other/kernel'"):
        hf_name("bert/other/kernel")


def test_matrices_are_stored_in_few_bits_and_vectors_whole(path, params, tmp_path):
    small = tmp_path / "small.safetensors"
    write_params(small, params, word_embedding_bits=4, matrix_bits=8)
    stored = load_file(small)
    assert stored["bert.embeddings.word_embeddings.weight"].dtype == np.uint8
    assert stored["bert.embeddings.position_embeddings.weight"].dtype == np.int8
    assert stored["bert.encoder.layer.0.output.dense.weight"].dtype == np.int8
    assert stored["bert.encoder.layer.0.output.dense.bias"].dtype == np.float32
    assert small.stat().st_size < path.stat().st_size / 3

    read = read_params(small, SHAPES)
    for (name, ours), whole in zip(flatten(read).items(), flatten(params).values(), strict=True):
        largest = 7 if "word" in name else 127
        bound = 0.6 * np.abs(whole).max() / largest if whole.ndim == 2 else 0.0
        assert np.abs(ours - whole).max() <= bound, name

    again = tmp_path / "again.safetensors"
    write_params(again, read, word_embedding_bits=4, matrix_bits=8)
    assert again.read_bytes() == small.read_bytes()
