import csv
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jax import lax
from safetensors.numpy import load_file, save_file

from flaxmpc import secure
from flaxmpc.cli import main as cli
from flaxmpc.nn.activation import ACTIVATIONS, Activation

ROOT = Path(__file__).parents[2]
REF2K = ("--protocol", "REF2K")


@pytest.fixture(scope="module")
def shipped(write_classifier, tmp_path_factory):
    """A zoo of one model, "movie-tiny", with its card and results."""
    folder = tmp_path_factory.mktemp("zoo")
    model = write_classifier(tmp_path_factory.mktemp("made"), num_hidden_layers=1).rename(folder / "movie-tiny")
    (model / "README.md").write_text("# movie-tiny\n\nA card with *two* numbers.\n")
    (model / "results.json").write_text(json.dumps({"accuracy": 0.8765, "ref2k_accuracy": 0.875}))
    return model


@pytest.fixture(autouse=True)
def own_zoo(shipped, monkeypatch):
    monkeypatch.setenv("FLAXMPC_ZOO", str(shipped.parent))
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def model(shipped, tmp_path):
    """A copy of the model to damage."""
    return Path(shutil.copytree(shipped, tmp_path / "copy"))


@pytest.fixture
def run(capfd):
    """run(*arguments) -> exit code, standard output, standard error."""

    def call(*arguments):
        capfd.readouterr()
        try:
            cli.main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capfd.readouterr()

    return call


