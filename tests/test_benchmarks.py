import contextlib
import csv
import dataclasses
import functools
import importlib
import json
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

from flaxmpc.models import zoo

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
# What each promises beyond what all have.
SCRIPTS = {
    "layer_cost": {"variant", "num_tokens"},
    "bert_base": {
        "variant",
        "num_tokens",
        "num_layers",
        "embedding",
        "shared_reciprocal",
        "compile_cached_seconds",
        "time_ratio",
        "bytes_ratio",
        "rounds_ratio",
        "lan_ratio",
        "wan_ratio",
    },
    "attention": {"variant", "num_tokens", "shared_reciprocal", "error"},
    "parts": {"variant", "kind", "form"},
    "steps": {"step", "variant", "kept"},
    "families": {"variant", "num_layers"},
    "for_cost": {"variant", "num_layers"},
    "public_layers": {"public_layers", "teacher_accuracy", "accuracy", "num_tokens"},
    "scaling": {"axis", "value", "bytes_sent_total_exponent", "bytes_polynomial"},
    "embedding": {"variant", "num_layers", "client_bytes"},
    "outliers": {"texts", "count", "diverged", "right", "none", "unnoticed"},
    "kernel": {"system", "size", "multiplications_per_second"},
    "msb_error": {"trunc_allow_msb_error", "size", "elements", "wrong", "expected"},
    "network": {"network", "modelled_seconds", "measured_seconds", "relative_error"},
    "peers": {"unit", "system", "variant", "warm", "num_tokens", "error", "mean_error", "openings", "repetitions"},
    "pareto": {
        "shared_reciprocal",
        "model",
        "attention",
        "activation",
        "task",
        "metric",
        "score",
        "teacher_score",
        "ci_low",
        "ci_high",
        "pareto_lan",
        "pareto_wan",
    },
}
TRAIN_SPEED = {"variant", "sentences_per_second", "time_ratio", "loss", "trained_parameters", "steps", "repetitions"}
ALWAYS = {
    "protocol",
    "ring",
    "fraction_bits",
    "bytes_sent_total",
    "rounds",
    "seconds",
    "compile_seconds",
    "lan_seconds",
    "wan_seconds",
    "peak_memory_bytes",
    "versions",
    "machine",
    "date",
}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Imports a script; what it would save goes to a folder of the test's."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)

    def load_script(name: str) -> types.ModuleType:
        script = importlib.import_module(name)
        monkeypatch.setattr(sys.modules["harness"], "RESULTS", tmp_path)
        return script

    yield load_script
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


def a_record(**fields):
    return {
        "protocol": "ABY3",
        "ring": "FM64",
        "versions": {"spu": "1.2"},
        "machine": {"cpus": 2},
        "date": "2026-01-01",
        "seconds": 1.0,
        **fields,
    }


def test_a_folded_base_layer_is_within_its_bytes_and_rounds(load):
    records = {}
    for description, measure in load("layer_cost").jobs(quick=False):
        if description in (
            "ABY3 2quad_freediv_chebyshev",
            "SEMI2K 2quad_freediv_folded",
            "SEMI2K 2quad_freediv_folded warm",
        ):
            record = records[description] = measure()
            print(f"{description}: {record['bytes_sent_total'] / 1e6:.1f} MB, {record['rounds']:.0f} rounds")
    assert records["ABY3 2quad_freediv_chebyshev"]["bytes_sent_total"] <= 105e6
    assert records["ABY3 2quad_freediv_chebyshev"]["rounds"] <= 67
    assert records["SEMI2K 2quad_freediv_folded"]["rounds"] <= 150
    assert records["SEMI2K 2quad_freediv_folded"]["bytes_sent_total"] <= 205e6
    assert records["SEMI2K 2quad_freediv_folded warm"]["bytes_sent_total"] <= 72e6


