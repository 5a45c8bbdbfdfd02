"""`socketdock dev`: TLS on a developer's machine, without a certificate to buy.

Functions written for API Gateway call back to `https://{domainName}/{stage}`. So each
user gets a certificate authority, in a folder of their own, which SDKs are told to
trust. The program `openssl` makes the certificates: most machines have it, so that the
command needs no extra to be installed.
"""

import os
import secrets
import ssl
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from tornado.options import Error as OptionError
from tornado.options import options

from backends import Unavailable
from backends.hosts import encoded_host, is_host
from handlers.http.listener import Listener, is_wildcard

# By these names functions reach this machine: on it, and from containers.
CONTAINER_HOST = "host.docker.internal"
NAMES = ("localhost", "127.0.0.1", "::1", CONTAINER_HOST, "host.containers.internal")

OPENSSL_TIMEOUT = 30.0  # seconds for each of its few steps
AUTHORITY_DAYS = 3650
SERVER_DAYS = 397  # the most that browsers accept
SPARE = 30 * 24 * 3600  # seconds for which the authority must still be valid

# The mode of files without a key: containers that mount them may have another user.
FOR_ALL = 0o644

# Where systems keep the authorities that they trust, besides what Python knows.
SYSTEM_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
)

CONFIGURATION = """
[req]
distinguished_name = name
prompt = no
[name]
CN = SocketDock development
[authority]
basicConstraints = critical, CA:TRUE, pathlen:0
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[server]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = {names}
"""


def set_development_options(environ: Mapping[str, str]) -> Path:
    """Set what `socketdock dev` adds to the options, where they leave it out.

    Returns the folder of the `DevelopmentAuthority`, and makes nothing there.
    """
    folder = state_folder(environ)
    if options.tls_cert is None:
        options.tls_cert = str(folder / "server.pem")
    if options.callbackport is not None and options.callback_tls_cert is None:
        options.callback_tls_cert = str(folder / "server.pem")
    if options.externalhostandport is None and is_wildcard(
        options.callbackip or options.bindip
    ):
        port = options.callbackport or options.bindport
        options.externalhostandport = f"{CONTAINER_HOST}:{port}"
    return folder


def state_folder(environ: Mapping[str, str]) -> Path:
    """Return this user's folder for what a program keeps (XDG Base Directory)."""
    home = environ.get("XDG_STATE_HOME", "")
    base = Path(home) if home.startswith("/") else Path.home() / ".local" / "state"
    return base / "socketdock" / "dev"


def local_url(listener: Listener, scheme: str) -> str:
    """Return how clients on this machine reach a listener."""
    url = listener.url(scheme)
    if not listener.is_wildcard:
        return url
    return f"{url.partition('://')[0]}://localhost:{url.rpartition(':')[2]}"


def named_hosts() -> Sequence[str]:
    """Return how the options name this relay: hosts, perhaps with a port, or URLs."""
    addresses = (options.bindip, options.callbackip)
    return [
        *filter(None, (options.externalhostandport, options.domain_name)),
        *(f"[{each}]" for each in addresses if each and not is_wildcard(each)),
    ]


