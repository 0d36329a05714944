"""The commands of a deployment: cluster, party, put, approve; and how `infer` asks one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from flaxmpc.cli.results import Asked
    from flaxmpc.data.batches import Text

# gRPC would say on standard error, without end, what a peer does wrong; what matters is raised. It looks when loaded.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

_Cluster = Annotated[Path, tyro.conf.arg(metavar="PATH")]
_Flag = tyro.conf.FlagCreatePairsOff
_Model = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME|FOLDER")]
_Name = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]
_Lengths = Annotated[tuple[int, ...], tyro.conf.arg(help_behavior_hint="(default: those up to 64)")]


def cluster(
    action: Annotated[Literal["init", "up", "certificate"], tyro.conf.Positional],
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")],
    /,
    protocol: Annotated[str, tyro.conf.arg(metavar="ABY3|CHEETAH|SEMI2K")] = "ABY3",
    timeout: float = 30.0,
    allow_insecure_dealer: Annotated[bool, _Flag] = False,
    name: _Name = None,
) -> None:
    """A cluster on this machine: `cluster init DIR` writes it, `cluster up DIR` runs all its parties.

    `cluster certificate DIR --name NAME` issues a certificate for one more client.

    Args:
        action: init, up or certificate.
        folder: the folder of cluster.toml and the certificates.
        protocol: init: the protocol of the secure computation.
        timeout: init: seconds that a party that is absent or silent is waited for.
        allow_insecure_dealer: init: allow SEMI2K, which hides nothing from party 0.
        name: certificate: the client's; letters, digits, "_" and "-".
    """
    from flaxmpc.secure.deploy.cluster import ClusterFile
    from flaxmpc.secure.deploy.local import issue_client, write_local
    from flaxmpc.secure.deploy.process import hide_memory

    hide_memory()
    if action == "init":
        written = write_local(folder, protocol, timeout_seconds=timeout, allow_insecure_dealer=allow_insecure_dealer)
        print(
            f"wrote {written.path}: {protocol}, {len(written.party)} parties; start them: flaxmpc cluster up {folder}"
        )
        return
    if action == "certificate":
        if name is None:
            raise ValueError("whose certificate? Say --name NAME")
        issued = issue_client(folder, name)
        print(f"wrote {issued} and its .key: give the client both, ca.pem and cluster.toml, with both under [client]")
        return
    read = ClusterFile.read(folder)
    command = [sys.executable, "-m", "flaxmpc", "party", "--cluster", str(read.path), "--rank"]
    processes = [subprocess.Popen([*command, str(entry.rank)]) for entry in read.party]

    def stop(number: int, _: Any) -> None:
        for process in processes:
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(1)


def party(
    cluster: _Cluster,
    rank: int,
    allow_insecure_dealer: Annotated[bool, _Flag] = False,
) -> None:
    """One computing host, until SIGTERM; it finishes the running request first. Logs JSON lines.

    Args:
        cluster: cluster.toml, or its folder.
        rank: the number of this party, from 0.
        allow_insecure_dealer: run SEMI2K, which hides nothing from party 0.
    """
    from flaxmpc.secure.deploy.cluster import ClusterFile
    from flaxmpc.secure.deploy.host import Host
    from flaxmpc.secure.deploy.process import hide_memory
    from flaxmpc.secure.deploy.service import serve

    hide_memory()
    serve(Host(ClusterFile.read(cluster), rank, allow_insecure_dealer=allow_insecure_dealer))


def put(
    model: _Model,
    /,
    cluster: _Cluster,
    name: _Name = None,
    lengths: _Lengths = (),
    batches: tuple[int, ...] = (1,),
    public_weights: Annotated[bool, _Flag] = False,
) -> None:
    """The model's owner shares its weights among the parties: each gets its own shares only.

    Args:
        model: a name of the zoo, a model folder, or a name on the hub, see `infer`.
        cluster: cluster.toml, or its folder.
        name: the model's name for clients; by default the folder's.
        lengths: the tokens that texts are padded to: 16, 32, 64, 128, 256, 512, or the most that the model takes.
        batches: the numbers of texts that a run may have.
        public_weights: every party, and who sees what it holds, may know the weights, as of a model that is published
            anyway. Only texts and answers are secret then, and a run costs less.
    """
    from flaxmpc import secure
    from flaxmpc.models import folder, zoo
    from flaxmpc.secure.deploy.process import hide_memory
    from flaxmpc.serve import remote

    hide_memory()
    loaded = folder.load(zoo.with_weights(model))
    start = time.perf_counter()
    with secure.Cluster(cluster, "owner") as parties:
        options: dict[str, Any] = {"lengths": lengths or None, "batches": batches, "public_weights": public_weights}
        served = remote.put(loaded, parties, name=name, **options)
        seconds, sent = time.perf_counter() - start, parties.bytes_sent
    what = "weights in the clear" if public_weights else "shares"
    count = "1 program" if len(served.programs) == 1 else f"{len(served.programs)} programs"
    print(
        f"{name or zoo.name_of(loaded.folder)}: {count} ({', '.join(served.programs)}), "
        f"hash {served.hash[:16]}, {sent / 1e6:.1f} MB of {what} to {len(parties.cluster.party)} parties "
        f"in {seconds:.1f} s"
    )


def approve(
    model: _Model,
    /,
    cluster: _Cluster,
    name: _Name = None,
    lengths: _Lengths = (),
    batches: tuple[int, ...] = (1,),
    public_weights: Annotated[bool, _Flag] = False,
) -> None:
    """Who runs a party approves a model's programs: their digests go to the file that cluster.toml names, `programs`.

    Args:
        model: a name of the zoo, a folder with the model's config.json, or a name on the hub; its weights are not
            needed.
        cluster: cluster.toml, or its folder.
        name: the model's name, a remark in the file; by default the folder's.
        lengths: the lengths that the owner puts it for.
        batches: the numbers of texts that the owner puts it for.
        public_weights: as the owner says it: it makes other programs.
    """
    from flaxmpc.models import zoo
    from flaxmpc.secure.deploy.cluster import ClusterFile
    from flaxmpc.serve import remote

    read = ClusterFile.read(cluster)
    options: dict[str, Any] = {"lengths": lengths or None, "batches": batches, "public_weights": public_weights}
    programs = remote.approve(zoo.find(model), read, name=name, **options)
    for size, program in programs.items():
        print(f"approved {size}: {program.digest}")


def ask(cluster: Path, model: str | None, texts: Sequence[Text], progress: Callable[..., Any]) -> Asked:
    """Asks a model on a cluster. The answers are opened here, and are known to nobody else."""
    from flaxmpc import secure
    from flaxmpc.cli.results import Asked
    from flaxmpc.secure.deploy.process import hide_memory
    from flaxmpc.serve import remote

    hide_memory()
    with secure.Cluster(cluster, "client") as parties:
        classifier = remote.RemoteClassifier(parties, model)
        before = parties.bytes_sent
        start = time.perf_counter()
        found = classifier.classify(texts, progress)
        seconds, sent = time.perf_counter() - start, parties.bytes_sent - before
    summary = (
        f"{classifier.name}, {parties.config.protocol}, {parties.config.world_size} parties: {seconds:.1f} s, "
        f"{sent / 1e6:.1f} MB of shares sent by this client"
    )
    return Asked(classifier.name, classifier, found, summary, {"seconds": seconds, "bytes_sent": sent})
