import csv
import re
from pathlib import Path
from typing import Any

import datasets
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from flaxmpc.data import tasks
from flaxmpc.data.batches import SPLITS, split_of
from flaxmpc.data.labels import REGRESSION
from flaxmpc.data.tasks import load


def write(file: Path, rows, columns=("sentence", "label")) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([columns, *rows])
    return file


def films(count: int, start: int = 0, labels=(0, 1)) -> list[tuple[str, Any]]:
    """Sentences, no two alike, whose labels take turns."""
    return [(f"film number {i}", labels[i % len(labels)]) for i in range(start, start + count)]


def folder_of(folder: Path, **splits) -> Path:
    for split, rows in splits.items():
        write(folder / f"{split}.csv", rows)
    return folder


def texts(task) -> dict[str, list]:
    return {split: list(getattr(task, split).texts) for split in SPLITS}


# ---------------------------------------------------------------------------------------------------- what there is


def test_the_shipped_sentences(tokenizer):
    task = load("movie", tokenizer, 64)
    assert (len(task.train), len(task.validation), len(task.test)) == (8470, 1116, 1019)
    assert task.id2label == ("negative", "positive")
    assert (task.num_labels, task.regression, task.metrics) == (2, False, ("accuracy",))
    assert task.text_columns == ("sentence",)
    assert task.train.token_type_ids is None
    assert task.train.labels.dtype == np.int32
    assert max(map(len, task.train.input_ids)) <= 64
    assert task.test.texts is not None
    for row in (0, 500, 1018):
        assert task.test.input_ids[row].tolist() == tokenizer(task.test.texts[row])["input_ids"][:64]
    # The same words with other punctuation or case are other texts; equal ones are in one split.
    assert not any("are in" in warning for warning in task.warnings)


def test_a_file_is_split_by_its_texts(tmp_path, read):
    rows = films(300)
    task = read(write(tmp_path / "films.csv", rows))
    for split, found in texts(task).items():
        assert found == [text for text, _ in rows if split_of(text) == split]
        assert getattr(task, split).labels.tolist() == [label for text, label in rows if split_of(text) == split]
    assert task.name == str(tmp_path / "films.csv")
    assert task.warnings == ()


def test_three_files_are_used_as_they_are(tmp_path, read):
    task = read(folder_of(tmp_path, train=films(6), dev=films(3, 6), test=films(2, 9), unlabelled=[("a", "")]))
    assert texts(task) == {
        "train": [text for text, _ in films(6)],
        "validation": [text for text, _ in films(3, 6)],
        "test": [text for text, _ in films(2, 9)],
    }


@pytest.mark.parametrize("given", ["validation", "test"])
def test_one_held_out_file_is_the_test_split(tmp_path, read, given):
    train = films(100)
    task = read(folder_of(tmp_path, train=train, **{given: films(7, 100)}))
    assert texts(task)["test"] == [text for text, _ in films(7, 100)]
    assert texts(task)["validation"] == [text for text, _ in train if split_of(text) == "validation"]
    assert texts(task)["train"] == [text for text, _ in train if split_of(text) != "validation"]


def test_a_training_file_alone_is_split_in_three(tmp_path, read):
    folder = folder_of(tmp_path / "folder", train=films(200))
    assert texts(read(folder)) == texts(read(write(tmp_path / "films.csv", films(200))))


@hypothesis.given(st.lists(st.text("ab c", min_size=1).filter(str.strip), min_size=40, max_size=60))
@hypothesis.settings(max_examples=40)
def test_equal_texts_never_stand_in_two_splits(tmp_path_factory, sentences):
    rows = [*films(100), *((text, i % 2) for i, text in enumerate(sentences))]
    three = tasks._three({tasks.ALL: tasks.Rows([text for text, _ in rows], np.array([label for _, label in rows]))})
    stripped = {split: {str(text).strip() for text in three[split].texts} for split in SPLITS}
    assert sum(map(len, stripped.values())) == len(set.union(*stripped.values()))
    assert sum(len(three[split].texts) for split in SPLITS) == len(rows)


