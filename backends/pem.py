"""Explains why a PEM file of certificates or keys cannot be loaded; never prompts.

The listeners and the http backend load such files.
"""

import ssl
from typing import NoReturn

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
