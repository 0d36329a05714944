"""Words with tags: read from CoNLL and tables, split, and put on tokens."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaxmpc.data import tables, tasks
from flaxmpc.data.batches import IGNORED, batches
from flaxmpc.data.matching import matched
from flaxmpc.data.pieces import pieces
from flaxmpc.models.folder import load_tokenizer

TAGS = ("O", "B-film", "I-film")


@pytest.fixture(scope="module")
def tokenizer(write_classifier, tmp_path_factory):
    return load_tokenizer(write_classifier(tmp_path_factory.mktemp("model")))


def rows_of(count, seed=0):
    """Sentences; what follows "the" is a film."""
    rng = np.random.default_rng(seed)
    found = {}
    while len(found) < count:
        words = rng.choice(["a", "the", "film", "good", "very", "acted,"], rng.integers(2, 8)).tolist()
        found[" ".join(words)] = ["O" if i == 0 or words[i - 1] != "the" else "B-film" for i in range(len(words))]
    return [(text.split(" "), tags) for text, tags in found.items()]


def write_conll(path, rows, separator="\t"):
    lines = ["".join(f"{word}{separator}{tag}\n" for word, tag in zip(*row, strict=True)) for row in rows]
    path.write_text("\n".join(lines))
    return path


def texts_of(split) -> list[str]:
    return [str(text) for text in split.texts]


@pytest.fixture
def folder(tmp_path):
    rows = rows_of(60)
    for name, part in (("train", rows[:40]), ("dev", rows[40:50]), ("test", rows[50:])):
        write_conll(tmp_path / f"{name}.conll", part)
    return tmp_path


def test_the_first_token_of_a_word_has_its_tag(folder, tokenizer):
    task = tasks.load(str(folder), tokenizer, 16)
    assert task.id2label == ("O", "B-film")
    assert task.metrics == ("entity_f1", "accuracy")
    assert not task.regression
    assert [len(split) for split in (task.train, task.validation, task.test)] == [40, 10, 10]
    for split in (task.train, task.validation, task.test):
        for ids, labels, text in zip(split.input_ids, split.labels, texts_of(split), strict=True):
            words = text.split(" ")
            first = np.flatnonzero(labels != IGNORED)
            assert len(first) == len(words)
            spoken = [tokenizer.convert_ids_to_tokens([i])[0] for i in ids[first]]
            assert spoken == [word.removesuffix(",") for word in words]
            wanted = [int(i > 0 and words[i - 1] == "the") for i in range(len(words))]
            assert labels[first].tolist() == wanted
        assert split.answers.tolist() == [label for row in split.labels for label in row.tolist() if label >= 0]
        assert sum(split.sizes) == len(split.answers)


def test_every_format_gives_the_same_rows(tmp_path, tokenizer):
    rows = rows_of(30)
    conll = write_conll(tmp_path / "a.conll", rows)
    columns = write_conll(tmp_path / "b.conll", rows, " NNP B-NP ")  # CoNLL-2003 has four
    with_documents = tmp_path / "c.conll"
    with_documents.write_text("-DOCSTART-\tO\n\n" + conll.read_text().replace("\n", "\r\n"))
    lines = [json.dumps({"tokens": words, "ner_tags": tags}) for words, tags in rows]
    (tmp_path / "d.jsonl").write_text("\n".join(lines) + "\n")
    found = [tasks.load(str(tmp_path / name), tokenizer, 16) for name in ("a.conll", "b.conll", "c.conll", "d.jsonl")]
    assert columns.read_text() != conll.read_text()
    for task in found[1:]:
        assert task.train.texts == found[0].train.texts
        assert task.id2label == found[0].id2label
        np.testing.assert_array_equal(task.test.answers, found[0].test.answers)


def test_words_that_are_cut_off_count_nowhere_and_this_is_said(folder, tokenizer):
    task = tasks.load(str(folder), tokenizer, 5)
    assert any("texts are cut at 5 tokens" in each for each in task.warnings)
    (lost,) = [each for each in task.warnings if each.startswith("train") and "words have no token" in each]
    words = sum(len(text.split(" ")) for text in texts_of(task.train))
    assert lost.startswith(f"train: {words - len(task.train.answers)} words")


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("a\tO\nfilm\n", r"train.conll, line 2: 'film' is no word and tag, with a tab or space between"),
        ("a\tO\nfilm\t\n", r"train.conll, line 2: 'film\\t' is no word and tag"),
        ("a\tO\n\nb\tO\n", r"all tags of tags are O: there is nothing to learn"),
        ("\n\n", r"train.conll is empty"),
        ("-DOCSTART-\tO\n", r"train.conll has no rows"),
        ("a film\tO\n\nb\tB-film\n", r"train.conll, line 1.*: 'a film' is no word without spaces"),
    ],
)
def test_a_broken_file_is_refused_in_one_line(tmp_path, tokenizer, text, refused):
    (tmp_path / "train.conll").write_text(text)
    with pytest.raises(ValueError, match=refused) as error:
        tasks.load(str(tmp_path), tokenizer, 16)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "refused"),
    [
        ({"tokens": ["a"], "tags": ["O", "O"]}, "line 2: 1 words, but 2 tags"),
        ({"tokens": "a film", "tags": ["O", "O"]}, "line 2: tokens is 'a film', not a list"),
        ({"tokens": ["a"]}, "line 2: tags is missing"),
        ({"tokens": [], "tags": []}, "line 2: no words"),
        ({"tokens": ["a"], "tags": [3]}, "line 2: 3 is no tag: a name, such as O or B-person"),
        ({"tokens": [None], "tags": ["O"]}, "line 2: None is no word without spaces"),
        ({"tokens": [""], "tags": ["O"]}, "line 2: '' is no word without spaces"),
    ],
)
def test_a_row_that_is_no_words_with_tags_is_refused(tmp_path, tokenizer, row, refused):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"tokens": ["a", "film"], "tags": ["O", "B-film"]}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=refused):
        tasks.load(str(path), tokenizer, 16)


def test_a_tag_that_train_lacks_is_refused(folder, tokenizer):
    (folder / "test.conll").write_text("a\tO\nfilm\tB-actor\n")
    with pytest.raises(ValueError, match=r"the training split of .* has no word with the tag B-actor"):
        tasks.load(str(folder), tokenizer, 16)


def test_tags_are_matched_with_a_models_by_name(folder, tokenizer):
    task = tasks.load(str(folder), tokenizer, 16)
    turned = matched(task, ("B_FILM", "o"), "a model")
    assert turned.id2label == ("B_FILM", "o")
    assert (turned.train.answers == 1 - task.train.answers).all()
    for ours, theirs in zip(turned.train.labels, task.train.labels, strict=True):
        assert ((ours == IGNORED) == (theirs == IGNORED)).all()


def test_batches_and_pieces_keep_each_tokens_tag(folder, tokenizer):
    train = tasks.load(str(folder), tokenizer, 16).train
    for split in (train, pieces(train, 1.0, seed=0), train + train[:3], train[[5, 2]]):
        seen = 0
        for batch in batches(split, batch_size=4, lengths=(8, 16), seed=1):
            assert batch.label.shape == batch.input_ids.shape
            for row in np.flatnonzero(batch.row_mask):
                place = batch.place[row]
                own = split.labels[place]
                np.testing.assert_array_equal(batch.label[row, : len(own)], own)
                assert (batch.label[row, len(own) :] == IGNORED).all()
                logits = np.arange(batch.label.shape[1] * 2.0).reshape(-1, 2)
                assert split.logits_of(place, logits)[:, 0].tolist() == (2 * np.flatnonzero(own != IGNORED)).tolist()
            assert (batch.label[batch.row_mask == 0] == IGNORED).all()
            seen += int((batch.label != IGNORED).sum())
        assert seen == len(split.answers)


@given(st.lists(st.text(st.characters(exclude_characters="\n\r\t "), max_size=4), max_size=6))
def test_conll_of_any_words_comes_out_as_it_was_or_is_refused(tmp_path_factory, words):
    path = tmp_path_factory.mktemp("any") / "a.conll"
    path.write_bytes("".join(f"{word}\tO\n" for word in words).encode("utf-8", "surrogatepass"))
    try:
        table = tables.read(path)[tables.ALL]
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    kept = [word for word in words if word != "-DOCSTART-"]
    assert [word for row in table.columns["tokens"][:] for word in row] == kept