@pytest.mark.parametrize(
    ("labels", "id2label", "dtype"),
    [
        ((0, 1, 2), ("LABEL_0", "LABEL_1", "LABEL_2"), np.int32),
        (("good", " bad"), ("bad", "good"), np.int32),
        ((0.5, 3, "4.25"), REGRESSION, np.float32),
    ],
)
def test_the_kinds_of_labels(tmp_path, read, labels, id2label, dtype):
    rows = films(60, labels=labels)
    others = (films(9, start, labels) for start in (60, 90))
    task = read(folder_of(tmp_path, train=rows, dev=next(others), test=next(others)))
    assert task.id2label == id2label
    assert task.num_labels == len(id2label)
    assert task.regression == (id2label == REGRESSION)
    assert task.metrics == (("pearson", "spearman") if task.regression else ("accuracy",))
    assert task.train.labels.dtype == dtype
    expected = [
        id2label.index(label.strip()) if dtype == np.int32 and isinstance(label, str) else float(label)
        for _, label in rows
    ]
    np.testing.assert_array_equal(task.train.labels, expected)


def test_true_and_false_are_classes(tmp_path, read):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(f'{{"text": "film {i}", "label": {"true" if i % 2 else "false"}}}\n' for i in range(100)))
    task = read(file)
    assert task.id2label == ("LABEL_0", "LABEL_1")
    assert task.train.labels.tolist() == [int(text.split()[1]) % 2 for text in task.train.texts]


@pytest.mark.parametrize(
    "columns", [("sentence1", "sentence2"), ("question", "sentence"), ("premise", "hypothesis"), ("b", "a")]
)
def test_pairs(tmp_path, read, tokenizer, columns):
    rows = [(f"A film {i}.", "It is good.", i % 2) for i in range(60)]
    file = write(tmp_path / "pairs.csv", rows, (*columns, "label"))
    task = read(file, text_columns=() if columns != ("b", "a") else columns)
    assert task.text_columns == columns
    assert task.train.token_type_ids is not None
    for split in SPLITS:
        found = getattr(task, split)
        expected = tokenizer(*map(list, zip(*found.texts, strict=True)))
        assert [row.tolist() for row in found.input_ids] == expected["input_ids"]
        assert [row.tolist() for row in found.token_type_ids] == expected["token_type_ids"]


def test_columns_of_other_names(tmp_path, read):
    file = write(tmp_path / "a.csv", films(60), ("review", "stars"))
    task = read(file, text_columns=("review",), label_column="stars")
    assert task.text_columns == ("review",)
    assert task.num_labels == 2


def test_what_datasets_saved_has_names_of_classes(tmp_path, read):
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"]))
    rows = films(80)
    columns = {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path))
    assert read(tmp_path).id2label == ("no", "yes")


# ----------------------------------------------------------------------------------------------------------- warnings


def test_long_texts_are_cut_and_counted(tmp_path, read):
    train = [*films(8), ("film " * 30, 0), ("film " * 14, 1), ("film " * 15, 1)]
    task = read(folder_of(tmp_path, train=train, dev=films(3, 50), test=films(3, 60)))
    assert task.warnings == ("train: 2 of 11 texts are cut at 16 tokens",)
    assert max(map(len, task.train.input_ids)) == 16


def test_no_two_splits_share_a_text(tmp_path, read):
    task = read(folder_of(tmp_path, train=films(8), dev=films(4, 6), test=[*films(3, 6), *films(1, 6)]))
    assert task.warnings == (
        "validation: 3 of 4 rows are left out, as their texts are in test",
        "train: 2 of 8 rows are left out, as their texts are in validation or test",
    )
    assert [len(split) for split in (task.train, task.validation, task.test)] == [6, 1, 4]
    train, validation, test = (set(split.texts or ()) for split in (task.train, task.validation, task.test))
    assert not train & (validation | test)
    assert not validation & test
    assert "film number 9" in validation


def test_a_split_without_a_text_of_its_own_is_refused(tmp_path, read):
    with pytest.raises(ValueError, match=r"^all 3 texts of .*'s validation are in test too: a split needs its own$"):
        read(folder_of(tmp_path, train=films(8), dev=films(3, 50), test=films(3, 50)))
    with pytest.raises(ValueError, match=r"^all 3 texts of .*'s train are in validation or test too: a split needs"):
        read(folder_of(tmp_path, train=films(3, 50), dev=films(3, 60), test=films(6, 50)))


def test_texts_with_two_labels_are_counted(tmp_path, read):
    train = [*films(8), ("film number 0", 1), ("film number 1", 1), ("film number 0", 1)]
    task = read(folder_of(tmp_path, train=train, dev=films(3, 50), test=films(3, 60)))
    assert task.warnings == ("train: 2 of 11 rows repeat an earlier text with another label",)


