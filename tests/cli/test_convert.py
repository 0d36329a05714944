"""The commands that train, on a small model and a file of sentences, as a user would give them."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from flaxmpc.cli import main as cli
from flaxmpc.convert.configs import FineTuning
from flaxmpc.convert.evaluate import evaluate, spread
from flaxmpc.models.folder import read_config
from flaxmpc.nn.activation import ACTIVATIONS
from flaxmpc.nn.attention import ATTENTION
from flaxmpc.nn.normalization import NORMALIZATIONS


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    words = ["a", "the", "film", "movie", "acted", "very", "beautifully"]
    moods = {"good": 1, "gripping": 1, "bad": 0, "tedious": 0}
    rows = [(f"{a} {b} {mood}", label) for mood, label in moods.items() for a in words for b in words[:3]]
    path = tmp_path_factory.mktemp("data") / "films.jsonl"
    path.write_text("".join(json.dumps({"sentence": text, "label": label}) + "\n" for text, label in rows))
    return path


def test_a_model_is_fine_tuned_converted_and_measured_by_command(data, tmp_path, write_classifier, capsys):
    encoder = write_classifier(tmp_path / "encoder", attention="softmax", hidden_act="gelu")
    teacher, student = str(tmp_path / "teacher"), tmp_path / "student"
    short = ["--schedule.epochs", "1", "--schedule.batch-size", "8", "--max-length", "16"]
    cli.main(["finetune", "--encoder", str(encoder), "--data", str(data), "--out", teacher, *short])
    assert "accuracy" in capsys.readouterr().out
    stages = [f"--stage{i}.{option}" for i in (1, 2) for option in ("epochs=1", "batch-size=8")]
    sizes = ["--max-length", "16", "--ref2k-sentences", "4", "--aby3-sentences", "2", "--notes", "## Tried\n\nThis."]
    parts = ["--attention", "2quad_freediv", "2quad"]  # one for each layer
    command = ["convert", "--teacher", teacher, "--data", str(data), "--out", str(student), *parts]
    cli.main([*command, *(part for stage in stages for part in stage.split("=")), *sizes])
    assert re.search(r"planned +│ no ", capsys.readouterr().out)
    results = json.loads((student / "results.json").read_text())
    assert (results["ref2k_sentences"], results["aby3_sentences"]) == (4, 2)
    assert results["margin_bits"] > 2
    recipe = json.loads((student / "recipe.json").read_text())
    assert recipe["attention"] == ["2quad_freediv", "2quad"]
    config = read_config(student)
    assert [config.attention_of(layer).name for layer in range(2)] == recipe["attention"]
    for protocol in ("ref2k", "aby3"):
        assert 0 <= results[f"{protocol}_accuracy"] <= 1
        assert results[f"{protocol}_max_logit_difference"] < 0.05
    card = (student / "README.md").read_text()
    assert "This." in card
    assert "bits between the largest numbers" in card
    again = evaluate(student, ref2k_sentences=3, aby3_sentences=0)
    assert again["ref2k_sentences"] == 3
    assert again["accuracy"] == results["accuracy"]


def test_two_hosts_convert_and_the_first_writes(data, tmp_path, write_classifier):
    teacher = write_classifier(tmp_path / "teacher", attention="softmax", hidden_act="gelu", num_hidden_layers=1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    stages = [f"--stage{i}.{option}" for i in (1, 2) for option in ("epochs=1", "batch-size=8")]
    sizes = ["--max-length=16", "--ref2k-sentences=4", "--aby3-sentences=0", f"--data={data}", f"--teacher={teacher}"]
    command = [sys.executable, "-m", "flaxmpc", "convert", *stages, *sizes, "--num-processes=2"]
    hosts = [
        subprocess.Popen(
            [*command, f"--coordinator={address}", f"--process-id={i}", f"--out={tmp_path / f'host{i}'}"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        outputs = [host.communicate(timeout=120) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0], outputs
    assert "ref2k_agreement" in outputs[0][0]
    assert f"done: the first host, {address}, has written it" in outputs[1][0]
    assert (tmp_path / "host0" / "README.md").is_file()
    assert (tmp_path / "host0.run").is_dir()
    assert not list(tmp_path.glob("host1*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--num-processes", "2"), "2 hosts need a --coordinator HOST:PORT"),
        (("--process-id", "1"), "1 hosts"),
        (("--attention", "2quad_fredev"), "2quad_freediv"),
        (("--attention", "2quad", "2quad_fredev"), "2quad_freediv"),
        (("--attention", "2quad", "2quad", "2quad"), "attention lists 3 parts, num_hidden_layers is 2"),
        (("--activation", "quad", "quadd"), "'quad'"),
        (("--layer-norm", "chebyshev"), "layer_norm_chebyshev"),
        (("--max-length", "0"), "max_length must be at least 3, [CLS], a token and [SEP], not 0"),
        (("--max-length", "-1"), "at least 3"),
        (("--max-length", "2"), "at least 3"),
        (("--data", "movies"), "movie"),
        (("--teacher", "nowhere"), "unknown model 'nowhere'"),
        (("--teacher", "no/where"), "no/where is no folder here, HF_HUB_OFFLINE says not to ask the hub"),
    ],
)
def test_what_cannot_be_converted_is_one_line(change, message, data, tmp_path, write_classifier, capsys):
    teacher = write_classifier(tmp_path / "teacher", attention="softmax", hidden_act="gelu")
    options = {
        "--teacher": [str(teacher)],
        "--data": [str(data)],
        "--out": [str(tmp_path / "out")],
        "--max-length": ["16"],
    }
    options[change[0]] = change[1:]
    with pytest.raises(SystemExit) as ended:
        cli.main(["convert", *(word for name, values in options.items() for word in (name, *values))])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_help_names_the_parts_that_are_registered(capsys, monkeypatch):
    monkeypatch.setitem(ATTENTION._parts, "my_attention", ATTENTION["2quad"])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        cli.main(["convert", "--help"])
    assert ended.value.code == 0
    words = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    for option, registry in (("attention", ATTENTION), ("activation", ACTIVATIONS), ("layer-norm", NORMALIZATIONS)):
        text = words[words.index(f"--{option} NAME") :]
        assert f"(of {', '.join(registry)}; default: " in text[:900]
    assert "my_attention" in words


def test_too_short_texts_are_refused_for_a_teacher_too():
    for length in (-1, 0, 2):
        with pytest.raises(ValueError, match=f"max_length must be at least 3, .* not {length}"):
            FineTuning(Path("encoder"), "movie", Path("out"), max_length=length)


def test_evaluation_asks_for_a_recipe(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"recipe\.json does not exist"):
        evaluate(tmp_path)


def test_a_sample_is_evenly_spread():
    assert spread(10, 4).tolist() == [0, 3, 6, 9]
    assert spread(3, None).tolist() == spread(3, 7).tolist() == [0, 1, 2]
    assert not len(spread(5, 0))
