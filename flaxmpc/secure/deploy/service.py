"""The process of a computing host: its ports, its signals, its end."""

from __future__ import annotations

import asyncio
import os
import signal

import grpc

from flaxmpc.secure.deploy import rpc
from flaxmpc.secure.deploy.host import Host
from flaxmpc.secure.deploy.monitor import serve_monitor


def serve(host: Host) -> None:
    """Runs a party until SIGTERM or SIGINT. OSError: a port is taken."""
    asyncio.run(_serve(host))


async def _serve(host: Host) -> None:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(
        lambda _, what: host.log("connection", reason=str(what.get("exception", what["message"])))
    )
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    try:
        await host.tunnel.start()
    except OSError as error:
        raise OSError(f"party {host.rank} can't listen on its link {host.entry.link}: {error.strerror}") from error
    server = rpc.serve(host)
    monitor = serve_monitor(host.entry, host.state, host.metrics)
    if host.leader is not None:
        host.leader.start()
    host.log("serving", control=host.entry.control, link=host.entry.link, pid=os.getpid())
    try:
        await stopped.wait()
        host.log("stopping")
        await loop.run_in_executor(None, _finish, host, server)
    finally:
        if monitor is not None:
            monitor.shutdown()
        host.tunnel.close()
        host.sessions.close()
    host.log("stopped")


def _finish(host: Host, server: grpc.Server) -> None:
    host.stop()
    server.stop(grace=1).wait()
