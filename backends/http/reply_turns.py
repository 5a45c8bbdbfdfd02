"""Reads and carries out the replies to one connection's messages, one at a time.

`delivery` makes a `ReplyTurns` for a connection with the first reply. The next reply is
read when the frames of the one before have left, except for less than half of the
connection's send buffer. So what waits for a slow client is at most one reply.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

from backends import Connection
from backends.client import Response
from backends.http.held import Request


class MessageReplies(Protocol):
    """Reads the replies to messages, and has them carried out."""

    def of_message(self, status: int, headers: Mapping[str, str]) -> int:
        """Return how many bytes to keep of a response (`client.response.Keep`)."""

    def carry_out(
        self, connection: Connection, event_id: str, response: Response
    ) -> "asyncio.Future[None] | None":
        """Carry out one; returns None if all was done at once, or a future."""


class ReplyTurns:
    """The replies of one connection: one is read or carried out, the others wait.

    `on_carried_out` is called when one is carried out that took longer than `add`.
    """

    __slots__ = (
        "_connection",
        "_going_on",
        "_on_carried_out",
        "_reading",
        "_received",
        "_replies",
        "_waiting",
        "carrying_out",
    )

    def __init__(
        self,
        replies: MessageReplies,
        connection: Connection,
        on_carried_out: Callable[[], None],
    ) -> None:
        self._replies = replies
        self._connection = connection
        self._on_carried_out = on_carried_out
        # Whether a reply was read whose commands, or frames, are still under way.
        self.carrying_out = False
        self._going_on = False  # whether `go_on` runs
        self._reading: Request | None = None
        self._waiting: list[Request] = []  # to be read, in the order of their heads
        # Replies whose connection ended before their turn.
        self._received: deque[tuple[str, Response]] = deque()

    def may_read(self, request: Request) -> bool:
        """Return whether the reply that has begun may be read now; else it waits."""
        if self.carrying_out or self._reading is not None:
            self._waiting.append(request)
            return False
        self._reading = request
        return True

    def forget(self, request: Request) -> None:
        """An attempt has ended: nothing more of it is read."""
        if self._reading is request:
            self._reading = None
        elif request in self._waiting:
            self._waiting.remove(request)

    def add(self, event_id: str, response: Response) -> None:
        """Carry out a reply that was read, now or in its turn."""
        if self.carrying_out or self._reading is not None:
            self._received.append((event_id, response))
        else:
            self._carry_out(event_id, response)

    def hold(self, told: "asyncio.Future[None]") -> None:
        """Let the next message and reply wait until frames of others have left."""
        if not self.carrying_out:
            self._wait_for(told)

    def go_on(self) -> None:
        """Take the next reply, unless one is being read or carried out."""
        if self._going_on:  # called again below: there may be hundreds of replies
            return
        self._going_on = True
        while not self.carrying_out and self._reading is None:
            if self._received:
                self._carry_out(*self._received.popleft())
            elif self._waiting:
                request = self._reading = self._waiting.pop(0)
                request.read_on()  # may end the attempt, which calls this
            else:
                break
        self._going_on = False

    def _carry_out(self, event_id: str, response: Response) -> None:
        self._wait_for(self._replies.carry_out(self._connection, event_id, response))

    def _wait_for(self, carried_out: "asyncio.Future[None] | None") -> None:
        awaited = carried_out or self._connection.has_room()
        self.carrying_out = awaited is not None
        if awaited is not None:
            awaited.add_done_callback(self._on_progress)

    def _on_progress(self, awaited: "asyncio.Future[None]") -> None:
        self._wait_for(None)
        self.go_on()
        if not self.carrying_out:
            self._on_carried_out()