@pytest.fixture
def refused(run):
    """refused(*arguments) -> the one line on standard error."""

    def call(*arguments):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("flaxmpc: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        assert "Traceback" not in err
        return err.removeprefix("flaxmpc: ").rstrip("\n")

    return call


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


# -------------------------------------------------------------------------------------------------------------- infer


def test_infer_prints_a_table_that_fits_80_columns(run):
    texts = ["A gripping film.", "a [b]bad[/b] :smile: movie [/]", "very " * 20]
    code, out, err = run("infer", *texts, "--model", "movie-tiny", *REF2K)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    for heading in ("text", "label", "probability", "|secure - plaintext|"):
        assert heading in out.splitlines()[1]
    assert "A gripping film." in out
    assert "a [b]bad[/b] :smile: movie" in out  # as it was given: no markup, no emoji
    assert len(re.findall(r"│ (?:positive|negative) *│ [01]\.\d{3} *│ 0\.\d{4} *│", out)) == 3
    assert re.fullmatch(r"movie-tiny, REF2K, 1 party: \d+\.\d s, 0\.0 MB in all, 0 rounds", out.splitlines()[-1])


def test_a_long_text_does_not_fill_the_screen(run):
    code, out, err = run("infer", "good " * 2000, "--model", "movie-tiny", *REF2K)
    assert code == 0
    assert len(out.splitlines()) < 20
    assert re.fullmatch(r"cut at 24 tokens, all that the model has positions for: 'good good .* \.\.\.'\n", err)


def test_infer_json_is_one_object(run, tmp_path):
    file = tmp_path / "sentences.txt"
    file.write_bytes("good\r\n\nA tédious mess.\n".encode())
    code, out, err = run("infer", "A film.", "--file", file, "--model", "movie-tiny", "--json", "--protocol", "ABY3")
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    record = json.loads(out)
    assert record.keys() == {"results", "cost", "model", "versions", "public_weights"}
    assert record["public_weights"] is False
    assert [result["text"] for result in record["results"]] == ["A film.", "good", "A tédious mess."]
    for result in record["results"]:
        assert {"text", "label", "score", "logits", "logits_plaintext"} <= result.keys()
        assert result["label"] == ["negative", "positive"][int(np.argmax(result["logits"]))]
        assert 0.5 <= result["score"] <= 1
        np.testing.assert_allclose(result["logits"], result["logits_plaintext"], atol=0.02)
    cost = record["cost"]
    assert {"protocol", "parties", "seconds", "bytes_sent", "rounds", "per_op"} <= cost.keys()
    assert (cost["protocol"], cost["parties"]) == ("ABY3", 3)
    assert cost["bytes_sent"] > 0
    assert sum(op["bytes_sent"] for op in cost["per_op"].values()) == cost["bytes_sent"]
    assert record["model"] == "movie-tiny"
    assert {"spu", "jax", "flaxmpc"} <= record["versions"].keys()


def test_a_file_may_start_with_a_byte_order_mark(run, tmp_path):
    file = tmp_path / "sentences.txt"
    file.write_bytes(b"\xef\xbb\xbfgood\n")
    _, out, _ = run("infer", "--file", file, "--model", "movie-tiny", "--json", *REF2K)
    assert [result["text"] for result in json.loads(out)["results"]] == ["good"]


def test_the_current_folder_has_a_name_too(run, shipped, monkeypatch):
    monkeypatch.chdir(shipped)
    _, out, _ = run("infer", "good", "--model", ".", "--json", *REF2K)
    assert json.loads(out)["model"] == "movie-tiny"


@pytest.fixture(scope="module")
def diverging(write_diverging, tmp_path_factory):
    return write_diverging(tmp_path_factory.mktemp("diverging"))


def test_a_text_without_an_answer_does_not_lose_the_others(run, diverging):
    message = "text 2: the model diverges on this text: its logits in the clear are not finite"
    code, out, err = run("infer", "good", "a mess", "bad", "--model", diverging, *REF2K)
    assert (code, err) == (2, f"flaxmpc: 1 of 3 texts has no answer; {message}\n")
    assert len(re.findall(r"│ (?:positive|negative) *│ [01]\.\d{3} *│ 0\.\d{4} *│", out)) == 2
    assert "no answer: the" in out
    code, out, err = run("infer", "good", "a mess", "bad", "--model", diverging, *REF2K, "--json")
    assert (code, err) == (2, f"flaxmpc: 1 of 3 texts has no answer; {message}\n")
    record = json.loads(out, parse_constant=pytest.fail)  # no NaN
    assert record["error"] == f"1 of 3 texts has no answer; {message}"
    assert [result.keys() & {"label", "error"} for result in record["results"]] == [{"label"}, {"error"}, {"label"}]


@pytest.mark.parametrize(
    "arguments",
    [
        ("infer",),
        ("infer", "good", "--model", "movie-tyni"),
        ("infer", "good", "--file", "no.csv"),
        ("infer", "good", "--cluster", "no"),
        ("cost", "movie-tyni"),
        ("cost", "movie-tiny", "--tokens", 600),
        ("check", "movie-tiny", "--sentences", 0),
    ],
)
def test_json_is_json_for_errors_too(run, arguments):
    code, out, err = run(*arguments, "--json")
    assert (code, out.count("\n")) == (2, 1)
    assert err == f"flaxmpc: {json.loads(out)['error']}\n"


def test_a_regression_and_a_set_of_labels_are_shown_as_such(run, write_classifier, tmp_path):
    regression = write_classifier(tmp_path / "one", id2label=("LABEL_0",))
    code, out, _ = run("infer", "good", "bad", "--model", regression, *REF2K)
    assert code == 0
    assert re.search(r"┃ text +┃ value +┃ \|secure - plaintext\| ┃", out)
    assert "LABEL_0" not in out
    results = json.loads(run("infer", "good", "--model", regression, *REF2K, "--json")[1])["results"]
    assert results[0].keys() == {"text", "truncated", "value", "logits", "logits_plaintext", "difference"}
    assert results[0]["value"] == results[0]["logits"][0]

    labels = write_classifier(
        tmp_path / "set", id2label=("dull", "long", "loud"), problem_type="multi_label_classification"
    )
    (result,) = json.loads(run("infer", "good", "--model", labels, *REF2K, "--json")[1])["results"]
    probabilities = 1 / (1 + np.exp(-np.array(result["logits"])))
    assert result["probabilities"] == pytest.approx(dict(zip(("dull", "long", "loud"), probabilities, strict=True)))
    assert result["labels"] == [name for name, value in result["probabilities"].items() if value > 0.5]
    assert "label" not in result


@pytest.fixture(scope="module")
def pairs(write_classifier, tmp_path_factory):
    """A model of pairs."""
    return write_classifier(tmp_path_factory.mktemp("pairs"), num_texts=2)


def test_pairs_and_single_texts_are_kept_apart(run, refused, pairs):
    _, out, err = run("infer", "--pair", "good", "bad", "--pair", "a film", "good", "--model", pairs, "--json", *REF2K)
    results = json.loads(out)["results"]
    assert err == ""
    assert [(each["text1"], each["text2"]) for each in results] == [("good", "bad"), ("a film", "good")]
    assert "good | bad" in run("infer", "--pair", "good", "bad", "--model", pairs, *REF2K)[1]
    message = refused("infer", "good", "bad", "--model", pairs, *REF2K)
    assert message == "text 1 is a single text, but the model was trained on a pair of texts at a time"
    message = refused("infer", "good", "--pair", "good", "bad", "--model", "movie-tiny", *REF2K)
    assert message == "pair 1 is a pair of texts, but the first is a single text"


def test_a_table_in_and_a_table_out(run, refused, pairs, tmp_path):
    file, out = tmp_path / "in.csv", tmp_path / "out.csv"
    file.write_text('premise,hypothesis,label\n"a ""good"", film\nthe movie",bad,1\ngood,"\u2028bad",0\n')
    code, printed, err = run("infer", "--file", file, "--out", out, "--model", pairs, *REF2K)
    assert (code, err) == (0, "")
    assert printed.splitlines()[0] == f"written: {out}"
    with open(out, newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    assert [(row["text1"], row["text2"]) for row in rows] == [
        ('a "good", film\nthe movie', "bad"),
        ("good", "\u2028bad"),
    ]
    assert rows[0].keys() == {"text1", "text2", "label", "score", "truncated", "error"}
    # What was written can be read again.
    _, again, _ = run("infer", "--file", out, "--model", pairs, "--json", *REF2K)
    assert [each["label"] for each in json.loads(again)["results"]] == [row["label"] for row in rows]
    out.unlink()
    message = refused("infer", "--file", file, "--out", out, "--model", "movie-tiny", "--text-columns", "hypo", *REF2K)
    assert message == f"{file} has no column hypo. Its columns are premise, hypothesis, label"
    assert not out.exists()


def test_results_are_in_the_given_order_whatever_their_length(run, tmp_path, diverging):
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    texts = ["film " * 20, "good", "film " * 19, "a mess", "bad"]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    code, _, err = run("infer", "--file", file, "--out", out, "--model", diverging, *REF2K)
    assert code == 2
    assert err.startswith(f"flaxmpc: 1 of 5 texts has no answer; {file}, line 4: the model diverges")
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["text"] for record in records] == texts
    assert ["error" in record for record in records] == [False, False, False, True, False]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("x.xlsx", "unknown suffix of --out '.xlsx'. Did you mean '.csv'? Known: .csv, .jsonl"),
        ("no/x.csv", "{folder}/no/x.csv: {folder}/no is no folder"),
        ("in.csv", "{folder}/in.csv is the file of the texts: the results would take its place"),
    ],
)
def test_a_file_for_results_is_looked_at_before_anything_runs(refused, tmp_path, out, message):
    (tmp_path / "in.csv").write_text("text\ngood\n")
    found = refused("infer", "--file", tmp_path / "in.csv", "--out", tmp_path / out, "--model", "movie-tiny", *REF2K)
    assert found == message.format(folder=tmp_path)


