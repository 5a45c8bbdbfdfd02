"""Verifies AWS signatures, version 4 (SigV4), of requests to `/@connections`.

The algorithm is that of AWS's documentation, "Create a signed AWS API request". A
signature is either in the `Authorization` header or, in a presigned URL, in the query.
`SignedRequest` parses it before the body is read; `verify()` needs the body's digest.
"""

import hashlib
import hmac
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from itertools import product
from urllib.parse import quote, unquote

from tornado.httputil import HTTPHeaders

from handlers.callbacks.apigateway.sigv4_keys import SigningKeys

ALGORITHM = "AWS4-HMAC-SHA256"
SERVICE = "execute-api"
UNSIGNED = "UNSIGNED-PAYLOAD"  # instead of the digest of the body
MAX_SKEW = timedelta(minutes=5)  # between the clocks of both sides
MAX_EXPIRES = 7 * 24 * 3600  # seconds that a presigned URL may be valid
UNRESERVED = "-_.~"  # RFC 3986, section 2.3, besides letters and digits

PARAMETER = re.compile(r"([A-Za-z]+)=([^\s,]+)")
TIME = re.compile(r"\d{8}T\d{6}Z", re.ASCII)
TIME_FORMAT = "%Y%m%dT%H%M%SZ"
EXPIRES = re.compile(r"[1-9]\d{0,5}", re.ASCII)
DIGEST = re.compile(r"[0-9a-f]{64}")
HEADER_NAME = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]+")  # RFC 9110, section 5.6.2

# Takes the place of a secret that is not known, so that the time reveals nothing.
NO_SECRET = "no secret"


class SignatureError(Exception):
    """A request is not authorized: the type of the error and AWS's sentence."""

    def __init__(self, error_type: str, message: str) -> None:
        super().__init__(message)
        self.error_type = error_type


MISMATCH = (
    "The request signature we calculated does not match the signature you provided."
    " Check your AWS Secret Access Key and signing method. Consult the service"
    " documentation for details."
)


@dataclass(frozen=True, slots=True)
class _Claim:
    """What a signature says of itself."""

    key_id: str
    scope: Sequence[str]  # date, region, service, "aws4_request"
    signed: Sequence[str]  # names of headers, sorted
    signature: str
    time: str
    expires: timedelta | None  # of a presigned URL


class SignedRequest:
    """A request that claims to be signed.

    `path` and `query` are as received. `prefix` is the path prefix that a proxy may
    have removed. Raises `SignatureError` for what can be rejected before the body is
    read.
    """

    def __init__(
        self,
        method: str,
        path: str,
        query: str,
        headers: HTTPHeaders,
        prefix: str = "",
    ) -> None:
        self._method = method
        self._path = path
        self._prefix = prefix
        self._headers = headers
        self._query = [
            (unquote(name), unquote(value))
            for name, _, value in (pair.partition("=") for pair in query.split("&"))
            if name
        ]
        self._claim = self._parse()

    def _parse(self) -> _Claim:
        credentials = self._headers.get_list("Authorization")
        in_query = dict(self._query)
        if credentials:
            if len(credentials) > 1 or not credentials[0].startswith(f"{ALGORITHM} "):
                raise SignatureError(*_MISSING)
            claim = _from_header(credentials[0], self._time_header())
        elif in_query.get("X-Amz-Algorithm") == ALGORITHM:
            claim = _from_query(in_query)
        else:
            raise SignatureError(*_MISSING)
        _check_scope(claim)
        if "host" not in claim.signed:
            raise _incomplete("'Host' or ':authority' must be a 'SignedHeader'.")
        return claim

    def _time_header(self) -> str:
        """Return the time of a signature in a header, in the form of X-Amz-Date."""
        if (value := self._headers.get("X-Amz-Date")) is not None:
            return value
        try:
            date = parsedate_to_datetime(self._headers.get("Date", ""))
            return date.astimezone(UTC).strftime(TIME_FORMAT)
        except (ValueError, OverflowError):
            return ""

    def verify(self, keys: SigningKeys, body_digest: str, now: datetime) -> None:
        """Raise `SignatureError` unless the signature is right and of this time.

        `body_digest` is the SHA-256 of the body in hex, and `now` is in UTC.
        """
        claim = self._claim
        secret = keys.secret_of(claim.key_id)
        key = _signing_key(secret or NO_SECRET, claim.scope)
        # Compare with all, so that the time reveals nothing.
        matches = sum(
            hmac.compare_digest(_signature(key, claim, canonical), claim.signature)
            for canonical in self._canonical_requests(body_digest)
        )
        if secret is None:
            raise SignatureError(
                "UnrecognizedClientException",
                "The security token included in the request is invalid.",
            )
        if not matches:
            raise SignatureError("InvalidSignatureException", MISMATCH)
        _check_time(claim, now)

    def _canonical_requests(self, body_digest: str) -> Iterator[str]:
        """Yield the canonical request for each form of the path that may be signed."""
        if claims_unsigned(self._headers, self._claim.signed):
            body_digest = UNSIGNED
        pairs = sorted(
            (quote(name, UNRESERVED), quote(value, UNRESERVED))
            for name, value in self._query
            if name != "X-Amz-Signature" or self._claim.expires is None
        )
        query = "&".join(f"{name}={value}" for name, value in pairs)
        headers = "".join(
            f"{name}:{_canonical_value(self._headers.get_list(name))}\n"
            for name in self._claim.signed
        )
        names = ";".join(self._claim.signed)
        for path in _canonical_paths(self._path, self._prefix):
            yield "\n".join((self._method, path, query, headers, names, body_digest))


