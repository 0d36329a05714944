"""A small certificate authority for a cluster: who may be which party, who is the owner, who a client."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_BACKDATED = datetime.timedelta(hours=1)  # hosts' clocks differ


class Authority:
    """Signs certificates with a key of its own; the key is kept off the computing hosts."""

    def __init__(self, name: str = "flaxmpc cluster", *, days: int = 3650):
        """A fresh authority, valid for `days`."""
        self._key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        usage = dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "digital_signature"), False
        )
        usage |= {"key_cert_sign": True, "crl_sign": True, "encipher_only": False, "decipher_only": False}
        self.certificate = (
            _builder(subject, subject, self._key, datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.KeyUsage(**usage), critical=True)
            .sign(self._key, hashes.SHA256())
        )

    @classmethod
    def read(cls, directory: Path) -> Authority:
        """The authority that `write` kept in ca.pem and ca.key; OSError or ValueError if they are not there or none."""
        self = cls.__new__(cls)
        self.certificate = x509.load_pem_x509_certificate((directory / "ca.pem").read_bytes())
        key = serialization.load_pem_private_key((directory / "ca.key").read_bytes(), None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError(f"{directory / 'ca.key'} is no key of an elliptic curve")
        self._key = key
        return self

    def write(self, directory: Path) -> None:
        """ca.pem, and ca.key readable by its owner only. FileExistsError rather than another authority's loss."""
        _write_key(directory / "ca.key", self._key)
        (directory / "ca.pem").write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))

    def issue(
        self, directory: Path, name: str, *, server: bool, valid: datetime.timedelta = datetime.timedelta(days=365)
    ) -> None:
        """Writes NAME.pem and NAME.key (mode 0600).

        Args:
            directory: where to.
            name: the certificate's common name, which is its role: "party0", "owner", "client".
            server: whether others connect to it; a party does both, owner and client only ask.
            valid: from an hour ago on; negative makes one that has expired, for tests.

        Raises:
            FileExistsError: the key exists.
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
        _write_key(directory / f"{name}.key", key)
        (directory / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


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


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    content = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