# Namespaces and three processes, the zoo's model on its teacher's shape, CrypTen's processes: more than a smoke test.
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ("network", "pareto", "peers") else n for n in SCRIPTS]
)
def test_every_benchmark_runs_quickly_and_saves_and_shows_what_it_promises(
    name, load, capsys, tmp_path, tmp_path_factory, write_classifier, monkeypatch
):
    script = load(name)
    harness = sys.modules["harness"]
    if name == "bert_base":  # each variant takes seconds to compile
        monkeypatch.setattr(script, "NAMES", (script.BASELINE, "2quad_freediv", script.PLANNED))
        monkeypatch.setattr(script, "VARIANTS", {"2quad_freediv": script.VARIANTS["2quad_freediv"]})
    if name == "outliers":
        small_zoo = tmp_path_factory.mktemp("zoo")
        write_classifier(tmp_path_factory.mktemp("made")).rename(small_zoo / zoo.DEFAULT)
        monkeypatch.setenv("FLAXMPC_ZOO", str(small_zoo))
    records = script.benchmark(True).run(harness.Options(quick=True, json=True))
    if name in ("network", "peers") and not records:
        pytest.skip(capsys.readouterr().err)
    assert records == json.loads(capsys.readouterr().out)
    assert records
    for record in records:
        assert record.keys() >= SCRIPTS[name] | ALWAYS
    assert not list(tmp_path.iterdir())  # a quick run saves nothing

    script.benchmark(True).save(records)
    shown = script.benchmark(True).run(harness.Options(show=True))
    assert shown == records
    columns = {column for table in script.benchmark(True).tables for column in table}
    number = next(name for name in ("rounds", "count", "multiplications_per_second") if name in columns)
    assert str(round(records[0][number], 1)) in capsys.readouterr().out
    for suffix in ("json", "csv", "md"):
        (path,) = tmp_path.glob(f"*.{suffix}")
        assert path.name.startswith(f"{name}-{records[0]['protocol']}")
    assert len(list(tmp_path.glob("*.svg"))) == len(script.benchmark(True).plots)


def test_a_student_is_paired_with_the_teacher_of_its_recipe(load, tmp_path, write_classifier, capsys):
    paired = load("paired")
    teacher = write_classifier(tmp_path / "teacher", attention="softmax", hidden_act="gelu")
    student = write_classifier(tmp_path / "student")
    options = paired.Options(quick=True, json=True, students=(student,), text="a good film")
    with pytest.raises(SystemExit, match=f"^{student} is no student: there is no {student}/recipe.json$"):
        paired.benchmark(options).run(options)
    for broken, said in (
        ("{", "cannot be read as JSON"),
        ("[1]", "holds no JSON object"),
        ('{"teacher": 3}', "names no teacher"),
    ):
        (student / "recipe.json").write_text(broken)
        with pytest.raises(SystemExit, match=f"^{student}/recipe.json {said}"):
            paired.benchmark(options).run(options)
    (student / "recipe.json").write_text(json.dumps({"teacher": "nowhere"}))
    with pytest.raises(SystemExit, match=f"^the teacher of {student} is not at nowhere: "):
        paired.benchmark(options).run(options)
    (student / "recipe.json").write_text(json.dumps({"teacher": str(teacher)}))
    own, other = paired.benchmark(options).run(options)
    assert (own["attention"], other["attention"]) == ("softmax", "2quad_freediv")
    assert own["bytes_ratio"] == 1 < other["bytes_ratio"]
    assert other["rounds_ratio"] == own["rounds"] / other["rounds"] > 1
    assert max(own["error"], other["error"]) < 0.02
    with pytest.raises(SystemExit, match=r"^name the folders of students"):
        paired.benchmark(paired.Options()).run(paired.Options())
    few = dataclasses.replace(options, pairs=0)
    with pytest.raises(SystemExit, match=r"^--pairs is 1 or more, not 0$"):
        paired.benchmark(few).run(few)


DRAWN = ("attention", "bert_base", "network", "pareto", "parts", "public_layers", "scaling")


