"""Every command that reads a model's folder, on folders that somebody else made: one line, in little memory."""

import json
import shutil
import subprocess
import sys

import pytest

# Runs the commands on each folder, in one process; says what each said on standard error, its seconds, and the peak.
RUN = """
import contextlib, io, json, pathlib, sys, time
from flaxmpc.cli import main as cli
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    for command in json.loads(sys.argv[2]):
        start, err, code = time.process_time(), io.StringIO(), 0
        try:
            with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
                cli.main([part.replace("FOLDER", str(folder)) for part in command])
        except SystemExit as end:
            code = end.code
        peak = 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
        print(json.dumps([folder.name, command[0], code, err.getvalue(), time.process_time() - start, peak]))
"""


def changed(folder, file="config.json", **fields):
    path = folder / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | fields))


def claiming(folder, name, shape):
    """Weights of one tensor that the header says to be larger than any memory, on no disk."""
    size = 4 * shape[0] * shape[1]
    header = json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)


def linked(folder, name):
    secret = folder.parents[1] / "secret"
    secret.write_text("{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)


def header(folder):
    with (folder / "model.safetensors").open("wb") as file:
        file.write((90_000_000).to_bytes(8, "little"))
        file.truncate(100_000_000)


HOSTILE = {
    "layers": (lambda folder: changed(folder, num_hidden_layers=10**9), "num_hidden_layers 1000000000 is not"),
    "deep": (lambda folder: (folder / "config.json").write_text("[" * 10**6), "nested more than 64 deep"),
    "wide": (lambda folder: changed(folder, hidden_size=1024, vocab_size=900_000), "wrong shape: bert.embeddings"),
    "header": (header, "its header has 90000000 bytes"),
    "claiming": (
        lambda folder: claiming(folder, "bert.embeddings.word_embeddings.weight", [10**6, 10**4]),
        "wrong shape",
    ),
    "vocabulary": (lambda folder: linked(folder, "tokenizer.json"), "tokenizer.json is a link to"),
    "weights": (lambda folder: linked(folder, "model.safetensors"), "model.safetensors is a link to"),
    "config": (lambda folder: linked(folder, "config.json"), "config.json is a link to"),
    "path": (
        lambda folder: changed(folder, "tokenizer_config.json", vocab_file="/etc/passwd"),
        "has vocab_file='/etc/passwd': a tokenizer's files stand in its folder",
    ),
    "map": (
        lambda folder: changed(folder, "special_tokens_map.json", vocab_file="/etc/passwd"),
        "unknown special token 'vocab_file'",
    ),
    "growing": (
        lambda folder: changed(
            folder,
            "tokenizer.json",
            normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 90},
        ),
        "makes a text 90 times longer",
    ),
}

PUT = ["put", "FOLDER", "--cluster", "nowhere"]
OTHERS = [
    ["infer", "a film", "--model", "FOLDER", "--protocol", "REF2K"],
    ["cost", "FOLDER", "--protocol", "REF2K"],
    ["check", "FOLDER"],
    ["convert", "--teacher", "FOLDER", "--data", "DATA", "--max-length", "16", "--out", "FOLDER.out"],
    ["finetune", "--encoder", "FOLDER", "--data", "DATA", "--max-length", "16", "--out", "FOLDER.out"],
]


@pytest.mark.parametrize("commands", [[PUT], pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["put", "others"])
def test_a_hostile_folder_is_refused_in_one_line_and_little_memory(commands, write_classifier, tmp_path_factory):
    directory = tmp_path_factory.mktemp("hostile")
    good = write_classifier(directory / "good", hidden_size=64)
    data = directory / "data.csv"
    data.write_text("text,label\n" + "".join(f"a film {i},{i % 2}\n" for i in range(60)))
    for name, (change, _) in HOSTILE.items():
        shutil.copytree(good, directory / "given" / name)
        change(directory / "given" / name)
    commands = [[part.replace("DATA", str(data)) for part in command] for command in commands]
    done = subprocess.run(
        [sys.executable, "-c", RUN, directory / "given", json.dumps(commands)],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(name, command) for name, command, *_ in said] == [
        (name, command[0]) for name in sorted(HOSTILE) for command in commands
    ]
    for name, command, code, err, seconds, peak in said:
        case = f"{name}, {command}: {err}"
        assert code == 2, case
        assert HOSTILE[name][1] in err, case
        assert err.startswith("flaxmpc: "), case
        assert err.count("\n") == 1, case
        assert seconds < 10, case
        assert peak < 1 << 30, case
    assert said[-1][-1] - said[0][-1] < 300 << 20
