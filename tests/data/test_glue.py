"""The tasks of GLUE: as the hub has them, in local copies, and as GLUE itself ships them."""

from pathlib import Path

import datasets
import pytest

from flaxmpc.data import tasks
from flaxmpc.data.batches import SPLITS, split_of
from flaxmpc.data.glue import GLUE
from flaxmpc.data.labels import REGRESSION


def hub_like(name: str) -> datasets.DatasetDict:
    """A small set with the splits, columns and types of the hub's."""
    glue = GLUE[name]
    label = datasets.Value("float32") if glue.id2label == REGRESSION else datasets.ClassLabel(names=list(glue.id2label))
    features = datasets.Features(
        {
            **{column: datasets.Value("string") for column in glue.text_columns},
            "label": label,
            "idx": datasets.Value("int32"),
        }
    )

    def split(kind: str, count: int) -> datasets.Dataset:
        columns = {column: [f"{kind} {column} {i}" for i in range(count)] for column in glue.text_columns}
        labels = [i % len(glue.id2label) if len(glue.id2label) > 1 else 0.25 * (i % 20) for i in range(count)]
        columns |= {"label": [-1] * count if kind.startswith("test") else labels, "idx": list(range(count))}
        return datasets.Dataset.from_dict(columns, features=features)

    kinds = ("matched", "mismatched") if name == "mnli" else ("",)
    held_out = {
        "_".join(filter(None, (part, kind))): split(f"{part} {kind}", count)
        for part, count in (("validation", 12), ("test", 9))
        for kind in kinds
    }
    return datasets.DatasetDict({"train": split("train", 60), **held_out})


@pytest.mark.parametrize("name", GLUE)
def test_glue_from_the_hub_and_from_a_local_copy_is_the_same(name, tmp_path, read, monkeypatch):
    hub = hub_like(name)
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: asked.append(args) or hub)
    task = read(name)
    assert asked == [("nyu-mll/glue", name)]
    assert task.name == name
    assert task.id2label == GLUE[name].id2label
    assert task.metrics == GLUE[name].metrics
    assert task.regression == (name == "stsb")
    held_out = hub["validation_matched" if name == "mnli" else "validation"]
    assert task.test.labels.tolist() == held_out["label"]
    assert len(task.train) + len(task.validation) == 60
    assert all(split_of(text) == "validation" for text in task.validation.texts)
    assert not any(split_of(text) == "validation" for text in task.train.texts)
    assert (task.train.token_type_ids is not None) == (len(GLUE[name].text_columns) == 2)

    hub.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "parquet").mkdir()
    for split, rows in hub.items():
        rows.to_parquet(str(tmp_path / "parquet" / f"{split}-00000-of-00001.parquet"))
    (tmp_path / "csv").mkdir()
    for split, rows in hub.items():
        rows.to_csv(str(tmp_path / "csv" / f"{str(split).replace('validation', 'dev')}.csv"), index=False)
    for copy in ("saved", "parquet", "csv"):
        local = read(f"{name}={tmp_path / copy}")
        assert (local.name, local.id2label, local.metrics) == (task.name, task.id2label, task.metrics)
        for split in SPLITS:
            own, hubs = getattr(local, split), getattr(task, split)
            assert own.texts == hubs.texts
            assert own.labels.tolist() == hubs.labels.tolist()
            assert list(map(list, own.input_ids)) == list(map(list, hubs.input_ids))
    assert len(asked) == 1


def test_a_hub_out_of_reach_is_said_with_the_way_around(read, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(ConnectionError, match=r"GLUE's sst2 cannot be had from the hub .* local copy: sst2=FOLDER"):
        read("sst2")


def test_empty_texts_of_glue_are_kept_and_counted(tmp_path, read):
    rows = [f"What is {i}?,{'' if i in (3, 4) else f'{i}?'},{i % 2}" for i in range(60)]
    for split, lines in (("train", rows), ("dev", ["Is it?,It is.,0"])):
        (tmp_path / f"{split}.csv").write_text("\n".join(["question1,question2,label", *lines]))
    task = read(f"qqp={tmp_path}")
    assert task.warnings == (f"{tmp_path / 'train.csv'}: 2 texts are empty",)
    assert len(task.train) + len(task.validation) == 60


# As GLUE ships them: the lines of names of train and dev, rows of made-up texts, and where the texts and label stand.
SHIPPED = {
    "cola": (None, "gj04\t{id}\t\tA sentence {n}."),
    "sst2": ("sentence\tlabel", "a film {n} \t{id}"),
    "mrpc": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        '{id}\t7{n}\t8{n}\tHe said " it {n} .\t"It {n} ".',
    ),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", '{n}\t1\t2\t"""Is it {n}?\tIs it?"\t{id}'),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "{n}\tmain-news\tMSRvid\t2012\t000{n}\tnone\tnone\tA man {n}.\tA woman.\t{id}.250",
    ),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse"
        "\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        "{n}\t3\t3n\tfiction\t( It {n} )\t( It )\t(ROOT {n})\t(ROOT)\tIt {n}.\tIt.\tneutral\t{label}",
    ),
    "qnli": ("index\tquestion\tsentence\tlabel", "{n}\tWhat {n}?\tThat.\t{label}"),
    "rte": ("index\tsentence1\tsentence2\tlabel", "{n}\tIt {n}.\tIt.\t{label}"),
    "wnli": ("index\tsentence1\tsentence2\tlabel", "{n}\tIt {n}.\tIt.\t{id}"),
}