def test_settings_of_the_parties_are_not_for_a_cluster(refused):
    message = refused("infer", "good", "--cluster", "c", "--protocol", "ABY3", "--fraction-bits", 18)
    assert message.startswith("--fraction-bits and --protocol: on a cluster its cluster.toml says it")
    message = refused("infer", "good", "--cluster", "c", "--public-weights")
    assert message.startswith("--public-weights: on a cluster the owner's `put` says it")


def test_an_entry_without_weights_names_what_makes_them(refused, shipped):
    entry = shipped.parent / "movie-later"
    entry.mkdir()
    try:
        shutil.copy(shipped / "config.json", entry)
        (entry / "recipe.json").write_text("{}")
        message = f"{entry} has no weights here: {entry / 'recipe.json'} makes them, in the repository"
        for command in (("infer", "good", "--model"), ("cost",), ("check",)):
            assert refused(*command, "movie-later") == message
        assert refused("put", "movie-later", "--cluster", "c") == message
        (entry / "results.json").write_text(json.dumps({"made_by": "train/movie.py later"}))
        assert "here: train/movie.py later makes them" in refused("infer", "good", "--model", "movie-later")
    finally:
        shutil.rmtree(entry)


# ------------------------------------------------------------------------------------------------------- cost and zoo


def test_cost_prints_operations_and_the_whole(run):
    code, out, err = run("cost", "movie-tiny", "--tokens", 16)
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "movie-tiny, 1 x 16 tokens, ABY3, 3 parties"
    assert max(map(len, out.splitlines())) <= 80
    assert "pphlo.dot" in out
    assert "whole run" in out
    assert re.search(r"modelled: LAN \(3 Gbit/s, 1 ms\) \d+\.\d s, WAN \(100 Mbit/s, 80 ms\) \d+\.\d s", out)


