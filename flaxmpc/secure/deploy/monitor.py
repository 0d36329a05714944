"""The operator's view of a party: lines of JSON, /health and /metrics."""

from __future__ import annotations

import collections
import http.server
import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import prometheus_client as prometheus

from flaxmpc.secure.deploy.cluster import PartyEntry, split

prometheus.disable_created_metrics()  # else every counter comes with a series that says when it began


def log(event: str, **fields: Any) -> None:
    """Writes a line of JSON to standard error. Never a share, an input or a result."""
    record = {"time": round(time.time(), 3), "event": event, **fields}
    sys.stderr.write(json.dumps(record, default=str) + "\n")  # in one: threads log at once
    sys.stderr.flush()


def limited(log: Callable[..., None], most: int = 20, seconds: float = 60.0) -> Callable[..., None]:
    """Makes of `log` one for what others cause: at most so many lines of every event in so many seconds.

    The first line after that says in `left_out` how many there were more.
    """
    lock = threading.Lock()
    begun: dict[str, float] = {}
    counts: collections.Counter[str] = collections.Counter()

    def line(event: str, **fields: Any) -> None:
        with lock:
            now = time.monotonic()
            if now - begun.get(event, -seconds) >= seconds:
                if (left_out := counts[event] - most) > 0:
                    fields["left_out"] = left_out
                begun[event], counts[event] = now, 0
            counts[event] += 1
            if counts[event] > most:
                return
        log(event, **fields)

    return line


_COUNTERS = {
    "requests": "Requests that ended",
    "failures": "Requests that ended with an error",
    "runs": "Secure runs; several requests may share one",
    "run_seconds": "Seconds of all runs",
    "bytes_sent": "Bytes that this party sent to the others in all runs",
    "rounds": "Rounds of all runs",
    "sessions": "Sessions that began",
    "sessions_lost": "Sessions that ended because a party was lost",
}


class Metrics:
    """The counters of a party since its start, and its state, as /metrics says them."""

    def __init__(self, state: Callable[[], str], held: Callable[[], tuple[int, int]]):
        """Nothing is counted yet.

        Args:
            state: "ready", or what the party waits for.
            held: the number of requests that wait or run, and of values that are held.
        """
        self.state = state
        self.registry = prometheus.CollectorRegistry()
        place: dict[str, Any] = {"namespace": "flaxmpc", "registry": self.registry}
        self._counters = {name: prometheus.Counter(name, told, **place) for name, told in _COUNTERS.items()}
        for name, told, value in (
            ("ready", "1 when the group has formed, else 0", lambda: state() == "ready"),
            ("queue", "Requests that wait or run", lambda: held()[0]),
            ("values", "Values that are held for owners", lambda: held()[1]),
        ):
            prometheus.Gauge(name, told, **place).set_function(value)

    def count(self, **more: float) -> None:
        """Adds to counters, by name."""
        for name, value in more.items():
            self._counters[name].inc(value)


class _Handler(prometheus.MetricsHandler):
    timeout = 10  # seconds for what a client says

    def do_GET(self) -> None:
        assert isinstance(self.server, _Server)
        self.registry = self.server.metrics.registry
        if self.path == "/health":
            state = self.server.metrics.state()
            self._reply(200 if state == "ready" else 503, "application/json", json.dumps({"state": state}).encode())
        elif self.path == "/metrics":
            super().do_GET()
        else:
            self._reply(404, "text/plain", b"/health or /metrics\n")

    def _reply(self, code: int, kind: str, content: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(content)


class _Server(http.server.ThreadingHTTPServer):
    def __init__(self, address: str, metrics: Metrics):
        self.metrics = metrics
        self.address_family = socket.AF_INET6 if "[" in address else socket.AF_INET
        super().__init__(split(address), _Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError:  # no more files can be opened: who asks waits, and nothing spins
            time.sleep(1)
            raise


def serve_monitor(entry: PartyEntry, metrics: Metrics) -> http.server.ThreadingHTTPServer | None:
    """Serves /health and /metrics (Prometheus text) on the party's loopback address for them, if it has one.

    Raises:
        OSError: the port is taken.
    """
    if entry.metrics is None:
        return None
    try:
        server = _Server(entry.metrics, metrics)
    except OSError as error:
        raise OSError(f"party {entry.rank} can't listen on its metrics {entry.metrics}: {error.strerror}") from error
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
