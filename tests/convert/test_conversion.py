import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, load_file, save

from flaxmpc import files
from flaxmpc.convert import card, stage0
from flaxmpc.convert import conversion as conversion_module
from flaxmpc.convert.configs import Conversion, FineTuning
from flaxmpc.convert.conversion import convert, finetune_encoder
from flaxmpc.convert.distill import Stage
from flaxmpc.convert.evaluate import evaluate
from flaxmpc.convert.finetune import first_bad_layer, in_order
from flaxmpc.convert.recipe import make
from flaxmpc.data import tasks
from flaxmpc.data.batches import Split
from flaxmpc.models import folder as folders
from flaxmpc.models.params import flatten
from flaxmpc.training import fit
from flaxmpc.training.fit import Schedule

TEACHER = Schedule(epochs=8, learning_rate=1e-2, batch_size=8)
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
NONE = dataclasses.replace(STAGE, epochs=0)
UNTRAINED: dict[str, Any] = {"stage1": NONE, "stage2": NONE, "layer_norm": "layer_norm"}


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
def encoder_of(tmp_path_factory, write_classifier) -> Callable[[int], Path]:
    """encoder_of(number of layers) -> a model folder."""

    @functools.cache
    def write(layers: int) -> Path:
        parts = {"attention": "softmax", "hidden_act": "gelu", "num_hidden_layers": layers}
        return write_classifier(tmp_path_factory.mktemp("encoder"), **parts, **NO_DROPOUT)

    return write


@pytest.fixture(scope="module")
def teacher_of(tmp_path_factory, encoder_of, data) -> Callable[[int], Path]:
    """teacher_of(number of layers) -> a model folder."""

    @functools.cache
    def tune(layers: int) -> Path:
        out = tmp_path_factory.mktemp("runs") / "teacher"
        results = finetune_encoder(FineTuning(encoder_of(layers), str(data), out, TEACHER, max_length=16))
        assert results["accuracy"] > 0.8
        return out

    return tune


@pytest.fixture(scope="module")
def encoder(encoder_of) -> Path:
    return encoder_of(1)


@pytest.fixture(scope="module")
def teacher(teacher_of) -> Path:
    return teacher_of(1)


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
    assert (config.model_max_length, config.num_texts) == (16, 1)
    assert all(norm.name == "layer_norm_chebyshev" for norm in config.layer_norms_of(0))
    results = json.loads((student / "results.json").read_text())
    for prefix in ("", "teacher_", "untrained_", "stage1_", "stage2_"):
        assert 0 <= results[f"{prefix}accuracy"] <= 1
    assert results["accuracy"] == results["stage2_accuracy"]  # nothing here is large enough to be stored in 8 bits
    assert results["ci_low"] <= results["difference"] <= results["ci_high"]
    assert results["difference"] == pytest.approx(results["accuracy"] - results["teacher_accuracy"])
    run = json.loads((student.with_name("student.run") / "config.json").read_text())
    assert run == json.loads((student / "recipe.json").read_text())


def test_layer_norms_after_attention_may_be_others(teacher_of, data, tmp_path):
    teacher = teacher_of(2)
    names = ("layer_norm_constant", "layer_norm_chebyshev")
    convert(conversion(teacher, data, tmp_path / "own", **{**UNTRAINED, "layer_norm": names}))
    config = folders.load(tmp_path / "own").model.config
    norms = [config.layer_norms_of(layer) for layer in range(2)]
    assert [first.name for first, _ in norms] == [names[0]] * 2
    # Exact where no range holds the variances.
    assert {second.name for _, second in norms} <= {names[1], "layer_norm"}
    assert len({first.inverse for first, _ in norms}) == 2, "each is calibrated"
    names = ("layer_norm", "rms_norm", "layer_norm_constant", "layer_norm")
    convert(conversion(teacher, data, tmp_path / "rms", **{**UNTRAINED, "layer_norm": names}))
    config = folders.load(tmp_path / "rms").model.config
    assert tuple(norm.name for layer in range(2) for norm in config.layer_norms_of(layer)) == names
    for wrong in ((), names[:3], names * 2):
        with pytest.raises(
            ValueError, match=f"^layer_norm names {len(wrong)} parts: one, two .* each of the 2 layers$"
        ):
            convert(conversion(teacher, data, tmp_path / "wrong", **{**UNTRAINED, "layer_norm": wrong}))