def test_cost_json_is_what_a_run_costs(run):
    _, out, err = run("cost", "movie-tiny", "--tokens", 16, "--sentences", 2, "--json")
    assert err == ""
    assert out.count("\n") == 1
    record = json.loads(out)
    assert (record["model"], record["tokens"], record["sentences"]) == ("movie-tiny", 16, 2)
    assert record["seconds"] < record["lan_seconds"] < record["wan_seconds"]
    cost = json.loads(run("infer", "good", "bad film", "--model", "movie-tiny", "--json")[1])["cost"]
    assert (record["bytes_sent"], record["rounds"]) == (cost["bytes_sent"], cost["rounds"])


def test_modelled_seconds_of_a_protocol_without_exact_rounds_are_indicative(run, monkeypatch):
    inexact = dataclasses.replace(secure.PROTOCOLS["REF2K"], rounds_exact=False)
    assert json.loads(run("cost", "movie-tiny", "--tokens", 16, *REF2K, "--json")[1])["indicative"] is False
    monkeypatch.setattr(secure, "PROTOCOLS", {"REF2K": inexact})
    _, out, _ = run("cost", "movie-tiny", "--tokens", 16, *REF2K)
    assert "modelled, indicative: LAN" in out
    assert "indicative: in REF2K not every counted round is one of the network's" in " ".join(out.split())
    assert json.loads(run("cost", "movie-tiny", "--tokens", 16, *REF2K, "--json")[1])["indicative"] is True


@pytest.fixture
def longest(shipped):
    """A model of the zoo with a long name, and without weights."""
    folder = shipped.parent / "movie-minilm-l6-softmax-freediv"
    shutil.copytree(shipped, folder)
    (folder / "model.safetensors").unlink()
    change_config(folder, attention="softmax_freediv")
    (folder / "results.json").write_text(json.dumps({"accuracy": 0.86, "made_by": "train/movie.py softmax-freediv"}))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("columns", [80, 60])
