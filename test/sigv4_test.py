"""Signatures (SigV4) as botocore makes them, and what is wrong with others."""

import datetime
import hashlib
from pathlib import Path
from urllib.parse import quote, urlsplit

import botocore.auth
import pytest
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from tornado.httputil import HTTPHeaders
from tornado.options import Error as OptionError

from handlers.callbacks.apigateway.sigv4 import SignatureError, SignedRequest
from handlers.callbacks.apigateway.sigv4_keys import SigningKeys

NOW = datetime.datetime(2026, 11, 28, 12, 0, 0, tzinfo=datetime.UTC)
KEY_ID, SECRET = "AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
ID = "0123456789abcdef0123456789abcdef"
URL = f"https://relay.example/prod/%40connections/{ID}"
MINUTE = datetime.timedelta(minutes=1)
SECOND = datetime.timedelta(seconds=1)


@pytest.fixture
def keys(tmp_path: Path) -> SigningKeys:
    """Two keys."""
    path = tmp_path / "keys"
    path.write_text(f"# key id and secret\nOTHERKEY {'o' * 40}\n{KEY_ID} {SECRET}\n")
    return SigningKeys(str(path))


def request(
    signer: type = botocore.auth.SigV4Auth,
    method: str = "POST",
    url: str = URL,
    body: bytes = b"hi",
    token: str | None = None,
    service: str = "execute-api",
    secret: str = SECRET,
    key_id: str = KEY_ID,
    at: datetime.datetime = NOW,
    **headers: str,
) -> AWSRequest:
    """Return a request that botocore has signed at a time."""
    made = AWSRequest(method, url, headers={
        "host": urlsplit(url).netloc,
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }, data=body)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.auth, "get_current_datetime", lambda: at)
        credentials = Credentials(key_id, secret, token)
        signer(credentials, service, "eu-central-1").add_auth(made)
    return made


def verify(
    made: AWSRequest,
    keys: SigningKeys,
    body: bytes | None = None,
    now: datetime.datetime = NOW,
    prefix: str = "",
    path: str | None = None,
) -> None:
    """Verify a request as the relay receives it."""
    headers = HTTPHeaders()
    for name, value in made.headers.items():
        headers.add(name, value)
    parts = urlsplit(made.url)
    signed = SignedRequest(
        made.method, path or parts.path, parts.query, headers, prefix
    )
    digest = hashlib.sha256(made.data if body is None else body).hexdigest()
    signed.verify(keys, digest, now)


@pytest.mark.parametrize("method", ["POST", "GET", "DELETE"])
@pytest.mark.parametrize("token", [None, "token/with+signs=="])
@pytest.mark.parametrize(
    "signer", [botocore.auth.SigV4Auth, botocore.auth.SigV4QueryAuth]
)
def test_signature_of_botocore_is_right(keys, signer, token, method):
    """In the header and in a presigned URL, with and without a session token."""
    is_header = signer is botocore.auth.SigV4Auth
    body = b"x" if is_header and method == "POST" else b""
    made = request(signer, method, body=body, token=token)
    verify(made, keys)


@pytest.mark.parametrize("path", [
    f"/prod/@connections/{ID}",
    f"/prod/%40connections/{ID}",
    "/@connections/L0SM9cOFvHcCIhw%3D",
    "/@connections/L0SM9cOFvHcCIhw=",
    "/a%20stage/%40connections/L0SM9cOFvHcCIhw%253D",
    "/%C3%A9/@connections/~x",
])
def test_each_encoding_of_the_path_can_be_signed(keys, path):
    """The path is encoded once more than it was sent."""
    verify(request(url=f"https://relay.example:8765{path}"), keys)


def test_path_that_is_encoded_once_can_be_signed(keys):
    """Some signers do not encode the path again, as for S3."""
    signer = botocore.auth.S3SigV4Auth
    verify(request(signer, url="https://relay.example/x/%40connections/a%3D"), keys)


def test_path_that_is_not_encoded_can_be_signed(keys):
    """Some signers take the path as it is sent, such as curl 7."""
    signer = botocore.auth.S3SigV4Auth
    verify(request(signer, url=f"https://relay.example/x/@connections/{ID}="), keys)


def test_proxy_may_decode_the_path_or_remove_the_prefix(keys):
    """What is signed is the path that the caller used."""
    made = request(url=f"https://relay.example/sd/prod/%40connections/{ID}")
    verify(made, keys, path=f"/sd/prod/@connections/{ID}")
    verify(made, keys, path=f"/prod/%40connections/{ID}", prefix="/sd")
    verify(made, keys, path=f"/prod/@connections/{ID}", prefix="/sd")
    with pytest.raises(SignatureError):
        verify(made, keys, path=f"/prod/@connections/{ID}", prefix="/other")


