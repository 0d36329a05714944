"""Words with tags, from the data to answers on shares: fine-tuned, converted, evaluated."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from flaxmpc.convert.configs import Conversion, FineTuning
from flaxmpc.convert.conversion import finetune_encoder
from flaxmpc.convert.distill import Stage
from flaxmpc.convert.recipe import make
from flaxmpc.models import folder as folders
from flaxmpc.models.bert import BertForTokenClassification
from flaxmpc.serve.private import SecureClassifier
from flaxmpc.training.fit import Schedule

STAGE = Stage(epochs=4, learning_rate=3e-3, batch_size=8, hidden_weight=1.0, range_weight=0.3)
STAGE2 = dataclasses.replace(STAGE, epochs=3, learning_rate=1e-3, logit_weight=1.0, hidden_weight=0.1)
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """What follows "the" or "a" is a film, of one word or two."""
    rng = np.random.default_rng(0)
    found = {}
    while len(found) < 200:
        words, tags = [], []
        for _ in range(rng.integers(1, 4)):
            if rng.random() < 0.5:
                count = int(rng.integers(1, 3))
                words += [rng.choice(["the", "a"]), *rng.choice(["gripping", "good", "mess"], count)]
                tags += ["O", *["B-film", "I-film"][:count]]
            else:
                words.append(rng.choice(["acted", "very", "bad", "tedious"]))
                tags.append("O")
        found[tuple(words)] = tags
    path = tmp_path_factory.mktemp("data") / "films.conll"
    path.write_text("\n".join("".join(f"{w}\t{t}\n" for w, t in zip(*row, strict=True)) for row in found.items()))
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, write_classifier, data) -> Path:
    own = {"attention": "softmax", "hidden_act": "gelu", "num_hidden_layers": 1}
    encoder = write_classifier(tmp_path_factory.mktemp("encoder"), **own, **NO_DROPOUT)
    out = tmp_path_factory.mktemp("runs") / "teacher"
    schedule = Schedule(epochs=8, learning_rate=1e-2, batch_size=8)
    results = finetune_encoder(FineTuning(encoder, str(data), out, schedule, max_length=16))
    assert results["entity_f1"] > 0.75
    return out


@pytest.fixture(scope="module")
def student(tmp_path_factory, teacher, data) -> Path:
    out = tmp_path_factory.mktemp("runs") / "student"
    make(Conversion(teacher, str(data), out, stage1=STAGE, stage2=STAGE2, max_length=16, aby3_sentences=4))
    return out


def test_a_student_of_words_with_tags_has_its_figures(student):
    loaded = folders.load(student)
    assert type(loaded.model) is BertForTokenClassification
    assert loaded.model.config.id2label == ("O", "B-film", "I-film")
    assert loaded.model.config.attention.name == "2quad_freediv"
    results = json.loads((student / "results.json").read_text())
    assert results["untrained_entity_f1"] < results["stage1_entity_f1"]
    assert results["entity_f1"] > 0.75
    for protocol in ("ref2k", "aby3"):
        assert results[f"{protocol}_agreement"] > 0.99
        assert results[f"{protocol}_max_logit_difference"] < 0.05
    assert results["ref2k_entity_f1"] == pytest.approx(results["entity_f1"], abs=0.02)
    assert len(results["correct"]) > results["test_sentences"]  # one for each word
    assert results["correct"].count("1") / len(results["correct"]) == results["accuracy"]
    assert all(record["finite"] == record["rows"] for record in results["lengths"])
    card = (student / "README.md").read_text()
    assert "entity_f1" in card
    assert "on the same words, accuracy" in card


def test_a_student_finds_entities_on_shares(student, group):
    classifier = SecureClassifier.from_folder(student, group("ABY3"))
    (found,) = classifier.classify(["acted the good mess very bad"]).predictions
    assert [(each["entity_group"], each["word"]) for each in found.entities or ()] == [("film", "good mess")]


def test_what_does_not_fit_is_refused(teacher, data, tmp_path, write_classifier):
    (tmp_path / "labels.csv").write_text("sentence,label\n" + "".join(f"a film {i},{i % 2}\n" for i in range(60)))
    with pytest.raises(ValueError, match=r"labels.csv has labels of texts, but .*teacher is for token-classification"):
        make(Conversion(teacher, str(tmp_path / "labels.csv"), tmp_path / "out", max_length=16))
    of_texts = write_classifier(tmp_path / "of_texts")
    with pytest.raises(ValueError, match=r"films.conll has tags of words, but .* is for text-classification"):
        make(Conversion(of_texts, str(data), tmp_path / "out", max_length=16))
    assert not (tmp_path / "out").exists()
