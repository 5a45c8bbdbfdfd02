"""Describes why a connection to the backend failed, in one line for the log."""

import os
import socket
import ssl

TLS_HANG_UP = "TLS: the connection was closed in the handshake"
TLS_NO_RESPONSE = "TLS: connection lost immediately: it may want a client certificate"


def is_hang_up(error: BaseException) -> bool:
    """Whether a TLS handshake failed because the peer or the network ended it."""
    return isinstance(error, ConnectionError | ssl.SSLEOFError)


def connect_failure(error: OSError | UnicodeError) -> str:
    """Describe why there is no connection, even if the error has no message."""
    if isinstance(error, ssl.SSLError):
        return tls_failure(error)
    return f"cannot connect: {system_failure(error)}"


def system_failure(error: OSError | UnicodeError) -> str:
    """Describe an error of the operating system, without an address or a number."""
    if isinstance(error, socket.gaierror) and error.strerror:
        return error.strerror  # the number is not one of the operating system
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return str(error) or type(error).__name__


def tls_failure(error: ssl.SSLError) -> str:
    """Describe a failed handshake, or an alert, in one line."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"TLS: {error.verify_message.rstrip('.')}"
    if error.reason == "WRONG_VERSION_NUMBER":
        return "TLS: the backend speaks another protocol"
    # OpenSSL's name of the error, such as TLSV13_ALERT_CERTIFICATE_REQUIRED.
    return f"TLS: {(error.reason or str(error)).replace('_', ' ').lower()}"