def test_zoo_list_cuts_nothing(run, longest, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, err = run("zoo", "list")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= columns
    assert "…" not in out
    if columns == 80:
        lines = [" ".join(line.split()) for line in out.splitlines()]
        assert lines[2:4] == [
            f"{longest.name} softmax_freediv 1 x 32 86.0%",
            "train/movie.py softmax-freediv quad accuracy",
        ]
        assert lines[4] == "movie-tiny 2quad_freediv 1 x 32 87.6% 87.5%"
        assert re.fullmatch(r"0\.\d MB quad accuracy", lines[5])
    assert "the weights are not here; it makes them, in the repository." in " ".join(out.split())


def test_zoo_list_json_is_an_array(run, shipped, longest):
    code, out, err = run("zoo", "list", "--json")
    assert (code, err) == (0, "")
    unshipped, tiny = json.loads(out)
    assert (unshipped["weights_bytes"], unshipped["ref2k_value"]) == (None, None)
    assert unshipped["made_by"] == "train/movie.py softmax-freediv"
    assert tiny == {
        "name": "movie-tiny",
        "folder": str(shipped),
        "attention": ["2quad_freediv"],
        "hidden_act": ["quad"],
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "weights_bytes": (shipped / "model.safetensors").stat().st_size,
        "metric": "accuracy",
        "value": 0.8765,
        "ref2k_value": 0.875,
        "made_by": None,
    }


def test_zoo_list_tells_a_model_by_its_own_metric(run, longest):
    """Of entities the accuracy of words is high where none is found."""
    (longest / "results.json").write_text(json.dumps({"accuracy": 0.94, "entity_f1": 0.415, "ref2k_entity_f1": 0.41}))
    entry = json.loads(run("zoo", "list", "--json")[1])[0]
    assert (entry["metric"], entry["value"], entry["ref2k_value"]) == ("entity_f1", 0.415, 0.41)
    assert " 41.5% 41.0% " in " ".join(run("zoo", "list")[1].split())
    (longest / "results.json").unlink()
    entry = json.loads(run("zoo", "list", "--json")[1])[0]
    assert (entry["metric"], entry["value"], entry["ref2k_value"]) == (None, None, None)


def test_zoo_refuses_what_it_would_pass_over(refused, monkeypatch, tmp_path):
    assert refused("zoo", "list", "movie-tiny") == "zoo list takes no model: zoo show movie-tiny shows its card"
    assert refused("zoo", "show", "--json").startswith("--json is for zoo list: ")
    monkeypatch.setenv("FLAXMPC_ZOO", str(tmp_path))
    assert refused("zoo", "list") == f"there is no model in the zoo {tmp_path} (FLAXMPC_ZOO)"


def test_version_names_what_decides_what_is_computed(run):
    code, out, err = run("--version")
    assert (code, err) == (0, "")
    assert re.fullmatch(r"flaxmpc \d+\.\d+\.\d+, spu \S+, jax \S+, Python 3\.\d+\.\d+\n", out)


def test_zoo_push_says_what_it_would_upload(run, model):
    (model / "owner.key").write_text("secret")
    code, out, err = run("zoo", "push", model, "--to", "org/film", "--private", "--dry-run")
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    found = {line[0]: int(line[1].replace(",", "")) for line in lines[2:-1]}
    names = {"config.json", "model.safetensors", "README.md", "results.json", "tokenizer.json", "tokenizer_config.json"}
    assert found.keys() == names | (found.keys() & {"special_tokens_map.json"})
    assert all(size == (model / name).stat().st_size for name, size in found.items())
    assert out.splitlines()[-1] == "a dry run, nothing was uploaded to org/film, private"


def test_zoo_push_refuses_what_it_would_pass_over(refused, model, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", "none")
    assert refused("zoo", "push", model) == "which model, and to where? zoo push FOLDER --to OWNER/NAME"
    assert refused("zoo", "push", "--to", "org/film").startswith("which model, and to where?")
    assert refused("zoo", "push", model, "--to", "film").startswith("'film' is no name on the hub: OWNER/NAME")
    assert refused("zoo", "push", model, "--to", "org/film", "--json") == "--json is for zoo list"
    for options in (("--to", "org/film"), ("--private",), ("--dry-run",)):
        assert refused("zoo", "list", *options).startswith("--to, --private and --dry-run are of zoo push")
    (model / "model.safetensors").unlink()
    message = f"{model / 'model.safetensors'} does not exist: a model folder holds config.json and model.safetensors"
    assert refused("zoo", "push", model, "--to", "org/film") == message


def test_zoo_show_leaves_out_what_is_for_the_hub(run, model):
    (model / "README.md").write_text("---\nlicense: mit\n---\n\n# A card\n\nabove\n\n---\n\nbelow\n")
    code, out, _ = run("zoo", "show", model)
    assert code == 0
    assert "license" not in out
    assert all(word in out for word in ("A card", "above", "below"))


def test_zoo_show_prints_the_card(run, model):
    code, out, err = run("zoo", "show", "movie-tiny")
    assert (code, err) == (0, "")
    assert "A card with two numbers." in out
    (model / "README.md").unlink()
    assert run("zoo", "show", model)[0] == 2


def test_what_a_terminal_would_obey_is_not_printed(run, refused, model):
    """A folder, its card, or a party's error may be anybody's."""
    (model / "README.md").write_text("# A card\x1b]0;title\x07 with *colours* \x1b[31m\n")
    code, out, _ = run("zoo", "show", model)
    assert code == 0
    assert "A card" in out
    assert not {"\x1b", "\x07"} & set(out)
    assert refused("cost", model / "\x1b[31mred") == f"{model}/\\x1b[31mred is no folder"
    (model / "README.md").unlink()
    (model / "README.md").symlink_to("/etc/passwd")
    assert refused("zoo", "show", model).startswith(f"{model}/README.md is a link to /etc/passwd")


def test_check_prints_the_worst_operations_and_the_margin(run, tmp_path):
    code, out, err = run("check", "movie-tiny", "--sentences", 3)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    margin = re.findall(r"3 sentences: ([\d.]+) bits of margin", " ".join(out.split()))
    assert float(margin[0]) > 4
    file = tmp_path / "texts"
    file.write_text("a good film\nbad\n")
    code, out, _ = run("check", "movie-tiny", "--file", file, "--json", "--fraction-bits", 24)
    record = json.loads(out)
    assert (code, record["model"], record["sentences"], record["fraction_bits"]) == (0, "movie-tiny", 2, 24)
    assert record["margin_bits"] == min(op["margin_bits"] for op in record["operations"] if op["magnitude"])


def test_check_ends_with_2_where_the_margin_is_too_small(run):
    code, out, err = run("check", "movie-tiny", "--sentences", 2, "--ring", "FM32", "--fraction-bits", 14)
    assert code == 2
    assert "bits of margin" in " ".join(out.split())
    assert err.startswith("flaxmpc: the fixed point of FM32 with 14 fraction bits is too small for ")


def test_a_cluster_is_written_and_gets_a_client_more(run, tmp_path):
    code, out, _ = run("cluster", "init", str(tmp_path / "c"))
    assert code == 0
    assert "ABY3, 3 parties" in out
    code, out, _ = run("cluster", "certificate", str(tmp_path / "c"), "--name", "bob")
    assert code == 0
    assert "client.bob.pem" in out
    assert (tmp_path / "c" / "client.bob.key").is_file()
    code, _, err = run("cluster", "certificate", str(tmp_path / "c"))
    assert code == 2
    assert "--name NAME" in err


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(("given", "meant"), [("infre", "infer"), ("Zoo", "zoo"), ("fine-tune", "finetune")])
def test_an_unknown_command(refused, given, meant):
    message = refused(given, "--json")
    assert message.startswith(f"unknown command {given!r}. Did you mean {meant!r}? Known: approve, check, cluster, ")


def test_an_empty_command_is_unknown(refused):
    assert refused("").startswith("unknown command ''. Known: approve, check, ")


def test_no_text(refused):
    assert refused("infer") == "there is no text: give some, or --file"


def test_empty_text(refused):
    assert refused("infer", "good", " ", "--model", "movie-tiny", *REF2K) == "text 2 is empty"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"good\n\xff\xfe bad\n", ", line 2: not UTF-8 (byte 0xff)"),
        (b"", " holds no text"),
        (b"\n \n", " holds no text"),
        (None, " cannot be read: No such file or directory"),
    ],
)
def test_a_file_without_sentences(refused, tmp_path, content, message):
    file = tmp_path / "sentences.txt"
    if content is not None:
        file.write_bytes(content)
    assert refused("infer", "--file", file, "--model", "movie-tiny") == f"{file}{message}"


