"""Who a certificate is, and what is said of files that are not the right ones; names alone open nothing."""

import datetime
import os
import shutil
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from flaxmpc.secure import Cluster
from flaxmpc.secure.deploy.certificates import Authority, check_identity, check_party, role_of
from flaxmpc.secure.deploy.cluster import ClusterFile
from flaxmpc.secure.deploy.host import Host
from flaxmpc.secure.deploy.local import write_local

LATE = -datetime.timedelta(hours=1)
PEM = serialization.Encoding.PEM


@pytest.mark.parametrize(
    ("name", "role"),
    [("owner", "owner"), ("client", "client"), ("client.bob", "client"), (f"client.{'b' * 57}", "client")],
)
def test_roles(name, role):
    assert role_of(name) == role


NO_ROLE = [
    "", "owner.bob", "owner\n", "owner\0", " owner", "Owner", "client.", "client.a.b", "client.bob\n", "client.b\0b",
    "client\n", "clients", "client.ünal", "client.b b", f"client.{'b' * 58}", "party0", "leader", "client.../../x",
]  # fmt: skip


@pytest.mark.parametrize("name", NO_ROLE)
def test_any_other_name_has_no_role(name):
    assert role_of(name) == ""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_local(tmp_path_factory.mktemp("written") / "c").path.parent


@pytest.fixture
def folder(written, tmp_path):
    """A cluster's folder, to spoil."""
    return shutil.copytree(written, tmp_path / "c")


def test_what_was_written_is_right(folder):
    cluster = ClusterFile.read(folder)
    for rank in range(3):
        check_party(cluster, rank)
    for role in ("owner", "client"):
        check_identity(cluster, role)


def test_certificates_that_others_made_are_right(folder):
    """With an RSA key and a further name; only the authority's signature counts."""
    key = rsa.generate_private_key(65537, 2048)
    signed(folder, "party1", key, dns=["party1.example", "party1"])
    check_party(ClusterFile.read(folder), 1)


def signed(folder, name, key, *, dns=(), uses=("CLIENT_AUTH", "SERVER_AUTH"), common=None) -> None:
    """Puts a certificate and its key in place of a name's, signed by the folder's authority."""
    authority = Authority.read(folder)
    now = datetime.datetime.now(datetime.timezone.utc)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common or name)])
    issuer = authority.certificate.subject
    builder = x509.CertificateBuilder(issuer, subject, key.public_key(), 7, now, now + datetime.timedelta(days=1))
    builder = builder.add_extension(x509.ExtendedKeyUsage([getattr(ExtendedKeyUsageOID, use) for use in uses]), False)
    builder = builder.add_extension(x509.SubjectAlternativeName(map(x509.DNSName, dns)), critical=False)
    made = builder.sign(authority._key, hashes.SHA256())
    (folder / f"{name}.pem").write_bytes(made.public_bytes(PEM))
    (folder / f"{name}.key").write_bytes(
        key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def anew(folder, name, authority, **how) -> None:
    for suffix in ("pem", "key"):
        (folder / f"{name}.{suffix}").unlink(missing_ok=True)
    authority.issue(folder, name, **how)


def key_of(folder, name) -> Any:
    return serialization.load_pem_private_key((folder / f"{name}.key").read_bytes(), None)


def copy(old, new):
    return lambda folder: (folder / new).write_bytes((folder / old).read_bytes())


def add(old, new):
    return lambda folder: (folder / new).write_bytes((folder / new).read_bytes() + (folder / old).read_bytes())


def content(name, value):
    return lambda folder: (folder / name).write_bytes(value)


def mode(name, value):
    return lambda folder: (folder / name).chmod(value)


def pipe(name):
    def spoil(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name, 0o600)

    return spoil


def link(name, target):
    def spoil(folder):
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return spoil


def encrypt(name):
    def spoil(folder):
        key = key_of(folder, name)
        how = serialization.BestAvailableEncryption(b"secret")
        (folder / f"{name}.key").write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, how))

    return spoil


def expired_authority(folder):
    for name in ("ca.pem", "ca.key"):
        (folder / name).unlink()
    Authority(days=-1).write(folder)


def another_authority(folder):
    anew(folder, "party1", Authority(), server=True)


def late(name):
    return lambda folder: anew(folder, name, Authority.read(folder), server=name.startswith("party"), valid=LATE)


def early(folder):
    authority = Authority.read(folder)
    now = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=1)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "party0")])
    builder = x509.CertificateBuilder(
        authority.certificate.subject, subject, key_of(folder, "party0").public_key(), 7, now,
        now + datetime.timedelta(days=1),
    ).add_extension(x509.SubjectAlternativeName([x509.DNSName("party0")]), critical=False)  # fmt: skip
    (folder / "party0.pem").write_bytes(builder.sign(authority._key, hashes.SHA256()).public_bytes(PEM))


def one_key(folder):
    signed(folder, "party1", key_of(folder, "party0"), dns=["party1"])


def no_server(folder):
    signed(folder, "party0", key_of(folder, "party0"), dns=["party0"], uses=["CLIENT_AUTH"])


def no_client(folder):
    signed(folder, "owner", key_of(folder, "owner"), uses=["SERVER_AUTH"])


def not_quite_owner(folder):
    signed(folder, "owner", key_of(folder, "owner"), common="owner.bob")


