import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def layer_cost(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import layer_cost

    return layer_cost


def test_a_folded_base_layer_sends_18_times_less_than_the_unmodified_one(layer_cost):
    records = {}
    for description, measure in layer_cost.jobs(quick=False):
        if description in (
            "ABY3 unmodified",
            "ABY3 2quad_freediv_folded",
            "SEMI2K 2quad_freediv_folded",
            "SEMI2K 2quad_freediv_folded warm",
        ):
            record = records[description] = measure()
            print(f"{description}: {record['bytes_sent_total'] / 1e6:.1f} MB, {record['rounds']:.0f} rounds")
    folded = records["ABY3 2quad_freediv_folded"]
    assert folded["bytes_sent_total"] <= 126e6
    assert folded["bytes_sent_total"] * 18 <= records["ABY3 unmodified"]["bytes_sent_total"]
    assert folded["rounds"] <= 150
    assert records["SEMI2K 2quad_freediv_folded"]["rounds"] <= 150
    assert records["SEMI2K 2quad_freediv_folded"]["bytes_sent_total"] <= 205e6
    assert records["SEMI2K 2quad_freediv_folded warm"]["bytes_sent_total"] <= 72e6


@pytest.mark.parametrize(
    "script",
    [
        "layer_cost.py",
        # Three real parties with the zoo's model: minutes.
        pytest.param("deployment.py", marks=pytest.mark.slow),
    ],
)
def test_every_benchmark_runs_quickly_and_prints_json(script: str):
    done = subprocess.run(
        [sys.executable, BENCHMARKS / script, "--quick", "--json"], capture_output=True, text=True, check=True
    )
    records = json.loads(done.stdout)
    assert records
    assert all({"protocol", "bytes_sent_total", "rounds", "seconds"} <= record.keys() for record in records)


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "results").glob("*.json")), ids=lambda path: path.stem)
def test_saved_results_say_what_made_them(path: Path):
    for record in json.loads(path.read_text("utf-8")):
        assert record["versions"]["spu"]
        assert record["machine"]
        assert record["date"]
