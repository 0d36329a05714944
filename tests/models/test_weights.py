import dataclasses
import json

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flaxmpc.models.base import param_shapes
from flaxmpc.models.bert import ARCHITECTURES, BERT, BertConfig, BertForMaskedLM, BertForSequenceClassification
from flaxmpc.models.params import flatten
from flaxmpc.models.weights import WeightsError, hf_name, read_params, write_params

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


def sharded(path):
    """The file as HF shards it; returns the index."""
    tensors = load_file(path)
    names = sorted(tensors)
    shards = {f"model-{i + 1:05}-of-00003.safetensors": names[i::3] for i in range(3)}
    for shard, own in shards.items():
        save_file({name: tensors[name] for name in own}, path.with_name(shard))
    path.unlink()
    index = path.with_name("model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": {name: shard for shard, own in shards.items() for name in own}}))
    return index


def test_shards_are_read_as_one_file(path, params):
    sharded(path)
    chex.assert_trees_all_equal(read_params(path, SHAPES), params)


def test_one_file_goes_before_shards(path, params):
    content = path.read_bytes()
    index = sharded(path)
    index.write_text("{")
    path.write_bytes(content)
    chex.assert_trees_all_equal(read_params(path, SHAPES), params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "{", r"index\.json cannot be read as JSON"),
        (lambda text: "{}", r"index\.json cannot be read as an index"),
        (lambda text: text.replace("model-00002", "../model-00002"), "names '../model-00002-of-00003.safetensors'"),
        (
            lambda text: text.replace('"model-00002-of-00003.safetensors"', "3"),
            r"index\.json cannot be read as an index",
        ),
        (lambda text: json.dumps({"weight_map": {f"{i}": f"{i}" for i in range(2000)}}), "names 2000 shards; at most"),
        (lambda text: text.replace("model-00002", "model-00009"), "model-00009-of-00003.safetensors, which does not"),
    ],
)
def test_a_bad_index_of_shards_is_named(change, message, path):
    index = sharded(path)
    index.write_text(change(index.read_text()))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_params(path, SHAPES)


def test_a_damaged_shard_is_named(path):
    sharded(path)
    path.with_name("model-00002-of-00003.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model-00002-of-00003\.safetensors cannot be read"):
        read_params(path, SHAPES)


@pytest.mark.parametrize(
    ("name", "whose", "argument"),
    [
        ("pytorch_model.bin", "PyTorch's", ""),
        ("pytorch_model-00001-of-00002.bin", "PyTorch's", ""),
        ("flax_model.msgpack", "Flax's", ", from_flax=True"),
        ("tf_model.h5", "TensorFlow's", ", from_tf=True"),
        ("bert_model.ckpt.index", "TensorFlow's", ", from_tf=True"),
    ],
)
def test_weights_in_another_format_are_told_how_to_convert(name, whose, argument, tmp_path):
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertForTokenClassification"]}))
    with pytest.raises(FileNotFoundError) as error:
        read_params(tmp_path / "model.safetensors", SHAPES)
    message = str(error.value)
    assert f"{name}, {whose} format" in message
    assert f"BertForTokenClassification.from_pretrained('{tmp_path}" in message
    assert f"'{argument}).save_pretrained('{tmp_path}')" in message
    assert "\n" not in message


def test_weights_that_are_no_floats_are_refused_by_name(path):
    """Such as another library's 8 bits, whose scales would be passed over."""

    def change(tensors):
        tensors["bert.encoder.layer.0.output.dense.weight"] = np.ones((64, 128), np.int8)
        return tensors

    rewrite(path, change)
    with pytest.raises(ValueError, match=r"layer\.0\.output\.dense\.weight is int8; weights are float32, float16"):
        read_params(path, SHAPES)


def test_a_number_that_float32_cannot_hold_is_refused(path):
    rewrite(path, lambda tensors: {**tensors, "classifier.bias": np.array([0.0, 1e300])})
    with pytest.raises(ValueError, match=r"classifier\.bias holds non-finite weights"):
        read_params(path, SHAPES)


def test_an_output_matrix_of_its_own_is_refused(tmp_path, random_params):
    model, path = BertForMaskedLM(dataclasses.replace(TINY, attention="softmax")), tmp_path / "model.safetensors"
    params = random_params(model)
    write_params(path, params)
    tied = load_file(path)["bert.embeddings.word_embeddings.weight"]
    rewrite(path, lambda tensors: {**tensors, "cls.predictions.decoder.weight": tied})
    chex.assert_trees_all_equal(read_params(path, param_shapes(model)), params)
    rewrite(path, lambda tensors: {**tensors, "cls.predictions.decoder.weight": tied + 1})
    with pytest.raises(ValueError, match=r"decoder\.weight is not bert\.embeddings\.word_embeddings\.weight"):
        read_params(path, param_shapes(model))


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
        "  wrong shape: classifier.weight: (7, 64) in the file, (2, 64) in the model",
    }