@pytest.mark.parametrize("name", DRAWN)
def test_saved_figures_are_those_of_the_saved_records(name, load, capsys, tmp_path):
    script = load(name)
    for path in (BENCHMARKS / "results").glob(f"{name}-*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    saved = {path: path.read_text("utf-8") for path in tmp_path.glob("*.svg")}
    assert len(saved) == len(script.benchmark(False).plots)
    for path in saved:
        path.unlink()
    script.benchmark(False).run(sys.modules["harness"].Options(draw=True))
    for path, before in saved.items():
        # Another version of Matplotlib may place a letter elsewhere.
        if f"Matplotlib v{matplotlib.__version__}," in before:
            assert path.read_text("utf-8") == before


@pytest.mark.slow  # three real parties with the zoo's model: minutes
def test_the_deployment_benchmark_runs_quickly(load):
    deployment = load("deployment")
    (_, measure), *_ = deployment.jobs(deployment.Options(quick=True))
    assert measure()["requests"] == 8


@pytest.mark.slow  # the same beside a hostile client: minutes
def test_a_hostile_client_costs_the_others_nothing(load):
    attacks = load("attacks")
    with contextlib.ExitStack() as stack:
        records = attacks.finish(
            [measure() for _, measure in attacks.jobs(load("deployment").Options().model, True, stack)]
        )
    assert [record["attack"] for record in records] == ["none", "rows", "shares", "unread", "absent"]
    for record in records:
        assert record["answers"] > 0
        assert (record["tries"] > 0) == (record["attack"] != "none")
    assert [note for note in attacks.notes(records) if note.startswith("FAILS")] == []


def test_parties_in_namespaces_are_measured_beside_the_model(load):
    deployment = load("deployment")
    if reason := sys.modules["namespaces"].unavailable():
        pytest.skip(reason)
    record = deployment.measure(deployment.layer("tiny", 16), "100mbit", 3, 1, 1)
    assert record["network"] == "100 Mbit/s"
    assert 0 < record["modelled_seconds"] < record["measured_seconds"] * 10
    assert record["client_bytes"] - record["share_bytes"] <= 64 << 10
    assert any("measured / modelled" in note for note in deployment.notes([record]))


def test_show_without_saved_results_says_so(load):
    script = load("parts")
    with pytest.raises(SystemExit, match="parts has no saved results"):
        script.benchmark(False).run(sys.modules["harness"].Options(show=True))


def test_an_interrupted_run_goes_on_where_it_was(load, tmp_path):
    load("parts")
    harness = sys.modules["harness"]
    ran = []

    def job(name, error=None):
        def measure():
            ran.append(name)
            if error:
                raise error
            return a_record(variant=name)

        return name, measure

    with pytest.raises(KeyboardInterrupt):
        harness.Benchmark("some", lambda: [job("a"), job("b", KeyboardInterrupt())], ()).run(harness.Options())
    records = harness.Benchmark("some", lambda: [job("a"), job("b")], ()).run(harness.Options(json=True))
    assert ran == ["a", "b", "b"]
    assert [record["variant"] for record in records] == ["a", "b"]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".csv", ".json", ".md"]


def test_show_takes_the_newest_results_of_that_benchmark(load, tmp_path):
    load("parts")
    harness = sys.modules["harness"]
    for name, spu, date in (
        ("some", "1", "2026-02-01"),
        ("some", "2", "2026-01-01"),
        ("some_other", "1", "2026-03-01"),
    ):
        made = a_record(versions={"spu": spu}, date=date, variant=name)
        harness.Benchmark(name, lambda made=made: [("it", lambda: made)], ()).run(harness.Options(json=True))
    assert harness.saved("some")[0]["versions"] == {"spu": "1"}


def test_in_child_is_another_process(load):
    load("parts")
    import os

    assert sys.modules["harness"].in_child(os.getpid) != os.getpid()


def test_held_fails_outside_its_bounds(load):
    load("parts")
    held = sys.modules["harness"].held
    assert held("x", 2.0, least=2.0) == "holds: x: 2"
    assert held("x", 1.9, least=2.0).startswith("FAILS")
    assert held("x", 2.1, most=2.0).startswith("FAILS")


def test_what_comes_of_send_actions_that_are_no_rounds_is_marked(load, capsys, tmp_path):
    load("parts")
    harness = sys.modules["harness"]
    made = [a_record(protocol=p, rounds=5.0, wan_seconds=2.0, lan_seconds=1.0) for p in ("ABY3", "CHEETAH")]
    columns = ("protocol", "seconds", "rounds", "lan_seconds", "wan_seconds")
    some = harness.Benchmark("some", lambda: [(r["protocol"], lambda r=r: r) for r in made], (columns,))
    some.run(harness.Options())
    printed = capsys.readouterr().out
    (saved,) = tmp_path.glob("*.md")
    table = saved.read_text("utf-8")
    assert "| ABY3 | 1.0 | 5.0 | 1.0 | 2.0 |" in table
    assert "| CHEETAH | 1.0 | ~5.0 | ~1.0 | ~2.0 |" in table
    for text in (printed, table):
        assert "~: indicative, as the send actions of CHEETAH are not rounds" in " ".join(text.split())
    harness.Benchmark("other", lambda: [("a", lambda: made[0])], (columns,)).run(harness.Options())
    assert "~" not in capsys.readouterr().out


