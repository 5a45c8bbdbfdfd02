"""Loads PEM files of certificates and keys, and explains why one cannot be loaded.

Never prompts for a password. The listeners load such files, and whatever connects to
backends and to other instances.
"""

import ssl
from typing import NoReturn

from backends import Unavailable
from backends.files import require_regular

REASONS = {  # by OpenSSL's name
    "KEY_VALUES_MISMATCH": "the key is not the certificate's",
    "NO_CERTIFICATE_OR_CRL_FOUND": "there is no PEM certificate in it",
}


def no_password() -> NoReturn:
    """Raise `ValueError`: without this callback OpenSSL prompts for a password."""
    raise ValueError("the key has a password")


def load_failure(error: Exception) -> str:
    """Describe why a file could not be loaded; OpenSSL's own text is rarely clear."""
    if isinstance(error, ssl.SSLError):
        return REASONS.get(
            error.reason or "", "not PEM, or the certificate or key is missing"
        )
    return getattr(error, "strerror", None) or str(error)


def verifying_context(ca: str | None, option: str) -> ssl.SSLContext:
    """Return a client's context that verifies servers by `ca`; None: the system's CAs.

    `option` names `ca`. Raises `OptionError` if it cannot be loaded.
    """
    where = f"--{option}={ca}"
    if ca:
        require_regular(ca, where)
    try:
        context = ssl.create_default_context(cafile=ca or None)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise Unavailable(f"{where}: {load_failure(error)}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # The same rules for every Python. By default 3.13 rejects certificates without an
    # authority key identifier, which many private CAs issue; before 3.13 an
    # intermediate CA certificate alone is not trusted.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def load_certificate(
    context: ssl.SSLContext, cert: str, key: str | None, where: str
) -> None:
    """Let `context` show a certificate. `where` names its files.

    Raises `Unavailable` if they cannot be loaded.
    """
    try:
        context.load_cert_chain(cert, key or None, no_password)
    except (OSError, ValueError) as error:
        raise Unavailable(f"{where}: {load_failure(error)}") from None