def test_a_fresh_head_fills_what_only_a_head_may_lack(path, params, random_params):
    own = ("classifier.", "bert.pooler.", "bert.encoder.layer.0.attention.self.s")
    encoder = {name: value for name, value in load_file(path).items() if not name.startswith(own)}
    encoder["classifier.weight"] = np.zeros((7, 64), np.float32)  # of another head
    save_file({**encoder, "cls.seq_relationship.bias": np.zeros(2, np.float32)}, path)
    fresh = random_params(MODEL, 1)
    read = flatten(read_params(path, SHAPES, fresh=lambda: fresh))
    flat_fresh, flat = (flatten(tree) for tree in (fresh, params))
    for name, value in read.items():
        head = name.startswith(("classifier/", "bert/pooler/")) or name.endswith(("/shift", "attention/scale"))
        np.testing.assert_array_equal(value, (flat_fresh if head else flat)[name])

    del encoder["bert.embeddings.LayerNorm.bias"]
    save_file(encoder, path)
    with pytest.raises(WeightsError, match=r"missing: bert\.embeddings\.LayerNorm\.bias"):
        read_params(path, SHAPES, fresh=lambda: fresh)


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
        read_params(path, SHAPES)


@pytest.mark.parametrize("bits", [32, 8])
def test_a_changed_bit_is_refused_by_name_or_changes_nothing(bits, tmp_path, params):
    path = tmp_path / "model.safetensors"
    write_params(path, params, word_embedding_bits=bits, matrix_bits=bits)
    before, content = read_params(path, SHAPES), path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    rng = np.random.default_rng()
    for place in (*rng.integers(8, header, 60), *rng.integers(header, len(content), 60)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << rng.integers(8)]) + content[place + 1 :])
        try:
            found = read_params(path, SHAPES)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017  many are harmless
        else:
            assert place < header
            chex.assert_trees_all_equal(found, before)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors does not exist"):
        read_params(tmp_path / "model.safetensors", SHAPES)


def test_an_unknown_parameter_has_no_name():
    with pytest.raises(ValueError, match="no HF name is known for the parameter 'bert/other/kernel'"):
        hf_name("bert/other/kernel", BERT)


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


def header(path, length, data=0):
    """A file that says that so many bytes of header follow; it has them and the data, but on no disk."""
    with path.open("wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(8 + length + data)


def claim(path, tensors):
    """A file whose header says that it has these tensors, by name: type and shape; all zeros, on no disk."""
    end, entries = 0, {}
    for name, (kind, shape) in tensors.items():
        size = int(np.prod(shape, dtype=object)) * {"F32": 4, "F64": 8}.get(kind, 1)
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    content = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + end)


def test_a_large_header_is_refused_unread(path):
    header(path, 90_000_000)
    with pytest.raises(
        ValueError, match=r"model\.safetensors cannot be read .* 90000000 bytes; at most 4194304 are read"
    ):
        read_params(path, SHAPES)


@pytest.mark.parametrize("fresh", [None, dict])
def test_a_terabyte_that_does_not_fit_is_refused_unread(path, fresh):
    claim(path, {"bert.embeddings.word_embeddings.weight": ("F32", [2**32, 64]), "more": ("F32", [2**30])})
    with pytest.raises(
        WeightsError, match=r"wrong shape: bert\.embeddings\.word_embeddings\.weight: \(4294967296, 64\)"
    ):
        read_params(path, SHAPES, fresh=fresh)


def test_of_many_misfits_some_are_shown(path):
    claim(path, {f"strange.{i}": ("F32", [1]) for i in range(1000)})
    with pytest.raises(WeightsError, match="unexpected: 950 more") as error:
        read_params(path, SHAPES)
    assert len(error.value.unexpected) == 1000
    assert len(str(error.value).splitlines()) < 120


@pytest.mark.parametrize("kind", ["I64", "BOOL", "U16", "F8_E4M3", "F4"])
def test_a_strange_type_is_named(path, kind):
    def change(tensors):
        entries = {name: ("F32", list(value.shape)) for name, value in tensors.items()}
        return entries | {"bert.pooler.dense.bias": (kind, [64])}

    entries = change(load_file(path))
    claim(path, entries)
    with pytest.raises(ValueError, match=rf"model\.safetensors.*({kind.lower()}; weights are|cannot be read)") as error:
        read_params(path, SHAPES)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("scales", [np.ones((64, 2), np.float16), np.ones((64, 1), np.float64), np.ones(1, np.float16)])
def test_scales_that_do_not_fit_are_named(path, scales):
    name = "bert.pooler.dense.weight"
    few = {name: np.ones((64, 64), np.int8), f"{name}.quantization_scale": scales}
    rewrite(path, lambda tensors: tensors | few)
    with pytest.raises(ValueError, match=r"pooler\.dense\.weight is int8 \(64, 64\) with scales float"):
        read_params(path, SHAPES)


def test_weights_of_others_are_not_read_through_links(path, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "model.safetensors").symlink_to(path)
    with pytest.raises(ValueError, match=r"own/model\.safetensors is a link to"):
        read_params(own / "model.safetensors", SHAPES)
    sharded(path)
    (own / "model.safetensors").unlink()
    for shard in tmp_path.glob("model*"):
        (own / shard.name).symlink_to(shard) if "00002" in shard.name else (own / shard.name).write_bytes(
            shard.read_bytes()
        )
    with pytest.raises(ValueError, match=r"own/model-00002-of-00003\.safetensors is a link to"):
        read_params(own / "model.safetensors", SHAPES)


def test_a_suggested_command_holds_no_text_of_the_folder(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ['X; import os; os.system("id")#']}))
    with pytest.raises(FileNotFoundError, match=r"import AutoModel; AutoModel\.from_pretrained") as error:
        read_params(tmp_path / "model.safetensors", SHAPES)
    assert "os.system" not in str(error.value)
