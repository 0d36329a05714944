import dataclasses
import json
import os
import shutil

import chex
import numpy as np
import pytest

from flaxmpc.models import folder as folders
from flaxmpc.models.base import WORDS, init_params
from flaxmpc.models.bert import ARCHITECTURES, BertConfig, BertForMaskedLM, BertForSequenceClassification
from flaxmpc.models.params import flatten
from flaxmpc.models.tokenizer import FILES
from flaxmpc.models.weights import WeightsError
from flaxmpc.nn.activation import ACTIVATIONS

TINY = BertConfig(
    vocab_size=30522,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=16,
    hidden_act="quad",
    attention=["2quad_freediv", ["softmax", "scaling"]],
    layer_norm=["layer_norm", ["layer_norm", "layer_norm_chebyshev"]],
    id2label=("negative", "positive", "neither"),
)


@pytest.fixture
def saved(tmp_path, minilm, random_params):
    model = BertForSequenceClassification(TINY)
    return folders.save(tmp_path / "model", model, random_params(model), minilm)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_was_saved_is_loaded(name, tmp_path, minilm, random_params):
    model = ARCHITECTURES[name](TINY)
    params = random_params(model)
    loaded = folders.load(folders.save(tmp_path / "new" / "model", model, params, minilm))
    assert type(loaded.model) is type(model)
    assert loaded.model.config == TINY
    assert loaded.folder == tmp_path / "new" / "model"
    chex.assert_trees_all_equal(loaded.params, params)
    assert loaded.tokenizer("a movie")["input_ids"] == [101, 1037, 3185, 102]


def test_a_folder_holds_two_files_and_the_tokenizers(saved):
    found = {path.name for path in saved.iterdir()}
    assert found - set(FILES) == {"config.json", "model.safetensors"}
    assert found >= {"tokenizer.json", "tokenizer_config.json"}
    assert json.loads((saved / "config.json").read_text())["architectures"] == ["BertForSequenceClassification"]


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_files_have_the_umasks_mode(mask, tmp_path, minilm, random_params):
    model = BertForSequenceClassification(TINY)
    before = os.umask(mask)
    try:
        folder = folders.save(tmp_path / "model", model, random_params(model), minilm)
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
        path.name: 0o666 & ~mask for path in folder.iterdir()
    }


def test_a_model_is_saved_where_its_tokenizer_is(saved):
    loaded = folders.load(saved)
    folders.save(saved, loaded.model, loaded.params, saved)
    chex.assert_trees_all_equal(folders.load(saved).params, loaded.params)


def test_a_tokenizer_of_a_vocabulary_alone_is_kept(saved, tmp_path, minilm):
    """As HF's older BERT folders have it."""
    loaded, source = folders.load(saved), tmp_path / "old"
    source.mkdir()
    shutil.copy(minilm / "vocab.txt", source)
    again = folders.load(folders.save(tmp_path / "again", loaded.model, loaded.params, source))
    text = "A gripping, beautifully acted film."
    assert again.tokenizer(text)["input_ids"] == loaded.tokenizer(text)["input_ids"]


def test_few_bits_are_read_back_as_float32(tmp_path, minilm, random_params):
    model = BertForSequenceClassification(dataclasses.replace(TINY, hidden_size=64, intermediate_size=64))
    params = random_params(model)
    whole = folders.save(tmp_path / "whole", model, params, minilm)
    small = folders.save(tmp_path / "small", model, params, minilm, word_embedding_bits=4, matrix_bits=8)
    assert (small / "model.safetensors").stat().st_size < (whole / "model.safetensors").stat().st_size / 5
    chex.assert_trees_all_close(folders.load(small).params, params, atol=0.2)


def test_the_architecture_is_that_of_the_config_unless_named(saved, tmp_path, minilm, random_params):
    change_config(saved, architectures=None)
    assert type(folders.load(saved).model) is BertForSequenceClassification
    model = BertForMaskedLM(TINY)
    folder = folders.save(tmp_path / "mlm", model, random_params(model), minilm)
    assert type(folders.load(folder).model) is BertForMaskedLM
    with pytest.raises(WeightsError) as error:
        folders.load(folder, "BertForTokenClassification")
    assert sorted(error.value.missing) == ["classifier.bias", "classifier.weight"]
    assert "cls.predictions.bias" in error.value.unexpected


