"""Hosts for a measurement on one machine: a network namespace each, with limited bandwidth and latency (Linux, root).

    with namespaces.hosts(3, rate="100mbit", rtt_seconds=0.08) as hosts:
        processes = [hosts.popen(i, ["python", "party.py", *hosts.addresses]) for i in range(3)]

This process is outside, and reaches the hosts by their addresses.
"""

import contextlib
import dataclasses
import fcntl
import os
import selectors
import shutil
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

# Jumbo frames: fewer to copy, and several of them are one burst of tbf.
_MTU = "9000"


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The running hosts.

    Attributes:
        addresses: of each host, IPv4.
        outside: the address at which they reach this process.
    """

    addresses: tuple[str, ...]
    outside: str
    _names: tuple[str, ...]

    def command(self, host: int, args: Sequence[str]) -> list[str]:
        """The command line that runs `args` on a host."""
        return ["ip", "netns", "exec", self._names[host], *args]

    def popen(self, host: int, args: Sequence[str], **options: Any) -> subprocess.Popen:
        """Starts `args` on a host; options as for subprocess.Popen. Ending it is the caller's."""
        return subprocess.Popen(self.command(host, args), **options)


def unavailable() -> str | None:
    """Why there can be no hosts here, in a line; None if there can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            return f"the program {program} is missing (package iproute2)"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hosts(1, rate="1gbit"))
        except subprocess.CalledProcessError as error:
            return f"network namespaces are not permitted here: {(error.stderr or str(error)).strip()}"
    return None


@contextlib.contextmanager
def hosts(count: int, *, rate: str | None = None, rtt_seconds: float = 0.0) -> Iterator[Hosts]:
    """`count` hosts on one switch, up to 250.

    Args:
        rate: what each can send, as tc writes it ("100mbit"); no limit without.
        rtt_seconds: round-trip time between two hosts; half of it between a host and this process. Every frame that
            a host sends waits half of it in a process of its own, as not every kernel can delay (netem): for WANs.

    Raises:
        subprocess.CalledProcessError: `ip` or `tc` failed, see `unavailable`.
    """
    stem = f"fx{os.getpid() % 100_000}"
    network = f"10.77.{os.getpid() % 250}"
    names = tuple(f"{stem}h{i}" for i in range(count))
    ports = tuple(f"{stem}p{i}" for i in range(count))
    found = Hosts(tuple(f"{network}.{i + 1}" for i in range(count)), f"{network}.254", names)
    with contextlib.ExitStack() as stack:

        def made(undo: str, *do: str) -> None:
            for line in do:
                _run(line)
            stack.callback(subprocess.run, undo.split(), check=False, capture_output=True)

        made(f"ip link del {stem}", f"ip link add {stem} type bridge")
        for line in (f"ip addr add {found.outside}/24 dev {stem}", f"ip link set {stem} up"):
            _run(line)
        if rtt_seconds:
            stack.enter_context(_cables([(f"{stem}e{i}", port) for i, port in enumerate(ports)], rtt_seconds / 2))
        for i, (name, port) in enumerate(zip(names, ports, strict=True)):
            made(f"ip netns del {name}", f"ip netns add {name}")
            if not rtt_seconds:
                made(f"ip link del {port}", f"ip link add {port} type veth peer name {stem}e{i}")
            for line in (
                f"ip link set {stem}e{i} netns {name} name eth0 mtu {_MTU}",
                f"ip link set {port} master {stem} mtu {_MTU} up",
                f"ip -n {name} addr add {found.addresses[i]}/24 dev eth0",
                f"ip -n {name} link set eth0 up",
                f"ip -n {name} link set lo up",
            ):
                _run(line)
            if rate is not None:
                _run(f"ip netns exec {name} tc qdisc add dev eth0 root tbf rate {rate} burst 64kb latency 300ms")
            # As on a link that is tuned for its latency: TCP does not start slowly again after every pause.
            _run(f"ip netns exec {name} sysctl -q -w net.ipv4.tcp_slow_start_after_idle=0")
        yield found


def _run(line: str) -> None:
    subprocess.run(line.split(), check=True, capture_output=True, text=True)


@contextlib.contextmanager
def _cables(ends: Sequence[tuple[str, str]], seconds: float) -> Iterator[None]:
    """Pairs of interfaces, (host's, switch's): what enters the first comes out of the second after `seconds`."""
    command = [sys.executable, __file__, str(seconds), *(name for pair in ends for name in pair)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout is not None
        if not process.stdout.readline():  # it says that all are there
            _, stderr = process.communicate()
            raise subprocess.CalledProcessError(process.wait(), command, stderr=stderr.decode())
        yield
    finally:
        process.kill()
        process.communicate()


def _tap(name: str) -> int:
    """File descriptor of a new Ethernet interface; it is there as long as that is open."""
    tun_set_iff, iff_tap, iff_no_pi = 0x400454CA, 0x0002, 0x1000  # linux/if_tun.h
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, tun_set_iff, struct.pack("16sH22x", name.encode(), iff_tap | iff_no_pi))
    return fd


def _carry(seconds: float, names: Sequence[str]) -> None:
    """The process of `_cables`; ends with its standard input."""
    fds = [_tap(name) for name in names]
    print("ready", flush=True)
    to = {fd: fds[i ^ 1] for i, fd in enumerate(fds)}
    delay = {fd: 0.0 if i % 2 else seconds for i, fd in enumerate(fds)}
    waiting: deque[tuple[float, int, bytes]] = deque()  # by time, as all delays are equal
    selector = selectors.DefaultSelector()
    for fd in (0, *fds):
        selector.register(fd, selectors.EVENT_READ)
    while True:
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, fd, frame = waiting.popleft()
            _send(fd, frame)
        # epoll waits whole milliseconds, rounded up; so the last one is spent polling.
        wait = max(0.0, waiting[0][0] - now - 0.001) if waiting else None
        for key, _ in selector.select(wait):
            if key.fd == 0:
                return
            with contextlib.suppress(BlockingIOError, OSError):  # OSError: it is not up yet
                while True:
                    frame = os.read(key.fd, 1 << 16)
                    if delay[key.fd]:
                        waiting.append((time.monotonic() + seconds, to[key.fd], frame))
                    else:
                        _send(to[key.fd], frame)


def _send(fd: int, frame: bytes) -> None:
    with contextlib.suppress(OSError):  # as on any cable, a frame that can't be taken is lost
        os.write(fd, frame)


if __name__ == "__main__":
    _carry(float(sys.argv[1]), sys.argv[2:])
