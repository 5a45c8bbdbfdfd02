"""What the tail saw, as lines of JSON on one long answer.

By `fetch`, not as an EventSource, which could bring no token.
"""

import asyncio
import json
import re
from http import HTTPStatus
from typing import Any

from tornado.iostream import StreamClosedError

from backends.deadlines import RunningTime
from handlers.operators.console.guarded import GuardedHandler
from handlers.operators.console.page import Clients
from handlers.operators.console.tail import (
    KINDS,
    MAX_FOLLOWED,
    MAX_VIEWERS,
    SHOWN_OF_BODY,
    Tail,
    Viewer,
    Wishes,
)
from handlers.operators.guard import OperatorGuard

TAKE_TIMEOUT = 30.0  # seconds that a viewer may take nothing
RETRY_AFTER = 5  # seconds

CONNECTION_ID = re.compile(r"[0-9a-f]{32}")
BEGINNING_OF_ID = re.compile(r"[0-9a-f]{0,32}")


class TailHandler(GuardedHandler):
    """What has to do with the tail."""

    def initialize(  # type: ignore[override] # each route's own keywords
        self, guard: OperatorGuard, tail: Tail
    ) -> None:
        super().initialize(guard)
        self.tail = tail


class LiveHandler(TailHandler):
    """`GET /console/live`: a `hello`, then `snapshot` and `events`, each a line."""

    def initialize(  # type: ignore[override] # each route's own keywords
        self, guard: OperatorGuard, tail: Tail, clients: Clients
    ) -> None:
        super().initialize(guard, tail)
        self.clients = clients
        self._viewer: Viewer | None = None

    async def get(self) -> None:
        self._viewer = viewer = self.tail.join()
        if viewer is None:
            self.set_header("Retry-After", str(RETRY_AFTER))
            self.problem(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"{MAX_VIEWERS} pages are open already, or the relay stops.",
            )
            return
        self.set_header("Content-Type", "application/x-ndjson; charset=utf-8")
        # A proxy that collects an answer would keep it for ever.
        self.set_header("X-Accel-Buffering", "no")
        try:
            await self._pass_on(json.dumps(self._hello(viewer)).encode() + b"\n")
            while not viewer.ended and self._is_allowed_still():
                await self._pass_on(await viewer.next())
            self.finish()
        except StreamClosedError:
            pass  # the page was closed
        except TimeoutError:
            self._abort()
        finally:
            viewer.leave()

    def _hello(self, viewer: Viewer) -> dict[str, Any]:
        return {
            "kind": "hello",
            "viewer": viewer.id,
            "bodies": self.tail.may_show_bodies,
            "shown_of_body": SHOWN_OF_BODY,
            "clients": self.clients.origin(self.request),
            "path": self.clients.path,
            **self.tail.named,
            "snapshot": self.tail.snapshot(),
        }

    async def _pass_on(self, lines: bytes) -> None:
        """Send them, when the ones before have been taken."""
        self.write(lines)
        async with RunningTime(asyncio.get_running_loop(), TAKE_TIMEOUT):
            await self.flush()

    def _is_allowed_still(self) -> bool:
        """Its token may have been taken away meanwhile."""
        given = self.request.headers.get_list("Authorization")
        return self.guard.tokens.challenge(given) is None

    def _abort(self) -> None:
        """Cut it off, where `finish` would wait for a peer that takes nothing."""
        connection: Any = self.request.connection
        stream = getattr(connection, "stream", None)
        if stream is not None:
            stream.close()
        else:
            connection.abort()

    def on_connection_close(self) -> None:
        super().on_connection_close()
        if self._viewer is not None:
            self._viewer.leave()


class ViewerHandler(TailHandler):
    """`POST /console/viewers/<id>`: what the viewer of that stream wishes to see.

    JSON with any of `kinds`, `connection`, `failures`, `followed` and `bodies`, as
    `Wishes` has them; what is not there is as in the beginning.
    """

    def post(self, viewer_id: str) -> None:
        wish = self.take_wish()
        if wish is None:
            return
        viewer = self.tail.viewer(viewer_id)
        if viewer is None:
            self.problem(HTTPStatus.NOT_FOUND, "There is no such viewer now.")
            return
        try:
            wishes = parse_wishes(wish)
        except ValueError as error:
            self.problem(HTTPStatus.BAD_REQUEST, str(error))
            return
        if wishes.bodies is not None and not self.tail.may_show_bodies:
            self.problem(
                HTTPStatus.FORBIDDEN, "Bodies are not shown: --console_bodies is off."
            )
            return
        viewer.wishes = wishes
        self.clear_header("Content-Type")
        self.set_status(HTTPStatus.NO_CONTENT)
        self.finish()


def parse_wishes(wish: dict[str, Any]) -> Wishes:
    """Raises `ValueError` with the sentence for a 400."""
    kinds = wish.get("kinds", sorted(KINDS))
    beginning = wish.get("connection", "")
    failures = wish.get("failures", False)
    followed = wish.get("followed", [])
    bodies = wish.get("bodies")
    if not isinstance(kinds, list) or not all(
        isinstance(kind, str) and kind in KINDS for kind in kinds
    ):
        raise ValueError(f"kinds is a list of {', '.join(sorted(KINDS))}.")
    if not isinstance(beginning, str) or not BEGINNING_OF_ID.fullmatch(beginning):
        raise ValueError("connection is the beginning of an id, in hex.")
    if not isinstance(failures, bool):
        raise ValueError("failures is true or false.")
    if (
        not isinstance(followed, list)
        or len(followed) > MAX_FOLLOWED
        or not all(map(_is_id, followed))
    ):
        raise ValueError(f"followed is a list of up to {MAX_FOLLOWED} ids.")
    if bodies is not None and not _is_id(bodies):
        raise ValueError("bodies is the id of one connection, or null.")
    return Wishes(frozenset(kinds), beginning, failures, frozenset(followed), bodies)


def _is_id(value: object) -> bool:
    return isinstance(value, str) and CONNECTION_ID.fullmatch(value) is not None