def claims_unsigned(headers: HTTPHeaders, signed: Sequence[str]) -> bool:
    """Return whether the signature says that it does not cover the body."""
    name = "x-amz-content-sha256"
    return name in signed and headers.get_list(name) == [UNSIGNED]


_MISSING = ("MissingAuthenticationTokenException", "Missing Authentication Token")


def _incomplete(message: str) -> SignatureError:
    return SignatureError("IncompleteSignatureException", message)


def _from_header(credentials: str, time: str) -> _Claim:
    given = dict(PARAMETER.findall(credentials.removeprefix(ALGORITHM)))
    missing = [
        f"Authorization header requires '{name}' parameter."
        for name in ("Credential", "Signature", "SignedHeaders")
        if name not in given
    ]
    if not TIME.fullmatch(time):
        missing.append(
            "Authorization header requires existence of either a 'X-Amz-Date' or a"
            " 'Date' header."
        )
    if missing:
        raise _incomplete(" ".join(missing))
    key_id, *scope = given["Credential"].split("/")
    signed = _names_in(given["SignedHeaders"])
    return _Claim(key_id, scope, signed, given["Signature"], time, None)


def _from_query(given: dict[str, str]) -> _Claim:
    missing = [
        f"AWS query-string parameters must include '{name}'."
        for name in (
            "X-Amz-Credential",
            "X-Amz-Signature",
            "X-Amz-SignedHeaders",
            "X-Amz-Date",
            "X-Amz-Expires",
        )
        if not given.get(name)
    ]
    if missing:
        raise _incomplete(" ".join(missing))
    time, seconds = given["X-Amz-Date"], given["X-Amz-Expires"]
    if not TIME.fullmatch(time):
        raise _incomplete("X-Amz-Date must be in ISO-8601 'basic format'.")
    if not EXPIRES.fullmatch(seconds) or int(seconds) > MAX_EXPIRES:
        raise _incomplete(f"X-Amz-Expires must be 1 to {MAX_EXPIRES} seconds.")
    key_id, *scope = given["X-Amz-Credential"].split("/")
    signed = _names_in(given["X-Amz-SignedHeaders"])
    expires = timedelta(seconds=int(seconds))
    return _Claim(key_id, scope, signed, given["X-Amz-Signature"], time, expires)


def _names_in(value: str) -> list[str]:
    names = value.split(";")
    if not all(map(HEADER_NAME.fullmatch, names)) or names != sorted(set(names)):
        raise _incomplete("'SignedHeaders' must be lower-case names in their order.")
    return names


def _check_scope(claim: _Claim) -> None:
    """Raise `SignatureError` unless the signature is for this service and date."""
    if len(claim.scope) != 4:
        raise _incomplete("Credential must have exactly 5 slash-delimited elements.")
    date, _, service, terminator = claim.scope
    if service != SERVICE:
        wrong = f"Credential should be scoped to correct service: '{SERVICE}'."
    elif terminator != "aws4_request":
        wrong = "Credential should be scoped with a valid terminator: 'aws4_request'."
    elif not claim.time.startswith(date) or len(date) != 8:
        wrong = "Date in Credential scope does not match the date of the request."
    elif not DIGEST.fullmatch(claim.signature):
        wrong = MISMATCH
    else:
        return
    raise SignatureError("InvalidSignatureException", wrong)


def _check_time(claim: _Claim, now: datetime) -> None:
    """Raise `SignatureError` unless the signature is valid at `now`."""
    try:
        time = datetime.strptime(claim.time, TIME_FORMAT).replace(tzinfo=UTC)
    except ValueError:
        raise _incomplete("The date of the signature is not a date.") from None
    oldest = now - (claim.expires or MAX_SKEW)
    newest = now + MAX_SKEW
    if oldest <= time <= newest:
        return
    limit, later = (oldest, "now earlier") if time < oldest else (newest, "still later")
    clock, minutes = now.strftime(TIME_FORMAT), abs(limit - now) / timedelta(minutes=1)
    sign = "-" if time < oldest else "+"
    raise SignatureError(
        "InvalidSignatureException",
        f"Signature {'expired' if time < oldest else 'not yet current'}: {claim.time}"
        f" is {later} than {limit.strftime(TIME_FORMAT)}"
        f" ({clock} {sign} {minutes:g} min.)",
    )


def _canonical_paths(path: str, prefix: str) -> Sequence[str]:
    """Return the forms of the path that may have been signed.

    The rule is that each segment of the path is encoded once more than in the request.
    Some signers do not, or sign it as it is sent, and some proxies change the encoding
    of the request; all forms mean the same connection.
    """
    plain = unquote(unquote(path))
    starts = {"", prefix} if not path.startswith(f"{prefix}/") else {""}
    bodies = {path, unquote(path), plain, quote(plain, f"/{UNRESERVED}")}
    encoded = {
        quote(start + body, f"/{UNRESERVED}") for start, body in product(starts, bodies)
    }
    # What was decoded is never a form itself, since it may contain line feeds.
    return sorted(encoded | {start + path for start in starts})


def _canonical_value(values: Sequence[str]) -> str:
    return ",".join(" ".join(value.split()) for value in values)


def _signing_key(secret: str, scope: Sequence[str]) -> bytes:
    key = f"AWS4{secret}".encode()
    for part in scope:
        key = hmac.digest(key, part.encode(), "sha256")
    return key


def _signature(key: bytes, claim: _Claim, canonical: str) -> str:
    """Return the signature that a canonical request should have."""
    digest = hashlib.sha256(canonical.encode("latin-1", "replace")).hexdigest()
    text = "\n".join((ALGORITHM, claim.time, "/".join(claim.scope), digest))
    return hmac.new(key, text.encode(), "sha256").hexdigest()
