import datetime
import os
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from flaxmpc.secure.deploy.certificates import Authority
from flaxmpc.secure.deploy.cluster import ClusterFile, Limits, is_loopback, split
from flaxmpc.secure.deploy.local import issue_client, write_local


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
    assert local.config.exp_mode == "pade"  # files that say nothing
    (tmp_path / "cluster.toml").write_text('exp_mode = "taylor"\nnetwork = "lan"\n' + local.path.read_text())
    config = ClusterFile.read(tmp_path).config
    assert (config.exp_mode, config.network) == ("taylor", "lan")


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


@pytest.mark.parametrize("name", ["ca.key", "party2.pem", "client.key"])
def test_no_file_is_overwritten_nor_a_link_followed(tmp_path, name):
    (tmp_path / name).symlink_to("nowhere")
    with pytest.raises(FileExistsError, match=f"{name} exists already"):
        write_local(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_that_is_there_keeps_its_mode(tmp_path):
    tmp_path.chmod(0o755)
    cluster = write_local(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("*.key")} == {0o600}
    assert stat.S_IMODE(cluster.path.stat().st_mode) & 0o022 == 0
    before = os.umask(0)
    try:
        made = write_local(tmp_path / "made")
    finally:
        os.umask(before)
    assert stat.S_IMODE(made.path.parent.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in made.path.parent.glob("*.key")} == {0o600}


@pytest.mark.parametrize("seconds", [0.5, 0, -1, 3601, float("nan"), float("inf")])
def test_a_cluster_that_could_not_be_read_is_not_written(tmp_path, seconds):
    with pytest.raises(ValueError, match=rf"timeout_seconds: Expected `float` .* not {seconds}"):
        write_local(tmp_path / "c", timeout_seconds=seconds)
    assert not (tmp_path / "c").exists()


def test_seconds_are_written_as_they_were_given(tmp_path):
    assert write_local(tmp_path, timeout_seconds=1234.5678901).timeout_seconds == 1234.5678901


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


@pytest.mark.parametrize("name", ["", "a.b", "../x", "bob ", "bob\n", "b\0b", "ünal", "b" * 58])
def test_a_clients_name_is_plain(tmp_path, name):
    with pytest.raises(ValueError, match="a client's name has up to 57 letters, digits, '_' and '-', not "):
        issue_client(tmp_path, name)


def test_without_the_authority_there_are_no_more_clients(tmp_path):
    with pytest.raises(ValueError, match=r"holds no authority: it has no ca\.pem, which `cluster init` makes"):
        issue_client(tmp_path, "bob")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("# clients = [", "clients = [3, ", r"clients\[0\]: Expected `str`, got `int`, not 3"),
        ("# clients = [", 'clients = ["owner", ', r"clients\[0\]: Expected `str` matching regex .*, not 'owner'"),
        ("max_batch_rows = 8", "max_batch_rows = 0", r"max_batch_rows: Expected `int` >= 1, not 0"),
        ("queue = 64", "queue = 0", r"limits\.queue: Expected `int` >= 1, not 0"),
        ("queue = 64", 'queue = "many"', r"limits\.queue: Expected `int`, got `str`, not 'many'"),
        ("queue = 64", "queued = 64", r"limits: unknown key 'queued'\. Did .* 'queue'\? Known: calls_per_client, "),
        ("max_batch_rows", "max_batch_sentences", r"unknown key 'max_batch_sentences'\. Did .* 'max_batch_rows'\?"),
        ("rank = 2", "rang = 2", r"toml: party\[2\]: unknown key 'rang'\. Did you mean 'rank'\? Known: certificate, "),
        ("[client]\n", "[client]\nkeys = 1\n", r"client: unknown key 'keys'\. Did .* 'key'\? Known: certificate, key$"),
        ("fraction_bits = 18", 'path = "x"', "toml: unknown key 'path'.* Known: allow_insecure_dealer, ca, client, "),
        ("rank = 2", "rank = 1", r"protocol ABY3 takes party ranks 0\.\.2, not \[0, 1, 1\]"),
        ('protocol = "ABY3"', 'protocol = "ABY"', "unknown protocol 'ABY'. Did you mean 'ABY3'"),
        ('protocol = "ABY3"', 'protocol = "REF2K"', "sees everything: not for a cluster"),
        ("fraction_bits = 18", "fraction_bits = 40", r"fraction_bits must be in 1\.\.30 with ring FM64, not 40"),
        ('ring = "FM64"', 'exp_mode = "Pade"', "unknown exp_mode 'Pade'. Did you mean 'pade'"),
        ('ring = "FM64"', 'ring = "FM65"', "unknown ring 'FM65'. Did you mean 'FM64'"),
        ("timeout_seconds = 30", "timeout_seconds = 0.5", r"timeout_seconds: Expected `float` >= 1\.0, not 0.5"),
        ('ca = "ca.pem"', "", "missing required field `ca`"),
        ("[limits]", "[limits", "is not TOML"),
        ("queue = 64", "queue = true", r"limits\.queue: Expected `int`, got `bool`, not True"),
        ("queue = 64", "queue = 64.0", r"limits\.queue: Expected `int`, got `float`, not 64.0"),
        ("queue = 64", "queue = -1", r"limits\.queue: Expected `int` >= 1, not -1"),
        ("queue = 64", f"queue = 1{'0' * 30}", rf"limits\.queue: Expected `int` <= 1073741824, not 1{'0' * 30}$"),
        ("queue = 64", f"queue = {'9' * 5000}", r"is not TOML: Exceeds the limit \(4300 digits\)"),
        ("queue = 64", f"queue = {'[' * 5000}", "is not TOML: maximum recursion depth exceeded"),
        ("rank = 2", "rank = true", r"party\[2\]\.rank: Expected `int`, got `bool`, not True"),
        ("rank = 2", f"rank = 1{'0' * 30}", rf"takes party ranks 0\.\.2, not \[0, 1, 1{'0' * 30}\]$"),
        ("fraction_bits = 18", "fraction_bits = true", r"fraction_bits: Expected `int`, got `bool`, not True"),
        ("timeout_seconds = 30", "timeout_seconds = nan", r"timeout_seconds: Expected `float` >= 1\.0, not nan"),
        ("timeout_seconds = 30", "timeout_seconds = inf", r"timeout_seconds: Expected `float` <= 3600\.0, not inf"),
        ("timeout_seconds = 30", "timeout_seconds = true", r"timeout_seconds: Expected `float`, got `bool`, not True"),
        ("allow_insecure_dealer = false", "allow_insecure_dealer = 0", r"dealer: Expected `bool`, got `int`, not 0"),
        ("# clients = [", 'clients = ["client\\n", ', r"clients\[0\]: Expected .*, not 'client\\n'"),
        ("# clients = [", 'clients = ["client.ü", ', r"clients\[0\]: Expected .*, not 'client\.ü'"),
        ('ca = "ca.pem"', f"ca = [{'1,' * 9}]", r"ca: Expected `str`, got `array`$"),
        ('ca = "ca.pem"', f'ca = "ca.pem"\n{"x" * 9} = "{"y" * 999}"', r"toml: unknown key 'x{9}'\. Known: .*seconds$"),
        ('certificate = "party1.pem"', 'certificate = "./party0.pem"', r"party 1: certificate '\./party0\.pem' is also "
         r"party 0: certificate"),
        ('certificate = "party1.pem"', 'certificate = "a\\u0000b"', r"\]\.certificate: Expected .*, not 'a\\x00b'"),
        ('certificate = "party1.pem"', 'certificate = ""', r"party\[1\]\.certificate: Expected .*, not ''"),
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
        ("metrics", "[::]:9000", r"party 0: metrics '\[::\]:9000' must be 127.0.0.1:PORT: it has no TLS"),
        ("control", "host:0", "party 0: control 'host:0' has no port in 1..65535"),
        ("control", "host:7100\\n", r"party\[0\]\.control: Expected `str` matching regex .*, not 'host:7100\\n'"),
        ("control", "::1:7100", r"party\[0\]\.control: Expected `str` matching regex .*, not '::1:7100'"),
        ("control", "[::1]", r"party\[0\]\.control: Expected `str` matching regex .*, not '\[::1\]'"),
        ("control", "[::g]:7100", r"party 0: control '\[::g\]:7100' has no IPv6 address in its brackets"),
        ("link", "[127.0.0.1]:7100", r"party 0: link '\[127.0.0.1\]:7100' has no IPv6 address in its brackets"),
    ],
)
def test_addresses_are_checked(local, tmp_path, field, value, message):
    own = getattr(local.party[0], field)
    (tmp_path / "cluster.toml").write_text(local.path.read_text().replace(own, value))
    with pytest.raises(ValueError, match=message):
        ClusterFile.read(tmp_path)


