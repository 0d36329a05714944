"""What an operator sees of a party: lines of JSON, /health and /metrics."""

from __future__ import annotations

import collections
import http.server
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from flaxmpc.secure.deploy.cluster import PartyEntry, split


def log(event: str, **fields: Any) -> None:
    """One line of JSON on standard error. Never a share, an input or a result."""
    record = {"time": round(time.time(), 3), "event": event, **fields}
    sys.stderr.write(json.dumps(record, default=str) + "\n")  # in one: threads log at once
    sys.stderr.flush()


def limited(log: Callable[..., None], most: int = 20, seconds: float = 60.0) -> Callable[..., None]:
    """`log` for what others cause: of every event at most so many lines in so many seconds.

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


class _Server(http.server.ThreadingHTTPServer):
    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError:  # no more files can be opened: who asks waits, and nothing spins
            time.sleep(1)
            raise


def serve_monitor(
    entry: PartyEntry, state: Callable[[], str], values: Callable[[], Mapping[str, float]]
) -> http.server.ThreadingHTTPServer | None:
    """/health and /metrics (Prometheus text) on the party's loopback address for them, if it has one.

    Args:
        entry: the party's.
        state: "ready", or what it waits for.
        values: by name; a name that ends in _total counts up.

    Raises:
        OSError: the port is taken.
    """
    if entry.metrics is None:
        return None

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 10  # seconds for what a client says

        def do_GET(self) -> None:
            now = state()
            if self.path == "/health":
                self._reply(200 if now == "ready" else 503, "application/json", json.dumps({"state": now}))
            elif self.path == "/metrics":
                lines = []
                for name, value in {"ready": int(now == "ready"), **values()}.items():
                    kind = "counter" if name.endswith("_total") else "gauge"
                    lines += [f"# TYPE flaxmpc_{name} {kind}", f"flaxmpc_{name} {value}"]
                self._reply(200, "text/plain; version=0.0.4", "\n".join(lines) + "\n")
            else:
                self._reply(404, "text/plain", "/health or /metrics\n")

        def _reply(self, code: int, kind: str, text: str) -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(_Server):
        address_family = socket.AF_INET6 if "[" in entry.metrics else socket.AF_INET

    try:
        server = Server(split(entry.metrics), Handler)
    except OSError as error:
        raise OSError(f"party {entry.rank} can't listen on its metrics {entry.metrics}: {error.strerror}") from error
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
