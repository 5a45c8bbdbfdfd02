"""What clients, callers and the backend saw, held against the contract."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import parse_qs

from faults import Attempt, Book

from soaking.answers import PASSING
from soaking.stalls import Stalls
from soaking.visits import CLOSE_READ, Babbling, Closing, Visit

# Seconds that the relay may take to read an answer, on a busy machine, before what
# it sends can be held against it.
HEARD = 1.5
# Seconds that a retry may come early: a busy loop looks at its clock before that.
EARLY = 0.3
# Seconds that a request on a new connection may wait to be read, when the backend,
# which is the soak itself, is busy: one on a kept connection may come before it.
SAME_MOMENT = 1.0
HELD_AFTERWARDS = 5.0  # seconds; an answer is held so long behind the farewell
LIFE = 6.0  # seconds in which the relay finds that a client is not alive
ALIVE = 0.5  # seconds that the soak may stand still meanwhile: its clients do, too
SLOW = 1008  # the close code of who takes nothing
DISCONNECT_TIMEOUT = 300.0  # seconds; the relay's default


class Audit:
    """One round's books.

    `strict`: one message at a time, and no answer is held. `cut_off`: the relay
    lost what was in its memory, such as messages that failed behind the farewell.
    """

    def __init__(
        self,
        book: Book,
        stalls: Stalls,
        strict: bool,
        delivery_timeout: float,
        cut_off: bool = False,
    ) -> None:
        self._book = book
        self._stalls = stalls
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
    ) -> Iterator[str]:
        """Yield a sentence for each.

        `reads_at_once`: nothing but its own queue keeps a client's close frame
        from being read.
        """
        for visit in visits:
            for flaw in self._flaws(visit, reads_at_once):
                yield f"{type(visit).__name__.lower()} {visit.name}: {flaw}"
        for connection_id, attempts in self._by_connection.items():
            for flaw in self.delivery_flaws(attempts):
                yield f"connection {connection_id}: {flaw}"

    def told_of_all(self) -> bool:
        """Whether each connection that was accepted has had its disconnect event."""
        accepted = {attempt.connection_id for attempt in self._book.of("connect")}
        return accepted <= self._disconnects.keys()

    def _flaws(self, visit: Visit, reads_at_once: bool) -> Iterator[str]:
        """Compare what a client did and saw with what the backend was told."""
        yield from visit.flaws
        if visit.refused or visit.name not in self._ids:
            return
        connection_id = self._ids[visit.name]
        attempts = [
            a for a in self._by_connection[connection_id] if a.kind == "message"
        ]
        if isinstance(visit, Babbling):
            late = [n for n in map(spoken, attempts) if n >= visit.sent > 0]
            if late:
                yield f"messages behind its close frame were delivered: {late}"
        meta = self._disconnects.get(connection_id)
        if meta is None:
            yield "no disconnect event"
            return
        if meta["reason"] == "instance lost":
            return  # what was in memory is lost
        yield from self._lost_messages(visit, meta, attempts)
        yield from self._lost_pushes(visit, meta, reads_at_once)
        # A close frame has no room behind what a slow client does not take.
        unseen = visit.close_code is None and (
            meta["code"] == SLOW or not self._was_alive(meta)
        )
        if not (visit.left or unseen) and (
            meta["code"] != (visit.close_code or 1006) or meta["initiator"] == "client"
        ):
            yield f"saw {visit.close_code}, the backend was told {meta}"
        cut = meta["initiator"] == "relay" and meta["code"] in (1006, SLOW)
        if visit.living and cut and not visit.left and self._was_alive(meta):
            yield f"was alive, but {meta}"

    def _was_alive(self, meta: dict[str, Any]) -> bool:
        """Whether a client was quick enough before the relay ended its connection."""
        came = self._by_connection[meta["connection_id"]][0].arrived
        ended = came + meta["duration"]
        return self._stalls.longest_own(ended - LIFE, ended + HEARD) < ALIVE

    def _lost_messages(
        self, visit: Visit, meta: dict[str, Any], attempts: list[Attempt]
    ) -> Iterator[str]:
        """Each message came to an end of which the backend or the event knows."""
        told = [a.ended for a in self._by_connection[meta["connection_id"]]
                if a.kind == "disconnect" and a.accepted]
        let_go = min(told, default=float("inf"))
        if not self._cut_off:
            let_go += HELD_AFTERWARDS
        settled = {
            spoken(a) for a in attempts if self._is_settled(a) or a.ended > let_go
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

    def _lost_pushes(
        self, visit: Visit, meta: dict[str, Any], reads_at_once: bool
    ) -> Iterator[str]:
        """What was answered 200 reached a client that read to the end, in order."""
        if visit.received != sorted(set(visit.received)):
            # Pushes that are under way together have no order.
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
        if isinstance(visit, Closing) and reads_at_once and visit.is_told():
            for push in visit.pushes:
                behind = self._stalls.running(visit.left_at, push.posted)
                if behind > CLOSE_READ and push.status not in (410, 0):
                    yield (
                        f"a push {behind:.1f} s behind its close frame got"
                        f" {push.status}"
                    )

    def delivery_flaws(self, attempts: list[Attempt]) -> Iterator[str]:
        """Replay one connection's attempts in the order in which they came."""
        replay = _Replay(attempts)
        for attempt in attempts:
            if attempt.kind == "connect":
                continue
            same = replay.by_id[attempt.webhook_id]
            if attempt.kind == "message":
                yield from self._needless(attempt, same)
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

    def _needless(self, attempt: Attempt, same: list[Attempt]) -> Iterator[str]:
        """What was answered for good does not go again."""
        for earlier in same:
            if (
                self._is_settled(earlier)
                and not earlier.doubtful
                and self._stalls.running(earlier.ended, attempt.arrived) > 0
            ):
                yield (
                    f"{label(attempt)} came again, though it was answered"
                    f" {earlier.outcome}"
                )
                break

    def _swapped(self, attempt: Attempt, replay: "_Replay") -> Iterator[str]:
        """First attempts come in order, unless one was lost before it was read."""
        highest = replay.highest
        if (
            not replay.by_id[attempt.webhook_id]
            and highest is not None
            and spoken(attempt) < spoken(highest)
            and self._stalls.running(highest.arrived, attempt.arrived) > SAME_MOMENT
            and not self._book.lost_unread(
                highest.arrived - SAME_MOMENT, attempt.arrived
            )
        ):
            yield f"{label(attempt)} came first after {label(highest)}"

    def _early_retry(self, attempt: Attempt, replay: "_Replay") -> Iterator[str]:
        """Retry-After is honoured, though never beyond the deadline."""
        same = replay.by_id[attempt.webhook_id]
        if not same or not self._is_failed(same[-1]) or same[-1].doubtful:
            return
        latest = same[-1]
        wait = attempt.arrived - latest.ended
        if attempt.kind == "message":
            deadline = replay.head_since(attempt) + self._delivery_timeout
        else:
            failed_at = min(a.ended for a in same if self._is_failed(a))
            deadline = failed_at + DISCONNECT_TIMEOUT
        if wait < latest.retry_after - EARLY and attempt.arrived < deadline - HEARD:
            yield (
                f"{label(attempt)} came again after {wait:.2f} s, told"
                f" {latest.retry_after:g}"
            )

    def _overtaken(self, attempt: Attempt, replay: "_Replay") -> Iterator[str]:
        """Nothing goes past a message that has failed and waits for its retry."""
        waiting = [
            a
            for a in replay.failed.values()
            if a.ended < attempt.arrived
            and self._stalls.running(a.ended, attempt.arrived) > HEARD
            and self._stalls.running(attempt.arrived, replay.next_of(a)) > SAME_MOMENT
        ]
        if attempt.kind == "disconnect":
            undelivered = attempt.event["meta"]["undelivered"]
            if attempt.event["meta"].get("reason") == "instance lost":
                return  # with what was in its memory
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
            # One that does not come again was given up; what was open by then goes
            # on, but nothing new does.
            is_new = is_first and not self._book.lost_unread(
                other.ended - SAME_MOMENT, attempt.arrived
            )
            if is_new or replay.next_of(other) < float("inf"):
                yield f"{label(attempt)} overtook {label(other)}, which had failed"

    def _is_failed(self, attempt: Attempt) -> bool:
        """Whether the event goes again after this attempt."""
        outcome = attempt.outcome
        if outcome.isdigit():
            return int(outcome) in PASSING or int(outcome) >= 500
        return outcome in ("lost", "garbage") or (
            outcome == "let go" and (self._strict or attempt.kind != "message")
        )

    def _is_settled(self, attempt: Attempt) -> bool:
        """Whether that was the end of the message: taken, refused or let go."""
        return attempt.outcome != "hold" and not self._is_failed(attempt)