def changed(local, tmp_path, *changes):
    text = local.path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "cluster.toml").write_text(text)
    return ClusterFile.read(tmp_path)


def test_addresses_may_be_of_ipv6(local, tmp_path):
    port = split(local.party[0].control)[1]
    cluster = changed(local, tmp_path, ("127.0.0.1", "[0:0::1]"))
    assert split(cluster.party[0].control) == ("::1", port)
    assert cluster.parties_beside(0) == 3
    assert is_loopback(cluster.party[0].control)
    assert not is_loopback("[::2]:7")
    with pytest.raises(ValueError, match=r"party 0: link '\[0:0::1\]:\d+' is also party 0: control"):
        changed(local, tmp_path, (local.party[0].control, f"[::1]:{port}"), (local.party[0].link, f"[0:0::1]:{port}"))


def test_what_one_machine_has_once_two_parties_cannot_share(local, tmp_path):
    """The files and loopback ports of two machines may have the same names."""
    first, second, _ = local.party
    metrics = (str(second.metrics), str(first.metrics))
    with pytest.raises(ValueError, match=r"party 1: metrics '127\.0\.0\.1:\d+' is also party 0: metrics$"):
        changed(local, tmp_path, metrics)
    keep = [(f"rank = {rank}\n", f'rank = {rank}\nkeep_shares = "{name}"\n') for rank, name in ((0, "k"), (1, "./k/"))]
    with pytest.raises(ValueError, match=r"party 1: keep_shares '\./k/' is also party 0: keep_shares$"):
        changed(local, tmp_path, *keep)
    apart = (first.control, "a.example:7100")
    assert changed(local, tmp_path, apart, metrics, *keep).party[1].keep_shares == "./k/"