# ----------------------------------------------------------------------------------------------------------- bad data

GOOD = films(20)


def bad(place: int, *row) -> list:
    """Good rows, but one; it stands on line `place` of a file."""
    return [*GOOD[: place - 2], row, *GOOD[place - 2 :]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (bad(5, "a", -1), "train.csv, line 5: label -1 is negative"),
        (bad(6, "a", ""), "train.csv, line 6: label is missing"),
        (bad(6, "a", "nan"), "train.csv, line 6: label is missing or no label: 'nan'"),
        (bad(7, "a", "good"), "train.csv, line 7: label 'good' is not a number, as most labels are"),
        (bad(7, " ", 1), "train.csv, line 7: sentence is empty"),
        (bad(9, "a", 5), "has labels up to 5 but no row of class 2"),
        (bad(9, "a", 10**12), "has labels up to 1000000000000 but no row of class 2"),
        (films(20, labels=(0,)), "all labels of label for training are LABEL_0: there is nothing to learn"),
        (films(20, labels=("good",)), "all labels of label for training are good: there is nothing to learn"),
        ([*films(20, labels=("good", "bad")), ("a", 3)], "line 22: label 3 is not a name, as most labels are"),
        ([*films(20, labels=(0.5, 1.5)), ("a", "inf")], "line 22: label inf is not finite"),
        ([], "train.csv has no rows"),
    ],
)
def test_bad_rows_are_refused_with_their_line(tmp_path, read, rows, message):
    folder_of(tmp_path, train=rows, dev=[("b", 0), ("c", 1)], test=[("d", 1)])
    if any(isinstance(label, (float, str)) and label not in ("", "nan") for _, label in rows[:3]):
        folder_of(tmp_path, dev=rows[:2], test=rows[:2])
    with pytest.raises(ValueError, match=re.escape(message)):
        read(tmp_path)


@pytest.mark.parametrize(
    ("labels", "row", "message"),
    [
        ((0, 1), ("a", 2), "test.csv, line 3: label 2 is none of the classes: 0 to 1"),
        (("bad", "good"), ("a", "ok"), "test.csv, line 3: label 'ok' is none of the classes: bad, good"),
        (
            (0, 1),
            ("a", -1),
            "test.csv, line 3: label -1 is negative (-1 often marks a split whose labels are not public)",
        ),
    ],
)
def test_a_class_that_training_does_not_know_is_refused(tmp_path, read, labels, row, message):
    good = films(20, labels=labels)
    folder_of(tmp_path, train=good, dev=good[:2], test=[good[0], row])
    with pytest.raises(ValueError, match=re.escape(message)):
        read(tmp_path)


def test_a_class_that_training_lacks_is_named(tmp_path, read):
    for split in ("train", "dev"):
        rows = [(f"a {i}", split, ("entailment", "neutral")[i % 2]) for i in range(60)]
        write(tmp_path / f"{split}.csv", rows, ("premise", "hypothesis", "label"))
    with pytest.raises(ValueError, match=r"training split of mnli has no row of class 2 \(contradiction\)"):
        read(f"mnli={tmp_path}")


def test_a_class_that_splitting_takes_from_training_is_named(tmp_path, read):
    rows = [*films(100), next((text, 2) for text, _ in films(99, 100) if split_of(text) == "test")]
    with pytest.raises(ValueError, match=r"has no row of class 2 \(LABEL_2\)"):
        read(write(tmp_path / "a.csv", rows))


def test_ids_beyond_the_names_are_refused(tmp_path, read):
    folder_of(tmp_path, train=bad(4, "a", 2), dev=GOOD[:2])
    with pytest.raises(ValueError, match=r"train.csv, line 4: label 2 is none of the classes: 0 to 1"):
        read(f"sst2={tmp_path}")
    folder_of(tmp_path, train=bad(4, "a", 0.5), dev=GOOD[:2])
    with pytest.raises(ValueError, match=r"train.csv, line 4: label 0.5 is not the id of a class"):
        read(f"sst2={tmp_path}")


