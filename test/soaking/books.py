"""Compares what clients, callers and the backend saw with the contract."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

from faults import Attempt, Book

from soaking.answers import PASSING
from soaking.pulse import Pulse
from soaking.visits import Closing, SendingAfterClose, SlowReader, Visit

# Beats after which the relay has read what the backend answered, and the backend what
# the relay had sent: one each on open connections; a new one takes more, TLS most.
KNOWN = 10
EARLY = 0.05  # seconds that a retry may come early: clocks are read in turns of a loop
MAX_UNANSWERED = 16  # messages of one connection; the relay's default
HELD_AFTERWARDS = 5.0  # seconds for held responses after the disconnect event
LIFE = 6.0  # seconds in which the relay detects a dead client
ALIVE = 0.5  # seconds that the soak, with its clients, may stand still meanwhile
LOST = "instance lost"  # the reason in events of the next run for a dead one
REPORTED = ("code", "initiator", "reason", "undelivered", "refused")  # in `meta`
SLOW = 1008  # the close code of a client that reads nothing
DISCONNECT_TIMEOUT = 300.0  # seconds; the relay's default


@dataclass(frozen=True)
class Violation:
    """A description; `connection_id` is empty if it concerns no connection."""

    what: str
    connection_id: str = ""


class Audit:
    """The checks of one round.

    `strict`: one message at a time, and no response is held. `cut_off`: the relay lost
    its memory, such as messages that failed after the disconnect event. `pulse` decides
    whether an event came too late after another one.
    """

    def __init__(
        self,
        book: Book,
        pulse: Pulse,
        strict: bool,
        delivery_timeout: float,
        cut_off: bool = False,
    ) -> None:
        self._book = book
        self._pulse = pulse
        self._strict = strict
        self._delivery_timeout = delivery_timeout
        self._cut_off = cut_off
        self._by_connection: dict[str, list[Attempt]] = defaultdict(list)
        for attempt in book.attempts:
            self._by_connection[attempt.connection_id].append(attempt)
        self._disconnects = book.disconnects()
        self._ids = {
            parse_qs(a.event["meta"]["query"])["name"][0]: a.connection_id
            for a in book.of("connect")
        }

    def violations(
        self, visits: Iterable[Visit], *, reads_at_once: bool
    ) -> Iterator[Violation]:
        """Yield each violation.

        `reads_at_once`: only its own queue delays the reading of a client's close
        frame.
        """
        for visit in visits:
            connection_id = self._ids.get(visit.name, "")
            for what in self._violations_of(visit, reads_at_once):
                kind = type(visit).__name__
                yield Violation(f"{kind} {visit.name}: {what}", connection_id)
        for connection_id, attempts in self._by_connection.items():
            for what in self.delivery_violations(attempts):
                yield Violation(f"connection {connection_id}: {what}", connection_id)

    def timeline(self, connection_id: str) -> Iterator[str]:
        """One connection's attempts: seconds from its first event, and outcomes."""
        attempts = self._by_connection[connection_id]
        if not attempts:
            return
        began = attempts[0].arrived
        for attempt in attempts:
            meta = attempt.event["meta"]
            yield " ".join([
                f"{attempt.arrived - began:8.3f} {attempt.ended - began:8.3f}",
                f"{label(attempt)}: {attempt.outcome}",
                *([f"retry after {attempt.retry_after:g}"] * (attempt.retry_after > 0)),
                *(["(may be unread)"] * attempt.doubtful),
                *(f"{name}={meta[name]}" for name in REPORTED if name in meta),
            ])  # fmt: skip
        ends = (attempt.ended for attempt in attempts if attempt.ended < float("inf"))
        end = max(ends, default=began) + HELD_AFTERWARDS
        resets = {f"{at - began:.1f}" for at in self._book.resets if began < at < end}
        yield f"connections were reset at {', '.join(sorted(resets, key=float))}"

    def all_are_reported(self) -> bool:
        """Whether each connection that was accepted has had its disconnect event."""
        accepted = {attempt.connection_id for attempt in self._book.of("connect")}
        return accepted <= self._disconnects.keys()

    def _violations_of(self, visit: Visit, reads_at_once: bool) -> Iterator[str]:
        """Compare what a client did and saw with what the backend got."""
        yield from visit.violations
        if visit.refused or visit.name not in self._ids:
            return
        connection_id = self._ids[visit.name]
        attempts = [
            a for a in self._by_connection[connection_id] if a.kind == "message"
        ]
        if isinstance(visit, SendingAfterClose):
            late = [n for n in map(spoken, attempts) if n >= visit.sent > 0]
            if late:
                yield f"messages behind its close frame were delivered: {late}"
        meta = self._disconnects.get(connection_id)
        if meta is None:
            yield "no disconnect event"
            return
        if meta["reason"] == LOST:
            return  # and so were the messages in memory
        yield from self._lost_messages(visit, meta, attempts)
        yield from self._lost_pushes(visit, meta, reads_at_once)
        # A slow client gets no close frame, or too late, behind the bytes that it has
        # not read.
        unseen = visit.close_code is None and (
            meta["code"] == SLOW
            or (isinstance(visit, SlowReader) and meta["initiator"] == "relay")
            or not self._was_alive(meta)
        )
        if not (visit.left or unseen) and (
            meta["code"] != (visit.close_code or 1006) or meta["initiator"] == "client"
        ):
            yield f"saw {visit.close_code}, the backend got {meta}"
        cut = meta["initiator"] == "relay" and meta["code"] in (1006, SLOW)
        if visit.living and cut and not visit.left and self._was_alive(meta):
            yield f"was alive, but {meta}"

    def _was_alive(self, meta: dict[str, Any]) -> bool:
        """Whether a client was quick enough before the relay ended its connection."""
        came = self._by_connection[meta["connection_id"]][0].arrived
        ended = came + meta["duration"]
        return self._pulse.longest_own(ended - LIFE, ended + ALIVE) < ALIVE

    def _lost_messages(
        self, visit: Visit, meta: dict[str, Any], attempts: list[Attempt]
    ) -> Iterator[str]:
        """Each message was settled with the backend, or is counted in the event."""
        event = next(
            a
            for a in self._by_connection[meta["connection_id"]]
            if a.kind == "disconnect" and a.accepted
        )
        abandoned_at = event.ended + HELD_AFTERWARDS
        if self._cut_off:  # what failed as the event was sent is retried, or lost
            abandoned_at = self._pulse.ago(KNOWN, event.arrived)
        latest = {spoken(a): a for a in attempts}
        settled = {spoken(a) for a in attempts if self._is_settled(a)} | {
            number
            for number, attempt in latest.items()
            if attempt.ended > abandoned_at or self._may_have_crossed(attempt)
        }
        known = len(settled) + meta["undelivered"]
        seen = {spoken(attempt) for attempt in attempts}
        if known < len(seen):
            yield f"{len(seen)} messages seen, {len(settled)} settled, {meta}"
        if not (visit.certain and visit.left) or meta["initiator"] != "client":
            return
        if meta["code"] != 1000 and visit.sent:
            yield f"its close frame was not read: {meta}"
        if known < visit.sent:
            yield f"{visit.sent} messages sent, {len(settled)} settled, {meta}"

    def _may_have_crossed(self, failed: Attempt) -> bool:
        """Whether the relay may have abandoned a message just as it failed.

        It abandons one to send another while so many are open; only the relay knows
        which of the two came first. The backend may not have read some of them.
        """
        if self._strict:
            return False
        attempts = [
            a
            for a in self._by_connection[failed.connection_id]
            if a.kind == "message"
        ]
        highest = max(
            spoken(a)
            for a in attempts
            if self._pulse.count(failed.ended, a.arrived) <= KNOWN
        )
        settled = {
            spoken(a)
            for a in attempts
            if self._is_settled(a) and self._pulse.count(a.ended, failed.ended) > KNOWN
        }
        return highest + 1 - len(settled) >= MAX_UNANSWERED

    def _lost_pushes(
        self, visit: Visit, meta: dict[str, Any], reads_at_once: bool
    ) -> Iterator[str]:
        """Sends with status 200 reached a client that read to the end, in order."""
        if visit.received != sorted(set(visit.received)):
            # Concurrent sends have no order.
            again = [n for n, count in Counter(visit.received).items() if count > 1]
            if again:
                yield f"pushes came twice: {again}"
        for push in visit.pushes:
            if push.status == -1:
                yield f"push {push.number} had no answer"
        if visit.close_code is not None:
            missing = {
                push.number
                for push in visit.pushes
                if push.status == 200 and push.answered < visit.left_at
            } - set(visit.received)
            if missing:
                yield f"pushes answered 200 did not come: {sorted(missing)}, {meta}"
        if isinstance(visit, Closing) and reads_at_once and visit.is_delivered():
            for push in visit.pushes:
                beats = self._pulse.count(visit.left_at, push.posted)
                if beats > KNOWN and push.status not in (410, 0):
                    yield (
                        f"a push {push.posted - visit.left_at:.1f} s behind its close"
                        f" frame got {push.status}"
                    )

    def delivery_violations(self, attempts: list[Attempt]) -> Iterator[str]:
        """Replay one connection's attempts in the order of arrival."""
        replay = _Replay(attempts)
        for attempt in attempts:
            if attempt.kind == "connect":
                continue
            same = replay.by_id[attempt.webhook_id]
            if attempt.kind == "message":
                yield from self._repeats_after_the_end(attempt, same)
                yield from self._swapped(attempt, replay)
            yield from self._early_retry(attempt, replay)
            yield from self._overtaken(attempt, replay)
            replay.add(attempt, self._is_failed(attempt))
        if self._strict:
            numbers = [
                spoken(a)
                for a in sorted(attempts, key=lambda attempt: attempt.ended)
                if a.kind == "message" and self._book.accepted.get(a.webhook_id) is a
            ]
            if numbers != sorted(numbers):
                yield f"out of order: {numbers}"

    def _repeats_after_the_end(
        self, attempt: Attempt, same: list[Attempt]
    ) -> Iterator[str]:
        """A finally answered event is not sent again."""
        for earlier in same:
            if (
                self._is_settled(earlier)
                and not earlier.doubtful
                and self._pulse.count(earlier.ended, attempt.arrived) > 0
            ):
                yield (
                    f"{label(attempt)} came again, though it was answered"
                    f" {earlier.outcome}"
                )
                break

    def _swapped(self, attempt: Attempt, replay: "_Replay") -> Iterator[str]:
        """First attempts arrive in order, unless one was lost before it was read."""
        highest = replay.highest
        if (
            not replay.by_id[attempt.webhook_id]
            and highest is not None
            and spoken(attempt) < spoken(highest)
            and self._pulse.count(highest.arrived, attempt.arrived) > KNOWN
            and not self._is_doubtful(highest.arrived, attempt.arrived)
        ):
            yield f"{label(attempt)} came first after {label(highest)}"

    def _early_retry(self, attempt: Attempt, replay: "_Replay") -> Iterator[str]:
        """Retry-After is respected, but not beyond the deadline."""
        same = replay.by_id[attempt.webhook_id]
        if not same or not self._is_failed(same[-1]) or same[-1].doubtful:
            return
        latest = same[-1]
        if is_of_next_run(attempt) and not is_of_next_run(latest):
            return  # a new run does not know the responses that the dead one got
        wait = attempt.arrived - latest.ended
        if attempt.kind == "message":
            failed_at = self._may_have_failed(attempt, replay)
            deadline = failed_at + self._delivery_timeout
        else:
            failed_at = min(a.ended for a in same if self._is_failed(a))
            deadline = failed_at + DISCONNECT_TIMEOUT
        if wait < latest.retry_after - EARLY and attempt.arrived < deadline:
            yield (
                f"{label(attempt)} came again after {wait:.2f} s, requested"
                f" {latest.retry_after:g}"
            )

    def _may_have_failed(self, attempt: Attempt, replay: "_Replay") -> float:
        """When a message may have failed unseen for the first time, at the earliest.

        Where the backend was away that was when it was the next to go, or when it
        was lost on its way beside others.
        """
        lost = self._book.first_reset(replay.began, replay.first_arrival(attempt))
        next_to_go = self._pulse.ago(KNOWN, replay.previous_arrival(attempt))
        return min(lost, max(replay.began, next_to_go))

    def _is_doubtful(self, begin: float, end: float) -> bool:
        """Whether what the relay sent from about `begin` on may have been lost."""
        begin = self._pulse.ago(KNOWN, begin)
        return self._book.first_reset(begin, end) < float("inf")

    def _overtaken(self, attempt: Attempt, replay: "_Replay") -> Iterator[str]:
        """No message overtakes one that has failed and waits for its retry."""
        waiting = [
            a
            for a in replay.failed.values()
            if a.ended < attempt.arrived
            and self._pulse.count(a.ended, attempt.arrived) > KNOWN
            and self._went_later(a, attempt, replay)
        ]
        if attempt.kind == "disconnect":
            undelivered = attempt.event["meta"]["undelivered"]
            if is_of_next_run(attempt):
                return  # the first run's memory is lost
            # What failed after the event was sent is delivered behind it.
            ahead = [label(a) for a in waiting if a.ended < replay.disconnected]
            if len(ahead) > undelivered:
                yield (
                    f"its disconnect event, with {undelivered} undelivered, overtook"
                    f" {', '.join(ahead)}"
                )
            return
        is_first = not replay.by_id[attempt.webhook_id]
        for other in waiting:
            if spoken(other) > spoken(attempt):
                continue
            if replay.next_of(other) < float("inf"):
                # It may have been retried at the same time, and lost unread.
                is_wrong = (
                    self._book.first_reset(other.ended, attempt.arrived) == float("inf")
                )
            else:
                # It was given up; open requests continue, but no new ones are sent.
                is_wrong = is_first and not self._is_doubtful(
                    other.ended, attempt.arrived
                )
            if is_wrong:
                yield f"{label(attempt)} overtook {label(other)}, which had failed"

    def _went_later(self, failed: Attempt, other: Attempt, replay: "_Replay") -> bool:
        """Whether the failed message was retried well after `other`, or never."""
        again = replay.next_of(failed)
        if again == float("inf"):
            return not self._may_have_crossed(failed)
        return self._pulse.count(other.arrived, again) > KNOWN

    def _is_failed(self, attempt: Attempt) -> bool:
        """Whether the event is retried after this attempt."""
        outcome = attempt.outcome
        if outcome.isdigit():
            return int(outcome) in PASSING or int(outcome) >= 500
        return outcome in ("lost", "garbage") or (
            outcome == "abandoned" and (self._strict or attempt.kind != "message")
        )

    def _is_settled(self, attempt: Attempt) -> bool:
        """Whether the attempt ended the message: accepted, refused or abandoned."""
        return attempt.outcome != "hold" and not self._is_failed(attempt)