def test_query_is_signed_in_its_order(keys):
    """Parameters are sorted by their encoded names; repeated and empty ones count."""
    verify(request(url=f"{URL}?b=2&a=%2F&a=&B=1&c"), keys)


def test_header_values_are_trimmed(keys):
    """Several spaces count as one."""
    verify(request(x_amz_meta="a   b"), keys)


def test_date_header_can_replace_x_amz_date(keys):
    """A signer may use the Date header."""
    made = request(Date="replaced by botocore")
    assert "X-Amz-Date" not in made.headers
    verify(made, keys)


def test_body_may_be_unsigned_if_the_signature_says_so(keys):
    """The header that says so must be signed itself."""
    made = request(X_Amz_Content_SHA256="UNSIGNED-PAYLOAD")
    verify(made, keys, body=b"anything")
    unsaid = request()
    unsaid.headers["X-Amz-Content-SHA256"] = "UNSIGNED-PAYLOAD"
    with pytest.raises(SignatureError):
        verify(unsaid, keys, body=b"anything")


@pytest.mark.parametrize("skew", [-5 * MINUTE, -MINUTE, MINUTE, 5 * MINUTE])
def test_clocks_may_differ_by_five_minutes(keys, skew):
    """The clock of the caller may be late or early."""
    verify(request(at=NOW + skew), keys)


@pytest.mark.parametrize(("skew", "words"), [
    (-5 * MINUTE - SECOND, "Signature expired: 20261128T115459Z is now earlier than"
                           " 20261128T115500Z (20261128T120000Z - 5 min.)"),
    (5 * MINUTE + SECOND, "Signature not yet current: 20261128T120501Z is still later"
                          " than 20261128T120500Z (20261128T120000Z + 5 min.)"),
])
def test_clocks_that_differ_by_more_are_reported(keys, skew, words):
    """As AWS words it."""
    with pytest.raises(SignatureError) as caught:
        verify(request(at=NOW + skew), keys)
    assert caught.value.error_type == "InvalidSignatureException"
    assert str(caught.value) == words


def test_presigned_url_is_valid_until_it_expires(keys):
    """An hour by default, from its date on."""
    made = request(botocore.auth.SigV4QueryAuth, body=b"")
    verify(made, keys, now=NOW + 60 * MINUTE)
    verify(made, keys, now=NOW - 5 * MINUTE)
    for wrong in (NOW + 60 * MINUTE + SECOND, NOW - 5 * MINUTE - SECOND):
        with pytest.raises(SignatureError):
            verify(made, keys, now=wrong)


def changed(**changes: object) -> AWSRequest:
    """Return a signed request of which parts were changed afterwards."""
    made = request(x_amz_meta="a")
    for name, value in changes.items():
        if name == "authorization":
            old, new = value
            text = made.headers["Authorization"].replace(old, new)
            assert text != made.headers["Authorization"]
            del made.headers["Authorization"]
            made.headers["Authorization"] = text
        elif name == "header":
            del made.headers[value[0]]
            if value[1] is not None:
                made.headers[value[0]] = value[1]
        else:
            setattr(made, name, value)
    return made


INVALID, INCOMPLETE = "InvalidSignatureException", "IncompleteSignatureException"
MISSING = "MissingAuthenticationTokenException"


