"""What an operator sees of a party: lines of JSON, /health and /metrics."""

from __future__ import annotations

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

    class Server(http.server.ThreadingHTTPServer):
        address_family = socket.AF_INET6 if "[" in entry.metrics else socket.AF_INET

    try:
        server = Server(split(entry.metrics), Handler)
    except OSError as error:
        raise OSError(f"party {entry.rank} can't listen on its metrics {entry.metrics}: {error.strerror}") from error
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