class _Replay:
    """One connection's attempts so far."""

    def __init__(self, attempts: Iterable[Attempt]) -> None:
        self._arrivals: dict[str, list[float]] = defaultdict(list)
        # When each message came for the first time, and the connect event as if it
        # were the message before the first.
        self._came_first: dict[int, float] = {}
        for attempt in attempts:
            self._arrivals[attempt.webhook_id].append(attempt.arrived)
            if attempt.kind != "disconnect":
                number = spoken(attempt) if attempt.kind == "message" else -1
                self._came_first.setdefault(number, attempt.arrived)
        self.by_id: dict[str, list[Attempt]] = defaultdict(list)
        self.failed: dict[str, Attempt] = {}  # messages whose latest attempt did
        self.highest: Attempt | None = None  # the last message that came
        self.disconnected = float("inf")  # when the first disconnect event came

    def head_since(self, attempt: Attempt) -> float:
        """When that message may have been the next to go, at the earliest.

        From then on it may have failed unseen, where the backend was away.
        """
        number = spoken(attempt)
        return self._came_first.get(number - 1, self._came_first[number])

    def next_of(self, attempt: Attempt) -> float:
        """When the event came again; for ever where it did not."""
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


def label(attempt: Attempt) -> str:
    """What it is, for people."""
    if attempt.kind != "message":
        return f"its {attempt.kind} event"
    return f"message {spoken(attempt)}"