@pytest.mark.parametrize(("made", "error_type"), [
    (lambda: changed(method="DELETE"), INVALID),
    (lambda: changed(url=URL.replace("0123", "1123")), INVALID),
    (lambda: changed(url=f"{URL}?a"), INVALID),
    (lambda: changed(data=b"ho"), INVALID),
    (lambda: changed(header=("host", "other.example")), INVALID),
    (lambda: changed(header=("x-amz-meta", "b")), INVALID),
    (lambda: changed(header=("x-amz-meta", None)), INVALID),
    (lambda: changed(header=("X-Amz-Date", "20261128T120001Z")), INVALID),
    (lambda: changed(header=("X-Amz-Date", "20261129T120000Z")), INVALID),
    (lambda: changed(header=("X-Amz-Date", None)), INCOMPLETE),
    (lambda: changed(header=("X-Amz-Date", "now")), INCOMPLETE),
    (lambda: changed(header=("Authorization", None)), MISSING),
    (lambda: changed(header=("Authorization", "Bearer 0123456789abcdef")), MISSING),
    (lambda: changed(header=("Authorization", "AWS4-HMAC-SHA256 x")), INCOMPLETE),
    (lambda: changed(authorization=("eu-central-1", "eu-central-2")), INVALID),
    (lambda: changed(authorization=("aws4_request", "aws5_request")), INVALID),
    (lambda: changed(authorization=("/aws4_request", "")), INCOMPLETE),
    (lambda: changed(authorization=("execute-api", "s3")), INVALID),
    (lambda: changed(authorization=("host;", "")), INCOMPLETE),
    (lambda: changed(authorization=("host;x", "x;host;x")), INCOMPLETE),
    (lambda: changed(authorization=("x-amz-meta", "X-Amz-Meta")), INCOMPLETE),
    (lambda: changed(authorization=(KEY_ID, "OTHERKEY")), INVALID),
    (lambda: changed(authorization=(KEY_ID, "UNKNOWN")), "UnrecognizedClientException"),
    (lambda: changed(authorization=("Signature=", "Signature=0")), INVALID),
    (lambda: changed(authorization=("Signature=", "Signature=\xe9")), INVALID),
    (lambda: changed(authorization=("Signature=", "Sign=")), INCOMPLETE),
    (lambda: request(service="s3"), INVALID),
    (lambda: request(secret="o" * 40), INVALID),
])
def test_each_changed_part_is_rejected(keys, made, error_type):
    """A signature covers the request, the time and what it is for."""
    with pytest.raises(SignatureError) as caught:
        verify(made(), keys)
    assert caught.value.error_type == error_type


@pytest.mark.parametrize(("old", "new", "error_type"), [
    ("X-Amz-Expires=3600", "X-Amz-Expires=3601", INVALID),
    ("X-Amz-Expires=3600", "X-Amz-Expires=604801", INCOMPLETE),
    ("X-Amz-Expires=3600", "X-Amz-Expires=-1", INCOMPLETE),
    ("X-Amz-Expires=3600", "X-Amz-Expires=%C2%B2", INCOMPLETE),
    ("X-Amz-Expires=3600&", "", INCOMPLETE),
    ("X-Amz-Date=2026", "X-Amz-Date=9999999", INCOMPLETE),
    ("X-Amz-SignedHeaders=host", "X-Amz-SignedHeaders=date", INCOMPLETE),
    (quote("/execute-api/", ""), quote("/s3/", ""), INVALID),
    ("X-Amz-Algorithm=AWS4-HMAC-SHA256", "X-Amz-Algorithm=none", MISSING),
])
def test_each_changed_part_of_a_presigned_url_is_rejected(keys, old, new, error_type):
    """Its query is signed except the signature."""
    made = request(botocore.auth.SigV4QueryAuth, body=b"")
    assert old in made.url
    made.url = made.url.replace(old, new)
    with pytest.raises(SignatureError) as caught:
        verify(made, keys)
    assert caught.value.error_type == error_type


def test_error_shows_no_part_of_the_request(keys):
    """AWS shows the canonical request; that would tell what proxies add."""
    for made in (changed(data=b"ho"), changed(authorization=("Signature=", "Sign="))):
        with pytest.raises(SignatureError) as caught:
            verify(made, keys)
        assert ID not in str(caught.value) and KEY_ID not in str(caught.value)


@pytest.mark.parametrize("text", [
    "", "# only a comment\n", f"{KEY_ID}\n", f"{KEY_ID} {SECRET} more\n",
    f"{KEY_ID} short\n", f"a/b {SECRET}\n",
    f"{KEY_ID} {SECRET}\n{KEY_ID} {'o' * 40}\n",
])
def test_invalid_file_of_keys_is_rejected(tmp_path, text):
    """The error names file and line, and shows neither key id nor secret."""
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(OptionError) as caught:
        SigningKeys(str(path))
    assert f"--sigv4_keys_file={path}" in str(caught.value)
    assert SECRET not in str(caught.value) and KEY_ID not in str(caught.value)


def test_unusable_file_keeps_the_keys(tmp_path):
    """A reload takes all keys of the file, or none."""
    path = tmp_path / "keys"
    path.write_text(f"{KEY_ID} {SECRET}\n")
    keys = SigningKeys(str(path))
    path.write_text(f"NEWKEY {'n' * 40}\nbroken\n")
    with pytest.raises(OptionError):
        keys.reload()
    assert keys.secret_of(KEY_ID) == SECRET and keys.secret_of("NEWKEY") is None
    path.write_text(f"NEWKEY {'n' * 40}\n")
    keys.reload()
    assert keys.secret_of(KEY_ID) is None and keys.secret_of("NEWKEY") == "n" * 40