def test_the_client_may_embed_for_the_unmodified_bert(load):
    """The second row of the baseline: the same logits, from the embedding's output on."""
    load("bert_base")
    variants = sys.modules["variants"]
    pytest.importorskip("transformers.models.bert.modeling_flax_bert")
    whole, rest = (variants.workload(name, "tiny", 1, tokens=4, vocab_size=50) for name in
                   (variants.BASELINE, variants.EMBEDDED))  # fmt: skip
    assert "embeddings" not in rest.weights["bert"]
    np.testing.assert_allclose(rest.plain(), whole.plain(), atol=1e-5)


def test_a_variant_is_the_median_of_its_runs_and_compared_with_the_baseline(load):
    bert_base = load("bert_base")
    fields = dict.fromkeys((*bert_base._TIMES, "bytes_sent_total", "rounds", "peak_memory_bytes"), 1.0)
    runs = [
        a_record(**fields | {"variant": "flax_bert", "seconds": s, "peak_memory_bytes": s}) for s in (9.0, 6.0, 7.0)
    ]
    runs.append(a_record(**fields | {"variant": "2quad_freediv", "seconds": 2.0}))
    base, ours = bert_base.finish(runs)
    assert (base["seconds"], base["peak_memory_bytes"], base["repetitions"]) == (7.0, 9.0, 3)
    assert ours["time_ratio"] == 3.5


def test_training_is_compared_block_by_block(load, tmp_path):
    train_speed = load("train_speed")
    made = {"machine": {"cpus": 2}, "versions": {"jax": "1", "torch": "2"}, "date": "2026-01-01"}
    seconds = {"flaxmpc": (1.0, 2.0, 4.0), "torch": (3.0, 2.0, 8.0), "products": (1.0, 1.0, 2.0)}
    runs = [
        {"variant": variant, "seconds": s, "sentences_per_second": 32 / s, "loss": 0.5, "steps": 1, **made}
        for block in range(3)
        for variant, s in ((variant, found[block]) for variant, found in seconds.items())
    ]
    ours, theirs, products = train_speed.finish(runs)
    assert (ours["variant"], ours["time_ratio"], ours["seconds"]) == ("flaxmpc", 2.0, 2.0)
    assert (theirs["variant"], theirs["time_ratio"], theirs["seconds"]) == ("torch", 1.0, 3.0)
    claim, profile = train_speed.notes([ours, theirs, products])
    assert claim.startswith("holds")
    assert "67% of our time and 33% of PyTorch's, so on this machine no step could be more than 3.00x" in profile
    train_speed.benchmark(False).save([ours, theirs, products])
    assert (tmp_path / "train_speed-jax1-torch2-2cores.json").is_file()


@pytest.mark.slow  # two minutes of training
def test_training_steps_are_those_of_fit(load):
    """A side of the comparison that needs no PyTorch: the loss falls on a batch that is seen again."""
    train_speed = load("train_speed")
    ours = train_speed.Ours()
    batch = min(train_speed.full_batches(), key=lambda batch: batch.input_ids.size)
    losses = ours.steps([batch] * 12)
    assert ours.trained < 11e6  # without the embeddings
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


def test_the_profile_of_training_is_of_every_matrix_that_is_trained(load):
    train_speed = load("train_speed")
    products = train_speed.Products()
    assert products.trained == 6 * (4 * 384**2 + 2 * 384 * 1536)
    batch = min(train_speed.full_batches(), key=lambda batch: batch.input_ids.size)
    x = np.random.default_rng(0).normal(0, 0.1, (*batch.input_ids.shape, 384)).astype(np.float32)
    grads, _ = products.gradients(products.kernels, x)
    assert grads.keys() == products.kernels.keys()
    assert all(np.abs(leaf).max() > 0 for leaf in grads.values())