def test_a_folder_in_place_of_a_file(refused, tmp_path):
    assert refused("infer", "--file", tmp_path) == f"{tmp_path} cannot be read: Is a directory"


def test_an_unknown_model(refused):
    message = (
        "unknown model 'movie-tyni'. Did you mean 'movie-tiny'? Known: movie-tiny; or a folder, or a name on the hub "
        "(OWNER/NAME, OWNER/NAME@REVISION)"
    )
    assert refused("infer", "good", "--model", "movie-tyni") == message
    assert refused("cost", "movie-tyni") == message
    assert refused("zoo", "show", "movie-tyni") == message
    assert refused("cost", "./no/folder") == "./no/folder is no folder"
    for command in (("cost",), ("plan",), ("check",), ("infer", "good", "--model"), ("zoo", "show")):
        assert refused(*command, "no/folder").startswith("no/folder is no folder here, HF_HUB_OFFLINE says not to ask")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_folder_without(file, refused, model):
    (model / file).unlink()
    message = refused("infer", "good", "--model", model, *REF2K)
    assert message == f"{model / file} does not exist: a model folder holds config.json and model.safetensors"


def test_a_folder_without_a_tokenizer(refused, model):
    for name in ("tokenizer.json", "vocab.txt"):
        (model / name).unlink(missing_ok=True)
    assert "has no tokenizer: tokenizer.json or vocab.txt" in refused("infer", "good", "--model", model, *REF2K)


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_a_damaged_tokenizer(content, refused, model):
    (model / "tokenizer.json").write_text(content)
    assert str(model) in refused("infer", "good", "--model", model, *REF2K)


