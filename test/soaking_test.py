"""The soak's checks: they accept valid runs, and report violations."""

import random
import socket
import time
from typing import Any

import pytest
from faults import Attempt, Book, FaultyBackend
from service import eventually
from soaking.answers import READABLE, READABLE_TO_THE_END, RETRY_AFTERS
from soaking.books import KNOWN, Audit
from soaking.pulse import Pulse
from soaking.visits import Visit

ID = "0f6c"
BEAT = 1 / KNOWN  # seconds: within one second all is known


def message(
    number: int, arrived: float, outcome: str = "200", took: float = 0.01, **more: Any
) -> Attempt:
    """An attempt of one message; times are in seconds."""
    event = {"meta": {"connection_id": ID}, "message": f"client {number}"}
    return Attempt(
        "message", f"{ID}-{number + 1}", event, outcome, arrived, arrived + took, **more
    )


def disconnect(
    arrived: float,
    undelivered: int = 0,
    outcome: str = "200",
    reason: str = "",
    retry_after: float = 0.0,
) -> Attempt:
    """The disconnect event of a client that has left; times are in seconds."""
    meta = {
        "connection_id": ID, "undelivered": undelivered, "reason": reason,
        "code": 1000, "initiator": "client", "duration": arrived,
    }  # fmt: skip
    return Attempt(
        "disconnect", f"{ID}-disconnect", {"meta": meta}, outcome, arrived, arrived,
        retry_after,
    )  # fmt: skip


def book_of(*attempts: Attempt, resets: tuple[float, ...] = ()) -> Book:
    """A backend's book with these attempts, and resets of connections."""
    book = Book()
    book.attempts = sorted(attempts, key=lambda attempt: attempt.arrived)
    for attempt in sorted(attempts, key=lambda attempt: attempt.ended):
        if attempt.accepted:
            book.accepted.setdefault(attempt.webhook_id, attempt)
    book.resets = list(resets)
    return book


def steady(*pauses: tuple[float, float]) -> Pulse:
    """Regular beats for two minutes, but none that begins or ends in `pauses`."""
    pulse = Pulse()
    for number in range(round(120 / BEAT)):
        begin, end = number * BEAT, (number + 0.5) * BEAT
        if not any(start <= end and begin <= stop for start, stop in pauses):
            pulse.add(begin, end)
    return pulse


def violations_of(
    *attempts: Attempt,
    strict: bool = False,
    pulse: Pulse | None = None,
    resets: tuple[float, ...] = (),
    delivery_timeout: float = 60,
) -> list[str]:
    """The violations in one connection's attempts."""
    book = book_of(*attempts, resets=resets)
    audit = Audit(book, pulse or steady(), strict, delivery_timeout)
    return list(audit.delivery_violations(book.attempts))


def lost(sent: int, *attempts: Attempt, cut_off: bool = False) -> list[str]:
    """The violations for a client that sent `sent` messages, and left."""
    meta = {"connection_id": ID, "query": "name=client"}
    connect = Attempt("connect", f"{ID}-connect", {"meta": meta}, "200", 0, 0)
    visit = Visit("", "client", random.Random(), sent=sent, left=True, close_code=1000)
    book = book_of(connect, *attempts)
    audit = Audit(book, steady(), False, delivery_timeout=60, cut_off=cut_off)
    return [each.what for each in audit.violations([visit], reads_at_once=True)]


