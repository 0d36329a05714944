"""Every head on shares: a label for each token, the answer to a question, the word at a mask."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from flaxmpc import secure
from flaxmpc.models import folder as folders
from flaxmpc.models.base import WORDS, family_of, init_params
from flaxmpc.models.bert import BertForMaskedLM, BertForQuestionAnswering, BertForTokenClassification
from flaxmpc.serve import plans
from flaxmpc.serve.classify import TextError
from flaxmpc.serve.private import SecureClassifier, check, plan_bits, private

TAGS = ("O", "B-film", "I-film", "B-actor", "I-actor")
# A text or a pair of each, short and long: so in two buckets.
ENTITIES = ["a good film.", "Gripping, beautifully acted, very very very good: the tedious movie, a film", "good"]
QUESTIONS = [("a good film?", "the movie, a gripping film, very good."), ("bad?", "good"), ("a", "the " * 12 + "mess")]
MASKED = ["a [MASK] film.", "[MASK] [MASK]", "the film the film a very, [MASK], very good movie . a good film"]
HEADS = {
    "tokens": (BertForTokenClassification, {"id2label": TAGS}, ENTITIES),
    "answers": (BertForQuestionAnswering, {}, QUESTIONS),
    "words": (BertForMaskedLM, {}, MASKED),
}


@pytest.fixture(scope="module")
def folder_of(write_classifier, tmp_path_factory):
    def write(kind: str, embedding: str):
        architecture, changes, _ = HEADS[kind]
        return write_classifier(tmp_path_factory.mktemp(kind), architecture, **changes, embedding=embedding)

    written = {(kind, mode): write(kind, mode) for kind in HEADS for mode in ("public", "secret")}
    return lambda kind, mode="public": written[kind, mode]


def softmax(x):
    odds = np.exp(x - x.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


@functools.partial(jax.jit, static_argnums=0)
def applied(model, params, ids, types):
    config = model.config
    words = config.embedding.encode(ids, config.vocab_size)
    kinds = config.embedding.encode(types, config.type_vocab_size)
    return model.apply({"params": params}, words, None, kinds)


def in_the_clear(loaded, text):
    """The logits (token, output) of one text by itself, and its `tokenizers.Encoding`."""
    encoded = loaded.tokenizer(*(text,) if isinstance(text, str) else text).encodings[0]
    ids, types = (np.array([row], np.int32) for row in (encoded.ids, encoded.type_ids))
    logits = applied(loaded.model, loaded.params, ids, types)[0]
    return np.asarray(logits, np.float64), encoded


def assert_entities(prediction, text, logits, encoding):
    """Word by word: the tag of its first token; an entity goes on with I- tags of its kind."""
    expected, kind_before = [], None
    for word in sorted({word for word in encoding.word_ids if word is not None}):
        places = [i for i, each in enumerate(encoding.word_ids) if each == word]
        odds = softmax(logits[places[0]])
        tag = TAGS[int(odds.argmax())]
        begin, end = encoding.offsets[places[0]][0], encoding.offsets[places[-1]][1]
        if tag != "O":
            if tag[0] == "I" and kind_before == tag[2:]:
                expected[-1] = (*expected[-1][:2], end, [*expected[-1][3], odds.max()])
            else:
                expected.append((tag[2:], begin, end, [odds.max()]))
        kind_before = None if tag == "O" else tag[2:]
    assert [(each["entity_group"], each["start"], each["end"]) for each in prediction.entities] == [
        each[:3] for each in expected
    ]
    for found, (_, begin, end, scores) in zip(prediction.entities, expected, strict=True):
        assert found["word"] == text[begin:end]
        assert found["score"] == pytest.approx(np.mean(scores), abs=0.01)


def assert_answer(prediction, text, logits, encoding):
    """Of all spans of the second text, of at most 15 tokens, none is more probable."""
    own = [place for place, side in enumerate(encoding.sequence_ids) if side == 1]
    starts, ends = softmax(logits[own].T)
    spans = {
        (encoding.offsets[own[i]][0], encoding.offsets[own[j]][1]): starts[i] * ends[j]
        for i in range(len(own))
        for j in range(i, min(i + 15, len(own)))
    }
    assert prediction.score == pytest.approx(max(spans.values()), abs=0.01)
    assert spans[prediction.start, prediction.end] == pytest.approx(max(spans.values()), abs=0.01)
    assert prediction.answer == text[1][prediction.start : prediction.end]


def assert_words(prediction, text, logits, encoding):
    places = [place for place, token in enumerate(encoding.tokens) if token == "[MASK]"]
    assert len(prediction.masked) == len(places) == text.count("[MASK]")
    for words, place in zip(prediction.masked, places, strict=True):
        odds = softmax(logits[place])
        assert len(words) == 5
        np.testing.assert_allclose([word["score"] for word in words], np.sort(odds)[::-1][:5], atol=0.01)


RIGHT = {"tokens": assert_entities, "answers": assert_answer, "words": assert_words}


@pytest.mark.parametrize("protocol", ["REF2K", "ABY3"])
@pytest.mark.parametrize("mode", ["public", "secret"])
@pytest.mark.parametrize("kind", HEADS)
def test_answers_on_shares_are_those_in_the_clear(folder_of, group, kind, mode, protocol):
    loaded = folders.load(folder_of(kind, mode))
    texts = HEADS[kind][2]
    predictions = SecureClassifier(loaded, group(protocol)).classify(texts).predictions
    for text, prediction in zip(texts, predictions, strict=True):
        assert prediction.error is None
        assert prediction.difference < 0.02
        RIGHT[kind](prediction, text, *in_the_clear(loaded, text))


def test_some_text_has_an_entity_of_several_words(folder_of, group):
    """Else the comparison above shows nothing."""
    classifier = SecureClassifier.from_folder(folder_of("tokens"), group("REF2K"))
    found = [each for prediction in classifier.classify(ENTITIES).predictions for each in prediction.entities or ()]
    assert len(found) > 2
    assert any(" " in each["word"] for each in found)


def test_what_a_head_does_not_take_is_refused(folder_of, group):
    def refusal(kind, *texts):
        with pytest.raises(TextError) as refused:
            SecureClassifier.from_folder(folder_of(kind), group("REF2K")).classify(texts)
        return str(refused.value)

    assert refusal("answers", "a film") == "text 1 of 1 is a single text, but the model takes a pair of texts"
    assert refusal("tokens", ("a", "film")) == "text 1 of 1 is a pair of texts, but the model takes a single text"
    assert refusal("words", "a [MASK]", "a film") == "text 2 of 2 has no [MASK]"
    assert refusal("words", "very " * 30 + "[MASK]") == "text 1 of 1 has no [MASK] among its first 24 tokens"
    assert refusal("words", ("[MASK]", "film")) == "text 1 of 1 is a pair of texts, but the model takes a single text"


@pytest.mark.parametrize("kind", HEADS)
def test_margins(folder_of, kind):
    assert check(folders.load(folder_of(kind)), HEADS[kind][2]).margin_bits > 8


@pytest.mark.parametrize("kind", ["tokens", "answers"])
def test_by_a_plan_of_bits_and_where_the_model_diverges(write_diverging, tmp_path, group, kind):
    """Not the words at masks: their own head has a root, which a plan has no bits for."""
    architecture, changes, texts = HEADS[kind]
    folder = write_diverging(tmp_path / "model", architecture=architecture, num_hidden_layers=1, **changes)
    loaded = folders.load(folder)
    texts = [text for text in texts if "mess" not in "".join(text)]
    plan_bits(loaded, texts)
    classifier = SecureClassifier(loaded, plans.parties(folder, protocol="REF2K"))
    diverging = ("a", "mess") if kind == "answers" else "a mess"
    *right, wrong = classifier.classify([*texts, diverging]).predictions
    for text, prediction in zip(texts, right, strict=True):
        assert prediction.error is None
        RIGHT[kind](prediction, text, *in_the_clear(loaded, text))
    assert str(wrong.error).startswith("the model diverges on this text")
    assert wrong.entities is wrong.answer is None


@pytest.mark.parametrize("name", ["roberta", "distilbert", "electra", "mpnet"])
def test_the_words_at_masks_in_other_families(name, group):
    """Their head reads the table, which ELECTRA's embeddings have in another width."""
    family = family_of(name)
    size: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    size["intermediate_size"] = 48
    if name == "electra":
        size["embedding_size"] = 16
    config = family.config(**size, vocab_size=20, max_position_embeddings=24, initializer_range=0.2)
    model = family.model_for(WORDS)(config)
    params = init_params(model, seed=1)
    ids, mask = np.random.default_rng(0).integers(4, 20, (2, 8)).astype(np.int32), np.arange(8) < np.array([[8], [5]])
    parties = group("REF2K")
    found = private(model, params, parties.config)
    shared = found.client(None).share(ids, mask.astype(np.int32))
    logits = np.asarray(secure.jit(found.function, parties=parties)(found.weights, *shared))
    plain = np.asarray(jax.jit(model.apply)({"params": params}, ids, mask.astype(np.int32)))
    assert logits.shape == model.logits_shape(2, 8) == (2, 8, 20)
    np.testing.assert_allclose(logits[mask], plain[mask], atol=0.02)


def test_a_tokenizer_without_a_mask_is_named(folder_of, group, monkeypatch):
    classifier = SecureClassifier.from_folder(folder_of("words"), group("REF2K"))
    monkeypatch.setattr(type(classifier.tokenizer), "mask_token", None, raising=False)
    with pytest.raises(ValueError, match="the model gives the words at masked tokens, but its tokenizer has no such"):
        classifier.classify(["a [MASK]"])
