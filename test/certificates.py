"""Certificates for the tests of TLS: a CA, and the certificates that it issues."""

import datetime
import ipaddress
import itertools
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

HOUR = datetime.timedelta(hours=1)
LOCALHOST = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Certificate:
    """Paths of PEM files: the certificate, its key, and both in one."""

    cert: Path
    key: Path
    both: Path

    def server_context(self, client_ca: Path | None = None) -> ssl.SSLContext:
        """Return a server's context; with `client_ca`, clients need a certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.cert, self.key)
        if client_ca is not None:
            context.load_verify_locations(client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def client_context(self, ca: Path) -> ssl.SSLContext:
        """Return a client's context with this certificate, for servers of `ca`."""
        context = ssl.create_default_context(cafile=str(ca))
        context.load_cert_chain(self.cert, self.key)
        return context


class Authority:
    """A new certificate authority in a folder.

    `path` is its certificate, which clients and servers trust.
    """

    def __init__(self, folder: Path, name: str = "Test CA") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.path = folder / "ca.pem"
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        self._numbers = itertools.count(1)
        usage = x509.KeyUsage(
            digital_signature=True,
            key_cert_sign=True,
            crl_sign=True,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            encipher_only=False,
            decipher_only=False,
        )
        certificate = (
            _builder(self._name, self._name, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
            .add_extension(usage, True)
            .add_extension(_key_identifier(self._key), False)
            .sign(self._key, hashes.SHA256())
        )
        self.path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def server(
        self, *names: str, expired: bool = False, names_signer: bool = True
    ) -> Certificate:
        """Issue a certificate for names and IP addresses, by default this machine's.

        Without `names_signer`, it has no authority key identifier, like those of many
        private CAs.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _with_names(
            _builder(self._name, _name("a server"), key, expired), names or LOCALHOST
        )
        return self._issue(
            "server", builder, key, ExtendedKeyUsageOID.SERVER_AUTH, names_signer
        )

    def client(self, name: str = "a client", expired: bool = False) -> Certificate:
        """Issue a certificate for a client called `name`."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(self._name, _name(name), key, expired)
        return self._issue("client", builder, key, ExtendedKeyUsageOID.CLIENT_AUTH)

    def _issue(
        self,
        kind: str,
        builder: x509.CertificateBuilder,
        key: ec.EllipticCurvePrivateKey,
        usage: x509.ObjectIdentifier,
        names_signer: bool = True,
    ) -> Certificate:
        signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(
            self._key.public_key()
        )
        builder = (
            builder.add_extension(x509.BasicConstraints(False, None), True)
            .add_extension(x509.ExtendedKeyUsage([usage]), False)
            .add_extension(_key_identifier(key), False)
        )
        if names_signer:
            builder = builder.add_extension(signer, False)
        certificate = builder.sign(self._key, hashes.SHA256())
        return _write(self.folder / f"{kind}-{next(self._numbers)}", certificate, key)


def self_signed(folder: Path, *names: str) -> Certificate:
    """Make a self-signed server certificate."""
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("self-signed")
    builder = _with_names(_builder(name, name, key), names or LOCALHOST)
    certificate = builder.add_extension(_key_identifier(key), False).sign(
        key, hashes.SHA256()
    )
    return _write(folder / "self-signed", certificate, key)


def encrypted_key(certificate: Certificate, password: bytes = b"secret") -> Path:
    """Return a copy of its key that is encrypted with a password."""
    key = serialization.load_pem_private_key(certificate.key.read_bytes(), None)
    path = certificate.key.with_suffix(".encrypted.pem")
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(password),
        )
    )
    return path


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    issuer: x509.Name,
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    expired: bool = False,
) -> x509.CertificateBuilder:
    """Return a builder: valid since two hours ago, for a day or until an hour ago."""
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .issuer_name(issuer)
        .subject_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 2 * HOUR)
        .not_valid_after(now - HOUR if expired else now + 24 * HOUR)
    )


def _with_names(
    builder: x509.CertificateBuilder, names: tuple[str, ...]
) -> x509.CertificateBuilder:
    general: list[x509.GeneralName] = []
    for name in names:
        try:
            general.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            general.append(x509.DNSName(name))
    return builder.add_extension(x509.SubjectAlternativeName(general), False)


def _key_identifier(key: ec.EllipticCurvePrivateKey) -> x509.SubjectKeyIdentifier:
    return x509.SubjectKeyIdentifier.from_public_key(key.public_key())


def _write(
    start: Path, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey
) -> Certificate:
    cert_pem = certificate.public_bytes(serialization.Encoding.PEM)
    key_pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    written = Certificate(
        cert=start.with_suffix(".cert.pem"),
        key=start.with_suffix(".key.pem"),
        both=start.with_suffix(".both.pem"),
    )
    written.cert.write_bytes(cert_pem)
    written.key.write_bytes(key_pem)
    written.both.write_bytes(cert_pem + key_pem)
    return written