def test_without_pytorch_a_line_says_how_to_get_it(load, monkeypatch):
    train_speed = load("train_speed")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match=r"train_speed needs PyTorch: pip install 'flaxmpc\[bench-torch\]'"):
        list(train_speed.jobs(quick=True))


def test_the_growth_law_is_found(load):
    scaling = load("scaling")
    sizes = scaling.AXES["length"][0]
    made = [a_record(axis="length", value=n, bytes_sent_total=3 * n**2, rounds=5.0, seconds=float(n)) for n in sizes]
    record = scaling.finish(made)[0]
    assert record["bytes_sent_total_exponent"] == pytest.approx(2)
    assert record["rounds_exponent"] == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(record["bytes_polynomial"], [0, 0, 3], atol=1e-6)


def test_the_front_holds_what_nothing_beats(load):
    pareto = load("pareto")
    points = {"good": (0.9, 3.0), "fast": (0.8, 1.0), "beaten": (0.7, 2.0)}
    records = [
        a_record(model=m, task=task, score=score - less, lan_seconds=s, wan_seconds=s)
        for task, less in (("one", 0.0), ("other", 0.5))
        for m, (score, s) in points.items()
    ]
    assert [r["pareto_lan"] for r in pareto.finish(records)] == [True, True, False] * 2


def test_each_student_and_once_its_teacher_are_compared(load):
    names = [name for name, _ in load("pareto").jobs(True)]
    assert len(set(names)) == len(names)
    assert {"movie-minilm-l6", "movie-minilm-l6-2quad-freediv", "movie-minilm-l6-softmax-freediv"} <= set(names)


@pytest.mark.parametrize("python", [sys.executable, "nowhere/python"], ids=["without CrypTen", "absent"])
def test_without_crypten_a_line_says_how_to_get_it(load, capsys, python):
    assert load("peers").benchmark(False, Path(python)).run(sys.modules["harness"].Options()) == []
    line, *_ = capsys.readouterr().err.splitlines()
    assert line == f"peers.py is skipped: {python} has no CrypTen: make bench-peers, or name another one with --python"


def test_peers_are_compared_on_what_the_model_met(load):
    cases = load("peer_cases")
    found = cases.real(False)
    assert [array.shape[1:] for array in found] == [(1, 12, 128, 128)] * 2 + [(1, 12, 128, 64), (2, 128, 1536)]
    assert np.abs(found.scores[0]).max() > 20  # no random scores
    loaded = cases.folders.load(cases.zoo.find(cases.zoo.DEFAULT))
    mask = jax.tree.map(jnp.asarray, found.mask)
    for i, (folded, *arrays) in enumerate(zip(found.folded, found.scores, found.values, strict=True)):
        part, scalars = loaded.model.config.attention_of(i), loaded.params["bert"][f"layer_{i}"]["attention"]
        scores, values, shift, scale = map(jnp.asarray, (*arrays, scalars["shift"], scalars["scale"]))
        numerator = part.f(scores, mask, shift)
        mix = functools.partial(lambda numerator, columns, dropout=None: numerator @ columns, numerator)
        exact = part.normaliser(mix, values, mask, scale, None)
        np.testing.assert_allclose(cases.squared(None, folded, values), exact, atol=1e-4)


def test_an_opening_of_crypten_is_four_latencies(load, capsys):
    peers = load("peers")
    case = peers.Case("attention", "SHAFT", "softmax", "softmax_shaft", np.eye(2)[None], (np.zeros((1, 2, 2)),))
    cost = peers.secure.Cost(
        protocol="CrypTen", ring="FM64", fraction_bits=16, exp_mode="limit", parties=2, seconds=1.0,
        compile_seconds=0.0, bytes_sent=20, bytes_sent_per_party=(10, 10), rounds=12.0, per_op={},
        versions={"spu": "1"}, machine={"cpus": 2}, date="2026-01-01",
    )  # fmt: skip
    record = peers.summary(case, peers.Runs(np.eye(2)[None] + 0.25, [cost], 7))
    assert (record["openings"], record["error"], record["mean_error"], record["peak_memory_bytes"]) == (3, 0.5, 0.5, 7)
    assert record["wan_seconds"] == pytest.approx(1 + 12 * 0.04, abs=1e-5)
    assert record.keys() >= SCRIPTS["peers"] | ALWAYS
    sys.modules["harness"].Benchmark("some", lambda: [("a", lambda: record)], (("variant", "rounds"),)).run(
        sys.modules["harness"].Options(quick=True)
    )
    assert "12.0" in (printed := capsys.readouterr().out)
    assert "~" not in printed  # a protocol that is none of SPU's