def ship(folder: Path, name: str) -> Path:
    """A folder of a task in the form in which GLUE ships it: 60 rows to train on, 12 of dev, test without labels."""
    header, row = SHIPPED[name]
    names = GLUE[name].id2label

    def lines(start: int, count: int) -> list[str]:
        made = [
            row.format(n=n, id=n % max(2, len(names)), label=names[n % len(names)]) for n in range(start, start + count)
        ]
        return made if header is None else [header, *made]

    folder.mkdir()
    held_out = ("dev_matched", "dev_mismatched") if name == "mnli" else ("dev",)
    for split, start, count in (("train", 0, 60), *((split, 100 * i + 100, 12) for i, split in enumerate(held_out))):
        (folder / f"{split}.tsv").write_text("\n".join(lines(start, count)), encoding="utf-8")
    test = [f"{n}\tA text {n}" for n in range(9)]
    (folder / f"{held_out[0].replace('dev', 'test')}.tsv").write_text("\n".join(["index\tsentence", *test]) + "\n")
    (folder / "diagnostic-full.tsv").write_text("a table of another form\n1\t2\n")
    (folder / "original").mkdir()
    return folder


@pytest.mark.parametrize("name", GLUE)
def test_glue_as_it_ships_it(name, tmp_path, read):
    task = read(f"{name}={ship(tmp_path / name, name)}")
    assert (task.name, task.id2label, task.metrics) == (name, GLUE[name].id2label, GLUE[name].metrics)
    assert task.text_columns == GLUE[name].text_columns
    assert task.warnings == ()
    assert len(task.train) + len(task.validation) == 60
    numbers = [n % max(2, len(task.id2label)) for n in range(100, 112)]
    assert task.test.labels.tolist() == ([n + 0.25 for n in numbers] if name == "stsb" else numbers)
    expected = {
        "cola": "A sentence 100.",
        "sst2": "a film 100 ",
        "mrpc": ('He said " it 100 .', '"It 100 ".'),
        "qqp": ('"""Is it 100?', 'Is it?"'),
        "stsb": ("A man 100.", "A woman."),
        "qnli": ("What 100?", "That."),
    }
    assert task.test.texts[0] == expected.get(name, ("It 100.", "It."))


@pytest.mark.parametrize("name", ["cola", "mrpc", "stsb"])
def test_texts_without_labels_as_glue_ships_them(name, tmp_path, read, tokenizer):
    task = read(f"{name}={ship(tmp_path / name, name)}")
    split = tasks.unlabelled(tmp_path / name / "train.tsv", task, tokenizer, 16)
    assert len(split) == len(task.train)  # all but those of validation


def test_columns_of_glue_by_their_own_names(tmp_path, read):
    folder = ship(tmp_path / "mrpc", "mrpc")
    task = read(f"mrpc={folder}", text_columns=("#2 String", "#1 String"), label_column="Quality")
    assert task.test.texts[0] == ('"It 100 ".', 'He said " it 100 .')


def test_glue_with_classes_in_another_order(tmp_path, read):
    turned = datasets.Features(
        premise=datasets.Value("string"),
        hypothesis=datasets.Value("string"),
        label=datasets.ClassLabel(names=["contradiction", "entailment", "neutral"]),
    )
    columns = {"premise": [f"a {i}" for i in range(60)], "hypothesis": ["b"] * 60, "label": [i % 3 for i in range(60)]}
    rows = datasets.Dataset.from_dict(columns, features=turned)
    held_out = datasets.Dataset.from_dict({**columns, "hypothesis": ["c"] * 60}, features=turned)
    datasets.DatasetDict({"train": rows, "validation_matched": held_out}).save_to_disk(str(tmp_path))
    task = read(f"mnli={tmp_path}")
    assert task.id2label == ("entailment", "neutral", "contradiction")
    assert task.test.labels.tolist() == [(i + 2) % 3 for i in range(60)]


def test_a_folder_of_glue_has_a_name(read):
    with pytest.raises(ValueError, match="sst2= names no folder"):
        read("sst2=")