def test_a_config_with_an_unknown_part(refused, model):
    change_config(model, attention="2quad_freedive")
    message = refused("infer", "good", "--model", model, *REF2K)
    assert message.startswith(
        f"{model / 'config.json'}: unknown attention '2quad_freedive'. Did you mean '2quad_freediv'?"
    )
    assert "Known: 2quad, " in message


@pytest.mark.parametrize("content", ["{", "[]", '"bert"', "\xff"], ids=["cut", "list", "text", "not UTF-8"])
def test_a_config_that_is_none(refused, model, content):
    (model / "config.json").write_bytes(content.encode("latin-1"))
    assert refused("infer", "good", "--model", model, *REF2K).startswith(f"{model / 'config.json'} ")


def test_an_unknown_protocol(refused):
    message = refused("infer", "good", "--model", "movie-tiny", "--protocol", "ABY4")
    assert message == "unknown protocol 'ABY4'. Did you mean 'ABY3'? Known: ABY3, CHEETAH, REF2K, SEMI2K"


def test_settings_out_of_range(refused):
    model = ("--model", "movie-tiny")
    assert "fraction_bits must be in 1..30" in refused("infer", "good", *model, "--fraction-bits", 40)
    assert "unknown ring 'FM65'. Did you mean 'FM64'?" in refused("infer", "good", *model, "--ring", "FM65")
    assert "a text has 1 to 24 tokens, all that" in refused("cost", "movie-tiny", "--tokens", 25, *REF2K)


def test_weights_that_are_not_finite(refused, model):
    change_weights(model, lambda tensors: tensors["classifier.weight"].fill(np.nan))
    message = refused("infer", "good", "--model", model, *REF2K)
    assert message == f"{model / 'model.safetensors'}: classifier.weight holds non-finite weights"


def test_weights_beyond_the_ring(refused, model):
    change_weights(model, lambda tensors: tensors["classifier.weight"].fill(1e30))
    assert "classifier" in refused("infer", "good", "--model", model, *REF2K)


def test_weights_that_do_not_fit(refused, model):
    def change(tensors):
        tensors["own.weight"] = tensors.pop("classifier.weight")
        tensors["classifier.bias"] = np.zeros(3, np.float32)

    change_weights(model, change)
    message = refused("infer", "good", "--model", model, *REF2K)
    assert message == (
        f"{model / 'model.safetensors'} does not fit the model: missing: classifier.weight unexpected: own.weight "
        "wrong shape: classifier.bias: (3,) in the file, (2,) in the model"
    )


def test_weights_that_are_no_safetensors(refused, model):
    (model / "model.safetensors").write_bytes(b"\x00" * 20)
    assert "model.safetensors cannot be read as safetensors" in refused("infer", "good", "--model", model, *REF2K)