def test_hosts_have_their_rate_and_latency(load):
    load("network")
    namespaces = sys.modules["namespaces"]
    if reason := namespaces.unavailable():
        pytest.skip(reason)
    server = (
        "import socket; s = socket.create_server(('', 9000)); c = s.accept()[0]\nwhile d := c.recv(9): c.sendall(d)"
    )
    client = (
        "import socket, sys, time\n"
        "for _ in range(300):\n"
        "    try: c = socket.create_connection((sys.argv[1], 9000), 1); break\n"
        "    except OSError: time.sleep(0.1)\n"
        "start = time.perf_counter(); c.sendall(b'x'); c.recv(1); print(time.perf_counter() - start)"
    )
    with namespaces.hosts(2, rate="100mbit", rtt_seconds=0.1) as hosts:
        import subprocess

        echo = hosts.popen(0, [sys.executable, "-c", server])
        try:
            found = subprocess.check_output(hosts.command(1, [sys.executable, "-c", client, hosts.addresses[0]]))
        finally:
            echo.kill()
            echo.wait()
    assert float(found) >= 0.1


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "results").glob("[!.]*.json")), ids=lambda path: path.stem)
def test_saved_results_say_what_made_them(path: Path):
    records = json.loads(path.read_text("utf-8"))
    name = path.name.partition("-")[0]
    promised, library = (TRAIN_SPEED, "torch") if name == "train_speed" else (SCRIPTS.get(name, set()) | ALWAYS, "spu")
    for record in records:
        assert record.keys() >= promised | {"versions", "machine", "date"}
    assert f"{library}{records[0]['versions'][library]}-{records[0]['machine']['cpus']}cores" in path.name


