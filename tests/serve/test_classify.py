"""Texts to what is shared, and the errors of texts that can't be."""

import dataclasses
import re
from typing import Any

import numpy as np
import pytest

from flaxmpc.models import folder as folders
from flaxmpc.models.base import init_params, without_embeddings
from flaxmpc.models.mpnet import MPNetConfig, MPNetForSequenceClassification
from flaxmpc.serve.classify import Client, TextError, buckets


@pytest.fixture(scope="module")
def client_of(write_classifier, tmp_path_factory):
    """client_of(**config) -> the client of a small model."""
    folder = write_classifier(tmp_path_factory.mktemp("model"), num_hidden_layers=1)
    loaded = folders.load(folder)

    def make(*, lengths=None, **changes):
        model = type(loaded.model)(dataclasses.replace(loaded.model.config, **changes))
        return Client(model, loaded.tokenizer, without_embeddings(model, loaded.params)[0], lengths)

    return make


@pytest.fixture(scope="module")
def client(client_of):
    return client_of()


def refused(client, texts):
    with pytest.raises(TextError) as caught:
        client.encode(texts)
    return caught.value.place, caught.value.reason


def test_progress_of_many_texts_is_not_on_standard_output(client, capsys):
    assert len(client.encode(["good"] * (3 * 4096 + 1)).input_ids) == 3 * 4096 + 1
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------------------------------- length


@pytest.mark.parametrize(
    ("longest", "lengths"), [(8, [8]), (16, [16]), (24, [16, 24]), (64, [16, 32, 64]), (100, [16, 32, 64, 100])]
)
def test_buckets_end_at_the_longest_text(longest, lengths):
    assert buckets(longest) == lengths


@pytest.mark.parametrize(("model_max_length", "longest"), [(None, 24), (18, 18), (6, 6)])
def test_a_text_is_cut_where_the_model_was_trained_for_no_more(client_of, model_max_length, longest):
    client = client_of(model_max_length=model_max_length)
    encoded = client.encode([" ".join(["film"] * n) for n in (longest - 2, longest - 1, 60)])
    assert list(map(len, encoded.input_ids)) == [longest] * 3  # [CLS] and [SEP] too
    assert encoded.truncated.tolist() == [False, True, True]
    assert (client.lengths[-1], client.bucket(longest)) == (longest, longest)
    with pytest.raises(ValueError, match=f"a text has {longest + 1} tokens; the model is served for at most {longest}"):
        client.bucket(longest + 1)


def test_more_tokens_than_the_longest_are_not_shared(client_of):
    ids = np.ones((1, 19), int)
    with pytest.raises(ValueError, match="19 tokens; it may have 18 tokens, all that the model was trained and measur"):
        client_of(model_max_length=18).share(ids, ids)


# ------------------------------------------------------------------------------------------------------- single texts


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty"),
        (" \n\u2028", "is empty"),
        ("\u200b\ufeff", "has no token: the tokenizer drops all that it holds"),
        ("\0\x01", "has no token: the tokenizer drops all that it holds"),
        ("ok \ud83d", "holds half a surrogate pair, '\\ud83d', at character 4"),
        ("\udce9", "holds half a surrogate pair, '\\udce9', at character 1"),
        (None, "is None, neither a string nor a pair of strings"),
        (3, "is 3, neither a string nor a pair of strings"),
        (b"good", "is b'good', neither a string nor a pair of strings"),
    ],
)
def test_a_text_that_is_none_is_named(client_of, text, reason):
    client = client_of()
    with pytest.raises(TextError, match=re.escape(f"text 2 of 3 {reason}")):
        client.encode(["good", text, "bad"])
    assert refused(client_of(num_texts=1), ["good", text]) == (1, reason)


def test_no_text_is_refused(client):
    with pytest.raises(ValueError, match="there is no text to classify"):
        client.encode([])
    with pytest.raises(ValueError, match=r"texts are a list of them, not one string: \['good'\]"):
        client.encode("good")


# -------------------------------------------------------------------------------------------------------------- pairs


def test_a_pair_is_encoded_with_types(client_of):
    for client in (client_of(), client_of(num_texts=2)):
        encoded = client.encode([("a good film", "bad"), ("good", "a bad movie")])
        assert client.tokenizer.convert_ids_to_tokens(encoded.input_ids[0]) == [
            *("[CLS]", "a", "good", "film", "[SEP]", "bad", "[SEP]"),
        ]
        assert [types.tolist() for types in encoded.token_type_ids] == [[0] * 5 + [1] * 2, [0] * 3 + [1] * 4]
        run = client.run(encoded, [1], 2)
        assert run.types.tolist() == [([0] * 3 + [1] * 4 + [0] * 9)] * 2


def test_the_types_change_what_is_shared_as_in_the_model(client):
    run = client.run(client.encode([("good", "bad")]), [0], 1)
    embeddings, _ = client.share(run.ids, run.mask, run.types)
    without, _ = client.share(run.ids, run.mask)
    assert np.abs(embeddings - without)[0, :3].max() < 1e-5
    assert np.abs(embeddings - without)[0, 3:5].max(-1).min() > 0.1


