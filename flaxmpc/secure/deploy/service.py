"""The process of a computing host: its ports, its signals, its end."""

import asyncio
import functools
import os
import signal
import ssl
from collections.abc import Callable

import grpc

from flaxmpc.secure.deploy import server
from flaxmpc.secure.deploy.calls import Calls
from flaxmpc.secure.deploy.cluster import split
from flaxmpc.secure.deploy.gate import EACH, GRPC, LINK, Gate, Inner, by_certificate, by_name, make_room, tls
from flaxmpc.secure.deploy.host import Host
from flaxmpc.secure.deploy.monitor import limited, serve_monitor

_SPARE_THREADS = 16  # to refuse calls, while all others wait


def serve(host: Host) -> None:
    """Runs a party until SIGTERM or SIGINT. OSError: a port is taken."""
    asyncio.run(_serve(host))


async def _serve(host: Host) -> None:
    loop = asyncio.get_running_loop()
    log = limited(host.log)
    loop.set_exception_handler(lambda _, what: log("connection", reason=str(what.get("exception", what["message"]))))
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    callers, parties = Inner(), Inner()
    gates = _gates(host, callers, parties, log)
    servers = _servers(host, callers, parties, log)
    try:
        await host.tunnel.start()
        for port, gate in gates.items():
            await _listen(host, port, gate)
        monitor = serve_monitor(host.entry, host.metrics)
        if host.leader is not None:
            host.leader.start()
        inner = [callers.address, parties.address]
        host.log("serving", control=host.entry.control, link=host.entry.link, inner=inner, pid=os.getpid())
        try:
            await stopped.wait()
            host.log("stopping")
            await loop.run_in_executor(None, _finish, host, servers)
        finally:
            if monitor is not None:
                monitor.shutdown()
    finally:
        for end in (*gates.values(), host.tunnel):
            await end.close()
        host.sessions.close()
    host.log("stopped")


def _gates(host: Host, callers: Inner, parties: Inner, log: Callable[..., None]) -> dict[str, Gate]:
    """The public ports. ValueError: see `tls`."""
    cluster, entry = host.cluster, host.entry
    wanted = cluster.limits.connections
    connections = make_room(wanted)
    if connections < wanted:
        host.log("few_files", connections=connections, wanted=wanted)
    make = functools.partial(Gate, log=log, silent_seconds=2 * cluster.timeout_seconds)
    return {
        "control": make(
            "control",
            tls(cluster, entry, ssl.PROTOCOL_TLS_SERVER, GRPC),
            by_name,
            {GRPC: callers.connected},
            connections=connections,
        ),
        "link": make(
            "link",
            tls(cluster, entry, ssl.PROTOCOL_TLS_SERVER, GRPC, LINK),
            by_certificate(cluster, host.rank),
            {GRPC: parties.connected, LINK: host.tunnel.connected},
            connections=EACH * len(cluster.party),
        ),
    }


def _servers(host: Host, callers: Inner, parties: Inner, log: Callable[..., None]) -> list[grpc.Server]:
    """A server for owner and clients, and one for the other parties: neither takes the other's threads."""

    def serve(inner: Inner, each: int, clients: int, reserved: int) -> grpc.Server:
        """`each`: calls of one caller; `reserved`: callers who are no clients."""
        threads = clients + reserved * each + _SPARE_THREADS
        # Of a call that was cancelled the stream lasts a little longer: those must not keep out the next.
        return server.start(host, inner, Calls(each, clients), streams=2 * each, threads=threads, log=log)

    limits = host.cluster.limits
    return [
        serve(callers, limits.calls_per_client, clients=2 * limits.queue, reserved=1),
        serve(parties, 4 * limits.queue + _SPARE_THREADS, clients=0, reserved=len(host.cluster.party) - 1),
    ]


async def _listen(host: Host, port: str, gate: Gate) -> None:
    address = getattr(host.entry, port)
    try:
        own, number = split(address)
        await gate.start(host.entry.listen or own, number)
    except OSError as error:
        raise OSError(f"party {host.rank} can't listen on its {port} {address}: {error.strerror or error}") from error


def _finish(host: Host, servers: list[grpc.Server]) -> None:
    host.stop()
    for ended in [each.stop(grace=1) for each in servers]:
        ended.wait()