@pytest.mark.parametrize("value", ["", "a b", "[::]", "0.0.0.0\\n"])
def test_where_a_party_listens_is_an_address(local, tmp_path, value):
    with pytest.raises(ValueError, match=r"party\[0\]\.listen: Expected `str` matching regex"):
        changed(local, tmp_path, ("rank = 0\n", f'rank = 0\nlisten = "{value}"\n'))
    assert changed(local, tmp_path, ("rank = 0\n", 'rank = 0\nlisten = "::"\n')).party[0].listen == "::"


def test_a_cluster_file_is_a_file(local, tmp_path):
    path = tmp_path / "cluster.toml"
    os.mkfifo(path, 0o600)
    with pytest.raises(ValueError, match=r"cluster\.toml is not a file$"):
        ClusterFile.read(tmp_path)
    path.unlink()
    path.write_bytes(local.path.read_bytes() + b"#" * (1 << 20))
    with pytest.raises(ValueError, match=r"cluster\.toml has \d+ bytes, more than 1048576$"):
        ClusterFile.read(tmp_path)
    path.write_bytes(local.path.read_bytes())
    path.chmod(0o666)
    with pytest.raises(ValueError, match=r"anybody may change \S+cluster\.toml \(mode 0666\)"):
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
    code = f"import sys, flaxmpc, flaxmpc.secure, flaxmpc.cli.deploy; print({heavy} & {{*sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_the_example_in_the_docs_is_one():
    example = ClusterFile.read(Path(__file__).parents[3] / "docs" / "guides" / "cluster.toml")
    assert [entry.listen for entry in example.party] == ["0.0.0.0"] * 3