class _Replay:
    """One connection's attempts so far."""

    def __init__(self, attempts: Iterable[Attempt]) -> None:
        self._arrivals: dict[str, list[float]] = defaultdict(list)
        self._came_first: dict[int, float] = {}  # by the message's number
        for attempt in attempts:
            self._arrivals[attempt.webhook_id].append(attempt.arrived)
            if attempt.kind == "message":
                self._came_first.setdefault(spoken(attempt), attempt.arrived)
        # When the first event came, such as the connect event.
        self.began = min(arrivals[0] for arrivals in self._arrivals.values())
        self.by_id: dict[str, list[Attempt]] = defaultdict(list)
        self.failed: dict[str, Attempt] = {}  # messages whose latest attempt did
        self.highest: Attempt | None = None  # the last message that came
        self.disconnected = float("inf")  # when the first disconnect event came

    def first_arrival(self, attempt: Attempt) -> float:
        """Return when that message arrived for the first time."""
        return self._came_first[spoken(attempt)]

    def previous_arrival(self, attempt: Attempt) -> float:
        """When the message before it did."""
        return self._came_first.get(spoken(attempt) - 1, self.began)

    def next_of(self, attempt: Attempt) -> float:
        """Return when the event arrived again; infinite if it did not."""
        arrivals = self._arrivals[attempt.webhook_id]
        later = (at for at in arrivals if at > attempt.arrived)
        return min(later, default=float("inf"))

    def add(self, attempt: Attempt, failed: bool) -> None:
        self.by_id[attempt.webhook_id].append(attempt)
        if attempt.kind == "disconnect":
            self.disconnected = min(self.disconnected, attempt.arrived)
            return
        if failed:
            self.failed[attempt.webhook_id] = attempt
        else:
            self.failed.pop(attempt.webhook_id, None)
        if self.highest is None or spoken(attempt) > spoken(self.highest):
            self.highest = attempt


def spoken(attempt: Attempt) -> int:
    """The number that the client gave its message."""
    return int(attempt.event["message"].split(maxsplit=2)[1])


def is_of_next_run(attempt: Attempt) -> bool:
    """Whether it is of the run after the one whose connection it was."""
    return attempt.event["meta"].get("reason") == LOST


def label(attempt: Attempt) -> str:
    """What it is, for people."""
    if attempt.kind != "message":
        return f"its {attempt.kind} event"
    return f"message {spoken(attempt)}"
