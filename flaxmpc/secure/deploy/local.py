"""A cluster of this machine: cluster.toml with an authority and certificates, and further clients of it."""

import contextlib
import os
import random
import re
import socket
from pathlib import Path

import msgspec

from flaxmpc import files
from flaxmpc.secure.deploy.certificates import Authority
from flaxmpc.secure.deploy.cluster import CLIENT, FILE_NAME, ClusterFile, Limits, Seconds
from flaxmpc.secure.protocol import PROTOCOLS, Config


def write_local(
    directory: str | Path,
    protocol: str = "ABY3",
    *,
    timeout_seconds: float = 30.0,
    allow_insecure_dealer: bool = False,
) -> ClusterFile:
    """Writes a cluster of this machine that works: cluster.toml, an authority, a certificate for every role.

    Args:
        directory: the folder to write to; it is made if need be.
        protocol: a name in PROTOCOLS; it says how many parties there are.
        timeout_seconds, allow_insecure_dealer: lines of cluster.toml, as ClusterFile has them.

    Raises:
        FileExistsError: there is a cluster already.
        ValueError: an unknown protocol, or one that makes no cluster; seconds that are not allowed.
    """
    directory = Path(directory)
    path = directory / FILE_NAME
    num_parties = Config(protocol).world_size
    if protocol == "REF2K":
        raise ValueError("protocol REF2K is one party that sees everything: not for a cluster")
    try:
        msgspec.convert(timeout_seconds, Seconds)
    except msgspec.ValidationError as error:
        raise ValueError(f"timeout_seconds: {error}, not {timeout_seconds}") from error
    names = ("owner", "client", *(f"party{rank}" for rank in range(num_parties)))
    for made in (FILE_NAME, *(f"{name}.{suffix}" for name in ("ca", *names) for suffix in ("pem", "key"))):
        if os.path.lexists(directory / made):
            raise FileExistsError(f"{directory / made} exists already")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    authority = Authority()
    authority.write(directory)
    for name in names:
        authority.issue(directory, name, server=name.startswith("party"))
    content = _content(protocol, num_parties, timeout_seconds, allow_insecure_dealer)
    files.write_new(path, content.encode(), 0o644)
    return ClusterFile.read(path)


def _content(protocol: str, num_parties: int, timeout_seconds: float, allow_insecure_dealer: bool) -> str:
    """The text of a cluster.toml, with free ports of this machine."""
    seconds = str(timeout_seconds).removesuffix(".0")
    ports = iter(_free_ports(3 * num_parties))
    lines = [
        "# The same file at every party, owner and client. Each host has only its own .key file;",
        "# ca.key signs further certificates and belongs on none of them.",
        f'protocol = "{protocol}"  # {", ".join(name for name in PROTOCOLS if name != "REF2K")}',
        'ring = "FM64"',
        "fraction_bits = 18",
        f"timeout_seconds = {seconds}  # how long a party that is absent or silent is waited for",
        'ca = "ca.pem"',
        '# models = ["NAME"]  # what an owner may put; without this line anything',
        '# clients = ["client", "client.NAME"]  # who may ask; without this line all that have a certificate',
        '# programs = "programs.txt"  # what `flaxmpc approve` wrote: models of other programs are refused',
        f"allow_insecure_dealer = {str(allow_insecure_dealer).lower()}",
        "",
        "[limits]",
        *(f"{field} = {value}" for field, value in msgspec.structs.asdict(Limits()).items()),
        "",
    ]
    for role in ("owner", "client"):
        lines += [f"[{role}]", f'certificate = "{role}.pem"', f'key = "{role}.key"', ""]
    for rank in range(num_parties):
        lines += ["[[party]]", f"rank = {rank}"]
        lines += [f'{field} = "127.0.0.1:{next(ports)}"' for field in ("control", "link", "metrics")]
        lines += [f'certificate = "party{rank}.pem"', f'key = "party{rank}.key"', ""]
    return "\n".join(lines)


def issue_client(directory: str | Path, name: str) -> Path:
    """Issues the certificate of one more client from the authority that `write_local` made.

    Args:
        directory: the one that holds ca.pem and ca.key.
        name: up to 57 letters, digits, "_" and "-"; the certificate's common name is "client.NAME".

    Returns:
        The certificate, client.NAME.pem; its key (mode 0600) is beside it.

    Raises:
        FileExistsError: there is one of that name.
        ValueError: another kind of name, or no authority in the directory.
    """
    directory = Path(directory)
    if not re.fullmatch(CLIENT, f"client.{name}"):
        raise ValueError(f"a client's name has up to 57 letters, digits, '_' and '-', not {name!r}")
    Authority.read(directory).issue(directory, f"client.{name}", server=False)
    return directory / f"client.{name}.pem"


def _free_ports(count: int) -> list[int]:
    """Ports that are free now, and outside the range from which systems take those of outgoing connections."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 32_000), 1000):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports.append(port)
        if len(ports) == count:
            break
    return ports
