"""The soak's books: they balance where all is right, and say where it is not."""

from typing import Any

import pytest
from faults import Attempt, Book
from soaking.answers import READABLE, READABLE_TO_THE_END, RETRY_AFTERS
from soaking.books import Audit
from soaking.stalls import RECOVERY, Stalls

ID = "0f6c"


def message(
    number: int, arrived: float, outcome: str = "200", took: float = 0.01, **more: Any
) -> Attempt:
    """An attempt of one message, at so many seconds."""
    event = {"meta": {"connection_id": ID}, "message": f"client {number}"}
    return Attempt(
        "message", f"{ID}-{number + 1}", event, outcome, arrived, arrived + took, **more
    )


def disconnect(arrived: float, undelivered: int = 0) -> Attempt:
    """The disconnect event, accepted."""
    event = {"meta": {"connection_id": ID, "undelivered": undelivered}}
    return Attempt("disconnect", f"{ID}-disconnect", event, "200", arrived, arrived)


def flaws(
    *attempts: Attempt, strict: bool = False, stalls: Stalls | None = None
) -> list[str]:
    """What the books say of one connection's attempts."""
    book = Book()
    book.attempts = list(attempts)
    for attempt in sorted(attempts, key=lambda attempt: attempt.ended):
        if attempt.accepted:
            book.accepted.setdefault(attempt.webhook_id, attempt)
    audit = Audit(book, stalls or Stalls(), strict, delivery_timeout=60)
    return list(audit.delivery_flaws(list(attempts)))


FAULTLESS = {
    "one after the other": [message(0, 0), message(1, 1), disconnect(2)],
    "again after a failure": [message(0, 0, "503"), message(0, 1), message(1, 2)],
    "held, then answered": [message(0, 0, took=9), message(1, 2), disconnect(3)],
    "held, and let go": [message(0, 0, "let go", took=9), message(1, 2)],
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
    "came again after 0.99 s, told 3": [
        message(0, 0, "503", retry_after=3), message(0, 1),
    ],
    "message 0 came first after message 1": [message(1, 0), message(0, 2)],
}  # fmt: skip


@pytest.mark.parametrize("attempts", FAULTLESS.values(), ids=FAULTLESS)
def test_what_the_contract_allows_is_no_flaw(attempts: list[Attempt]) -> None:
    """Nothing is said of it."""
    assert flaws(*attempts) == []


@pytest.mark.parametrize(("flaw", "attempts"), FAULTY.items(), ids=FAULTY)
def test_what_the_contract_forbids_is_a_flaw(
    flaw: str, attempts: list[Attempt]
) -> None:
    """One, which says what was wrong."""
    (found,) = flaws(*attempts)
    assert flaw in found


def test_with_strict_order_messages_are_accepted_in_order() -> None:
    """An answer that comes late is out of order only then."""
    attempts = [message(0, 0, took=5), message(1, 1)]
    assert flaws(*attempts) == []
    assert flaws(*attempts, strict=True) == ["out of order: [1, 0]"]


def test_nobody_is_judged_by_time_in_which_it_did_not_run() -> None:
    """A message that was sent before a stall may come to be looked at after it."""
    stalls = Stalls()
    stalls.add(1.1, 4)
    overtaken = [message(0, 0, "503", took=1), message(1, 4.5), message(0, 6)]
    assert len(flaws(*overtaken)) == 1
    assert flaws(*overtaken, stalls=stalls) == []


def test_what_was_lost_unread_comes_late() -> None:
    """A reset of all connections takes with it what nobody has read."""
    book = Book()
    book.attempts = [message(1, 0), message(0, 4)]
    audit = Audit(book, Stalls(), strict=False, delivery_timeout=60)
    assert len(list(audit.delivery_flaws(book.attempts))) == 1
    book.resets.append(1)
    assert not list(audit.delivery_flaws(book.attempts))
    given_up = [message(0, 0, "503"), message(1, 4), disconnect(9, undelivered=1)]
    assert not list(audit.delivery_flaws(given_up))


def test_only_who_ran_can_tell_that_it_was_alive() -> None:
    """Stalls of the soak itself count where they were, those of the relay do not."""
    stalls = Stalls()
    stalls.add(0, 9)
    assert stalls.longest_own(0, 9) == 0


def test_stalls_that_overlap_count_once() -> None:
    """What is left of a time is what nobody missed."""
    stalls = Stalls()
    stalls.add(10, 12)
    stalls.add(11, 13)
    assert stalls.running(0, 5) == 5
    assert stalls.running(9, 20) == pytest.approx(11 - 3 - RECOVERY)
    assert stalls.running(11, 12) == 0


def test_odd_answers_have_one_place_for_the_status() -> None:
    """And each Retry-After can be written in Latin-1, as headers are."""
    for form in (*READABLE, *READABLE_TO_THE_END):
        assert form.count(b"%d") == 1
    for headers, seconds in RETRY_AFTERS:
        assert all(header.encode("latin-1") for header in headers)
        assert seconds >= 0