@pytest.mark.parametrize(
    ("num_texts", "texts", "place", "reason"),
    [
        (1, ["good", ("good", "bad")], 1, "is a pair of texts, but the model was trained on a single text at a time"),
        (2, ["good", "bad"], 0, "is a single text, but the model was trained on a pair of texts at a time"),
        (None, ["good", ("good", "bad")], 1, "is a pair of texts, but the first is a single text"),
        (None, [("good", "bad"), "good"], 1, "is a single text, but the first is a pair of texts"),
        (2, [("good", "bad"), ("good", " ")], 1, "is empty"),
        (2, [("good", "\u200b")], 0, "has no token: the tokenizer drops all that it holds"),
        (2, [("\u200b", "good")], 0, "has no token: the tokenizer drops all that it holds"),
        (2, [("good", "bad", "very")], 0, "is ('good', 'bad', 'very'), neither a string nor a pair of strings"),
        (2, [("good",)], 0, "is ('good',), neither a string nor a pair of strings"),
        (2, [("good", None)], 0, "is ('good', None), neither a string nor a pair of strings"),
    ],
)
def test_the_wrong_form_is_refused(client_of, num_texts, texts, place, reason):
    assert refused(client_of(num_texts=num_texts), texts) == (place, reason)


def test_a_model_without_a_second_type_takes_no_pairs(client_of, write_classifier, tmp_path):
    loaded = folders.load(write_classifier(tmp_path, num_hidden_layers=1, type_vocab_size=1))
    client = Client(loaded.model, loaded.tokenizer, without_embeddings(loaded.model, loaded.params)[0])
    run = client.run(client.encode([("good", "bad")]), [0], 1)
    with pytest.raises(ValueError, match="token_type_ids 0 to 1: the model has 0 to 0"):
        client.share(run.ids, run.mask, run.types)


@pytest.mark.parametrize(("num_texts", "arrays"), [(1, 1), (2, 2), (None, 2)])
def test_programs_of_one_hot_tokens_take_types_alike_for_all_texts(client_of, num_texts, arrays):
    client = client_of(num_texts=num_texts, embedding="secret")
    ids = np.ones((1, 16), int)
    tokens, _ = client.share(ids, ids)
    assert [each.shape for each in tokens] == [(1, 16, 20), (1, 16, 2)][:arrays]


# ------------------------------------------------------------------------------------------------------------ the ids


@pytest.mark.parametrize(("token", "message"), [(20, "0 to 20"), (-1, "-1 to 0")])
def test_an_id_beyond_the_vocabulary_is_refused(client, token, message):
    ids = np.zeros((1, 16), int)
    ids[0, 3] = token
    with pytest.raises(ValueError, match=f"input_ids {message}: the model has 0 to 19"):
        client.share(ids, np.ones_like(ids))


# ----------------------------------------------------------------------------------------------------------- the runs


def runs_of(client, words, sizes):
    encoded = client.encode([" ".join(["film"] * n) for n in words])
    return [
        (list(run.places), run.ids.shape, run.mask.sum(1).tolist())
        for run in client.runs(encoded, range(len(words)), lambda length: sizes[length])
    ]


def test_texts_of_a_length_share_runs_and_no_short_one_is_padded_to_the_longest(client):
    found = runs_of(client, [1, 20, 2, 3, 21, 4, 5, 6], {16: [1, 2, 4], 24: [2]})
    assert found == [
        ([0, 2, 3, 5], (4, 16), [3, 4, 5, 6]),
        ([6, 7], (2, 16), [7, 8]),
        ([1, 4], (2, 24), [22, 23]),
    ]


def test_a_run_that_takes_more_is_filled_with_its_first_text(client):
    assert runs_of(client, [1, 2, 3], {16: [2], 24: [1]}) == [
        ([0, 1], (2, 16), [3, 4]),
        ([2], (2, 16), [5, 5]),
    ]


@pytest.fixture(scope="module")
def without_types(tmp_path_factory, write_classifier):
    """The client of an MPNet, which counts positions past padding and does not tell the texts of a pair apart."""
    source = folders.load(write_classifier(tmp_path_factory.mktemp("mpnet"), num_hidden_layers=1))
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
    }
    config = MPNetConfig(vocab_size=20, max_position_embeddings=24, pad_token_id=0, **shape)
    model = MPNetForSequenceClassification(config)
    table, _ = without_embeddings(model, init_params(model))
    return Client(model, source.tokenizer, table)


@pytest.mark.parametrize("pair", [("good", "\u200b"), ("\u200b", "good")], ids=["second", "first"])
def test_an_empty_text_of_a_pair_is_found_without_types(pair, without_types):
    assert len(without_types.encode([("good", "bad")]).input_ids) == 1
    with pytest.raises(TextError, match="text 2 of 2 has no token: the tokenizer drops all that it holds"):
        without_types.encode([("good", "bad"), pair])


def test_padding_in_a_text_is_refused_where_positions_are_counted_past_it(without_types, client):
    """HF's RoBERTa and MPNet would give every token after it another position."""
    with pytest.raises(TextError, match=r"text 2 of 2 holds \[PAD\], the padding token"):
        without_types.encode(["good", "a [PAD] film"])
    assert len(client.encode(["a [PAD] film"]).input_ids) == 1  # a BERT counts by place