def test_a_student_may_be_smaller_than_its_teacher(teacher_of, data, tmp_path):
    teacher = teacher_of(2)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 20}
    config = conversion(teacher, data, tmp_path / "small", **sizes, aby3_sentences=2)
    results = convert(config)
    loaded = folders.load(config.out)
    assert {name: getattr(loaded.model.config, name) for name in sizes} == sizes
    recipe = json.loads((config.out / "recipe.json").read_text())
    assert {name: recipe[name] for name in sizes} == sizes
    assert results["accuracy"] > 0.7
    measured = evaluate(config.out, ref2k_sentences=4, aby3_sentences=2)
    assert measured["ref2k_agreement"] == measured["aby3_agreement"] == 1
    assert measured["ref2k_max_logit_difference"] < 0.05
    with pytest.raises(ValueError, match="holds a run with another num_attention_heads"):
        convert(dataclasses.replace(config, num_attention_heads=2))


def test_a_student_starts_nearer_layer_after_layer(teacher, student, data, tmp_path, monkeypatch):
    alone = Schedule(epochs=1, learning_rate=1e-3, batch_size=8)
    config = conversion(teacher, data, tmp_path / "nearer", least_squares_rows=10**6, stage0=alone, **UNTRAINED)
    results = convert(config)
    assert results["untrained_accuracy"] > json.loads((student / "results.json").read_text())["untrained_accuracy"]
    recipe = json.loads((config.out / "recipe.json").read_text())
    assert recipe["least_squares_rows"] == 10**6
    assert recipe["stage0"]["learning_rate"] == 1e-3
    (config.out / "recipe.json").unlink()
    monkeypatch.setattr(stage0, "solved", None)  # a run that goes on has them
    assert convert(config) == results
    with pytest.raises(ValueError, match=r"^stage0 trains layers that were solved for: .* by least_squares_rows$"):
        dataclasses.replace(config, least_squares_rows=0)
    with pytest.raises(ValueError, match=r"^least_squares_rows is -1: a number of texts, or 0 for none$"):
        dataclasses.replace(config, least_squares_rows=-1)
    with pytest.raises(
        ValueError, match=r"^least_squares_rows is for layers that share no scores: leave layers_sharing"
    ):
        dataclasses.replace(config, layers_sharing_scores=2)


def test_it_starts_on_the_tasks_own_texts_where_they_are_as_many():
    own, more = (
        Split([[2, number, 3] for number in numbers], np.zeros(10, int)) for numbers in (range(10), range(10, 20))
    )
    material = conversion_module._Material(None, True, own, own, own + more, {})  # pyright: ignore[reportArgumentType]
    for count in (1, 7, 10):
        found = {row[1] for row in conversion_module._drawn(material, count, 0).input_ids}
        assert len(found) == count
        assert max(found) < 10
    for count in (11, 20, 500):
        found = {row[1] for row in conversion_module._drawn(material, count, 0).input_ids}
        assert len(found) == min(count, 20)
        assert max(found) >= 10


def test_a_students_layers_may_share_scores(teacher_of, data, tmp_path):
    teacher = teacher_of(2)
    config = conversion(teacher, data, tmp_path / "shared", layers_sharing_scores=2, aby3_sentences=2)
    results = convert(config)
    loaded = folders.load(config.out)
    assert loaded.model.config.layers_sharing_scores == 2
    assert "query" not in loaded.params["bert"]["layer_1"]["attention"]
    assert results["accuracy"] > 0.7
    measured = evaluate(config.out, ref2k_sentences=4, aby3_sentences=2)
    assert measured["ref2k_agreement"] == measured["aby3_agreement"] == 1
    assert measured["ref2k_max_logit_difference"] < 0.05
    assert "| layers that share scores | 2 |" in card.text(config.out)
    with pytest.raises(ValueError, match="shared has layers that share scores: convert the model that it was made of"):
        convert(conversion(config.out, data, tmp_path / "again"))


