import datetime
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from flaxmpc.secure.deploy.certificates import Authority
from flaxmpc.secure.deploy.cluster import ClusterFile, Limits, issue_client, write_local


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return write_local(tmp_path_factory.mktemp("cluster") / "new")


def test_a_local_cluster_is_read_as_it_was_written(local):
    assert (local.protocol, local.ring, local.fraction_bits, local.timeout_seconds) == ("ABY3", "FM64", 18, 30)
    assert [entry.rank for entry in local.party] == [0, 1, 2]
    assert local.limits == Limits()
    assert local.config.world_size == 3
    assert ClusterFile.read(local.path.parent) == local
    ports = {getattr(entry, field) for entry in local.party for field in ("control", "link", "metrics")}
    assert len(ports) == 9


def test_a_file_says_how_exponentials_are_computed(local, tmp_path):
    assert local.config.exp_mode == "taylor"  # files that say nothing
    (tmp_path / "cluster.toml").write_text('exp_mode = "pade"\n' + local.path.read_text())
    assert ClusterFile.read(tmp_path).config.exp_mode == "pade"


def test_parties_of_one_host_are_counted(local):
    assert local.parties_beside(1) == 3
    first, *others = local.party
    moved = msgspec.structs.replace(local, party=(msgspec.structs.replace(first, control="host0:4321"), *others))
    assert [moved.parties_beside(rank) for rank in range(3)] == [1, 2, 2]


def test_keys_are_their_owners_only(local):
    keys = sorted(path.name for path in local.path.parent.glob("*.key"))
    assert keys == ["ca.key", "client.key", "owner.key", "party0.key", "party1.key", "party2.key"]
    for name in keys:
        assert stat.S_IMODE(local.file(name).stat().st_mode) == 0o600


def test_certificates_say_who_is_who(local):
    certificate = x509.load_pem_x509_certificate(local.read_file("party1.pem"))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["party1"]
    client = x509.load_pem_x509_certificate(local.read_file("client.pem"))
    assert client.subject.rfc4514_string() == "CN=client"
    uses = client.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(uses) == [ExtendedKeyUsageOID.CLIENT_AUTH]


def test_an_existing_cluster_is_not_overwritten(local):
    with pytest.raises(FileExistsError, match="exists already"):
        write_local(local.path.parent)


def test_an_expired_certificate_can_be_made(tmp_path):
    Authority().issue(tmp_path, "client", server=False, valid=-datetime.timedelta(hours=1))
    certificate = x509.load_pem_x509_certificate((tmp_path / "client.pem").read_bytes())
    assert certificate.not_valid_before_utc < certificate.not_valid_after_utc
    assert certificate.not_valid_after_utc < datetime.datetime.now(datetime.timezone.utc)


def test_a_client_more(tmp_path):
    write_local(tmp_path / "c")
    path = issue_client(tmp_path / "c", "bob")
    assert path == tmp_path / "c" / "client.bob.pem"
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    assert certificate.subject.rfc4514_string() == "CN=client.bob"
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate((tmp_path / "c" / "ca.pem").read_bytes()))
    assert stat.S_IMODE(path.with_suffix(".key").stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        issue_client(tmp_path / "c", "bob")


@pytest.mark.parametrize("name", ["", "a.b", "../x", "bob ", "ünal"])
def test_a_clients_name_is_plain(tmp_path, name):
    with pytest.raises(ValueError, match="a client's name has letters, digits, '_' and '-', not "):
        issue_client(tmp_path, name)


def test_without_the_authority_there_are_no_more_clients(tmp_path):
    with pytest.raises(ValueError, match=r"holds no authority: it has no ca\.pem, which `cluster init` makes"):
        issue_client(tmp_path, "bob")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("# clients = [", "clients = [3, ", r"clients\[0\]: Expected `str`, got `int`, not 3"),
        ("# clients = [", 'clients = ["owner", ', r"clients\[0\]: Expected `str` matching regex .*, not 'owner'"),
        ("max_batch_sentences = 8", "max_batch_sentences = 0", r"max_batch_sentences: Expected `int` >= 1, not 0"),
        ("queue = 64", "queue = 0", r"limits\.queue: Expected `int` >= 1, not 0"),
        ("queue = 64", 'queue = "many"', r"limits\.queue: Expected `int`, got `str`, not 'many'"),
        ("queue = 64", "queued = 64", "unknown field `queued`"),
        ("rank = 2", "rank = 1", r"protocol ABY3 takes party ranks 0\.\.2, not \[0, 1, 1\]"),
        ('protocol = "ABY3"', 'protocol = "ABY"', "unknown protocol 'ABY'. Did you mean 'ABY3'"),
        ('protocol = "ABY3"', 'protocol = "REF2K"', "sees everything: not for a cluster"),
        ("fraction_bits = 18", "fraction_bits = 40", r"fraction_bits must be in 1\.\.30 with ring FM64, not 40"),
        ('ring = "FM64"', 'exp_mode = "Pade"', "unknown exp_mode 'Pade'. Did you mean 'pade'"),
        ('ring = "FM64"', 'ring = "FM65"', "unknown ring 'FM65'. Did you mean 'FM64'"),
        ("timeout_seconds = 30", "timeout_seconds = 0.5", r"timeout_seconds: Expected `float` >= 1\.0, not 0.5"),
        ('ca = "ca.pem"', "", "missing required field `ca`"),
        ("[limits]", "[limits", "is not TOML"),
        ('certificate = "party1.pem"', "certificate = 1", r"party\[1\]\.certificate: Expected `str`, got `int`, not 1"),
    ],
)  # fmt: skip
def test_what_is_not_allowed_is_named(local, tmp_path, old, new, message):
    text = local.path.read_text()
    assert old in text
    (tmp_path / "cluster.toml").write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=message) as error:
        ClusterFile.read(tmp_path)
    assert str(tmp_path / "cluster.toml") in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("control", "host", r"party\[0\]\.control: Expected `str` matching regex .*, not 'host'"),
        ("control", "host:70000", "party 0: control 'host:70000' has no port in 1..65535"),
        ("metrics", "0.0.0.0:9000", "party 0: metrics '0.0.0.0:9000' must be 127.0.0.1:PORT: it has no TLS"),
    ],
)
def test_addresses_are_checked(local, tmp_path, field, value, message):
    own = getattr(local.party[0], field)
    (tmp_path / "cluster.toml").write_text(local.path.read_text().replace(own, value))
    with pytest.raises(ValueError, match=message):
        ClusterFile.read(tmp_path)


def test_two_ports_cannot_be_one(local, tmp_path):
    text = local.path.read_text().replace(local.party[0].link, local.party[1].control)
    (tmp_path / "cluster.toml").write_text(text)
    with pytest.raises(ValueError, match=r"party 1: control '.*' is also party 0: link"):
        ClusterFile.read(tmp_path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cluster\.toml cannot be read: No such file"):
        ClusterFile.read(tmp_path / "cluster.toml")


def test_importing_the_package_loads_no_grpc_and_no_spu():
    heavy = {"grpc", "spu", "torch", "transformers"}
    code = f"import sys, flaxmpc, flaxmpc.secure, flaxmpc.cli; print({heavy} & {{*sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_the_example_in_the_docs_is_one():
    example = ClusterFile.read(Path(__file__).parents[3] / "docs" / "cluster.toml")
    assert [entry.listen for entry in example.party] == ["0.0.0.0"] * 3
