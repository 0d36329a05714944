"""A small certificate authority for a cluster: who may be which party, who is the owner, who a client."""

from __future__ import annotations

import datetime
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from flaxmpc import files
from flaxmpc.secure.deploy import disk
from flaxmpc.secure.deploy.cluster import CLIENT, ClusterFile, Identity

_BACKDATED = datetime.timedelta(hours=1)  # hosts' clocks differ
_USES = {"client": ExtendedKeyUsageOID.CLIENT_AUTH, "server": ExtendedKeyUsageOID.SERVER_AUTH}


def role_of(name: str) -> str:
    """The role that a common name stands for: "owner"; "client" for "client" and "client.NAME"; "" for any other."""
    if name == "owner":
        return "owner"
    return "client" if re.fullmatch(CLIENT, name) else ""


class Authority:
    """Signs certificates with a key of its own; the key is kept off the computing hosts."""

    def __init__(self, name: str = "flaxmpc cluster", *, days: int = 3650):
        """Makes a fresh authority that is valid for `days`."""
        self._key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        usage = [False, False, False, False, False, True, True, False, False]  # signs certificates and revocations
        self.certificate = (
            _builder(subject, subject, self._key, datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.KeyUsage(*usage), critical=True)
            .sign(self._key, hashes.SHA256())
        )

    @classmethod
    def read(cls, directory: Path) -> Authority:
        """The authority that `write` kept in ca.pem and ca.key. ValueError: they are not there, or not right."""
        self = cls.__new__(cls)
        path, key_path = directory / "ca.pem", directory / "ca.key"
        try:
            content, key = disk.read(path), disk.read(key_path, secret=True)
        except FileNotFoundError as error:
            missing = Path(error.filename).name
            reason = f"{directory} holds no authority: it has no {missing}, which `cluster init` makes"
            raise ValueError(reason) from error
        self.certificate = _parse(content, path)
        _check_authority(self.certificate, path)
        self._key = _parse_key(key, key_path, self.certificate, path)
        if not isinstance(self._key, ec.EllipticCurvePrivateKey):
            raise ValueError(f"{key_path} is no key of an elliptic curve")
        return self

    def write(self, directory: Path) -> None:
        """ca.pem, and ca.key readable by its owner only. FileExistsError rather than another authority's loss."""
        files.write_new(directory / "ca.key", _pem(self._key), 0o600)
        files.write_new(directory / "ca.pem", self.certificate.public_bytes(serialization.Encoding.PEM), 0o644)

    def issue(
        self, directory: Path, name: str, *, server: bool, valid: datetime.timedelta = datetime.timedelta(days=365)
    ) -> None:
        """Writes NAME.pem and NAME.key (mode 0600).

        Args:
            directory: the folder of both files.
            name: the certificate's common name, which is its role: "party0", "owner", "client".
            server: whether others connect to it; a party does both, owner and client only ask.
            valid: how long, beginning an hour ago; a negative time makes one that has expired, for tests.

        Raises:
            FileExistsError: the key or the certificate exists.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        uses = [ExtendedKeyUsageOID.CLIENT_AUTH]
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = _builder(subject, self.certificate.subject, key, valid)
        if server:
            uses.append(ExtendedKeyUsageOID.SERVER_AUTH)
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        certificate = (
            builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )
        files.write_new(directory / f"{name}.key", _pem(key), 0o600)
        files.write_new(directory / f"{name}.pem", certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, valid: datetime.timedelta
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now - _BACKDATED, now + valid - _BACKDATED))
        .not_valid_after(now + valid)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def check_party(cluster: ClusterFile, rank: int) -> None:
    """Checks the certificates of all parties, and this one's own key.

    Raises:
        ValueError: a file is not what it should be; which one, and why, in one line.
    """
    ca = _authority(cluster)
    holders: dict[bytes, str] = {}
    for entry in cluster.party:
        certificate = _issued(cluster, ca, entry.certificate, _USES)
        path = cluster.file(entry.certificate)
        if entry.name not in _dns_names(certificate):
            raise ValueError(f"{path} is not the certificate of {entry.name}: it lacks the DNS name {entry.name!r}")
        public = _public(certificate.public_key())
        if public in holders:
            raise ValueError(f"{path} has the key of {holders[public]}: each party has a key of its own")
        holders[public] = entry.name
        if entry.rank == rank:
            _check_own(cluster, entry, certificate)


def check_identity(cluster: ClusterFile, role: str) -> None:
    """Checks certificate and key of the "owner" or "client". ValueError: as `check_party`."""
    identity = cluster.identity(role)
    certificate = _issued(cluster, _authority(cluster), identity.certificate, ["client"])
    if role_of(name := _name(certificate)) != role:
        path = cluster.file(identity.certificate)
        raise ValueError(f"{path} is the certificate of {name!r}, not of {'an' if role == 'owner' else 'a'} {role}")
    _check_own(cluster, identity, certificate)


def _authority(cluster: ClusterFile) -> x509.Certificate:
    path = cluster.file(cluster.ca)
    certificate = _parse(cluster.read_file(cluster.ca), path)
    _check_authority(certificate, path)
    return certificate


def _check_authority(certificate: x509.Certificate, path: Path) -> None:
    constraints = _extension(certificate, x509.BasicConstraints)
    if constraints is None or not constraints.ca:
        raise ValueError(f"{path} is no authority's certificate")
    _check_time(certificate, path)


def _issued(cluster: ClusterFile, ca: x509.Certificate, name: str, uses: Collection[str]) -> x509.Certificate:
    """A certificate that the authority signed, for these uses."""
    path = cluster.file(name)
    certificate = _parse(cluster.read_file(name), path)
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm) as error:
        raise ValueError(f"{path} was not signed by the authority {cluster.file(cluster.ca)}") from error
    allowed = _extension(certificate, x509.ExtendedKeyUsage)
    for use in uses:
        if allowed is not None and _USES[use] not in allowed:
            raise ValueError(f"{path} is not for the key usage TLS {use}")
    return certificate


def _check_own(cluster: ClusterFile, own: Identity, certificate: x509.Certificate) -> None:
    path = cluster.file(own.certificate)
    _check_time(certificate, path)
    _parse_key(cluster.read_file(own.key, secret=True), cluster.file(own.key), certificate, path)


def _check_time(certificate: x509.Certificate, path: Path) -> None:
    now = datetime.datetime.now(datetime.timezone.utc)
    first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not first <= now <= last:
        told = ", ".join(f"{moment:%Y-%m-%d %H:%M}" for moment in (first, last))
        raise ValueError(f"{path} is valid in {told} UTC only; the time here is {now:%Y-%m-%d %H:%M}")


def _parse(content: bytes, path: Path) -> x509.Certificate:
    kinds = [kind.decode() for kind in re.findall(rb"-----BEGIN ([A-Z0-9 ]+)-----", content)]
    if kinds != ["CERTIFICATE"]:
        found = ", ".join(kinds).lower() or "no PEM"
        raise ValueError(f"{path} must hold one certificate and nothing else; it holds {found}")
    try:
        certificate = x509.load_pem_x509_certificate(content)
        _ = certificate.subject, certificate.extensions, certificate.public_key()  # which it reads only now
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType, UnsupportedAlgorithm) as error:
        raise ValueError(f"{path} holds no certificate that can be read") from error
    return certificate


def _parse_key(content: bytes, path: Path, certificate: x509.Certificate, certificate_path: Path) -> Any:
    """The private key of a certificate."""
    try:
        key = serialization.load_pem_private_key(content, None)
    except TypeError as error:
        raise ValueError(f"{path} is encrypted, and there is nobody to ask for its password") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ValueError(f"{path} holds no private key that can be read") from error
    if _public(key.public_key()) != _public(certificate.public_key()):
        raise ValueError(f"{path} is not the key of the certificate {certificate_path}")
    return key


def _public(key: Any) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _name(certificate: x509.Certificate) -> str:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if len(names) == 1 else ""


def _dns_names(certificate: x509.Certificate) -> list[str]:
    names = _extension(certificate, x509.SubjectAlternativeName)
    return [] if names is None else names.get_values_for_type(x509.DNSName)


def _extension(certificate: x509.Certificate, kind: Any) -> Any:
    """An extension's value, or None."""
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None