def test_sizes_that_a_teacher_cannot_give_are_refused_before_anything_is_written(teacher_of, data, tmp_path):
    teacher = teacher_of(2)
    for changes, message in (
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3: the teacher has 2"),
        ({"kept_layers": (2,)}, "kept_layers is 2: the teacher's are 0 to 1, each once, ascending"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0: the teacher has 2"),
        ({"intermediate_size": 10**9}, "intermediate_size is 1000000000: the teacher has"),
        (
            {"num_attention_heads": 1, "stage1": dataclasses.replace(STAGE, score_weight=0.5)},
            r"stage1 has score_weight 0.5, .* num_attention_heads can only be 2 then",
        ),
        (
            {"layers_sharing_scores": 2, "stage2": dataclasses.replace(STAGE, score_weight=0.5)},
            r"stage2 has score_weight 0.5, .* layers_sharing_scores can only be 1 then",
        ),
        ({"layers_sharing_scores": 0}, r"layers_sharing_scores 0 is not a whole number in 1\.\.128"),
        (
            {"layers_sharing_scores": 2, "attention": ("softmax", "2quad")},
            "layer 1 shares the scores of layer 0: its attention is 'softmax' too, not '2quad'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            convert(conversion(teacher, data, tmp_path / "out", **changes))
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.run").exists()


def test_public_layers_stay_the_published_ones(encoder_of, data, tmp_path):
    encoder = encoder_of(2)
    tuning = FineTuning(encoder, str(data), tmp_path / "teacher", Schedule(2, 1e-2, batch_size=8), 16, public_layers=1)
    finetune_encoder(tuning)
    convert(conversion(tuning.out, data, tmp_path / "student", least_squares_rows=40, **UNTRAINED))
    published, teacher, student = (folders.load(folder) for folder in (encoder, tuning.out, tmp_path / "student"))
    for made in (teacher, student):
        config = made.model.config
        assert (config.num_hidden_layers, config.public_layers.num_hidden_layers) == (1, 1)
        assert config.embedding.name == "public"
    flat = {name: flatten(made.params) for name, made in (("own", published), ("teacher", teacher))}
    for path, leaf in flat["own"].items():
        public = path.replace("bert/layer_0/", "bert/embeddings/layer_0/")
        if public.startswith("bert/embeddings/"):
            np.testing.assert_array_equal(flat["teacher"][public], leaf)
    first, second = (flat[name][f"bert/layer_{i}/output/kernel"] for name, i in (("own", 1), ("teacher", 0)))
    assert not np.array_equal(first, second)
    assert student.model.config.attention_of(0).name == "2quad_freediv"
    assert "| public layers | 1 more, computed by the client |" in card.text(tmp_path / "student")
    with pytest.raises(ValueError, match=r"teacher has public layers, .*: these can't be trained"):
        convert(conversion(tuning.out, data, tmp_path / "other", train_embeddings=True))
    with pytest.raises(ValueError, match="public_layers is 3: the encoder has 2 layers"):
        finetune_encoder(dataclasses.replace(tuning, out=tmp_path / "third", public_layers=3))
    with pytest.raises(ValueError, match="1 layers are public already"):
        finetune_encoder(dataclasses.replace(tuning, encoder=tuning.out, out=tmp_path / "again"))
    with pytest.raises(ValueError, match="train_embeddings makes them secret, and public_layers read them"):
        dataclasses.replace(tuning, train_embeddings=True)


def test_where_all_layers_are_public_the_head_is_trained_converted_and_measured(encoder, data, tmp_path):
    tuning = FineTuning(encoder, str(data), tmp_path / "teacher", Schedule(4, 1e-2, batch_size=8), 16, public_layers=1)
    accuracy = make(tuning)["accuracy"]
    results = make(conversion(tuning.out, data, tmp_path / "student", aby3_sentences=2))
    assert abs(results["accuracy"] - accuracy) < 0.15
    assert results["ref2k_agreement"] == results["aby3_agreement"] == 1.0
    for folder in (tuning.out, tmp_path / "student"):
        text = (folder / "README.md").read_text()
        assert "| public layers | 1 more, computed by the client |" in text
        assert "| attention |" not in text
    head = folders.load(tuning.out)
    rows = tasks.load(str(data), head.tokenizer, 16).test
    assert first_bad_layer(head.model)(head.params, next(in_order(rows))) == "the gradient: all outputs are finite"
    for changes, message in (
        ({"budget": "rounds=9"}, "teacher has no layer whose parts a budget could choose: all of them are public"),
        ({"num_hidden_layers": 1}, "num_hidden_layers is 1"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(conversion(tuning.out, data, tmp_path / "other", **changes))
        assert not (tmp_path / "other.run").exists()


def test_embeddings_stay_the_published_ones_unless_they_are_trained(teacher, student, data, tmp_path):
    name = "bert.embeddings.word_embeddings.weight"
    np.testing.assert_array_equal(weights(student)[name], weights(teacher)[name])
    assert folders.load(student).model.config.embedding.name == "public"
    labels = dataclasses.replace(STAGE, epochs=1, learning_rate=3e-4, hidden_weight=0.0, label_weight=1.0)
    convert(conversion(teacher, data, tmp_path / "own", train_embeddings=True, stage1=NONE, stage2=labels))
    assert not np.array_equal(weights(tmp_path / "own")[name], weights(teacher)[name])
    assert folders.load(tmp_path / "own").model.config.embedding.name == "secret"


def test_what_starts_from_a_secret_table_has_a_secret_one(encoder, data, tmp_path):
    """A teacher's trained table is not handed to the clients of its student."""
    tuning = FineTuning(encoder, str(data), tmp_path / "teacher", Schedule(1, 1e-3), 16, train_embeddings=True)
    finetune_encoder(tuning)
    convert(conversion(tmp_path / "teacher", data, tmp_path / "student", **UNTRAINED))
    assert json.loads((tmp_path / "teacher" / "results.json").read_text())["accuracy"] > 0.4
    for folder in ("teacher", "student"):
        assert folders.load(tmp_path / folder).model.config.embedding.name == "secret"
    again = dataclasses.replace(tuning, encoder=tmp_path / "teacher", out=tmp_path / "again", train_embeddings=False)
    with pytest.raises(ValueError, match="teacher has a secret embedding: what follows it can't be public either"):
        finetune_encoder(dataclasses.replace(again, public_layers=1))
    assert not (tmp_path / "again").exists()
    finetune_encoder(again)
    assert folders.load(tmp_path / "again").model.config.embedding.name == "secret"


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


def test_what_is_done_is_not_done_again(teacher, student, data, monkeypatch):
    def never(*_, **__):
        raise AssertionError("it is done already")

    monkeypatch.setattr(conversion_module, "learn", never)
    assert convert(conversion(teacher, data, student)) == json.loads((student / "results.json").read_text())
    older = json.loads((student / "recipe.json").read_text())
    recipe = json.dumps({name: value for name, value in older.items() if name != "inputs"})
    (student / "recipe.json").write_text(recipe)  # as before it named them
    try:
        assert convert(conversion(teacher, data, student))
    finally:
        (student / "recipe.json").write_text(json.dumps(older))


@contextlib.contextmanager
def changed(path: Path, change):
    """The file with other content, for a while."""
    before = path.read_bytes()
    path.write_bytes(change(before))
    try:
        yield
    finally:
        path.write_bytes(before)


def other_weights(content: bytes) -> bytes:
    tensors = {name: value.copy() for name, value in load(content).items()}
    tensors["bert.encoder.layer.0.output.dense.bias"][3] += 1e-3
    return save(tensors)


def test_a_run_does_not_go_on_with_other_inputs(teacher, student, data):
    """With the same command, and whether the model is finished or not."""
    swapped = lambda content: content.replace(b"gripping,positive", b"gripping,negative", 1)  # noqa: E731
    assert swapped(data.read_bytes()) != data.read_bytes()
    with (
        changed(data, swapped),
        pytest.raises(ValueError, match=r"the data changed since the run in .*student\.run began"),
    ):
        convert(conversion(teacher, data, student))
    with (
        changed(teacher / "model.safetensors", other_weights),
        pytest.raises(ValueError, match="the teacher changed since"),
    ):
        convert(conversion(teacher, data, student))
    vocabulary = lambda content: content.replace(b'"lifeless"', b'"lively"')  # noqa: E731
    with changed(teacher / "tokenizer.json", vocabulary), pytest.raises(ValueError, match="the teacher changed since"):
        convert(conversion(teacher, data, student))


def test_fine_tuning_does_not_go_on_with_other_inputs(encoder, teacher, data, tmp_path):
    config = FineTuning(encoder, str(data), teacher, TEACHER, max_length=16)
    with (
        changed(data, lambda content: content + b"a good mess,positive\n"),
        pytest.raises(ValueError, match=r"the data changed since the run in .*teacher\.run began: remove the folder"),
    ):
        finetune_encoder(config)
    elsewhere = tmp_path / encoder.parent.name / encoder.name  # a path that ends alike
    shutil.copytree(encoder, elsewhere)
    (elsewhere / "model.safetensors").write_bytes(other_weights((encoder / "model.safetensors").read_bytes()))
    with pytest.raises(ValueError, match="the encoder changed since"):
        finetune_encoder(dataclasses.replace(config, encoder=elsewhere))


def test_unlabelled_texts_are_inputs_too(teacher, data, tmp_path):
    more = tmp_path / "more.csv"
    config = conversion(teacher, data, tmp_path / "out", unlabelled=more, **UNTRAINED)
    more.write_text("sentence\na film of good scenes\n")
    convert(config)
    assert sorted(json.loads((config.out / "recipe.json").read_text())["inputs"]) == [
        "data",
        "teacher",
        "unlabelled texts",
    ]
    more.write_text("sentence\na film of bad scenes\n")
    with pytest.raises(ValueError, match="the unlabelled texts changed since"):
        convert(config)


def test_two_conversions_do_not_write_to_one_folder(teacher, data, tmp_path):
    config = conversion(teacher, data, tmp_path / "out", **UNTRAINED)
    for folder in ("out", "out.run"):
        with files.claimed(tmp_path / folder), pytest.raises(ValueError, match=rf"writes to .*/{folder}: wait"):
            convert(config)
    with files.claimed(tmp_path / "out"), pytest.raises(ValueError, match=r"writes to .*/out: wait"):
        finetune_encoder(FineTuning(teacher, str(data), tmp_path / "out", Schedule(0, 1e-3), max_length=16))
    convert(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.run"]
    with files.claimed(tmp_path / "out"), pytest.raises(ValueError, match=r"writes to .*/out: wait"):
        evaluate(tmp_path / "out")


def test_a_recipe_is_never_that_of_another_model(teacher, data, tmp_path, monkeypatch):
    """Killed while the second of two models is written to one folder, the first is not there, and not done."""
    first = conversion(teacher, data, tmp_path / "out", **UNTRAINED)
    second = dataclasses.replace(first, activation="gelu", runs=tmp_path / "second")
    convert(first)
    before = weights(tmp_path / "out")
    for killed in (folders.write_params, folders.save_tokenizer, folders.files.write_json):

        def kill(*arguments, killed=killed, **options):
            if Path(arguments[1] if killed.__name__ == "save_tokenizer" else arguments[0]).is_relative_to(
                tmp_path / "out"
            ):
                raise KeyboardInterrupt
            return killed(*arguments, **options)

        with monkeypatch.context() as patch:
            owner = folders.files if killed.__name__ == "write_json" else folders
            patch.setattr(owner, killed.__name__, kill)
            with pytest.raises(KeyboardInterrupt):
                convert(second)
        assert not (tmp_path / "out" / "recipe.json").exists()
        with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
            folders.load(tmp_path / "out")
    convert(first)
    assert folders.load(tmp_path / "out").model.config.hidden_act.name == "quad"
    assert all(np.array_equal(weights(tmp_path / "out")[name], before[name]) for name in before)


@pytest.mark.parametrize("name", ["recipe.json", "results.json"])
def test_a_damaged_record_of_a_model_is_named(name, teacher, data, tmp_path):
    config = conversion(teacher, data, tmp_path / "out", **UNTRAINED)
    expected = convert(config)
    path = tmp_path / "out" / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=rf"out/{name} .*: remove it"):
        convert(config)
    path.unlink()
    assert convert(config) == expected


def test_a_damaged_teacher_is_named(teacher, data, tmp_path):
    def flip(content):
        return content[:-40] + bytes([content[-40] ^ 1]) + content[-39:]

    with (
        changed(teacher / "model.safetensors", flip),
        pytest.raises(ValueError, match=r"teacher/model\.safetensors is damaged"),
    ):
        convert(conversion(teacher, data, tmp_path / "out"))


def relabelled(teacher: Path, folder: Path, id2label: tuple[str, ...]) -> Path:
    """The teacher with its two labels in the other order, and these names."""
    loaded = folders.load(teacher)
    model = type(loaded.model)(dataclasses.replace(loaded.model.config, id2label=id2label))
    head = {name: np.flip(leaf, -1) for name, leaf in loaded.params["classifier"].items()}
    return folders.save(folder, model, {**loaded.params, "classifier": head}, teacher)


def test_labels_are_matched_by_name(teacher, student, data, tmp_path):
    other = relabelled(teacher, tmp_path / "other", ("Positive", "Negative"))
    results = convert(conversion(other, data, tmp_path / "out", **UNTRAINED))
    expected = json.loads((student / "results.json").read_text())
    assert results["teacher_accuracy"] == expected["teacher_accuracy"] > 0.8
    assert results["teacher_correct"] == expected["teacher_correct"]
    assert folders.load(tmp_path / "out").model.config.id2label == ("Positive", "Negative")


def test_labels_without_names_in_another_order_are_refused(teacher, data, tmp_path):
    other = relabelled(teacher, tmp_path / "other", ("LABEL_0", "LABEL_1"))
    with pytest.raises(ValueError, match=r"by the ids of the labels the model is right on \d+ of \d+ rows, in another"):
        convert(conversion(other, data, tmp_path / "out", **UNTRAINED))


def test_a_teacher_with_other_labels_is_refused(data, tmp_path, write_classifier):
    for labels in (("a", "b", "c"), ("good", "bad")):
        other = write_classifier(tmp_path / labels[0], id2label=labels, attention="softmax")
        both = rf"has the labels {', '.join(labels)}; .*data\.csv has negative, positive"
        with pytest.raises(ValueError, match=both):
            convert(conversion(other, data, tmp_path / "out"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problem_type": "multi_label_classification"}, "gives a text several labels; a student of one label"),
        ({"num_texts": 2}, r"answers 2 text\(s\) at a time, .*data\.csv has 1"),
        ({"max_position_embeddings": 15}, "max_length is 16, but the model has 15 positions"),
    ],
)
def test_a_teacher_that_does_not_fit_the_data_is_refused(changes, message, data, tmp_path, write_classifier):
    other = write_classifier(tmp_path / "other", attention="softmax", **changes)
    with pytest.raises(ValueError, match=message):
        convert(conversion(other, data, tmp_path / "out"))


def test_a_tokenizer_of_another_model_is_refused(encoder, data, tmp_path, minilm):
    loaded = folders.load(encoder)
    other = folders.save(tmp_path / "other", loaded.model, loaded.params, minilm)
    with pytest.raises(ValueError, match=r"the tokenizer gives token \d+, but the model has 20"):
        finetune_encoder(FineTuning(other, str(data), tmp_path / "out", TEACHER, max_length=16))


def test_a_fine_tuned_model_says_what_it_is_for(data, tmp_path, write_classifier):
    """Whatever the encoder was before."""
    before = {"problem_type": "multi_label_classification", "id2label": ("a", "b", "c"), "model_max_length": 8}
    encoder = write_classifier(tmp_path / "encoder", attention="softmax", num_texts=2, **before)
    finetune_encoder(FineTuning(encoder, str(data), tmp_path / "out", Schedule(0, 1e-3), max_length=20))
    config = folders.load(tmp_path / "out").model.config
    assert config.id2label == ("negative", "positive")
    assert config.problem_type == "single_label_classification"
    assert (config.model_max_length, config.num_texts) == (20, 1)


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


def test_a_loss_that_is_not_finite_names_the_layer(encoder_of, data, tmp_path):
    encoder = encoder_of(2)
    broken = folders.load(encoder)
    broken.params["bert"]["layer_1"]["intermediate"]["kernel"][:] = 3e38
    folders.save(tmp_path / "broken", broken.model, broken.params, encoder)
    config = FineTuning(tmp_path / "broken", str(data), tmp_path / "out", Schedule(1, 1e-3, batch_size=8), 16)
    with pytest.raises(FloatingPointError, match=r"is (nan|inf) at step 0, first in the output of bert/layer_1"):
        finetune_encoder(config)


def test_a_loss_that_grows_away_ends_the_run():
    watch = fit._Divergence()
    assert all(watch.bad(0.5) is None for _ in range(100))
    found = [watch.bad(1e3) for _ in range(3)]
    assert any(what and "grown" in what for what in found)
    assert "nan" in (fit._Divergence().bad(float("nan")) or "")
