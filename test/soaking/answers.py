"""Responses of the soak's backend: each fault, each unusual form, each Retry-After."""

import random
from dataclasses import replace

from faults import Attempt, Reply

# Whole answers that curl, requests, Go and aiohttp read, of servers that there
# are: nginx with a header value of several lines, CGI scripts, gateways.
READABLE = (
    b"HTTP/1.1 %d OK\nContent-Length: 2\nX-Server: line feeds only\n\nOK",
    *(
        b"HTTP/1.1 %d OK\r\n" + fields + b"\r\nContent-Length: 2\r\n\r\nOK"
        for fields in (
            b"X-Folded: one\r\n two\r\n\tthree",
            b"Content-Security-Policy: default-src 'self';\n"
            b"    img-src *;\n    font-src *",
            b"X-Trace: \x01\x02\x1f\x7fa\x0b",
            b"X-Name: J\xfcrgen \xf0\x9f\x90\xb3",
            b"X-Empty:\r\nX-Space: \t",
            b"X-Long: " + b"x" * 16_000,
            b"\r\n".join([b"Set-Cookie: a=b"] * 60),
        )
    ),
    b"HTTP/1.1 %d OK\r\nContent-Length:\t 2 \t \r\n\r\nOK",
    b"HTTP/1.1 %d \r\nContent-Length: 2\r\n\r\nOK",
    b"HTTP/1.1 %d\r\nContent-Length: 2\r\n\r\nOK",
    b"HTTP/1.1 %d Gr\xfc\xdf Gott\r\nContent-Length: 2\r\n\r\nOK",
    b"HTTP/1.1 %d OK\r\nTransfer-Encoding: chunked\r\nTrailer: Retry-After\r\n\r\n"
    b"1;note=first\r\nO\r\n1\r\nK\r\n0\r\nRetry-After: 3000\r\nX-Sum: 1\r\n\r\n",
    b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    b"HTTP/1.1 %d OK\r\nContent-Length: 2\r\n\r\nOK",
)
# The same, but they end only with the connection.
READABLE_TO_THE_END = (
    b"HTTP/1.0 %d OK\r\n\r\nOK",
    b"HTTP/1.1 %d OK\r\nConnection: close\r\n\r\nOK",
)

NOV_15 = "Tue, 15 Nov 1994 08:12:31 GMT"
# What Retry-After may say, and what that is in seconds.
RETRY_AFTERS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("Retry-After: 1",), 1),
    (("Retry-After: 3",), 3),
    (("Retry-After:  2 \t",), 2),
    (("retry-after:1",), 1),
    (("Retry-After: 0",), 0),
    # By the clock of a server that is years behind.
    ((f"Date: {NOV_15}", "Retry-After: Tue, 15 Nov 1994 08:12:33 GMT"), 2),
    ((f"Date: {NOV_15}", "Retry-After: Tue, 15 Nov 1994 08:12:30 GMT"), 0),
    (("Retry-After: -1",), 0),
    (("Retry-After: soon",), 0),
    (("Retry-After: 1e3",), 0),
    (("Retry-After: nan",), 0),
    (("Retry-After: \u0661".encode().decode("latin-1"),), 0),
    (("Retry-After: Mon, 00 Foo 2020 99:99:99 GMT",), 0),
    (("Retry-After: Thu, 01 Jan 1970 00:00:00 +999999999",), 0),
)
# What would be later than any deadline, or is invalid: any outcome is correct.
ABSURD_RETRY_AFTERS = (
    "Thu, 01 Jan 99999999999999999999 00:00:00 GMT",
    "Fri, 31 Dec 9999 23:59:59 GMT",
    "Fri, 31 Dec 9999 23:59:59 -2359",
    "99999999999999999999",
    "9" * 400,
    "9" * 5000,
)

# Statuses after which an event is retried.
PASSING = (408, 425, 429, 500, 502, 503, 504)
DELAYS = (0.0, 0.0, 0.05, 0.3, 0.8)  # seconds
SOME = 8  # kinds of failure in one round


class Behavior:
    """What one round's backend does: some kinds of failure, in all odd forms.

    `share` of the requests fail, `odd` of the answers are of an odd form. With
    `patient` it holds answers, and with `absurd` it says absurd things in
    Retry-After, which a message is to survive until its deadline.
    """

    def __init__(
        self, rng: random.Random, share: float, odd: float, patient: bool, absurd: bool
    ) -> None:
        self._rng = rng
        self._share = share
        self._odd = odd
        self._absurd = absurd
        self.failing = True
        kinds = [
            Reply(fault="reset"), Reply(fault="reset", delay=0.2), Reply(fault="cut"),
            Reply(503, fault="cut"), Reply(fault="garbage"), Reply(fault="endless"),
            Reply(400), Reply(301), Reply(delay=0.2), Reply(delay=1.5),
            *(Reply(status) for status in PASSING),
            Reply(408, closes=True, headers=("Connection: close",)),
        ]  # fmt: skip
        self._kinds = [*rng.sample(kinds, SOME), Reply(503)]
        if patient:  # with --backend_timeout it would be a failure
            self._kinds += [Reply(fault="hold")] * 2

    def decide(self, attempt: Attempt) -> Reply:
        """Draw the response to a request."""
        rng = self._rng
        reply = Reply()
        if self.failing and attempt.kind != "connect" and rng.random() < self._share:
            reply = self._failure(attempt)
        if reply.fault is None and rng.random() < self._odd:
            reply = self._in_odd_form(reply)
        return reply

    def _failure(self, attempt: Attempt) -> Reply:
        rng = self._rng
        reply = rng.choice(self._kinds)
        if attempt.kind == "disconnect" and (
            reply.fault == "hold" or reply.status in (301, 400)
        ):
            reply = Reply(503)
        if reply.fault is not None or reply.status not in PASSING:
            return reply
        # Held for a while, and then a failure: the next ones have gone by then.
        reply = replace(reply, delay=rng.choice(DELAYS))
        if reply.status == 408 or rng.random() < 0.5:
            return reply
        if self._absurd and attempt.kind == "message" and rng.random() < 0.2:
            value = rng.choice(ABSURD_RETRY_AFTERS)
            return replace(reply, headers=(f"Retry-After: {value}",))
        headers, seconds = rng.choice(RETRY_AFTERS)
        return replace(reply, headers=headers, retry_after=seconds)

    def _in_odd_form(self, reply: Reply) -> Reply:
        """The same in an unusual form; `headers` precede those of the form."""
        rng = self._rng
        closes = reply.closes or rng.random() < 0.2
        forms = READABLE_TO_THE_END if closes else READABLE
        form = rng.choice(forms)
        end = b"\r\n" if b"\r\n" in form else b"\n"
        # The status line of the final answer.
        place = form.index(end, form.index(b"%d")) + len(end)
        fields = b"".join(h.encode("latin-1") + end for h in reply.headers)
        return replace(reply, raw=form[:place] + fields + form[place:], closes=closes)