def test_every_student_of_the_zoo_is_in_the_table_of_accuracies(load, capsys):
    accuracy, harness = load("accuracy"), sys.modules["harness"]
    accuracy.main(harness.Options(show=True, json=True))
    records = json.loads(capsys.readouterr().out)
    assert "movie-minilm-l6-2quad-freediv" in {record["model"] for record in records}
    for record in records:
        assert {"attention", "activation", "stages", "seed", "task", "metric", *accuracy.FIGURES} <= record.keys()
        assert record["size"] > 1e7
        assert 1 <= record["num_layers"] <= 12
        shares = [record[name] for name in ("value", "teacher_value", "ref2k_agreement", "aby3_agreement")]
        assert all(share is None or 0 <= share <= 1 for share in shares)
    tables = accuracy.tables(records) | {accuracy.BESIDE: accuracy.glue(accuracy.runs())}
    for head, *rows in tables.values():
        assert all(len(row) == len(head) for row in rows)
    assert "2quad-freediv" in {row[0] for row in tables["`movie`, accuracy"]}
    saved = (BENCHMARKS / "results" / "accuracy.md").read_text("utf-8")
    markdown = sys.modules["harness"].markdown
    assert saved.strip() == "\n\n".join(f"{title}:\n\n{markdown(rows)}" for title, rows in tables.items())
    assert "benchmarks/results/accuracy.md" in (BENCHMARKS.parent / "docs" / "zoo.md").read_text("utf-8")
    with (BENCHMARKS / "results" / "accuracy.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["model"] for row in rows} == {record["model"] for record in records}
    own = {(row["model"], row["protocol"]): row for row in rows}["movie-minilm-l6-2quad-freediv", "ABY3"]
    assert int(own["bytes_sent_total"]) > 1e6
    assert 0.7 < float(own["value"]) < 1


def test_a_task_is_named_by_its_data(load):
    accuracy = load("accuracy")
    named = {"movie": "movie", "cola=../glue/CoLA": "cola", "runs/wnut17": "wnut17", "my.csv": "my"}
    assert {data: accuracy.task_of({"data": data}) for data in named} == named


def test_drops_on_glue_stand_beside_those_published(load):
    accuracy = load("accuracy")

    def run(name, task, **figures):
        return accuracy.Run(name, {"data": f"{task}=runs/glue"}, figures, Path())

    entry = "-minilm-l6-2quad-freediv"
    sst2 = {"teacher_accuracy": 0.9, "correct": "1"}
    found = [
        run(f"sst2{entry}", "sst2", accuracy=0.89, **sst2),
        run(f"sst2{entry}/seed-1", "sst2", accuracy=0.87, **sst2),
        run(f"sst2{entry}/3-layers", "sst2", accuracy=0.5, **sst2),
        run("sst2-minilm-l6-softmax-freediv", "sst2", accuracy=0.5, **sst2),
        run("movie-minilm-l6-2quad-freediv", "movie", accuracy=0.5, **sst2),
        run(f"mrpc{entry}", "mrpc", accuracy=0.5, teacher_accuracy=0.6, f1=0.88, teacher_f1=0.86),
        run(f"stsb{entry}", "stsb", pearson=0.8, spearman=0.7, teacher_pearson=0.9, teacher_spearman=0.88),
    ]
    assert accuracy.glue(found)[1:] == [
        ["sst2, accuracy", "93.1", "92.0", "1.1", "90.0", "88.0", "2.0"],
        ["stsb, pearson, spearman", "89.1", "80.3", "8.8", "89.0", "75.0", "14.0"],
        ["mrpc, f1", "90.3", "88.7", "1.6", "86.0", "88.0", "-2.0"],
        ["mean", "90.8", "87.0", "3.8", "88.3", "83.7", "4.7"],
    ]
    assert accuracy.glue(found[:2])[1:] == [["sst2, accuracy", "93.1", "92.0", "1.1", "90.0", "88.0", "2.0"]]
    assert len(accuracy.glue([])) == 1


def test_the_front_of_a_search_stands_beside_choices_by_hand(load, tmp_path, monkeypatch, capsys):
    front, harness = load("front"), sys.modules["harness"]
    monkeypatch.setattr(front, "ZOO", tmp_path)
    with pytest.raises(SystemExit, match=r"no run in models/\*/runs has a search"):
        front.main(harness.Options(show=True))
    places = [f"layer {layer}, {field}" for layer in range(2) for field in front.FIELDS]
    names = {"attention": ("softmax", "2quad_freediv"), "activation": ("gelu", "quad")}
    norms = ("layer_norm_chebyshev", "layer_norm_constant")
    options = {place: names.get(place.split(", ")[1], norms) for place in places}
    losses = {place: {name: float(i) for i, name in enumerate(own)} for place, own in options.items()}
    costs = {place: {name: 10.0 - i for i, name in enumerate(own)} for place, own in options.items()}
    parts = {"attention": ["softmax"] * 2, "activation": ["gelu"] * 2, "layer_norm": [norms[0]] * 4}
    chosen = {"parts": parts, "loss": 0.5, "cost": 120.0}
    search = {"budget": {"what": "rounds", "most": 125.0}, "base": 100.0, "chosen": chosen, "losses": losses}
    search |= {"costs": costs, "front": [{**chosen, "cost": cost, "loss": 8 - cost / 20} for cost in (100.0, 140.0)]}
    results = {"accuracy": 0.86, "difference": -0.01, "ci_low": -0.02, "ci_high": 0.0}
    (tmp_path / "student" / "runs").mkdir(parents=True)
    run = {"recipe": {}, "results": results, "search": search}
    (tmp_path / "student" / "runs" / "budget.json").write_text(json.dumps(run))
    front.main(harness.Options(show=True, json=True))
    records = json.loads(capsys.readouterr().out)
    by_choice = {row["choice"]: row for row in records}
    # scaling and softmax_freediv were no options of this search.
    assert set(by_choice) == {
        "searched",
        "chosen",
        "the teacher's",
        "2quad_freediv + quad",
        "no root after attention",
    }
    assert (by_choice["the teacher's"]["loss"], by_choice["the teacher's"]["cost"]) == (0.0, 100 + 8 * 10.0)
    assert (by_choice["no root after attention"]["loss"], by_choice["no root after attention"]["cost"]) == (6.0, 174.0)
    head, *rows = front.table(records)
    assert [len(row) for row in rows] == [len(head)] * len(records)
    assert "-1.00 -2.00 +0.00" in {row[-1] for row in rows}
    front.plot(records).savefig(tmp_path / "front.png")