class DevelopmentAuthority:
    """A certificate authority in a folder that only its user can read.

    `certificate` is its own, `bundle` has this and all that the system trusts, and
    `server` has the certificate and the key of relays on this machine; `hosts` are
    more names for it, perhaps with a port, or URLs. Raises `OptionError` if they cannot
    be made.
    """

    def __init__(
        self, folder: Path, hosts: Sequence[str], environ: Mapping[str, str]
    ) -> None:
        self._folder = folder
        self._authority = folder / "authority"
        self.certificate = self._authority / "ca.pem"
        self.bundle = folder / "ca-bundle.pem"
        self.server = folder / "server.pem"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._is_valid():
                self._make_authority()
            self._make_server(_names(hosts))
            self._make_bundle(environ)
        except OSError as error:
            raise Unavailable(f"dev: {folder}: {error.strerror or error}") from None

    @property
    def variables(self) -> Sequence[str]:
        """The environment in which SDKs trust the authority."""
        return [
            f"AWS_CA_BUNDLE={self.bundle}",  # takes the place of the system's
            f"NODE_EXTRA_CA_CERTS={self.certificate}",  # is added to Node's own
        ]

    def _is_valid(self) -> bool:
        """Return whether there is an authority that is valid for long enough."""
        with suppress(OptionError):
            _openssl("x509", "-in", self.certificate, "-noout", "-checkend", SPARE)
            return (self._authority / "ca.key").exists()
        return False

    def _make_authority(self) -> None:
        with tempfile.TemporaryDirectory(dir=self._folder) as name:
            folder = Path(name)
            configuration = _write_configuration(folder)
            made = folder / "authority"
            made.mkdir(mode=0o700)
            _make_key(made / "ca.key")
            _openssl(
                "req", "-x509", "-new", "-key", made / "ca.key", "-sha256",
                "-days", AUTHORITY_DAYS, "-config", configuration,
                "-extensions", "authority", "-out", made / "ca.pem",
            )
            (made / "ca.pem").chmod(FOR_ALL)
            # Another relay may make one now, too: the first one stays.
            with suppress(OSError):
                if not self._is_valid():
                    self._authority.rename(folder / "previous")
            with suppress(OSError):
                made.rename(self._authority)

    def _make_server(self, names: Sequence[str]) -> None:
        with tempfile.TemporaryDirectory(dir=self._folder) as name:
            folder = Path(name)
            configuration = _write_configuration(folder, names)
            key, request = folder / "server.key", folder / "server.csr"
            certificate, both = folder / "server.crt", folder / "server.pem"
            _make_key(key)
            _openssl(
                "req", "-new", "-key", key, "-config", configuration, "-out", request
            )
            _openssl(
                "x509", "-req", "-in", request, "-sha256", "-days", SERVER_DAYS,
                "-CA", self.certificate, "-CAkey", self._authority / "ca.key",
                "-set_serial", f"0x{secrets.token_hex(16)}",
                "-extfile", configuration, "-extensions", "server",
                "-out", certificate,
            )
            _write(both, certificate.read_bytes() + key.read_bytes())
            both.replace(self.server)

    def _make_bundle(self, environ: Mapping[str, str]) -> None:
        """Write the authority's certificate and those that the user trusts already."""
        system = ssl.get_default_verify_paths().cafile
        for path in (environ.get("AWS_CA_BUNDLE"), system, *SYSTEM_BUNDLES):
            if path and Path(path) != self.bundle and Path(path).is_file():
                trusted = Path(path).read_bytes()
                break
        else:
            trusted = b""
        with tempfile.TemporaryDirectory(dir=self._folder) as name:
            made = Path(name) / self.bundle.name
            _write(made, self.certificate.read_bytes() + trusted)
            made.chmod(FOR_ALL)
            made.replace(self.bundle)


def _names(hosts: Sequence[str]) -> Sequence[str]:
    """Return the names of the certificate: the usual ones, and `hosts`.

    Invalid ones are left out: the checks of their options say what is wrong.
    """
    names = dict.fromkeys(NAMES)
    for each in hosts:
        host = each.partition("://")[2] or each
        host = host.partition("/")[0].rpartition("@")[2]
        if not host.endswith("]"):
            bare, colon, port = host.rpartition(":")
            host = bare if colon and port.isdigit() else host
        host = host.strip("[]")
        if is_host(host) and "%" not in host:
            with suppress(ValueError):
                names[encoded_host(host)] = None
    return list(names)


def _alternative_names(names: Sequence[str]) -> Iterator[str]:
    for name in names:
        is_address = ":" in name or name.replace(".", "").isdigit()
        yield f"{'IP' if is_address else 'DNS'}:{name}"


def _write_configuration(folder: Path, names: Sequence[str] = NAMES) -> Path:
    path = folder / "openssl.cnf"
    text = CONFIGURATION.format(names=",".join(_alternative_names(names)))
    _write(path, text.encode())
    return path


def _make_key(path: Path) -> None:
    _openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", path)


def _openssl(*words: str | int | Path) -> None:
    """Run `openssl`; its files are for this user only. Raises `OptionError`."""
    try:
        subprocess.run(
            ["openssl", *map(str, words)],
            check=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=OPENSSL_TIMEOUT,
            umask=0o077,
        )
    except FileNotFoundError:
        raise Unavailable(
            "dev needs the program openssl to make a certificate; install it, or set"
            " --tls_cert"
        ) from None
    except subprocess.TimeoutExpired:
        raise Unavailable(f"dev: openssl {words[0]} has not ended in time") from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").split("\n")
        raise Unavailable(f"dev: openssl {words[0]}: {lines[0][:200]}") from None


def _write(path: Path, content: bytes) -> None:
    """Write a file that only this user can read."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(file, "wb") as opened:
        opened.write(content)