FAULTLESS = {
    "one after the other": [message(0, 0), message(1, 1), disconnect(2)],
    "again after a failure": [message(0, 0, "503"), message(0, 1), message(1, 2)],
    "held, then answered": [message(0, 0, took=9), message(1, 2), disconnect(3)],
    "held, and abandoned": [message(0, 0, "abandoned", took=9), message(1, 2)],
    "failed behind the event": [
        message(0, 0, "503", took=4), disconnect(3), message(0, 5), disconnect(9),
    ],
    "given up": [message(0, 0, "503"), disconnect(70, undelivered=1)],
    "given up while another is open": [
        message(0, 0, "503", took=1), message(1, 0.5, "503", took=1), message(1, 4),
        disconnect(9, undelivered=1),
    ],
    "after its Retry-After": [message(0, 0, "503", retry_after=3), message(0, 3.1)],
    "at its deadline": [message(0, 0, "503", retry_after=99), message(0, 60)],
    "at its deadline, after failures that the backend did not see": [
        message(0, 0), message(1, 50, "503", retry_after=99), message(1, 60),
    ],
    "answered as its connection was reset": [
        message(0, 0, doubtful=True), message(0, 1),
    ],
    "on a new connection, which waits": [
        message(0, 0, "503"), message(1, 3.2), message(0, 3.4),
    ],
    "on its way when the other failed": [
        message(0, 0, "503", took=1), message(1, 1.2), message(0, 2),
    ],
    "sent by the next run, which knows no Retry-After": [
        disconnect(0, outcome="503", retry_after=3),
        disconnect(1, reason="instance lost"),
    ],
}  # fmt: skip

FAULTY = {
    "overtook message 0": [message(0, 0, "503", took=1), message(1, 4), message(0, 6)],
    "message 1 overtook message 0": [
        message(0, 0, "503", took=1), message(1, 4), disconnect(9, undelivered=1),
    ],
    "its disconnect event, with 0 undelivered, overtook message 0": [
        message(0, 0, "503"), disconnect(4), message(0, 6),
    ],
    "came again, though it was answered 200": [message(0, 0), message(0, 1)],
    "came again, though it was answered 400": [message(0, 0, "400"), message(0, 1)],
    "came again after 0.99 s, requested 3": [
        message(0, 0, "503", retry_after=3), message(0, 1),
    ],
    "message 0 came first after message 1": [message(1, 0), message(0, 2)],
    "its disconnect event came again after 1.00 s, requested 3": [
        disconnect(0, outcome="503", retry_after=3), disconnect(1),
    ],
}  # fmt: skip


@pytest.mark.parametrize("attempts", FAULTLESS.values(), ids=FAULTLESS)
def test_soak_accepts_what_the_contract_allows(attempts: list[Attempt]) -> None:
    """It reports nothing."""
    assert violations_of(*attempts) == []


@pytest.mark.parametrize(("what", "attempts"), FAULTY.items(), ids=FAULTY)
def test_soak_reports_what_the_contract_forbids(
    what: str, attempts: list[Attempt]
) -> None:
    """One violation, with its reason."""
    (found,) = violations_of(*attempts)
    assert what in found


def test_with_strict_order_messages_are_accepted_in_order() -> None:
    """Only then is a late response out of order."""
    attempts = [message(0, 0, took=5), message(1, 1)]
    assert violations_of(*attempts) == []
    assert violations_of(*attempts, strict=True) == ["out of order: [1, 0]"]


def test_time_while_the_process_was_stopped_does_not_count() -> None:
    """A message sent before a stall may be examined after it."""
    overtaken = [message(0, 0, "503", took=1), message(1, 4.5), message(0, 6)]
    assert len(violations_of(*overtaken)) == 1
    assert violations_of(*overtaken, pulse=steady((1.1, 4))) == []


def test_soak_expects_lost_events_late() -> None:
    """The reset of a connection loses what was not read."""
    late = [message(1, 2), message(0, 6)]
    assert len(violations_of(*late)) == 1
    assert len(violations_of(*late, resets=(0.5,))) == 1  # before they were sent
    assert violations_of(*late, resets=(3,)) == []
    assert violations_of(*late, resets=(1.5,)) == []  # the next one was on another
    retried = [message(0, 0, "503"), message(1, 4), message(0, 6)]
    assert len(violations_of(*retried)) == 1
    assert violations_of(*retried, resets=(3,)) == []  # it was retried beside the other
    given_up = [message(0, 0, "503"), message(1, 4), disconnect(9, undelivered=1)]
    assert len(violations_of(*given_up)) == 1
    assert violations_of(*given_up, resets=(1,)) == []


