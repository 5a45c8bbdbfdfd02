"""PEM files of certificates and keys: why one can't be used, without a prompt.

The listeners and the http backend both load such files.
"""

import ssl
from typing import NoReturn

REASONS = {  # by OpenSSL's name
    "KEY_VALUES_MISMATCH": "the key is not the certificate's",
    "NO_CERTIFICATE_OR_CRL_FOUND": "there is no PEM certificate in it",
}


def no_password() -> NoReturn:
    """Raise `ValueError`, where OpenSSL would ask for a password at the terminal."""
    raise ValueError("the key has a password")


def load_failure(error: Exception) -> str:
    """Describe why a file could not be loaded; OpenSSL's own words rarely do."""
    if isinstance(error, ssl.SSLError):
        return REASONS.get(
            error.reason or "", "not PEM, or the certificate or key is missing"
        )
    return getattr(error, "strerror", None) or str(error)