@pytest.mark.parametrize(
    ("who", "spoil", "message"),
    [
        (0, copy("party1.key", "party0.key"), r"party0\.key is not the key of the certificate \S+party0\.pem$"),
        (0, copy("party1.pem", "party0.pem"), r"party0\.pem is not the certificate of party0: it lacks the DNS name"),
        (0, copy("party0.pem", "party1.pem"), r"party1\.pem is not the certificate of party1: it lacks the DNS name"),
        (2, one_key, r"party1\.pem has the key of party0: each party has a key of its own$"),
        (0, another_authority, r"party1\.pem was not signed by the authority \S+ca\.pem$"),
        (0, late("party0"), r"party0\.pem is valid in [-\d]+ [:\d]+, [-\d]+ [:\d]+ UTC only; the time here is 20"),
        (0, early, r"party0\.pem is valid in [-\d]+ [:\d]+, [-\d]+ [:\d]+ UTC only"),
        (0, expired_authority, r"ca\.pem is valid in "),
        (0, copy("client.pem", "ca.pem"), r"ca\.pem is no authority's certificate$"),
        (0, no_server, r"party0\.pem is not for the key usage TLS server$"),
        (0, content("party0.key", b"no key"), r"party0\.key holds no private key that can be read$"),
        (0, content("party0.key", b""), r"party0\.key holds no private key that can be read$"),
        (0, encrypt("party0"), r"party0\.key is encrypted, and there is nobody to ask for its password$"),
        (0, content("party1.pem", b""), r"party1\.pem must hold one certificate and nothing else; it holds no PEM$"),
        (0, add("ca.pem", "party1.pem"), r"party1\.pem must .*; it holds certificate, certificate$"),
        (0, add("party1.key", "party1.pem"), r"party1\.pem must .*; it holds certificate, private key$"),
        (0, add("ca.pem", "ca.pem"), r"ca\.pem must hold one certificate and nothing else"),
        (0, copy("party1.key", "party1.pem"), r"party1\.pem must .*; it holds private key$"),
        (0, content("ca.pem", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"), "ca.pem holds no "),
        (0, content("party0.pem", bytes(2 << 20)), r"party0\.pem has 2097152 bytes, more than 1048576$"),
        (0, mode("party0.key", 0o644), r"party0\.key is secret, but others may read it \(mode 0644\): chmod 600 \S+"),
        (0, mode("party0.key", 0o604), r"others may read it \(mode 0604\)"),
        (0, mode("party0.key", 0o660), r"others may read it \(mode 0660\)"),
        (0, mode("party1.pem", 0o666), r"anybody may change \S+party1\.pem \(mode 0666\): chmod o-w \S+party1\.pem$"),
        (0, mode("ca.pem", 0o646), r"anybody may change \S+ca\.pem"),
        (0, pipe("party0.key"), r"party0\.key is not a file$"),
        (0, pipe("party2.pem"), r"party2\.pem is not a file$"),
        (0, pipe("ca.pem"), r"ca\.pem is not a file$"),
        (0, link("party0.key", "/dev/zero"), r"party0\.key is not a file$"),
        (0, link("party0.key", "nowhere"), r"cluster\.toml names \S+party0\.key: No such file or directory$"),
        ("owner", not_quite_owner, r"owner\.pem is the certificate of 'owner\.bob', not of an owner$"),
        ("owner", copy("client.pem", "owner.pem"), r"owner\.pem is the certificate of 'client', not of an owner$"),
        ("client", copy("party0.pem", "client.pem"), r"client\.pem is the certificate of 'party0', not of a client$"),
        ("owner", no_client, r"owner\.pem is not for the key usage TLS client$"),
        ("client", late("client"), r"client\.pem is valid in "),
        ("client", copy("owner.key", "client.key"), r"client\.key is not the key of the certificate \S+client\.pem$"),
        ("client", mode("client.key", 0o644), r"client\.key is secret, but others may read it"),
        ("owner", pipe("owner.pem"), r"owner\.pem is not a file$"),
    ],
)
def test_files_that_are_not_right_are_named(folder, who, spoil, message):
    spoil(folder)
    cluster = ClusterFile.read(folder)
    with pytest.raises(ValueError, match=message) as error:
        check_identity(cluster, who) if isinstance(who, str) else check_party(cluster, who)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_a_secret_store_may_link_to_its_files(folder):
    (folder / "party0.key").rename(folder / "there")
    (folder / "party0.key").symlink_to("there")
    check_party(ClusterFile.read(folder), 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_the_group_may_read_what_root_gives_it(folder):
    (folder / "party0.key").chmod(0o440)
    check_party(ClusterFile.read(folder), 0)
    os.chown(folder / "party0.key", 1234, -1)
    with pytest.raises(ValueError, match="others may read it"):
        check_party(ClusterFile.read(folder), 0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (mode("ca.key", 0o640 | 0o004), r"ca\.key is secret, but others may read it"),
        (pipe("ca.key"), r"ca\.key is not a file$"),
        (encrypt("ca"), r"ca\.key is encrypted"),
        (copy("owner.key", "ca.key"), r"ca\.key is not the key of the certificate \S+ca\.pem$"),
        (copy("owner.pem", "ca.pem"), r"ca\.pem is no authority's certificate$"),
        (content("ca.key", b"nothing"), r"ca\.key holds no private key that can be read$"),
    ],
)
def test_an_authority_that_is_none_signs_nothing(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        Authority.read(folder)


def test_a_party_a_client_and_an_owner_look_first(folder):
    """Before they open a port or send anything."""
    for who in ("party0", "client", "owner"):
        copy("ca.pem", f"{who}.pem")(folder)
    cluster = ClusterFile.read(folder)
    for start in (lambda: Host(cluster, 0), lambda: Cluster(cluster, "client"), lambda: Cluster(cluster, "owner")):
        with pytest.raises(ValueError, match=r"(party0|client|owner)\.pem is (not )?the certificate of"):
            start()