def test_columns_are_named_where_one_is_missing(tmp_path, read):
    file = write(tmp_path / "a.csv", GOOD, ("review", "stars"))
    with pytest.raises(ValueError, match=r"no column of text that is named as usual .* Its columns are review, stars"):
        read(file)
    with pytest.raises(ValueError, match=r"a.csv has no column label. Its columns are review, stars"):
        read(file, text_columns=("review",))
    with pytest.raises(ValueError, match=r"a.csv has no column text, label. Its columns"):
        read(file, text_columns=("text",))
    with pytest.raises(ValueError, match="a row has one text or two, not 3: a, b, c"):
        read(file, text_columns=("a", "b", "c"))
    folder_of(tmp_path / "two", train=GOOD)
    write(tmp_path / "two" / "test.csv", GOOD, ("sentence", "stars"))
    with pytest.raises(ValueError, match=r"test.csv has no column label. Its columns are sentence, stars"):
        read(tmp_path / "two")


def test_names_of_columns_that_cannot_be_seen_are_quoted(tmp_path, read):
    file = write(tmp_path / "a.csv", GOOD, ("text\u200b", " label"))
    with pytest.raises(ValueError, match=r"Its columns are 'text\\u200b', ' label'"):
        read(file)


def test_texts_have_to_be_strings(tmp_path, read):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a", "label": 0}\n{"text": 3, "label": 1}\n')
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: text is 3, not a string"):
        read(file)
    file.write_text('{"text": "a", "label": 0}\n\n{"label": 1}\n')
    with pytest.raises(ValueError, match=r"a.jsonl, line 3: text is missing"):
        read(file)
    file.write_text('{"text": "a", "label": 0}\n{"text": "b", "label": [1]}\n')
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: label is missing or no label: \[1\]"):
        read(file)
    datasets.Dataset.from_dict({"text": ["a", None], "label": [0, 1]}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=r"saved, row 1 \(from 0\): text is missing"):
        read(tmp_path / "saved")


def test_splits_that_disagree_on_the_names_are_refused(tmp_path, read):
    def named(*names: str) -> datasets.Dataset:
        features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=list(names)))
        return datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)

    datasets.DatasetDict({"train": named("no", "yes"), "test": named("yes", "no")}).save_to_disk(str(tmp_path))
    with pytest.raises(ValueError, match="the splits name the classes of label differently"):
        read(tmp_path)


def test_too_few_rows_to_split(tmp_path, read):
    with pytest.raises(ValueError, match=r"a.csv has 2 rows to be split: too few, none falls in"):
        read(write(tmp_path / "a.csv", films(2)))


def test_a_training_split_is_needed_once(tmp_path, read):
    with pytest.raises(ValueError, match="has no training split: a split or file named train is needed, it has test"):
        read(folder_of(tmp_path, test=GOOD))
    with pytest.raises(ValueError, match="has the split validation twice"):
        read(folder_of(tmp_path, train=GOOD, dev=GOOD, validation=GOOD))


@pytest.mark.parametrize("data", ["sst22", "sst=folder", "nowhere/sst2.csv"])
def test_an_unknown_name_lists_the_known(read, data):
    with pytest.raises(ValueError, match=f"unknown data set or path '{data}'.* Known: cola, mnli, movie"):
        read(data)


# ----------------------------------------------------------------------------------------------- texts without labels


def test_texts_without_labels_are_those_that_are_not_held_out(tmp_path, read, tokenizer):
    task = read(folder_of(tmp_path, train=films(6), dev=films(3, 6), test=films(2, 9)))
    texts = [("unseen", 1), ("film number 7", 2), ("film number 10", 3), ("film number 0", 4)]
    split = tasks.unlabelled(write(tmp_path / "more.csv", texts, ("sentence", "id")), task, tokenizer, 16)
    assert [row.tolist() for row in split.input_ids] == tokenizer(["unseen", "film number 0"])["input_ids"]
    assert split.labels.tolist() == [0, 0]
    assert split.labels.dtype == task.train.labels.dtype
    assert len(task.train + split) == 8


@pytest.mark.parametrize(
    ("columns", "rows", "message"),
    [
        (("text",), [("a",)], r"more\.csv has no column sentence. Its columns are text"),
        (("sentence", "id"), [("a", 1), (" ", 2)], r"more\.csv, line 3: sentence is empty"),
        (("sentence",), [("film number 7",)], "has no texts but those of"),
    ],
)
def test_texts_without_labels_that_cannot_be_had(tmp_path, read, tokenizer, columns, rows, message):
    task = read(folder_of(tmp_path, train=films(6), dev=films(3, 6), test=films(2, 9)))
    with pytest.raises(ValueError, match=message):
        tasks.unlabelled(write(tmp_path / "more.csv", rows, columns), task, tokenizer, 16)