def test_the_entities_of_a_text(run, refused, model):
    change_config(model, architectures=["BertForTokenClassification"], id2label={"0": "O", "1": "B-film"})
    change_weights(model, lambda tensors: [tensors.pop(name) for name in list(tensors) if "pooler" in name])
    code, out, _ = run("infer", "good film", "--model", model, *REF2K, "--json")
    assert code == 0
    (found,) = json.loads(out)["results"]
    assert found.keys() == {"text", "truncated", "entities", "difference"}
    for entity in found["entities"]:
        assert entity["entity_group"] == "film"
        assert entity["word"] == "good film"[entity["start"] : entity["end"]]
    assert "entities" in run("infer", "good film", "--model", model, *REF2K)[1]
    message = refused("infer", "--pair", "good", "film", "--model", model, *REF2K)
    assert message == "pair 1 is a pair of texts, but the model takes a single text"


def test_what_spu_cannot_run(refused, model, monkeypatch):
    rounded = Activation("rounded", lambda x: lax.reduce_precision(x, 8, 7), "none")
    monkeypatch.setitem(ACTIVATIONS._parts, "rounded", rounded)
    change_config(model, hidden_act="rounded")
    message = refused("infer", "good", "--model", model, *REF2K)
    assert re.match(r"SPU cannot compute reduce_precision \(\w+\.py:\d+\): it looks at the bits of a number", message)


def test_a_run_that_fails(refused, monkeypatch):
    def fail(*_):
        raise secure.SecureError("the secure run failed: a party\nis gone")

    monkeypatch.setattr(secure.SecureFunction, "run", fail)
    message = refused("infer", "good", "--model", "movie-tiny", *REF2K)
    assert message == "the secure run failed: a party is gone"


# --------------------------------------------------------------------------------------------------- a real process


def python(*arguments, cwd):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=cwd, capture_output=True, text=True)


def test_nothing_but_the_answer_reaches_the_terminal(tmp_path):
    done = python("-m", "flaxmpc", "infer", "good", "--model", "movie-tiny", "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    assert json.loads(done.stdout)["cost"]["parties"] == 3
    assert list(tmp_path.iterdir()) == []


def test_a_real_process_ends_with_2_and_one_line(tmp_path):
    done = python("-m", "flaxmpc", "infer", "good", "--model", "zzz", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("flaxmpc: unknown model 'zzz'. Known: movie-tiny; or a folder, or a name on the hub")
    assert done.stderr.count("\n") == 1


def test_a_byte_that_is_not_utf8_is_named(tmp_path):
    done = python("-m", "flaxmpc", "infer", "good", os.fsdecode(b"caf\xe9"), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "flaxmpc: text 2 is not UTF-8: it has the byte 0xe9\n"


def test_importing_is_light(tmp_path):
    heavy = {"spu", "torch", "transformers", "datasets"}
    check = "from flaxmpc.cli import convert, deploy, infer, main, zoo; import sys; print({0} & set(sys.modules))"
    done = python("-W", "error", "-c", check.format(heavy), cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_a_command_imports_its_own_module_alone(tmp_path):
    """A party is started in half the time without the models, which it has no use for."""
    seen = "print({name.partition('.')[0] for name in sys.modules} & {'flax', 'optax', 'scipy'})"
    code = f"import atexit, sys; atexit.register(lambda: {seen}); from flaxmpc.cli.main import main; main()"
    done = python("-c", code, "party", "--cluster", "nowhere", "--rank", "0", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "set()\n")
    assert done.stderr == "flaxmpc: nowhere cannot be read: No such file or directory\n"


# --------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", ["infer", "cost", "check", "zoo", None])
def test_help_names_what_to_give_and_fits_80_columns(run, command):
    code, out, err = run(*([command] if command else []), "--help")
    assert (code, err) == (0, "")
    # The list of commands has no place to break it.
    assert max(len(line) for line in out.splitlines() if not line.startswith("usage: flaxmpc [-h] {")) <= 80
    assert not re.search(r"\{None\}|STR|\(default: (?:None|False|)\)|MISSING", out)
    for word in {"infer": ("[TEXT ...]", "--file PATH"), "cost": ("[NAME|FOLDER]",)}.get(command or "", ("flaxmpc",)):
        assert word in out
