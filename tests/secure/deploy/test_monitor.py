"""What a party logs of others' doing is bounded."""

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