def test_soak_counts_lost_events_as_failed() -> None:
    """From then on its deadline counts, independent of a later Retry-After."""
    attempts = [
        message(0, 0), message(1, 9), message(2, 9.1, "503", retry_after=3),
        message(2, 10.5),
    ]  # fmt: skip
    assert len(violations_of(*attempts, delivery_timeout=8)) == 1
    assert violations_of(*attempts, delivery_timeout=8, resets=(2.4,)) == []
    assert len(violations_of(*attempts, delivery_timeout=8, resets=(2.6,))) == 1


def test_each_message_is_settled_or_counts_as_undelivered() -> None:
    """A message that failed and was not retried is neither."""
    assert lost(2, message(0, 1), message(1, 1.1), disconnect(2)) == []
    assert lost(2, message(0, 1), message(1, 1.1, "400"), disconnect(2)) == []
    failed = message(0, 1, "503", took=0.5)
    assert len(lost(2, failed, message(1, 1.2), disconnect(2, undelivered=0))) >= 1
    assert lost(2, failed, message(1, 1.2), disconnect(2, undelivered=1)) == []


def test_held_request_lost_five_seconds_after_the_disconnect_was_abandoned(
) -> None:
    """Not before: until then it is retried."""
    accepted = disconnect(2)
    assert lost(1, message(0, 1, "lost", took=6.1), accepted) == []
    assert len(lost(1, message(0, 1, "lost", took=5.9), accepted)) == 1


def test_message_that_failed_during_its_disconnect_event_is_lost_by_sigkill() -> None:
    """Not one whose failure the relay knew when it sent the event."""
    accepted = disconnect(4)
    assert lost(1, message(0, 1, "lost", took=2.5), accepted, cut_off=True) == []
    assert lost(1, message(0, 1, "lost", took=2.5), accepted)
    assert lost(1, message(0, 1, "lost", took=1.5), accepted, cut_off=True)


def test_request_may_be_abandoned_while_many_are_open() -> None:
    """At sixteen of one connection, the relay abandons one to send another."""
    for number, flawed in ((15, True), (16, False)):
        attempts = [
            message(0, 1, "lost", took=3),
            *(message(n, 1 + n / 10, took=4) for n in range(1, number - 1)),
            message(number - 1, 4.5, took=1),  # which the backend read late
        ]
        assert bool(lost(number, *attempts, disconnect(9))) is flawed
        attempts[-1] = message(number - 1, 5.5)  # long after that
        assert lost(number, *attempts, disconnect(9))


def test_pulse_counts_beats_between_two_times() -> None:
    """Those between the two times."""
    pulse = Pulse()
    for second in range(10):
        pulse.add(second, second + 0.5)
    assert pulse.count(0, 10) == 10
    assert pulse.count(1.1, 4.2) == 2
    assert pulse.count(2.1, 2.4) == pulse.count(5, 3) == 0
    assert pulse.ago(1, 3.2) == 2
    assert pulse.ago(3, 3.2) == 0
    assert pulse.ago(4, 3.2) == float("-inf")


@pytest.mark.gen_test
async def test_backend_that_resets_a_connection_does_so_at_once(io_loop) -> None:
    """The relay cannot abandon a request that is recorded as lost."""
    async with FaultyBackend() as backend:
        with socket.create_connection((backend.host, backend.port)) as relay:
            await eventually(lambda: backend.connections)
            backend.make_unreachable("reset")
            with pytest.raises(ConnectionResetError):
                relay.recv(1)


@pytest.mark.gen_test
async def test_reset_of_a_waiting_connection_is_recorded(io_loop) -> None:
    """Nobody has read what was sent on it."""
    async with FaultyBackend() as backend:
        backend.make_unreachable("reset")
        before = len(backend.resets)
        with socket.create_connection((backend.host, backend.port)):
            await eventually(lambda: len(backend.resets) > before)
        assert backend.first_reset(0, time.monotonic()) == backend.resets[0]


def test_status_of_malformed_responses_is_read_in_one_place() -> None:
    """And each Retry-After can be encoded in Latin-1, like headers."""
    for form in (*READABLE, *READABLE_TO_THE_END):
        assert form.count(b"%d") == 1
    for headers, seconds in RETRY_AFTERS:
        assert all(header.encode("latin-1") for header in headers)
        assert seconds >= 0