def test_an_unknown_architecture_gets_the_known_ones_and_the_closest(saved):
    for architecture in ("BertForSequenceClassifier", "BertForMultipleChoice"):
        change_config(saved, architectures=[architecture])
        with pytest.raises(ValueError, match=f"unknown architecture {architecture!r}") as error:
            folders.load(saved)
        assert all(name in str(error.value) for name in ARCHITECTURES)
    with pytest.raises(ValueError, match="Did you mean 'BertForMaskedLM'"):
        folders.load(saved, "BertForMaskLM")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (["config.json"], r"config\.json does not exist: a model folder holds"),
        (["model.safetensors"], r"model\.safetensors does not exist: a model folder holds"),
        (["tokenizer.json"], r"has no tokenizer: tokenizer\.json or vocab\.txt is needed"),
    ],
)
def test_a_missing_file_is_named(saved, missing, message):
    for name in missing:
        (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=message) as error:
        folders.load(saved)
    assert str(saved) in str(error.value)


def test_architectures_are_a_list_of_names(saved):
    change_config(saved, architectures={"a": "b"})
    with pytest.raises(ValueError, match=r"config\.json: architectures is a list of names, not \{'a': 'b'\}"):
        folders.load(saved)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        folders.load(tmp_path / "nowhere")


def test_nothing_is_saved_without_a_tokenizer_or_of_an_own_part(saved, tmp_path, minilm):
    loaded = folders.load(saved)
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        folders.save(tmp_path / "none", loaded.model, loaded.params, tmp_path)
    own = dataclasses.replace(TINY, hidden_act=dataclasses.replace(ACTIVATIONS["quad"], name="mine"))
    with pytest.raises(ValueError, match="'mine' is not registered"):
        folders.save(tmp_path / "none", BertForSequenceClassification(own), loaded.params, minilm)
    assert not (tmp_path / "none").exists()


def test_a_damaged_model_is_refused_when_loaded(saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read as safetensors"):
        folders.load(saved)


def test_a_model_of_another_shape_lists_what_does_not_fit(saved):
    change_config(saved, intermediate_size=24)
    with pytest.raises(WeightsError) as error:
        folders.load(saved)
    assert len(error.value.wrong_shape) == 6
    assert not error.value.missing
    assert not error.value.unexpected


def test_a_pretrained_encoder_gets_a_fresh_head(saved):
    stored = flatten(folders.load(saved).params)
    ours = folders.load_pretrained(saved, WORDS, seed=5)
    fresh = flatten(init_params(ours.model, 5))
    assert type(ours.model) is BertForMaskedLM
    for name, value in flatten(ours.params).items():
        np.testing.assert_array_equal(value, stored[name] if name.startswith("bert/") else fresh[name])


@pytest.mark.parametrize("labels", [("a", "b"), ("no", "yes", "maybe")])
def test_a_classifiers_head_is_no_part_of_the_encoder(labels, saved):
    """Of as many labels, or of fewer."""
    stored = flatten(folders.load(saved).params)
    ours = folders.load_pretrained(saved, seed=5, id2label=labels)
    fresh = flatten(init_params(ours.model, 5))
    found = flatten(ours.params)
    assert found["classifier/kernel"].shape == (8, len(labels))
    for name, value in found.items():
        np.testing.assert_array_equal(value, (stored if name.startswith("bert/") else fresh)[name])


def test_a_pretrained_encoder_takes_changes_of_its_config(minilm):
    loaded = folders.load_pretrained(minilm, id2label=("a", "b", "c"), attention="2quad_freediv")
    assert loaded.model.config.num_labels == 3
    assert loaded.params["classifier"]["kernel"].shape == (384, 3)
    np.testing.assert_array_equal(loaded.params["bert"]["layer_0"]["attention"]["shift"], np.full(12, 5.0))


def test_a_pretrained_encoder_must_be_whole(saved):
    change_config(saved, num_hidden_layers=3, attention="softmax", layer_norm="layer_norm")
    with pytest.raises(WeightsError, match=r"missing: bert\.encoder\.layer\.2\.attention\.output\.dense\.weight"):
        folders.load_pretrained(saved)
