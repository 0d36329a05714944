"""What a party logs of others' doing is bounded, and what it counts is right."""

import threading

import prometheus_client

from flaxmpc.secure.deploy import monitor


def test_lines_that_others_cause_are_limited_and_counted(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(monitor.time, "monotonic", lambda: now[0])
    lines = []
    log = monitor.limited(lambda event, **fields: lines.append((event, fields)), most=3, seconds=60)
    for number in range(10):
        log("refused", number=number)
        log("other", number=number)
    assert [fields["number"] for event, fields in lines if event == "refused"] == [0, 1, 2]
    assert len(lines) == 6
    now[0] = 60.0
    log("refused", number=10)
    log("refused", number=11)
    assert lines[6:] == [("refused", {"number": 10, "left_out": 7}), ("refused", {"number": 11})]


def test_nothing_that_threads_count_is_lost():
    metrics = monitor.Metrics(lambda: "ready", lambda: (3, 4))

    def work() -> None:
        for _ in range(2000):
            metrics.count(requests=1, run_seconds=0.5)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = prometheus_client.generate_latest(metrics.registry).decode().splitlines()
    assert {line for line in lines if line[0] != "#"} >= {
        "flaxmpc_requests_total 16000.0", "flaxmpc_run_seconds_total 8000.0", "flaxmpc_failures_total 0.0",
        "flaxmpc_ready 1.0", "flaxmpc_queue 3.0", "flaxmpc_values 4.0",
    }  # fmt: skip
    assert "# TYPE flaxmpc_requests_total counter" in lines
    assert not [line for line in lines if "_created" in line]
