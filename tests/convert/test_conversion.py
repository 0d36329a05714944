import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from flaxmpc.convert import fit
from flaxmpc.convert.conversion import Conversion, FineTuning, convert, finetune_encoder
from flaxmpc.convert.distill import Stage
from flaxmpc.convert.fit import Schedule
from flaxmpc.models import folder as folders

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
STAGE = Stage(epochs=2, learning_rate=3e-3, batch_size=8, checkpoint_every=5, hidden_weight=1.0, range_weight=0.3)
CONVERSION = Conversion(
    teacher=Path("teacher"),
    data="data.csv",
    out=Path("student"),
    stage1=STAGE,
    stage2=dataclasses.replace(STAGE, epochs=1, learning_rate=1e-3, logit_weight=1.0, hidden_weight=0.1),
    max_length=16,
    ref2k_sentences=4,
    aby3_sentences=0,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Sentences whose label is that of one of their words."""
    rng = np.random.default_rng(0)
    words = ["a", "the", "film", "movie", "acted", "very", "beautifully"]
    rows = set()
    while len(rows) < 180:
        label = int(rng.integers(2))
        mood = rng.choice(["gripping", "good"] if label else ["tedious", "bad"])
        text = [*rng.choice(words, rng.integers(1, 8)), mood, *rng.choice(words, rng.integers(0, 3))]
        rows.add((" ".join(text), ("negative", "positive")[label]))
    path = tmp_path_factory.mktemp("data") / "data.csv"
    path.write_text("\n".join(["sentence,label", *(f"{text},{label}" for text, label in sorted(rows))]) + "\n")
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, write_classifier) -> Path:
    return write_classifier(tmp_path_factory.mktemp("encoder"), attention="softmax", hidden_act="gelu", **NO_DROPOUT)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, encoder, data) -> Path:
    out = tmp_path_factory.mktemp("runs") / "teacher"
    schedule = Schedule(epochs=8, learning_rate=1e-2, batch_size=8)
    results = finetune_encoder(FineTuning(encoder, str(data), out, schedule, max_length=16))
    assert results["accuracy"] > 0.8
    return out


def conversion(teacher: Path, data: Path, out: Path, **changes) -> Conversion:
    return dataclasses.replace(CONVERSION, teacher=teacher, data=str(data), out=out, **changes)


@pytest.fixture(scope="module")
def student(tmp_path_factory, teacher, data) -> Path:
    out = tmp_path_factory.mktemp("runs") / "student"
    convert(conversion(teacher, data, out))
    return out


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def test_the_teachers_folder_says_how_it_was_made(teacher, data):
    recipe = json.loads((teacher / "recipe.json").read_text())
    assert recipe["schedule"]["epochs"] == 8
    assert recipe["data"] == str(data)
    assert "out" not in recipe
    results = json.loads((teacher / "results.json").read_text())
    hits = results["correct"]
    assert set(hits) <= {"0", "1"}
    assert hits.count("1") / len(hits) == pytest.approx(results["accuracy"])


def test_a_student_has_other_parts_and_its_figures(student):
    loaded = folders.load(student)
    config = loaded.model.config
    assert (config.attention.name, config.hidden_act.name, config.id2label) == (
        "2quad_freediv",
        "quad",
        ("negative", "positive"),
    )
    assert all(norm.name == "layer_norm_newton" for i in range(2) for norm in config.layer_norms_of(i))
    results = json.loads((student / "results.json").read_text())
    for prefix in ("", "teacher_", "untrained_", "stage1_", "stage2_"):
        assert 0 <= results[f"{prefix}accuracy"] <= 1
    assert results["accuracy"] == results["stage2_accuracy"]  # nothing here is large enough to be stored in 8 bits
    assert results["ci_low"] <= results["difference"] <= results["ci_high"]
    assert results["difference"] == pytest.approx(results["accuracy"] - results["teacher_accuracy"])
    run = json.loads((student.with_name("student.run") / "config.json").read_text())
    assert run == json.loads((student / "recipe.json").read_text())


def test_embeddings_stay_the_published_ones_unless_they_are_trained(teacher, student, data, tmp_path):
    name = "bert.embeddings.word_embeddings.weight"
    np.testing.assert_array_equal(weights(student)[name], weights(teacher)[name])
    assert folders.load(student).model.config.embedding.name == "public"
    none = dataclasses.replace(STAGE, epochs=0)
    labels = dataclasses.replace(STAGE, epochs=1, learning_rate=3e-4, hidden_weight=0.0, label_weight=1.0)
    convert(conversion(teacher, data, tmp_path / "own", train_embeddings=True, stage1=none, stage2=labels))
    assert not np.array_equal(weights(tmp_path / "own")[name], weights(teacher)[name])
    assert folders.load(tmp_path / "own").model.config.embedding.name == "secret"


def test_texts_without_labels_are_learnt_from_in_stage_1(teacher, student, data, tmp_path):
    more = tmp_path / "more.csv"
    more.write_text("sentence\n" + "".join(f"a film of {i} good scenes\n" for i in range(40)))
    out = tmp_path / "student"
    convert(conversion(teacher, data, out, unlabelled=more))
    steps = {}
    for stage in ("stage1", "stage2"):
        for folder in (out, student):
            checkpoints = folder.with_name("student.run") / stage / "checkpoints"
            steps[stage, folder] = max(int(step.name) for step in checkpoints.iterdir())
    assert steps["stage1", out] == steps["stage1", student] + 2 * 40 / 8  # of two epochs
    assert steps["stage2", out] == steps["stage2", student]
    assert json.loads((out / "recipe.json").read_text())["unlabelled"].endswith("/more.csv")


def test_a_run_of_another_config_is_not_gone_on_with(teacher, student, data):
    with pytest.raises(ValueError, match=r"student\.run holds a run with another activation, seed: remove"):
        convert(conversion(teacher, data, student, activation="gelu", seed=3))


def test_a_teacher_with_other_labels_is_refused(encoder, data, tmp_path, write_classifier):
    three = write_classifier(tmp_path / "three", id2label=("a", "b", "c"), attention="softmax")
    with pytest.raises(ValueError, match=r"has 3 labels and .*data\.csv has 2"):
        convert(conversion(three, data, tmp_path / "out"))


def test_an_unknown_part_is_named_with_the_closest(teacher, data, tmp_path):
    with pytest.raises(ValueError, match="2quad_freediv"):
        convert(conversion(teacher, data, tmp_path / "out", attention="2quad_freedif"))
    assert not (tmp_path / "out.run").exists()


def test_a_stage_without_a_loss_is_refused(teacher, data, tmp_path):
    nothing = Stage(epochs=1, learning_rate=1e-3, batch_size=8)
    with pytest.raises(ValueError, match="stage1 has no loss"):
        convert(conversion(teacher, data, tmp_path / "out", stage1=nothing))


# Ends itself, by a signal that nothing can catch, at a step of a stage.
KILLED = """
import json, os, signal, sys
from pathlib import Path
from flaxmpc.convert import distill
sys.path.insert(0, sys.argv[1])
import test_conversion
teacher, data, out, kill_at = map(Path, sys.argv[2:])
prepare, steps = distill.Teacher.__call__, []

def counted(self, batch):
    steps.append(1)
    if len(steps) == int(kill_at.name):
        os.kill(os.getpid(), signal.SIGKILL)
    return prepare(self, batch)

distill.Teacher.__call__ = counted
test_conversion.convert(test_conversion.conversion(teacher, data, out))
"""


def test_a_conversion_killed_twice_ends_with_the_same_weights(teacher, student, data, tmp_path):
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here.parents[1]), os.environ.get("PYTHONPATH", "")])}
    out = tmp_path / "student"
    for kill_at in np.random.default_rng().integers(6, 16, 2).tolist():
        command = [sys.executable, "-c", KILLED, str(here), *map(str, (teacher, data, out, kill_at))]
        killed = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not out.exists()
    convert(conversion(teacher, data, out))
    ours, theirs = weights(out), weights(student)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_the_same_seed_gives_the_same_bits(teacher, student, data, tmp_path):
    convert(conversion(teacher, data, tmp_path / "again"))
    ours, theirs = weights(tmp_path / "again"), weights(student)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_a_loss_that_is_not_finite_names_the_layer(encoder, data, tmp_path):
    broken = folders.load(encoder)
    broken.params["bert"]["layer_1"]["intermediate"]["kernel"][:] = 3e38
    folders.save(tmp_path / "broken", broken.model, broken.params, encoder)
    config = FineTuning(tmp_path / "broken", str(data), tmp_path / "out", Schedule(1, 1e-3, batch_size=8))
    with pytest.raises(FloatingPointError, match=r"is (nan|inf) at step 0, first in the output of bert/layer_1"):
        finetune_encoder(config)


def test_a_loss_that_grows_away_ends_the_run():
    watch = fit._Divergence()
    assert all(watch.bad(0.5) is None for _ in range(100))
    found = [watch.bad(1e3) for _ in range(3)]
    assert any(what and "grown" in what for what in found)
    assert "nan" in (fit._Divergence().bad(float("nan")) or "")
